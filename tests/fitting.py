"""Small models in float64 and how the tests fit them."""

from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor

import pvae
from pvae import Fit, LatentModel, Learned, Observed
from pvae.pair import Pair
from tests.exact import LinearGaussian

TRUTH = LinearGaussian.drawn()


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
