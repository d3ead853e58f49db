"""Missing data: NaN marks an entry that was not seen, and log p(x) is that of those that were.

    p(x_seen | z) = integral of p(x | z) over the other entries

Where entries are independent given z it is the product over those seen; a Gaussian loses rows and
columns of its covariance. The guide reads zeros in place of what is missing. The bounds that follow
are those of Mattei & Frellsen 2019 (MIWAE). They are of log p(x_seen), and a model fitted by them
is one of x, wherever what is missing does not depend on its value (Rubin 1976: at random).

    x ~ Observed(..., missing=True)  -->  Seen: the density of the entries that were seen
    y, that other sites are given    -->  a latent that is summed out; where y was seen, Label
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    constraints,
    transform_to,
)

__all__ = ["Label", "Seen", "check_site", "filled", "refuse", "sample_summed"]

LOG_ZERO = -1e20  # of a probability: finite, as zero times its gradient has to be zero


class Seen(TorchDistribution):
    """The entries of a draw that were seen, NaN in place of the others.

    Draws, mean and mode are of all entries.

    Args:
        whole: distribution of all entries, independent or jointly Gaussian.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, whole: Any):
        self.whole = whole
        super().__init__(whole.batch_shape, whole.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """As the whole."""
        return bool(self.whole.has_rsample)

    @property
    def support(self) -> Any:
        """As the whole."""
        return self.whole.support

    @property
    def mean(self) -> Tensor:
        """Of all entries."""
        return self.whole.mean

    @property
    def mode(self) -> Tensor:
        """Of all entries."""
        return self.whole.mode

    @property
    def variance(self) -> Tensor:
        """Of all entries."""
        return self.whole.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Seen":
        """The same with more batch dimensions."""
        return Seen(self.whole.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """All entries."""
        return self.whole.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """All entries."""
        return self.whole.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of the entries that are not NaN, zero where all are."""
        d = _innermost(self.whole)
        log_prob = _of_gaussian if isinstance(d, GAUSSIAN) else _of_entries
        parts = len(self.whole.event_shape) - len(d.event_shape)
        return sum_rightmost(log_prob(d, value), parts)

    def completed(self, value: Tensor, other: Tensor) -> Tensor:
        """Entries that were seen as in `value`, the others as in `other`, given what was seen.

        Of the mean it makes the conditional mean, of a draw one of p(x_missing | x_seen): for a
        Gaussian by Matheron's rule, x + Sigma_:s Sigma_ss^-1 (x_seen - x_s) (Wilson et al. 2020,
        Efficiently sampling functions from Gaussian process posteriors, eq. 9).
        """
        seen, d = ~value.isnan(), _innermost(self.whole)
        if isinstance(d, GAUSSIAN):
            other = other + _told(d, torch.where(seen, value - other, 0.0), seen)
        return torch.where(seen, value, other)


class Label(TorchDistribution):
    """What is known of an index y: p(label | y) = 1[label = y], and 1 where there is none (NaN).

    Args:
        y: indices, one a datum, or all that there are along a dimension of their own.
        support: of y.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, y: Tensor, support: Any):
        self.y, self._support = y, support
        super().__init__(y.shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of y."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Label":
        """The same with more batch dimensions."""
        return Label(self.y.expand(batch_shape), self._support)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """The label that y would have."""
        return self.y.expand(torch.Size(sample_shape) + self.y.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero, or what stands for log 0 where the label is another."""
        possible = (value == self.y) | value.isnan()
        return torch.where(possible, 0.0, LOG_ZERO).to(value.dtype)


GAUSSIAN = (MultivariateNormal, LowRankMultivariateNormal)


def check_site(name: str, title: str, prototype: Distribution, children: Sequence[str]) -> None:
    """Raise unless entries of a site may be missing.

    Args:
        name: of the site.
        title: of its distribution.
        prototype: the distribution, of one datum.
        children: sites that are given this one, if it cannot be summed out.
    """
    d = _innermost(prototype)
    if children:
        raise ValueError(
            f"{children[0]!r} is given {name!r} ({title}, event shape "
            f"{tuple(prototype.event_shape)}), which would have to be integrated out where it is "
            "missing: only one discrete variable of finite support can be."
        )
    if d.event_shape and not isinstance(d, GAUSSIAN):
        raise ValueError(
            f"Entries of {name!r} cannot be missing: those of a {title} are neither independent "
            "given the site's parents nor jointly Gaussian, so that the others have no density of "
            "their own here."
        )


def refuse(name: str, values: Tensor, model: str, observed: bool) -> None:
    """Raise for the first NaN in data (N, *event) of a site that is not declared to have any."""
    for start in range(0, len(values), 4096):
        absent = values[start : start + 4096].isnan().reshape(-1, values[0].numel()).any(1)
        if bool(absent.any()):
            declare = "declare the site `Observed(..., missing=True)`, or use `with_missing()`"
            raise ValueError(
                f"Datum {start + int(absent.nonzero()[0])} of {name!r} has entries that are "
                f"missing (NaN), which {model!r} does not take there: "
                f"{declare if observed else 'leave those data out, or fill them in'}."
            )


def sample_summed(name: str, distribution: Any, label: Tensor | None) -> Tensor:
    """All values of a discrete variable, and what is known of it where it is observed."""
    value = pyro.sample(name, distribution, infer={"enumerate": "parallel"})
    if label is not None:
        pyro.sample(f"{name}_seen", Label(value, distribution.support), obs=label)
    return value


def _innermost(d: Any) -> Any:
    return _innermost(d.base_dist) if isinstance(d, Independent) else d


def filled(values: Tensor, support: Any) -> Tensor:
    """Values with some point of a support in place of NaN."""
    return torch.where(values.isnan(), _inside(support, values), values)


def _inside(support: Any, like: Tensor) -> Tensor:
    """A point of a support, for each of its entries."""
    if isinstance(support, constraints.independent):
        return _inside(support.base_constraint, like)
    zero = like.new_zeros(())
    if support.is_discrete:
        return zero + getattr(support, "lower_bound", 0)
    return transform_to(support)(zero) if support is not constraints.real_vector else zero


def _of_entries(d: Any, value: Tensor) -> Tensor:
    """log p entry by entry, zero for those that were not seen."""
    log_prob = d.log_prob(filled(value, d.support))
    return torch.where(value.isnan(), log_prob.new_zeros(()), log_prob)


def _of_gaussian(d: Any, value: Tensor) -> Tensor:
    """log N(x_seen; mu_seen, Sigma_seen), by the whole vector.

    Entries that were not seen are put at their mean, independent and of variance one: each then
    adds -log(2 pi) / 2, which is taken off.
    """
    seen = ~value.isnan()
    x = torch.where(seen, value, d.loc)
    if isinstance(d, LowRankMultivariateNormal):
        W, diagonal = _low_rank_of(d, seen)
        of_seen: Any = LowRankMultivariateNormal(d.loc, W, diagonal, validate_args=False)
    else:
        of_seen = MultivariateNormal(d.loc, _covariance_of(d, seen), validate_args=False)
    off = 0.5 * math.log(2 * math.pi) * (~seen).sum(-1)
    return torch.where(seen.all(-1), d.log_prob(x), of_seen.log_prob(x) + off)


def _low_rank_of(d: Any, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and diagonal of the covariance, the entries that were not seen standard Normal."""
    return d.cov_factor * seen.unsqueeze(-1), torch.where(seen, d.cov_diag, 1.0)


def _covariance_of(d: Any, seen: Tensor) -> Tensor:
    """The covariance, the entries that were not seen standard Normal."""
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    one = torch.eye(seen.shape[-1], dtype=d.loc.dtype, device=seen.device)
    return torch.where(both, d.covariance_matrix, one)


def _told(d: Any, r: Tensor, seen: Tensor) -> Tensor:
    """Sigma_:s Sigma_ss^-1 r_s, of r that is zero where nothing was seen."""
    if not isinstance(d, LowRankMultivariateNormal):
        L = torch.linalg.cholesky(_covariance_of(d, seen))
        u = torch.cholesky_solve(r.unsqueeze(-1), L)
        return (d.covariance_matrix @ u).squeeze(-1)
    W, diagonal = _low_rank_of(d, seen)  # Woodbury's identity
    scaled = W.mT / diagonal.unsqueeze(-2)
    C = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device) + scaled @ W
    inner = torch.cholesky_solve(scaled @ r.unsqueeze(-1), torch.linalg.cholesky(C))
    u = r / diagonal - (scaled.mT @ inner).squeeze(-1)
    return d.cov_diag * u + (d.cov_factor @ (d.cov_factor.mT @ u.unsqueeze(-1))).squeeze(-1)
