"""Weight passes: log w of many particles for many data, in memory that no K can fill.

    data --blocks--> a block of data --passes--> log w of some particles for it, (k, n)

What no draw changes (the encoder, the constants of log p and log q) is computed once a block; a
pass holds as many rows as a cache does. Like steps of training, passes run at three speeds with the
same random numbers: in Pyro, as the graph that is read out of it, and as that graph compiled.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from pvae.fence import evaluating, fenced, module_device
from pvae.likelihoods import CheapLikelihoods
from pvae.lowering import PACKAGE, CannotLower, Lowered, compiled, hoist
from pvae.pair import Columns, Pair, check_pair
from pvae.particles import Particles
from pvae.points import REPLICATES, Points, Scores, widths
from pvae.refinement import Refine, Refinement
from pvae.step import Speed

__all__ = ["How", "Proposal", "Weights", "blocks", "log_weights", "speed_for", "weigh"]

Proposal = str | Refine
LONG = 10_000_000  # weights that save more time than compiling takes
SHORT = 400_000  # weights that save more time than reading their pass out of Pyro takes

MAX_ROWS = 2048  # particle-datum pairs in one pass: its activations fit a cache
MAX_ROWS_CUDA = 2**17  # enough to keep a device busy
PARTICLES_TOGETHER = 64  # at most; they share one run of the encoder
MAX_WEIGHTS = 2**22  # weights held at once, for as many data as that leaves room for


def blocks(
    num_data: int, num_particles: int, max_rows: int, max_weights: int
) -> Iterable[tuple[slice, list[int]]]:
    """Cut a (K, N) pass into blocks of data, and each block into passes over some particles.

    Args:
        num_data: N.
        num_particles: K.
        max_rows: most particle-datum pairs in one pass (at least one datum, one particle).
        max_weights: most weights held for one block of data.

    Yields:
        The slice of data, and the numbers of particles of its passes, which sum to K exactly.
    """
    together = _even(num_particles, PARTICLES_TOGETHER)
    size = max(1, min(num_data, max_weights // num_particles, max_rows // together))
    for start in range(0, num_data, size):
        stop = min(start + size, num_data)
        most = _even(num_particles, max(1, max_rows // (stop - start)))
        passes = [most] * (num_particles // most)
        if rest := num_particles % most:
            passes.append(rest)
        yield slice(start, stop), passes


def _even(num_particles: int, most: int) -> int:
    """Particles a pass: so many that all passes are alike, if that takes less than half away."""
    sizes = range(min(num_particles, most), most // 2, -1)
    return next((size for size in sizes if num_particles % size == 0), min(num_particles, most))


def speed_for(num_weights: int, compile: bool | Literal["auto"]) -> Speed:
    """What pays. A rule of numbers, not of times, so that results can be repeated."""
    if compile not in (True, False, "auto"):
        raise ValueError(f"`compile` must be True, False or 'auto', got {compile!r}.")
    if compile != "auto":
        return "compiled" if compile else "eager"
    return "compiled" if num_weights >= LONG else "traced" if num_weights >= SHORT else "eager"


@dataclass(frozen=True)
class How:
    """How particles are drawn.

    Args:
        proposal: "guide", "prior" or "defensive".
        refine: how to refine the guide, if it is to be.
        points: "random" or "sobol".

    Raises:
        ValueError: for other points, or a combination that there is not.
    """

    proposal: str = "guide"
    refine: Refine | None = None
    points: Literal["random", "sobol"] = "random"

    def __post_init__(self) -> None:
        if self.points not in ("random", "sobol"):
            raise ValueError(f"`points` must be 'random' or 'sobol', got {self.points!r}.")
        if self.points == "sobol" and self.proposal == "defensive":
            raise ValueError("The defensive proposal is drawn at random points: it is a mixture.")

    @classmethod
    def of(cls, proposal: Proposal, points: Literal["random", "sobol"] = "random") -> "How":
        """From what a caller says: "refined" and a `Refine` are the guide, refined."""
        if proposal == "refined":
            proposal = Refine()
        if isinstance(proposal, Refine):
            return cls("guide", proposal, points)
        return cls(proposal, None, points)

    @property
    def name(self) -> str:
        """For tables."""
        found = self.proposal if self.refine is None else f"refined {self.proposal}"
        return found if self.points == "random" else f"{found}, at Sobol points"

    @property
    def replicates(self) -> int | None:
        """Independent parts of the particles, where not each is independent."""
        return None if self.points == "random" else REPLICATES


class Drawing:
    """Draws particles for one block of data after another.

    Args:
        pair: in evaluation mode, prepared for its data.
        columns: whose rows a block holds.
        block: an example, (n, *event) by column.
        num_particles: K.
        how: they are drawn.
        speed: how gradients are computed where the guide is refined.
    """

    def __init__(
        self,
        pair: Pair,
        columns: Columns,
        block: list[Tensor],
        num_particles: int,
        how: How,
        speed: Speed,
    ):
        self.columns, self.num_particles, self.num_columns = columns, num_particles, len(block)
        self.proposal = how.proposal
        self.refinement: Refinement | None = None
        if how.refine is not None:
            self.refinement = Refinement(pair, columns, block, how.refine, speed)
        self.widths: dict[str, int] = {}
        if how.points == "sobol":
            self.widths = widths(pair.programs(columns.observed(block), how.proposal))

    def begin(self, block: list[Tensor]) -> list[Tensor]:
        """The block, and what else stays as it is while its particles are drawn."""
        if self.widths:
            size = sum(self.widths.values())
            self.scores = Scores(self.num_particles, len(block[0]), size)
        return block if self.refinement is None else [*block, *self.refinement(block)]

    def points(self, start: int, stop: int, like: Tensor) -> list[Tensor]:
        """Where particles start..stop-1 are, unless they are drawn at random."""
        return [self.scores(start, stop, like)] if self.widths else []

    def __call__(self, pair: Pair, num_particles: int, *tensors: Tensor) -> Particles:
        """Some particles of a block that was begun, at their points."""
        block, others = list(tensors[: self.num_columns]), list(tensors[self.num_columns :])
        where = Points(self.widths, others.pop()) if self.widths else nullcontext()
        with where:
            if self.refinement is None:
                batch = self.columns.observed(block)
                return pair.draw(batch, num_particles, self.proposal)
            return self.refinement.programs(pair, block, others).draw(num_particles)


def weigh(
    pair: Pair,
    columns: Columns,
    num_particles: int,
    how: How,
    speed: Speed = "eager",
    max_rows: int | None = None,
    whole: int = 0,
) -> Iterator[tuple[slice, Iterator[tuple[Tensor, Particles | None]]]]:
    """Pass over data in blocks, and over particles within each.

    Args:
        pair: prepared for the data.
        columns: its data, checked and realised.
        num_particles: K.
        how: particles are drawn.
        speed: how passes run, where they can be lowered.
        max_rows: most particle-datum pairs in one pass.
        whole: of how many particles, at least, all is wanted, not their weights alone.

    Yields:
        A slice of the data, and pass by pass the weights (k, n) of its particles, K in all; with
        the particles themselves, for those that are wanted whole.
    """
    tensors = columns.tensors()
    usual = MAX_ROWS_CUDA if tensors[0].device.type == "cuda" else MAX_ROWS
    max_rows = max(1, (max_rows or usual) // pair.categories)
    lowered: _Pass | None = None
    drawing: Drawing | None = None
    for rows, passes in blocks(len(columns), num_particles, max_rows, MAX_WEIGHTS):
        block = [values[rows] for values in tensors]
        if drawing is None:
            drawing = Drawing(pair, columns, block, num_particles, how, speed)
        begun = drawing.begin(block)
        if rows.start == 0 and speed != "eager" and len(passes) > 1:
            lowered = _lower(pair, drawing, begun, passes[0], speed)
        yield rows, _passes(pair, drawing, begun, passes, lowered, whole)


def _lower(
    pair: Pair, drawing: Drawing, begun: list[Tensor], size: int, speed: Speed
) -> "_Pass | None":
    """A lowered pass, or the next best thing with a word on why."""
    try:
        return _Pass(pair, drawing, begun, size, speed == "compiled")
    except CannotLower as error:
        what = f"Weights are drawn without being compiled: {error}."
        warnings.warn(what, skip_file_prefixes=PACKAGE)
    try:
        return _Pass(pair, drawing, begun, size, False) if speed == "compiled" else None
    except CannotLower:
        return None


def _passes(
    pair: Pair,
    drawing: Drawing,
    begun: list[Tensor],
    passes: Sequence[int],
    lowered: "_Pass | None",
    whole: int,
) -> Iterator[tuple[Tensor, Particles | None]]:
    if lowered is not None and not lowered.begin(begun):
        lowered = None
    drawn = 0
    for size in passes:
        points = drawing.points(drawn, drawn + size, begun[0])
        if lowered is not None and drawn >= whole and size == lowered.num_particles:
            yield lowered(*points), None
        else:
            particles = drawing(pair, size, *begun, *points)
            yield particles.log_weights, particles
        drawn += size


def log_weights(
    pair: Pair,
    data: Any,
    num_particles: int = 1,
    *,
    proposal: Proposal = "guide",
    max_rows: int | None = None,
    seed: int = 0,
) -> Tensor:
    """log w[k, n] = log p(x_n, z_kn) - log q(z_kn | x_n), z_kn ~ q(z | x_n), without gradients.

    Discrete latents without a guide entry are summed out; where every latent is, each weight is
    log p(x_n) itself.

    Args:
        pair: `LatentModel` or `PyroPair`.
        data: (N, *event), or a mapping from site names to columns.
        num_particles: K, drawn exactly.
        proposal: "guide"; "prior" for naive Monte Carlo, z_kn ~ p(z); "defensive", a mixture; or
            "refined", the guide after gradient steps on each datum (see `evaluate`).
        max_rows: most particle-datum pairs in one pass; memory depends on it, the law does not.
        seed: of the draws. The caller's random state stays as it was.

    Returns:
        (K, N), nats.

    Raises:
        ValueError: for data that do not fit the model.
    """
    check_pair(pair)
    how = How.of(proposal)
    device = module_device(pair)
    columns = pair.columns(data).realised().to(device)
    pair.prepare(columns.rows(slice(0, 13)))
    with evaluating(pair), fenced(seed, device):
        found = []
        for _, passes in weigh(pair, columns, num_particles, how, max_rows=max_rows):
            weights = Weights(num_particles)
            for some, _ in passes:
                weights.add(some)
            found.append(weights.whole)
    return torch.cat(found, dim=1)


class Weights:
    """Weights of a block, (K, n), filled pass by pass.

    Kept as the small tensors that passes return, they would lie in the gaps that the large ones of
    a pass leave, which then fit no more: memory would grow by a pass's need with each pass.
    """

    def __init__(self, num_particles: int):
        self.num_particles, self.done = num_particles, 0
        self.whole = torch.empty(0)

    def add(self, some: Tensor) -> None:
        """The weights (k, n) of the next pass."""
        if self.done == 0:
            self.whole = some.new_empty(self.num_particles, some.shape[1])
        self.whole[self.done : self.done + len(some)] = some
        self.done += len(some)


class _Pass:
    """Weights of k particles for a block of n data, as a graph in two parts.

    Args:
        pair: in evaluation mode.
        drawing: how particles are drawn.
        begun: an example of what stays for a block, (n, *) each.
        num_particles: k.
        compile: whether inductor compiles the second part.

    Raises:
        CannotLower: if the program depends on values, or cannot be compiled.
    """

    def __init__(
        self,
        pair: Pair,
        drawing: Drawing,
        begun: list[Tensor],
        num_particles: int,
        compile: bool,
    ):
        def weights(pair: Pair, *tensors: Tensor) -> list[Tensor | None]:
            return [drawing(pair, num_particles, *tensors).log_weights]

        def cheap(pair: Pair, *tensors: Tensor) -> list[Tensor | None]:
            with CheapLikelihoods():
                return weights(pair, *tensors)

        self.shapes = [values.shape for values in begun]
        self.num_particles = num_particles
        points = drawing.points(0, num_particles, begun[0])
        function = cheap if compile else weights
        self.lowered = Lowered(pair, function, [*begun, *points])
        assert isinstance(self.lowered.graph, fx.GraphModule)
        self.hoisted, self.body, self.late = hoist(self.lowered.graph, len(points))
        self.begin(begun)
        if compile:
            self.body = compiled(self.body, self._inputs(points))

    def begin(self, begun: list[Tensor]) -> bool:
        """Compute what all passes over a block share, unless it is of another size."""
        if [values.shape for values in begun] != self.shapes:
            return False
        blank = [torch.empty(0)] * len(self.late)
        with torch.no_grad():
            self.inputs = self.hoisted(*self.lowered.state.values(), *begun, *blank)
        return True

    def _inputs(self, points: Sequence[Tensor]) -> list[Tensor]:
        inputs = list(self.inputs)
        for place, values in zip(self.late, points, strict=True):
            inputs[place] = values
        return inputs

    def __call__(self, *points: Tensor) -> Tensor:
        """log w of k new draws, (k, n)."""
        with torch.no_grad():
            found = self.body(*self._inputs(points))
        return found if isinstance(found, Tensor) else found[0]
