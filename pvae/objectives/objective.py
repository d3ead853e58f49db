"""What every objective is: a number for each datum, its gradient, and three ways to ask for them.

    Programs  --draw-->  Particles  --surrogate-->  a scalar to differentiate

The same object runs in `pvae.fit` (mean over the batch), in `pyro.infer.SVI` (sum, with scale, as
Pyro's own classes do), and as `objective(model, guide)` in a loop of one's own. Scales multiply the
value of each datum; they never enter the logarithm of a sum.
"""

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pyro.infer
import torch
from torch import Tensor, nn

from pvae.objectives import baselines
from pvae.objectives.checks import check_cuts, check_sites
from pvae.objectives.gradient import Coefficients, gradient_of, weighted
from pvae.pair import announce
from pvae.particles import Particles, check_count
from pvae.plates import find_plates
from pvae.programs import Programs, find_places

__all__ = ["Objective"]


class Objective(pyro.infer.ELBO, nn.Module):
    """A function of log-weights that SVI maximises.

    Subclasses give `value`; and `coefficients`, where the gradient is not that of the value.

    Args:
        num_particles: K, particles for each datum.
        baseline: for guide sites without reparameterisation; see `baselines`.

    Attributes:
        draws: particles drawn for each datum in all.
        cuts: whether the gradient is put together from `coefficients`.
        separates: whether these treat the guide's score otherwise than its draws.
        dreams: whether the guide also learns from data that the model draws.
        uses_signals: whether draws without reparameterisation need a learning signal; False where
            the score of every draw is among the coefficients.

    Raises:
        ValueError: if K is below 1, or there is no such baseline.
    """

    cuts = False
    separates = False
    dreams = False
    gradient = "pathwise"
    uses_signals = True
    auto_baseline = "vimco"

    def __init__(self, num_particles: int = 1, baseline: Any = "auto"):
        check_count("num_particles", num_particles)
        baselines.check(baseline)
        nn.Module.__init__(self)
        pyro.infer.ELBO.__init__(self, num_particles=num_particles)
        self.baseline = baseline
        self.kept = nn.ModuleDict()  # baselines with a state, by site
        self.calls = 0
        self._found: Any = None
        self._is_prepared = False

    @property
    def draws(self) -> int:
        """Particles drawn for each datum."""
        return self.num_particles

    # ------------------------------------------------------------------ what subclasses say

    def value(self, log_weights: Tensor) -> Tensor:
        """The objective of each datum, (K, N) -> (N,), in nats, larger is better."""
        raise NotImplementedError

    def coefficients(self, log_weights: Tensor) -> Coefficients:
        """Of the gradient, where `cuts` is true; see `gradient`."""
        raise NotImplementedError

    def reward(self, log_weights: Tensor) -> Tensor:
        """What each particle's draws without reparameterisation have brought, (K, N)."""
        return self.value(log_weights).expand_as(log_weights)

    def reward_without_each(self, log_weights: Tensor, baseline: str) -> Tensor:
        """The same as the other particles tell it, (K, N)."""
        raise NotImplementedError

    def bound(self, particles: Particles) -> Tensor:
        """The lower bound of log p(x) that history and validation report, (N,), in nats.

        The objective itself where that is one, else L_K.
        """
        return particles.scale * self.value(particles.log_weights)

    def extras(self, particles: Particles) -> dict[str, Tensor]:
        """What history reports beside the bound, (N,) each: the objective, where it is another."""
        return {}

    # ------------------------------------------------------------------ value and gradient

    def draw(self, programs: Programs) -> Particles:
        """The particles that the objective is a function of."""
        return programs.draw(self.draws, cut=self.cuts and torch.is_grad_enabled())

    def estimate(self, programs: Programs) -> tuple[Particles, Tensor]:
        """Draw particles; the objective summed over data, as a scalar with its gradient."""
        particles = self.draw(programs)
        return particles, self.surrogate(particles)

    def surrogate(self, particles: Particles) -> Tensor:
        """The objective summed over data, a scalar whose gradient is the estimator's.

        Raises:
            ValueError: if sites of a datum have different scales.
        """
        log_w, scale = particles.log_weights, particles.scale
        if not torch.is_grad_enabled():
            return (scale * self.value(log_w)).sum()
        fixed = log_w.detach()
        signals, learning = self.signals(particles, fixed, scale)
        if self.cuts:
            coefficients = self.coefficients(fixed) * scale
            total = (scale * self.value(fixed)).sum()
            return total + gradient_of(particles, coefficients, signals) + learning
        total = (scale * self.value(log_w)).sum()
        return total + self.score_terms(particles, signals) + learning

    def score_terms(self, particles: Particles, signals: dict[str, Tensor]) -> Any:
        """Zero, with the gradient through the probabilities of draws without reparameterisation."""
        return sum(weighted(signal, particles.log_q[name]) for name, signal in signals.items())

    def signals(
        self, particles: Particles, fixed: Tensor, scale: Any = 1.0
    ) -> tuple[dict[str, Tensor], Any]:
        """Reward less baseline by site without reparameterisation, (K, N), times the scale.

        Also zero, with the gradient of learned baselines towards the reward (squared error).
        """
        signals: dict[str, Tensor] = {}
        learning: Any = 0.0
        sites = particles.score_sites if self.uses_signals else ()
        reward = self.reward(fixed) if sites else fixed
        for name in sites:
            chosen = self._chosen(name)
            if chosen == "none":
                b: Any = 0.0
            elif chosen in ("vimco", "leave-one-out"):
                b = self.reward_without_each(fixed, chosen)
            elif chosen == "average":
                b = self._kept(name)(reward)
            else:
                predicted = self._kept(name)(baselines.observed_matrix(particles))
                b = predicted.detach()
                learning = learning + weighted(2 * (reward.mean(0) - b), predicted)
            signals[name] = scale * (reward - b)
        return signals, learning

    def _chosen(self, name: str) -> Any:
        return baselines.name_for(self.baseline, name, self.num_particles, self.auto_baseline)

    def prepare(self, programs: Programs) -> None:
        """Check the objective against the guide's sites, and make baselines that learn. Once.

        Raises:
            ValueError: for names that are no sites, or a guide whose gradient cannot be told so.
        """
        if self._is_prepared:
            return
        sites = programs.guide_sites()
        check_sites(self, sites)
        if self.cuts:
            check_cuts(self, programs)
        self._is_prepared = True
        names = [name for name, site in sites.items() if not site["fn"].has_rsample]
        if not names or not self.uses_signals:
            return
        with programs.looking():
            particles = programs.draw()
        for name in names:
            kept = baselines.make(self._chosen(name), particles)
            if kept is not None and not baselines.alike(self._kept(name), kept):
                self.kept[_key(name)] = kept

    def _kept(self, name: str) -> Any:
        return dict(self.kept.items()).get(_key(name))

    def at(self, step: int) -> None:
        """Be what the objective is after this many steps, if it changes with them."""

    # ------------------------------------------------------------------ Pyro's interface

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the objective, summed over data: a scalar to call `backward` on."""
        programs = self._programs(model, guide, args, kwargs)
        self.prepare(programs)
        announce("objective", self)
        if torch.is_grad_enabled():
            self.at(self.calls)
            self.calls += 1
        return -self.estimate(programs)[1]

    def _programs(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Programs:
        """With plates found at the first call of each pair: one objective may serve several."""
        if self._found is None or self._found[:2] != (model, guide):
            plates = find_plates(model, guide, args, kwargs)
            places = find_places(model, guide, args, kwargs) if self.dreams else None
            self._is_prepared = False  # baselines stay: the programs may be wrapped anew each time
            self._found = (model, guide, plates, places)
        plates, places = self._found[2:]
        return Programs(model, guide, args, kwargs, plates, places=places)

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Minus the objective, summed over data, without gradients."""
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

    def fresh(self) -> "Objective":
        """A copy that has met no programs yet."""
        copied = copy.deepcopy(self)
        copied._found, copied._is_prepared, copied.calls = None, False, 0
        copied.kept.clear()
        return copied

    def get_extra_state(self) -> Tensor:
        """Steps taken, for `state_dict`: where a schedule stands."""
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        """Steps taken, by `load_state_dict`."""
        self.calls = int(state)

    def __getstate__(self) -> dict[str, Any]:
        """Copies are of the objective alone, not of the programs that it has met."""
        return {**self.__dict__, "_found": None}

    def __repr__(self) -> str:
        """The call that makes it, defaults left out."""
        shown = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name == "self" or not hasattr(self, name):
                continue
            value = getattr(self, name)
            if name in ("num_means", "num_particles") or value != parameter.default:
                shown.append(f"{name}={_text(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _key(name: str) -> str:
    """A site's name as that of a module, which has no dots and is no attribute."""
    return "of " + name.replace(".", ":")


def _text(value: Any) -> str:
    """The same in every process: a function by its name, a network by its class."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_text(v)}" for key, v in value.items()) + "}"
    if isinstance(value, nn.Module) and not isinstance(value, Objective):
        return type(value).__name__
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x\w+", "", repr(value))
