"""Proposals other than the guide: each is a Pyro program that draws the latents, as a guide does.

prior      z ~ p(z): naive Monte Carlo
defensive  z ~ (1 - a) q(z | x) + a p(z): weights bounded by p(x | z) / a, whatever the guide
           misses (Hesterberg 1995; Owen & Zhou 2000)
"""

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae.particles import EnumerateAllBut, Program, guide_factors, log_factor
from pvae.plates import Plates, samples

__all__ = ["defensive", "prior"]

SHARE = 0.1  # a, of draws from the prior


def prior(model: Program, summed: list[str]) -> Program:
    """The model's unobserved sites, but for those summed out."""

    def hidden(site: Any) -> bool:
        return site["type"] == "sample" and (site["is_observed"] or site["name"] in summed)

    def program(batch: Any) -> None:
        with poutine.block(hide_fn=hidden):
            model(batch)

    return program


def defensive(guide: Program, model: Program, summed: list[str], plates: Plates) -> Program:
    """A mixture of the guide and the prior, drawn particle by particle.

    Args:
        guide: Pyro program.
        model: Pyro program.
        summed: its latents that are summed out, as they are in the density of the others.
        plates: where the data are.

    Raises:
        ValueError: for latents in a plate within the datum.
    """
    if plates.nesting > 1:
        raise ValueError(
            "The defensive proposal takes latents that lie in the data's plate alone, with the "
            "parts of a datum in `.to_event(...)`. Use 'guide' or 'prior'."
        )

    of_prior = prior(model, summed)

    def program(batch: Any) -> None:
        drawn, others = _run(guide, batch), _run(of_prior, batch)
        names = [site["name"] for site in samples(drawn) if site["name"] in others.nodes]
        if not names:
            raise ValueError(
                "The defensive proposal leaves nothing to draw: every latent is summed out."
            )
        first: Any = drawn.nodes[names[0]]
        pick = torch.rand_like(first["fn"].log_prob(first["value"])) < SHARE
        for name in names:
            node: Any = drawn.nodes[name]
            other: Any = others.nodes[name]
            chosen = pick.reshape(*pick.shape, *(1,) * len(node["fn"].event_shape))
            node["value"] = other["value"] = torch.where(chosen, other["value"], node["value"])
        log_q = _log_prob(guide, batch, drawn, plates)
        log_p = _log_prob(of_prior, batch, others, plates)
        if summed:
            log_p = _log_sum(model, batch, others, [*names, *summed], plates)
        a = torch.tensor(SHARE)
        log_mixture = torch.logaddexp((1 - a).log() + log_q, a.log() + log_p)
        with pyro.plate(plates.name, log_mixture.shape[-1], dim=plates.dim):
            for name in names:
                node = drawn.nodes[name]
                event_dim = len(node["fn"].event_shape)
                density = log_mixture.reshape(pick.shape)
                pyro.sample(name, Delta(node["value"], density, event_dim=event_dim))
                log_mixture = torch.zeros_like(log_mixture)

    return program


class _Unseen(Messenger):
    """Keeps the sites of a run from the trace around it, and has them itself.

    The plate of particles around it goes on to work on them, as it would not on blocked ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace = poutine.Trace()

    def _pyro_sample(self, msg: Any) -> None:
        msg["infer"] = {**msg["infer"], "_do_not_trace": True, "is_auxiliary": True}

    def _pyro_post_sample(self, msg: Any) -> None:
        self.trace.add_node(msg["name"], **msg.copy())


def _run(program: Program, batch: Any) -> poutine.Trace:
    with _Unseen() as unseen:
        program(batch)
    return unseen.trace


def _log_prob(program: Program, batch: Any, drawn: poutine.Trace, plates: Plates) -> Tensor:
    again = _run(poutine.replay(program, trace=drawn), batch)
    return sum(guide_factors(again, plates), torch.zeros(()))


def _log_sum(
    model: Program, batch: Any, drawn: poutine.Trace, names: list[str], plates: Plates
) -> Tensor:
    """log p of the latents drawn, those summed out being so: the rest of these names."""
    latents = prior(model, [])
    again = poutine.enum(
        poutine.infer_config(poutine.replay(latents, trace=drawn), EnumerateAllBut(drawn)),
        first_available_dim=-2 - plates.nesting,
    )
    trace = _run(again, batch)
    factors = [log_factor(trace.nodes[name], plates) for name in names]
    joint = sum(factors, torch.zeros(()))
    return joint.reshape(-1, *joint.shape[-2:]).logsumexp(0)
