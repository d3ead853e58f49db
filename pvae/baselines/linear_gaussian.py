"""What PPCA, factor analysis and their mixtures share: a Gaussian of few factors and own noise.

    z ~ N(0, I),  x | z ~ N(W z + μ, diag ψ)    so that    x ~ N(μ, W Wᵀ + diag ψ)

Everything goes through M = I + Wᵀ Ψ⁻¹ W, (Q, Q), so that the covariance, (D, D), is never made.
Sources: Tipping & Bishop 1999, "Probabilistic principal component analysis"; Ghahramani & Hinton
1996, "The EM algorithm for mixtures of factor analyzers".
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from pvae.baselines.rows import as_rows, blocks

if TYPE_CHECKING:
    from pvae.declare import LatentModel
    from pvae.site_module import SiteModule

__all__ = ["Factors", "LinearGaussian", "check_latent_size", "scatter"]


@dataclass(frozen=True, eq=False)
class Factors:
    """N(0, W Wᵀ + diag ψ) of rows that are centred, all in float64."""

    W: Tensor  # (D, Q)
    psi: Tensor  # (D,)
    L: Tensor  # (Q, Q), the Cholesky factor of M = I + Wᵀ Ψ⁻¹ W

    @classmethod
    def of(cls, W: Tensor, psi: Tensor) -> Self:
        """From W (D, Q) and ψ (D,), which may be in float32."""
        W, psi = W.double(), psi.double()
        M = torch.eye(W.shape[1]).to(W) + W.T @ (W / psi[:, None])
        return cls(W, psi, torch.linalg.cholesky(M))

    @property
    def covariance(self) -> Tensor:
        """Of p(z | x), (Q, Q): M⁻¹."""
        return torch.cholesky_inverse(self.L)

    def log_prob(self, d: Tensor) -> Tensor:
        """Log-density of rows (B, D): (B,), nats."""
        explained = torch.linalg.solve_triangular(self.L, self._projected(d).T, upper=False)
        distance = d.square() @ self.psi.reciprocal() - explained.square().sum(dim=0)
        log_determinant = self.psi.log().sum() + 2 * self.L.diagonal().log().sum()
        return -(distance + log_determinant + d.shape[1] * math.log(2 * math.pi)) / 2

    def codes(self, d: Tensor) -> Tensor:
        """E[z | x] of rows (B, D): M⁻¹ Wᵀ Ψ⁻¹ d, (B, Q)."""
        return self._projected(d) @ self.covariance

    def _projected(self, d: Tensor) -> Tensor:
        return d @ (self.W / self.psi[:, None])


class LinearGaussian:
    """p(x) = N(μ, W Wᵀ + diag ψ): the methods of a fitted PPCA and factor analysis."""

    W: Tensor  # (D, Q)
    mu: Tensor  # (D,)

    @property
    def noise(self) -> Tensor:
        """ψ, the variance of each element's noise, (D,)."""
        raise NotImplementedError

    def log_prob(self, x: Any) -> Tensor:
        """log p(x) of data (N, *event): (N,), in nats, exact.

        Raises ValueError if x does not fit or is not finite.
        """
        return self._map(self._factors.log_prob, x)

    def posterior(self, x: Any) -> tuple[Tensor, Tensor]:
        """p(z | x) of (N, *event): its mean M⁻¹ Wᵀ Ψ⁻¹ (x - μ), (N, Q), and covariance M⁻¹, (Q, Q).

        Raises ValueError if x does not fit or is not finite.
        """
        z = self._map(self._factors.codes, x)
        return z, self._factors.covariance.to(z)

    def sample(self, num: int) -> Tensor:
        """Draw (num, D) from p(x) with torch's global generator."""
        D, Q = self.W.shape
        z, noise = self.W.new_empty(num, Q).normal_(), self.W.new_empty(num, D).normal_()
        return z @ self.W.T + self.mu + self.noise.sqrt() * noise

    @property
    def _factors(self) -> Factors:
        return Factors.of(self.W, self.noise)

    def _map(self, function: Any, x: Any) -> Tensor:
        """`function` of centred blocks: in the model's type, on the device of x."""
        rows = as_rows(x, size=len(self.mu))
        parts = [function(d) for d in blocks(rows.to(self.W.device), self.mu.double())]
        return torch.cat(parts).to(rows.device, self.W.dtype)

    def _declared(self, model: "LatentModel", scale: Tensor) -> "LatentModel":
        """`model` with these parameters, and its guide at the exact posterior.

        The guide's covariance is diagonal, and so is the posterior's: Wᵀ Ψ⁻¹ W is, by the rotation
        of z in which the fits return W.
        """
        model.to(self.W.device, self.W.dtype)
        covariance = self._factors.covariance
        to_mean = covariance @ (self._factors.W / self._factors.psi[:, None]).T
        _set_affine(model.module_of("x"), self.W, self.mu)
        model.module_of("x").assign("scale", scale)
        guide = model.guide_module_of("z")
        _set_affine(guide, to_mean, -to_mean @ self.mu.double())
        guide.assign("scale", covariance.diagonal().sqrt())
        return model


def _set_affine(module: "SiteModule", weight: Tensor, bias: Tensor) -> None:
    """Make `weight` @ parent + `bias` of a module whose net is `Linear`."""
    with torch.no_grad():
        for parameter, value in zip(module.nets.parameters(), (weight, bias), strict=True):
            parameter.copy_(value)


def scatter(x: Tensor, mu: Tensor) -> Tensor:
    """The covariance of rows about `mu`, divided by N, (D, D), in float64."""
    S = mu.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for d in blocks(x, mu.double()):
        S.addmm_(d.T, d, alpha=1 / len(x))
    return S


def check_latent_size(whose: str, latent_size: int, num_data: int, data_size: int) -> None:
    """Raise ValueError unless Q factors and noise can be told apart in such data."""
    if not 1 <= latent_size < data_size:
        raise ValueError(
            f"`latent_size` must be at least 1 and less than the {data_size} elements of a datum, "
            f"got {latent_size}: the noise needs a dimension of its own."
        )
    if num_data < 2:
        raise ValueError(f"{whose} needs at least 2 data, got {num_data}: one has no variance.")
