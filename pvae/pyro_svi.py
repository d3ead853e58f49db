"""Any run of `pyro.infer.SVI` as ArviZ takes it: the converter that ArviZ 1.x has for NumPyro only.

    svi, arguments  --from_pyro_svi-->  DataTree: posterior, log_likelihood, predictive groups, ...

Nothing is asked of the programs: latents may be global or in plates of any depth. Draws are made
all at once, in a plate around the program, where that is seen to give the densities that single
runs give, and one by one where it is not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import infer_discrete
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pvae.datatree import (
    Groups,
    Values,
    is_factor,
    is_observed,
    log_prob_of,
    tree_of,
)
from pvae.fence import evaluating
from pvae.particles import check_count
from pvae.plates import samples
from pvae.programs import Unobserved, is_deterministic
from pvae.pyro_pair import _modules_named, _owners

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["from_pyro_svi"]

Program = Callable[..., Any]


def from_pyro_svi(
    svi: Any = None,
    *args: Any,
    num_samples: int = 1000,
    num_prior: int | None = None,
    model: Program | None = None,
    guide: Program | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> "xr.DataTree":
    """Draw from a trained model and guide of Pyro, and label what was drawn for ArviZ.

    What `arviz.from_numpyro_svi` does for NumPyro, with the predictive groups drawn here as well.
    Parameters are those of Pyro's param store and of the programs' modules. The store, the modules'
    modes and the random state stay as they were.

    Args:
        svi: the `pyro.infer.SVI`; may be left out where `model` and `guide` are given.
        *args: what both programs are called with, whole data and no subsample.
        num_samples: S, draws from the guide.
        num_prior: draws from the prior, S where left out, 0 for none.
        model: in place of `svi.model`.
        guide: in place of `svi.guide`.
        coords: labels along dimensions, 0, 1, ... where left out.
        dims: names of a site's dimensions after draws, from the left; where left out, plates give
            theirs, and those of events are called `<site>_dim_<i>`.
        seed: of the draws.
        **kwargs: what both programs are called with, by keyword. Arguments called like those above
            are bound beforehand, by `functools.partial`.

    Returns:
        DataTree with dimensions (chain, draw, *plates, *event):
        `posterior`: latents from the guide, discrete ones that it does not draw from their
        posterior given the others, deterministic sites.
        `log_likelihood`: of each observed site given the draws in `posterior`, by element of its
        plates, masked elements 0, scales left out; nats.
        `log_weights`: log p(x, z) - log q(z), by element of the plates that hold every site, if
        any; left out where the guide has no density or does not draw every latent.
        `posterior_predictive`, `prior`, `prior_predictive`, `observed_data`. Attributes tell the
        programs, versions and the seed.

    Raises:
        TypeError: where no SVI is given and not both programs.
        ValueError: for numbers of draws without meaning, parameters that were never trained, a
            subsample, a latent that is neither guided nor discrete, or sites that change their
            shapes from run to run.
    """
    model, guide = _programs(svi, model, guide)
    check_count("num_samples", num_samples)
    num_prior = num_samples if num_prior is None else num_prior
    if num_prior != 0:
        check_count("num_prior", num_prior)
    modules = [*_owners(model, guide), *_modules_named(model, guide)]
    with _as_it_was(modules, seed) as check_trained:
        run = _Run(model, guide, args, kwargs)
        check_trained()
        found, names = run.groups(num_samples, num_prior)
    attrs = {
        "model": _name(model),
        "guide": _name(guide),
        "objective": _objective(svi),
        "seed": seed,
        "num_samples": num_samples,
    }
    return tree_of(found, {**names, **(dims or {})}, attrs, coords)


def _programs(svi: Any, model: Program | None, guide: Program | None) -> tuple[Program, Program]:
    model = getattr(svi, "model", None) if model is None else model
    guide = getattr(svi, "guide", None) if guide is None else guide
    if not callable(model) or not callable(guide):
        raise TypeError(
            "`svi` must be a pyro.infer.SVI, or `model` and `guide` be given as well; got "
            f"{type(svi).__name__}."
        )
    return model, guide


def _objective(svi: Any) -> str:
    loss = getattr(svi, "loss", None)  # of an objective, its method
    return "" if loss is None else _name(type(getattr(loss, "__self__", loss)))


def _name(program: Any) -> str:
    return getattr(program, "__qualname__", type(program).__name__)


@contextmanager
def _as_it_was(modules: Sequence[nn.Module], seed: int) -> Iterator[Callable[[], None]]:
    """A seed of its own, modules in evaluation mode; yields a check that parameters were trained.

    Parameters that the programs put into the store are taken out again at the end.
    """
    store = pyro.get_param_store()
    before = set(store.keys())
    owned = {id(parameter) for module in modules for parameter in module.parameters()}

    def check_trained() -> None:
        made = {n: p for n, p in store.named_parameters() if n not in before and id(p) not in owned}
        if untrained := sorted(name for name in made if "$$$" not in name):  # those are modules'
            raise ValueError(
                f"Parameter {untrained[0]!r} is not in Pyro's param store, so that it has its "
                "first value and not a trained one. Take steps with the SVI, or load the store."
            )

    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(poutine.block())
            stack.enter_context(torch.no_grad())
            for module in modules:
                stack.enter_context(evaluating(module))
            torch.manual_seed(seed)
            yield check_trained
    finally:
        for name in set(store.keys()) - before:
            del store[name]


# ----------------------------------------------------------------------------------- programs


@dataclass(frozen=True)
class _Layout:
    """Where a site's dimensions are: those of plates, counted from the right, and of the event."""

    dims: tuple[int, ...]
    names: tuple[str | None, ...]
    event_dim: int
    shape: torch.Size  # of the value in a single run
    is_latent: bool
    is_deterministic: bool

    @classmethod
    def of(cls, site: Any) -> "_Layout":
        """Of a site in a single run; a dimension with elements counts even if it has no plate."""
        frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        value, event_dim, loose = site["value"].shape, len(site["fn"].event_shape), set()
        if is_deterministic(site):
            sizes = {dim: frame.size for dim, frame in frames.items()}
            event_dim = _event_dim(value, sizes)
            frames = {} if event_dim == len(value) else frames
        else:
            shape = log_prob_of(site).shape
            loose = {dim for dim in range(-len(shape), 0) if shape[dim] > 1}
        dims = tuple(sorted(loose | set(frames)))
        names = tuple(frames[dim].name if dim in frames else None for dim in dims)
        latent = not site["is_observed"]
        return cls(dims, names, event_dim, value, latent, is_deterministic(site))

    def arranged(self, value: Tensor, event_dim: int, nesting: int, size: int) -> Tensor:
        """(draws or not, all dims up to `nesting`, event) -> (draws, own dims, event)."""
        missing = nesting + 1 - (value.dim() - event_dim)
        value = value.reshape((1,) * missing + value.shape)
        gone = [nesting + 1 + dim for dim in range(-nesting, 0) if dim not in self.dims]
        value = value.squeeze(gone) if gone else value
        return value.expand(size, *value.shape[1:])

    def spread(self, value: Tensor, nesting: int) -> Tensor:
        """(draws, own dims, event) -> (draws, all dims up to `nesting`, event)."""
        sizes = dict(zip(self.dims, value.shape[1:], strict=False))
        ones = [sizes.get(dim, 1) for dim in range(-nesting, 0)]
        return value.reshape(len(value), *ones, *value.shape[1 + len(self.dims) :])


