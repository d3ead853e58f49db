"""Proposals other than the guide, on models whose log p(x) is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import pvae
from pvae import Latent, LatentModel, Observed, PyroPair
from pvae.nets import MLP
from tests.exact import GaussianMixture, LinearGaussian, LinearMixture

TRUTH = LinearGaussian.drawn()


class TwoModes:
    """z ~ N(0, 1), x | z ~ N(z^2, 1/4): for x > 0 the posterior has a mode on either side."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.25), obs=x)

    def guide(self, x):
        """The right mode alone, and there so good that its weights are nearly alike."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.clamp(min=0.25).sqrt(), 0.12))

    def log_prob(self, x):
        z = torch.linspace(-8, 8, 200_001, dtype=torch.float64).unsqueeze(1)
        joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.square(), 0.25).log_prob(x)
        return joint.logsumexp(0) + math.log(16 / 200_000)


MISSING = TwoModes()
X = torch.tensor([2.0, 2.25, 2.5, 3.0], dtype=torch.float64)


def with_bernoullis() -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(
        z=Latent(dist.Normal, 2),
        b=Latent(dist.Bernoulli, 3, given="z", net=MLP(4)),
        x=Observed(dist.Normal, 2, given=("z", "b"), net=MLP(4), scale=1.0),
        guide={
            "z": Latent(dist.Normal, 2, given="x", net=MLP(4)),
            "b": Latent(dist.Bernoulli, 3, given=("z", "x"), net=MLP(4)),
        },
    ).double()


def test_defensive_weights_are_unbiased():
    x = TRUTH.sample(1).expand(400, -1)
    log_w = pvae.log_weights(TRUTH.pair(0.3), x, 100, proposal="defensive")
    ratio = (log_w - TRUTH.log_prob(x[:1])).exp().mean(0)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / 20
    assert ratio.std() < 0.8


def test_defensive_weights_are_bounded_by_ten_likelihoods():
    """Those of a guide that is too narrow are not."""
    x = TRUTH.sample(200)
    best = dist.Normal(torch.zeros(5).double(), TRUTH.sigma).to_event(1).log_prob(torch.zeros(5))
    bound = best + math.log(10)
    assert pvae.log_weights(TRUTH.pair(0.1), x, 500, proposal="defensive").max() < bound
    assert pvae.log_weights(TRUTH.pair(0.1), x, 500).max() > bound


def test_a_mode_that_the_guide_misses_shows():
    """Half of p(x) lies where the guide never goes, and its k-hat sees nothing of it."""
    pair = PyroPair(MISSING.model, MISSING.guide)
    log_p = MISSING.log_prob(X)
    guide, mixture = (
        pvae.evaluate(pair, X, 20_000, proposal=p, grid=[20_000]) for p in ("guide", "defensive")
    )
    low = torch.tensor(guide.log_p.values)
    assert guide.failing == 0
    assert_close(low, log_p - math.log(2), rtol=0, atol=0.05)
    assert_close(torch.tensor(mixture.log_p.values), log_p, rtol=0, atol=0.15)


def test_discrete_latents_take_the_defensive_proposal_too():
    model, x = with_bernoullis(), torch.randn(1, 2, dtype=torch.float64).expand(300, -1)
    guide, mixture = (
        pvae.log_weights(model, x, 400, proposal=p).exp().mean(0) for p in ("prior", "defensive")
    )
    error = math.sqrt(float(guide.var() + mixture.var()) / 300)
    assert abs(guide.mean() - mixture.mean()) < 4.5 * error
    assert error < 0.02 * guide.mean()


def test_lowered_defensive_weights_are_those_of_pyro():
    x = TRUTH.sample(8)
    results = [
        pvae.evaluate(TRUTH.pair(0.5), x, 3000, proposal="defensive", compile=c, grid=[3000])
        for c in (False, "auto")
    ]
    eager, again = (torch.tensor(result.log_p.values) for result in results)
    assert_close(eager, again)
    assert "KL[z]" not in results[0].per_datum  # it would be the mixture's


def test_the_prior_of_a_defensive_mixture_is_summed_over_what_is_summed_out():
    truth = LinearMixture.drawn()
    x = truth.sample(1).expand(300, -1)
    for pair in (truth.declared(), truth.pair()):
        log_w = pvae.log_weights(pair, x, 200, proposal="defensive")
        ratio = (log_w - truth.log_prob(x[:1])).exp().mean(0)
        error = ratio.std() / math.sqrt(300)
        assert abs(ratio.mean() - 1) < 4.5 * error
        assert error < 0.03


def test_a_model_whose_latents_are_all_summed_out_has_nothing_to_mix():
    truth = GaussianMixture.drawn()
    with pytest.raises(ValueError, match="leaves nothing to draw"):
        pvae.log_weights(truth.pair(), truth.sample(4), 10, proposal="defensive")


def test_an_unknown_proposal_is_refused():
    with pytest.raises(ValueError, match="must be one of 'guide', 'prior', 'defensive', got 'AIS'"):
        pvae.evaluate(TRUTH.declared(), TRUTH.sample(4), 10, proposal="AIS")
