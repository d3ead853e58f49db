"""Bounds of several particles: IWAE and its kin, which share particles out among means.

    L_K = E[log (1/K) sum_k w_k]  <=  log p(x),   tighter as K grows (Burda et al. 2016, theorem 1)

The guide's gradient drowns in noise as K grows (Rainforth et al. 2018, theorem 1): its
signal-to-noise ratio falls as K^-1/2. Two ways out are here: gradients of lower variance ("stl",
"dreg"), and training the guide by M means of K particles (MIWAE, CIWAE, PIWAE).
"""

import math
from typing import Any, Literal

from torch import Tensor

from pvae import bounds
from pvae.objectives.baselines import mean_without_each, without_each
from pvae.objectives.gradient import Coefficients
from pvae.objectives.objective import Objective
from pvae.particles import Particles, check_count

__all__ = ["CIWAE", "IWAE", "MIWAE", "PIWAE", "Gradient", "Renyi"]

Gradient = Literal["pathwise", "stl", "dreg"]


class IWAE(Objective):
    """The importance-weighted bound, L_K = E[log (1/K) sum_k w_k] (Burda et al. 2016, eq. 8).

    At least as tight as the ELBO, by more as K grows; for K = 1 it is the ELBO.

    Args:
        num_particles: K.
        gradient: "pathwise", the bound's own (Burda et al. 2016, eq. 14); "stl", without the
            guide's score, of less variance and for K > 1 biased (Roeder et al. 2017, eq. 7);
            "dreg", doubly reparameterised, of less variance and unbiased (Tucker et al. 2018,
            eq. 8). The latter two need a guide all of whose sites are reparameterised.
        baseline: of guide sites without reparameterisation; see `baselines`. "auto" is VIMCO.

    Raises:
        ValueError: for K below 1, or an unknown gradient or baseline.
    """

    def __init__(
        self, num_particles: int = 50, gradient: Gradient = "pathwise", baseline: Any = "auto"
    ):
        super().__init__(num_particles, baseline)
        if gradient not in ("pathwise", "stl", "dreg"):
            raise ValueError(f"`gradient` must be 'pathwise', 'stl' or 'dreg', got {gradient!r}.")
        self.gradient = gradient
        self.cuts = self.separates = gradient != "pathwise"

    def value(self, log_weights: Tensor) -> Tensor:
        """L_K."""
        return bounds.iwae(log_weights)

    def coefficients(self, log_weights: Tensor) -> Coefficients:
        """w~ for the model, w~ (stl) or w~^2 (dreg) through the guide's draws."""
        w = log_weights.softmax(0)
        return Coefficients(model=w, score=None, path=w if self.gradient == "stl" else w.square())

    def reward_without_each(self, log_weights: Tensor, baseline: str) -> Tensor:
        """L_K without each particle."""
        return without_each(log_weights, 1.0, baseline)


class MIWAE(Objective):
    """The mean of M bounds of K particles each (Rainforth et al. 2018, section 5).

    Args:
        num_means: M.
        num_particles: K; M K are drawn.
        baseline: of guide sites without reparameterisation; see `baselines`.
    """

    def __init__(self, num_means: int = 8, num_particles: int = 8, baseline: Any = "auto"):
        check_count("num_means", num_means)
        super().__init__(num_particles, baseline)
        self.num_means = num_means

    @property
    def draws(self) -> int:
        """M K."""
        return self.num_means * self.num_particles

    def value(self, log_weights: Tensor) -> Tensor:
        """The mean of L_K over M blocks of K particles."""
        return bounds.iwae(log_weights, self.num_particles)

    def reward(self, log_weights: Tensor) -> Tensor:
        """L_K of each particle's own block, over M."""
        blocks = self._blocks(log_weights)
        bound = bounds.iwae(blocks).expand_as(blocks) / self.num_means
        return self._together(bound)

    def reward_without_each(self, log_weights: Tensor, baseline: str) -> Tensor:
        """The same without each particle."""
        found = without_each(self._blocks(log_weights), 1.0, baseline) / self.num_means
        return self._together(found)

    def _blocks(self, log_weights: Tensor) -> Tensor:
        """(M K, N) -> (K, M N): each block as if it were a datum."""
        blocks = log_weights.reshape(self.num_means, self.num_particles, -1)
        return blocks.movedim(0, 1).reshape(self.num_particles, -1)

    def _together(self, blocks: Tensor) -> Tensor:
        """(K, M N) -> (M K, N)."""
        apart = blocks.reshape(self.num_particles, self.num_means, -1).movedim(1, 0)
        return apart.reshape(self.draws, -1)


