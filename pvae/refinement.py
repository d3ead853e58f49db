"""Variational parameters of each datum's own: where the guide has put them, moved by an offset.

    q(z | x_n; delta_n):  each parameter t(u) of a guide site becomes t(u + delta_n)
    guide, data  --Refinement-->  delta, rows by datum  --refined-->  a guide again

What an amortised guide predicts for a datum is where gradient steps on that datum's own bound begin
(Kim et al. 2018, semi-amortised). The model and the guide's networks stay as they are.
"""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from pvae.pair import Columns, Pair
from pvae.particles import Program, check_count
from pvae.plates import Plates
from pvae.programs import Programs
from pvae.sites import ALTERNATIVES
from pvae.step import Speed

__all__ = ["Refine", "Refinement", "refined"]

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


class Refinement:
    """Finds the offsets of a block of data.

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
        sites = programs.guide_sites()
        own = {name: _movable(_innermost(site["fn"])) for name, site in sites.items()}
        self.names = [(site, name) for site, limits in own.items() for name in limits]
        if not self.names:
            raise ValueError(f"The guide of {pair.name!r} has no continuous parameter to refine.")
        self.rests = [self._rest(sites[site]["fn"], name) for site, name in self.names]
        self.objective = how.objective([n for n, s in sites.items() if not s["fn"].has_rsample])
        self.objective.prepare(programs)
        self.shapes = [values.shape for values in block]
        self.lowered: Lowered | None = None
        if speed != "eager":
            self._lower(block, speed == "compiled")

    def _rest(self, d: Any, name: str) -> tuple[int, ...]:
        """Shape of a parameter but for particles and data, plates that it lacks in front."""
        nesting, dim = self.pair.plates.nesting, self.pair.plates.dim
        shape = list(getattr(_innermost(d), name).shape)
        batch = len(d.batch_shape)
        shape = [1] * (nesting - batch) + shape[max(0, batch - nesting) :]
        del shape[nesting + dim]
        return tuple(shape)

    def _lower(self, block: list[Tensor], compile: bool) -> None:
        example = [*self._start(block), *block]
        try:
            with torch.random.fork_rng():
                self.lowered = Lowered(self.pair, self._gradients, example)
            if compile:
                self.lowered.compile(*example)
        except CannotLower as error:
            what = f"The guide is refined without being compiled: {error}."
            warnings.warn(what, skip_file_prefixes=PACKAGE)

    def _start(self, block: list[Tensor]) -> list[Tensor]:
        like = next((p for p in self.pair.parameters()), block[0])
        size = len(block[0])
        return [like.new_zeros(size, *rest) for rest in self.rests]

    def _gradients(self, pair: Pair, *tensors: Tensor) -> list[Tensor | None]:
        """Of minus the bound, by offset."""
        offsets, block = tensors[: len(self.names)], tensors[len(self.names) :]
        with torch.enable_grad():
            leaves = [offset.detach().requires_grad_() for offset in offsets]
            programs = self.programs(pair, block, leaves)
            _, total = self.objective.estimate(programs)
            found = torch.autograd.grad(-total, leaves, allow_unused=True)
        return [torch.zeros_like(o) if g is None else g for o, g in zip(leaves, found, strict=True)]

    def programs(self, pair: Pair, block: Sequence[Tensor], offsets: Sequence[Tensor]) -> Programs:
        """The model, and the guide moved by offsets."""
        return pair.programs(self.columns.observed(block)).with_guide(
            lambda guide: refined(guide, self.names, offsets, pair.plates)
        )

    def __call__(self, block: list[Tensor]) -> list[Tensor]:
        """The offsets of these data, (n, *rest) each."""
        offsets = self._start(block)
        optimizer = torch.optim.Adam(offsets, lr=self.how.lr)
        fits = [values.shape for values in block] == self.shapes
        for i in range(self.how.steps):
            tensors = [*offsets, *block]
            if self.lowered is not None and fits:
                found = self.lowered(*tensors)
            else:
                found = self._gradients(self.pair, *tensors)
            for offset, gradient in zip(offsets, found, strict=True):
                offset.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = self.how.lr * (1 - i / self.how.steps)
            optimizer.step()
        return offsets
