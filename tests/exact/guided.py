"""A datum of each exact model, beside a guide that is good and not exact.

    KNOWN["ring"].pair, .x, .log_p      a `PyroPair`, one datum (1, *event), its log p(x) in nats

Weights of every guide here have finite variance, so that estimates have standard errors.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torch import Tensor

from pvae import PyroPair
from tests.exact.discrete import GuidedCoin, TwoCategoricals
from tests.exact.linear_gaussian import LinearGaussian, TwoLayers, identity
from tests.exact.mixtures import LinearMixture
from tests.exact.nonlinear import Ring, Square

__all__ = ["COIN", "KNOWN", "PHI", "Known"]


@dataclass(frozen=True)
class Known:
    """A pair, the model that it is a pair of, and one datum."""

    pair: PyroPair
    truth: Any
    x: Tensor  # (1, *event)

    @property
    def log_p(self) -> float:
        """log p(x) of the datum, nats."""
        return float(self.truth.log_prob(self.x))

    def repeated(self, times: int) -> Tensor:
        """The datum as so many data, of which each has draws of its own."""
        return self.x.expand(times, *self.x.shape[1:])


class Coin(GuidedCoin):
    """With log p(x), the sum over both of its sides."""

    def log_prob(self, x: Tensor) -> Tensor:
        sides = zip((1 - self.prior, self.prior), self.loc, strict=True)
        return sum(p * Normal(m, 1.0).log_prob(x).exp() for p, m in sides).log()


COIN, PHI = Coin(), torch.tensor(0.5, dtype=torch.float64)  # q(z = 1) = sigmoid(PHI)


def ring_guide(x: Tensor) -> None:
    """Along the wedge that is the posterior: long from the origin outward, narrow across."""
    along = x / x.norm(dim=-1, keepdim=True)
    across = torch.stack([-along[:, 1], along[:, 0]], -1)
    root = torch.stack([0.8 * along, 0.4 * across], -1)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", MultivariateNormal(1.5 * along, root @ root.mT))


def mixture_guide(truth: LinearMixture, x: Tensor) -> None:
    """Mean and covariance of p(z | x), a mixture of Gaussians; the covariance half as large again.

    Source: Bishop 2006, equations 2.116 and 2.117, for each component.
    """
    S = torch.linalg.inv(identity(2) / truth.s**2 + truth.W.T @ truth.W / truth.t**2)
    residual = x - truth.b.unsqueeze(1)  # (C, N, D)
    means = (truth.loc.unsqueeze(1) / truth.s**2 + residual @ truth.W / truth.t**2) @ S
    C = truth.s**2 * truth.W @ truth.W.T + truth.t**2 * identity(3)
    marginal = MultivariateNormal(truth.loc @ truth.W.T + truth.b, C)
    share = (truth.probs.log() + marginal.log_prob(x.unsqueeze(1))).softmax(1).T.unsqueeze(-1)
    mean = (share * means).sum(0)
    apart = means - mean
    between = torch.einsum("cnk,cni,cnj->nij", share, apart, apart)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", MultivariateNormal(mean, 1.5 * (S + between)))


def square_guide(x: Tensor) -> None:
    """A bump on either mode, half as wide again as the posterior's own."""
    mode = x.clamp(min=0.25).sqrt().unsqueeze(-1)  # (N, 1, 1)
    bumps = Normal(torch.cat([-mode, mode], -1), 1.5 * Square().sigma / (2 * mode))
    even = Categorical(torch.ones(2, dtype=x.dtype))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", MixtureSameFamily(even, bumps).to_event(1))


def _known() -> dict[str, Known]:
    gaussian, layers, mixture = LinearGaussian.drawn(), TwoLayers.drawn(), LinearMixture.drawn()
    ring, square, categories = Ring(), Square(), TwoCategoricals.drawn()
    coin = PyroPair(partial(COIN.model, phi=PHI), partial(COIN.guide, phi=PHI))
    pairs: dict[str, tuple[PyroPair, Any, Tensor]] = {
        "linear-Gaussian": (gaussian.pair(spread=2.0), gaussian, gaussian.sample(1)),
        "two layers": (layers.pair(spread=2.0), layers, layers.sample(1)),
        "mixture": (
            PyroPair(mixture.model, partial(mixture_guide, mixture)),
            mixture,
            mixture.sample(1),
        ),
        "ring": (PyroPair(ring.declared().model, ring_guide), ring, ring.sample(1)),
        "square": (PyroPair(square.declared().model, square_guide), square, torch.ones(1, 1)),
        "coin": (coin, COIN, torch.tensor([0.4])),
        "categories": (categories.pair(), categories, categories.sample(1)),
    }
    known = {}
    for name, (pair, truth, x) in pairs.items():
        x = x.double() if x.is_floating_point() else x
        pair.prepare(x)
        known[name] = Known(pair, truth, x)
    return known


KNOWN = _known()
