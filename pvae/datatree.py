"""Labels: draws of sample sites, by group and variable, as an `xarray.DataTree` for ArviZ.

    {group: {variable: (draws, *plates, *event)}}  --tree_of-->  DataTree

Groups are those of the InferenceData schema (Kumar et al. 2019). Draws get the dimensions chain (of
one) and draw; `observed_data` and `constant_data` have none.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pvae.programs import is_deterministic

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "Groups",
    "Values",
    "is_factor",
    "is_observed",
    "log_prob_of",
    "tree_of",
    "versions",
]

Values = dict[str, Tensor]
Groups = dict[str, Values]


def tree_of(
    groups: Groups,
    dims: Mapping[str, Sequence[str | None]],
    attrs: Mapping[str, Any],
    coords: Mapping[str, Any] | None = None,
) -> "xr.DataTree":
    """Label groups of draws.

    Args:
        groups: by group and variable, (draws, ...); in groups of data and diagnostics (...).
        dims: by variable, names of its dimensions after draws, from the left; the rest are called
            `<variable>_dim_<i>`.
        attrs: of the tree; versions are added.
        coords: labels along dimensions, 0, 1, ... where left out.

    Raises:
        ValueError: for a variable called like a dimension.
    """
    import xarray as xr

    sets: dict[str, xr.Dataset] = {}
    for group, values in groups.items():
        if values:
            place = {"candidates": "log_weights", "diagnostics": "log_weights"}.get(group, group)
            made = _dataset(group, values, dims, coords)
            sets[place] = sets[place].merge(made) if place in sets else made
    tree = xr.DataTree.from_dict(sets)
    tree.attrs = {**attrs, **versions()}
    return tree


def _dataset(
    group: str,
    values: Values,
    dims: Mapping[str, Sequence[str | None]],
    coords: Mapping[str, Any] | None,
) -> "xr.Dataset":
    from arviz_base import dict_to_dataset

    if group in ("observed_data", "constant_data", "diagnostics"):
        sample_dims = []
    else:
        sample_dims = ["chain", "candidate" if group == "candidates" else "draw"]
        values = {name: value[None] for name, value in values.items()}
    named = {*sample_dims, *(name for own in dims.values() for name in own if name)}
    if clash := sorted(named & set(values)):
        raise ValueError(
            f"{clash[0]!r} is the name of a dimension, and in the tree no variable can have it as "
            "well: give the site another name."
        )
    made = dict_to_dataset(
        {name: value.detach().cpu().numpy() for name, value in values.items()},
        sample_dims=sample_dims,
        dims={name: list(own) for name, own in dims.items()},
        coords=None if coords is None else dict(coords),
        skip_event_dims=group in ("log_likelihood", "log_weights", "candidates"),
    )
    made.attrs = {}  # the tree has them, without the time of day: one seed, one tree
    return made


def versions() -> dict[str, str]:
    """Of pvae and what it stands on, as attributes."""
    import arviz_base

    from pvae import __version__

    return {
        "inference_library": "pvae",
        "inference_library_version": __version__,
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "creation_library": "ArviZ",
        "creation_library_version": arviz_base.__version__,
    }


def is_factor(site: Any) -> bool:
    """Whether a site is a `pyro.factor`, which has no value."""
    return site["value"].dim() > 0 and site["value"].shape[-1] == 0


def is_observed(site: Any) -> bool:
    """Whether a site holds data."""
    return site["is_observed"] and not is_deterministic(site) and not is_factor(site)


def log_prob_of(site: Any) -> Tensor:
    """By element of the site's plates, unscaled, 0 where it is masked, in nats."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])
