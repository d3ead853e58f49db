"""Models whose latents are all discrete, so that p(x) is a sum short enough to write out."""

from dataclasses import dataclass
from itertools import product

import pyro
import torch
from pyro.distributions import Bernoulli, Categorical, Normal
from torch import Tensor

from pvae import Latent, LatentModel, Learned, Observed, PyroPair
from pvae.nets import Table
from tests.exact.parameters import generator, normal, with_parameters


@dataclass(frozen=True)
class TwoCategoricals:
    """a ~ Categorical, b | a ~ Categorical, x | a, b ~ Categorical: tables of probabilities."""

    a: Tensor  # (A,)
    b: Tensor  # (A, B)
    x: Tensor  # (A, B, X)

    @classmethod
    def drawn(cls, sizes: tuple[int, int, int] = (2, 3, 5), seed: int = 41) -> "TwoCategoricals":
        a, b, x = (normal(*sizes[: i + 1], seed=seed + i).softmax(-1) for i in range(3))
        return cls(a, b, x)

    def sample(self, num_data: int, seed: int = 0) -> Tensor:
        p = torch.einsum("a,ab,abx->x", self.a, self.b, self.x)
        return torch.multinomial(p, num_data, replacement=True, generator=generator(seed))

    def joint(self, x: Tensor) -> dict[tuple[int, int], Tensor]:
        """p(a, b, x) of each pair of categories, (N,)."""
        pairs = product(range(self.b.shape[0]), range(self.b.shape[1]))
        return {(a, b): self.a[a] * self.b[a, b] * self.x[a, b, x.long()] for a, b in pairs}

    def log_prob(self, x: Tensor) -> Tensor:
        return sum(self.joint(x).values()).log()

    def posterior(self, x: Tensor) -> dict[tuple[int, int], Tensor]:
        """p(a, b | x), by Bayes' rule."""
        joint = self.joint(x)
        return {pair: p / sum(joint.values()) for pair, p in joint.items()}

    def model(self, x: Tensor) -> None:
        infer = {"enumerate": "parallel"}
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", Categorical(self.a), infer=infer)
            b = pyro.sample("b", Categorical(self.b[a]), infer=infer)
            pyro.sample("x", Categorical(self.x[a, b]), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing to draw."""

    def pair(self) -> PyroPair:
        return PyroPair(self.model, self.guide)

    def declared(self) -> LatentModel:
        A, B, X = self.x.shape
        model = LatentModel(
            a=Latent(Categorical, A, logits=Learned(0.0, A)),
            b=Latent(Categorical, B, given="a", net=Table()),
            x=Observed(Categorical, X, given=("a", "b"), net=Table()),
        )
        return with_parameters(model, a=(self.a.log(),), b=(self.b.log(),), x=(self.x.log(),))


@dataclass(frozen=True)
class GuidedCoin:
    """z ~ Bernoulli(prior), x | z ~ N(loc_z, 1), and a guide that draws z: q(1) = sigmoid(phi).

    `phi` is one number for all data, and no draw of z is differentiable in it.
    """

    prior: float = 0.3
    loc: tuple[float, float] = (-1.0, 1.5)

    def model(self, x: Tensor, phi: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", Bernoulli(torch.tensor(self.prior, dtype=x.dtype)))
            mean = self.loc[0] + z * (self.loc[1] - self.loc[0])
            pyro.sample("x", Normal(mean, 1.0), obs=x)

    def guide(self, x: Tensor, phi: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Bernoulli(logits=phi))

    def bound(self, x: Tensor, phi: Tensor, num_particles: int = 1) -> Tensor:
        """L_K of each datum, the expectation over all 2^K draws written out: differentiable."""
        q = torch.stack([1 - phi.sigmoid(), phi.sigmoid()])
        prior = torch.tensor([1 - self.prior, self.prior], dtype=x.dtype)
        likelihood = torch.stack([Normal(m, 1.0).log_prob(x).exp() for m in self.loc])
        w = prior[:, None] * likelihood / q[:, None]  # (2, N)
        bound = torch.zeros_like(x)
        for draw in product((0, 1), repeat=num_particles):
            chance = torch.stack([q[z] for z in draw]).prod()
            bound = bound + chance * torch.stack([w[z] for z in draw]).mean(0).log()
        return bound
