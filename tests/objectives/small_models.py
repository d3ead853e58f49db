"""Models small enough that every expectation over K draws of the guide is a sum.

Each is a Pyro pair, `model(x, p)` and `guide(x, p)`, and the same densities written out without
Pyro at `points`: all values that one draw of the guide can take, or Gauss-Hermite nodes for them.
Parameters are numbers; a Pyro pair gets one of each for every datum, so that one backward pass
gives the gradients of independent draws.
"""

import math
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro
import torch
from pyro.distributions import Bernoulli, Categorical, Normal
from torch import Tensor
from torch.nn.functional import softplus

__all__ = [
    "Chain",
    "Coins",
    "Gaussian",
    "Mixed",
    "Points",
    "Summed",
    "drawn_gradients",
    "parameters",
]


class Points(NamedTuple):
    """Every value of one draw, (P,): its chance, and the log-densities there, in nats."""

    chance: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor


def parameters(values: dict[str, float], num_data: int | None = None) -> SimpleNamespace:
    """Leaves in float64: one of each, or one for each datum."""
    shape = () if num_data is None else (num_data,)
    leaves = {
        name: torch.full(shape, value, dtype=torch.float64, requires_grad=True)
        for name, value in values.items()
    }
    return SimpleNamespace(**leaves)


def drawn_gradients(objective, toy, num_draws: int = 12_000, rounds: int = 4) -> Tensor:
    """Of independent draws, (parameters, draws): each datum has parameters of its own.

    In rounds, so that a baseline of past rewards comes into play.
    """
    p, q = parameters(toy.theta, num_draws), parameters(toy.phi, num_draws)
    x = torch.full((num_draws,), toy.x, dtype=torch.float64)
    leaves = [*vars(p).values(), *vars(q).values()]
    both = SimpleNamespace(**vars(p), **vars(q))
    found = []
    for _ in range(rounds):
        loss = objective.differentiable_loss(toy.model, toy.guide, x, both)
        gradients = torch.autograd.grad(-loss, leaves, allow_unused=True, materialize_grads=True)
        found.append(torch.stack(gradients))
    return torch.cat(found, 1)


def log_normal(z: Any, mean: Any, scale: Any) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return -(((z - mean) / scale) ** 2) / 2 - scale.log() - math.log(2 * math.pi) / 2


def log_bernoulli(z: Tensor, logits: Tensor) -> Tensor:
    return z * logits - softplus(logits)


