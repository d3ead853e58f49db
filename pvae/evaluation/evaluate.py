"""Importance sampling of log p(x): one pass of weights, and everything that is a function of it.

pair, data  --weigh-->  (K, n) weights, block by block of data  --bounds-->  Evaluation
"""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pvae import bounds, exact
from pvae.evaluation.result import Evaluation
from pvae.fence import evaluating, fenced, resolve_device
from pvae.pair import Columns, Pair, check_pair, guide_mean
from pvae.particles import Particles, check_count
from pvae.passes import Weights, weigh
from pvae.step import Speed

__all__ = ["bounds_of", "evaluate", "measure_of"]

GRID = (1, 5, 50, 500, 5000, 50_000)
PART_PARTICLES = 32  # at least, for the parts of the ELBO, whose spread is small
LONG = 10_000_000  # weights that save more time than compiling takes
SHORT = 400_000  # weights that save more time than reading their pass out of Pyro takes


def evaluate(
    model: Pair,
    data: Any,
    num_particles: int = 5000,
    *,
    grid: Sequence[int] | None = None,
    proposal: str = "guide",
    seed: int = 0,
    device: str | torch.device = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
) -> Evaluation:
    """Evaluate log p(x): ELBO and IWAE bounds on a grid of K, k-hat, ESS, KL and active units.

    One matrix of weights serves the whole grid: L_k is averaged over its disjoint blocks of k rows.
    Where log p(x) is exact in closed form (`exact.method` "enumeration" or "linear-Gaussian") it is
    reported beside the bounds; where every latent is summed out, instead of them. The model is left
    as it was, and so is the caller's random state. Quadrature takes longer than bounds do, and is
    left to `exact.log_prob`.

    Args:
        model: `LatentModel` or `PyroPair`.
        data: (N, *event), or columns by name; noise of a training split is drawn once.
        num_particles: K, drawn exactly, in memory that does not grow with it up to four million,
            the weights of a single datum that are held at once.
        grid: sizes k <= K of the bounds; 1, 5, 50, ... and K where left out.
        proposal: "guide"; "prior" for naive Monte Carlo, whose k-hat says why not; or "defensive",
            nine parts of the one and one of the other: its weights are bounded by 10 p(x | z), so
            that a mode which the guide misses shows.
        seed: of the draws.
        device: where to run; "auto" is CUDA where there is one.
        compile: whether weights are drawn by a compiled graph, read once out of Pyro (`passes`).
            That takes some seconds on a CPU, and changes the last bits of results. "auto" compiles
            where ten million weights or more are drawn; where 400,000 are, it runs the graph that
            is read, whose results are Pyro's own to the last bit.
        progress: show a bar.

    Returns:
        Evaluation, in nats.

    Raises:
        ValueError: for data that do not fit the model, K below 1, or a grid outside 1..K.
        FloatingPointError: where log p(x) comes out as NaN or infinite, naming the datum.
    """
    start = time.perf_counter()
    check_pair(model)
    check_count("num_particles", num_particles)
    sizes = _grid(grid, num_particles)
    place = resolve_device(device)
    columns = model.columns(data).realised()
    before = next(model.parameters(), torch.empty(0)).device
    model.to(place)
    try:
        on_device = columns.to(place)
        with torch.random.fork_rng():
            model.prepare(on_device.rows(slice(0, 13)))
        how = exact.method(model)
        closed = how in ("enumeration", "linear-Gaussian")
        known = exact.log_prob(model, data) if closed else None
        speed = _speed(num_particles * len(columns), compile)
        passes = _Passes(sizes, with_parts=proposal != "defensive")
        with evaluating(model), fenced(seed, place):
            if how == "enumeration" or not passes.with_parts:
                passes.measure = measure_of(model.draw(on_device.rows(slice(0, 1))))
            if how != "enumeration":
                passes.run(model, on_device, num_particles, proposal, speed, progress)
    finally:
        model.to(before)
    per_datum, per_unit = passes.datasets(known)
    _check_finite(model, per_datum)
    return Evaluation(
        model=model.name,
        spec=columns.main.spec,
        measure=passes.measure[0],
        dimensions=passes.measure[1],
        fingerprint=columns.fingerprint(),
        num_particles=0 if how == "enumeration" else num_particles,
        proposal=proposal,
        per_datum=per_datum,
        per_unit=per_unit,
        seconds=time.perf_counter() - start,
    )


