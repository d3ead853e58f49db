"""A model and its guide together with what they are called with: what an objective draws from.

Programs  --draw-->   Particles on the data
Programs  --dream-->  log q(z | x) of z and x that the model itself has drawn, (N,)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor, nn

from pvae.fence import evaluating
from pvae.particles import Particles, Program, draw, guide_factors
from pvae.plates import Plates, samples

__all__ = ["Places", "Programs", "Unobserved", "find_places", "is_deterministic"]

Place = tuple[int | str, ...]  # an argument's number or keyword, and its key if it is a mapping
Places = Mapping[str, Sequence[Place]]


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
    places: Places | None = None

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

    @property
    def num_data(self) -> int:
        """Rows of the first tensor among the arguments."""
        first = (*self.args, *self.kwargs.values())[0]
        return len(next(iter(first.values())) if isinstance(first, Mapping) else first)

    def with_guide(self, change: Callable[[Program], Program]) -> "Programs":
        """The same model with a guide made of this one."""
        return replace(self, guide=change(self.guide))

    def guide_sites(self) -> dict[str, Any]:
        """Sites that the guide draws, by name, from a run of it."""
        with self.looking():
            trace = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            return {site["name"]: site for site in samples(trace)}

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Run the programs to see what they are like, without a trace of it in anything."""
        with ExitStack() as stack:
            for owner in _owners(self.model, self.guide):
                stack.enter_context(evaluating(owner))
            for context in (torch.no_grad(), torch.random.fork_rng(), poutine.block()):
                stack.enter_context(context)
            yield

    def dream(self) -> Tensor:
        """log q(z | x), with z and x drawn from the model, as many as there are data: (N,), nats.

        Differentiable in the parameters that the guide uses alone.

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
            dreamt = poutine.trace(Unobserved()(self.model)).get_trace(*self.args, **self.kwargs)
        drawn: dict[str, Any] = {name: dreamt.nodes[name]["value"] for name in self.places}
        args, kwargs = _put(self.args, self.kwargs, self.places, drawn)
        guide = poutine.replay(self.guide, trace=dreamt)
        factors = guide_factors(poutine.trace(guide).get_trace(*args, **kwargs), self.plates)
        return sum((factor.reshape(-1) for factor in factors), torch.zeros(()))


def _owners(*programs: Program) -> list[nn.Module]:
    """Modules that the programs are methods of."""
    owners = [getattr(program, "__self__", None) for program in programs]
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module)))


class Unobserved(UnconditionMessenger):
    """Has observed sites drawn, but not deterministic ones, as Pyro's own does in other shapes."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


def is_deterministic(site: Any) -> bool:
    """Whether a site is a `pyro.deterministic`, whose value follows from others."""
    return bool(site["infer"].get("_deterministic"))


def find_places(
    model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]
) -> Places | None:
    """Where among the arguments the data of each observed site are; None if that is not clear.

    One tensor may be passed several times. Others that are merely equal to it may be so by chance.
    """
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
        places = [place for place, own in arguments.items() if _equal(own, value)]
        if len({id(_at(args, kwargs, place)) for place in places}) != 1:
            return None
        found[name] = places
    return found


def _equal(argument: Any, value: Tensor) -> bool:
    same_shape = isinstance(argument, Tensor) and argument.shape == value.shape
    return same_shape and torch.equal(argument.to(value.dtype), value)


def _at(args: Sequence[Any], kwargs: Mapping[str, Any], place: Place) -> Any:
    key, *inner = place
    value = args[key] if isinstance(key, int) else kwargs[key]
    return value[inner[0]] if inner else value


def _put(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    places: Places,
    drawn: Mapping[str, Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with what was drawn in its places."""
    arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    for name, each in places.items():
        for key, *inner in each:
            value = drawn[name]
            arguments[key] = {**arguments[key], inner[0]: value} if inner else value
    return tuple(arguments[i] for i in range(len(args))), {k: arguments[k] for k in kwargs}
