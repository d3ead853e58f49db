"""Linear-Gaussian models of one layer and of two: p(x) and p(z | x) are Gaussian.

Source: Bishop 2006, "Pattern Recognition and Machine Learning", equations 2.113 to 2.117.
"""

import math
from dataclasses import dataclass
from functools import partial

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal
from torch import Tensor

from pvae import Latent, LatentModel, Observed, PyroPair
from pvae.nets import Linear
from tests.exact.parameters import normal, with_parameters


def gaussian_log_prob(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log N(x; mean, covariance) for x (N, D), term by term."""
    r = x - mean
    mahalanobis = (r * torch.linalg.solve(covariance, r.T).T).sum(-1)
    log_det = torch.linalg.slogdet(covariance).logabsdet
    return -0.5 * (x.shape[-1] * math.log(2 * math.pi) + log_det + mahalanobis)


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def standard_normal(size: int) -> MultivariateNormal:
    return Normal(torch.zeros(size, dtype=torch.float64), 1.0).to_event(1)


@dataclass(frozen=True)
class LinearGaussian:
    """z ~ N(0, I), x | z ~ N(W z + b, sigma^2 I), hence x ~ N(b, W W' + sigma^2 I)."""

    W: Tensor  # (D, d)
    b: Tensor  # (D,)
    sigma: float

    @classmethod
    def drawn(
        cls, data_size: int = 5, latent_size: int = 3, sigma: float = 0.5, seed: int = 1
    ) -> "LinearGaussian":
        W = normal(data_size, latent_size, seed=seed)
        return cls(W, normal(data_size, seed=seed + 1), sigma)

    def sample(self, num_data: int, seed: int = 0) -> Tensor:
        D, d = self.W.shape
        z, noise = normal(num_data, d, seed=seed), normal(num_data, D, seed=seed + 1)
        return z @ self.W.T + self.b + self.sigma * noise

    def log_prob(self, x: Tensor) -> Tensor:
        C = self.W @ self.W.T + self.sigma**2 * identity(len(self.b))
        return gaussian_log_prob(x, self.b, C)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, d) and covariance (d, d) of p(z | x), by way of the precision."""
        S = torch.linalg.inv(identity(self.W.shape[1]) + self.W.T @ self.W / self.sigma**2)
        return (x - self.b) @ self.W @ S / self.sigma**2, S

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", standard_normal(self.W.shape[1]))
            mean = z @ self.W.T + self.b
            pyro.sample("x", Normal(mean, self.sigma).to_event(1), obs=x)

    def guide(self, x: Tensor, spread: float = 1.0) -> None:
        """p(z | x) with its covariance multiplied by `spread`: exact at 1, too broad above.

        For spread s > 1 the relative weights w / p(x) are bounded by s^(d/2).
        """
        mean, S = self.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", MultivariateNormal(mean, spread * S))

    def weight_variance(self, spread: float) -> float:
        """Variance of w / p(x) under the broad guide: (s^2 / (2s - 1))^(d/2) - 1."""
        return (spread**2 / (2 * spread - 1)) ** (self.W.shape[1] / 2) - 1

    def pair(self, spread: float = 1.0) -> PyroPair:
        return PyroPair(self.model, partial(self.guide, spread=spread))

    def declared(self, **guide: Latent) -> LatentModel:
        D, d = self.W.shape
        model = LatentModel(
            z=Latent(Normal, d),
            x=Observed(Normal, D, given="z", net=Linear(), scale=self.sigma),
            guide=guide or None,
        )
        return with_parameters(model, x=(self.W, self.b))


@dataclass(frozen=True)
class TwoLayers:
    """z2 ~ N(0, I), z1 | z2 ~ N(A z2 + a, s^2 I), x | z1 ~ N(B z1 + b, t^2 I)."""

    A: Tensor  # (d1, d2)
    a: Tensor
    s: float
    B: Tensor  # (D, d1)
    b: Tensor
    t: float

    @classmethod
    def drawn(
        cls, data_size: int = 4, latent_sizes: tuple[int, int] = (3, 2), seed: int = 11
    ) -> "TwoLayers":
        low, top = latent_sizes
        A, a = normal(low, top, seed=seed), normal(low, seed=seed + 1)
        B, b = normal(data_size, low, seed=seed + 2), normal(data_size, seed=seed + 3)
        return cls(A, a, 0.75, B, b, 0.5)

    def sample(self, num_data: int, seed: int = 0) -> Tensor:
        (low, top), D = self.A.shape, len(self.B)
        z2, e1, e0 = (normal(num_data, n, seed=seed + i) for i, n in enumerate((top, low, D)))
        z1 = z2 @ self.A.T + self.a + self.s * e1
        return z1 @ self.B.T + self.b + self.t * e0

    @property
    def prior_covariance(self) -> Tensor:
        """Of z1, z2 integrated out."""
        return self.A @ self.A.T + self.s**2 * identity(len(self.a))

    def log_prob(self, x: Tensor) -> Tensor:
        noise = self.t**2 * identity(len(self.b))
        C = self.B @ self.prior_covariance @ self.B.T + noise
        return gaussian_log_prob(x, self.B @ self.a + self.b, C)

    def posterior_z1(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, d1) and covariance (d1, d1) of p(z1 | x)."""
        prior_precision = torch.linalg.inv(self.prior_covariance)
        S = torch.linalg.inv(prior_precision + self.B.T @ self.B / self.t**2)
        return ((x - self.b) @ self.B / self.t**2 + prior_precision @ self.a) @ S, S

    def posterior_z2(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, d2) and covariance (d2, d2) of p(z2 | x), z1 integrated out."""
        W, m = self.B @ self.A, self.B @ self.a + self.b
        noise = self.s**2 * self.B @ self.B.T + self.t**2 * identity(len(self.b))
        P = torch.linalg.inv(noise)
        S = torch.linalg.inv(identity(self.A.shape[1]) + W.T @ P @ W)
        return (x - m) @ P @ W @ S, S

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", standard_normal(self.A.shape[1]))
            z1 = pyro.sample("z1", Normal(z2 @ self.A.T + self.a, self.s).to_event(1))
            pyro.sample("x", Normal(z1 @ self.B.T + self.b, self.t).to_event(1), obs=x)

    def guide(self, x: Tensor, spread: float = 1.0) -> None:
        """q(z1 | x) q(z2 | z1), exact at spread 1: z2 knows of x by way of z1 only."""
        mean, S1 = self.posterior_z1(x)
        S2 = torch.linalg.inv(identity(self.A.shape[1]) + self.A.T @ self.A / self.s**2)
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", MultivariateNormal(mean, spread * S1))
            pyro.sample("z2", MultivariateNormal((z1 - self.a) @ self.A @ S2 / self.s**2, S2))

    def pair(self, spread: float = 1.0) -> PyroPair:
        return PyroPair(self.model, partial(self.guide, spread=spread))

    def declared(self) -> LatentModel:
        (low, top), D = self.A.shape, len(self.B)
        model = LatentModel(
            z2=Latent(Normal, top),
            z1=Latent(Normal, low, given="z2", net=Linear(), scale=self.s),
            x=Observed(Normal, D, given="z1", net=Linear(), scale=self.t),
        )
        return with_parameters(model, z1=(self.A, self.a), x=(self.B, self.b))
