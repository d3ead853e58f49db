"""Factor analysis, by maximum likelihood.

    data (N, *event)  --fit_factor_analysis-->  FactorAnalysis  --log_prob-->  (N,), nats, exact
                                                                --posterior-->  (N, Q), (Q, Q)

z ~ N(0, I), x | z ~ N(W z + μ, diag ψ): PPCA with a variance of the noise for each element, and so
without regard to the unit in which each is measured. Sources: Rubin & Thayer 1982, "EM algorithms
for ML factor analysis"; Barber 2012, "Bayesian reasoning and machine learning", section 21.2, whose
fixed point, many times faster than EM, scikit-learn's `FactorAnalysis` has.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.baselines.linear_gaussian import LinearGaussian, check_latent_size, scatter
from pvae.baselines.rows import as_rows, mean

if TYPE_CHECKING:
    from pvae.declare import LatentModel

__all__ = ["FactorAnalysis", "fit_factor_analysis"]

SINGULAR = 1e-7  # of the eigenvalues of the fitted correlations, which are 1 on average


@dataclass(frozen=True, eq=False)
class FactorAnalysis(LinearGaussian):
    """p(x) = N(μ, W Wᵀ + diag ψ): Q latent factors behind data of D elements."""

    W: Tensor  # (D, Q), the loadings, in the rotation of z in which Wᵀ Ψ⁻¹ W is diagonal
    mu: Tensor  # (D,)
    psi: Tensor  # (D,), the variance of each element's noise
    log_likelihood: Tensor  # (iterations,), mean over the training data, nats per datum
    converged: bool

    @property
    def noise(self) -> Tensor:
        """ψ, (D,)."""
        return self.psi

    def to_model(self) -> "LatentModel":
        """The same as the declared `pvae.models.factor_analysis`, its guide at the posterior."""
        from pvae.models import factor_analysis

        return self._declared(factor_analysis(*self.W.shape), self.psi.sqrt())


def fit_factor_analysis(
    data: Any, latent_size: int, *, max_iter: int = 1000, tol: float = 1e-6
) -> FactorAnalysis:
    """Fit factor analysis by maximum likelihood, with scikit-learn (Barber 2012, algorithm 21.1).

    Takes a `pvae.data.Data`, tensor or array (N, *event); the result has the data's floating type
    and lies on the data's device. It ends when the mean log-likelihood rises by less than `tol`
    nats, or after `max_iter` updates. The likelihood depends on the data's covariance alone, so
    that each update costs O(D³), however many data there are.

    Raises ValueError unless 1 <= Q < D and `max_iter` is at least 1, for data that is not finite or
    has fewer than two rows, and for elements that are constant or an exact function of others,
    whose likelihood has no maximum.
    """
    from sklearn.decomposition import FactorAnalysis as Peer
    from sklearn.exceptions import ConvergenceWarning

    x = as_rows(data)
    check_latent_size("Factor analysis", latent_size, *x.shape)
    if max_iter < 1:
        raise ValueError(f"`max_iter` must be at least 1, got {max_iter}.")
    mu = mean(x)
    S = scatter(x, mu)
    _check_variance(S)
    scale = S.diagonal().sqrt()  # factors do not depend on units; scikit-learn's rounding would
    rows = _rows_of_covariance(S / scale / scale[:, None]).cpu().numpy()
    peer = Peer(latent_size, svd_method="lapack", max_iter=max_iter, tol=tol * len(rows))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ConvergenceWarning)
        peer.fit(rows)
    W, psi = (torch.from_numpy(a).to(S) for a in (peer.components_.T, peer.noise_variance_))
    _check_definite(W @ W.T + psi.diag())
    per_datum = torch.tensor(peer.loglike_, dtype=torch.float64) / len(rows)
    return FactorAnalysis(
        W=(scale[:, None] * W).to(x.dtype),
        mu=mu.to(x.dtype),
        psi=(scale.square() * psi).to(x.dtype),
        log_likelihood=per_datum - scale.log().sum().item(),
        converged=not warned,
    )


def _rows_of_covariance(S: Tensor) -> Tensor:
    """2 D rows of mean zero and covariance S, which scikit-learn takes for the data."""
    eigenvalues, U = torch.linalg.eigh(S)
    half = (len(S) * eigenvalues.clamp(min=0)).sqrt()[:, None] * U.T
    return torch.cat([half, -half])


def _check_variance(S: Tensor) -> None:
    constant = (S.diagonal() <= torch.finfo(S.dtype).eps * S.diagonal().max()).nonzero().flatten()
    if len(constant):
        raise ValueError(
            f"Each element must vary, and {len(constant)} of {len(S)} do not, the first is element "
            f"{int(constant[0])}: with no noise left the likelihood has no maximum. Leave them "
            "out, or add noise to the data (dequantise grey levels)."
        )


def _check_definite(correlations: Tensor) -> None:
    if torch.linalg.eigvalsh(correlations).min() < SINGULAR:
        raise ValueError(
            "The likelihood has no maximum: some elements are, without any noise, functions of "
            "others. Ask for fewer factors, or add noise to the data (dequantise grey levels)."
        )