class PIWAE(MIWAE):
    """The model is trained by L_{MK}, the guide by M means of L_K (Rainforth et al. 2018, sec. 5).

    Args:
        num_means: M.
        num_particles: K; M K are drawn.
        baseline: of guide sites without reparameterisation; see `baselines`.
    """

    cuts = True

    def value(self, log_weights: Tensor) -> Tensor:
        """L_{MK}."""
        return bounds.iwae(log_weights)

    def coefficients(self, log_weights: Tensor) -> Coefficients:
        """w~ over all particles for the model, within each block for the guide."""
        c = self._together(self._blocks(log_weights).softmax(0)) / self.num_means
        return Coefficients(model=log_weights.softmax(0), score=-c, path=c)


class CIWAE(Objective):
    """beta ELBO + (1 - beta) L_K (Rainforth et al. 2018, section 5).

    Args:
        num_particles: K.
        beta: weight of the ELBO, in [0, 1].
        baseline: of guide sites without reparameterisation; see `baselines`.
    """

    def __init__(self, num_particles: int = 64, beta: float = 0.5, baseline: Any = "auto"):
        super().__init__(num_particles, baseline)
        if not 0 <= beta <= 1:
            raise ValueError(f"`beta` weighs the ELBO against L_K, in [0, 1]; got {beta}.")
        self.beta = beta

    def value(self, log_weights: Tensor) -> Tensor:
        """The weighted mean of both bounds."""
        return self.beta * bounds.elbo(log_weights) + (1 - self.beta) * bounds.iwae(log_weights)

    def reward(self, log_weights: Tensor) -> Tensor:
        """A particle's own part of the ELBO, and the whole L_K."""
        return self._mix(log_weights, bounds.iwae(log_weights))

    def reward_without_each(self, log_weights: Tensor, baseline: str) -> Tensor:
        """The same as the other particles tell it."""
        others = without_each(log_weights, 1.0, baseline)
        return self._mix(mean_without_each(log_weights), others)

    def _mix(self, own: Tensor, bound: Tensor) -> Tensor:
        return self.beta * own / self.num_particles + (1 - self.beta) * bound


class Renyi(Objective):
    """The variational Rényi bound, 1/(1 - alpha) E[log (1/K) sum_k w_k^(1 - alpha)].

    Li & Turner 2016, equations 4 and 9. A lower bound for alpha >= 0, by more as alpha grows: 1 is
    the ELBO, 0 is IWAE, -inf takes the largest weight alone (VR-max). Below 0 it is none in the
    limit of many particles, and history and validation report L_K.

    Args:
        num_particles: K.
        alpha: order.
        baseline: of guide sites without reparameterisation; see `baselines`.
    """

    def __init__(self, num_particles: int = 50, alpha: float = 0.5, baseline: Any = "auto"):
        super().__init__(num_particles, baseline)
        if not alpha < math.inf:
            raise ValueError(f"`alpha` must be a number or -inf (VR-max), got {alpha}.")
        self.alpha = alpha

    def value(self, log_weights: Tensor) -> Tensor:
        """The estimate of the bound from K particles."""
        return bounds.renyi(log_weights, self.alpha)

    def bound(self, particles: Particles) -> Tensor:
        """The bound itself for alpha >= 0, else L_K."""
        if self.alpha >= 0:
            return super().bound(particles)
        return particles.scale * bounds.iwae(particles.log_weights)

    def extras(self, particles: Particles) -> dict[str, Tensor]:
        """For alpha < 0, the objective."""
        return {} if self.alpha >= 0 else {"Renyi": super().bound(particles)}

    def reward(self, log_weights: Tensor) -> Tensor:
        """The bound; for alpha = 1 each particle's part of it."""
        if self.alpha == 1:
            return log_weights / self.num_particles
        return super().reward(log_weights)

    def reward_without_each(self, log_weights: Tensor, baseline: str) -> Tensor:
        """The same without each particle."""
        if self.alpha == 1:
            return mean_without_each(log_weights) / self.num_particles
        return without_each(log_weights, 1 - self.alpha, baseline)
