"""Probabilistic principal component analysis (PPCA), in closed form.

    data (N, *event)  --fit_ppca-->  ProbabilisticPCA  --log_prob-->  (N,), nats, exact
                                                       --posterior-->  (N, Q), (Q, Q)

z ~ N(0, I), x | z ~ N(W z + μ, σ² I). Source: Tipping & Bishop 1999, "Probabilistic principal
component analysis", Journal of the Royal Statistical Society B 61(3).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.baselines.rows import as_rows, blocks, mean

if TYPE_CHECKING:
    from pvae.declare import LatentModel
    from pvae.sites import SiteModule

__all__ = ["ProbabilisticPCA", "fit_ppca"]


@dataclass(frozen=True, eq=False)
class ProbabilisticPCA:
    """p(x) = N(μ, W Wᵀ + σ² I): Q latent numbers behind data of D elements."""

    W: Tensor  # (D, Q), determined up to a rotation of z
    mu: Tensor  # (D,)
    sigma2: Tensor  # (), the variance of the noise

    def log_prob(self, x: Any) -> Tensor:
        """log p(x) of data (N, *event): (N,), in nats, exact.

        Through M = Wᵀ W + σ² I, (Q, Q): the covariance, (D, D), is never made.
        Raises ValueError if x does not fit or is not finite.
        """
        rows, (D, Q) = as_rows(x, size=len(self.mu)), self.W.shape
        W, sigma2, L = self.W.double(), self.sigma2.double(), self._cholesky_of_M()
        log_determinant = (D - Q) * sigma2.log() + 2 * L.diagonal().log().sum()
        parts = []
        for d in blocks(rows.to(W.device), self.mu.double()):
            explained = torch.linalg.solve_triangular(L, (d @ W).T, upper=False).square().sum(dim=0)
            parts.append((d.square().sum(dim=1) - explained) / sigma2)
        log_p = -(torch.cat(parts) + log_determinant + D * math.log(2 * math.pi)) / 2
        return log_p.to(rows.device, self.W.dtype)

    def posterior(self, x: Any) -> tuple[Tensor, Tensor]:
        """p(z | x) of (N, *event): its mean M⁻¹ Wᵀ (x - μ), (N, Q), and covariance σ² M⁻¹, (Q, Q).

        Raises ValueError if x does not fit or is not finite.
        """
        rows = as_rows(x, size=len(self.mu))
        inverse = torch.cholesky_inverse(self._cholesky_of_M())
        to_mean = self.W.double() @ inverse
        parts = blocks(rows.to(self.W.device), self.mu.double())
        z = torch.cat([d @ to_mean for d in parts])
        covariance = self.sigma2.double() * inverse
        return z.to(rows.device, self.W.dtype), covariance.to(rows.device, self.W.dtype)

    def sample(self, num: int) -> Tensor:
        """Draw (num, D) from p(x) with torch's global generator."""
        D, Q = self.W.shape
        z, noise = self.W.new_empty(num, Q).normal_(), self.W.new_empty(num, D).normal_()
        return z @ self.W.T + self.mu + self.sigma2.sqrt() * noise

    def to_model(self) -> "LatentModel":
        """The same model as the declared `pvae.models.ppca`, its guide at the exact posterior.

        The posterior's covariance is diagonal, as the guide's is, because the columns of W are
        orthogonal (R = I).
        """
        from pvae.models import ppca

        model = ppca(*self.W.shape).to(self.W.device, self.W.dtype)
        covariance = self.posterior(self.mu[None])[1]
        to_mean = (covariance / self.sigma2) @ self.W.T
        _set_affine(model.module_of("x"), self.W, self.mu)
        model.module_of("x").assign("scale", self.sigma2.sqrt())
        guide = model.guide_module_of("z")
        _set_affine(guide, to_mean, -to_mean @ self.mu)
        guide.assign("scale", covariance.diagonal().sqrt())
        return model

    def _cholesky_of_M(self) -> Tensor:
        W = self.W.double()
        return torch.linalg.cholesky(W.T @ W + self.sigma2.double() * torch.eye(W.shape[1]).to(W))


def _set_affine(module: "SiteModule", weight: Tensor, bias: Tensor) -> None:
    """Make `weight` @ parent + `bias` of a module whose net is `Linear`."""
    with torch.no_grad():
        for parameter, value in zip(module.nets.parameters(), (weight, bias), strict=True):
            parameter.copy_(value)


def fit_ppca(data: Any, latent_size: int) -> ProbabilisticPCA:
    """Fit PPCA by maximum likelihood: W = U (Λ - σ² I)^½, σ² the mean of the least eigenvalues.

    U and Λ are the Q leading eigenvectors and eigenvalues of the data's covariance (divided by N),
    and σ² is the mean of the other D - Q (Tipping & Bishop 1999, eqs 7 and 8, with R = I).
    Takes a `pvae.data.Data`, tensor or array (N, *event); the result has the data's floating type
    and lies on the data's device.

    Raises ValueError unless 1 <= Q < D, for data that is not finite or has fewer than two rows, and
    for data without variance outside Q dimensions, whose likelihood has no maximum.
    """
    x = as_rows(data)
    N, D = x.shape
    if not 1 <= latent_size < D:
        raise ValueError(
            f"`latent_size` must be at least 1 and less than the {D} elements of a datum, "
            f"got {latent_size}: the noise needs a dimension of its own."
        )
    if N < 2:
        raise ValueError(f"PPCA needs at least 2 data, got {N}: one datum has no variance.")
    mu = mean(x)
    S = mu.new_zeros(D, D)
    for d in blocks(x, mu):
        S.addmm_(d.T, d, alpha=1 / N)
    eigenvalues, eigenvectors = torch.linalg.eigh(S)  # in ascending order
    sigma2 = eigenvalues[: D - latent_size].mean()
    if sigma2 <= D * torch.finfo(S.dtype).eps * eigenvalues[-1]:
        raise ValueError(
            f"The data must vary in more than `latent_size` = {latent_size} dimensions, "
            "and do not: with no noise left the likelihood has no maximum. "
            "Ask for fewer, or add noise to the data (dequantise grey levels)."
        )
    leading = eigenvalues[D - latent_size :] - sigma2
    W = (eigenvectors[:, D - latent_size :] * leading.clamp(min=0).sqrt()).flip(1)
    return ProbabilisticPCA(W=W.to(x.dtype), mu=mu.to(x.dtype), sigma2=sigma2.to(x.dtype))
