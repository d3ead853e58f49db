"""Mixture of factor analysers by expectation maximisation (EM): clusters with factors of their own.

    data (N, *event)  --fit_mixture_of_factor_analysers-->  MixtureOfFactorAnalysers
        --log_prob-->  (N,), nats, exact;  --responsibilities-->  (N, C);  --posterior-->  (N, C, Q)

p(x) = Σ_c π_c N(x; μ_c, W_c W_cᵀ + diag ψ): between a mixture of diagonal Gaussians (Q = 0) and one
of full Gaussians, whose covariances it approximates by C D (Q + 1) numbers. Source: Ghahramani &
Hinton 1996, "The EM algorithm for mixtures of factor analyzers", technical report CRG-TR-96-1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.baselines.em import (
    EMPTY,
    ascend,
    check_counts,
    check_regularisation,
    k_means,
    nearest,
    posterior,
)
from pvae.baselines.linear_gaussian import Factors, check_latent_size, scatter
from pvae.baselines.rows import as_rows, blocks, mean, on_device

if TYPE_CHECKING:
    from pvae.declare import LatentModel

__all__ = ["MixtureOfFactorAnalysers", "fit_mixture_of_factor_analysers"]


@dataclass(frozen=True, eq=False)
class MixtureOfFactorAnalysers:
    """p(x) = Σ_c π_c N(x; μ_c, W_c W_cᵀ + diag ψ): C components of Q factors over D elements.

    Entry i of `log_likelihood` is before update i, so the last is one update behind the parameters.
    """

    weights: Tensor  # (C,)
    W: Tensor  # (C, D, Q), each determined up to a rotation of z
    means: Tensor  # (C, D)
    psi: Tensor  # (D,), the variance of each element's noise, in all components
    log_likelihood: Tensor  # (iterations,), mean over the training data, nats per datum
    converged: bool

    def log_prob(self, x: Any) -> Tensor:
        """log p(x) of data (N, *event): (N,), in nats, exact.

        Raises ValueError if x does not fit or is not finite.
        """
        log_joint = _log_joint(self)
        return self._map(lambda block: log_joint(block).logsumexp(dim=1), x)

    def responsibilities(self, x: Any) -> Tensor:
        """p(c | x) of data (N, *event): (N, C), rows summing to one.

        Raises ValueError if x does not fit or is not finite.
        """
        log_joint = _log_joint(self)
        return self._map(lambda block: log_joint(block).softmax(dim=1), x)

    def posterior(self, x: Any) -> tuple[Tensor, Tensor]:
        """p(z | x, c) of (N, *event) for each c: its mean (N, C, Q), and covariance (C, Q, Q).

        Raises ValueError if x does not fit or is not finite.
        """
        parts = list(_components(self))
        z = self._map(lambda x: torch.stack([f.codes(x - m) for m, f in parts], dim=1), x)
        return z, torch.stack([f.covariance for _, f in parts]).to(z)

    def sample(self, num: int) -> Tensor:
        """Draw (num, D) from p(x) with torch's global generator."""
        component = torch.multinomial(self.weights, num, replacement=True)
        C, D, Q = self.W.shape
        z, noise = self.W.new_empty(num, Q).normal_(), self.W.new_empty(num, D).normal_()
        x = self.means[component] + self.psi.sqrt() * noise
        for c in range(C):
            x[component == c] += z[component == c] @ self.W[c].T
        return x

    def to_model(self) -> "LatentModel":
        """The same as the declared `pvae.models.mixture_of_factor_analysers`, to evaluate it.

        Empty components get the smallest positive weight there is, in place of zero.
        """
        from pvae.models import mixture_of_factor_analysers

        C, D, Q = self.W.shape
        model = mixture_of_factor_analysers(D, Q, C).to(self.W.device, self.W.dtype)
        weights = self.weights.clamp(min=torch.finfo(self.weights.dtype).tiny)
        model.module_of("c").assign("logits", weights.log())
        x = model.module_of("x")
        x.assign("loc", self.means)
        x.assign("cov_factor", self.W)
        x.assign("cov_diag", self.psi)
        return model

    def _map(self, function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
        """`function` of blocks (B, D): in the mixture's type, on the device of x."""
        rows = as_rows(x, size=self.means.shape[1])
        zero = torch.zeros_like(self.psi, dtype=torch.float64)
        parts = [function(block) for block in blocks(rows.to(zero.device), zero, self._columns)]
        return torch.cat(parts).to(rows.device, self.W.dtype)

    @property
    def _columns(self) -> int:
        C, D, Q = self.W.shape
        return C * (1 + Q) + D


def fit_mixture_of_factor_analysers(
    data: Any,
    latent_size: int,
    num_components: int,
    *,
    start: MixtureOfFactorAnalysers | None = None,
    num_starts: int = 1,
    max_iter: int = 200,
    tol: float = 1e-3,
    regularisation: float = 1e-6,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> MixtureOfFactorAnalysers:
    """Fit a mixture of factor analysers by EM (Ghahramani & Hinton 1996, section 3).

    Takes a `pvae.data.Data`, tensor or array (N, *event). Each of `num_starts` starts is k-means
    and PPCA of each cluster, and the best fit is returned; `start`, a mixture, is updated as it is.
    EM ends when the mean log-likelihood changes by less than `tol` nats, or after `max_iter`
    updates. `regularisation` is added to ψ; while it is small beside ψ, the log-likelihood never
    falls.

    A component that no datum is given to keeps its mean and factors; its weight is zero from then
    on. The result has the data's floating type and lies on `device`: "auto" is CUDA where there is
    one. The caller's random state is not touched.

    Raises ValueError for arguments out of range or that contradict each other, for data that is not
    finite or fewer than components, and where ψ would be zero.
    """
    x = as_rows(data)
    check_counts(len(x), "factor analysers", num_components, num_starts, max_iter)
    check_latent_size("A mixture of factor analysers", latent_size, *x.shape)
    check_regularisation(regularisation)
    if start is not None:
        _check_start(start, (num_components, x.shape[1], latent_size), num_starts)
    x = on_device(x, device)
    centre = mean(x)
    generator = torch.Generator().manual_seed(seed)

    def run() -> MixtureOfFactorAnalysers:
        if start is not None:
            first = _centred(start, centre)
        else:
            seeds = k_means(x, centre, num_components, generator)
            first = _from_means(x, centre, seeds, latent_size, regularisation)
        fitted, log_likelihood, converged = ascend(
            first,
            lambda mixture: _update(x, centre, mixture, regularisation),
            len(x),
            max_iter,
            tol,
        )
        return replace(fitted, log_likelihood=log_likelihood, converged=converged)

    best = max((run() for _ in range(num_starts)), key=lambda fit: fit.log_likelihood[-1].item())
    return replace(
        best,
        weights=best.weights.to(x.dtype),
        W=best.W.to(x.dtype),
        means=(best.means + centre).to(x.dtype),
        psi=best.psi.to(x.dtype),
    )


def _components(mixture: MixtureOfFactorAnalysers) -> Iterator[tuple[Tensor, Factors]]:
    """μ_c and N(0, W_c W_cᵀ + diag ψ) of each component, in float64."""
    for m, W in zip(mixture.means.double(), mixture.W, strict=True):
        yield m, Factors.of(W, mixture.psi)


def _log_joint(mixture: MixtureOfFactorAnalysers) -> Callable[[Tensor], Tensor]:
    """log π_c + log N(x_n; μ_c, W_c W_cᵀ + diag ψ), (B, C), as a function of a block (B, D)."""
    parts, log_weights = list(_components(mixture)), mixture.weights.double().log()
    return lambda x: log_weights + torch.stack([f.log_prob(x - m) for m, f in parts], dim=1)


def _update(
    x: Tensor, centre: Tensor, mixture: MixtureOfFactorAnalysers, regularisation: float
) -> tuple[MixtureOfFactorAnalysers, float]:
    """One E and one M step, and log p(x) before, summed over data.

    In the letters of Ghahramani & Hinton, with d = x - μ_c before the update and z̃ = [z, 1]: the
    new [W_c, change of μ_c] is (Σ r d E[z̃]ᵀ) (Σ r E[z̃ z̃ᵀ])⁻¹, and ψ is what it leaves of Σ r d².
    """
    C, D, Q = mixture.W.shape
    assign, parts = posterior(_log_joint(mixture)), list(_components(mixture))
    N, log_likelihood = mixture.weights.new_zeros(C), 0.0
    dz, zz = mixture.W.new_zeros(C, D, Q + 1), mixture.W.new_zeros(C, Q + 1, Q + 1)
    dd = mixture.W.new_zeros(D)
    for block in blocks(x, centre, mixture._columns):
        log_p, r = assign(block)
        log_likelihood += log_p.sum().item()
        N.add_(r.sum(dim=0))
        for c, (m, factors) in enumerate(parts):
            d, r_c = block - m, r[:, c, None]
            z = torch.cat([factors.codes(d), torch.ones_like(r_c)], dim=1)
            dd.add_((r_c * d.square()).sum(dim=0))
            dz[c].addmm_(d.T, r_c * z)
            zz[c].addmm_(z.T, r_c * z)
    for c, (_, factors) in enumerate(parts):
        zz[c, :Q, :Q].add_(factors.covariance, alpha=N[c].item())
    return _maximise(mixture, N, dd, dz, zz, regularisation), log_likelihood


def _maximise(
    previous: MixtureOfFactorAnalysers,
    N: Tensor,
    dd: Tensor,
    dz: Tensor,
    zz: Tensor,
    regularisation: float,
) -> MixtureOfFactorAnalysers:
    """The M step from Σ r (C,), Σ r d² (D,), Σ r d E[z̃]ᵀ and Σ r E[z̃ z̃ᵀ], the last two by c."""
    filled = ~(N <= EMPTY)  # NaN is not hidden as emptiness
    W, means = previous.W.clone(), previous.means.clone()
    new = torch.linalg.solve(zz[filled], dz[filled], left=False)  # [W_c, change of μ_c]
    W[filled], means[filled] = new[..., :-1], means[filled] + new[..., -1]
    explained = (new * dz[filled]).sum(dim=(0, 2))
    psi = (dd - explained) / N.sum() + regularisation
    return replace(previous, weights=N / N.sum(), W=W, means=means, psi=_positive(psi))


def _from_means(
    x: Tensor, centre: Tensor, means: Tensor, latent_size: int, regularisation: float
) -> MixtureOfFactorAnalysers:
    """Each datum at its nearest mean, then PPCA of each cluster (Tipping & Bishop 1999, eq. 7).

    A cluster's covariance is averaged with the one of all clusters, as if that had been seen
    `latent_size` times, so that each has as many factors as asked for.
    """
    C, D = means.shape
    assign = nearest(means)
    labels = torch.cat([assign(block)[1].argmax(dim=1) for block in blocks(x, centre, C)])
    N = labels.bincount(minlength=C).to(means)
    within = means.new_zeros(D, D)
    for c in labels.unique():
        within.add_(scatter(x[labels == c], centre + means[c]), alpha=float(N[c]) / len(x))
    W, psi = means.new_empty(C, D, latent_size), means.new_zeros(D)
    for c in range(C):
        S = latent_size * within
        if N[c] > 0:
            S = S + N[c] * scatter(x[labels == c], centre + means[c])
        S /= latent_size + N[c]
        eigenvalues, U = torch.linalg.eigh(S)
        noise = eigenvalues[: D - latent_size].mean().clamp(min=0)
        W[c] = (
            U[:, D - latent_size :] * (eigenvalues[D - latent_size :] - noise).clamp(min=0).sqrt()
        )
        psi += N[c] / len(x) * (S - W[c] @ W[c].T).diagonal()
    empty = means.new_empty(0)
    psi = _positive(psi.clamp(min=0) + regularisation)
    return MixtureOfFactorAnalysers(N / len(x), W, means, psi, empty, converged=False)


def _centred(mixture: MixtureOfFactorAnalysers, centre: Tensor) -> MixtureOfFactorAnalysers:
    """`mixture` in the coordinates x - centre, in float64."""
    return replace(
        mixture,
        weights=mixture.weights.to(centre),
        W=mixture.W.to(centre),
        means=mixture.means.to(centre) - centre,
        psi=mixture.psi.to(centre),
    )


def _positive(psi: Tensor) -> Tensor:
    if not (psi > 0).all():
        raise ValueError(
            "Each element needs a noise of its own, and the variance of one is not above 0: within "
            "the components it does not vary, or is an exact function of others. Raise "
            "`regularisation`, ask for fewer factors, or add noise to the data (dequantise grey "
            "levels)."
        )
    return psi


def _check_start(
    start: MixtureOfFactorAnalysers, expected: tuple[int, int, int], num_starts: int
) -> None:
    if num_starts > 1:
        raise ValueError("EM can begin from one place only: give `start`, or `num_starts` above 1.")
    if tuple(start.W.shape) != expected:
        raise ValueError(
            f"`start` must have W of shape (C, D, Q) = {expected}, got {tuple(start.W.shape)}."
        )
