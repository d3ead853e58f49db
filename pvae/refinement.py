"""Variational parameters of each datum's own: where the guide has put them, moved by an offset.

    q(z | x_n; delta_n):  each parameter t(u) of a guide site becomes t(u + delta_n)
    guide, data  --Refinement-->  delta, rows by datum  --refined-->  a guide again

What an amortised guide predicts for a datum is where gradient steps on that datum's own bound begin
(Kim et al. 2018, semi-amortised). The model and the guide's networks stay as they are.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    TransformedDistribution,
    constraints,
    transform_to,
)

from pvae.lowering import PACKAGE, CannotLower, Lowered
from pvae.objectives import ELBO, IWAE, Objective
from pvae.pair import Batch, Columns, Pair
from pvae.particles import Particles, Program, check_count
from pvae.plates import Plates
from pvae.programs import Programs
from pvae.site_module import ALTERNATIVES
from pvae.step import Speed

__all__ = ["ALONE", "FROM_THE_PRIOR", "Refine", "Refinement", "SemiAmortised", "refined"]

Names = Sequence[tuple[str, str]]  # of sites and their parameters


@dataclass(frozen=True)
class Refine:
    """How to refine a guide: Adam on each datum's own bound, its rate falling to zero.

    Args:
        steps: of Adam.
        num_particles: K of the bound, drawn anew for each step.
        lr: at the start, in unconstrained parameters.
        bound: "IWAE", whose best guide is the better proposal; or "ELBO", the guide's own bound.

    Raises:
        ValueError: for settings below one, or an unknown bound.
    """

    steps: int = 50
    num_particles: int = 8
    lr: float = 0.05
    bound: Literal["IWAE", "ELBO"] = "IWAE"

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("num_particles", self.num_particles)
        if not self.lr > 0:
            raise ValueError(f"`lr` must be above zero, got {self.lr}.")
        if self.bound not in ("IWAE", "ELBO"):
            raise ValueError(f"`bound` must be 'IWAE' or 'ELBO', got {self.bound!r}.")

    def objective(self, score_sites: Sequence[str]) -> Objective:
        """With the least variance that the guide's sites allow."""
        if self.bound == "ELBO":
            return ELBO(self.num_particles, gradient="pathwise" if score_sites else "stl")
        return IWAE(self.num_particles, "pathwise" if score_sites else "dreg")


FROM_AN_ENCODER = Refine(10, 4, 0.05, "ELBO")  # in training
FROM_THE_PRIOR = Refine(20, 1, 0.3, "ELBO")
ALONE = Refine(200, 8, 0.1, "ELBO")  # in evaluation, where no encoder begins


def refined(guide: Program, names: Names, offsets: Sequence[Tensor], plates: Plates) -> Program:
    """The guide with its parameters moved.

    Args:
        guide: Pyro program.
        names: of what is moved.
        offsets: by how much, (n, *rest) each, in unconstrained parameters.
        plates: where the data are.
    """
    by_site: dict[str, dict[str, Tensor]] = {}
    for (site, name), offset in zip(names, offsets, strict=True):
        by_site.setdefault(site, {})[name] = offset.movedim(0, plates.nesting + plates.dim)
    return _Moved(by_site)(guide)


class _Moved(Messenger):
    def __init__(self, offsets: Mapping[str, Mapping[str, Tensor]]):
        super().__init__()
        self.offsets = offsets

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.offsets and not msg["is_observed"]:
            msg["fn"] = _moved(msg["fn"], self.offsets[msg["name"]])


def _moved(d: Any, offsets: Mapping[str, Tensor]) -> Any:
    """A distribution of the same kind, its unconstrained parameters moved."""
    if isinstance(d, Independent):
        return _moved(d.base_dist, offsets).to_event(d.reinterpreted_batch_ndims)
    limits = _movable(d)
    if isinstance(d, TransformedDistribution) and not limits:
        return type(d)(_moved(d.base_dist, offsets), d.transforms)
    settings = {}
    for name in inspect.signature(type(d).__init__).parameters:
        if name in limits:
            to = transform_to(limits[name])
            settings[name] = to(to.inv(getattr(d, name)) + offsets[name])
        elif hasattr(d, name) and not any(name in group for group in ALTERNATIVES):
            settings[name] = getattr(d, name)
    return type(d)(**settings)


def _innermost(d: Any) -> Any:
    """The distribution whose parameters are moved."""
    if isinstance(d, Independent):
        return _innermost(d.base_dist)
    if isinstance(d, TransformedDistribution) and not _movable(d):
        return _innermost(d.base_dist)
    return d