def _event_dim(shape: torch.Size, sizes: Mapping[int, int]) -> int:
    """Of a deterministic value, whose dimensions Pyro does not tell apart: the fewest that fit."""
    for event_dim in range(len(shape)):
        where = {len(shape) - event_dim + dim: size for dim, size in sizes.items()}
        if all(i >= 0 and shape[i] == size for i, size in where.items()) and where:
            return event_dim
    return len(shape)


@dataclass
class _Found:
    """What some runs gave, by site: values (draws, ...), and log-probabilities without events."""

    values: Values = field(default_factory=dict)
    log_probs: Values = field(default_factory=dict)
    centres: Values = field(default_factory=dict)  # of point masses, whose density says nothing


class _Program:
    """A program that is run many times, all at once where it can be.

    Args:
        program: with what it is called with already bound.
        layouts: of its sites.
        nesting: dimensions left of events that any site uses.
        summed: discrete latents to be drawn from their posterior given the other sites.
    """

    def __init__(
        self,
        program: Program,
        layouts: Mapping[str, _Layout],
        nesting: int,
        summed: Sequence[str] = (),
        vectorize: bool | None = None,
    ):
        self.program, self.layouts, self.nesting = program, layouts, nesting
        self.summed, self.vectorize = summed, vectorize

    def run(self, given: Values, size: int) -> _Found:
        """`size` runs with these latents, (size, own dims, event), the others drawn."""
        if self.vectorize is None:
            found = self._tried(given, size)
            if found is not None:
                return found
        return self._together(given, size) if self.vectorize else self._one_by_one(given, size)

    def _tried(self, given: Values, size: int) -> _Found | None:
        """All at once, if the first and the last run give the same alone."""
        try:
            found = self._together(given, size)
        except Exception:  # whatever a program does with shapes that it was not written for
            self.vectorize = False
            return None
        latent = {n: v for n, v in found.values.items() if self.layouts[n].is_latent}
        latent |= given
        self.vectorize = all(
            _agree(found, s, self._one_by_one({n: v[s : s + 1] for n, v in latent.items()}, 1))
            for s in {0, size - 1}
        )
        return found if self.vectorize else None

    def _together(self, given: Values, size: int) -> _Found:
        plate = pyro.plate("all draws", size, dim=-1 - self.nesting)
        given = {name: self.layouts[name].spread(v, self.nesting) for name, v in given.items()}
        program = poutine.condition(plate(self.program), given)
        return self._found(self._complete(program, given, self.nesting + 1), size)

    def _one_by_one(self, given: Values, size: int) -> _Found:
        runs = []
        for s in range(size):
            own = {n: v[s].reshape(self.layouts[n].shape) for n, v in given.items()}
            program = self._complete(poutine.condition(self.program, own), own, self.nesting)
            runs.append(self._found(program, 1))
        try:
            return _Found(
                *(_stacked([getattr(r, part) for r in runs]) for part in _Found.__annotations__)
            )
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"The programs' sites, or their shapes, change from run to run ({error}), and "
                "draws of them make no array."
            ) from None

    def _complete(self, program: Program, given: Values, nesting: int) -> Program:
        """With latents that are summed out drawn from their posterior."""
        summed = [name for name in self.summed if name not in given]
        if not summed:
            return program

        def marked(site: Any) -> Any:
            return {"enumerate": "parallel"} if site["name"] in summed else {}

        program = poutine.infer_config(program, marked)
        return infer_discrete(program, first_available_dim=-1 - nesting)

    def _found(self, program: Program, size: int) -> _Found:
        found = _Found()
        for site in samples(poutine.trace(program).get_trace()):
            if is_factor(site):
                continue
            name = site["name"]
            own = self.layouts.get(name)
            if own is None:
                raise ValueError(f"Site {name!r} is there in some runs only, which make no array.")
            value = own.arranged(site["value"], own.event_dim, self.nesting, size)
            found.values[name] = value
            if own.is_deterministic:
                found.centres[name] = value
                continue
            found.log_probs[name] = own.arranged(log_prob_of(site), 0, self.nesting, size)
            if (centre := _centre(site["fn"])) is not None:
                found.centres[name] = own.arranged(centre, own.event_dim, self.nesting, size)
        return found


