"""SVI of the declared model and the closed form, or EM, end at the same log p(x) of the same data.

SVI starts from the other's parameters disturbed, which lies lower, and may not end higher either.
What it reaches is computed by `pvae.exact`, what EM and the closed forms reach by the baselines.
"""

import pytest
import torch
from torch import Tensor

import pvae
from pvae import LatentModel
from pvae.baselines import (
    fit_em,
    fit_factor_analysis,
    fit_mixture_of_bernoullis,
    fit_mixture_of_factor_analysers,
    fit_ppca,
)

D, STEPS = 6, 190
EM = {"max_iter": 3000, "tol": 1e-10, "device": "cpu"}


def plane() -> Tensor:
    """200 data along a plane, each element with a noise of its own."""
    scale = torch.linspace(0.5, 1.5, D)
    return (torch.randn(200, 2) @ torch.randn(2, D) + scale * torch.randn(200, D)).double()


def clusters() -> Tensor:
    """Three clusters of 80 data that overlap, each along a line of its own."""
    means, line = 2 * torch.randn(3, 1, D), torch.randn(3, 1, D)
    x = means + torch.randn(3, 80, 1) * line + torch.randn(3, 80, D)
    return x.flatten(0, 1).double()


def bits() -> Tensor:
    probs = torch.rand(3, D).mul(0.6).add(0.2).repeat_interleave(100, dim=0)
    return torch.bernoulli(probs).double()


def disturbed(model: LatentModel) -> LatentModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def climbed(model: LatentModel, x: Tensor) -> Tensor:
    """Mean log p(x) after full-batch steps whose length falls to zero."""
    pvae.fit(
        model,
        x,
        pvae.ELBO(gradient="stl") if model.guide_sites else pvae.ELBO(),
        steps=STEPS,
        epochs=STEPS,
        batch_size=len(x),
        lr=0.04,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        device="cpu",
        progress=False,
    )
    return pvae.exact.log_prob(model, x).mean()


CASES = {
    "ppca": (plane, lambda x: fit_ppca(x, 2)),
    "factor_analysis": (plane, lambda x: fit_factor_analysis(x, 2, tol=1e-10)),
    "mixture_of_gaussians": (clusters, lambda x: fit_em(x, 3, "full", **EM)),
    "mixture_of_bernoullis": (
        bits,
        lambda x: fit_mixture_of_bernoullis(x, 3, prior_count=1e-9, **EM),
    ),
    "mixture_of_factor_analysers": (
        clusters,
        lambda x: fit_mixture_of_factor_analysers(x, 1, 3, **EM),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_svi_finds_the_maximum_of_the_closed_form_or_of_em_again(name):
    data, fit = CASES[name]
    x = data()
    fitted = fit(x)
    best, model = fitted.log_prob(x).mean(), disturbed(fitted.to_model())
    assert model.name == name
    assert pvae.exact.log_prob(model, x).mean() < best - 0.015  # nats
    assert -0.005 < climbed(model, x) - best < 1e-4
