"""log p(x | y) is a density of x for each y, and digits can be asked for by their label."""

from itertools import product

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

import pvae
from pvae import exact, models


def log_prob(model: pvae.LatentModel, x: Tensor, y: Tensor) -> Tensor:
    """log p(x | y) of a model with one latent, by equal steps over eight standard deviations."""
    z = torch.linspace(-8, 8, 801, dtype=torch.float64)
    prior = Normal(0.0, 1.0).log_prob(z) + (z[1] - z[0]).log()
    net = model.module_of("x").nets["net"]
    logits = net(z[:, None, None], y)["logits"]  # (801, N, D)
    return (prior[:, None] + Bernoulli(logits=logits).log_prob(x).sum(-1)).logsumexp(0).detach()


def test_it_is_a_distribution_over_x_for_each_label():
    model = models.conditional_vae(4, categories=3, latent_size=1, hidden=(5,)).double()
    x = torch.tensor(list(product((0.0, 1.0), repeat=4)), dtype=torch.float64)
    found = []
    for label in range(3):
        y = torch.full((len(x),), label)
        found.append(exact.log_prob(model, {"x": x, "y": y}))
        torch.testing.assert_close(found[-1], log_prob(model, x, y), rtol=0, atol=1e-3)
        assert found[-1].exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert (found[0] - found[1]).abs().max() > 0.01, "the label matters"


@pytest.fixture(scope="module")
def digits() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    train, _, test = pvae.load_data("digits", binarisation="threshold")
    parts = ({"x": part[:], "y": part.labels} for part in (train, test))
    return tuple(parts)


def fit(model: pvae.LatentModel, data) -> pvae.LatentModel:
    settings = {"epochs": 12, "batch_size": 50, "lr": 5e-3, "device": "cpu", "progress": False}
    return pvae.fit(model, data, **settings).model


def test_what_is_asked_for_is_generated(digits):
    """An image belongs to the digit whose mean image is nearest: of real digits four in five do."""
    train, test = digits
    pyro.set_rng_seed(0)
    model = fit(models.conditional_vae(64, latent_size=4, hidden=(64,)), train)
    z = torch.randn(30, 4).repeat_interleave(10, 0)  # each z under every label
    y = torch.arange(10).repeat(30)
    generated = model.decode({"z": z}, given=y)["x"]
    means = torch.stack([train["x"][train["y"] == digit].mean(0) for digit in range(10)])
    right = (torch.cdist(generated, means).argmin(1) == y).float().mean()
    assert right > 0.8

    bound = pvae.evaluate(model, test, num_particles=50, device="cpu").per_datum["bound"]
    wrong = test | {"y": (test["y"] + 1) % 10}
    as_another = pvae.evaluate(model, wrong, num_particles=50, device="cpu").per_datum["bound"]
    told = (bound - as_another).isel(particles=-1)
    assert float(told.mean()) > 4.5 * float(told.std()) / len(test["x"]) ** 0.5