def _stacked(runs: Sequence[Values]) -> Values:
    return {name: torch.cat([run[name] for run in runs]) for name in runs[0]}


def _centre(d: Any) -> Tensor | None:
    """Of a point mass, whatever it is wrapped in."""
    while not isinstance(d, Delta) and hasattr(d, "base_dist"):
        d = d.base_dist
    return d.v if isinstance(d, Delta) else None


def _agree(found: _Found, s: int, alone: _Found) -> bool:
    def same(many: Values, one: Values) -> bool:
        return all(
            many[name][s].shape == one[name][0].shape
            and torch.allclose(many[name][s].double(), one[name][0].double(), 1e-4, 1e-4)
            for name in many
        )

    densities = (
        {n: v for n, v in f.log_probs.items() if n not in f.centres} for f in (found, alone)
    )
    return same(*densities) and same(found.centres, alone.centres)


# ----------------------------------------------------------------------------------- all draws


class _Run:
    """A model and a guide with their arguments, run once to learn their sites."""

    def __init__(self, model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]):
        self.model = lambda: model(*args, **kwargs)
        self.guide = lambda: guide(*args, **kwargs)
        guided = poutine.trace(self.guide).get_trace()
        trace = poutine.trace(poutine.replay(self.model, trace=guided)).get_trace()
        _check_whole(guided, trace)
        self.in_guide = {
            site["name"]: _Layout.of(site) for site in samples(guided) if not is_factor(site)
        }
        self.sites = {
            site["name"]: _Layout.of(site) for site in samples(trace) if not is_factor(site)
        }
        self.has_factor = any(is_factor(site) for t in (guided, trace) for site in samples(t))
        self.observed = [site["name"] for site in samples(trace) if is_observed(site)]
        self.summed = [
            name for name, own in self.sites.items() if own.is_latent and name not in guided.nodes
        ]
        for name in self.summed:
            _check_discrete(name, trace.nodes[name])
        layouts = [*self.in_guide.values(), *self.sites.values()]
        self.nesting = max((-own.dims[0] for own in layouts if own.dims), default=0)

    def groups(self, num_samples: int, num_prior: int) -> tuple[Groups, dict[str, Any]]:
        """Every group, and names of the sites' dimensions."""
        proposal = _Program(self.guide, self.in_guide, self.nesting)
        drawn = proposal.run({}, num_samples)
        z = {name: value for name, value in drawn.values.items() if name in self.sites}
        model = _Program(self.model, self.sites, self.nesting, self.summed)
        likely = model.run(z, num_samples)
        found = self._posterior(likely)
        z = {name: v for name, v in likely.values.items() if self.sites[name].is_latent}
        program = Unobserved()(self.model)
        predictive = _Program(program, self.sites, self.nesting, (), model.vectorize)
        again = predictive.run(z, num_samples).values
        found["posterior_predictive"] = {name: again[name] for name in self.observed}
        if num_prior:
            prior = predictive.run({}, num_prior).values
            found["prior"] = {n: v for n, v in prior.items() if n not in self.observed}
            found["prior_predictive"] = {name: prior[name] for name in self.observed}
        names: dict[str, Any] = {name: own.names for name, own in self.sites.items()}
        weights, names["log_weights"] = self._log_weights(likely, drawn)
        if weights is not None:
            found["log_weights"] = {"log_weights": weights}
        return found, names

    def _posterior(self, likely: _Found) -> Groups:
        values, observed = likely.values, self.observed
        return {
            "posterior": {name: value for name, value in values.items() if name not in observed},
            "log_likelihood": {name: likely.log_probs[name] for name in observed},
            "observed_data": {name: values[name][0] for name in observed},
        }

    def _log_weights(self, likely: _Found, drawn: _Found) -> tuple[Tensor | None, list[str]]:
        """log p(x, z) - log q(z) by element of the plates that all sites share."""
        auxiliary = set(drawn.values) - set(self.sites)
        if self.summed or self.has_factor or (drawn.centres and not auxiliary):
            return None, []
        random = [n for n, own in self.sites.items() if not own.is_deterministic]
        layouts = [*(self.sites[n] for n in random), *(self.in_guide[n] for n in drawn.log_probs)]
        shared = set.intersection(*({n for n in own.names if n is not None} for own in layouts))
        total: Any = 0.0
        for sign, part, own in ((1, likely, self.sites), (-1, drawn, self.in_guide)):
            for name, log_prob in part.log_probs.items():
                others = [i + 1 for i, n in enumerate(own[name].names) if n not in shared]
                total = total + sign * (log_prob.sum(others) if others else log_prob)
        return total, [name for name in self.sites[random[0]].names if name in shared]


def _check_whole(*traces: poutine.Trace) -> None:
    for trace in traces:
        for node in trace.nodes.values():
            site: Any = node
            if site["type"] == "sample" and site_is_subsample(site):
                size, taken = site["fn"].size, site["fn"].subsample_size
                if taken is not None and taken < size:
                    raise ValueError(
                        f"Plate {site['name']!r} takes {taken} of {size} elements, others in each "
                        "run, so that draws cannot be lined up. Call the programs with all of them "
                        "(`subsample_size=None`), or pass `model` and `guide` that do."
                    )


def _check_discrete(name: str, site: Any) -> None:
    if not site["fn"].has_enumerate_support:
        raise ValueError(
            f"Latent {name!r} ({type(site['fn']).__name__}) is neither drawn by the guide nor "
            "discrete with finite support. Add it to the guide."
        )
