"""Bounds and diagnostics: pure functions of log-weights (K, N), in nats.

    elbo <= L_5 <= L_50 <= ... <= log p(x) <= cubo          each in expectation
    log_weights (K, N)  -->  one number per datum, (N,)

L_K is the average over the disjoint blocks of K rows, so that one matrix of weights serves a whole
grid of K. Sources: Burda, Grosse & Salakhutdinov 2016 (IWAE, eq. 8); Li & Turner 2016 (Rényi,
eq. 4); Dieng et al. 2017 (CUBO, eq. 5); Vehtari, Simpson, Gelman, Yao & Gabry 2024 (PSIS).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "cubo",
    "effective_sample_size",
    "elbo",
    "iwae",
    "iwae_standard_error",
    "khat_threshold",
    "pareto_khat",
    "psis",
    "renyi",
    "tvo",
]

ZERO = float(np.finfo(np.float32).min) / 4  # the log-weight that stands for -inf
FEWEST_DRAWS = 30  # with fewer, the tail has five draws or less, and ArviZ's fit fails


def _check(log_weights: Tensor) -> Tensor:
    if log_weights.dim() != 2 or log_weights.shape[0] == 0:
        raise ValueError(
            "Log-weights must have shape (K, N), particles first, with K >= 1; got "
            f"{tuple(log_weights.shape)}."
        )
    return log_weights


def _blocks(log_weights: Tensor, num_particles: int | None) -> Tensor:
    """(K, N) -> (blocks, num_particles, N); rows left over are not used."""
    most = _check(log_weights).shape[0]
    size = most if num_particles is None else num_particles
    if not 1 <= size <= most:
        raise ValueError(f"`num_particles` must lie in 1..{most}, the particles drawn; got {size}.")
    whole = most // size
    return log_weights[: whole * size].reshape(whole, size, -1)


def elbo(log_weights: Tensor) -> Tensor:
    """The evidence lower bound, E_q[log w]: the mean over K particles.

    Args:
        log_weights: (K, N), nats.

    Returns:
        (N,), nats; below log p(x) in expectation.
    """
    return _check(log_weights).mean(0)


def iwae(log_weights: Tensor, num_particles: int | None = None) -> Tensor:
    """L_k = E[log (1/k) sum_i w_i] (Burda et al. 2016, eq. 8), averaged over blocks of k rows.

    Args:
        log_weights: (K, N), nats.
        num_particles: k; all K where left out. Rows beyond the last whole block are not used.

    Returns:
        (N,), nats; below log p(x) in expectation, by less as k grows.

    Raises:
        ValueError: if k is not in 1..K.
    """
    blocks = _blocks(log_weights, num_particles)
    if blocks.shape[1] == 1:
        return blocks.mean((0, 1))
    return (blocks.logsumexp(1) - math.log(blocks.shape[1])).mean(0)


def iwae_standard_error(
    log_weights: Tensor, num_particles: int | None = None, replicates: int | None = None
) -> Tensor:
    """Standard error of `iwae` over draws: of its blocks' mean or, for one block, by delta method.

    For one block it is the standard error of log p(x) as importance sampling estimates it,
    sd(w) / (sqrt(K) mean(w)).

    Args:
        log_weights: (K, N), nats.
        num_particles: k; all K where left out.
        replicates: R, where rows are independent only from one to another of R equal parts of
            them; k is then at most K / R, or K.

    Returns:
        (N,), nats; NaN for a single particle.
    """
    if replicates is not None:
        parts = log_weights.reshape(replicates, -1, log_weights.shape[1])
        each = parts.shape[1] if num_particles in (None, len(log_weights)) else num_particles
        found = torch.stack([iwae(part, each) for part in parts])
        if each == num_particles:  # of the mean of their bounds, else of the log of their mean
            return _std(found) / math.sqrt(replicates)
        return iwae_standard_error(found)
    blocks = _blocks(log_weights, num_particles)
    if len(blocks) > 1:
        values = blocks[:, 0] if blocks.shape[1] == 1 else blocks.logsumexp(1)
        return _std(values) / math.sqrt(len(blocks))
    relative = (blocks[0] - blocks[0].logsumexp(0) + math.log(blocks.shape[1])).exp()
    return (
        _std(relative) / math.sqrt(blocks.shape[1]) if len(relative) > 1 else relative[0] * math.nan
    )


def _std(values: Tensor) -> Tensor:
    """Over rows; on a CPU several times faster than torch's own along this dimension."""
    return ((values - values.mean(0)).square().sum(0) / (len(values) - 1)).sqrt()


