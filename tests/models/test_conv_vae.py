"""Images, in grey and in colour, through convolutions."""

import pyro
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli

import pvae
from pvae import models

SETTINGS = {"batch_size": 50, "lr": 5e-3, "device": "cpu", "progress": False}


def test_weights_do_not_grow_with_the_image_but_where_codes_are_read_and_written():
    def count(size: int) -> int:
        model = models.conv_vae((3, size, size), latent_size=2)
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        assert len(layers) == 4
        return sum(p.numel() for layer in layers for p in layer.parameters())

    by_hand = 32 * (3 * 9 + 1) + 64 * (32 * 9 + 1) + 32 * 64 * 16 + 32 + 3 * 32 * 16 + 3
    assert count(8) == count(32) == by_hand


def test_a_shifted_image_has_shifted_features():
    """Two convolutions of stride 2: four pixels in x are one in the features."""
    model = models.conv_vae((3, 16, 16), latent_size=2, channels=(4, 5))
    body = model.guide_module_of("z").nets["net"].body.body
    features = nn.Sequential(*[layer for layer in body if not isinstance(layer, nn.Linear)][:-1])
    x = torch.zeros(1, 3, 16, 16)
    x[..., 4:8, 4:8] = torch.rand(3, 4, 4)
    moved = features(x.roll((4, 4), (-2, -1)).flatten(1))
    torch.testing.assert_close(moved[..., 1:, 1:], features(x.flatten(1))[..., :-1, :-1])


def test_digits_are_learned_as_images():
    pyro.set_rng_seed(0)
    train, _, test = pvae.load_data("digits", binarisation="threshold", flatten=False)
    assert train[:].shape[1:] == (1, 8, 8)
    model = models.conv_vae((1, 8, 8), latent_size=8, channels=(16,))
    pvae.fit(model, train, epochs=12, **SETTINGS)
    bound = pvae.evaluate(model, test, num_particles=20, device="cpu").per_datum["bound"]
    frequency = train[:].mean(0).clamp(0.01, 0.99)
    independent_pixels = Bernoulli(frequency).log_prob(test[:]).sum((1, 2, 3))
    gained = torch.tensor(bound.isel(particles=-1).values) - independent_pixels
    assert gained.mean() > 3
    assert model.prior_predictive(3)["x"].shape == (3, 1, 8, 8)


def test_the_colour_of_an_image_is_reconstructed():
    """One digit in a colour drawn for each datum: three channels that a code must tell apart."""
    pyro.set_rng_seed(0)
    digit = pvae.load_data("digits", binarisation="none", flatten=False).train[0:1]
    colour = torch.rand(700, 3, 1, 1)
    data = digit * colour + 0.05 * torch.randn(700, 3, 8, 8)
    model = models.conv_vae((3, 8, 8), latent_size=4, channels=(16,), pixels="normal")
    pvae.fit(model, data[:600], epochs=25, **SETTINGS)
    seen = model.reconstruct(data[600:])["x"]
    error = (seen - digit * colour[600:]).square().mean()
    without_colour = (digit * (colour[600:] - colour[600:].mean(0))).square().mean()
    assert error < 0.1 * without_colour


def test_an_unknown_kind_of_pixel_names_the_known_ones():
    with pytest.raises(ValueError, match="`pixels` must be one of bernoulli, normal; got 'grey'"):
        models.conv_vae(pixels="grey")
