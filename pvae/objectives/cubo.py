"""The chi upper bound: a guide that covers the posterior, because what it misses costs it most."""

from torch import Tensor

from pvae import bounds
from pvae.objectives.gradient import Coefficients
from pvae.objectives.objective import Objective
from pvae.particles import Particles

__all__ = ["CUBO"]


class CUBO(Objective):
    """The guide minimises CUBO_n = 1/n log E_q[w^n] (Dieng et al. 2017, eq. 5), n > 1.

    An upper bound of log p(x), which says nothing of how to change the model: its parameters
    maximise L_K of the same draws. The guide's gradient is that of CUBO_n itself, self-normalised,

        grad CUBO_n = (1/n - 1) sum_k c_k grad log q(z_k | x),   c_k = w_k^n / sum_j w_j^n,

    and not of the estimate of CUBO_n from K draws, (1/n) log (1/K) sum_k w_k^n. That one, lowered
    through the draws, has no minimum: it falls without limit as the guide leaves the posterior. No
    draw is differentiated, so discrete latents are as good as any. Biased by 1/K. History reports
    L_K, and the estimate of CUBO beside it, which lies below CUBO_n in expectation.

    Args:
        num_particles: K, at least 2.
        order: n.

    Raises:
        ValueError: for K = 1 or n <= 1, where it is no upper bound.
    """

    cuts = True
    separates = True
    uses_signals = False

    def __init__(self, num_particles: int = 50, order: float = 2.0):
        super().__init__(num_particles, baseline="none")
        if num_particles < 2:
            raise ValueError("CUBO of one particle is the ELBO, and cannot bound from above.")
        if order <= 1:
            raise ValueError(f"`order` must be above 1 for an upper bound, got {order}.")
        self.order = order

    def value(self, log_weights: Tensor) -> Tensor:
        """Minus the estimate of CUBO_n, which is minimised."""
        return -bounds.cubo(log_weights, self.order)

    def coefficients(self, log_weights: Tensor) -> Coefficients:
        """w~ for the model; (1 - 1/n) c for the guide."""
        c = (self.order * log_weights).softmax(0)
        return Coefficients(log_weights.softmax(0), score=(1 - 1 / self.order) * c, path=None)

    def bound(self, particles: Particles) -> Tensor:
        """L_K."""
        return particles.scale * bounds.iwae(particles.log_weights)

    def extras(self, particles: Particles) -> dict[str, Tensor]:
        """The upper bound's estimate."""
        return {"CUBO": -particles.scale * self.value(particles.log_weights)}
