"""Variational parameters of each datum's own, against the posterior and torch's transforms."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import transforms
from torch.testing import assert_close

import pvae
from pvae import Latent, LatentModel, Observed, PyroPair, Refine
from pvae.fence import evaluating
from pvae.nets import MLP
from pvae.refinement import Refinement, _innermost, _movable, _moved
from tests.exact import LinearGaussian
from tests.fitting import binary, declare, parameters

ONE = LinearGaussian.drawn(data_size=3, latent_size=1)
TRUTH = LinearGaussian.drawn()
POSITIVE = torch.tensor([0.5, 2.0], dtype=torch.float64)
REAL = torch.tensor([-1.0, 0.7], dtype=torch.float64)

MOVED = [  # a distribution, and what it is when every unconstrained parameter grows by 0.3
    (dist.Normal(REAL, POSITIVE), dist.Normal(REAL + 0.3, POSITIVE * math.exp(0.3))),
    (dist.LogNormal(REAL, POSITIVE), dist.LogNormal(REAL + 0.3, POSITIVE * math.exp(0.3))),
    (dist.Gamma(POSITIVE, POSITIVE), dist.Gamma(*[POSITIVE * math.exp(0.3)] * 2)),
    (dist.Beta(POSITIVE, POSITIVE), dist.Beta(*[POSITIVE * math.exp(0.3)] * 2)),
    (dist.Bernoulli(logits=REAL), dist.Bernoulli(logits=REAL + 0.3)),
    (dist.Bernoulli(REAL.sigmoid()), dist.Bernoulli(logits=REAL + 0.3)),
    (
        dist.StudentT(POSITIVE, REAL, POSITIVE),
        dist.StudentT(POSITIVE * math.exp(0.3), REAL + 0.3, POSITIVE * math.exp(0.3)),
    ),
    (
        dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5).double(), logits=REAL),
        dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5).double(), logits=REAL + 0.3),
    ),
    (
        dist.Normal(REAL, POSITIVE).to_event(1),
        dist.Normal(REAL + 0.3, POSITIVE * math.exp(0.3)).to_event(1),
    ),
    (
        dist.TransformedDistribution(
            dist.Normal(REAL, POSITIVE), [transforms.AffineTransform(1.0, 2.0)]
        ),
        dist.Normal(2 * (REAL + 0.3) + 1, 2 * POSITIVE * math.exp(0.3)),
    ),
    (
        dist.MultivariateNormal(REAL, scale_tril=torch.diag(POSITIVE)),
        dist.MultivariateNormal(
            REAL + 0.3,
            scale_tril=torch.diag(POSITIVE * math.exp(0.3)) + torch.tensor([[0, 0], [0.3, 0]]),
        ),
    ),
]


@pytest.mark.parametrize(("d", "expected"), MOVED, ids=lambda d: type(d).__name__)
def test_parameters_move_in_their_unconstrained_space(d, expected):
    moved = _moved(d, dict.fromkeys(_movable(_innermost(d)), torch.tensor(0.3).double()))
    value = expected.sample()
    assert_close(moved.log_prob(value), expected.log_prob(value))
    assert moved.event_shape == d.event_shape


def test_probabilities_that_were_looked_at_are_moved_once():
    """torch keeps both forms of a Bernoulli as soon as somebody asks for the other."""
    d = dist.Bernoulli(REAL.sigmoid())
    assert d.logits is not None
    assert list(_movable(d)) == ["logits"]


def refined(pair, x, how, num_particles=1000):
    columns = pair.columns(x).realised()
    block = columns.tensors()
    with evaluating(pair):
        find = Refinement(pair, columns, block, how, "eager")
        offsets = find(block)
        trace = poutine.trace(find.programs(pair, block, offsets).guide).get_trace(x)
        return trace.nodes, find.programs(pair, block, offsets).draw(num_particles).log_weights


class Wrong:
    """The model of `ONE` with a guide that is N(0, 1) for every datum."""

    model = staticmethod(ONE.model)

    @staticmethod
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))


@pytest.mark.parametrize(("bound", "steps"), [("ELBO", 200), ("IWAE", 600)])
def test_where_the_family_holds_the_posterior_it_is_found(bound, steps):
    x = ONE.sample(6)
    pair = PyroPair(Wrong.model, Wrong.guide)
    nodes, log_w = refined(pair, x, Refine(steps, 8, 0.1, bound))
    mean, covariance = ONE.posterior(x)
    assert_close(nodes["z"]["fn"].mean, mean, rtol=0, atol=0.02)
    assert_close(nodes["z"]["fn"].stddev, covariance.sqrt().expand(6, 1), rtol=0.05, atol=0)
    assert_close(log_w.mean(0), ONE.log_prob(x), rtol=0, atol=0.01)


def test_refined_weights_are_unbiased_and_vary_less():
    x = TRUTH.sample(1).expand(200, -1)
    ratios = [
        (pvae.log_weights(TRUTH.pair(0.4), x, 50, proposal=p) - TRUTH.log_prob(x[:1])).exp()
        for p in ("guide", "refined")
    ]
    (before, after) = (ratio.mean(0) for ratio in ratios)
    assert abs(after.mean() - 1) < 4.5 * after.std() / math.sqrt(200)
    assert after.std() < 0.2 * before.std()


@pytest.mark.parametrize("name", ["vae", "gaussian_vae", "hierarchical_vae", "ppca"])
def test_refining_tightens_the_bound_and_leaves_the_model_alone(name):
    model, x = declare(name), binary(8)
    before = parameters(model).clone()
    guide = pvae.evaluate(model, x, 1000, grid=[1])
    better = pvae.evaluate(model, x, 1000, proposal="refined", grid=[1])
    assert torch.equal(parameters(model), before)
    assert better.proposal == "refined guide"
    gain = better.per_datum["bound"][0] - guide.per_datum["bound"][0]
    error = (better.per_datum["bound_se"][0] ** 2 + guide.per_datum["bound_se"][0] ** 2) ** 0.5
    assert float(gain.mean()) > 4.5 * float((error**2).sum()) ** 0.5 / 8


def test_a_guide_of_bernoullis_is_refined_by_its_score():
    torch.manual_seed(0)
    model = LatentModel(
        b=Latent(dist.Bernoulli, 3),
        x=Observed(dist.Bernoulli, 6, given="b", net=MLP(5)),
        guide={"b": Latent(dist.Bernoulli, 3, given="x", net=MLP(5))},
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= 3
    x = binary(10)
    guide, better = (
        pvae.evaluate(model, x, 500, proposal=p).per_datum["bound"].sel(particles=1).mean()
        for p in ("guide", Refine(200, 8, 0.1, "ELBO"))
    )
    assert better > guide + 0.1


def test_latents_given_other_latents_are_refined_whatever_those_are():
    model, x = declare("hierarchical_vae"), binary(5)
    columns = model.columns(x)
    model.prepare(x)
    find = Refinement(model, columns, columns.tensors(), Refine(1, 2), "eager")
    assert find.offsets.names == [("z1", "loc"), ("z1", "scale"), ("z2", "loc"), ("z2", "scale")]
    assert [offset.shape for offset in find(columns.tensors())] == [(5, 3), (5, 3), (5, 2), (5, 2)]


def test_lowered_refinement_is_that_of_pyro_to_the_last_bit(monkeypatch):
    """Twenty data in blocks of eight, of which the last is smaller and runs in Pyro."""
    model, x = declare("vae"), binary(20)
    monkeypatch.setattr("pvae.passes.MAX_ROWS", 400)
    eager = pvae.evaluate(model, x, 100, proposal="refined", compile=False)
    monkeypatch.setattr("pvae.passes.SHORT", 1)
    traced = pvae.evaluate(model, x, 100, proposal="refined")
    assert eager.per_datum.identical(traced.per_datum)


def test_a_guide_without_continuous_parameters_cannot_be_refined():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x.new_zeros(len(x), 1), event_dim=1))

    with pytest.raises(ValueError, match="'pyro pair' has no continuous parameter to refine"):
        pvae.evaluate(PyroPair(ONE.model, guide), ONE.sample(3), 10, proposal="refined")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"num_particles": 0.5}, "`num_particles` must be a whole number, got 0.5"),
        ({"lr": 0.0}, "`lr` must be above zero, got 0.0"),
        ({"bound": "TVO"}, "`bound` must be 'IWAE' or 'ELBO', got 'TVO'"),
    ],
)
def test_settings_are_checked(settings, match):
    with pytest.raises((TypeError, ValueError), match=match):
        Refine(**settings)
