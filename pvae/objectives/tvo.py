"""The thermodynamic variational objective: log p(x) as an integral from guide to posterior.

    log p(x) = int_0^1 E_{pi_beta}[log w] d beta,     pi_beta(z) ~ q(z | x)^(1 - beta) p(x, z)^beta

The integrand rises with beta, so a left Riemann sum lies below log p(x), and one of a single
interval is the ELBO (Masrani, Le & Wood 2019, equations 3 to 7).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pvae import bounds
from pvae.objectives.gradient import Coefficients
from pvae.objectives.objective import Objective
from pvae.particles import Particles

__all__ = ["TVO"]


class TVO(Objective):
    """The left Riemann sum over betas, by self-normalised importance sampling from the guide.

    Its gradient is the covariance estimator (Masrani et al. 2019, eq. 11), which needs no
    reparameterisation, so that draws of every kind are treated alike. With few particles the
    estimate is no bound in expectation; history reports L_K, and TVO beside it.

    Args:
        num_particles: K, at least 2.
        betas: where the intervals begin, rising from 0, below 1. Left out: 0 and nineteen points
            from 0.025 on a logarithmic scale.

    Raises:
        ValueError: for fewer than two particles, or other betas.
    """

    cuts = True
    separates = True
    uses_signals = False

    def __init__(self, num_particles: int = 50, betas: Sequence[float] | None = None):
        super().__init__(num_particles, baseline="none")
        if num_particles < 2:
            raise ValueError("The covariances of TVO need at least 2 particles, got 1.")
        self.betas = betas if betas is None else tuple(betas)
        begins = bounds.log_uniform_betas() if self.betas is None else self.betas
        bounds.check_betas(begins)
        grid = torch.tensor([*begins, 1.0], dtype=torch.float64)
        self.register_buffer("grid", grid, persistent=False)

    grid: Tensor

    def value(self, log_weights: Tensor) -> Tensor:
        """The left Riemann sum."""
        return bounds.tvo(log_weights, self.grid)

    def coefficients(self, log_weights: Tensor) -> Coefficients:
        """Of E_pi[grad log w] + Cov_pi(grad log pi~_beta, log w), summed over intervals."""
        grid = self.grid.to(log_weights)
        betas, widths = grid[:-1].reshape(-1, 1, 1), grid.diff().reshape(-1, 1, 1)
        s = torch.where(betas > 0, betas * log_weights, 0.0).softmax(1)
        centred = log_weights - (s * log_weights).sum(1, keepdim=True)
        centred = centred * (self.num_particles / (self.num_particles - 1))  # as of any covariance
        model = widths * s * (1 + betas * centred)
        score = widths * s * ((1 - betas) * centred - 1)
        return Coefficients(model=model.sum(0), score=score.sum(0), path=None)

    def bound(self, particles: Particles) -> Tensor:
        """L_K."""
        return particles.scale * bounds.iwae(particles.log_weights)

    def extras(self, particles: Particles) -> dict[str, Tensor]:
        """The objective's own estimate."""
        return {"TVO": particles.scale * self.value(particles.log_weights)}