def _movable(d: Distribution) -> dict[str, Any]:
    """Constraints of the continuous parameters that a distribution was made with."""
    found = d.arg_constraints
    if not isinstance(found, Mapping) or type(d).__name__ == "Delta":
        return {}
    limits = {
        name: limit
        for name, limit in found.items()
        if not constraints.is_dependent(limit) and not getattr(limit, "is_discrete", False)
    }
    made_with = {*vars(d), *vars(getattr(d, "base_dist", d))}
    for group in ALTERNATIVES:
        own = [name for name in group if name in limits and name in made_with]
        for name in set(group) & limits.keys() - set(own[:1]):
            del limits[name]
    return limits


class Offsets:
    """What of a guide can be moved, datum by datum.

    Args:
        programs: a model and its guide over some data.
        name: of the model, for messages.

    Attributes:
        names: of sites and their parameters.

    Raises:
        ValueError: for a guide without a continuous parameter.
    """

    def __init__(self, programs: Programs, name: str):
        sites = programs.guide_sites()
        own = {key: _movable(_innermost(site["fn"])) for key, site in sites.items()}
        self.names = [(site, key) for site, limits in own.items() for key in limits]
        if not self.names:
            raise ValueError(f"The guide of {name!r} has no continuous parameter to refine.")
        self.score_sites = [key for key, site in sites.items() if not site["fn"].has_rsample]
        plates = programs.plates
        self.like = [_value(sites[site]["fn"], key, plates).detach() for site, key in self.names]

    def zeros(self, num_data: int) -> list[Tensor]:
        """Offsets that move nothing, (n, *rest) each."""
        return [values.new_zeros(num_data, *values.shape[1:]) for values in self.like]

    def moved(self, programs: Programs, offsets: Sequence[Tensor]) -> Programs:
        """The model, and the guide moved."""
        return programs.with_guide(
            lambda guide: refined(guide, self.names, offsets, programs.plates)
        )

    def gradients(
        self, programs: Programs, objective: Objective, offsets: Sequence[Tensor]
    ) -> list[Tensor]:
        """Of minus the objective, by offset."""
        with torch.enable_grad():
            leaves = [offset.detach().requires_grad_() for offset in offsets]
            _, total = objective.estimate(self.moved(programs, leaves))
            found = torch.autograd.grad(-total, leaves, allow_unused=True)
        return [torch.zeros_like(o) if g is None else g for o, g in zip(leaves, found, strict=True)]


def _value(d: Any, name: str, plates: Plates) -> Tensor:
    """A parameter of a site, data first: (n, *rest), without particles."""
    value = getattr(_innermost(d), name)
    batch = len(d.batch_shape)
    rows = value.reshape((1,) * (plates.nesting - batch) + value.shape)
    return rows[(0,) * max(0, batch - plates.nesting)].movedim(plates.nesting + plates.dim, 0)


