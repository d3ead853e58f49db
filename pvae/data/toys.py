"""Generated data in a few dimensions with a known density, to hold a fitted log p(x) against.

    TOYS["ring"].sample(num, generator)  ->  x (num, dimensions), labels
    TOYS["ring"].log_prob(x)             ->  log p(x), (N,), exact

Densities are of the values as generated: of standardised data, ask for that of
`spec.unstandardise(x)`, and add `spec.log_jacobian` to the model's.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar, final

import numpy as np
import torch
from torch import Generator, Tensor
from torch.distributions import MultivariateNormal, Normal

from pvae.data.spec import local_generator

__all__ = ["TOYS", "LinearGaussian", "Pinwheel", "Ring", "Toy", "TwoMoons"]

NODES = 400  # of the quadrature: much closer to each other than the moons are thick


class Toy(ABC):
    """A distribution to draw from, with its log-density.

    Attributes:
        title: its name in words.
        dimensions: of x.
        exact: how `log_prob` is had, "closed form" or "quadrature" over one dimension.
    """

    title: ClassVar[str]
    dimensions: ClassVar[int]
    exact: ClassVar[str] = "closed form"

    @abstractmethod
    def sample(self, num: int, generator: Generator) -> tuple[Tensor, Tensor | None]:
        """Draw x (num, dimensions) in float64, and the labels of its parts (num,), if any."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats of x (..., dimensions), computed in float64, given in the type of x.

        Raises:
            ValueError: if x has another number of dimensions.
        """
        if x.ndim == 0 or x.shape[-1] != self.dimensions:
            raise ValueError(
                f"`x` of {type(self).__name__} must have shape (..., {self.dimensions}), got "
                f"{tuple(x.shape)}."
            )
        return self._log_prob(x.to(torch.float64)).to(x.dtype)

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor: ...


@final
@dataclass(frozen=True)
class Ring(Toy):
    """x = g(z) = z / 10 + z / |z|, z ~ N(0, I) in two dimensions (Doersch 2016, figure 2).

    The radius r = |z| / 10 + 1 has |z| from a Rayleigh distribution, and the angle is uniform, so
    p(x) = 10 |z| exp(-|z|² / 2) / (2 π r) outside the unit circle, and 0 inside.
    """

    title = "Normal draws pushed outwards to a ring, x = z/10 + z/|z|"
    dimensions = 2

    def sample(self, num: int, generator: Generator) -> tuple[Tensor, None]:
        """Draw x; a ring has no parts."""
        z = _normal((num, 2), generator)
        return z / 10 + z / z.norm(dim=-1, keepdim=True), None

    def _log_prob(self, x: Tensor) -> Tensor:
        r = x.norm(dim=-1)
        z = 10 * (r - 1)
        log_p = (10 * z).log() - z.square() / 2 - (2 * math.pi * r).log()
        return torch.where(r > 1, log_p, -math.inf)


@final
@dataclass(frozen=True)
class TwoMoons(Toy):
    """Two half circles that reach into each other, blurred: scikit-learn's `make_moons`, at random.

    c uniform on {0, 1}, t ~ U(0, π), x = m_c(t) + noise ε; m_0 = (cos t, sin t),
    m_1 = (1 - cos t, 1/2 - sin t). p(x) is an integral over t, by Gauss-Legendre quadrature.
    """

    title = "Two blurred half circles that reach into each other"
    dimensions = 2
    exact = "quadrature"
    noise: float = 0.1

    def sample(self, num: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw x, and which moon each is of."""
        label = torch.randint(2, (num,), generator=generator)
        t = math.pi * torch.rand(num, generator=generator, dtype=torch.float64)
        centre = self._moons(t)[label, torch.arange(num)]
        return centre + self.noise * _normal((num, 2), generator), label

    @staticmethod
    def _moons(t: Tensor) -> Tensor:
        upper = torch.stack([t.cos(), t.sin()], dim=-1)
        return torch.stack([upper, upper.new_tensor([1.0, 0.5]) - upper])

    def _log_prob(self, x: Tensor) -> Tensor:
        t, log_weight = (nodes.to(x.device) for nodes in _nodes_on_half_circle())
        centre, variance = self._moons(t).reshape(-1, 2), self.noise**2
        # Of N(x; m_c(t), variance I), and of 1/2 for c and dt / π for t.
        constant = log_weight.repeat(2) - math.log(2 * math.pi * variance) - math.log(2 * math.pi)
        blocks = []
        for rows in x.reshape(-1, 2).split(1024):  # so that little memory is used
            squares = torch.cdist(
                rows, centre, compute_mode="donot_use_mm_for_euclid_dist"
            ).square()
            blocks.append((constant - squares / (2 * variance)).logsumexp(-1))
        return torch.cat(blocks).reshape(x.shape[:-1])