def renyi(log_weights: Tensor, alpha: float, num_particles: int | None = None) -> Tensor:
    """L_alpha = 1/(1 - alpha) log (1/k) sum_i w_i^(1 - alpha) (Li & Turner 2016, eq. 4).

    Args:
        log_weights: (K, N), nats.
        alpha: order; 0 is IWAE, 1 the ELBO, -inf the largest weight (VR-max).
        num_particles: k, as in `iwae`.

    Returns:
        (N,), nats; decreasing in alpha. With few particles it is biased downward for alpha < 1.
    """
    blocks = _blocks(log_weights, num_particles)
    if alpha == 1:
        return blocks.mean((0, 1))
    if alpha == -math.inf:
        return blocks.amax(1).mean(0)
    power = 1 - alpha
    a = power * blocks.double()  # near alpha = 1 the division magnifies rounding
    found = (a.logsumexp(1) - math.log(blocks.shape[1])).mean(0) / power
    return found.to(log_weights.dtype)


def cubo(log_weights: Tensor, order: float = 2.0) -> Tensor:
    """CUBO_n = 1/n log E_q[w^n] (Dieng et al. 2017, eq. 5), an upper bound of log p(x).

    Args:
        log_weights: (K, N), nats.
        order: n > 1.

    Returns:
        (N,), nats. Above log p(x) where K is large; the estimate's own bias is downward, so with
        few particles, or weights of heavy tail, it need not lie above.

    Raises:
        ValueError: if n <= 1, where it is no upper bound.
    """
    if order <= 1:
        raise ValueError(f"`order` must be above 1 for an upper bound, got {order}.")
    return renyi(log_weights, 1 - order)


def log_uniform_betas(intervals: int = 20, first: float = 0.025) -> tuple[float, ...]:
    """0, and points from `first` on a logarithmic scale up to, and without, 1."""
    ratio = first ** (-1 / (intervals - 1))
    return (0.0, *(first * ratio**i for i in range(intervals - 1)))


def check_betas(betas: Sequence[float]) -> None:
    """Raise unless these begin intervals of [0, 1]."""
    rising = all(low < high for low, high in itertools.pairwise([*betas, 1.0]))
    if not betas or betas[0] != 0 or not rising:
        raise ValueError(f"`betas` must rise from 0, and lie below 1; got {tuple(betas)}.")


