"""Randomised quasi-Monte Carlo: draws of a guide from points that fill space evenly.

    Sobol points, shifted at random  -->  standard normal scores (k, n, D)  --Points-->  draws

Each point alone is uniform, so that weights are unbiased; together they leave no gaps, so that the
error of a smooth integrand falls faster than K^-1/2. The K points are REPLICATES independent
randomisations of one net, whose spread gives the standard error (Owen 1997; L'Ecuyer & Lemieux
2002), with seven degrees of freedom: a datum's points within one are not independent. Used
as a guide's draws by Buchholz, Wenzel & Mandt 2018.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution
from torch.quasirandom import SobolEngine

from pvae.programs import Programs

__all__ = ["REPLICATES", "Points", "Scores", "widths"]

REPLICATES = 8  # randomisations
BITS = SobolEngine.MAXBIT


def widths(programs: Programs) -> dict[str, int]:
    """How many numbers each site of the guide draws for a datum, in order.

    Raises:
        ValueError: for a distribution without a quantile function, or a plate within the datum.
    """
    if programs.plates.nesting > 1:
        raise ValueError(
            "Sobol points need latents that lie in the data's plate alone, with the parts of a "
            "datum in `.to_event(...)`. Use points='random'."
        )
    found = {}
    for name, site in programs.guide_sites().items():
        size = site["fn"].event_shape.numel()
        found[name] = size
        try:
            _quantile(site["fn"], site["value"].new_zeros(*site["fn"].batch_shape, size))
        except NotImplementedError:
            raise ValueError(
                f"Sobol points need a quantile function, and {name!r} "
                f"({_innermost(site['fn'])}) has none. Use points='random'."
            ) from None
    return found


class Scores:
    """Standard normal scores of all K points for a block of data.

    Args:
        num_particles: K, in REPLICATES equal parts.
        num_data: n.
        size: D, numbers a datum.
    """

    def __init__(self, num_particles: int, num_data: int, size: int):
        self.each = num_particles // REPLICATES
        seed = int(torch.randint(2**31, ()))
        engine = SobolEngine(size, scramble=True, seed=seed)
        self.points = (engine.draw(self.each, dtype=torch.float64) * 2**BITS).long()
        self.shifts = torch.randint(2**BITS, (REPLICATES, num_data, size))

    def __call__(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Of particles start..stop-1, (k, n, D)."""
        k = torch.arange(start, stop)
        shifted = self.points[k % self.each].unsqueeze(1) ^ self.shifts[k // self.each]
        return torch.special.ndtri((shifted.double() + 0.5) / 2**BITS).to(like)


class Points(Messenger):
    """Has the sites of a proposal draw from scores instead of random numbers.

    Args:
        sizes: from `widths`.
        scores: (k, n, D); particles drawn one at a time take one row each.
    """

    def __init__(self, sizes: Mapping[str, int], scores: Tensor):
        super().__init__()
        self.scores = dict(zip(sizes, scores.split(list(sizes.values()), -1), strict=True))
        self.visits = dict.fromkeys(sizes, 0)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.scores or msg["value"] is not None or site_is_subsample(msg):
            return
        own = self.scores[msg["name"]]
        if len(msg["fn"].batch_shape) == 1:
            own = own[self.visits[msg["name"]]]
            self.visits[msg["name"]] += 1
        msg["value"], msg["done"] = _quantile(msg["fn"], own), True


def _innermost(d: Distribution) -> str:
    return _innermost(d.base_dist) if isinstance(d, Independent) else type(d).__name__


def _quantile(d: Any, scores: Tensor) -> Tensor:
    """The draw at standard normal scores, (*batch, size of an event) -> (*batch, *event)."""
    if isinstance(d, Independent):
        return _quantile(d.base_dist, scores.reshape(*d.batch_shape, *d.event_shape))
    if isinstance(d, TransformedDistribution):
        x = _quantile(d.base_dist, scores)
        for transform in d.transforms:
            x = transform(x)
        return x
    if isinstance(d, torch.distributions.MultivariateNormal):
        return d.loc + (d.scale_tril @ scores.unsqueeze(-1)).squeeze(-1)
    scores = scores.reshape(*d.batch_shape, *d.event_shape)
    if isinstance(d, torch.distributions.Normal):
        return d.loc + d.scale * scores
    u = torch.special.ndtr(scores)
    tiny = torch.finfo(u.dtype).eps
    return d.icdf(u.clamp(tiny, 1 - tiny))
