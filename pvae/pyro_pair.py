"""Wrap a hand-written Pyro model and guide, so that all of pvae works on it.

    PyroPair(model, guide).fit(...)   as for a declared model

The programs run in a private parameter store: what they register by `pyro.param` and `pyro.module`
becomes parameters of the wrapper, and Pyro's global store is left as it was. Values that the global
store already holds under the same names (a pair trained by `pyro.infer.SVI`) are where it starts,
those of a module are in the module itself.
"""

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pvae.pair import Batch, Columns, Pair
from pvae.plates import PLATE_TO_WRITE, find_plates
from pvae.programs import Places, find_places

__all__ = ["PyroPair"]


class PyroPair(Pair):
    """A Pyro model and guide as one `nn.Module`.

    Both are called with the batch: a tensor as the only argument, several columns by keyword. All
    sample sites must lie in one vectorised plate over the data. Under torch's autocast, cast what
    networks return by `.float()`, as declared models do by themselves: a density in bfloat16 is off
    by tenths of a nat.

    Args:
        model: Pyro program.
        guide: Pyro program.
        vectorize_particles: False runs the pair once for each particle, for networks that cannot
            take a leading particle dimension (`nn.Flatten`, convolutions).
        name: what tables and files call the pair.

    Raises:
        TypeError: for programs that cannot be called.
        ValueError: on first use, where per-datum terms cannot be told apart. Parameters, too, are
            those that the programs have made on first use: call one, or `prepare(batch)`, before
            `parameters()`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        vectorize_particles: bool = True,
        name: str = "pyro pair",
    ):
        super().__init__()
        for what, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise TypeError(f"`{what}` must be a Pyro program, got {program!r}.")
        self.vectorize_particles = vectorize_particles
        self.name = name
        self._programs = (model, guide)
        self._constraints: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._example: Batch | None = None
        self._places: Places | None = None
        self._summed: list[str] = []
        self.params = nn.ParameterDict()
        self.modules_used = nn.ModuleList(_owners(model, guide))

    @property
    def given(self) -> list[str]:
        """Columns of named data that no observed site holds; known once it has seen data."""
        if self._places is None or not isinstance(self._example, Mapping):
            return []
        held = {step for places in self._places.values() for place in places for step in place}
        return [name for name in self._example if name not in held]

    @property
    def summed(self) -> list[str]:
        """Names of the model's discrete latents that the guide does not draw."""
        return self._summed

    def model(self, batch: Any = None) -> Any:
        """The wrapped model, in its private parameter store."""
        return self._run(self._programs[0], batch)

    def guide(self, batch: Any = None) -> Any:
        """The wrapped guide, in its private parameter store."""
        return self._run(self._programs[1], batch)

    def _run(self, program: Callable[..., Any], batch: Batch) -> Any:
        args, kwargs = _arguments(batch)
        with pyro.get_param_store().scope(self._state()) as state:
            result = program(*args, **kwargs)
            missing = set(pyro.get_param_store().keys()) - set(self._names)
        if missing:
            self._register(state, missing)
        for parameter in self.params.values():  # SVI asks for it; leaving the scope removed it
            parameter.unconstrained = weakref.ref(parameter)
        return result

    def _state(self) -> Any:
        values = {name: self.params[key] for name, key in self._names.items()}
        return {"params": values, "constraints": dict(self._constraints)}

    def _register(self, state: Any, missing: set[str]) -> None:
        """Take parameters that a program made on first use into the module."""
        for name in sorted(missing):
            value = state["params"][name]
            key = name.replace(".", ":")  # torch forbids dots
            own = isinstance(value, nn.Parameter)  # of a module, which is trained in place
            parameter = value if own else nn.Parameter(value.detach().clone())
            self.params[key] = parameter
            self._names[name] = key
            self._constraints[name] = state["constraints"][name]

    def prepare(self, batch: Batch) -> None:
        """Run both programs once to learn parameters, plates and the shape of a datum."""
        if self._example is not None:
            return
        with _buffers_kept([*self.modules_used, *_modules_named(*self._programs)]):
            self._prepare(batch)

    def _prepare(self, batch: Batch) -> None:
        try:
            self._start_from_global_store(batch)
            self.plates = find_plates(self.model, self.guide, (batch,), {})
        except ValueError as error:
            what = str(error).splitlines()[0]
            if "inside plate" not in what:
                raise
            raise ValueError(
                f"{what}. If these are parts of one datum, add `.to_event(1)`. Write:\n"
                f"{PLATE_TO_WRITE}"
            ) from error
        with torch.no_grad(), torch.random.fork_rng(), poutine.block():
            guided = poutine.trace(self.guide).get_trace(batch)
            trace = poutine.trace(poutine.replay(self.model, trace=guided)).get_trace(batch)
        _check_auxiliary(guided)
        sites = (trace.nodes[name] for name in trace.stochastic_nodes if name not in guided.nodes)
        left: dict[Any, Any] = {
            site["name"]: site["fn"] for site in sites if not site_is_subsample(site)
        }
        self._summed = list(left)
        self._places = find_places(self.model, self.guide, (batch,), {})
        supports = [d.enumerate_support(False) for d in left.values() if d.has_enumerate_support]
        self.categories = math.prod(len(support) for support in supports)
        first = {k: v[:1] for k, v in batch.items()} if isinstance(batch, Mapping) else batch[:1]
        self._example = first

    def _start_from_global_store(self, batch: Batch) -> None:
        state = pyro.get_param_store().get_state()
        plain = {name: value for name, value in state["params"].items() if "$$$" not in name}
        state["params"] = plain  # a module may be another one of the same name: it holds its own
        args, kwargs = _arguments(batch)
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            poutine.block(),
            pyro.get_param_store().scope(state) as own,
        ):
            traces = [poutine.trace(p).get_trace(*args, **kwargs) for p in self._programs]
        # A declared model's own program names parameters of its module, which the store has not.
        used = {name for trace in traces for name in trace.param_nodes} & set(own["params"])
        self._register(own, used)
        self._hold_modules()

    def _hold_modules(self) -> None:
        """Take in networks that the programs name and register, with their modes and buffers."""
        ours = {id(parameter) for parameter in self.params.values()}
        for module in _modules_named(*self._programs):
            trained = [p for p in module.parameters() if p.requires_grad]
            if all(id(p) in ours for p in trained) and module not in self.modules_used:
                self.modules_used.append(module)

    def places(self, batch: Batch) -> Places | None:
        """As found on the first batch."""
        return self._places

    def columns(self, data: Any) -> Columns:
        """The data as columns, with the pair prepared for them."""
        return Columns(data)

    def blank(self, num_data: int, given: Batch | None) -> Any:
        """A batch of as many rows as are wanted; its values do not matter."""
        batch = self._example if given is None else given
        if batch is None:
            raise ValueError(
                f"{self.name!r} has seen no data yet, so it cannot know their shape: fit it, "
                "evaluate it, or pass an example batch by `given=`."
            )
        if isinstance(batch, Mapping):
            return {name: _repeat(value, num_data) for name, value in batch.items()}
        return _repeat(batch, num_data)

    def data_of(self, drawn: Mapping[str, Tensor], given: Batch | None = None) -> Batch:
        """What the model has drawn, as data for it, with columns that it does not draw.

        Raises:
            ValueError: where an observed site's data are not one of the programs' arguments.
        """
        if self._places is None:
            raise ValueError(
                f"{self.name!r} observes what is no column of its data as it is, so that draws of "
                "the model cannot take its place."
            )
        batch: Any = dict(given) if isinstance(given, Mapping) else {}
        for name, each in self._places.items():
            for _, *key in each:
                if not key:
                    return drawn[name]
                batch[key[0]] = drawn[name]
        return batch

    def __repr__(self) -> str:
        model, guide = (getattr(p, "__qualname__", type(p).__name__) for p in self._programs)
        return f"PyroPair({model}, {guide})"


