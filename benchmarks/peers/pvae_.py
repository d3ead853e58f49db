"""pvae: its training step, an epoch of `fit`, `evaluate` and `fit_em`.

`Steps` is the one place that knows how a single step of pvae is called.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pvae
from benchmarks import inputs
from benchmarks.peers.pytorch import synchronize
from benchmarks.peers.training import LR, FirstStep, Training
from pvae.baselines import GaussianMixture, fit_em
from pvae.batches import source_of
from pvae.data import Data
from pvae.fence import fenced
from pvae.training import Run

__all__ = ["JOBS", "vae"]


def vae(latent: int = 50) -> pvae.LatentModel:
    """The declared model with the first weights that all peers have."""
    model = pvae.models.vae(inputs.SIZE, latent, inputs.HIDDEN)
    model.prepare(torch.zeros(1, inputs.SIZE))
    layers = inputs.layers(latent)
    arrays = [array for name in ("decoder", "encoder") for layer in layers[name] for array in layer]
    for parameter, array in zip(model.parameters(), arrays, strict=True):
        parameter.data.copy_(torch.from_numpy(array.T))
    return model


def objective(particles: int) -> Any:
    """The ELBO, or for K > 1 IWAE."""
    return pvae.ELBO() if particles == 1 else pvae.IWAE(particles)


class Steps(Training):
    """The lowered step of `fit`, compiled, called on one batch after the other."""

    def prepare(self) -> None:
        device = torch.device(self.device)
        self.model = vae(self.latent)
        source = source_of(self.model, self.observed(), self.batch, 0, device)
        run = Run(self.model, objective(self.particles), source, torch.optim.Adam, LR, None, 0)
        self.step, self.calls = run.step, 0
        self.model.train()
        with fenced(0, device):
            self.step.lower(compile=True)

    def observed(self) -> Any:
        return torch.from_numpy(self.data)

    def run(self, batches: np.ndarray) -> np.ndarray:
        """The steps, and once they are done their mean: `fit` reads no more than that."""
        indices = torch.from_numpy(batches).to(self.device)
        self.step.restart()
        self.calls += 1
        with fenced(self.calls, torch.device(self.device)):
            for index in indices:
                self.step(self.batch, index)
        return -np.array(self.step.means(batches.size)[:1])

    def block(self) -> np.ndarray:
        """The next block of steps, one loss at a time."""
        self.blocks += 1
        batches = inputs.batches(self.num_data, self.batch, self.steps, self.blocks)
        return np.concatenate([self.run(batch[None]) for batch in batches])


class BareSteps(Steps):
    """The steps of an epoch on dynamically binarised data, with nothing between them."""

    source = "grey"

    def observed(self) -> Data:
        return binarised(self.data)

    def check(self) -> dict[str, Any]:
        self.prepare()
        self.time()
        return {}


class Epoch:
    """The second epoch of `fit`, by its own clock."""

    def __init__(self, sizes: dict[str, int], folder: Path, device: str):
        self.data = binarised(inputs.load(folder, "grey", sizes["num_data"]))
        self.sizes, self.device = sizes, device

    def check(self) -> dict[str, Any]:
        return {}

    def time(self) -> float:
        fit = pvae.fit(
            vae(),
            self.data,
            objective(self.sizes["particles"]),
            epochs=2,
            batch_size=self.sizes["batch"],
            lr=LR,
            device=self.device,
            compile=True,
            progress=False,
        )
        return float(fit.history["seconds"].iloc[-1])


def binarised(grey: np.ndarray) -> Data:
    """Grey levels of which each batch draws bits anew."""
    data = Data.of(torch.from_numpy(grey), "benchmark")
    return replace(data, spec=replace(data.spec, binarisation="dynamic"), resampled=True)


class Kernels(Steps):
    """The sum of the kernels in a block of steps, by torch's profiler: what a device must do."""

    def check(self) -> dict[str, Any]:
        self.prepare()
        self.block()
        return {}

    def time(self) -> float:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.block()
            synchronize(self.device)
        return sum(event.device_time_total for event in profiler.events()) / 1e6 / self.units


class Evaluate:
    """`evaluate` as it is called, with k-hat, reading the model and compiling it in its time."""

    def __init__(self, sizes: dict[str, int], folder: Path, device: str):
        self.x = torch.from_numpy(inputs.load(folder, "bits", sizes["many"]))
        self.particles, self.device = sizes["particles"], device
        self.units = sizes.get("units", self.particles * len(self.x))
        self.model = vae()

    def check(self) -> dict[str, Any]:
        found = self.evaluate().per_datum["bound"].sel(particles=self.particles)
        return {"bounds": found.values.tolist()}

    def time(self) -> float:
        start = time.perf_counter()
        self.evaluate()
        return (time.perf_counter() - start) / self.units

    def evaluate(self) -> Any:
        return pvae.evaluate(self.model, self.x, self.particles, device=self.device)


class Mixture:
    """`fit_em`, and log p(x) under what it found, as scikit-learn's `fit` ends with."""

    data, covariance = "pixels", "diag"

    def __init__(self, sizes: dict[str, int], folder: Path, device: str):
        self.x = torch.from_numpy(inputs.load(folder, self.data, sizes["num_data"], np.float64))
        self.updates, self.device = sizes["updates"], device
        self.means, self.variance = inputs.em_start(self.x.numpy(), sizes["components"])

    def check(self) -> dict[str, Any]:
        return {"log_likelihood": float(self.fit().log_likelihood[-1])}

    def time(self) -> float:
        start = time.perf_counter()
        self.fit().log_prob(self.x)
        return time.perf_counter() - start

    def fit(self) -> GaussianMixture:
        return fit_em(
            self.x,
            len(self.means),
            self.covariance,
            start=self.start(),
            max_iter=self.updates,
            tol=0.0,
            device=self.device,
        )

    def start(self) -> GaussianMixture:
        components = len(self.means)
        return GaussianMixture(
            weights=torch.full((components,), 1 / components, dtype=torch.float64),
            means=torch.from_numpy(self.means),
            scale_tril=self.variance**0.5 * self.ones(self.means.shape),
            covariance=self.covariance,
            log_likelihood=torch.empty(0, dtype=torch.float64),
            converged=False,
        )

    def ones(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.float64)


class FullMixture(Mixture):
    """With full covariances, on principal components."""

    data, covariance = "components", "full"

    def ones(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.eye(shape[1], dtype=torch.float64).repeat(shape[0], 1, 1)


JOBS = {
    ("pvae", "step"): Steps,
    ("pvae", "epoch"): Epoch,
    ("pvae", "first step"): lambda *given: FirstStep(Steps(*given)),
    ("pvae", "evaluate"): Evaluate,
    ("pvae", "em diag"): Mixture,
    ("pvae", "em full"): FullMixture,
    ("bare steps", "epoch"): BareSteps,
    ("its kernels alone", "step"): Kernels,
}
