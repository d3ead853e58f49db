"""Write known parameters into a declared model."""

import torch
from torch import Tensor

from pvae import LatentModel


def with_parameters(model: LatentModel, **values: tuple[Tensor, ...]) -> LatentModel:
    """The model in float64, each named site's unconstrained parameters set in their order."""
    model.double()
    with torch.no_grad():
        for name, own in values.items():
            for parameter, value in zip(model.module_of(name).parameters(), own, strict=True):
                parameter.copy_(value.reshape(parameter.shape))
    return model


def generator(seed: int) -> torch.Generator:
    """A random state that no other test shares."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal draws in float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
