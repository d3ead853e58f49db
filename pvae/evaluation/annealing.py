"""Annealed importance sampling: weights of log p(x) by a walk from the prior or the guide.

    f_b(z) = first(z)^(1 - b) p(x, z)^b,   0 = b_0 < b_1 < ... < b_T = 1
    log w += (b_t - b_{t-1}) (log p(x, z) - log first(z)),   then z moves by HMC along f_{b_t}

Weights have shape (chains, N) and go through the same bounds as all others. Sources: Neal 2001
(AIS); Neal 2011 (HMC); Wu, Burda, Salakhutdinov & Grosse 2017 (decoders, the sigmoid schedule).
A first walk of its own finds step sizes and, if asked to, the schedule; what it finds is fixed
before the walk that counts, whose weights are therefore unbiased.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pvae.evaluation.latents import Latents, Start
from pvae.lowering import PACKAGE, CannotLower, Lowered
from pvae.pair import Batch, Columns, Pair
from pvae.step import Speed

__all__ = ["Path", "Schedule", "Walk", "betas_of", "first_walk", "fixed_by"]

Schedule = Literal["sigmoid", "linear", "adaptive"]
TARGET = 0.65  # acceptance of HMC (Neal 2011, section 5.4.4.3)
WARM_UP = 0.2  # temperatures of the first walk, as a share of those of the second
GAIN = 0.5  # of the logarithm of step sizes, per proposal of the first walk
FIRST_STEP = 0.1


def betas_of(schedule: Schedule, num_temperatures: int, rad: float = 4.0) -> Tensor:
    """b_0 = 0, ..., b_T = 1: in even steps, or close together at both ends (Wu et al. 2017)."""
    if schedule == "linear":
        return torch.linspace(0, 1, num_temperatures + 1, dtype=torch.float64)
    s = torch.sigmoid(torch.linspace(-rad, rad, num_temperatures + 1, dtype=torch.float64))
    return (s - s[0]) / (s[-1] - s[0])


class Path:
    """Densities and gradients along the path, for a block of data.

    Args:
        pair: in evaluation mode.
        columns: whose rows a block holds.
        block: (n, *event) by column.
        num_chains: C.
        start: where the path begins, "prior" or "guide".
        speed: how gradients are computed, where they can be lowered.
    """

    def __init__(
        self,
        pair: Pair,
        columns: Columns,
        block: list[Tensor],
        num_chains: int,
        start: Start,
        speed: Speed,
    ):
        self.pair, self.block, self.start, self.num_chains = pair, block, start, num_chains
        self.batch: Batch = columns.observed(block)
        self.latents = Latents(pair, self.batch, "Annealed importance sampling")
        self.num_data = len(block[0])

        def evaluate(pair: Pair, z: Tensor, beta: Tensor, *block: Tensor) -> list[Tensor | None]:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                both = self.latents.log_densities(columns.observed(block), z, start)
                first, joint = both
                target = torch.lerp(first, joint, beta)
                (gradient,) = torch.autograd.grad(target.sum(), z)
            return [first.detach(), joint.detach(), gradient]

        self._evaluate: Callable[..., Any] = evaluate
        self.lowered: Lowered | None = None
        if speed != "eager":
            self._lower(speed == "compiled")

    def _lower(self, compile: bool) -> None:
        with torch.random.fork_rng():
            z = self.draw().contiguous()
        example = (z, z.new_full((1, 1), 0.5), *self.block)
        try:
            self.lowered = Lowered(self.pair, self._evaluate, example)
            if compile:
                self.lowered.compile(*example)
        except CannotLower as error:
            what = f"Chains are moved without being compiled: {error}."
            warnings.warn(what, skip_file_prefixes=PACKAGE)

    def draw(self) -> Tensor:
        """z from where the path begins, (C, n, D)."""
        return self.latents.draw(self.batch, self.num_chains, self.start)

    def __call__(self, z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """log first(z), log p(x, z), (C, n), and the gradient of log f_b, (C, n, D)."""
        b = z.new_full((1, 1), beta)
        if self.lowered is not None:
            first, joint, gradient = self.lowered(z.contiguous(), b, *self.block)
            return first, joint, gradient
        return tuple(self._evaluate(self.pair, z, b, *self.block))


class Walk:
    """Chains on their way along a path, and their weights.

    Args:
        path: whose densities they follow.
        z: where they are, (C, n, D).
        betas: b_0, ..., b_T; falling for a walk from the posterior, whose weights are of 1 / p(x).
        sizes: of HMC's steps at b_1, ..., b_{T-1}, (T - 1, n); left out, they are found on the way.
        leapfrog_steps: L of each proposal.
    """

    def __init__(
        self, path: Path, z: Tensor, betas: Tensor, sizes: Tensor | None, leapfrog_steps: int
    ):
        self.path, self.betas, self.leapfrog_steps = path, betas, leapfrog_steps
        self.adapts = sizes is None
        shape = z.shape[:2]
        length = len(betas) - 1
        self.state = {
            "z": z.contiguous(),
            "log_w": torch.zeros(shape, dtype=torch.float64, device=z.device),
            "accepted": z.new_zeros(shape),
            "size": z.new_full(shape[1:], FIRST_STEP),
            "sizes": z.new_zeros(length - 1, shape[1]) if sizes is None else sizes,
            "spread": torch.zeros(length, dtype=torch.float64),
            "t": torch.tensor(0),
        }

    @property
    def length(self) -> int:
        """T."""
        return len(self.betas) - 1

    @property
    def log_weights(self) -> Tensor:
        """(C, n), nats."""
        return self.state["log_w"]

    @property
    def acceptance(self) -> Tensor:
        """Of proposals so far, mean over chains, (n,)."""
        return self.state["accepted"].mean(0) / max(1, int(self.state["t"]) - 1)

    @property
    def is_done(self) -> bool:
        """Whether the path's end is reached."""
        return int(self.state["t"]) == self.length

    def step(self) -> None:
        """On to the next temperature: weigh, then move, but for the last, where nobody looks."""
        s, t = self.state, int(self.state["t"])
        here, there = float(self.betas[t]), float(self.betas[t + 1])
        first, joint, gradient = self.path(s["z"], there)
        difference = (joint - first).double()
        s["log_w"] = s["log_w"] + (there - here) * difference
        s["spread"][t] = difference.std(0).mean() if len(difference) > 1 else 1.0
        s["t"] = torch.tensor(t + 1)
        if t + 1 < self.length:
            energy = torch.lerp(first, joint, there)
            self._move(there, t, energy, gradient)

    def _move(self, beta: float, t: int, log_f: Tensor, gradient: Tensor) -> None:
        """One proposal of Hamiltonian Monte Carlo, accepted by each chain on its own."""
        s = self.state
        size = s["size"] if self.adapts else s["sizes"][t]
        e = size.unsqueeze(-1)
        z, r = s["z"], torch.randn_like(s["z"])
        kinetic = r.square().sum(-1) / 2
        r = r + e / 2 * gradient
        for i in range(self.leapfrog_steps):
            z = z + e * r
            first, joint, g = self.path(z, beta)
            r = r + (e if i + 1 < self.leapfrog_steps else e / 2) * g
        proposed = torch.lerp(first, joint, beta)
        log_ratio = proposed - r.square().sum(-1) / 2 - log_f + kinetic
        chance = log_ratio.nan_to_num(nan=-torch.inf).exp().clamp(max=1.0)
        taken = torch.rand_like(chance) < chance
        s["z"] = torch.where(taken.unsqueeze(-1), z, s["z"])
        s["accepted"] = s["accepted"] + taken
        if self.adapts:
            s["sizes"][t] = s["size"] = size * (GAIN * (chance.mean(0) - TARGET)).exp()


