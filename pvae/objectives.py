"""What SVI maximises: bounds of log p(x) with gradients, each a `pyro.infer.ELBO`.

    Particles  --per_datum-->  (N,), nats, a bound of log p(x_n) for each datum

The same object runs in `pvae.fit` (mean over the batch) and in `pyro.infer.SVI` (sum, with scale,
as Pyro's own classes do). Scales multiply the bound of each datum; they never enter the logarithm
of a sum. Gradients pass through reparameterised draws; guide sites without reparameterisation get
the score-function term, so that every gradient is of the stated bound.
"""

from collections.abc import Callable
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pvae import bounds
from pvae.particles import Particles, Plates, check_count, draw, find_plates

__all__ = ["ELBO", "IWAE", "Objective"]


class Objective(pyro.infer.ELBO):
    """A bound as a function of `Particles`. Subclasses give `per_datum`.

    Args:
        num_particles: K, particles for each datum.

    Raises:
        ValueError: if K is below 1.
    """

    def __init__(self, num_particles: int = 1):
        check_count("num_particles", num_particles)
        super().__init__(num_particles=num_particles)
        self._found: tuple[Any, Any, Plates] | None = None

    def per_datum(self, particles: Particles) -> Tensor:
        """The scaled bound of each datum, (N,), in nats, with its gradient."""
        raise NotImplementedError

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound, summed over data: a scalar to call `backward` on."""
        plates = self._plates(model, guide, args, kwargs)
        particles = draw(
            model, guide, args, kwargs, num_particles=self.num_particles, plates=plates
        )
        return -self.per_datum(particles).sum()

    def _plates(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Plates:
        """Found at the first call with each pair, since one objective may serve several."""
        if self._found is None or self._found[:2] != (model, guide):
            self._found = (model, guide, find_plates(model, guide, args, kwargs))
        return self._found[2]

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Minus the bound, summed over data, without gradients."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss, after adding its gradients to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        """Abstract in `pyro.infer.ELBO`; here `draw` traces both programs."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"


class ELBO(Objective):
    """The evidence lower bound, E_q[log p(x, z) - log q(z | x)] (Kingma & Welling 2014, eq. 2).

    Several particles lower its variance and leave the bound where it is: it is the average of K
    ELBOs, as in Pyro's `Trace_ELBO`, and not the tighter `IWAE(num_particles=K)`.
    """

    def per_datum(self, particles: Particles) -> Tensor:
        """Mean over particles of log w; each site's factor has its own scale (KL annealing)."""
        log_w = _scaled_log_weights(particles)
        if particles.score is None:
            return bounds.elbo(log_w)
        return bounds.elbo(log_w + log_w.detach() * _only_gradient(particles.score))


class IWAE(Objective):
    """The importance-weighted bound, L_K = E[log (1/K) sum_k w_k] (Burda et al. 2016, eq. 8).

    At least as tight as the ELBO, by more as K grows; for K = 1 it is the ELBO.
    """

    def __init__(self, num_particles: int = 50):
        super().__init__(num_particles)

    def per_datum(self, particles: Particles) -> Tensor:
        """log mean_k w_k, times the datum's scale.

        Raises:
            ValueError: if sites of a datum have different scales.
        """
        bound = bounds.iwae(particles.log_weights)
        if particles.score is not None:
            bound = bound + bound.detach() * _only_gradient(particles.score).sum(0)
        return particles.scale * bound


def _only_gradient(score: Tensor) -> Tensor:
    return score - score.detach()


def _scaled_log_weights(particles: Particles) -> Tensor:
    scales = [*particles.scales.values(), *particles.guide_scales.values()]
    numbers = not any(isinstance(scale, Tensor) for scale in scales)
    if particles.summed or (numbers and particles.has_one_scale):
        return particles.scale * particles.log_weights
    total = torch.zeros(())
    for name, log_p in particles.log_p.items():
        total = total + particles.scales[name] * log_p
    for name, log_q in particles.log_q.items():
        total = total - particles.guide_scales[name] * log_q
    return total.expand(particles.shape)
