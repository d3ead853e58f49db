"""The sites of a declaration as a graph: their kinds, their order, values in their support."""

import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from typing import Any

from torch import Tensor, nn

from pvae.data import DataSpec
from pvae.sites import Given, Latent, Observed, Site

__all__ = [
    "AnySite",
    "check_kinds",
    "check_order",
    "check_support",
    "hint",
    "parents_of",
    "warn_of_bits",
]

AnySite = Latent | Observed | Given


def parents_of(site: AnySite) -> tuple[str, ...]:
    """Names of the sites that a site is given."""
    return () if isinstance(site, Given) else site.given


def check_kinds(sites: Mapping[str, Any]) -> None:
    """Raise unless all are sites of names that torch leaves free, and one is observed."""
    for name, site in sites.items():
        if not isinstance(site, Latent | Observed | Given):
            raise TypeError(f"Site {name!r} must be Latent, Observed or Given, got {site!r}.")
        if isinstance(site, Latent) and site.times_prior:
            raise ValueError(f"Site {name!r} is the prior: `times_prior` is for the guide's entry.")
        if hasattr(nn.ModuleDict(), name):
            raise ValueError(f"torch keeps the name {name!r} for itself: call the site otherwise.")
    if not any(isinstance(site, Observed) for site in sites.values()):
        raise ValueError("A model needs an observed site: x=Observed(...).")


def check_order(what: str, parents: Mapping[str, tuple[str, ...]], known: Iterable[str]) -> None:
    """Raise unless every parent is known and declared before its child."""
    seen = set(known)
    for name, own in parents.items():
        for parent in own:
            if parent not in parents and parent not in seen:
                raise ValueError(
                    f"The {what} {name!r} is given {parent!r}, which is unknown here. Known: "
                    f"{', '.join([*seen, *parents])}.{hint(parent, [*seen, *parents])}"
                )
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise ValueError(f"Each {what} must follow its parents, got a cycle: {cycle}.") from None
    for name, own in parents.items():
        for parent in own:
            if parent not in seen:
                raise ValueError(
                    f"The {what} {name!r} is given {parent!r}, which is declared after it: "
                    f"write {parent!r} first."
                )
        seen.add(name)


def hint(name: str, known: Iterable[str]) -> str:
    """Which known name may have been meant."""
    near = get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_support(name: str, site: AnySite, support: Any, values: Tensor, start: int) -> None:
    """Raise for the first datum with a value outside; the first of these is number `start`."""
    inside = support.check(values)
    if bool(inside.all()):
        return
    row = int((~inside.reshape(len(values), -1).all(1)).nonzero()[0])
    title = site.title if isinstance(site, Site) else "Given"
    grey = ""
    if title == "Bernoulli" and 0 <= values.min() and values.max() <= 255:
        grey = (
            " These look like grey levels, under which a Bernoulli has no log-probability: "
            "binarise them (`load_data(..., binarisation='dynamic')`), declare a density (Normal, "
            "Beta, ContinuousBernoulli), or ask for it by `Observed(..., check_support=False)`."
        )
    raise ValueError(
        f"Datum {start + row} lies outside the support {support} of {name!r} ({title}): its values "
        f"run from {values[row].min():.4g} to {values[row].max():.4g}.{grey}"
    )


def warn_of_bits(spec: DataSpec, site: Site, support: Any) -> None:
    """Warn where a density is to be told of what has two values alone."""
    if not support.is_discrete and (spec.binarisation != "none" or spec.levels == 2):
        warnings.warn(
            f"{spec.name!r} is binary, and {site.title} a density: it can grow without bound on "
            "two values, and no probability compares with it. Declare a Bernoulli, or load the "
            "data with dequantisation='uniform'.",
            stacklevel=4,
        )