def _repeat(value: Tensor, num_data: int) -> Tensor:
    return value[:1].expand(num_data, *value.shape[1:])


def _arguments(batch: Batch) -> tuple[tuple, dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch,), {}


@contextmanager
def _buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put back what a run changes in modules that are in training, such as moments."""
    before = [(b, b.detach().clone()) for module in modules for b in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.detach().copy_(value)


def _check_auxiliary(guided: poutine.Trace) -> None:
    """Raise for a draw of the guide alone which no latent is a function of.

    Its density belongs into the weights only if the model has one for it (Ranganath et al. 2016).
    """
    sites = [guided.nodes[name] for name in guided.stochastic_nodes]
    auxiliary: Any = [site for site in sites if (site["infer"] or {}).get("is_auxiliary")]
    if auxiliary and not any(isinstance(_innermost(site["fn"]), Delta) for site in sites):
        raise ValueError(
            f"The guide draws {auxiliary[0]['name']!r}, which the model does not have, and draws "
            "its latents given that: log q(z | x) would be an integral over it. Make the latents a "
            "function of it (a Delta site), or draw them without it."
        )


def _innermost(d: Any) -> Any:
    return _innermost(d.base_dist) if hasattr(d, "base_dist") else d


def _owners(*programs: Callable[..., Any]) -> list[nn.Module]:
    """The `nn.Module`s that the programs are, or are methods of."""
    owners = [getattr(program, "__self__", program) for program in programs]
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module)))


def _modules_named(*programs: Callable[..., Any]) -> list[nn.Module]:
    """The `nn.Module`s that functions refer to by name, or that their object has as attributes."""
    found: list[Any] = []
    for program in programs:
        found += vars(getattr(program, "__self__", object)).values()
        if inspect.isfunction(function := inspect.unwrap(getattr(program, "__func__", program))):
            names = inspect.getclosurevars(function)
            found += [*names.nonlocals.values(), *names.globals.values()]
    modules = (value for value in found if isinstance(value, nn.Module))
    return list(dict.fromkeys(modules))
