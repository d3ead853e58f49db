"""Baselines: what is subtracted from a learning signal to make its gradient less noisy.

A guide site without reparameterisation gets the score-function term, for each particle

    (reward_k - b_k) d log q(z_k | x) / d phi,      E[b_k d log q(z_k | x) / d phi] = 0

for any b_k that does not depend on z_k. By name:

- "leave-one-out": what the reward is, estimated from the other particles (Mnih & Rezende 2016 for
  bounds; Kool et al. 2019 for the ELBO).
- "vimco": the bound with w_k replaced by the geometric mean of the others (Mnih & Rezende 2016,
  eq. 10); for the ELBO, which has no such part, the same as "leave-one-out".
- "average": a decaying average of past rewards, the same for all data (Mnih & Gregor 2014, 2.3).
- "learned": a network's prediction of the reward from x, trained beside the guide (the same).
- "none".

`fit` and `pyro.infer.SVI` train what is learned. In a loop of one's own its parameters, among those
of `objective(model, guide)`, exist from the first call on: make it before the optimiser.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pvae.particles import Particles

__all__ = [
    "Average",
    "Learned",
    "alike",
    "check",
    "make",
    "mean_without_each",
    "name_for",
    "observed_matrix",
    "without_each",
]

NAMES = ("auto", "leave-one-out", "vimco", "average", "learned", "none")
DECAY = 0.9
HIDDEN = 100


class Average(nn.Module):
    """A decaying average of rewards, free of the bias towards its start."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    total: Tensor
    weight: Tensor

    def forward(self, reward: Tensor) -> Tensor:
        """The average before these rewards, which are then taken in."""
        before = torch.where(self.weight > 0, self.total / self.weight, 0.0)
        self.total.mul_(DECAY).add_(reward.mean().double() * (1 - DECAY))
        self.weight.mul_(DECAY).add_(1 - DECAY)
        return before.to(reward.dtype)


class Learned(nn.Module):
    """A network from what is observed to the reward expected."""

    def __init__(self, size: int, net: nn.Module | None = None):
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(size, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, observed: Tensor) -> Tensor:
        """(N, size) -> (N,)."""
        return self.net(observed).squeeze(-1)


def check(baseline: Any) -> None:
    """Raise unless every baseline is a name or a network."""
    each = baseline.values() if isinstance(baseline, Mapping) else [baseline]
    for one in each:
        if not isinstance(one, nn.Module) and one not in NAMES:
            raise ValueError(
                f"`baseline` must be one of {', '.join(map(repr, NAMES))}, a network, or these "
                f"by site; got {one!r}."
            )


def alike(one: nn.Module | None, other: nn.Module) -> bool:
    """Whether a baseline that is kept may go on in the other's place."""
    if one is None or type(one) is not type(other):
        return False
    shapes = [[p.shape for p in module.parameters()] for module in (one, other)]
    return shapes[0] == shapes[1]


def name_for(baseline: Any, site: str, num_particles: int, auto: str) -> Any:
    """The baseline of one site; several particles make their own, one keeps an average.

    Raises:
        ValueError: for a baseline of the other particles where there is one.
    """
    chosen = baseline.get(site, "auto") if isinstance(baseline, Mapping) else baseline
    if isinstance(chosen, nn.Module) or chosen not in ("auto", "leave-one-out", "vimco"):
        return chosen
    if num_particles > 1:
        return auto if chosen == "auto" else chosen
    if chosen == "auto":
        return "average"
    raise ValueError(
        f"The baseline {chosen!r} of {site!r} comes from the other particles, and there is one "
        "only: raise `num_particles`, or choose 'average' or 'learned'."
    )


def make(chosen: Any, particles: Particles) -> nn.Module | None:
    """The module that keeps a baseline, if it needs one."""
    if chosen == "average":
        return Average().to(particles.log_weights.device)
    if isinstance(chosen, nn.Module) or chosen == "learned":
        observed = observed_matrix(particles)
        own = chosen if isinstance(chosen, nn.Module) else None
        with torch.random.fork_rng():  # the model draws the same noise as without a baseline
            torch.manual_seed(0)
            return Learned(observed.shape[-1], own).to(observed)
    return None


def observed_matrix(particles: Particles) -> Tensor:
    """All that is observed of each datum, (N, size), in the precision of the weights.

    Raises:
        ValueError: for data in several plates.
    """
    if particles.plates.nesting > 1:
        raise ValueError(
            "A learned baseline takes data in one plate, with the parts of a datum in "
            "`.to_event(...)`; choose 'average' or 'leave-one-out'."
        )
    dtype = particles.log_weights.dtype
    values = [particles.values[name] for name in particles.observed]
    size = particles.shape[1]
    rows = [value.reshape(size, -1).to(dtype).nan_to_num(0.0) for value in values]  # NaN: missing
    return torch.cat(rows, 1)


def without_each(log_weights: Tensor, power: float, baseline: str) -> Tensor:
    """The bound 1/p log mean_k w_k^p as the other particles tell it, for each of them, (K, N).

    Args:
        log_weights: (K, N), K > 1.
        power: p, not 0; infinite for the largest weight.
        baseline: "leave-one-out" or "vimco".
    """
    num_particles = len(log_weights)
    if power == math.inf:
        return _others(log_weights, _running_max, torch.maximum, -math.inf)
    a = power * log_weights
    others = _others(a, _running_log_sum, torch.logaddexp, -math.inf)
    if baseline == "leave-one-out":
        found = others - math.log(num_particles - 1)
    else:
        fill = _others(a, _running_sum, torch.add, 0.0) / (num_particles - 1)
        found = torch.logaddexp(others, fill) - math.log(num_particles)
    return (found / power).nan_to_num(neginf=0.0)  # if no other has weight: b = 0 will do


def mean_without_each(reward: Tensor) -> Tensor:
    """Mean of the other particles' rewards, for each of them, (K, N), K > 1."""
    return _others(reward, _running_sum, torch.add, 0.0) / (len(reward) - 1)


def _others(a: Tensor, run: Callable[[Tensor], Tensor], join: Any, nothing: float) -> Tensor:
    """Of all rows but each: those above it joined with those below, none of them subtracted."""

    def above(a: Tensor) -> Tensor:
        return torch.cat([torch.full_like(a[:1], nothing), run(a)[:-1]])

    return join(above(a), above(a.flip(0)).flip(0))


def _running_max(a: Tensor) -> Tensor:
    return a.cummax(0).values


def _running_log_sum(a: Tensor) -> Tensor:
    return a.logcumsumexp(0)


def _running_sum(a: Tensor) -> Tensor:
    return a.cumsum(0)
