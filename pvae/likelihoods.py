"""Likelihoods as weight passes compute them: the same log p(x | z), with fewer logarithms.

A Bernoulli over 784 pixels costs 784 logarithms a draw: as much as all of a network's products,
where these run at full speed. But sum_j log(1 + exp(-|a_j|)) is the logarithm of a product, whose
factors lie in (1, 2]: a hundred of them stay far below the largest float.

The numbers differ from Pyro's by rounding, and the form is made for a compiler that fuses it into
one pass over memory. So only compiled weight passes use it.
"""

from typing import Any, ClassVar

import torch
from pyro.distributions import Bernoulli as PyroBernoulli
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli, Independent, constraints

__all__ = ["CheapLikelihoods"]

MOST_FACTORS = 112  # in one product: at most 2^112


class CheapLikelihoods(Messenger):
    """A Pyro effect handler under which observed Bernoulli vectors take one logarithm a block."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if not msg["is_observed"] or not isinstance(fn, Independent):
            return
        if type(fn.base_dist) in (Bernoulli, PyroBernoulli):  # a subclass may have its own log_prob
            msg["fn"] = _Bits(fn)


class _Bits(TorchDistribution):
    """Independent Bernoulli variables, whose log-probability is their sum."""

    arg_constraints: ClassVar = {}
    support = constraints.boolean

    def __init__(self, bits: Independent):
        self.bits = bits
        super().__init__(bits.batch_shape, bits.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """sum_j (x_j - 1/2) a_j - |a_j| / 2 - log(1 + exp(-|a_j|)), with logits a."""
        x, a = self._in_blocks(value), self._in_blocks(self.bits.base_dist.logits)
        linear = (x - 0.5) * a - 0.5 * a.abs()
        return (linear.sum(-1) - (1 + torch.exp(-a.abs())).prod(-1).log()).sum(-1)

    def _in_blocks(self, value: Tensor) -> Tensor:
        """(*batch, *event) -> (*batch, blocks, factors)."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return value.reshape(*batch, _num_blocks(self.event_shape.numel()), -1)


def _num_blocks(size: int) -> int:
    """The fewest equal blocks, each short enough for its product."""
    return next(n for n in range(1, size + 1) if size % n == 0 and size // n <= MOST_FACTORS)
