"""What is kept of a weight pass: a few numbers a datum and a unit, whatever K is.

blocks of weights (K, n), and some particles whole  --Kept-->  Datasets per datum, per unit
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pvae import bounds
from pvae.pair import Columns, Pair, guide_mean
from pvae.particles import Particles
from pvae.passes import How, Weights, weigh
from pvae.step import Speed

__all__ = ["Kept", "bounds_of", "measure_of"]

PART_PARTICLES = 32  # at least, for the parts of the ELBO, whose spread is small


class Kept:
    """What is kept of the weights: a few numbers a datum, whatever K is."""

    def __init__(self, sizes: list[int], how: How):
        self.sizes, self.how = sizes, how
        self.measure: tuple[str, int] | None = None
        self.per_datum: list[dict[str, Tensor]] = []
        self.unit_kl: dict[str, list[Tensor]] = {}
        self.unit_means: dict[str, list[Tensor]] = {}

    def run(self, model: Pair, columns: Columns, speed: Speed, progress: bool) -> "Kept":
        """Weigh particles for all data."""
        from tqdm.auto import tqdm

        blocks = weigh(model, columns, self.sizes[-1], self.how, speed, whole=self._whole)
        with tqdm(
            total=len(columns), disable=not progress, desc=f"{model.name}, log p(x)", unit="datum"
        ) as bar:
            for rows, passes in blocks:
                self._block(passes)
                bar.update(rows.stop - rows.start)
        return self

    @property
    def _whole(self) -> int:
        """Particles a datum that are wanted whole: the parts of others are not the guide's."""
        return PART_PARTICLES if self.how.proposal == "guide" else 0

    def _block(self, passes: Iterable[tuple[Tensor, Particles | None]]) -> None:
        weights = Weights(self.sizes[-1])
        terms: dict[str, Tensor] = {}
        kl: dict[str, Tensor] = {}
        means: dict[str, Tensor] = {}
        averaged = 0
        for log_weights, particles in passes:
            weights.add(log_weights)
            if particles is not None and averaged < self._whole:  # sums, for these are large
                self.measure = measure_of(particles)
                _add(terms, particles.terms())
                _add(kl, unit_kl(particles))
                _add_halves(means, unit_mean(particles), averaged)
                averaged += particles.shape[0]
        row = bounds_of(weights.whole, self.sizes, self.how.replicates)
        row |= {name: total / averaged for name, total in terms.items()}
        self.per_datum.append({name: value.cpu() for name, value in row.items()})
        for name, total in kl.items():
            self.unit_kl.setdefault(name, []).append((total / averaged).cpu())
        sizes = torch.tensor([(averaged + 1) // 2, averaged // 2])
        for name, halves in means.items():
            self.unit_means.setdefault(name, []).append(halves.cpu() / _like(sizes, halves))

    def columns(self) -> dict[str, Tensor]:
        """Of all data, (N,) or (sizes, N)."""
        names = self.per_datum[0] if self.per_datum else ()
        return {n: torch.cat([row[n] for row in self.per_datum], -1).double() for n in names}

    def datasets(self, more: dict[str, Tensor]) -> tuple[Any, Any]:
        """Per datum, with columns of others, and per unit, as xarray Datasets."""
        import xarray as xr

        columns: dict[str, Any] = {
            name: (("particles", "datum")[-value.dim() :], value.cpu().numpy())
            for name, value in (self.columns() | more).items()
        }
        coords = {"particles": self.sizes} if self.per_datum else {}
        units: dict[str, Any] = {}
        for name, values in self.unit_kl.items():
            kl = torch.cat(values).double()
            units[f"KL[{name}]"] = (f"unit of {name}", kl.reshape(len(kl), -1).mean(0).numpy())
        for name, values in self.unit_means.items():
            halves = torch.cat(values, 1).double()
            halves = halves.reshape(*halves.shape[:2], -1)
            if halves.shape[1] > 1:
                units[f"activity[{name}]"] = (f"unit of {name}", _covariance(*halves).numpy())
        return xr.Dataset(columns, coords), xr.Dataset(units)


def bounds_of(
    log_weights: Tensor, sizes: list[int], replicates: int | None = None
) -> dict[str, Tensor]:
    """Bounds of each size with their errors, effective sample size and k-hat, by datum."""
    weights = log_weights.double()
    estimate, khat = bounds.psis(log_weights)
    errors = [bounds.iwae_standard_error(weights, size, replicates) for size in sizes]
    return {
        "bound": torch.stack([bounds.iwae(weights, size) for size in sizes]),
        "bound_se": torch.stack(errors),
        "cubo": bounds.cubo(weights),
        "ess": bounds.effective_sample_size(weights),
        "khat": khat,
        "psis": estimate,
    }


def measure_of(particles: Particles) -> tuple[str, int]:
    """Whether p(x) is a probability (x discrete) or a density, and how many numbers x has."""
    supports: list[Any] = [particles.model_sites[name].support for name in particles.observed]
    found = {support.is_discrete for support in supports}
    kind = "both" if len(found) > 1 else "probability" if found == {True} else "density"
    numbers = sum(particles.values[name].numel() for name in particles.observed)
    return kind, numbers // particles.shape[1]


def _add(totals: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Add the sums over particles (dimension 0)."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value.sum(0)


def _add_halves(totals: dict[str, Any], values: dict[str, Tensor], before: int) -> None:
    """Add the sums over every other particle, (2, n, *event): two independent means of each."""
    for name, value in values.items():
        first, second = value[before % 2 :: 2].sum(0), value[1 - before % 2 :: 2].sum(0)
        totals[name] = totals.get(name, 0.0) + torch.stack([first, second])


def _like(sizes: Tensor, halves: Tensor) -> Tensor:
    return sizes.reshape(-1, *[1] * (halves.dim() - 1))


def _covariance(first: Tensor, second: Tensor) -> Tensor:
    """Covariance over data of two independent estimates of E_q[u], in which their noise cancels.

    A single particle has no second half (NaN): then the variance, noise and all.
    """
    second = first if bool(second.isnan().any()) else second
    return ((first - first.mean(0)) * (second - second.mean(0))).sum(0) / (len(first) - 1)


def unit_kl(particles: Particles) -> dict[str, Tensor]:
    """log q - log p by unit of each guided latent whose q and p both factorise, (K, N, ...)."""
    found = {name: particles.unit_kl(name) for name in _guided(particles)}
    return {name: kl for name, kl in found.items() if kl is not None}


def unit_mean(particles: Particles) -> dict[str, Tensor]:
    """E_q[z | x] of each guided latent of floating point, (K, N, *event)."""
    return {
        name: guide_mean(particles, name)
        for name in _guided(particles)
        if particles.values[name].is_floating_point()
    }


def _guided(particles: Particles) -> list[str]:
    """Latents of the model that the guide draws, but for those in a plate within the datum."""
    return [
        name
        for name in particles.log_q
        if name in particles.model_sites and particles.values[name].shape[:2] == particles.shape
    ]
