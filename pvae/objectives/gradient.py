"""A gradient estimator is three coefficients a particle.

    gradient = sum_k  model_k d log p(x, z_k) / d theta           the model's parameters
                    + score_k d log q(z_k | x) / d phi            the guide's, past the draws
                    + path_k (d log w_k / d z_k) (d z_k / d phi)  the guide's, through the draws

| estimator | model | score | path |
| --- | --- | --- | --- |
| any bound, differentiated as it is | c | -c | c |
| IWAE (Burda et al. 2016, eq. 14) | w~ | -w~ | w~ |
| sticking the landing (Roeder et al. 2017, eq. 7) | w~ | 0 | w~ |
| doubly reparameterised (Tucker et al. 2018, eq. 8) | w~ | 0 | w~^2 |
| wake-wake (Bornschein & Bengio 2015, eqs. 6, 9) | w~ | w~ | 0 |
| CUBO of order 2 (Dieng et al. 2017, eq. 5) | w~ | w~^2 / (2 sum w~^2) | 0 |

with w~_k = w_k / sum_j w_j. Draws without reparameterisation have no path; their log q gets a
learning signal besides (`baselines`). The coefficients carry no gradient themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.particles import Particles

__all__ = ["Coefficients", "gradient_of", "weighted"]


@dataclass(frozen=True)
class Coefficients:
    """Of each particle, (K, N); see the module's docstring. None stands for zero."""

    model: Tensor
    score: Tensor | None
    path: Tensor | None

    def __mul__(self, scale: Any) -> "Coefficients":
        parts = (self.model, self.score, self.path)
        return Coefficients(*(None if part is None else part * scale for part in parts))  # type: ignore[arg-type]


def gradient_of(
    particles: Particles, coefficients: Coefficients, signals: Mapping[str, Tensor]
) -> Tensor:
    """Zero, as a scalar with the gradient that the coefficients make of cut particles.

    Args:
        particles: drawn with `cut=True`.
        coefficients: of the gradient.
        signals: of sites without reparameterisation, (K, N): coefficients of their own log q.
    """
    c = coefficients
    by_site = [weighted(signal, particles.log_q[name]) for name, signal in signals.items()]
    total = weighted(c.model, particles.log_joint)
    if c.score is not None:
        total = total + weighted(c.score, particles.log_guide)
    total = sum(by_site, total)
    if particles.cuts and (c.path is not None or by_site):
        path = sum(by_site, torch.zeros_like(total))
        if c.path is not None:
            path = path + weighted(c.path, particles.log_weights)
        total = total + through_draws(path, particles.cuts)
    return total


def weighted(coefficients: Tensor, values: Tensor) -> Tensor:
    """Zero, as a scalar whose derivative in the values is these coefficients, (K, N) both.

    The values themselves are left out, so that a weight of zero has no part, not 0 x -inf = NaN.
    """
    return _Weighted.apply(coefficients, values.expand(coefficients.shape))


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients)
        return values.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (coefficients,) = ctx.saved_tensors
        return None, gradient * coefficients


def through_draws(path: Tensor, cuts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Zero, as a scalar with the gradient of `path` by way of the leaves and the draws behind them.

    The last drawn comes first: a draw's distribution may depend on leaves before it.
    """
    drawn, leaves = zip(*cuts, strict=True)
    found: list[Any] = list(torch.autograd.grad(path, leaves, retain_graph=True, allow_unused=True))
    total = torch.zeros_like(path)
    for i in reversed(range(len(leaves))):
        if found[i] is None:
            continue
        total = total + _Weighted.apply(found[i], drawn[i])
        if i:
            more = torch.autograd.grad(
                drawn[i], leaves[:i], found[i], retain_graph=True, allow_unused=True
            )
            found[:i] = [_add(one, other) for one, other in zip(found[:i], more, strict=True)]
    return total


def _add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
