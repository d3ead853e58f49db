"""Layers drawn from the top, in the model and in the guide."""

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import softplus

import pvae
from pvae import LatentModel, exact, models


def normal(module, *parents: Tensor) -> Normal:
    """What a site's net says, its scale by exp."""
    out = module.nets["net"](*parents)
    return Normal(out["loc"], out["scale"].exp())


def product(one: Normal, other: Normal) -> Normal:
    """Of two densities, from their natural parameters."""
    first = one.loc / one.scale**2 + other.loc / other.scale**2
    second = 1 / one.scale**2 + 1 / other.scale**2
    return Normal(first / second, second**-0.5)


def test_log_weights_are_the_formula_layer_by_layer():
    model = models.ladder_vae(6, (4, 3, 2), hidden=(5,), hidden_top=(5,)).double()
    x = torch.rand(7, 6, dtype=torch.float64).round()
    drawn = model.draw(x, 3)
    z1, z2, z3 = (drawn.values[name] for name in ("z1", "z2", "z3"))
    assert [z.shape for z in (z1, z2, z3)] == [(3, 7, 4), (3, 7, 3), (3, 7, 2)]
    p, q = model.model_modules, model.guide_modules
    pairs = [
        (Normal(0.0, 1.0), normal(q["z3"], x), z3),
        (above2 := normal(p["z2"], z3), product(above2, normal(q["z2"], x)), z2),
        (above1 := normal(p["z1"], z2), product(above1, normal(q["z1"], x)), z1),
    ]
    expected = Bernoulli(logits=p["x"].nets["net"](z1)["logits"]).log_prob(x).sum(-1)
    for prior, guide, z in pairs:
        expected = expected + prior.log_prob(z).sum(-1) - guide.log_prob(z).sum(-1)
    torch.testing.assert_close(drawn.log_weights, expected)


def log_prob(model: LatentModel, x: Tensor) -> Tensor:
    """Of a model with one latent in each of two layers: equal steps in z_2, and in e.

    z_1 = mu(z_2) + sigma(z_2) e, so that p(e) is N(0, 1) whatever z_2 is.
    """
    e = torch.linspace(-7, 7, 401, dtype=torch.float64)
    weight = Normal(0.0, 1.0).log_prob(e) + (e[1] - e[0]).log()
    prior = normal(model.module_of("z1"), e[:, None])
    z1 = prior.loc + prior.scale * e  # (z2, e)
    logits = model.module_of("x").nets["net"](z1[..., None])["logits"]
    likelihood = logits @ x.T - softplus(logits).sum(-1, keepdim=True)
    joint = weight[:, None, None] + weight[:, None] + likelihood
    return joint.flatten(0, 1).logsumexp(0).detach()


@pytest.fixture(scope="module")
def fitted() -> tuple[LatentModel, Tensor]:
    pyro.set_rng_seed(0)
    group = torch.randint(3, (860,))
    data = torch.eye(3, dtype=torch.float64)[group].repeat_interleave(4, 1)
    data = torch.bernoulli(0.1 + 0.8 * data)
    model = models.ladder_vae(12, (1, 1), hidden=(20,), hidden_top=(20,)).double()
    settings = {"epochs": 30, "batch_size": 50, "lr": 1e-2, "device": "cpu", "progress": False}
    pvae.fit(model, data[:800], pvae.IWAE(5), **settings)
    return model, data[800:]


def test_of_two_single_latents_log_p_is_an_integral_over_both(fitted):
    model, test = fitted
    assert exact.method(model) == "quadrature"
    few = test[:10]
    torch.testing.assert_close(exact.log_prob(model, few), log_prob(model, few), rtol=0, atol=2e-3)


def test_bounds_rise_to_the_integral(fitted):
    model, test = fitted
    truth = log_prob(model, test)
    independent_pixels = Bernoulli(test.mean(0)).log_prob(test).sum(-1).mean()
    assert truth.mean() > independent_pixels + 1
    weights = pvae.log_weights(model, test, num_particles=5000)
    gap = [float((truth - pvae.bounds.iwae(weights[:k])).mean()) for k in (1, 50, 5000)]
    assert gap[0] > gap[1] > gap[2] - 0.01
    assert abs(gap[2]) < 0.02


def test_the_guide_shares_the_models_way_down():
    model = models.ladder_vae(6, (4, 3, 2), hidden=(5,), hidden_top=(5,))
    assert list(model.guide_sites) == model.latents == ["z3", "z2", "z1"]
    assert all(entry.given == ("x",) for entry in model.guide_sites.values())
    guide = pyro.poutine.trace(model.guide).get_trace(torch.ones(1, 6))
    guide.nodes["z1"]["fn"].base_dist.loc.sum().backward()
    shared, own = (
        [p.grad is not None for p in part["z1"].parameters()]
        for part in (model.model_modules, model.guide_modules)
    )
    assert any(shared)
    assert any(own)
    assert len(dict(model.named_parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("make", [models.ladder_vae, models.sigmoid_belief_network])
def test_there_is_a_layer(make):
    with pytest.raises(ValueError, match="`latent_sizes` needs a number for each layer, got none"):
        make(6, ())