def first_walk(path: Path, num_temperatures: int, leapfrog_steps: int) -> Walk:
    """One that finds step sizes on its way, for `fixed_by`; a fifth as long."""
    length = max(20, round(WARM_UP * num_temperatures))
    return Walk(path, path.draw(), betas_of("sigmoid", length), None, leapfrog_steps)


def fixed_by(found: Walk, schedule: Schedule, num_temperatures: int) -> tuple[Tensor, Tensor]:
    """Betas and step sizes for the walk that counts, (T + 1,) and (T - 1, n)."""
    if schedule == "adaptive":
        betas = _even_in_length(found, num_temperatures)
    else:
        betas = betas_of(schedule, num_temperatures)
    sizes = _interpolate(betas[1:-1], found.betas[1:-1], found.state["sizes"].log())
    return betas, sizes.exp()


def _even_in_length(found: Walk, num_temperatures: int) -> Tensor:
    """Betas an equal thermodynamic length apart: the integral of the spread of log w' over beta."""
    steps = found.betas.diff() * found.state["spread"]
    length = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    even = torch.linspace(0, float(length[-1]), num_temperatures + 1, dtype=torch.float64)
    betas = _interpolate(even, length, found.betas.unsqueeze(1)).squeeze(1)
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _interpolate(at: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Between rows of values (M, n) at known points (M,), rising, for each of (T,): (T, n)."""
    right = torch.searchsorted(known, at).clamp(1, len(known) - 1)
    left = right - 1
    share = ((at - known[left]) / (known[right] - known[left])).clamp(0, 1).unsqueeze(1)
    return torch.lerp(values[left], values[right], share.to(values))
