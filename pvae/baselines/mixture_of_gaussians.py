"""Mixture of Gaussians by expectation maximisation (EM), in batched tensor operations.

    data (N, *event)  --fit_em-->  GaussianMixture  --log_prob-->  (N,), nats, exact
                                                    --responsibilities-->  (N, C)

p(x) = Σ_c π_c N(x; μ_c, Σ_c). Sources: Dempster, Laird & Rubin 1977, "Maximum likelihood from
incomplete data via the EM algorithm"; Bishop 2006, "Pattern recognition and machine learning",
chapter 9.

Both steps run over blocks of rows and keep sums only, so memory does not grow with N x C. With
diagonal covariances each step is one matrix product with the rows [x, x²], in float32 if the data
are and its rounding allows (see `_update`); all else is in float64.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular, vector_norm

from pvae.baselines.em import (
    EMPTY,
    Assign,
    ascend,
    check_counts,
    check_regularisation,
    k_means,
    nearest,
    posterior,
)
from pvae.baselines.rows import as_rows, blocks, mean, on_device

if TYPE_CHECKING:
    from pvae.declare import LatentModel

__all__ = ["COVARIANCES", "GaussianMixture", "fit_em"]

COVARIANCES = ("diag", "full", "spherical", "tied")
DIAGONAL = ("diag", "spherical")
TOLERANCE = 1e-3  # nats by which rounding to float32 may put log p(c, x) wrong during a fit


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """p(x) = Σ_c π_c N(x; μ_c, Σ_c): C components over data of D elements.

    `scale_tril` holds standard deviations for "diag" (C, D) and "spherical" (C,), and lower
    Cholesky factors L, Σ = L Lᵀ, for "full" (C, D, D) and "tied" (D, D). Entry i of
    `log_likelihood` is before update i, so the last is one update behind the parameters.
    """

    weights: Tensor  # (C,)
    means: Tensor  # (C, D)
    scale_tril: Tensor  # see above
    covariance: str  # one of `COVARIANCES`
    log_likelihood: Tensor  # (iterations,), mean over the training data, nats per datum
    converged: bool

    def log_prob(self, x: Any) -> Tensor:
        """log p(x) of data (N, *event): (N,), in nats, exact (Bishop 2006, eq. 9.7).

        Raises ValueError if x does not fit or is not finite.
        """
        return self._map(lambda log_joint: log_joint.logsumexp(dim=1), x)

    def responsibilities(self, x: Any) -> Tensor:
        """p(c | x) of data (N, *event): (N, C), rows summing to one (Bishop 2006, eq. 9.23).

        Raises ValueError if x does not fit or is not finite.
        """
        return self._map(lambda log_joint: log_joint.softmax(dim=1), x)

    def sample(self, num: int) -> Tensor:
        """Draw (num, D) from p(x) with torch's global generator."""
        component = torch.multinomial(self.weights, num, replacement=True)
        noise = self.means.new_empty(num, self.means.shape[1]).normal_()
        match self.covariance:
            case "diag":
                noise *= self.scale_tril[component]
            case "spherical":
                noise *= self.scale_tril[component, None]
            case "tied":
                noise = noise @ self.scale_tril.T
            case "full":
                for c in component.unique():
                    noise[component == c] = noise[component == c] @ self.scale_tril[c].T
        return self.means[component] + noise

    def to_model(self) -> "LatentModel":
        """The same mixture as the declared `pvae.models.mixture_of_gaussians`, to evaluate it.

        Empty components get the smallest positive weight there is, in place of zero.
        """
        from pvae.models import mixture_of_gaussians

        num_components, size = self.means.shape
        model = mixture_of_gaussians(size, num_components, self.covariance)
        model.to(self.means.device, self.means.dtype)
        weights = self.weights.clamp(min=torch.finfo(self.weights.dtype).tiny)
        model.module_of("c").assign("logits", weights.log())
        x = model.module_of("x")
        x.assign("loc", self.means)
        if self.covariance in ("diag", "spherical"):
            x.assign("scale", self.scale_tril.reshape(num_components, -1))
        else:
            x.assign("scale_tril", self.scale_tril)
        return model

    def _map(self, function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
        """`function` of log p(c, x), block by block: in the mixture's type, on the device of x."""
        rows = as_rows(x, size=self.means.shape[1])
        centre = mean(self.means)
        log_joint = _log_joint(_centred(self, centre))
        squares = self.covariance in DIAGONAL
        parts = blocks(rows.to(centre.device), centre, len(self.weights), squares=squares)
        result = torch.cat([function(log_joint(block)) for block in parts])
        return result.to(rows.device, self.weights.dtype)


def fit_em(
    data: Any,
    num_components: int,
    covariance: str = "diag",
    *,
    means: Tensor | None = None,
    start: GaussianMixture | None = None,
    num_starts: int = 1,
    max_iter: int = 100,
    tol: float = 1e-3,
    regularisation: float = 1e-6,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> GaussianMixture:
    """Fit a mixture of Gaussians to `data` by EM (Bishop 2006, section 9.2.2).

    Takes a `pvae.data.Data`, tensor or array (N, *event). Each of `num_starts` starts is k-means++
    and ten k-means iterations, and the best fit is returned. Instead, `means` (C, D) puts each
    datum with the nearest mean, and `start`, a mixture, is updated as it is. EM ends when the mean
    log-likelihood changes by less than `tol` nats, or after `max_iter` updates. `regularisation` is
    added to each variance, as in scikit-learn; while it is small beside the variances, the
    log-likelihood never falls.

    A component that no datum is given to keeps its mean and covariance; its weight is zero from
    then on. The result has the data's floating type and lies on `device`: "auto" is CUDA where
    there is one. The caller's random state is not touched.

    Raises ValueError for arguments out of range or that contradict each other, for data that is not
    finite or has fewer than two rows or fewer rows than components, and for a covariance that is
    not positive definite.
    """
    x = as_rows(data)
    _check(x, num_components, covariance, num_starts, max_iter, regularisation)
    _check_start(x, num_components, covariance, num_starts, means, start)
    x = on_device(x, device)
    centre = mean(x)
    generator = torch.Generator().manual_seed(seed)

    def run() -> GaussianMixture:
        if start is not None:
            return _iterate(x, centre, _centred(start, centre), max_iter, tol, regularisation)
        if means is not None:
            seeds = torch.as_tensor(means).to(centre) - centre
        else:
            seeds = k_means(x, centre, num_components, generator)
        first = _from_means(x, centre, seeds, covariance, regularisation)
        return _iterate(x, centre, first, max_iter, tol, regularisation)

    best = max((run() for _ in range(num_starts)), key=lambda fit: fit.log_likelihood[-1].item())
    return replace(
        best,
        weights=best.weights.to(x.dtype),
        means=(best.means + centre).to(x.dtype),
        scale_tril=best.scale_tril.to(x.dtype),
    )


def _iterate(
    x: Tensor,
    centre: Tensor,
    mixture: GaussianMixture,
    max_iter: int,
    tol: float,
    regularisation: float,
) -> GaussianMixture:
    fitted, log_likelihood, converged = ascend(
        mixture,
        lambda mixture: _update(x, centre, mixture, regularisation),
        len(x),
        max_iter,
        tol,
    )
    return replace(fitted, log_likelihood=log_likelihood, converged=converged)


def _update(
    x: Tensor, centre: Tensor, mixture: GaussianMixture, regularisation: float
) -> tuple[GaussianMixture, float]:
    """One E and one M step: the updated mixture, and log p(x) before it, summed over the data.

    With a diagonal covariance both steps subtract squares, which are large where a component is
    narrow and far from the origin. Data in float32 are therefore centred among the narrow ones,
    and the steps are in float32 if `_rounding` stays below `TOLERANCE` there: after the M step its
    square, because log p(x) is flat at its maximum. The last resort is float64.
    """
    plain = torch.get_float32_matmul_precision() == "highest"  # or products round to fewer digits
    if plain and x.dtype == torch.float32 and mixture.covariance in DIAGONAL:
        origin = (centre + _narrow_centre(mixture)).to(x.dtype)
        moved = replace(mixture, means=mixture.means + (centre - origin))
        if _rounding(moved) < TOLERANCE:
            sums = _add_up(x, origin, moved, posterior(_log_joint(moved, x.dtype)))
            moved = _maximise(sums, moved, regularisation)
            if _rounding(moved) ** 2 < TOLERANCE:
                means = moved.means + (origin - centre)
                return replace(moved, means=means), sums.log_likelihood.item()
    sums = _add_up(x, centre, mixture, posterior(_log_joint(mixture)))
    return _definite(_maximise(sums, mixture, regularisation)), sums.log_likelihood.item()


def _narrow_centre(mixture: GaussianMixture) -> Tensor:
    """The mean of the means, (D,), each element weighted by its precision: least Σ ((m - o)/σ)²."""
    precision = _per_element(mixture).pow(-2)
    return (precision * mixture.means).sum(dim=0) / precision.sum(dim=0)


def _rounding(mixture: GaussianMixture) -> float:
    """What float32 loses of log p(c, x), in nats: its rounding of the largest terms added up."""
    scale = _per_element(mixture)
    terms = (mixture.means / scale).square().sum(dim=1) + scale.log().sum(dim=1).abs()
    return torch.finfo(torch.float32).eps / 2 * terms[mixture.weights != 0].max().item()


def _per_element(mixture: GaussianMixture) -> Tensor:
    """The standard deviations of a diagonal covariance, (C, D)."""
    return mixture.scale_tril.reshape(len(mixture.means), -1).expand_as(mixture.means)


class _Sums(NamedTuple):
    """Σ_n of what the M step needs, r_nc being the responsibilities (Bishop 2006, eq. 9.27)."""

    N: Tensor  # (C,), Σ r
    x: Tensor  # (C, D), Σ r x
    xx: Tensor  # Σ r x² (C, D); full: Σ r x xᵀ (C, D, D); tied: Σ x xᵀ (D, D)
    log_likelihood: Tensor  # (), nats


def _add_up(x: Tensor, centre: Tensor, mixture: GaussianMixture, assign: Assign) -> _Sums:
    """Give each datum to the components by `assign`, block by block, and keep the sums."""
    num_components, size = mixture.means.shape
    shape = {"full": (num_components, size, size), "tied": (size, size)}
    zeros = mixture.means.new_zeros
    sums = _Sums(
        N=zeros(num_components),
        x=zeros(num_components, size),
        xx=zeros(shape.get(mixture.covariance, (num_components, size))),
        log_likelihood=zeros(()),
    )
    for block in blocks(x, centre, num_components, squares=mixture.covariance in DIAGONAL):
        log_p, r = assign(block)
        sums.log_likelihood.add_(log_p.sum(dtype=torch.float64))
        sums.N.add_(r.sum(dim=0))
        rx = r.T @ block
        sums.x.add_(rx[:, :size])
        match mixture.covariance:
            case "diag" | "spherical":
                sums.xx.add_(rx[:, size:])
            case "tied":
                sums.xx.addmm_(block.T, block)
            case "full":
                for c, r_c in enumerate(r.T):
                    claimed = r_c > 0  # few: most data have one likely component
                    rows = block[claimed]
                    sums.xx[c].addmm_(rows.T * r_c[claimed], rows)
    return sums


def _maximise(sums: _Sums, previous: GaussianMixture, regularisation: float) -> GaussianMixture:
    """The M step (Bishop 2006, eqs 9.24-9.26). An empty component keeps its mean and covariance.

    Where a covariance is not positive definite, `scale_tril` is NaN.
    """
    filled = ~(sums.N <= EMPTY)  # NaN is not hidden as emptiness
    N = sums.N[filled]
    m = sums.x[filled] / N[:, None]
    means, scale_tril = previous.means.clone(), previous.scale_tril.clone()
    means[filled] = m
    match previous.covariance:
        case "diag":
            variance = sums.xx[filled] / N[:, None] - m.square()
            scale_tril[filled] = _square_root(variance + regularisation)
        case "spherical":
            variance = (sums.xx[filled] / N[:, None] - m.square()).mean(dim=1)
            scale_tril[filled] = _square_root(variance + regularisation)
        case "tied":
            scatter = sums.xx - (m.T * N) @ m
            scale_tril = _cholesky(scatter / N.sum(), regularisation)
        case "full":
            scatter = sums.xx[filled] / N[:, None, None]
            scale_tril[filled] = _cholesky(scatter - m[:, :, None] * m[:, None, :], regularisation)
    weights = sums.N / sums.N.sum()
    return replace(previous, weights=weights, means=means, scale_tril=scale_tril)


def _log_joint(
    mixture: GaussianMixture, dtype: torch.dtype = torch.float64
) -> Callable[[Tensor], Tensor]:
    """log π_c + log N(x_n; μ_c, Σ_c), (B, C), as a function of a block, [x, x²] if diagonal."""
    m, L = mixture.means, mixture.scale_tril
    constant = mixture.weights.log() - m.shape[1] / 2 * math.log(2 * math.pi)
    if mixture.covariance in DIAGONAL:  # the square multiplied out: one product with [x, x²]
        scale = _per_element(mixture)
        precision = scale.pow(-2)
        constant = constant - (m / scale).square().sum(dim=1) / 2 - scale.log().sum(dim=1)
        factors = torch.cat([m * precision, precision / -2], dim=1).to(dtype)
        return lambda block: torch.addmm(constant.to(dtype), block, factors.T)
    constant = constant - L.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    whiten = solve_triangular(L, torch.eye(m.shape[1]).to(L), upper=False).mT  # x L⁻ᵀ, a row x
    if mixture.covariance == "tied":
        return lambda x: constant - torch.cdist(x @ whiten, m @ whiten).square_() / 2
    offsets = -(m[:, None] @ whiten)

    def full(x: Tensor) -> Tensor:
        y, components = torch.empty_like(x), zip(offsets, whiten, strict=True)
        distances = [vector_norm(torch.addmm(b, x, A, out=y), dim=1) for b, A in components]
        return constant - torch.stack(distances, dim=1).square_() / 2

    return full


def _from_means(
    x: Tensor, centre: Tensor, means: Tensor, covariance: str, regularisation: float
) -> GaussianMixture:
    """One M step with each datum at its nearest mean; a mean without data gets the mean spread."""
    variance = sum(block.square().sum() for block in blocks(x, centre)) / x.numel()
    spread = math.sqrt(variance + regularisation)
    broad = _broad(means, covariance, spread)
    sums = _add_up(x, centre, broad, nearest(means))
    return _definite(_maximise(sums, broad, regularisation))


def _broad(means: Tensor, covariance: str, spread: float) -> GaussianMixture:
    """Equal weights and spheres of standard deviation `spread` about `means`."""
    num_components, size = means.shape
    identity = torch.eye(size).to(means)
    ones = {
        "diag": torch.ones_like(means),
        "full": identity.repeat(num_components, 1, 1),
        "spherical": torch.ones_like(means[:, 0]),
        "tied": identity,
    }
    return GaussianMixture(
        weights=torch.full_like(means[:, 0], 1 / num_components),
        means=means,
        scale_tril=spread * ones[covariance],
        covariance=covariance,
        log_likelihood=means.new_empty(0),
        converged=False,
    )


def _centred(mixture: GaussianMixture, centre: Tensor) -> GaussianMixture:
    """`mixture` in the coordinates x - centre, in float64."""
    return replace(
        mixture,
        weights=mixture.weights.to(centre),
        means=mixture.means.to(centre) - centre,
        scale_tril=mixture.scale_tril.to(centre),
    )


def _square_root(variance: Tensor) -> Tensor:
    """Standard deviations, NaN for variances that are not positive."""
    return variance.where(variance > 0, math.nan).sqrt()


def _cholesky(covariance: Tensor, regularisation: float) -> Tensor:
    """The Cholesky factor of `covariance` + `regularisation` I, NaN where there is none."""
    covariance.diagonal(dim1=-2, dim2=-1).add_(regularisation)
    factor, info = torch.linalg.cholesky_ex(covariance)
    return factor.where((info == 0)[..., None, None], math.nan)


def _definite(mixture: GaussianMixture) -> GaussianMixture:
    """`mixture`, refused unless each covariance is positive definite."""
    if not mixture.scale_tril.isfinite().all():
        raise ValueError(
            "Each covariance must be positive definite, got one that is not: in some direction the "
            "data of a component do not vary. Raise `regularisation`, ask for fewer components, "
            "or add noise to the data (dequantise grey levels)."
        )
    return mixture


def _check(
    x: Tensor,
    num_components: int,
    covariance: str,
    num_starts: int,
    max_iter: int,
    regularisation: float,
) -> None:
    if covariance not in COVARIANCES:
        near = difflib.get_close_matches(covariance, COVARIANCES, n=1, cutoff=0)
        raise ValueError(
            f"`covariance` must be one of {', '.join(COVARIANCES)}, got {covariance!r}. "
            f"Did you mean {near[0]!r}?"
        )
    check_counts(len(x), "Gaussians", num_components, num_starts, max_iter)
    check_regularisation(regularisation)


def _check_start(
    x: Tensor,
    num_components: int,
    covariance: str,
    num_starts: int,
    means: Tensor | None,
    start: GaussianMixture | None,
) -> None:
    if means is None and start is None:
        return
    if (means is not None and start is not None) or num_starts > 1:
        raise ValueError(
            "EM can begin from one place only: give `means`, or `start`, or `num_starts` above 1, "
            "and leave the others out."
        )
    expected = (num_components, x.shape[1])
    given = torch.as_tensor(means if start is None else start.means)
    if tuple(given.shape) != expected:
        raise ValueError(
            f"The means to begin from must have shape (C, D) = {expected}, "
            f"got {tuple(given.shape)}. Images? Flatten each mean first: `means.flatten(1)`."
        )
    if not given.isfinite().all():
        raise ValueError("The means to begin from must be finite, got NaN or infinity.")
    if start is not None and start.covariance != covariance:
        raise ValueError(
            f"`start` must have the covariance asked for, {covariance!r}, "
            f"got {start.covariance!r}. Pass that, or `means=start.means`."
        )
