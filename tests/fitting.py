"""Small models and how the tests fit them."""

import math
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Bernoulli, Normal
from torch import Tensor, nn

import pvae
from pvae import Fit, Latent, LatentModel, Learned, Observed, PyroPair, models, svi
from pvae.nets import MLP
from pvae.pair import Pair
from tests.exact import LinearGaussian

TRUTH = LinearGaussian.drawn()
NETS = {"latent_size": 2, "hidden": (5,)}
SMALL = {  # of those that take `binary` data, and draw no discrete latent
    "factor_analysis": {"latent_size": 2},
    "gaussian_vae": NETS,
    "hierarchical_vae": {"latent_sizes": (3, 2), "hidden": (5,), "hidden_top": (4,)},
    "ladder_vae": {"latent_sizes": (3, 2), "hidden": (5,), "hidden_top": (4,)},
    "mixture_of_bernoullis": {"num_components": 3},
    "mixture_of_factor_analysers": {"latent_size": 2, "num_components": 3},
    "mixture_of_gaussians": {"num_components": 3},
    "mixture_vae": {**NETS, "num_components": 3},
    "ppca": {"latent_size": 2},
    "vae": NETS,
}


OBJECTIVES = [  # of each kind, and each gradient estimator
    pvae.ELBO(),
    pvae.ELBO(3),
    pvae.ELBO(3, gradient="stl"),
    pvae.ELBO(kl="analytic", beta=pvae.WarmUp(30)),
    pvae.ELBO(free_bits=0.1),
    pvae.IWAE(4),
    pvae.IWAE(4, gradient="stl"),
    pvae.IWAE(4, gradient="dreg"),
    pvae.MIWAE(2, 3),
    pvae.PIWAE(2, 3),
    pvae.CIWAE(4),
    pvae.Renyi(4),
    pvae.Renyi(4, alpha=-math.inf),
    pvae.CUBO(4),
    pvae.TVO(4),
    pvae.ReweightedWakeSleep(4, guide="both"),
    pvae.ForwardKL(4),
    pvae.ForwardKL(4, gradient="dreg"),
]


def fit(model: Pair, data: Any, objective: Any = None, **settings: Any) -> Fit:
    return pvae.fit(model, data, objective, **{"progress": False, "batch_size": 20, **settings})


def ppca(seed: int = 0, **sizes: int) -> LatentModel:
    """Of the same sizes as `TRUTH`, from a start that the seed decides."""
    torch.manual_seed(seed)
    return pvae.models.ppca(**{"data_size": 5, "latent_size": 3, **sizes}).double()


def gaussian() -> LatentModel:
    """x ~ N(mu, 1), mu starts at 0: no noise, and SGD at rate r gives mu += r (mean of x - mu)."""
    return LatentModel(x=Observed(Normal, 1, loc=Learned(0.0, 1), scale=1.0)).double()


def all_at(value: float, num_data: int = 6) -> Tensor:
    return torch.full((num_data, 1), value, dtype=torch.float64)


def parameters(model: Pair) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same(one: Pair, other: Pair) -> bool:
    """Bit for bit."""
    return torch.equal(parameters(one), parameters(other))


def declare(name: str) -> LatentModel:
    """A small one of `models/`, always from the same start."""
    torch.manual_seed(0)
    settings: dict[str, Any] = SMALL[name]
    return getattr(models, name)(data_size=6, **settings)


def binary(num_data: int = 20) -> Tensor:
    return torch.rand(num_data, 6, generator=torch.Generator().manual_seed(1)).round()


def traced(model: Pair, data: Any, objective: Any = None, **settings: Any) -> Fit:
    """The same fit as a graph that is not compiled, however short it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svi, "SHORT", 1)
        return fit(model, data, objective, **settings)


def assert_same_fit(one: Fit, other: Fit) -> None:
    """Bit for bit: weights, buffers, history."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    columns = [name for name in one.history if name != "seconds"]
    assert one.history[columns].equals(other.history[columns])


class Annealed:
    """A hand-written pair whose KL weight is its attribute: a buffer, a number."""

    def __init__(self, beta: Any):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.beta = beta

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=self.beta):
                z = pyro.sample("z", Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)), poutine.scale(scale=self.beta):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", Normal(loc, log_scale.exp()).to_event(1))


class AnnealedModule(Annealed, nn.Module):
    """The same, held by a module."""


class AnnealedBySettings(AnnealedModule):
    """The same, in an object beside the networks."""

    @property
    def beta(self) -> Any:
        return self.settings.beta

    @beta.setter
    def beta(self, value: Any) -> None:
        self.settings = SimpleNamespace(beta=value)


class AnnealedDeclared(LatentModel):
    """A declared model whose subclass does the same."""

    def __init__(self, beta: Any):
        super().__init__(
            z=Latent(Normal, 2),
            x=Observed(Bernoulli, 6, given="z", net=MLP(5)),
            guide={"z": Latent(Normal, 2, given="x", net=MLP(5))},
        )
        self.beta = beta

    def model(self, batch=None, num_data=None):
        with pyro.plate("data", len(batch)):
            with poutine.scale(scale=self.beta):
                z = pyro.sample("z", self.model_modules["z"]({}))
            return pyro.sample("x", self.model_modules["x"]({"z": z}), obs=batch)

    def guide(self, batch=None):
        with poutine.scale(scale=self.beta):
            return super().guide(batch)


def annealed_by_hand(beta: Any = 1.0) -> tuple[PyroPair, Any]:
    """A pair, and what holds its KL weight."""
    programs = AnnealedModule(beta)
    return PyroPair(programs.model, programs.guide), programs


def annealed_by_plain_object(beta: Any = 1.0) -> tuple[PyroPair, Any]:
    """A pair, and what holds its KL weight, which is no module."""
    programs = Annealed(beta)
    return PyroPair(programs.model, programs.guide), programs


def annealed_by_settings(beta: Any = 1.0) -> tuple[PyroPair, Any]:
    """A pair, and what sets the object that holds its KL weight."""
    programs = AnnealedBySettings(beta)
    return PyroPair(programs.model, programs.guide), programs


def annealed_declared(beta: Any = 1.0) -> tuple[LatentModel, Any]:
    """A model, which itself holds its KL weight."""
    model = AnnealedDeclared(beta)
    return model, model


def masked_by_a_column() -> PyroPair:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model(x, seen):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            with poutine.mask(mask=seen[:, 0] == 1):
                pyro.sample("x", Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x, seen):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x * seen).chunk(2, -1)
            pyro.sample("z", Normal(loc, log_scale.exp()).to_event(1))

    return PyroPair(model, guide)
