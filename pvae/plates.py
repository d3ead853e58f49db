"""Where a program keeps its data: the plate whose elements' terms are told apart."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["PLATE_TO_WRITE", "Plates", "find_plates", "samples"]

Program = Callable[..., Any]

PLATE_TO_WRITE = """
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros(len(x), 50), 1).to_event(1))
            pyro.sample("x", dist.Bernoulli(decoder(z)).to_event(1), obs=x)"""


@dataclass(frozen=True)
class Plates:
    """Where a program keeps its data: name and dim of their plate, number of plate dims in all."""

    name: str = "data"
    dim: int = -1
    nesting: int = 1


def find_plates(model: Program, guide: Program, args: tuple, kwargs: Mapping[str, Any]) -> Plates:
    """Run both programs once, and find the plate that holds the data.

    Raises:
        ValueError: where per-datum terms cannot be told apart; the message shows the plate.
    """
    with torch.no_grad(), torch.random.fork_rng(), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    sites = [site for trace in (guide_trace, model_trace) for site in samples(trace)]
    frames = [{f.name: f for f in site["cond_indep_stack"] if f.vectorized} for site in sites]
    common = set.intersection(*map(set, frames)) if frames else set()
    for site, own in zip(sites, frames, strict=True):
        _check_dims(site, {frame.dim for frame in own.values()})
        if not common and not own:
            raise ValueError(
                f"Site {site['name']!r} lies in no vectorised plate over the data, so its "
                f"log-probability cannot be told apart by datum. Write:\n{PLATE_TO_WRITE}"
            )
    _check_supports(guide_trace, model_trace)
    size = len(next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), ()))
    if len(common) > 1:
        common = {name for name in common if frames[0][name].size == size}
    if len(common) != 1:
        raise ValueError(
            "Model and guide need one vectorised plate over the data that holds every sample site; "
            f"found {sorted({name for own in frames for name in own})} and "
            f"{len(common)} that fit. Write:\n{PLATE_TO_WRITE}"
        )
    (name,) = common
    nesting = max(-frame.dim for own in frames for frame in own.values())
    return Plates(name, frames[0][name].dim, nesting)


def _check_supports(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> None:
    """Raise where q(z | x) is a probability and p(z) a density, or the reverse."""
    of_model = {site["name"]: site["fn"].support for site in samples(model_trace)}
    for site in samples(guide_trace):
        support = of_model.get(site["name"])
        if support is not None and support.is_discrete != site["fn"].support.is_discrete:
            refuse_supports(site["name"], site["fn"].support, support)


def refuse_supports(name: str, of_guide: Any, of_model: Any) -> None:
    """Raise: log p - log q would be of no meaning."""
    raise ValueError(
        f"The guide draws {name!r} from {of_guide}, and in the model it lies in {of_model}: one is "
        "discrete and the other is not, so that their weights have no meaning."
    )


def samples(trace: poutine.Trace) -> Iterable[Any]:
    """Sample sites of a run, but for those that subsample a plate."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            yield site


def _check_dims(site: Any, plate_dims: set[int]) -> None:
    shape = site["fn"].log_prob(site["value"]).shape
    loose = [d for d in range(-len(shape), 0) if shape[d] > 1 and d not in plate_dims]
    if loose:
        raise ValueError(
            f"Site {site['name']!r} has log-probabilities of shape {tuple(shape)}, of which "
            f"dimension {loose[0]} belongs to no plate. If these are parts of one datum, add "
            f"`.to_event({len(loose)})`; if they are data, write a plate:\n{PLATE_TO_WRITE}"
        )
