"""Mixtures whose component is summed out: of Gaussians, and of linear-Gaussian models."""

from dataclasses import dataclass

import pyro
import torch
from pyro.distributions import Categorical, Normal
from torch import Tensor

from pvae import Latent, LatentModel, Learned, Observed, PyroPair
from pvae.nets import Linear, Table
from tests.exact.linear_gaussian import gaussian_log_prob, identity
from tests.exact.parameters import generator, normal, with_parameters


def draw_component(probs: Tensor, num_data: int, seed: int) -> Tensor:
    return torch.multinomial(probs, num_data, replacement=True, generator=generator(seed))


@dataclass(frozen=True)
class GaussianMixture:
    """c ~ Categorical(probs), x | c ~ N(loc_c, diag scale_c^2)."""

    probs: Tensor  # (C,)
    loc: Tensor  # (C, D)
    scale: Tensor  # (C, D)

    @classmethod
    def drawn(cls, data_size: int = 2, components: int = 3, seed: int = 21) -> "GaussianMixture":
        probs = normal(components, seed=seed).softmax(0)
        loc = 2 * normal(components, data_size, seed=seed + 1)
        return cls(probs, loc, (0.3 * normal(components, data_size, seed=seed + 2)).exp())

    def sample(self, num_data: int, seed: int = 0) -> Tensor:
        c = draw_component(self.probs, num_data, seed)
        return self.loc[c] + self.scale[c] * normal(num_data, self.loc.shape[1], seed=seed + 1)

    def joint(self, x: Tensor) -> Tensor:
        """log p(x, c), (C, N)."""
        terms = [
            p.log() + gaussian_log_prob(x, m, s.square().diag())
            for p, m, s in zip(self.probs, self.loc, self.scale, strict=True)
        ]
        return torch.stack(terms)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log of a sum, the largest term taken out by hand."""
        joint = self.joint(x)
        top = joint.max(0).values
        return top + (joint - top).exp().sum(0).log()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            infer = {"enumerate": "parallel"}  # for Pyro's own; pvae needs no mark
            c = pyro.sample("c", Categorical(self.probs), infer=infer)
            pyro.sample("x", Normal(self.loc[c], self.scale[c]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing to draw."""

    def pair(self) -> PyroPair:
        return PyroPair(self.model, self.guide)

    def declared(self) -> LatentModel:
        C, D = self.loc.shape
        model = LatentModel(
            c=Latent(Categorical, C, logits=Learned(0.0, C)),
            x=Observed(Normal, D, given="c", net=Table()),
        )
        return with_parameters(model, c=(self.probs.log(),), x=(self.loc, self.scale.log()))


@dataclass(frozen=True)
class LinearMixture:
    """c ~ Categorical(probs), z | c ~ N(loc_c, s^2 I), x | z, c ~ N(W z + b_c, t^2 I).

    Discrete and continuous latents, the first a parent of the second.
    """

    probs: Tensor  # (C,)
    loc: Tensor  # (C, d)
    s: float
    W: Tensor  # (D, d)
    b: Tensor  # (C, D)
    t: float

    @classmethod
    def drawn(
        cls, data_size: int = 3, latent_size: int = 2, components: int = 3, seed: int = 31
    ) -> "LinearMixture":
        return cls(
            probs=normal(components, seed=seed).softmax(0),
            loc=normal(components, latent_size, seed=seed + 1),
            s=0.75,
            W=normal(data_size, latent_size, seed=seed + 2),
            b=normal(components, data_size, seed=seed + 3),
            t=0.625,
        )

    def sample(self, num_data: int, seed: int = 0) -> Tensor:
        c = draw_component(self.probs, num_data, seed)
        D, d = self.W.shape
        z = self.loc[c] + self.s * normal(num_data, d, seed=seed + 1)
        return z @ self.W.T + self.b[c] + self.t * normal(num_data, D, seed=seed + 2)

    def log_prob(self, x: Tensor) -> Tensor:
        C = self.s**2 * self.W @ self.W.T + self.t**2 * identity(len(self.W))
        terms = [
            p.log() + gaussian_log_prob(x, self.W @ m + b, C)
            for p, m, b in zip(self.probs, self.loc, self.b, strict=True)
        ]
        return torch.stack(terms).logsumexp(0)

    def joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z, c) for each c, (C, *batch)."""
        terms = []
        for p, m, b in zip(self.probs, self.loc, self.b, strict=True):
            prior = Normal(m, self.s).log_prob(z).sum(-1)
            likelihood = Normal(z @ self.W.T + b, self.t).log_prob(x).sum(-1)
            terms.append(p.log() + prior + likelihood)
        return torch.stack(terms)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", Categorical(self.probs), infer={"enumerate": "parallel"})
            z = pyro.sample("z", Normal(self.loc[c], self.s).to_event(1))
            pyro.sample("x", Normal(z @ self.W.T + self.b[c], self.t).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """A poor one: broader than the prior, wherever x is."""
        d = self.W.shape[1]
        broad = Normal(torch.zeros(d, dtype=x.dtype), 2.0).to_event(1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", broad)

    def pair(self) -> PyroPair:
        return PyroPair(self.model, self.guide)

    def declared(self) -> LatentModel:
        (C, d), D = self.loc.shape, len(self.W)
        model = LatentModel(
            c=Latent(Categorical, C, logits=Learned(0.0, C)),
            z=Latent(Normal, d, given="c", net=Table(), scale=self.s),
            x=Observed(Normal, D, given=("z", "c"), net=Linear(), scale=self.t),
        )
        weight = torch.cat([self.W, self.b.T], 1)  # a net reads the category one-hot
        zero = torch.zeros(D, dtype=torch.float64)
        parameters = {"c": (self.probs.log(),), "z": (self.loc,), "x": (weight, zero)}
        return with_parameters(model, **parameters)
