"""KL terms of an ELBO under scales and masks, and guides that no objective can take apart."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.testing import assert_close

import pvae
from pvae import CUBO, ELBO, IWAE, PIWAE, TVO, Cyclical, ForwardKL, ReweightedWakeSleep, WarmUp
from tests.fitting import binary, declare, fit

X = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).reshape(6, 2)


class Scaled(nn.Module):
    """z ~ N(0, 1), x | z ~ N(z, 1), q(z | x) = N(x / 3, 0.8), with scales and masks of each."""

    def __init__(self, model_scale=1.0, guide_scale=1.0, model_mask=True, guide_mask=True):
        super().__init__()
        self.of_model = (model_scale, model_mask)
        self.of_guide = (guide_scale, guide_mask)

    def model(self, x):
        scale, mask = self.of_model
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scale), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        scale, mask = self.of_guide
        with pyro.plate("data", len(x)), poutine.scale(scale=scale), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x / 3, 0.8).to_event(1))


def loss(objective, pair, x=X):
    pyro.set_rng_seed(1)
    return objective.loss(pair.model, pair.guide, x)


@pytest.mark.parametrize("per", ["site", "unit"])
@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_a_scale_multiplies_the_floor_of_free_bits_as_well(per, kl):
    objective = ELBO(4, kl=kl, free_bits=5.0, free_bits_per=per)
    pair = Scaled()
    with poutine.scale(scale=2.0):
        doubled = loss(objective, pair)
    assert doubled == pytest.approx(2 * loss(objective, pair), rel=1e-12)


@pytest.mark.parametrize("per", ["site", "unit"])
def test_a_mask_takes_its_data_out_of_free_bits(per):
    """With a floor that nothing is below, the ELBO itself."""
    mask = torch.tensor([True, False] * 3)
    pair = Scaled(model_mask=mask, guide_mask=mask)
    floored = loss(ELBO(4, kl="analytic", free_bits=1e-9, free_bits_per=per), pair)
    assert floored == pytest.approx(loss(ELBO(4, kl="analytic"), pair), rel=1e-9)


@pytest.mark.parametrize(
    "apart",
    [
        {"model_scale": 0.3},
        {"guide_scale": 0.3},
        {"model_mask": torch.tensor([True, False] * 3)},
        {"guide_mask": torch.tensor([True, False] * 3)},
    ],
    ids=lambda apart: next(iter(apart)),
)
def test_terms_weighed_apart_in_model_and_guide_are_sampled(apart):
    pair = Scaled(**apart)
    assert loss(ELBO(4, kl="analytic"), pair) == pytest.approx(loss(ELBO(4), pair), rel=1e-12)
    for objective in (ELBO(kl={"z": "analytic"}), ELBO(free_bits=0.1)):
        with pytest.raises(ValueError, match=r"KL\[z\] is no one term where 'z' has another scale"):
            loss(objective, pair)


def test_free_bits_per_unit_take_a_latent_of_one_number():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1) / 2, 0.8))

    found = []
    for per in ("site", "unit"):
        pyro.set_rng_seed(1)
        found.append(ELBO(3, free_bits=0.3, free_bits_per=per).loss(model, guide, X))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


class ThroughAnother(nn.Module):
    """z = m + s u by way of u ~ N(0, 1), as some automatic guides draw it."""

    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.log_s = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    model = Scaled().model

    def guide(self, x):
        with pyro.plate("data", len(x)):
            one = dist.Normal(torch.zeros_like(x), 1.0).to_event(1)
            u = pyro.sample("u", one, infer={"is_auxiliary": True})
            density = -self.log_s.sum().expand(u.shape[:-1])
            pyro.sample("z", dist.Delta(self.m + self.log_s.exp() * u, density, event_dim=1))


SEPARATING = [
    ELBO(gradient="stl"),
    IWAE(3, "stl"),
    IWAE(3, "dreg"),
    TVO(3),
    ReweightedWakeSleep(3),
    ForwardKL(3),
    ForwardKL(3, "dreg"),
]


@pytest.mark.parametrize("objective", SEPARATING, ids=repr)
def test_a_score_that_cannot_be_told_from_the_draws_is_refused(objective):
    pair = ThroughAnother()
    with pytest.raises(ValueError, match="a draw goes through the auxiliary site 'u'"):
        objective.loss(pair.model, pair.guide, X)


@pytest.mark.parametrize("objective", [ELBO(3), IWAE(3), PIWAE(2, 2), CUBO(3)], ids=repr)
def test_other_objectives_take_guides_with_auxiliary_sites(objective):
    pair = ThroughAnother()
    objective.loss_and_grads(pair.model, pair.guide, X)
    assert pair.log_s.grad.abs().sum() > 0


def test_an_objective_that_has_met_another_pair_starts_afresh_in_fit():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(c.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def named(name):
        renamed = poutine.block(hide_fn=lambda site: False)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample(name, dist.Bernoulli(x.new_full((3,), 0.4)).to_event(1))

        return renamed(guide)

    objective = ELBO()
    objective.loss(model, named("c"), X)
    assert list(objective.kept) == ["c"]
    fit(declare("vae"), binary(), objective, steps=2)
    assert list(objective.kept) == ["c"]
    discrete = pvae.LatentModel(
        d=pvae.Latent(dist.Bernoulli, 3),
        x=pvae.Observed(dist.Bernoulli, 6, given="d", net=pvae.nets.MLP(3)),
        guide={"d": pvae.Latent(dist.Bernoulli, 3, given="x", net=pvae.nets.MLP(3))},
    )
    fit(discrete, binary(), objective, steps=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmUp(0), "`steps` must be at least 1, got 0"),
        (lambda: WarmUp(-4), "`steps` must be at least 1, got -4"),
        (lambda: WarmUp(4, start=2.0), r"`start` must be a weight in \[0, 1\], got 2.0"),
        (lambda: Cyclical(10, 0), "`cycles` must be at least 1, got 0"),
        (lambda: Cyclical(10, 2, 0.0), r"`rise` must be a share in \(0, 1\], got 0.0"),
        (lambda: ELBO(beta=lambda step: -1.0), "`beta` must be a weight of at least 0, got -1.0"),
    ],
)
def test_schedules_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_that_turns_negative_is_refused_where_it_does():
    objective, pair = ELBO(beta=lambda step: 1.0 - step), Scaled()
    for _ in range(2):
        objective.loss_and_grads(pair.model, pair.guide, X)
    with pytest.raises(ValueError, match=r"`beta` must be a weight of at least 0, got -1\.0"):
        objective.loss_and_grads(pair.model, pair.guide, X)


def test_text_of_an_objective_has_no_address():
    assert " at 0x" not in repr(ELBO(beta=functools.partial(max, 0.5)))


def test_beta_may_be_a_number_of_torch():
    assert ELBO(beta=torch.tensor(2.0)).beta == 2.0
    assert_close(ELBO(beta=torch.tensor(2.0)).beta_now.item(), 2.0)