@final
@dataclass(frozen=True)
class Pinwheel(Toy):
    """Five blades of a pinwheel, after Johnson et al. 2016.

    u ~ N(1, 0.3²) along a blade and v ~ N(0, 0.1²) across it are turned by 2πk/5 + exp(r)/4 with k
    uniform. Here r = |(u, v)|, where theirs is u: turning by an angle that depends on the radius
    alone keeps areas, so that p(x) is the mixture of five normal densities at x turned back.
    """

    title = "Five bent blades"
    dimensions = 2

    def sample(self, num: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw x, and which blade each is of."""
        label = torch.randint(5, (num,), generator=generator)
        blade = torch.tensor([1.0, 0.0]) + torch.tensor([0.3, 0.1]) * _normal((num, 2), generator)
        return _turned(blade, self._angle(blade, label)), label

    @staticmethod
    def _angle(x: Tensor, blade: Tensor) -> Tensor:
        return 2 * math.pi * blade / 5 + x.norm(dim=-1).exp() / 4

    def _log_prob(self, x: Tensor) -> Tensor:
        blades = torch.arange(5, device=x.device)
        each = x[..., None, :].expand(*x.shape[:-1], 5, 2)
        back = _turned(each, -self._angle(each, blades))
        normal = Normal(x.new_tensor([1.0, 0.0]), x.new_tensor([0.3, 0.1]))
        return normal.log_prob(back).sum(-1).logsumexp(-1) - math.log(5)


@final
@dataclass(frozen=True)
class LinearGaussian(Toy):
    """x = W z + b + noise ε, z ~ N(0, I): two factors in five dimensions, N(b, W Wᵀ + noise² I).

    What a model with a linear decoder can reach exactly; see `pvae.exact`.
    """

    title = "Two normal factors seen through a matrix, with noise"
    dimensions = 5
    noise: float = 0.5

    @cached_property
    def W(self) -> Tensor:
        """(5, 2), the same for all seeds."""
        return _normal((5, 2), local_generator(0, "linear-gaussian"))

    @cached_property
    def b(self) -> Tensor:
        """(5,)."""
        return torch.arange(5.0, dtype=torch.float64) - 2

    def sample(self, num: int, generator: Generator) -> tuple[Tensor, None]:
        """Draw x."""
        z, noise = _normal((num, 2), generator), _normal((num, 5), generator)
        return z @ self.W.mT + self.b + self.noise * noise, None

    def _log_prob(self, x: Tensor) -> Tensor:
        covariance = self.W @ self.W.mT + self.noise**2 * torch.eye(5, dtype=torch.float64)
        return MultivariateNormal(self.b.to(x.device), covariance.to(x.device)).log_prob(x)


TOYS: dict[str, Toy] = {
    "ring": Ring(),
    "two-moons": TwoMoons(),
    "pinwheel": Pinwheel(),
    "linear-gaussian": LinearGaussian(),
}


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    u, v = x.unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([u * cos - v * sin, u * sin + v * cos], dim=-1)


@cache
def _nodes_on_half_circle() -> tuple[Tensor, Tensor]:
    """Nodes in (0, π), and the logarithms of their weights."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(NODES))  # of (-1, 1)
    return (nodes + 1) * math.pi / 2, (weights * math.pi / 2).log()
