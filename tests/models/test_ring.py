"""The ring against an integral in polar coordinates, written here."""

import math

import pyro
import pytest
import torch
from torch import Tensor

import pvae
from pvae import exact, models

RADII = torch.linspace(0.0, 9.0, 1501, dtype=torch.float64)[1:]
ANGLES = torch.arange(256, dtype=torch.float64) * 2 * math.pi / 256


def log_prob(x: Tensor, sigma: float) -> Tensor:
    """log of int N(z; 0, I) N(x; g(z), sigma^2 I) dz, z = r (cos t, sin t), dz = r dr dt.

    There ||g(z)|| = 1 + r / 10 at the same angle. Both are the trapezoid rule in equal steps, whose
    error vanishes with the square of the step in r, and faster in the angle, which is periodic.
    """
    directions = torch.stack([ANGLES.cos(), ANGLES.sin()], -1)
    g = (1 + RADII[:, None, None] / 10) * directions
    prior = RADII[:, None].log() - RADII[:, None] ** 2 / 2 - math.log(2 * math.pi)
    cell = math.log(RADII[0]) + math.log(ANGLES[1])
    constant = -math.log(2 * math.pi * sigma**2)
    values = []
    for datum in x:
        likelihood = constant - (datum - g).square().sum(-1) / (2 * sigma**2)
        values.append((prior + likelihood).flatten().logsumexp(0) + cell)
    return torch.stack(values)


def ring(sigma: float = 0.1) -> pvae.LatentModel:
    return models.ring(sigma, hidden=(20,)).double()


@pytest.mark.parametrize("sigma", [0.0625, 0.1, 0.5])
def test_log_prob_is_that_of_an_integral_in_polar_coordinates(sigma):
    on, inside, outside = [0.8, -0.7], [0.25, 0.5], [1.2, 0.9]
    x = torch.tensor([on, inside, outside], dtype=torch.float64)
    model = ring(sigma)
    assert exact.method(model) == "quadrature"
    torch.testing.assert_close(exact.log_prob(model, x), log_prob(x, sigma), rtol=0, atol=1e-3)


def test_a_normal_cloud_becomes_a_circle():
    z = ring().prior_predictive(20_000)["z"]
    g = ring().decode({"z": z})["x"]
    length = g.norm(dim=-1)
    assert length.min() >= 1
    torch.testing.assert_close(g / length.unsqueeze(-1), z / z.norm(dim=-1, keepdim=True))
    expected = 1 + math.sqrt(math.pi / 2) / 10  # ||z|| is Rayleigh's
    assert abs(length.mean() - expected) < 4.5 * length.std() / 20_000**0.5


def gaps(objective) -> Tensor:
    """What L_1 and L_1000 of held-out data lack of log p(x) after training, (2, N)."""
    pyro.set_rng_seed(0)
    model = ring()
    data = model.prior_predictive(550)["x"]
    settings = {"epochs": 40, "batch_size": 50, "lr": 1e-2, "device": "cpu", "progress": False}
    pvae.fit(model, data[:500], objective, **settings)
    weights = pvae.log_weights(model, data[500:], num_particles=1000)
    bounds = [weights.mean(0), pvae.bounds.iwae(weights)]
    return log_prob(data[500:], 0.1) - torch.stack(bounds)


def test_only_the_guide_is_learned_and_what_bounds_lack_is_its_fault():
    assert all(name.startswith("guide") for name, _ in ring().named_parameters())
    inside, covering = gaps(pvae.ELBO()), gaps(pvae.IWAE(10))
    assert 0.1 < inside[0].mean() < covering[0].mean(), "no Normal is a wedge"
    assert inside[1].mean() > 0.1, "where the guide hardly draws, particles are no help"
    left, error = covering[1].mean(), covering[1].std() / 50**0.5
    assert -4.5 * error < left < 0.1
    assert left < inside[1].mean() / 2


def test_the_decoder_is_read_back_from_json_and_needs_no_numbers():
    model = ring()
    read = pvae.LatentModel.from_json(model.to_json())
    assert str(read) == str(model)
    z = torch.randn(5, 2)
    assert torch.equal(read.decode({"z": z})["x"], models.ring().decode({"z": z})["x"])
