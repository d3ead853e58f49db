"""What an objective asks of a guide, checked once, before the first step."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from pyro.distributions import Delta

from pvae.programs import Programs

__all__ = ["check_cuts", "check_sites"]

WAY_OUT = "Draw each latent from a density of its own, or use ELBO() or IWAE()."


def check_sites(objective: Any, sites: Mapping[str, Any]) -> None:
    """Raise for settings of sites that the guide has not, and gradients that it does not allow.

    Args:
        objective: `Objective`.
        sites: of the guide, by name.

    Raises:
        ValueError: as above.
    """
    for setting in ("kl", "baseline"):
        named = getattr(objective, setting, None)
        for name in named if isinstance(named, Mapping) else ():
            if name not in sites:
                near = get_close_matches(name, list(sites), 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"`{setting}` names {name!r}, which the guide does not draw. It draws "
                    f"{', '.join(map(repr, sites)) or 'nothing'}.{hint}"
                )
    if not objective.separates:
        return
    for name, site in sites.items():
        if site["infer"].get("is_auxiliary") or _is_delta(site["fn"]):
            what = "has no density" if _is_delta(site["fn"]) else "is auxiliary, and drawn through"
            raise ValueError(
                f"{objective!r} tells the guide's score from its draws, which cannot be done where "
                f"a site {what}: {name!r}. {WAY_OUT}"
            )
        if not site["fn"].has_rsample and objective.gradient in ("stl", "dreg"):
            raise ValueError(
                f"gradient={objective.gradient!r} goes through the guide's draws, and those of "
                f"{name!r} are not reparameterised: leave `gradient` out, and they get a score "
                "function."
            )


def _is_delta(d: Any) -> bool:
    while hasattr(d, "base_dist"):
        d = d.base_dist
    return isinstance(d, Delta)


def check_cuts(objective: Any, programs: Programs) -> None:
    """Raise if a guide's density is not known but at the very tensors that it drew.

    Raises:
        ValueError: as above: normalising flows whose transforms have no inverse.
    """
    try:
        with programs.looking(), torch.enable_grad():
            programs.draw(cut=True)
    except KeyError as error:
        raise ValueError(
            f"{objective!r} needs log q at its draws as mere numbers, and the guide has a "
            f"transform without an inverse ({error.args[0]}). {WAY_OUT}"
        ) from error
