"""Weight passes: log w of many particles for many data, in memory that no K can fill.

    data --blocks--> a block of data --passes--> log w of some particles for it, (k, n)

What no draw changes (the encoder, the constants of log p and log q) is computed once a block; a
pass holds as many rows as a cache does. Like steps of training, passes run at three speeds with the
same random numbers: in Pyro, as the graph that is read out of it, and as that graph compiled.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pvae.fence import evaluating, fenced, module_device
from pvae.likelihoods import CheapLikelihoods
from pvae.lowering import PACKAGE, CannotLower, Lowered, compiled, hoist
from pvae.pair import Columns, Pair
from pvae.particles import Particles
from pvae.step import Speed

__all__ = ["Weights", "blocks", "log_weights", "weigh"]

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


def weigh(
    pair: Pair,
    columns: Columns,
    num_particles: int,
    proposal: str,
    speed: Speed = "eager",
    max_rows: int | None = None,
    whole: int = 0,
) -> Iterator[tuple[slice, Iterator[tuple[Tensor, Particles | None]]]]:
    """Pass over data in blocks, and over particles within each.

    Args:
        pair: prepared for the data.
        columns: its data, checked and realised.
        num_particles: K.
        proposal: "guide", "prior" or "defensive".
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
    for rows, passes in blocks(len(columns), num_particles, max_rows, MAX_WEIGHTS):
        block = [values[rows] for values in tensors]
        if rows.start == 0 and speed != "eager" and len(passes) > 1:
            lowered = _lower(pair, columns, block, passes[0], proposal, speed)
        yield rows, _passes(pair, columns, block, passes, proposal, lowered, whole)


def _lower(
    pair: Pair, columns: Columns, block: list[Tensor], size: int, proposal: str, speed: Speed
) -> "_Pass | None":
    """A lowered pass, or the next best thing with a word on why."""
    try:
        return _Pass(pair, columns, block, size, proposal, speed == "compiled")
    except CannotLower as error:
        what = f"Weights are drawn without being compiled: {error}."
        warnings.warn(what, skip_file_prefixes=PACKAGE)
    try:
        return _Pass(pair, columns, block, size, proposal, False) if speed == "compiled" else None
    except CannotLower:
        return None


def _passes(
    pair: Pair,
    columns: Columns,
    block: list[Tensor],
    passes: Sequence[int],
    proposal: str,
    lowered: "_Pass | None",
    whole: int,
) -> Iterator[tuple[Tensor, Particles | None]]:
    batch = columns.observed(block)
    if lowered is not None and not lowered.begin(block):
        lowered = None
    drawn = 0
    for size in passes:
        if lowered is not None and drawn >= whole and size == lowered.num_particles:
            yield lowered(), None
        else:
            particles = pair.draw(batch, size, proposal)
            yield particles.log_weights, particles
        drawn += size


def log_weights(
    pair: Pair,
    data: Any,
    num_particles: int = 1,
    *,
    proposal: str = "guide",
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
        proposal: "guide"; "prior" for naive Monte Carlo, z_kn ~ p(z); or "defensive", a mixture.
        max_rows: most particle-datum pairs in one pass; memory depends on it, the law does not.
        seed: of the draws. The caller's random state stays as it was.

    Returns:
        (K, N), nats.

    Raises:
        ValueError: for data that do not fit the model.
    """
    device = module_device(pair)
    columns = pair.columns(data).realised().to(device)
    pair.prepare(columns.rows(slice(0, 13)))
    with evaluating(pair), fenced(seed, device):
        found = []
        for _, passes in weigh(pair, columns, num_particles, proposal, max_rows=max_rows):
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
        columns: whose rows a block holds.
        block: an example, (n, *event) by column.
        num_particles: k.
        proposal: "guide" or "prior".
        compile: whether inductor compiles the second part.

    Raises:
        CannotLower: if the program depends on values, or cannot be compiled.
    """

    def __init__(
        self,
        pair: Pair,
        columns: Columns,
        block: list[Tensor],
        num_particles: int,
        proposal: str,
        compile: bool,
    ):
        def weights(pair: Pair, *block: Tensor) -> list[Tensor | None]:
            return [pair.draw(columns.observed(block), num_particles, proposal).log_weights]

        def cheap(pair: Pair, *block: Tensor) -> list[Tensor | None]:
            with CheapLikelihoods():
                return weights(pair, *block)

        self.shapes = [values.shape for values in block]
        self.num_particles = num_particles
        self.lowered = Lowered(pair, cheap if compile else weights, block)
        assert isinstance(self.lowered.graph, fx.GraphModule)
        self.hoisted, self.body = hoist(self.lowered.graph)
        self.begin(block)
        if compile:
            self.body = compiled(self.body, self.inputs)

    def begin(self, block: list[Tensor]) -> bool:
        """Compute what all passes over a block share, unless it is of another size."""
        if [values.shape for values in block] != self.shapes:
            return False
        with torch.no_grad():
            self.inputs = self.hoisted(*self.lowered.state.values(), *block)
        return True

    def __call__(self) -> Tensor:
        """log w of k new draws, (k, n)."""
        with torch.no_grad():
            found = self.body(*self.inputs)
        return found if isinstance(found, Tensor) else found[0]
