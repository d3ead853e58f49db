"""The aggregate posterior q(z) = E q(z | x), by the guide's density of its draws at all data.

    pair, columns  --Drawn-->  z_sn ~ q(z | x_n), with log q, log p and KL of each;  S draws, N data
    pair, columns, Drawn  --log_others-->  log sum_{m != n} q(z_sn | x_m), (S, N)
    log q, log others, noise  --information_bounds-->  of each draw, what z tells of x, in nats

The S N^2 pairs of a draw and a datum are computed in chunks of some draws and data, of which one
at a time is in memory. A draw's own datum is left out of its sum, for the upper bound; adding it
again gives the lower one. Where KL is known in closed form, the noise of log q - log p about it is
a control variate for both.
"""

import math
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pvae.pair import Batch, Columns, Pair, guide_mean
from pvae.particles import Particles, draw, guide_factors

__all__ = ["Drawn", "information_bounds", "log_others"]

MAX_ROWS = 2048  # particle-datum pairs drawn and decoded at once
MAX_PAIRS = {"cpu": 2**15, "cuda": 2**20}  # of a draw and a datum, in one run of the guide
MAX_NUMBERS = {"cpu": 2**21, "cuda": 2**26}  # in the values of the latents of those pairs
DRAWS_TOGETHER = 2048  # at most; they share one run of the encoder