def _speed(num_weights: int, compile: bool | Literal["auto"]) -> Speed:
    """What pays. A rule of numbers, not of times, so that results can be repeated."""
    if compile not in (True, False, "auto"):
        raise ValueError(f"`compile` must be True, False or 'auto', got {compile!r}.")
    if compile != "auto":
        return "compiled" if compile else "eager"
    return "compiled" if num_weights >= LONG else "traced" if num_weights >= SHORT else "eager"


def _grid(grid: Sequence[int] | None, num_particles: int) -> list[int]:
    if grid is None:
        return sorted({size for size in GRID if size < num_particles} | {num_particles})
    if bad := [size for size in grid if not 1 <= size <= num_particles]:
        raise ValueError(f"`grid` must lie in 1..{num_particles}, the particles drawn; got {bad}.")
    return sorted({*grid, num_particles})


def _check_finite(model: Pair, per_datum: Any) -> None:
    for name in {"bound", "exact"} & set(per_datum):
        rows = per_datum[name].values.reshape(-1, per_datum.sizes["datum"])
        bad = (~(rows < math.inf).all(0)).nonzero()[0]  # a density of zero, -inf, is none of these
        if len(bad):
            raise FloatingPointError(
                f"log p(x) of {model.name!r} is NaN or infinite for {len(bad)} of {rows.shape[1]} "
                f"data, the first is datum {bad[0]}. Look at that datum, and whether the model's "
                "parameters are finite."
            )


def measure_of(particles: Particles) -> tuple[str, int]:
    """Whether p(x) is a probability (x discrete) or a density, and how many numbers x has."""
    supports: list[Any] = [particles.model_sites[name].support for name in particles.observed]
    found = {support.is_discrete for support in supports}
    kind = "both" if len(found) > 1 else "probability" if found == {True} else "density"
    numbers = sum(particles.values[name].numel() for name in particles.observed)
    return kind, numbers // particles.shape[1]


class _Passes:
    """What is kept of the weights: a few numbers a datum, whatever K is."""

    def __init__(self, sizes: list[int], with_parts: bool):
        self.sizes, self.with_parts = sizes, with_parts
        self.measure = ("", 0)
        self.per_datum: list[dict[str, Tensor]] = []
        self.unit_kl: dict[str, list[Tensor]] = {}
        self.unit_means: dict[str, list[Tensor]] = {}

    def run(
        self,
        model: Pair,
        columns: Columns,
        num_particles: int,
        proposal: str,
        speed: Speed,
        progress: bool,
    ) -> None:
        from tqdm.auto import tqdm

        blocks = weigh(model, columns, num_particles, proposal, speed, whole=self._whole)
        with tqdm(
            total=len(columns), disable=not progress, desc=f"{model.name}, log p(x)", unit="datum"
        ) as bar:
            for rows, passes in blocks:
                self._block(passes)
                bar.update(rows.stop - rows.start)

    @property
    def _whole(self) -> int:
        """Particles a datum that are wanted whole: the parts of a mixture are not the guide's."""
        return PART_PARTICLES if self.with_parts else 0

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
        row = bounds_of(weights.whole, self.sizes)
        row |= {name: total / averaged for name, total in terms.items()}
        self.per_datum.append({name: value.cpu() for name, value in row.items()})
        for name, total in kl.items():
            self.unit_kl.setdefault(name, []).append((total / averaged).cpu())
        sizes = torch.tensor([(averaged + 1) // 2, averaged // 2])
        for name, halves in means.items():
            self.unit_means.setdefault(name, []).append(halves.cpu() / _like(sizes, halves))

    def datasets(self, known: Tensor | None) -> tuple[Any, Any]:
        """Per datum and per unit, as xarray Datasets."""
        import xarray as xr

        columns: dict[str, Any] = {}
        for name in self.per_datum[0] if self.per_datum else ():
            value = torch.cat([row[name] for row in self.per_datum], -1).double().numpy()
            columns[name] = (("particles", "datum")[-value.ndim :], value)
        if known is not None:
            columns["exact"] = ("datum", known.double().cpu().numpy())
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


def bounds_of(log_weights: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """Bounds of each size with their errors, effective sample size and k-hat, by datum."""
    weights = log_weights.double()
    estimate, khat = bounds.psis(log_weights)
    return {
        "bound": torch.stack([bounds.iwae(weights, size) for size in sizes]),
        "bound_se": torch.stack([bounds.iwae_standard_error(weights, size) for size in sizes]),
        "ess": bounds.effective_sample_size(weights),
        "khat": khat,
        "psis": estimate,
    }


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
