"""Binary latents: their sum written out, and what a baseline is for."""

from itertools import product

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli

import pvae
from pvae import LatentModel, exact, models


def network(*latent_sizes: int, data_size: int = 5) -> LatentModel:
    model = models.sigmoid_belief_network(data_size, latent_sizes).double()
    for parameter in model.model_modules.parameters():
        nn.init.normal_(parameter)
    return model


def states(size: int) -> Tensor:
    return torch.tensor(list(product((0.0, 1.0), repeat=size)), dtype=torch.float64)


def log_prob(model: LatentModel, x: Tensor) -> Tensor:
    """log p(x), layer by layer from the top: log p(h_l) is a sum over all values of h_l+1."""
    *lower, top = sorted(model.latents)
    h = states(model.inputs[top].shape[0])
    log_p = Bernoulli(logits=model.module_of(top).learned["logits"]).log_prob(h).sum(-1)
    for name in [*reversed(lower), "x"]:
        logits = model.module_of(name).nets["net"].body(h)
        h = x if name == "x" else states(logits.shape[-1])
        likelihood = Bernoulli(logits=logits[:, None]).log_prob(h).sum(-1)  # (above, here)
        log_p = (log_p[:, None] + likelihood).logsumexp(0)
    return log_p.detach()


@pytest.mark.parametrize("latent_sizes", [(3,), (3, 2), (4, 3, 2)])
def test_weights_average_to_the_sum_over_all_values(latent_sizes):
    model = network(*latent_sizes)
    x = torch.rand(4, 5, dtype=torch.float64).round()
    truth = log_prob(model, x)
    everything = states(5)
    assert log_prob(model, everything).exp().sum().item() == pytest.approx(1)
    ratio = (pvae.log_weights(model, x, num_particles=50_000) - truth).exp()
    assert ((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / 50_000**0.5).all()
    assert (ratio.log().mean(0) < 0).all()


def test_vectors_of_binary_latents_are_guided_and_not_summed():
    model = network(3, 2)
    assert model.summed == []
    assert exact.method(model) is None
    assert {module.site.title for module in model.guide_modules.values()} == {"Bernoulli"}
    assert list(model.guide_modules) == ["h1", "h2"]


def test_vimco_takes_noise_out_of_the_guides_gradient():
    pyro.set_rng_seed(0)
    model = network(4)
    x = torch.rand(10, 5, dtype=torch.float64).round()

    def noise(baseline: str) -> float:
        gradients = []
        for _ in range(300):
            model.zero_grad()
            objective = pvae.IWAE(5, baseline=baseline)
            objective.surrogate(model.draw(x, 5)).backward()
            gradients.append(model.guide_modules["h1"].nets["net"].body.weight.grad.clone())
        return float(torch.stack(gradients).var(0).sum())

    assert noise("vimco") < noise("none") / 2


def test_training_with_vimco_improves_the_bound_of_held_out_data():
    pyro.set_rng_seed(0)
    truth = network(3, data_size=8)
    nn.init.normal_(truth.module_of("x").nets["net"].body.weight, std=3)
    data = truth.prior_predictive(1200)["x"]
    train, test = data[:1000], data[1000:]
    entropy = -log_prob(truth, test)
    model = models.sigmoid_belief_network(8, (3,)).double()

    def score() -> Tensor:
        weights = pvae.log_weights(model, test, num_particles=500)
        return pvae.bounds.iwae(weights)

    before = score()
    settings = {"epochs": 40, "batch_size": 50, "lr": 2e-2, "device": "cpu", "progress": False}
    pvae.fit(model, train, pvae.IWAE(5, baseline="vimco"), **settings)
    after = score()
    gained = after - before
    assert gained.mean() > 4.5 * gained.std() / 200**0.5
    below = -entropy - after  # of the model that drew the data
    assert below.mean() > -4.5 * below.std() / 200**0.5
    assert below.mean() < 0.3 * (-entropy - before).mean()