class Drawn:
    """S draws of the latents of N data, and what is known of each draw by itself.

    Args:
        pair: in evaluation mode, prepared for its data.
        columns: its data.
        num_samples: S.
    """

    def __init__(self, pair: Pair, columns: Columns, num_samples: int):
        self.names: list[str] = []
        self.event_dims: dict[str, int] = {}
        self.how: dict[str, str] = {}
        self.prior_is_fixed = True
        self._values: dict[str, list[Tensor]] = {}
        self._rows: dict[str, list[Tensor]] = {}
        size = max(1, MAX_ROWS // (num_samples * pair.categories))
        shuffled = torch.randperm(len(columns)).to(columns.tensors()[0].device)
        for first in range(0, len(columns), size):
            rows = slice(first, min(first + size, len(columns)))
            particles = pair.draw(columns.rows(rows), num_samples)
            if first == 0:
                self.names = _guided(pair, particles, rows.stop)
            self._keep(pair, particles, first)
            if self.prior_is_fixed:
                other = columns.batch(shuffled[rows])
                self.prior_is_fixed = _same_prior(pair, particles, other, self.names)

    @property
    def values(self) -> dict[str, Tensor]:
        """By latent, (N, S, rest of the plates, *event)."""
        return {name: torch.cat(some) for name, some in self._values.items()}

    @property
    def rows(self) -> dict[str, Tensor]:
        """By draw and datum, (S, N); of units by some means over draws, (1 or 2, N, units)."""
        return {key: torch.cat(values, 1) for key, values in self._rows.items()}

    def _keep(self, pair: Pair, particles: Particles, first: int) -> None:
        log_q = sum(particles.log_q.values(), torch.zeros(())).expand(particles.shape).double()
        log_p = particles.log_joint_of([*self.names, *particles.summed]).double()
        _check_finite(pair, log_q + log_p, first)
        noise = torch.zeros_like(log_q)
        found: dict[str, Tensor] = {}
        for name in self.names:
            closed = particles.analytic_kl(name)
            self.how[name] = "from draws" if closed is None else "closed form"
            if particles.log_p[name].dim() <= 2:  # else it depends on a latent that is summed out
                part = (particles.log_q[name] - particles.log_p[name]).expand(particles.shape)
                if closed is not None:
                    chance = part.double() - closed.double()
                    noise = noise + torch.where(closed.isfinite(), chance, -torch.inf)
                found[f"KL[{name}]"] = part if closed is None else closed
            found |= _by_unit(pair, particles, name, closed is not None)
            value, event_dim = particles.values[name], len(particles.guide_sites[name].event_shape)
            data_dim = value.dim() - event_dim + pair.plates.dim
            self.event_dims[name] = event_dim
            self._values.setdefault(name, []).append(value.movedim(data_dim, 0))
        found |= {"KL": log_q - log_p - noise, "noise": noise, "log_q": log_q}
        for key, row in found.items():
            self._rows.setdefault(key, []).append(row.double())


def _by_unit(pair: Pair, particles: Particles, name: str, closed: bool) -> dict[str, Tensor]:
    """KL of each unit, (1, n, units), and means of q over every other draw, (2, n, units)."""
    found: dict[str, Tensor] = {}
    if pair.plates.nesting > 1:  # parts of a datum have latents of their own
        return found
    if (kl := particles.unit_kl(name, analytic=closed)) is not None:
        found[f"unit KL[{name}]"] = kl.double().mean(0).reshape(1, particles.shape[1], -1)
    if particles.values[name].is_floating_point():
        each = [guide_mean(single, name) for single in particles.singles]
        mean = torch.stack(each) if each else guide_mean(particles, name)
        halves = mean[::2], mean[1::2] if len(mean) > 1 else mean
        stacked = torch.stack([half.double().mean(0) for half in halves])
        found[f"mean[{name}]"] = stacked.reshape(2, particles.shape[1], -1)
    return found


def _guided(pair: Pair, particles: Particles, num_data: int) -> list[str]:
    """Names of the latents, each of which has a density under the guide.

    Raises:
        ValueError: where there is none, or one without a density.
    """
    if not particles.log_q:
        raise ValueError(
            f"`collapse` asks what the guide's latents tell of x, and {pair.name!r} has none that "
            "the guide draws: every latent is summed out, and cannot collapse unnoticed."
        )
    if particles.shape[1] != num_data:
        raise ValueError(
            f"`collapse` needs programs that take all data they are given; {pair.name!r} took "
            f"{particles.shape[1]} of {num_data}. Leave the batches to pvae."
        )
    for name in particles.log_q:
        why = ""
        if name not in particles.model_sites:
            why = "is an auxiliary draw of the guide, no latent of the model"
        elif _is_delta(particles.guide_sites[name]):
            why = "is a point under the guide (Delta)"
        elif name in particles.masks or name in particles.guide_masks:
            why = "is masked for some data"
        if why:
            raise ValueError(
                f"`collapse` compares densities q(z | x) at all data, and {name!r} of "
                f"{pair.name!r} {why}, so that there are none to compare. Draw each latent of the "
                "model, for each datum, from a distribution with a density."
            )
    return list(particles.log_q)


def _is_delta(d: Any) -> bool:
    while hasattr(d, "base_dist"):
        d = d.base_dist
    return isinstance(d, pyro.distributions.Delta)


def _check_finite(pair: Pair, log_prob: Tensor, first: int) -> None:
    bad = log_prob.isnan().any(0).nonzero()
    if len(bad):
        raise FloatingPointError(
            f"log q(z | x) or log p(z) of {pair.name!r} is NaN for {len(bad)} of "
            f"{log_prob.shape[1]} data looked at together, the first is datum "
            f"{first + int(bad[0])}. Look at that datum, and whether the model's parameters are "
            "finite."
        )


def _same_prior(pair: Pair, particles: Particles, other: Batch, names: list[str]) -> bool:
    """Whether p(z) of a draw is the same beside other data: no site is a parent of a latent."""
    model = poutine.condition(pair.model, {name: particles.values[name][0] for name in names})
    again = draw(model, lambda _: None, (other,), plates=pair.plates)
    sites = [*names, *particles.summed]
    return torch.allclose(again.log_joint_of(sites)[0], particles.log_joint_of(sites)[0])


# ------------------------------------------------------------------------------ all pairs


def log_others(pair: Pair, columns: Columns, drawn: Drawn, progress: bool) -> Tensor:
    """log of the sum of q(z_sn | x_m) over m != n, (S, N)."""
    from tqdm.auto import tqdm

    values = drawn.values
    shape = next(iter(values.values())).shape[:2]
    flat = {name: value.flatten(0, 1) for name, value in values.items()}
    owner = torch.arange(shape[0], device=columns.tensors()[0].device).repeat_interleave(shape[1])
    total = torch.full(owner.shape, -torch.inf, dtype=torch.float64, device=owner.device)
    size = sum(value[0].numel() for value in flat.values())
    chunks = _chunks(pair, len(owner), shape[0], size, owner.device.type)
    with tqdm(
        total=len(owner) * shape[0],
        disable=not progress,
        desc=f"{pair.name}, log q(z | x) at all data",
        unit="pair",
    ) as bar:
        for draws, rows in chunks:
            some = {name: value[draws] for name, value in flat.items()}
            log_q = _log_q(pair, columns.rows(rows), rows.stop - rows.start, some, drawn.event_dims)
            own = owner[draws, None] == torch.arange(rows.start, rows.stop, device=owner.device)
            log_sum = log_q.double().masked_fill(own, -torch.inf).logsumexp(1)
            total[draws] = torch.logaddexp(total[draws], log_sum)
            bar.update(own.numel())
    _check_finite(pair, total.reshape(shape).T, 0)
    return total.reshape(shape).T


def _chunks(
    pair: Pair, num_draws: int, num_data: int, size: int, device: str
) -> Iterator[tuple[slice, slice]]:
    """Some draws and some data, so that all pairs of them fit into memory."""
    pairs = max(1, min(MAX_PAIRS[device], MAX_NUMBERS[device] // size))
    draws = min(DRAWS_TOGETHER, num_draws, pairs) if pair.vectorize_particles else 1
    data = max(1, pairs // draws)
    for start in range(0, num_data, data):
        rows = slice(start, min(start + data, num_data))
        for first in range(0, num_draws, draws):
            yield slice(first, min(first + draws, num_draws)), rows


def _log_q(
    pair: Pair, batch: Batch, num_data: int, draws: dict[str, Tensor], event_dims: dict[str, int]
) -> Tensor:
    """log q(z_p | x_m) of each draw, (P, rest of the plates, *event), at each datum, (P, M)."""
    values = {}
    for name, value in draws.items():
        axis = value.dim() - event_dims[name] + pair.plates.dim + 1
        shape = [*value.shape[:axis], num_data, *value.shape[axis:]]
        values[name] = value.unsqueeze(axis).expand(shape)
    if pair.vectorize_particles:
        plate = pyro.plate("particles", len(value), dim=-1 - pair.plates.nesting)
        guide = plate(poutine.condition(pair.guide, values))
    else:  # one draw, without a dimension of its own
        guide = poutine.condition(pair.guide, {name: one[0] for name, one in values.items()})
    factors = guide_factors(poutine.trace(guide).get_trace(batch), pair.plates)
    return sum(factors, torch.zeros(())).expand(len(value), num_data)


# ------------------------------------------------------------------------------ bounds


def information_bounds(log_q: Tensor, others: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of I(x; z), by draw and datum, less what the draws' noise explains.

    Args:
        log_q: log q(z_sn | x_n), (S, N).
        others: log of the sum of q(z_sn | x_m) over m != n, (S, N).
        noise: log q / p of each draw less its known mean KL, (S, N); 0 where none is known.
    """
    num_data = log_q.shape[1]
    lower = log_q - torch.logaddexp(others, log_q) + math.log(num_data)
    upper = log_q - others + math.log(num_data - 1)
    chance = _explained(lower, noise)
    return lower - chance, upper - chance


def _explained(value: Tensor, noise: Tensor) -> Tensor:
    """What of a value the draws' own noise explains: b * noise, b by least squares.

    The noise, log q / p of a draw less its known mean KL, has mean zero at each datum. At b = 0 the
    information is as drawn, at b = 1 it is KL less the drawn rest: each is without noise somewhere
    (where all data have one code, where the aggregate is the prior).
    """
    power = noise.square().sum()
    if not (bool(power > 0) and bool(power.isfinite())):
        return torch.zeros_like(noise)
    return ((value - value.mean()) * noise).sum() / power * noise