def standard_normal(nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes and chances; equal steps for many, which is as exact and bears kinks."""
    if nodes > 100:
        e = torch.linspace(-7, 7, nodes, dtype=torch.float64)
        chance = (-(e**2) / 2).exp()
    else:
        e, chance = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(nodes))
    return e, chance / chance.sum()


def flat(*factors: Tensor) -> Points:
    """Factors on axes of their own, multiplied out to one list of points."""
    return Points(*(factor.flatten() for factor in torch.broadcast_tensors(*factors)))


BOTH = torch.tensor([0.0, 1.0], dtype=torch.float64)


class Gaussian:
    """z ~ N(m, 1), x | z ~ N(w z, 0.7); q(z | x) = N(a x + b, e^c)."""

    x = 1.2
    theta: ClassVar = {"m": 0.3, "w": 0.8}
    phi: ClassVar = {"a": 0.2, "b": 0.1, "c": -0.1}
    nodes: ClassVar = {1: 60, 2: 44, 4: 18}
    reparameterised = True

    def model(self, x, p):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(p.m, 1.0))
            pyro.sample("x", Normal(p.w * z, 0.7), obs=x)

    def guide(self, x, p):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(p.a * x + p.b, p.c.exp()))

    def points(self, p, drawn, q, nodes: int) -> Points:
        """z is drawn with the parameters `drawn`, and weighed with `p` and `q`."""
        e, chance = standard_normal(nodes)
        z = drawn.a * self.x + drawn.b + drawn.c.exp() * e
        log_q = log_normal(z, q.a * self.x + q.b, q.c.exp())
        return flat(chance, log_normal(self.x, p.w * z, 0.7), log_normal(z, p.m, 1.0), log_q)

    def elbo(self, p, q, beta: float = 1.0) -> Tensor:
        """In closed form, the KL term times beta."""
        mean, s = q.a * self.x + q.b, q.c.exp()
        error = (self.x - p.w * mean) ** 2 + (p.w * s) ** 2
        expected = -error / (2 * 0.7**2) - math.log(0.7) - math.log(2 * math.pi) / 2
        return expected - beta * ((s**2 + (mean - p.m) ** 2 - 1) / 2 - q.c)

    def log_q_of_dreams(self, p, q) -> Tensor:
        """E[log q(z | x)] over z and x of the model: z - a x - b is Gaussian."""
        mean = p.m * (1 - q.a * p.w) - q.b
        variance = (1 - q.a * p.w) ** 2 + (0.7 * q.a) ** 2
        return -(variance + mean**2) / (2 * (2 * q.c).exp()) - q.c


class Chain:
    """z2 ~ N(m, 1), z1 | z2 ~ N(w z2, 0.8), x | z1 ~ N(z1, 0.7); the guide draws z2 given z1."""

    x = 1.2
    theta: ClassVar = {"m": -0.2, "w": 0.7}
    phi: ClassVar = {"a": 0.3, "b": -0.2, "c": 0.2, "d": -0.1}
    nodes: ClassVar = {1: 20, 2: 18}
    reparameterised = True

    def model(self, x, p):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", Normal(p.m, 1.0))
            z1 = pyro.sample("z1", Normal(p.w * z2, 0.8))
            pyro.sample("x", Normal(z1, 0.7), obs=x)

    def guide(self, x, p):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Normal(p.a * x, p.b.exp()))
            pyro.sample("z2", Normal(p.c * z1, p.d.exp()))

    def points(self, p, drawn, q, nodes: int) -> Points:
        e, chance = standard_normal(nodes)
        z1 = (drawn.a * self.x + drawn.b.exp() * e)[:, None]
        z2 = drawn.c * z1 + drawn.d.exp() * e
        log_q = log_normal(z1, q.a * self.x, q.b.exp()) + log_normal(z2, q.c * z1, q.d.exp())
        log_prior = log_normal(z2, p.m, 1.0) + log_normal(z1, p.w * z2, 0.8)
        return flat(chance[:, None] * chance, log_normal(self.x, z1, 0.7), log_prior, log_q)


class Coins:
    """z1 ~ Bernoulli, z2 | z1 ~ Bernoulli, x ~ N(w (z1 + 2 z2), 1); q(z1) q(z2 | z1)."""

    x = 1.2
    theta: ClassVar = {"m": -0.4, "w": 0.9}
    phi: ClassVar = {"a": 0.6, "b": -0.5, "d": 0.8}
    nodes: ClassVar = {1: 2, 2: 2, 3: 2, 4: 2}
    reparameterised = False

    def model(self, x, p):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Bernoulli(logits=p.m))
            z2 = pyro.sample("z2", Bernoulli(logits=p.m + z1))
            pyro.sample("x", Normal(p.w * (z1 + 2 * z2), 1.0), obs=x)

    def guide(self, x, p):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Bernoulli(logits=p.a))
            pyro.sample("z2", Bernoulli(logits=p.b + p.d * z1))

    def log_prior(self, p) -> Tensor:
        return log_bernoulli(BOTH[:, None], p.m) + log_bernoulli(BOTH, p.m + BOTH[:, None])

    def log_q(self, q) -> Tensor:
        return log_bernoulli(BOTH[:, None], q.a) + log_bernoulli(BOTH, q.b + q.d * BOTH[:, None])

    def points(self, p, drawn, q, nodes: int) -> Points:
        log_likelihood = log_normal(self.x, p.w * (BOTH[:, None] + 2 * BOTH), 1.0)
        return flat(self.log_q(drawn).exp(), log_likelihood, self.log_prior(p), self.log_q(q))

    def log_q_of_dreams(self, p, q) -> Tensor:
        return (self.log_prior(p).exp() * self.log_q(q)).sum()


class Mixed:
    """z ~ N(m, 1), c | z ~ Bernoulli, y | c ~ N(w c, 1), x ~ N(z + y, 0.9); the guide likewise.

    In the guide a draw without reparameterisation depends on one with, and one with on it.
    """

    x = 1.2
    theta: ClassVar = {"m": 0.2, "w": 0.8, "l": 0.5}
    phi: ClassVar = {"a": 0.2, "b": -0.2, "g": -0.6, "h": 0.5, "k": -0.1}
    nodes: ClassVar = {1: 20, 2: 14}
    reparameterised = False

    def model(self, x, p):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(p.m, 1.0))
            c = pyro.sample("c", Bernoulli(logits=p.l * z))
            y = pyro.sample("y", Normal(p.w * c, 1.0))
            pyro.sample("x", Normal(z + y, 0.9), obs=x)

    def guide(self, x, p):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(p.a * x, p.b.exp()))
            c = pyro.sample("c", Bernoulli(logits=p.g * z))
            pyro.sample("y", Normal(p.h * c + 0.3 * z, p.k.exp()))

    def points(self, p, drawn, q, nodes: int) -> Points:
        e, chance = standard_normal(nodes)
        z = (drawn.a * self.x + drawn.b.exp() * e)[:, None, None]
        c = BOTH[:, None]
        y = drawn.h * c + 0.3 * z + drawn.k.exp() * e
        of_c = log_bernoulli(c, drawn.g * z).exp()
        log_q = log_normal(z, q.a * self.x, q.b.exp()) + log_bernoulli(c, q.g * z)
        log_q = log_q + log_normal(y, q.h * c + 0.3 * z, q.k.exp())
        log_prior = log_normal(z, p.m, 1.0) + log_bernoulli(c, p.l * z)
        log_prior = log_prior + log_normal(y, p.w * c, 1.0)
        together = chance[:, None, None] * of_c * chance
        return flat(together, log_normal(self.x, z + y, 0.9), log_prior, log_q)


class Summed:
    """c ~ Categorical, summed; z | c ~ N(w c, 0.6), x | z ~ N(z, 0.7); q(z | x) = N(a x, e^b)."""

    x = 1.2
    theta: ClassVar = {"l": 0.4, "w": 0.9}
    phi: ClassVar = {"a": 0.4, "b": -0.3}
    nodes: ClassVar = {1: 60, 2: 44, 4: 18}
    reparameterised = True

    def logits(self, p) -> Tensor:
        return torch.stack([0 * p.l, p.l, -p.l], -1)

    def model(self, x, p):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", Categorical(logits=self.logits(p)))
            z = pyro.sample("z", Normal(p.w * c, 0.6))
            pyro.sample("x", Normal(z, 0.7), obs=x)

    def guide(self, x, p):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(p.a * x, p.b.exp()))

    def points(self, p, drawn, q, nodes: int) -> Points:
        e, chance = standard_normal(nodes)
        z = drawn.a * self.x + drawn.b.exp() * e
        log_probs = self.logits(p) - self.logits(p).exp().sum().log()
        of_each = [log_probs[c] + log_normal(z, p.w * c, 0.6) for c in range(3)]
        log_prior = torch.stack(of_each).exp().sum(0).log()
        log_q = log_normal(z, q.a * self.x, q.b.exp())
        return flat(chance, log_normal(self.x, z, 0.7), log_prior, log_q)
