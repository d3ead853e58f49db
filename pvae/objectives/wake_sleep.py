"""Two programs, two aims: the model raises L_K, the guide lowers KL[p(z | x) || q(z | x)].

    wake, model   sum_k w~_k grad log p(x, z_k)                  z_k ~ q(z | x)
    wake, guide   sum_k w~_k grad log q(z_k | x)
    sleep, guide  grad log q(z | x)                              z, x ~ p(x, z)

No draw is differentiated, so discrete latents are as good as any (Bornschein & Bengio 2015).
"""

from typing import Literal

import torch
from torch import Tensor

from pvae import bounds
from pvae.objectives.gradient import Coefficients
from pvae.objectives.objective import Objective
from pvae.particles import Particles
from pvae.programs import Programs

__all__ = ["ForwardKL", "ReweightedWakeSleep"]


class ReweightedWakeSleep(Objective):
    """Reweighted wake-sleep (Bornschein & Bengio 2015, equations 6, 9 and 10).

    The loss is -L_K, what the model maximises; the guide has an objective of its own. The wake
    gradient is biased towards the draws at hand, by 1/K; the sleep gradient is unbiased for data of
    the model, which early in training are not like those given.

    Args:
        num_particles: K.
        guide: phase in which the guide learns: "wake", "sleep", or "both", half of each.
    """

    cuts = True
    separates = True
    uses_signals = False

    def __init__(self, num_particles: int = 50, guide: Literal["wake", "sleep", "both"] = "wake"):
        super().__init__(num_particles, baseline="none")
        if guide not in ("wake", "sleep", "both"):
            raise ValueError(f"`guide` must be 'wake', 'sleep' or 'both', got {guide!r}.")
        self.guide = guide
        self.dreams = guide != "wake"

    def value(self, log_weights: Tensor) -> Tensor:
        """L_K, which the model maximises."""
        return bounds.iwae(log_weights)

    def coefficients(self, log_weights: Tensor) -> Coefficients:
        """w~ for model and guide, the latter's shared with the dreams."""
        w = log_weights.softmax(0)
        wake = {"wake": 1.0, "sleep": 0.0, "both": 0.5}[self.guide]
        return Coefficients(model=w, score=wake * w if wake else None, path=None)

    def estimate(self, programs: Programs) -> tuple[Particles, Tensor]:
        """The wake phases, and as many dreams as there are data."""
        particles, total = super().estimate(programs)
        if self.dreams and torch.is_grad_enabled():
            log_q = programs.dream()
            sleep = 1.0 if self.guide == "sleep" else 0.5
            total = total + (sleep * particles.scale * (log_q - log_q.detach())).sum()
        return particles, total


class ForwardKL(Objective):
    """The guide minimises KL[p(z | x) || q(z | x)] on the data, the model maximises L_K.

    By self-normalised importance sampling (Bornschein & Bengio 2015, eq. 9), or through the draws
    with less variance and the same expectation (Tucker et al. 2018, eq. 11). Biased by 1/K.

    Args:
        num_particles: K.
        gradient: "score", or "dreg", which needs a guide all of whose sites are reparameterised.
    """

    cuts = True
    separates = True
    uses_signals = False

    def __init__(self, num_particles: int = 50, gradient: Literal["score", "dreg"] = "score"):
        super().__init__(num_particles, baseline="none")
        if gradient not in ("score", "dreg"):
            raise ValueError(f"`gradient` must be 'score' or 'dreg', got {gradient!r}.")
        self.gradient = gradient

    def value(self, log_weights: Tensor) -> Tensor:
        """L_K, which the model maximises."""
        return bounds.iwae(log_weights)

    def coefficients(self, log_weights: Tensor) -> Coefficients:
        """w~ on log q, or w~ - w~^2 through the draws."""
        w = log_weights.softmax(0)
        if self.gradient == "score":
            return Coefficients(model=w, score=w, path=None)
        return Coefficients(model=w, score=None, path=w - w.square())
