"""Nonlinear models of one and two latent dimensions, integrated by scipy."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from pyro.distributions import Normal
from scipy.integrate import quad
from scipy.special import i0e
from torch import Tensor, nn

from pvae import Latent, LatentModel, Observed
from tests.exact.parameters import normal


class RingMap(nn.Module):
    """g(z) = z / 10 + z / ||z||."""

    def forward(self, z: Tensor) -> Tensor:
        return z / 10 + z / z.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Ring:
    """z ~ N(0, I), x | z ~ N(g(z), sigma^2 I) in the plane (Doersch 2016, figure 2).

    g(z) = z / 10 + z / ||z|| has a jump at the origin, and the posterior is a wedge.
    """

    sigma: float = 0.125

    def sample(self, num_data: int, seed: int = 0) -> Tensor:
        z = normal(num_data, 2, seed=seed)
        return RingMap()(z) + self.sigma * normal(num_data, 2, seed=seed + 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """In polar coordinates: the angle's integral is a Bessel function, the radius is scipy's.

        p(x) = int r exp(-r^2/2) exp(-(|x|^2 + rho^2) / 2 sigma^2) I_0(|x| rho / sigma^2) dr
               / (2 pi sigma^2),  rho = 1 + r/10
        """
        values = [math.log(self._density(float(length))) for length in x.norm(dim=-1)]
        return torch.tensor(values, dtype=torch.float64)

    def _density(self, length: float) -> float:
        variance = self.sigma**2

        def integrand(r: float) -> float:
            rho = 1 + r / 10
            bessel = i0e(length * rho / variance)  # times exp(-its argument)
            return r * math.exp(-(r**2) / 2 - (length - rho) ** 2 / (2 * variance)) * bessel

        integral, _ = quad(integrand, 0, 15, epsabs=0, epsrel=1e-11, limit=500)
        return integral / (2 * math.pi * variance)

    def declared(self) -> LatentModel:
        model = LatentModel(
            z=Latent(Normal, 2),
            x=Observed(Normal, 2, given="z", net=RingMap(), scale=self.sigma),
        )
        return model.double()


class SquareMap(nn.Module):
    """g(z) = z^2."""

    def forward(self, z: Tensor) -> Tensor:
        return z.square()


@dataclass(frozen=True)
class Square:
    """z ~ N(0, 1), x | z ~ N(z^2, sigma^2): the posterior has two modes, at +-sqrt(x)."""

    sigma: float = 0.125

    def sample(self, num_data: int, seed: int = 0) -> Tensor:
        z = normal(num_data, 1, seed=seed)
        return z.square() + self.sigma * normal(num_data, 1, seed=seed + 1)

    def log_prob(self, x: Tensor) -> Tensor:
        values = [math.log(self._density(float(value))) for value in x.flatten()]
        return torch.tensor(values, dtype=torch.float64)

    def _density(self, x: float) -> float:
        def integrand(z: float) -> float:
            return math.exp(-(z**2) / 2 - (x - z**2) ** 2 / (2 * self.sigma**2))

        mode = math.sqrt(max(x, 0.0))  # the integrand is even: half of it, cut at its peak
        cuts = (0.0, mode, mode + 1.0, 15.0)
        halves = [
            quad(integrand, low, high, epsabs=0, epsrel=1e-11, limit=500)[0]
            for low, high in pairwise(cuts)
            if high > low
        ]
        return 2 * sum(halves) / (2 * math.pi * self.sigma)

    def declared(self) -> LatentModel:
        model = LatentModel(
            z=Latent(Normal, 1),
            x=Observed(Normal, 1, given="z", net=SquareMap(), scale=self.sigma),
        )
        return model.double()
