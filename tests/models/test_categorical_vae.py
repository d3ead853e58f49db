"""Summed out by hand, and drawn by a guide: both of one model."""

from itertools import product

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli

import pvae
from pvae import LatentModel, exact, models

COMBINATIONS = torch.tensor(list(product(range(3), repeat=2)))  # of two latents of 3 categories


def pair() -> tuple[LatentModel, LatentModel]:
    """The model with its latents summed out, and guided, of one decoder."""
    sizes = {"data_size": 6, "num_latents": 2, "categories": 3, "hidden": (5,)}
    summed, guided = models.categorical_vae(**sizes), models.categorical_vae(**sizes, guided=True)
    net = summed.module_of("x")
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    guided.module_of("x").load_state_dict(net.state_dict())
    return summed.double(), guided.double()


def joint(model: LatentModel, x: Tensor) -> Tensor:
    """log p(c, x) of each combination, (9, N): the decoder's layers applied to one-hot vectors."""
    first, last = (p for p in model.module_of("x").nets["net"].body if hasattr(p, "weight"))
    code = torch.nn.functional.one_hot(COMBINATIONS, 3).flatten(1).to(x)
    logits = last(first(code).tanh())
    likelihood = Bernoulli(logits=logits[:, None]).log_prob(x).sum(-1)
    return (likelihood - 2 * torch.tensor(3.0).log()).detach()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(9, 6, dtype=torch.float64).round()


def test_summing_out_is_enumeration_by_hand(x):
    summed, _ = pair()
    expected = joint(summed, x).logsumexp(0)
    assert exact.method(summed) == "enumeration"
    torch.testing.assert_close(exact.log_prob(summed, x), expected)
    torch.testing.assert_close(pvae.log_weights(summed, x)[0], expected)


def test_the_summed_latents_are_drawn_from_their_posterior(x):
    summed, _ = pair()
    num_draws = 20_000
    drawn = summed.posterior(x[:2], num_draws)
    index = 3 * drawn["c1"] + drawn["c2"]
    posterior = joint(summed, x[:2]).softmax(0)  # (9, 2)
    share = torch.stack([(index == i).double().mean(0) for i in range(9)])
    error = (posterior * (1 - posterior) / num_draws).sqrt()
    assert ((share - posterior).abs() <= 4.5 * error + 1e-4).all()


def test_a_guide_bounds_what_is_summed_and_reaches_it_with_particles(x):
    summed, guided = pair()
    truth = joint(summed, x).logsumexp(0)
    ratio = (pvae.log_weights(guided, x, num_particles=20_000) - truth).exp()  # of mean one
    assert ((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / 20_000**0.5).all()
    elbo = ratio.log()
    assert (elbo.mean(0) + 4.5 * elbo.std(0) / 20_000**0.5 < 0.01).all()
    assert elbo.mean() < -0.1


def test_training_the_guide_closes_its_gap():
    """The same decoder throughout: only q(c | x) learns, by the score function."""
    pyro.set_rng_seed(1)
    summed, guided = pair()
    x = summed.prior_predictive(200)["x"]
    for parameter in guided.model_modules.parameters():
        parameter.requires_grad_(False)

    def gap() -> float:
        weights = pvae.log_weights(guided, x, num_particles=200)
        return float((joint(summed, x).logsumexp(0) - weights.mean(0)).mean())

    before = gap()
    settings = {"epochs": 40, "batch_size": 20, "lr": 2e-2, "device": "cpu", "progress": False}
    pvae.fit(guided, x, pvae.ELBO(5), **settings)
    assert gap() < before / 2
