"""Mixture of Bernoullis by expectation maximisation (EM).

    bits (N, *event)  --fit_mixture_of_bernoullis-->  BernoulliMixture  --log_prob-->  (N,), nats
                                                                 --responsibilities-->  (N, C)

p(x) = Σ_c π_c Π_d p_cd^x_d (1 - p_cd)^(1 - x_d), exact. Also called latent class analysis. Source:
Bishop 2006, "Pattern recognition and machine learning", section 9.3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pvae.baselines.em import EMPTY, Assign, ascend, check_counts, k_means, nearest, posterior
from pvae.baselines.rows import as_rows, blocks, mean, on_device

if TYPE_CHECKING:
    from pvae.declare import LatentModel

__all__ = ["BernoulliMixture", "fit_mixture_of_bernoullis"]


@dataclass(frozen=True, eq=False)
class BernoulliMixture:
    """p(x) = Σ_c π_c Bernoulli(x; p_c): C components over data of D bits.

    Entry i of `log_likelihood` is before update i, so the last is one update behind the parameters.
    """

    weights: Tensor  # (C,)
    logits: Tensor  # (C, D), log p - log(1 - p), which keeps the digits of p near 1
    log_likelihood: Tensor  # (iterations,), mean over the training data, nats per datum
    converged: bool

    @property
    def probs(self) -> Tensor:
        """p_cd, the probability of a one, (C, D)."""
        return self.logits.sigmoid()

    def log_prob(self, x: Any) -> Tensor:
        """log p(x) of bits (N, *event): (N,), in nats, exact (Bishop 2006, eq. 9.47).

        Raises ValueError if x does not fit or is neither 0 nor 1.
        """
        return self._map(lambda log_joint: log_joint.logsumexp(dim=1), x)

    def responsibilities(self, x: Any) -> Tensor:
        """p(c | x) of bits (N, *event): (N, C), rows summing to one (Bishop 2006, eq. 9.56).

        Raises ValueError if x does not fit or is neither 0 nor 1.
        """
        return self._map(lambda log_joint: log_joint.softmax(dim=1), x)

    def sample(self, num: int) -> Tensor:
        """Draw (num, D) from p(x) with torch's global generator."""
        component = torch.multinomial(self.weights, num, replacement=True)
        return torch.bernoulli(self.probs[component])

    def to_model(self) -> "LatentModel":
        """The same mixture as the declared `pvae.models.mixture_of_bernoullis`, to evaluate it.

        Empty components get the smallest positive weight there is, in place of zero.
        """
        from pvae.models import mixture_of_bernoullis

        num_components, size = self.logits.shape
        model = mixture_of_bernoullis(size, num_components)
        model.to(self.weights.device, self.weights.dtype)
        weights = self.weights.clamp(min=torch.finfo(self.weights.dtype).tiny)
        model.module_of("c").assign("logits", weights.log())
        model.module_of("x").assign("logits", self.logits)
        return model

    def _map(self, function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
        """`function` of log p(c, x), block by block: in the mixture's type, on the device of x."""
        rows = _bits(x, size=self.logits.shape[1])
        mixture = replace(self, weights=self.weights.double(), logits=self.logits.double())
        log_joint, zero = _log_joint(mixture), torch.zeros_like(mixture.logits[0])
        parts = blocks(rows.to(zero.device), zero, len(self.weights))
        result = torch.cat([function(log_joint(block)) for block in parts])
        return result.to(rows.device, self.weights.dtype)


def fit_mixture_of_bernoullis(
    data: Any,
    num_components: int,
    *,
    start: BernoulliMixture | None = None,
    num_starts: int = 1,
    max_iter: int = 100,
    tol: float = 1e-3,
    prior_count: float = 0.1,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> BernoulliMixture:
    """Fit a mixture of Bernoullis to bits by EM (Bishop 2006, section 9.3.3).

    Takes a `pvae.data.Data`, tensor or array (N, *event) of zeros and ones. Each of `num_starts`
    starts is k-means++ and ten k-means iterations, and the best fit is returned; `start`, a
    mixture, is updated as it is. EM ends when the mean log-likelihood changes by less than `tol`
    nats, or after `max_iter` updates.

    `prior_count` zeros and as many ones are added to what each component sees of each bit, which is
    the maximum under a Beta(1 + count, 1 + count) prior (exercise 9.18 there). Without them, one
    new datum with a bit that a component has never seen has probability zero; while they are few
    beside the data of a component, the log-likelihood never falls.

    The result has the data's floating type and lies on `device`: "auto" is CUDA where there is one.
    The caller's random state is not touched.

    Raises ValueError for arguments out of range or that contradict each other, for data that is
    neither 0 nor 1, and for fewer data than components.
    """
    x = _bits(data)
    check_counts(len(x), "Bernoullis", num_components, num_starts, max_iter)
    if not 0 < prior_count < torch.inf:
        raise ValueError(f"`prior_count` must be finite and above 0, got {prior_count}.")
    if start is not None:
        _check_start(start, num_components, x.shape[1], num_starts)
    x = on_device(x, device)
    generator = torch.Generator().manual_seed(seed)

    def run() -> BernoulliMixture:
        first = _from_k_means(x, num_components, prior_count, generator) if start is None else start
        weights, logits = (t.to(x.device, torch.float64) for t in (first.weights, first.logits))
        fitted, log_likelihood, converged = ascend(
            replace(first, weights=weights, logits=logits),
            lambda mixture: _update(x, posterior(_log_joint(mixture)), mixture, prior_count),
            len(x),
            max_iter,
            tol,
        )
        return replace(fitted, log_likelihood=log_likelihood, converged=converged)

    best = max((run() for _ in range(num_starts)), key=lambda fit: fit.log_likelihood[-1].item())
    return replace(best, weights=best.weights.to(x.dtype), logits=best.logits.to(x.dtype))


def _from_k_means(
    x: Tensor, num_components: int, prior_count: float, generator: torch.Generator
) -> BernoulliMixture:
    """One M step with each datum at its nearest mean."""
    centre = mean(x)
    means = k_means(x, centre, num_components, generator) + centre
    empty = BernoulliMixture(means.new_zeros(len(means)), means, means.new_empty(0), False)
    return _update(x, nearest(means), empty, prior_count)[0]


def _update(
    x: Tensor, assign: Assign, previous: BernoulliMixture, prior_count: float
) -> tuple[BernoulliMixture, float]:
    """One E and one M step (Bishop 2006, eqs 9.57-9.60), and log p(x) before, summed over data."""
    zero = torch.zeros_like(previous.logits[0])
    N, ones = torch.zeros_like(previous.weights), torch.zeros_like(previous.logits)
    log_likelihood = 0.0
    for block in blocks(x, zero, len(N)):
        log_p, r = assign(block)
        log_likelihood += log_p.sum().item()
        N.add_(r.sum(dim=0))
        ones.addmm_(r.T, block)
    zeros = (N[:, None] - ones).clamp(min=0)
    logits = (ones + prior_count).log() - (zeros + prior_count).log()
    logits = torch.where(N[:, None] > EMPTY, logits, previous.logits)
    return replace(previous, weights=N / N.sum(), logits=logits), log_likelihood


def _log_joint(mixture: BernoulliMixture) -> Callable[[Tensor], Tensor]:
    """log π_c + log p(x_n | c), (B, C), as a function of a block of bits, (B, D)."""
    constant = mixture.weights.log() - softplus(mixture.logits).sum(dim=1)
    return lambda x: torch.addmm(constant, x, mixture.logits.T)


def _bits(data: Any, size: int | None = None) -> Tensor:
    x = as_rows(data, size)
    wrong = ((x != 0) & (x != 1)).any(dim=1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"A mixture of Bernoullis needs bits, 0 or 1, and {int(wrong.sum())} of {len(x)} data "
            f"are not, the first is datum {row}, with values from {x[row].min():.4g} to "
            f"{x[row].max():.4g}. Grey levels? Binarise them (`load_data(..., "
            "binarisation='dynamic')`), or fit a density (`fit_em`)."
        )
    return x


def _check_start(
    start: BernoulliMixture, num_components: int, data_size: int, num_starts: int
) -> None:
    if num_starts > 1:
        raise ValueError("EM can begin from one place only: give `start`, or `num_starts` above 1.")
    expected, found = (num_components, data_size), tuple(start.logits.shape)
    if found != expected:
        raise ValueError(f"`start` must have logits of shape (C, D) = {expected}, got {found}.")
