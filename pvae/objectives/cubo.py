"""The chi upper bound: a guide that covers the posterior, because what it misses costs it most."""

from typing import Any

from torch import Tensor

from pvae import bounds
from pvae.objectives.baselines import without_each
from pvae.objectives.gradient import Coefficients
from pvae.objectives.objective import Objective
from pvae.particles import Particles

__all__ = ["CUBO"]


class CUBO(Objective):
    """The guide minimises CUBO_n = 1/n log E_q[w^n] (Dieng et al. 2017, eq. 5), n > 1.

    An upper bound of log p(x), which says nothing of how to change the model: its parameters
    maximise L_K of the same draws. The loss is the K-particle estimate of CUBO_n, which lies below
    it in expectation, and whose gradient the guide's is. With few particles that is far from
    CUBO_n's own, and may point away from the posterior; and early in training weights to the n-th
    power can send a guide anywhere: set `clip_norm` in `fit`, or begin with another objective.
    History reports L_K, and CUBO beside it.

    Args:
        num_particles: K, at least 2: of one particle CUBO is the ELBO, which is not to be lowered.
        order: n.
        baseline: of guide sites without reparameterisation; see `baselines`.

    Raises:
        ValueError: for K = 1 or n <= 1, where it is no upper bound.
    """

    cuts = True

    def __init__(self, num_particles: int = 50, order: float = 2.0, baseline: Any = "auto"):
        super().__init__(num_particles, baseline)
        if num_particles < 2:
            raise ValueError("CUBO of one particle is the ELBO, and cannot bound from above.")
        if order <= 1:
            raise ValueError(f"`order` must be above 1 for an upper bound, got {order}.")
        self.order = order

    def value(self, log_weights: Tensor) -> Tensor:
        """Minus the estimate of CUBO_n, which is minimised."""
        return -bounds.cubo(log_weights, self.order)

    def coefficients(self, log_weights: Tensor) -> Coefficients:
        """w~ for the model, w~^n for the guide, which goes down."""
        c = (self.order * log_weights).softmax(0)
        return Coefficients(model=log_weights.softmax(0), score=c, path=-c)

    def reward_without_each(self, log_weights: Tensor, baseline: str) -> Tensor:
        """Minus CUBO_n as the other particles tell it."""
        return -without_each(log_weights, self.order, baseline)

    def bound(self, particles: Particles) -> Tensor:
        """L_K."""
        return particles.scale * bounds.iwae(particles.log_weights)

    def extras(self, particles: Particles) -> dict[str, Tensor]:
        """The upper bound's estimate."""
        return {"CUBO": -particles.scale * self.value(particles.log_weights)}