def descend(
    gradients: Callable[[list[Tensor]], list[Tensor]], offsets: list[Tensor], how: Refine
) -> list[Tensor]:
    """Steps of Adam (Kingma & Ba 2015, algorithm 1), as operations that a graph can hold."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = [torch.zeros_like(offset) for offset in offsets]
    v = [torch.zeros_like(offset) for offset in offsets]
    for t in range(1, how.steps + 1):
        lr = how.lr * (1 - (t - 1) / how.steps)
        g = gradients(offsets)
        m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g, strict=True)]
        v = [beta2 * a + (1 - beta2) * b.square() for a, b in zip(v, g, strict=True)]
        size, root = lr / (1 - beta1**t), math.sqrt(1 - beta2**t)
        offsets = [
            x - size * a / (b.sqrt() / root + eps) for x, a, b in zip(offsets, m, v, strict=True)
        ]
    return offsets


class Refinement:
    """Finds the offsets of one block of data after another.

    Args:
        pair: in evaluation mode, prepared for its data.
        columns: whose rows a block holds.
        block: an example, (n, *event) by column.
        how: steps, particles, rate.
        speed: how gradients are computed, where they can be lowered.
    """

    def __init__(
        self, pair: Pair, columns: Columns, block: list[Tensor], how: Refine, speed: Speed
    ):
        self.pair, self.columns, self.how = pair, columns, how
        programs = pair.programs(columns.observed(block))
        self.offsets = Offsets(programs, pair.name)
        self.objective = how.objective(self.offsets.score_sites)
        self.objective.prepare(programs)
        self.shapes = [values.shape for values in block]
        self.lowered: Lowered | None = None
        if speed != "eager":
            self._lower(block, speed == "compiled")

    def _lower(self, block: list[Tensor], compile: bool) -> None:
        example = [*self.offsets.zeros(len(block[0])), *block]
        try:
            with torch.random.fork_rng():
                self.lowered = Lowered(self.pair, self._gradients, example)
            if compile:
                self.lowered.compile(*example)
        except CannotLower as error:
            what = f"The guide is refined without being compiled: {error}."
            warnings.warn(what, skip_file_prefixes=PACKAGE)

    def _gradients(self, pair: Pair, *tensors: Tensor) -> list[Tensor | None]:
        """Of minus the bound, by offset."""
        number = len(self.offsets.names)
        programs = pair.programs(self.columns.observed(tensors[number:]))
        return [*self.offsets.gradients(programs, self.objective, tensors[:number])]

    def programs(self, pair: Pair, block: Sequence[Tensor], offsets: Sequence[Tensor]) -> Programs:
        """The model, and the guide moved by offsets."""
        return self.offsets.moved(pair.programs(self.columns.observed(block)), offsets)

    def __call__(self, block: list[Tensor]) -> list[Tensor]:
        """The offsets of these data, (n, *rest) each."""
        run: Callable[..., Any] = partial(self._gradients, self.pair)
        if self.lowered is not None and [values.shape for values in block] == self.shapes:
            run = self.lowered
        zeros = self.offsets.zeros(len(block[0]))
        return descend(lambda offsets: run(*offsets, *block), zeros, self.how)


def refined_programs(pair: Pair, batch: Batch) -> Programs:
    """A model and its guide, refined for these data from where no encoder begins."""
    programs = pair.programs(batch)
    offsets = Offsets(programs, pair.name)
    objective = ALONE.objective(offsets.score_sites)
    objective.prepare(programs)
    zeros = offsets.zeros(programs.num_data)
    found = descend(lambda o: offsets.gradients(programs, objective, o), zeros, ALONE)
    return offsets.moved(programs, found)


class SemiAmortised(Objective):
    """An objective on a guide that is refined for each datum of each batch before it is used.

    The guide's networks learn where to begin, and the model learns from where steps end (Kim et
    al. 2018, without the derivative of the steps themselves). With a guide that depends on no data
    (`guide="per-datum"`) it is SVI with variational parameters of each datum's own, as it was
    before amortisation (Hoffman et al. 2013).

    Args:
        objective: of the refined guide, `ELBO()` where left out.
        refine: how guides are refined in training. Left out, `Refine(10, 4, 0.05, "ELBO")`, from
            where an encoder begins; `fit` takes `Refine(20, 1, 0.3, "ELBO")` for a guide that is
            "per-datum" and no objective of this kind.
    """

    def __init__(self, objective: Objective | None = None, refine: Refine = FROM_AN_ENCODER):
        objective = ELBO() if objective is None else objective
        super().__init__(objective.num_particles, objective.baseline)
        self.objective, self.refine = objective, refine
        self.cuts, self.dreams = objective.cuts, objective.dreams
        self._offsets: Offsets | None = None

    @property
    def draws(self) -> int:
        """Particles drawn for each datum, once its guide is refined."""
        return self.objective.draws

    def prepare(self, programs: Programs) -> None:
        """Find what can be moved, and prepare both objectives. Once."""
        self.objective.prepare(programs)
        if self._offsets is None:
            self._offsets = Offsets(programs, "model")
            self.of_guide = self.refine.objective(self._offsets.score_sites)
            self.of_guide.prepare(programs)

    def estimate(self, programs: Programs) -> tuple[Particles, Tensor]:
        """The objective of the refined guide."""
        return self.objective.estimate(self._refined(programs))

    def draw(self, programs: Programs) -> Particles:
        """Particles of the refined guide."""
        return self.objective.draw(self._refined(programs))

    def _refined(self, programs: Programs) -> Programs:
        assert self._offsets is not None
        found = self._offsets
        zeros = found.zeros(programs.num_data)

        def gradients(offsets: list[Tensor]) -> list[Tensor]:
            return found.gradients(programs, self.of_guide, offsets)

        return found.moved(programs, descend(gradients, zeros, self.refine))

    def value(self, log_weights: Tensor) -> Tensor:
        """The objective's."""
        return self.objective.value(log_weights)

    def bound(self, particles: Particles) -> Tensor:
        """The objective's."""
        return self.objective.bound(particles)

    def extras(self, particles: Particles) -> dict[str, Tensor]:
        """The objective's."""
        return self.objective.extras(particles)

    def at(self, step: int) -> None:
        """Of a schedule."""
        self.objective.at(step)

    def fresh(self) -> "SemiAmortised":
        """A copy that has met no programs yet."""
        return SemiAmortised(self.objective.fresh(), self.refine)
