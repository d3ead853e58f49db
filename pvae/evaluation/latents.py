"""The continuous latents of a pair as one real vector a particle, and the densities over it.

    z (K, N, D)  --density-->  log p(x, z), log p(z) or log q(z | x), (K, N), and gradients in z

Latents on other supports than the real line are moved there by `biject_to`, whose Jacobian is part
of each density; discrete latents that the guide does not draw are summed out.
"""

import math
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import VonMises, biject_to, constraints

from pvae.pair import Batch, Pair
from pvae.particles import draw, guide_factors

__all__ = ["Latents", "Start"]

Start = Literal["prior", "guide"]


class Latents:
    """Latents that the guide draws, as a vector of D real numbers.

    Args:
        pair: in evaluation mode, prepared for its data.
        batch: some of its data, from which sizes are read.
        what: who asks, for messages.

    Raises:
        ValueError: for latents that are not continuous, or lie in a plate within the datum.
    """

    def __init__(self, pair: Pair, batch: Batch, what: str):
        particles = pair.draw(batch)
        self.pair = pair
        self.names = [name for name in particles.log_q if name in particles.model_sites]
        self.shapes: dict[str, torch.Size] = {}
        self.transforms: dict[str, Any] = {}
        if not self.names:
            raise ValueError(
                f"{what} moves latents, and {pair.name!r} has none that the guide draws: its "
                "log p(x) is exact, see pvae.evaluate."
            )
        if not pair.vectorize_particles:
            raise ValueError(
                f"{what} moves many chains at once, and {pair.name!r} takes particles one at a "
                "time (`vectorize_particles=False`). Use `evaluate`."
            )
        for name in self.names:
            support: Any = _support(particles.model_sites[name])
            if support.is_discrete:
                raise ValueError(
                    f"{what} moves continuous latents by their gradient, and {name!r} of "
                    f"{pair.name!r} is discrete: leave it out of the guide to have it summed out."
                )
            if particles.values[name].shape[:2] != particles.shape or pair.plates.nesting > 1:
                raise ValueError(
                    f"{what} takes latents that lie in the data's plate alone, with the parts of "
                    f"a datum in `.to_event(...)`; {name!r} of {pair.name!r} does not."
                )
            self.transforms[name] = biject_to(support)
            free = self.transforms[name].inverse_shape(particles.values[name].shape[2:])
            self.shapes[name] = torch.Size(free)
        self.size = sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, values: dict[str, Tensor]) -> Tensor:
        """(K, N, *event) by latent -> (K, N, D)."""
        free = [self.transforms[name].inv(values[name]) for name in self.names]
        return torch.cat([value.reshape(*value.shape[:2], -1) for value in free], -1)

    def unflatten(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(K, N, D) -> values by latent, and the log of the Jacobian, (K, N)."""
        values, log_jacobian = {}, z.new_zeros(z.shape[:2])
        parts = z.split([shape.numel() for shape in self.shapes.values()], -1)
        for part, (name, shape) in zip(parts, self.shapes.items(), strict=True):
            free = part.reshape(*z.shape[:2], *shape)
            transform = self.transforms[name]
            values[name] = transform(free)
            each = transform.log_abs_det_jacobian(free, values[name])
            log_jacobian = log_jacobian + each.reshape(*z.shape[:2], -1).sum(-1)
        return values, log_jacobian

    def draw(self, batch: Batch, num_particles: int, start: Start) -> Tensor:
        """z from the prior or the guide, (K, N, D)."""
        particles = self.pair.programs(batch, start).draw(num_particles)
        return self.flatten(particles.values)

    def log_densities(self, batch: Batch, z: Tensor, start: Start) -> tuple[Tensor, Tensor]:
        """Of where a path starts, log p(z) or log q(z | x), and log p(x, z): (K, N) each, nats."""
        values, log_jacobian = self.unflatten(z)
        model = poutine.condition(self.pair.model, values)
        particles = draw(model, _nothing, (batch,), num_particles=len(z), plates=self.pair.plates)
        if start == "prior":
            first = particles.log_joint_of([*self.names, *particles.summed])
        else:
            first = self._log_q(batch, values)
        return first + log_jacobian, particles.log_joint + log_jacobian

    def _log_q(self, batch: Batch, values: dict[str, Tensor]) -> Tensor:
        plates = self.pair.plates
        some = next(iter(values.values()))
        guide = poutine.condition(self.pair.guide, values)
        with pyro.plate("particles", len(some), dim=-1 - plates.nesting):
            trace = poutine.trace(guide).get_trace(batch)
        factors = guide_factors(trace, plates)
        return sum(factors, torch.zeros(())).expand(some.shape[:2])


def _support(d: Any) -> Any:
    """Where draws are: an angle's, which torch calls real, are within half a turn."""
    base = d
    while hasattr(base, "base_dist"):
        base = base.base_dist
    if not isinstance(base, VonMises):
        return d.support
    within = constraints.interval(-math.pi, math.pi)
    return constraints.independent(within, len(d.event_shape)) if d.event_shape else within


def _nothing(batch: Batch) -> None:
    """A guide that draws nothing: every latent is given, or summed out."""
