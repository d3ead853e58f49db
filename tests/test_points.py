"""Sobol points as draws of a proposal: their law, their evenness, and what they gain."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.testing import assert_close

import pvae
from pvae import Latent, LatentModel, Observed, PyroPair, Refine
from pvae.nets import MLP
from pvae.points import REPLICATES, Scores, _quantile
from tests.exact import LinearGaussian
from tests.fitting import binary, declare

TRUTH = LinearGaussian.drawn()
PAIR = TRUTH.pair(1.5)
Z = torch.tensor([[-2.0, 0.3], [0.0, 1.4]], dtype=torch.float64)
ONE = torch.ones(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    "d",
    [
        dist.Normal(ONE, 2 * ONE),
        dist.LogNormal(ONE, 0.5 * ONE),
        dist.Laplace(ONE, 2 * ONE),
        dist.Exponential(2 * ONE),
        dist.Uniform(-ONE, 3 * ONE),
        dist.Normal(ONE, 2 * ONE).to_event(1),
    ],
    ids=lambda d: type(d).__name__,
)
def test_a_draw_at_a_score_is_the_quantile_of_its_probability(d):
    draw = _quantile(d, Z)
    base = d.base_dist if isinstance(d, dist.Independent) else d
    assert_close(base.cdf(draw), torch.special.ndtr(Z))


def test_correlated_draws_have_their_covariance():
    L = torch.tensor([[1.0, 0.0], [0.7, 0.4]], dtype=torch.float64)
    d = dist.MultivariateNormal(torch.ones(2).double(), scale_tril=L)
    assert_close(_quantile(d, Z), 1 + Z @ L.T)


def test_each_set_of_points_has_one_in_each_stratum():
    """Of 2^m points, along each axis, for every datum: shifts of bits keep a net a net."""
    K, N, D = 8 * 64, 5, 7
    u = torch.special.ndtr(Scores(K, N, D)(0, K, torch.zeros((), dtype=torch.float64)))
    strata = (u * 64).long().reshape(REPLICATES, 64, N, D).sort(1).values
    assert torch.equal(strata, torch.arange(64).reshape(1, -1, 1, 1).expand_as(strata))


def test_points_differ_between_data_and_sets():
    scores = Scores(16, 3, 2)(0, 16, torch.zeros(()))
    assert len(scores.reshape(-1, 2).unique(dim=0)) == 48


def test_errors_are_smaller_and_told_rightly():
    """Of 300 data alike; weights of a guide that is a little too broad are bounded."""
    x = TRUTH.sample(1).expand(300, -1)
    found = {}
    for points in ("random", "sobol"):
        result = pvae.evaluate(PAIR, x, 8 * 128, points=points, grid=[1])
        error = torch.tensor((result.log_p - float(TRUTH.log_prob(x[:1]))).values)
        told = torch.tensor(result.per_datum["bound_se"][-1].values)
        found[points] = error.square().mean().sqrt(), told.square().mean().sqrt()
        ratio = error.exp()
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(300)
        elbo = torch.tensor(result.per_datum["bound"][0].values)
        elbo_se = torch.tensor(result.per_datum["bound_se"][0].values).square().mean().sqrt()
        assert elbo.std() / elbo_se < 1.3
        assert elbo_se / elbo.std() < 1.3
    (plain, plain_told), (even, even_told) = found["random"], found["sobol"]
    assert even < 0.6 * plain
    for true, told in ((plain, plain_told), (even, even_told)):
        assert told == pytest.approx(float(true), rel=4.5 / math.sqrt(2 * 300) + 0.05)


def test_the_prior_and_a_refined_guide_take_them_too():
    x = TRUTH.sample(4)
    for proposal in ("prior", Refine(20, 4)):
        result = pvae.evaluate(PAIR, x, 8 * 512, points="sobol", proposal=proposal)
        error = (result.log_p - TRUTH.log_prob(x).numpy()) / result.per_datum["bound_se"][-1]
        assert float(abs(error).max()) < 8  # of a t distribution of seven degrees of freedom
        assert result.proposal.endswith(", at Sobol points")


def test_particles_drawn_one_at_a_time_are_at_the_same_points():
    x = TRUTH.sample(3)
    together, alone = (
        pvae.evaluate(
            PyroPair(PAIR.model, PAIR.guide, vectorize_particles=v), x, 16, points="sobol"
        )
        for v in (True, False)
    )
    assert_close(together.log_p.values, alone.log_p.values)


def test_lowered_weights_at_sobol_points_are_those_of_pyro(monkeypatch):
    model, x = declare("hierarchical_vae"), binary(20)
    monkeypatch.setattr("pvae.passes.MAX_ROWS", 400)
    eager = pvae.evaluate(model, x, 128, points="sobol", compile=False)
    monkeypatch.setattr("pvae.passes.SHORT", 1)
    traced = pvae.evaluate(model, x, 128, points="sobol")
    assert eager.per_datum.identical(traced.per_datum)


def with_gamma() -> LatentModel:
    return LatentModel(
        z=Latent(dist.Gamma, 2),
        x=Observed(dist.Normal, 3, given="z", net=MLP(4)),
        guide={"z": Latent(dist.Gamma, 2, given="x", net=MLP(4))},
    )


def nested() -> PyroPair:
    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("parts", 2, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    return PyroPair(model, guide)


@pytest.mark.parametrize(
    ("pair", "size", "settings", "match"),
    [
        (with_gamma, 3, {}, "need a quantile function, and 'z' .Gamma. has none"),
        (nested, 2, {}, "Sobol points need latents that lie in the data's plate alone"),
        (TRUTH.pair, 5, {"num_particles": 100}, "must be a multiple of 8 with Sobol points"),
        (TRUTH.pair, 5, {"grid": [20]}, r"With Sobol points `grid` must lie in 1..8, or be K"),
        (TRUTH.pair, 5, {"proposal": "defensive"}, "The defensive proposal is drawn at random"),
        (
            TRUTH.pair,
            5,
            {"target_se": 0.1, "max_particles": 100},
            "`max_particles` must be a multiple of 8 with Sobol points, got 100",
        ),
        (TRUTH.pair, 5, {"points": "halton"}, "`points` must be 'random' or 'sobol', got 'halton'"),
    ],
    ids=lambda case: "",
)
def test_what_sobol_points_cannot_do_is_refused(pair, size, settings, match):
    with pytest.raises(ValueError, match=match):
        pvae.evaluate(
            pair(), torch.zeros(3, size), **{"num_particles": 64, "points": "sobol", **settings}
        )
