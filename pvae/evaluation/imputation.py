"""Imputation: what was not seen of a datum, from what was, by sampling importance resampling.

    z_k ~ q(z | x_seen),    w~_k = w_k / sum_j w_j:   particles that stand for p(z | x_seen)
    mean:   sum_k w~_k E[x_missing | z_k, x_seen]           (self-normalised importance sampling)
    draws:  k ~ Categorical(w~),  x_missing ~ p(x | z_k, x_seen)    (SIR)

Sources: Mattei & Frellsen 2019 (MIWAE), section 3; Rubin 1987 (SIR, and multiple imputation).

Several draws of each datum are multiple imputation: how they differ is what is not known. Self-
normalised weights are right in the limit of particles, and the effective sample size tells how far
they are from it. Of linear-Gaussian models, and of mixtures of them, p(x_missing | x_seen) is known
in closed form, and used. A label that is missing is an entry: its probabilities classify.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from pvae import exact
from pvae.declare import LatentModel
from pvae.fence import evaluating, fenced, module_device
from pvae.missing import Seen
from pvae.pair import Batch, Columns
from pvae.particles import Particles, check_count, draw
from pvae.passes import How, Proposal, weigh
from pvae.programs import Unobserved
from pvae.refinement import ALONE

__all__ = ["Imputation", "impute"]

FEW = 5  # particles that a mean or a draw may rest on without a warning
Values = dict[str, Tensor]


@dataclass(frozen=True, repr=False)
class Imputation:
    """Data with what was missing filled in; entries that were seen are as they were.

    Args:
        mean: E[x | x_seen] by observed site, (N, *event); of indices the most probable one.
        draws: of p(x | x_seen) by observed site, (S, N, *event).
        probabilities: p(index | x_seen), (N, *event, categories), by observed site of indices.
        ess: effective sample size of each datum's weights, (N,). Where it is small, mean and draws
            rest on few particles; it is infinite where both are exact.
    """

    mean: Values
    draws: Values
    probabilities: Values
    ess: Tensor

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in self.draws.items())
        if bool(self.ess.isinf().all()):
            return f"Imputation of {sizes}: draws, data, event; exact"
        median, least = float(self.ess.median()), float(self.ess.min())
        return (
            f"Imputation of {sizes}: draws, data, event; effective sample size {median:.0f} at the "
            f"median, {least:.0f} at least"
        )


def impute(
    model: LatentModel,
    data: Any,
    num_particles: int = 1000,
    num_samples: int = 10,
    *,
    proposal: Proposal | None = None,
    seed: int = 0,
) -> Imputation:
    """Fill in what is missing: its mean, and draws of it, given what was seen.

    Args:
        model: declared, with sites `Observed(..., missing=True)`.
        data: (N, *event), or columns by name, NaN where entries are missing.
        num_particles: K, whose weights stand for p(z | x_seen).
        num_samples: S, imputations of each datum; 1 for single imputation.
        proposal: as of `evaluate`. Left out, a linear-Gaussian model, or a mixture of them, needs
            no particles.
        seed: of all draws. The caller's random state stays as it was.

    Returns:
        Imputation, on the model's device.

    Raises:
        TypeError: for a model that is not declared.
        ValueError: for data that do not fit the model, or numbers below one.
        FloatingPointError: for a datum all of whose weights are zero.

    Warns:
        UserWarning: where the effective sample size of a tenth of the data, or more, is below five
            or half of K.
    """
    if not isinstance(model, LatentModel):
        raise TypeError(f"`impute` takes a declared LatentModel, got {type(model).__name__}.")
    check_count("num_particles", num_particles)
    check_count("num_samples", num_samples)
    how = How.of(proposal or (ALONE if model.per_datum else "guide"))
    device = module_device(model)
    columns = model.columns(data).realised().to(device)
    found: list[Imputation] = []
    with evaluating(model), fenced(seed, device):
        if proposal is None and exact.method(model) == "linear-Gaussian":
            return _exactly(model, columns, num_samples)
        for rows, passes in weigh(model, columns, num_particles, how, whole=num_particles):
            batch = columns.rows(rows)
            pool = _Pool(model, _partly(model, batch), num_samples)
            for log_weights, particles in passes:
                assert particles is not None
                pool.add(log_weights.double(), particles)
            pool.check(rows.start)
            found.append(_completed(model, batch, pool))
    result = _joined(found)
    absent = [
        column.values.isnan().reshape(len(columns), -1) for column in columns.columns.values()
    ]
    _warn_of_few(result.ess[torch.cat(absent, 1).any(1)], how, num_particles)
    return result


def _exactly(model: LatentModel, columns: Columns, num_samples: int) -> Imputation:
    """In closed form, from the Gaussian of what was not seen given what was."""
    data = columns.rows(slice(None))
    means, draws = exact.completed(model, data, num_samples)
    values, sizes = _by_name(model, data), [model.inputs[name].size for name in model.observed]
    mean, drawn = {}, {}
    for (name, x), one, many in zip(
        values.items(), means.split(sizes, -1), draws.split(sizes, -1), strict=True
    ):
        mean[name] = torch.where(x.isnan(), one.reshape(x.shape).to(x), x)
        drawn[name] = torch.where(x.isnan(), many.reshape(-1, *x.shape).to(x), x)
    return Imputation(mean, drawn, {}, torch.full((len(columns),), torch.inf))


def _warn_of_few(ess: Tensor, how: How, num_particles: int) -> None:
    limit = min(FEW, num_particles / 2)
    few = float((ess < limit).double().mean()) if len(ess) else 0.0
    if few >= 0.1:
        more = "" if how.name == "refined" else '`proposal="refined"`, or '
        warnings.warn(
            f"The effective sample size is below {limit:g} for {100 * few:.0f} % of data, whose "
            f"means and draws rest on so few particles: try {more}more `num_particles`.",
            stacklevel=3,
        )


class _Pool:
    """What is kept of the particles of a block of data, pass by pass.

    S of them by weight (each place on its own goes to a later particle with the probability of its
    share, Chao 1982), and weighted means.
    """

    def __init__(self, model: LatentModel, names: list[str], num_samples: int):
        self.model, self.names, self.num_samples = model, names, num_samples
        self.log_sum = self.log_squares = torch.empty(0)
        self.means: Values = {}
        self.z: Values = {}

    def add(self, log_w: Tensor, particles: Particles) -> None:
        """Particles with their weights, (k, n)."""
        log_squares = (2 * log_w).logsumexp(0)
        if not len(self.log_sum):
            self.log_sum = self.log_squares = torch.full_like(log_w[0], -torch.inf)
        total = torch.logaddexp(self.log_sum, log_w.logsumexp(0))
        keep, w = (self.log_sum - total).exp(), (log_w - total).exp()
        keep, w = keep.nan_to_num(0.0), w.nan_to_num(0.0)  # no weight yet, and none here
        self._resample(w, particles)
        for name in self.names:
            value = _mean(self.model, particles, name)
            added = (_like(w, value) * value).sum(0)
            before = self.means.get(name, torch.zeros_like(added))
            self.means[name] = _like(keep, added) * before + added
        self.log_sum = total
        self.log_squares = torch.logaddexp(self.log_squares, log_squares)

    def _resample(self, w: Tensor, particles: Particles) -> None:
        """Each of S places is taken by particle k with probability w_k, w the shares (k, n)."""
        drawn = {name: particles.values[name] for name in particles.log_q}
        index = _choose(w, self.num_samples)
        data = torch.arange(w.shape[1], device=w.device)
        chosen = {name: value[index, data] for name, value in drawn.items()}
        taken = torch.rand_like(w[:1].expand(self.num_samples, -1)) < w.sum(0)
        old = self.z or chosen
        self.z = {
            name: torch.where(_like(taken, value), value, old[name])
            for name, value in chosen.items()
        }

    def check(self, first: int) -> None:
        """Raise for a datum without a weight."""
        bad = (~self.log_sum.isfinite()).nonzero()
        if len(bad):
            raise FloatingPointError(
                f"The weights of datum {first + int(bad[0])} under {self.model.name!r} are all "
                "zero, or not finite: what is missing of it cannot be told. Train the guide, or "
                "look at that datum."
            )

    @property
    def ess(self) -> Tensor:
        """(sum w)^2 / sum w^2, (n,)."""
        return (2 * self.log_sum - self.log_squares).exp()


def _partly(model: LatentModel, batch: Batch) -> list[str]:
    """Observed sites of which something is missing."""
    return [name for name, x in _by_name(model, batch).items() if bool(x.isnan().any())]


def _by_name(model: LatentModel, batch: Batch) -> Values:
    named = {model.observed[0]: batch} if isinstance(batch, Tensor) else batch
    return {name: named[name] for name in model.observed}


def _choose(w: Tensor, num_samples: int) -> Tensor:
    """Particles in proportion to w (k, n), (S, n); any, where all weights are zero."""
    weights = w.T.nan_to_num(0.0)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    return torch.multinomial(weights, num_samples, replacement=True).T


def _like(few: Tensor, many: Tensor) -> Tensor:
    return few.reshape(*few.shape, *(1,) * (many.dim() - few.dim()))


def _mean(model: LatentModel, particles: Particles, name: str) -> Tensor:
    """E[x | z] of an observed site, (K, N, *event), of indices the probability of each."""
    categories, rank = model.inputs[name].categories, len(model.inputs[name].shape)
    if name in particles.summed:
        support = particles.values[name]
        if categories is None:
            return particles.expected(support, rank)
        each = torch.arange(categories, device=support.device)
        return particles.expected((support.unsqueeze(-1) == each).double(), 1)
    d: Any = particles.model_sites[name]
    if categories is None:
        return particles.expected(d.completed(particles.values[name], d.mean), rank)
    d = d.whole
    while isinstance(d, Independent):
        d = d.base_dist
    return particles.expected(d.probs, rank + 1)


def _nothing(batch: Batch) -> None:
    """A guide that draws nothing: every latent is given, or summed out."""


def _drawn(model: LatentModel, batch: Batch, z: Values, num_samples: int) -> Values:
    """Observed sites drawn whole, (S, n, *event), given latents; summed ones are drawn first."""
    program = poutine.condition(model.model, z)
    plates = model.plates
    particles = draw(program, _nothing, (batch,), num_particles=num_samples, plates=plates)
    precision = next(model.parameters()).dtype
    seen = {
        name: (x.to(precision) if x.is_floating_point() else x).expand(num_samples, *x.shape)
        for name, x in _by_name(model, batch).items()
        if not bool(x.isnan().any())
    }
    given = {**z, **particles.posterior_values(), **seen}
    plate = pyro.plate("particles", num_samples, dim=-1 - plates.nesting)
    program = plate(poutine.condition(Unobserved()(model.model), given))
    trace: Any = poutine.trace(program).get_trace(batch)
    found = {name: trace.nodes[name]["value"] for name in model.observed}
    for name, x in _by_name(model, batch).items():
        if isinstance(d := trace.nodes[name]["fn"], Seen):
            found[name] = d.completed(x, found[name])
    return found


def _completed(model: LatentModel, batch: Batch, pool: _Pool) -> Imputation:
    drawn = _drawn(model, batch, pool.z, pool.num_samples)
    mean, draws, probabilities = {}, {}, {}
    for name, x in _by_name(model, batch).items():
        missing, expected = x.isnan(), pool.means.get(name, x)
        if categories := model.inputs[name].categories:
            known = (x.unsqueeze(-1) == torch.arange(categories, device=x.device)).double()
            known = torch.where(missing.unsqueeze(-1), pool.means.get(name, known), known)
            probabilities[name], expected = known, known.argmax(-1)
        mean[name] = torch.where(missing, expected.to(x), x)
        draws[name] = torch.where(missing, drawn[name].to(x), x)
    return Imputation(mean, draws, probabilities, pool.ess)


def _joined(parts: list[Imputation]) -> Imputation:
    """Blocks of data put together."""
    first = parts[0]
    return Imputation(
        {name: torch.cat([part.mean[name] for part in parts]) for name in first.mean},
        {name: torch.cat([part.draws[name] for part in parts], 1) for name in first.draws},
        {n: torch.cat([part.probabilities[n] for part in parts]) for n in first.probabilities},
        torch.cat([part.ess for part in parts]),
    )
