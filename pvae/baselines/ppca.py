"""Probabilistic principal component analysis (PPCA), in closed form.

    data (N, *event)  --fit_ppca-->  ProbabilisticPCA  --log_prob-->  (N,), nats, exact
                                                       --posterior-->  (N, Q), (Q, Q)

z ~ N(0, I), x | z ~ N(W z + μ, σ² I). Source: Tipping & Bishop 1999, "Probabilistic principal
component analysis", Journal of the Royal Statistical Society B 61(3).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.baselines.linear_gaussian import LinearGaussian, check_latent_size, scatter
from pvae.baselines.rows import as_rows, mean

if TYPE_CHECKING:
    from pvae.declare import LatentModel

__all__ = ["ProbabilisticPCA", "fit_ppca"]


@dataclass(frozen=True, eq=False)
class ProbabilisticPCA(LinearGaussian):
    """p(x) = N(μ, W Wᵀ + σ² I): Q latent numbers behind data of D elements."""

    W: Tensor  # (D, Q), determined up to a rotation of z
    mu: Tensor  # (D,)
    sigma2: Tensor  # (), the variance of the noise

    @property
    def noise(self) -> Tensor:
        """σ² of every element, (D,)."""
        return self.sigma2.expand(len(self.mu))

    def to_model(self) -> "LatentModel":
        """The same model as the declared `pvae.models.ppca`, its guide at the exact posterior."""
        from pvae.models import ppca

        return self._declared(ppca(*self.W.shape), self.sigma2.sqrt())


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
    check_latent_size("PPCA", latent_size, N, D)
    mu = mean(x)
    S = scatter(x, mu)
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