def tvo(
    log_weights: Tensor, betas: Sequence[float] | Tensor | None = None, upper: bool = False
) -> Tensor:
    """Riemann sum of E_{pi_beta}[log w] over beta in [0, 1] (Masrani et al. 2019, eqs. 6, 7).

    Each expectation is by self-normalised importance sampling, with weights w^beta.

    Args:
        log_weights: (K, N), nats.
        betas: where the intervals begin, rising from 0, below 1; `log_uniform_betas()` left out. A
            tensor has the end of the last, 1, as well, and is taken as it is.
        upper: the right sum, an upper bound, instead of the left one.

    Returns:
        (N,), nats. For many particles the left sum is below log p(x), the right sum above; with
        few, importance sampling errs by 1/K, and neither need hold.

    Raises:
        ValueError: for other betas.
    """
    _check(log_weights)
    if isinstance(betas, Tensor):
        grid = betas.to(log_weights)
    else:
        betas = log_uniform_betas() if betas is None else betas
        check_betas(betas)
        grid = log_weights.new_tensor([*betas, 1.0])
    at = (grid[1:] if upper else grid[:-1]).reshape(-1, 1, 1)
    s = torch.where(at > 0, at * log_weights, 0.0).softmax(1)
    means = torch.where(s > 0, s * log_weights, 0.0).sum(1)
    return (grid.diff().reshape(-1, 1) * means).sum(0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 (Kong 1992), in 1..K particles.

    Args:
        log_weights: (K, N), nats.

    Returns:
        (N,), number of equally weighted particles as good as these.
    """
    total = _check(log_weights).logsumexp(0)
    return (2 * total - (2 * log_weights).logsumexp(0)).exp()


def khat_threshold(num_particles: int) -> float:
    """Above this k-hat the estimate is not to be believed: min(1 - 1/log10(K), 0.7).

    Vehtari et al. 2024, section 3.2.4.
    """
    return min(1 - 1 / math.log10(num_particles), 0.7) if num_particles > 1 else -math.inf


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Shape of the generalised Pareto tail of the weights, per datum, by ArviZ's PSIS.

    Args:
        log_weights: (K, N), nats.

    Returns:
        (N,). Weights have finite variance below 0.5; see `khat_threshold`. Zero where the largest
        weights are all the same, so that there is no tail to fit (an exact guide). Infinite where
        too few weights are above zero to fit one. NaN with fewer than 30 particles, where every
        weight is zero, or where ties leave no tail.
    """
    return psis(log_weights)[1]


def psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x) estimated with the tail of the weights smoothed, and their k-hat, by ArviZ.

    The largest 3 sqrt(K) weights are replaced by quantiles of the generalised Pareto distribution
    fitted to them (Vehtari et al. 2024, section 3.1). Often less noisy than L_K where the tail is
    heavy and k-hat below its threshold, at times noisier where few draws have weight; and no bound:
    smoothing has a bias of its own, mostly downward.

    Args:
        log_weights: (K, N), nats.

    Returns:
        The estimate (N,), nats, L_K where there is no tail to smooth; and k-hat (N,), see
        `pareto_khat`.
    """
    from arviz_stats.base import array_stats

    estimate = iwae(log_weights).double().cpu()
    values = log_weights.detach().cpu().T.contiguous().numpy()
    khat = np.full(len(values), math.nan)
    num_draws = values.shape[1]
    if num_draws < FEWEST_DRAWS:
        return estimate, torch.as_tensor(khat)
    some = np.isfinite(values).any(1)
    # Weights of zero say nothing about the upper tail, but ArviZ needs finite numbers.
    whole = np.maximum(values, ZERO)
    largest, r_eff = _top(whole)
    spread, beyond = _spread(largest, num_draws, torch.finfo(log_weights.dtype).eps)
    khat[(spread <= 0) & some] = 0.0
    khat[beyond & some] = math.inf
    fits = (spread > 0) & some & ~beyond
    if fits.any():
        with np.errstate(over="ignore"):  # of a k-hat in the hundreds; the largest weight stays
            smoothed, khat[fits] = array_stats.psislw(-largest[fits], axis=1, r_eff=r_eff)
        found = torch.as_tensor(_log_mean(whole[fits], largest[fits], smoothed))
        usual = estimate[torch.as_tensor(fits)]
        estimate[torch.as_tensor(fits)] = torch.where(found.isnan(), usual, found)
    return estimate, torch.as_tensor(khat)


def _spread(largest: Any, num_draws: int, eps: float) -> tuple[Any, Any]:
    """Of each row's tail, its width, zero if that is rounding; and whether it is beyond a fit.

    Below the range of a float ArviZ's fit fails without a word, and leaves its prior, which looks
    good: k-hat 0.05 for 1,000 particles of which one has all the weight.
    """
    size = _tail_size(num_draws)
    tail = np.partition(largest, largest.shape[1] - size)[:, -size:]
    spread = tail.max(1) - tail.min(1)
    rounding = 64 * eps * np.maximum(1, np.abs(tail).max(1))
    quartile = np.partition(tail, size // 4)[:, size // 4]
    return np.where(spread > rounding, spread, 0.0), tail.max(1) - quartile > 600


def _tail_size(num_draws: int) -> int:
    """How many weights ArviZ takes for the tail."""
    return math.floor(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def _log_mean(values: Any, largest: Any, smoothed: Any) -> Any:
    """log of the mean weight, with the largest as smoothed: ArviZ gives these normalised.

    The largest that is not smoothed tells what they were normalised by. NaN where that is zero.
    """
    at = largest.argsort(1)[:, -_tail_size(values.shape[1]) - 1, None]
    known = np.take_along_axis(largest, at, 1)
    total = np.where(known > ZERO / 2, known - np.take_along_axis(smoothed, at, 1), math.nan)
    rest = values.shape[1] - largest.shape[1]
    if rest:
        small = np.partition(values, rest)[:, :rest].astype(np.float64)
        total = np.logaddexp(total, torch.as_tensor(small).logsumexp(1, keepdim=True).numpy())
    return total[:, 0] - math.log(values.shape[1])


def _top(values: Any) -> tuple[Any, float]:
    """The largest of each row, (N, K) -> (N, k), and the r_eff that has ArviZ take the same tail.

    It takes the largest 3 sqrt(K) of K > 225 draws, but a fifth of 225 / r_eff or fewer.
    """
    num_draws = values.shape[1]
    top = 5 * math.floor(3 * math.sqrt(num_draws))
    if not 225 < top < num_draws:
        return values.astype(np.float64), 1.0
    largest = np.partition(values, num_draws - top)[:, -top:]
    return largest.astype(np.float64), 225 / top
