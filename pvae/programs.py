"""A model and its guide together with what they are called with: what an objective draws from.

Programs  --draw-->   Particles on the data
Programs  --dream-->  log q(z | x) of z and x that the model itself has drawn, (N,)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample as is_subsample
from torch import Tensor

from pvae.particles import Particles, Program, draw, guide_factors
from pvae.plates import Plates

__all__ = ["Place", "Programs", "find_places"]

Place = tuple[int | str, ...]  # an argument's number or keyword, and its key if it is a mapping


@dataclass(frozen=True)
class Programs:
    """A model and a guide over one batch.

    Args:
        model: Pyro program.
        guide: Pyro program.
        args: what both are called with.
        kwargs: the same, by keyword.
        plates: where the data are.
        vectorize: whether one pass draws all particles.
        places: where among the arguments each observed site's data are, if that is known.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    plates: Plates = field(default_factory=Plates)
    vectorize: bool = True
    places: Mapping[str, Place] | None = None

    def draw(self, num_particles: int = 1, cut: bool = False) -> Particles:
        """K particles for each datum; see `particles.draw`."""
        return draw(
            self.model,
            self.guide,
            self.args,
            self.kwargs,
            num_particles=num_particles,
            plates=self.plates,
            vectorize=self.vectorize,
            cut=cut,
        )

    def score_sites(self) -> list[str]:
        """Guide sites without reparameterisation."""
        with torch.no_grad(), torch.random.fork_rng(), poutine.block():
            trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
        sites: Any = {name: trace.nodes[name] for name in trace.stochastic_nodes}
        return [n for n, s in sites.items() if not s["fn"].has_rsample and not is_subsample(s)]

    def auxiliary_sites(self) -> list[str]:
        """Guide sites that are none of the model's, but steps on the way to one."""
        with torch.no_grad(), torch.random.fork_rng(), poutine.block():
            trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
        sites: Any = {name: trace.nodes[name] for name in trace.stochastic_nodes}
        return [name for name, site in sites.items() if site["infer"].get("is_auxiliary")]

    def dream(self) -> Tensor:
        """log q(z | x), with z and x drawn from the model, as many as there are data: (N,), nats.

        Differentiable in the guide's parameters alone.

        Raises:
            ValueError: where an observed site's data are not one of the programs' arguments.
        """
        if self.places is None:
            raise ValueError(
                "The sleep phase gives the guide data that the model has drawn, and cannot tell "
                "which argument holds those of each observed site. Pass them to model and guide as "
                "they are observed, whole batches and not a subsample."
            )
        with torch.no_grad():
            model = poutine.uncondition(self.model)
            dreamt = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        drawn: dict[str, Any] = {name: dreamt.nodes[name]["value"] for name in self.places}
        args, kwargs = _put(self.args, self.kwargs, self.places, drawn)
        guide = poutine.replay(self.guide, trace=dreamt)
        factors = guide_factors(poutine.trace(guide).get_trace(*args, **kwargs), self.plates)
        return sum((factor.reshape(-1) for factor in factors), torch.zeros(()))


def find_places(
    model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, Place] | None:
    """Where among the arguments the data of each observed site are; None if one is not found."""
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    arguments: dict[Place, Any] = {(i,): value for i, value in enumerate(args)}
    arguments |= {(key,): value for key, value in kwargs.items()}
    for place, argument in list(arguments.items()):
        if isinstance(argument, Mapping):
            arguments |= {(*place, key): own for key, own in argument.items()}
    found = {}
    for name in trace.observation_nodes:
        value: Any = trace.nodes[name]["value"]
        places = [place for place, own in arguments.items() if _holds(own, value)]
        if not places:
            return None
        found[name] = places[0]
    return found


def _holds(argument: Any, value: Tensor) -> bool:
    if argument is value:
        return True
    same_shape = isinstance(argument, Tensor) and argument.shape == value.shape
    return same_shape and torch.equal(argument.to(value.dtype), value)


def _put(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    places: Mapping[str, Place],
    drawn: Mapping[str, Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with what was drawn in its places."""
    arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for name, place in places.items():
        key, *inner = place
        value = drawn[name]
        arguments[key] = {**arguments[key], inner[0]: value} if inner else value
    return tuple(arguments[i] for i in range(len(args))), {k: arguments[k] for k in kwargs}
