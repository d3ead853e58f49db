"""The evidence lower bound; its KL terms sampled or in closed form, weighted, or above a floor.

    ELBO = E_q[log p(x | z)] - sum over latents of KL[q(z | x) || p(z)]

What is weighted (beta, free bits) is no bound that two models could be compared by: history shows
it as "weighted", beside the bound.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pvae import bounds
from pvae.objectives import baselines
from pvae.objectives.gradient import through_draws, weighted
from pvae.objectives.objective import Objective
from pvae.particles import Particles

__all__ = ["ELBO"]

KL = Literal["sampled", "analytic"]


class ELBO(Objective):
    """The evidence lower bound, E_q[log p(x, z) - log q(z | x)] (Kingma & Welling 2014, eq. 2).

    Several particles lower its variance and leave the bound where it is: it is the average of K
    ELBOs, as in Pyro's `Trace_ELBO`, and not the tighter `IWAE(num_particles=K)`.

    Args:
        num_particles: K.
        gradient: "pathwise", or "stl": without the guide's score, of no variance where the guide
            is exact (Roeder et al. 2017, eq. 7). That needs a guide all of whose sites are
            reparameterised, and sampled KL terms.
        kl: "sampled", log q - log p at the particles; "analytic", in closed form where torch
            knows it and all that p depends on is drawn before (Kingma & Welling 2014, eq. 7),
            elsewhere sampled; or these by latent.
        beta: weight of the KL terms (Higgins et al. 2017, eq. 4), or a function from the number of
            steps taken to it, such as `WarmUp(1000)` or `Cyclical(10_000)`.
        free_bits: lambda, in nats: a KL term whose mean over the batch is below counts as lambda,
            and has no gradient (Kingma et al. 2016, eq. 15).
        free_bits_per: "site" or "unit", of what lambda is the floor.
        baseline: of guide sites without reparameterisation; see `baselines`. "auto" is
            leave-one-out, for one particle a decaying average.

    Raises:
        ValueError: for K below 1, or an argument without meaning.
    """

    auto_baseline = "leave-one-out"

    def __init__(
        self,
        num_particles: int = 1,
        *,
        gradient: Literal["pathwise", "stl"] = "pathwise",
        kl: KL | Mapping[str, KL] = "sampled",
        beta: float | Callable[[int], float] = 1.0,
        free_bits: float = 0.0,
        free_bits_per: Literal["site", "unit"] = "site",
        baseline: Any = "auto",
    ):
        super().__init__(num_particles, baseline)
        self.gradient, self.kl = gradient, kl
        if isinstance(beta, str):
            raise TypeError(f"`beta` must be a number or a function of the step, got {beta!r}.")
        self.beta = beta if callable(beta) else float(beta)
        self.free_bits, self.free_bits_per = free_bits, free_bits_per
        self._check()
        self.cuts = self.separates = gradient == "stl"
        now = self.beta(0) if callable(self.beta) else self.beta
        self.register_buffer("beta_now", torch.tensor(now, dtype=torch.float64), persistent=False)

    beta_now: Tensor

    def _check(self) -> None:
        if self.gradient not in ("pathwise", "stl"):
            raise ValueError(f"`gradient` must be 'pathwise' or 'stl', got {self.gradient!r}.")
        for kl in self.kl.values() if isinstance(self.kl, Mapping) else [self.kl]:
            if kl not in ("sampled", "analytic"):
                raise ValueError(
                    f"`kl` must be 'sampled', 'analytic', or these by latent; got {kl!r}."
                )
        _checked(self.beta(0) if callable(self.beta) else self.beta)
        if not self.free_bits >= 0:
            raise ValueError(f"`free_bits` must be at least 0 nats, got {self.free_bits}.")
        if self.free_bits_per not in ("site", "unit"):
            raise ValueError(
                f"`free_bits_per` must be 'site' or 'unit', got {self.free_bits_per!r}."
            )
        if self.gradient == "stl" and (self.kl != "sampled" or self.free_bits):
            raise ValueError(
                "gradient='stl' leaves out the score of sampled KL terms: it goes with "
                "kl='sampled' and without free bits."
            )

    @property
    def is_weighted(self) -> bool:
        """Whether the objective is another than the bound."""
        return callable(self.beta) or self.beta != 1 or self.free_bits > 0

    def at(self, step: int) -> None:
        """Set beta to its value after this many steps."""
        if callable(self.beta):
            self.beta_now.fill_(_checked(self.beta(step)))

    # ------------------------------------------------------------------ the integrand

    def bound(self, particles: Particles) -> Tensor:
        """The ELBO, unweighted, (N,)."""
        return bounds.elbo(self._integrand(particles, weigh=False))

    def extras(self, particles: Particles) -> dict[str, Tensor]:
        """The weighted objective, where it is another than the bound."""
        if not self.is_weighted:
            return {}
        return {"weighted": bounds.elbo(self._integrand(particles, weigh=True))}

    def reward(self, f: Tensor) -> Tensor:
        """Each particle's own part, (K, N)."""
        return f / self.num_particles

    def reward_without_each(self, f: Tensor, baseline: str) -> Tensor:
        """The mean of the others."""
        return baselines.mean_without_each(f) / self.num_particles

    def surrogate(self, particles: Particles) -> Tensor:
        """The objective summed over data, a scalar whose gradient is the estimator's."""
        f = self._integrand(particles, weigh=self.is_weighted)
        if not torch.is_grad_enabled():
            return bounds.elbo(f).sum()
        if self.cuts:
            total = bounds.elbo(f.detach()).sum()
            return total + self._stick_the_landing(particles, f)
        signals, learning = self.signals(particles, f.detach())
        return bounds.elbo(f).sum() + self.score_terms(particles, signals) + learning

    def _stick_the_landing(self, particles: Particles, f: Tensor) -> Tensor:
        """Zero, with the gradient of f but for the guide's own score."""
        each = torch.full_like(f, 1 / self.num_particles)
        total = weighted(each, f + _guides_part(particles, self._beta()))
        if particles.cuts:
            total = total + through_draws(weighted(each, f), particles.cuts)
        return total

    def _beta(self) -> Any:
        return self.beta_now if callable(self.beta) else self.beta

    def _integrand(self, particles: Particles, weigh: bool) -> Tensor:
        """What the ELBO is the mean of, (K, N), each site's factor with its own scale."""
        if not weigh and self.kl == "sampled":
            return _scaled_log_weights(particles)
        beta, floor = (self._beta(), self.free_bits) if weigh else (1.0, 0.0)
        total = torch.zeros(particles.shape).to(particles.log_weights)
        for key, term in particles.terms().items():
            kind, _, name = key[:-1].partition("[")
            if kind == "KL":
                total = total - beta * self._kl(particles, name, term, floor)
            else:
                total = total + particles.scales[name] * term
        return total

    def _kl(self, particles: Particles, name: str, sampled: Tensor, floor: float) -> Tensor:
        """A KL term, scaled, (K, N): sampled or in closed form, above the floor if there is one.

        Raises:
            ValueError: where a closed form or a floor is asked for, and cannot be had.
        """
        if not particles.agrees(name):
            self._refuse_apart(name, floor)
            log_q, log_p = particles.log_q[name], particles.log_p[name]
            return particles.guide_scales[name] * log_q - particles.scales[name] * log_p
        analytic = self._analytic(particles, name)
        kl = sampled if analytic is None else analytic
        if floor and self.free_bits_per == "unit":
            kl = self._by_unit(particles, name, analytic)
        elif floor:
            kl = self._at_least(kl, particles.seen(name))
        summed = name not in particles.log_q  # several names, perhaps, of one scale
        return (particles.scale if summed else particles.guide_scales[name]) * kl

    def _refuse_apart(self, name: str, floor: float) -> None:
        if floor or (isinstance(self.kl, Mapping) and self.kl.get(name) == "analytic"):
            raise ValueError(
                f"KL[{name}] is no one term where {name!r} has another scale or mask in the guide "
                "than in the model: give both the same, or use sampled terms without free bits."
            )

    def _analytic(self, particles: Particles, name: str) -> Tensor | None:
        """KL of a latent in closed form, (K, N), where it is asked for and known."""
        chosen = self.kl.get(name, "sampled") if isinstance(self.kl, Mapping) else self.kl
        if chosen == "sampled" or name not in particles.log_q:
            return None
        found = particles.analytic_kl(name)
        if found is None and isinstance(self.kl, Mapping):
            raise ValueError(
                f"KL[{name}] has no closed form here: torch knows none for its distributions, or "
                "p depends on a latent that the guide draws later. Use 'sampled'."
            )
        return found

    def _at_least(self, kl: Tensor, seen: Tensor) -> Tensor:
        """Each term, or lambda where its mean over particles and data that are seen is below."""
        seen = seen.reshape(*seen.shape, *(1,) * (kl.dim() - 2)).to(kl)
        mean = (kl * seen).sum((0, 1)) / seen.expand_as(kl).sum((0, 1))
        return torch.where(mean > self.free_bits, kl, self.free_bits * seen)

    def _by_unit(self, particles: Particles, name: str, analytic: Tensor | None) -> Tensor:
        known = name in particles.log_q and name in particles.model_sites
        kl = particles.unit_kl(name, analytic is not None) if known else None
        if kl is None:
            raise ValueError(
                f"Free bits per unit need a guide and a prior of {name!r} that both factorise over "
                "its units, in the data's plate alone and on no summed latent: use "
                "free_bits_per='site'."
            )
        return self._at_least(kl, particles.seen(name)).reshape(*particles.shape, -1).sum(2)


def _checked(beta: Any) -> float:
    """A KL weight.

    Raises:
        ValueError: if it is none.
    """
    if not 0 <= float(beta) < math.inf:
        raise ValueError(f"`beta` must be a weight of at least 0, got {beta}.")
    return float(beta)


def _guides_part(particles: Particles, beta: Any) -> Tensor:
    """beta log q, scaled: what the guide's score is the gradient of."""
    scaled = [particles.guide_scales[name] * log_q for name, log_q in particles.log_q.items()]
    return beta * sum(scaled, torch.zeros(())).expand(particles.shape)


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
