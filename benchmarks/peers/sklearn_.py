"""scikit-learn: `GaussianMixture` from a given start, for a given number of updates."""

import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from benchmarks import inputs

__all__ = ["JOBS"]


class Mixture:
    """EM on pixels with diagonal covariances, or on principal components with full ones."""

    data, covariance = "pixels", "diag"

    def __init__(self, sizes: dict[str, int], folder: Path, device: str):
        self.x = inputs.load(folder, self.data, sizes["num_data"], np.float64)
        self.updates = sizes["updates"]
        self.means, self.variance = inputs.em_start(self.x, sizes["components"])

    def check(self) -> dict[str, Any]:
        return {"log_likelihood": float(self.fit().lower_bound_)}

    def time(self) -> float:
        start = time.perf_counter()
        self.fit()
        return time.perf_counter() - start

    def fit(self) -> GaussianMixture:
        components = len(self.means)
        mixture = GaussianMixture(
            components,
            covariance_type=self.covariance,
            means_init=self.means,
            precisions_init=self.precisions(self.means.shape) / self.variance,
            weights_init=np.full(components, 1 / components),
            max_iter=self.updates,
            tol=0.0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # so few updates are no convergence
            return mixture.fit(self.x)

    def precisions(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape)


class FullMixture(Mixture):
    """With full covariances."""

    data, covariance = "components", "full"

    def precisions(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.tile(np.eye(shape[1]), (shape[0], 1, 1))


JOBS = {("scikit-learn", "em diag"): Mixture, ("scikit-learn", "em full"): FullMixture}
