"""A declaration as data: JSON out and in, and the table that `print(model)` shows.

Reading looks names up among Pyro's distributions and pvae's nets; it never imports or runs code.
"""

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.distributions as pyro_distributions
import torch
from torch import Tensor
from torch.distributions import Distribution

from pvae.flows import Flow
from pvae.nets import Net
from pvae.priors import PseudoInputs
from pvae.site_module import SiteModule
from pvae.sites import Given, Latent, Learned, Observed, Predicted, Site

if TYPE_CHECKING:
    from pvae.declare import LatentModel

__all__ = ["from_json", "html_table", "table", "text_table", "to_json"]

FORMAT = 1
KINDS = {"latent": Latent, "observed": Observed}


def to_json(
    name: str, sites: Mapping[str, Any], guide: Mapping[str, Latent] | str | None
) -> dict[str, Any]:
    """The declaration as plain data."""
    return {
        "format": FORMAT,
        "name": name,
        "sites": {key: _site_to_json(site) for key, site in sites.items()},
        "guide": {k: _site_to_json(site) for k, site in guide.items()}
        if isinstance(guide, Mapping)
        else guide,
    }


def from_json(data: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Latent] | None]:
    """Name, sites and guide of what `to_json` wrote.

    Raises:
        ValueError: for data that it did not write.
    """
    found = data.get("format") if isinstance(data, Mapping) else data
    if found != FORMAT:
        raise ValueError(
            f"Not a declaration that this pvae reads: format {found!r}, expected {FORMAT}."
        )
    try:
        sites = {key: _site_from_json(site) for key, site in data["sites"].items()}
        guide = data["guide"]
        if isinstance(guide, Mapping):
            guide = {key: _site_from_json(site) for key, site in guide.items()}
        return data["name"], sites, guide
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"The declaration is damaged: {error!r}.") from error


def _site_to_json(site: Site | Given) -> dict[str, Any]:
    if isinstance(site, Given):
        return {"kind": "given", "shape": site.shape, "categories": site.categories}
    out: dict[str, Any] = {
        "kind": "observed" if isinstance(site, Observed) else "latent",
        "distribution": site.distribution.__name__,
        "shape": list(site.shape),
        "given": list(site.given),
        "net": None if site.net is None else _net_to_json(site.net),
        "parameters": {key: _value_to_json(value) for key, value in site.parameters.items()},
    }
    if isinstance(site, Observed):
        out["check_support"] = site.check_support
        out |= {"missing": True} if site.missing else {}
    if isinstance(site, Latent) and site.flow:
        out["flow"] = [step.to_json() for step in site.flow]
    if isinstance(site, Latent) and site.times_prior:
        out["times_prior"] = True
    return out


def _site_from_json(data: Mapping[str, Any]) -> Any:
    if data["kind"] == "given":
        shape = data["shape"]
        return Given(tuple(shape) if isinstance(shape, list) else shape, data["categories"])
    distribution = getattr(pyro_distributions, data["distribution"], None)
    if not (isinstance(distribution, type) and issubclass(distribution, Distribution)):
        raise ValueError(f"pyro.distributions has no distribution {data['distribution']!r}.")
    options: dict[str, Any] = {}
    if data["kind"] == "observed":
        options["check_support"] = data["check_support"]
        options["missing"] = data.get("missing", False)
    else:
        options["flow"] = [Flow.from_json(step) for step in data.get("flow", [])]
        options["times_prior"] = data.get("times_prior", False)
    return KINDS[data["kind"]](
        distribution,
        tuple(data["shape"]),
        given=tuple(data["given"]),
        net=None if data["net"] is None else _net_from_json(data["net"]),
        **{key: _value_from_json(value) for key, value in data["parameters"].items()},
        **options,
    )


def _net_to_json(net: Any) -> dict[str, Any]:
    if not isinstance(net, Net):
        raise TypeError(
            f"A net of your own ({type(net).__name__}) is code, and a declaration is data. Keep "
            "the Python that declares the model, and pass the model when you load its weights."
        )
    return net.to_json()


def _net_from_json(data: Mapping[str, Any]) -> Net:
    return PseudoInputs() if data["net"] == PseudoInputs.__name__ else Net.from_json(data)


def _value_to_json(value: Any) -> Any:
    if isinstance(value, Learned):
        return {"learned": _value_to_json(value.init), "shape": value.shape}
    if isinstance(value, Predicted):
        return {"predicted": _net_to_json(value.net), "shape": value.shape}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return {"tensor": value.tolist()}
    return value


def _value_from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.tensor(value["tensor"])
    shape = tuple(value["shape"]) if isinstance(value["shape"], list) else value["shape"]
    if "learned" in value:
        return Learned(_value_from_json(value["learned"]), shape)
    return Predicted(_net_from_json(value["predicted"]), shape)


# ------------------------------------------------------------------------------ tables

HEADER = ("site", "kind", "distribution", "shape", "given", "parameters")


def table(model: "LatentModel") -> list[tuple[str, ...]]:
    """One row a site, the model's first, then the guide's: see `HEADER`."""
    rows: list[tuple[str, ...]] = []
    for name, site in model.sites.items():
        if isinstance(site, Given):
            rows.append((name, "given", "", str(model.inputs[name].shape), "", ""))
            continue
        kind = "observed" if isinstance(site, Observed) else "latent"
        where = ", where missing" if isinstance(site, Observed) and site.missing else ""
        kind += f", summed out{where}" if name in model.summed else where and ", or missing"
        rows.append(_row(name, kind, model.module_of(name)))
    for name, module in model.guide_modules.items():
        assert isinstance(module, SiteModule)
        rows.append(_row(name, "guide, per datum" if model.per_datum else "guide", module))
    return rows


def _row(name: str, kind: str, module: SiteModule) -> tuple[str, ...]:
    site = module.site
    parts = []
    for key, value in site.parameters.items():
        if isinstance(value, Learned):
            parts.append(f"{key} learned")
        elif isinstance(value, Predicted):
            parts.append(f"{key} by {value.net}")
        else:
            array = isinstance(value, Tensor | np.ndarray)
            shown = f"tensor{tuple(value.shape)}" if array else value
            parts.append(f"{key} = {shown}")
    named = set(site.parameters)
    filled = ", ".join(key for key in module.shapes if key not in named)
    if filled and site.net is not None:
        net = site.net if isinstance(site.net, Net) else type(site.net).__name__
        parts.append(f"{filled} by {net}")
    elif filled:
        parts.append("standard")
    if isinstance(site, Latent) and site.flow:
        parts.append(f"flow by {', '.join(map(str, site.flow))}")
    if isinstance(site, Latent) and site.times_prior:
        parts.append("times the prior")
    shape = str(module.event_shape)
    return name, kind, site.title, shape, ", ".join(site.given), "; ".join(parts)


def _title(model: "LatentModel") -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.name}: {count:,} parameters"


def text_table(model: "LatentModel") -> str:
    """The table in columns of text."""
    rows = [HEADER, *table(model)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([_title(model), *(line.rstrip() for line in lines)])


def html_table(model: "LatentModel") -> str:
    """The table for a notebook."""

    def line(row: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "".join(line(row, "td") for row in table(model))
    caption = f"<caption>{html.escape(_title(model))}</caption>"
    return f"<table>{caption}{line(HEADER, 'th')}{body}</table>"
