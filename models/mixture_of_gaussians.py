"""The mixture of Gaussians, its component summed out: log p(x) is exact.

c ~ Categorical(pi),    x | c ~ N(mu_c, Sigma_c)

Fitted by SVI like any declared model, or by EM (`pvae.fit_em(...).to_model()`).
"""

from typing import Any, Literal

import torch
from pyro.distributions import Categorical, MultivariateNormal, Normal

from pvae import Latent, LatentModel, Learned, Observed, Predicted
from pvae.nets import Table


def mixture_of_gaussians(
    data_size: int = 784,
    num_components: int = 10,
    covariance: Literal["diag", "full", "tied", "spherical"] = "diag",
) -> LatentModel:
    """p(c) = Categorical(pi), p(x | c) = N(mu_c, Sigma_c): diagonal, full, tied or spherical."""
    forms: dict[str, dict[str, Any]] = {
        "diag": {"distribution": Normal},
        "spherical": {"distribution": Normal, "scale": Predicted(Table(), 1)},
        "full": {"distribution": MultivariateNormal},
        "tied": {"distribution": MultivariateNormal, "scale_tril": Learned(torch.eye(data_size))},
    }
    if covariance not in forms:
        raise ValueError(f"`covariance` must be one of {', '.join(forms)}; got {covariance!r}.")
    return LatentModel(
        c=Latent(Categorical, num_components, logits=Learned(0.0, num_components)),
        x=Observed(shape=data_size, given="c", net=Table(), **forms[covariance]),
        name="mixture_of_gaussians",
    )
