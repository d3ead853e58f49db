"""Sigma: the weight of reconstruction where it is fixed, an estimate where it is not."""

import math

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import pvae
from pvae import LatentModel, models

NOISE = torch.tensor([0.05, 0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.4], dtype=torch.float64)


def sigma_of(model: LatentModel, z: Tensor) -> Tensor:
    return model.module_of("x")({"z": z}).base_dist.scale.detach()


def test_with_sigma_fixed_minus_log_p_is_the_squared_error_over_two_sigma_squared():
    sigma, x = 0.25, torch.randn(6, 4, dtype=torch.float64)
    model = models.gaussian_vae(4, 2, hidden=(5,), sigma=sigma).double()
    drawn = model.draw(x, 3)
    mean = model.module_of("x").nets["net"](drawn.values["z"])["loc"]
    error = (x - mean).square().sum(-1)
    expected = -error / (2 * sigma**2) - 4 * math.log(sigma * math.sqrt(2 * math.pi))
    found = model.module_of("x")({"z": drawn.values["z"]}).log_prob(x)
    torch.testing.assert_close(found, expected)


def fitted(sigma: str, data: Tensor) -> LatentModel:
    pyro.set_rng_seed(0)
    model = models.gaussian_vae(data.shape[1], 1, hidden=(10,), sigma=sigma).double()
    settings = {"epochs": 40, "batch_size": 50, "lr": 2e-2, "device": "cpu", "progress": False}
    return pvae.fit(model, data, **settings).model


def test_a_learned_sigma_is_the_noise_of_the_data():
    data = 0.5 + 0.2 * torch.randn(1000, 8, dtype=torch.float64)
    found = sigma_of(fitted("learned", data), torch.zeros(1, 1, dtype=torch.float64))
    torch.testing.assert_close(found, torch.full_like(found, 0.2), rtol=0.05, atol=0)


def test_pixels_of_different_noise_need_a_sigma_each():
    """Pixels that share nothing, so that log p(x) of what drew them is a sum over pixels."""
    data = 0.5 + NOISE * torch.randn(1200, 8, dtype=torch.float64)
    train, test = data[:1000], data[1000:]
    truth = Normal(0.5, NOISE).log_prob(test).sum(-1)

    def lost(sigma: str) -> Tensor:
        weights = pvae.log_weights(fitted(sigma, train), test, num_particles=200)
        return truth - pvae.bounds.iwae(weights)

    one, each = lost("learned"), lost("per pixel")
    assert -4.5 * each.std() / 200**0.5 < each.mean() < 0.2
    assert one.mean() - 4.5 * one.std() / 200**0.5 > 1


def test_a_predicted_sigma_follows_z():
    """Two groups far apart, of noise 0.05 and 0.4: one sigma for both would fit neither."""
    group = torch.arange(1000) % 2
    noise = torch.tensor([0.05, 0.4], dtype=torch.float64)[group, None]
    data = 2.0 * group[:, None] + noise * torch.randn(1000, 4, dtype=torch.float64)
    model = fitted("predicted", data)
    sigma = sigma_of(model, model.encode(data)["z"]).mean(1)
    quiet, loud = sigma[group == 0].mean(), sigma[group == 1].mean()
    assert loud == pytest.approx(0.4, rel=0.2)
    assert quiet < 0.4 / 2
