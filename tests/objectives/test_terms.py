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
    CUBO(3),
    TVO(3),
    ReweightedWakeSleep(3),
    ForwardKL(3),
    ForwardKL(3, "dreg"),
]


@pytest.mark.parametrize("objective", SEPARATING, ids=repr)
def test_a_score_that_cannot_be_told_from_the_draws_is_refused(objective):
    pair = ThroughAnother()
    with pytest.raises(ValueError, match="a site is auxiliary, and drawn through: 'u'"):
        objective.loss(pair.model, pair.guide, X)


@pytest.mark.parametrize("objective", [ELBO(3), IWAE(3), PIWAE(2, 2)], ids=repr)
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
    assert list(objective.kept) == ["of c"]
    fit(declare("vae"), binary(), objective, steps=2)
    assert list(objective.kept) == ["of c"]
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


# ------------------------------------------------------------------------------ sites and scales


class InsidePlates(nn.Module):
    """Data along dimension -2, their pixels along -1, each datum with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.weight = torch.linspace(0.5, 2, len(X), dtype=torch.float64).unsqueeze(1)
        self.loc = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-2), poutine.scale(scale=self.weight):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0))
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-2), poutine.scale(scale=self.weight):
            pyro.sample("z", dist.Normal(x.mean(1, keepdim=True) + self.loc, 0.8))

    def flat_model(self, x):
        with pyro.plate("data", len(x)), poutine.scale(scale=self.weight[:, 0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 1).to_event(1), obs=x)

    def flat_guide(self, x):
        with pyro.plate("data", len(x)), poutine.scale(scale=self.weight[:, 0]):
            pyro.sample("z", dist.Normal(x.mean(1) + self.loc, 0.8))


def both_losses(objective, pair):
    """In plates, and flat: the loss and its gradient."""
    found = []
    for model, guide in ((pair.model, pair.guide), (pair.flat_model, pair.flat_guide)):
        pair.zero_grad()
        objective.loss(model, guide, X)
        pyro.set_rng_seed(1)
        loss = objective.loss_and_grads(model, guide, X)
        found.append((loss, pair.loc.grad.item()))
    return found


@pytest.mark.parametrize(
    "objective",
    [
        ELBO(),
        ELBO(6),
        ELBO(4, gradient="stl"),
        ELBO(4, kl="analytic", beta=0.5),
        IWAE(4),
        IWAE(6, "dreg"),
        CUBO(4),
        TVO(4),
        ReweightedWakeSleep(4),
    ],
    ids=repr,
)
def test_scales_of_each_datum_are_told_in_any_plate(objective):
    inside, flat = both_losses(objective, InsidePlates())
    assert_close(inside, flat)


def test_a_scale_that_differs_within_a_datum_is_refused():
    pair = InsidePlates()
    with (
        pytest.raises(ValueError, match=r"scale of site 'z' has shape \(6, 2\), and differs"),
        poutine.scale(scale=torch.ones(2)),
    ):
        ELBO().loss(pair.model, pair.guide, X)


class AtAPoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.Parameter(torch.zeros(6, 2, dtype=torch.float64))

    model = Scaled().model

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.m, event_dim=1))


@pytest.mark.parametrize("objective", SEPARATING, ids=repr)
def test_a_guide_without_a_density_has_no_score_to_tell_apart(objective):
    pair = AtAPoint()
    with pytest.raises(ValueError, match="a site has no density: 'z'"):
        objective.loss(pair.model, pair.guide, X)


@pytest.mark.parametrize("objective", [ELBO(gradient="stl"), PIWAE(2, 2), TVO(3)], ids=repr)
def test_a_flow_without_an_inverse_is_refused_where_draws_are_cut(objective):
    flow = dist.transforms.Planar(2).double()

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros_like(x), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    with pytest.raises(ValueError, match="the guide has a transform without an inverse"):
        objective.loss(Scaled().model, guide, X)
    assert ELBO().loss(Scaled().model, guide, X) > 0


def coins(name):
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample(name, dist.Bernoulli(x.new_full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(c.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(name, dist.Bernoulli(x.new_full((3,), 0.4)).to_event(1))

    return model, guide


@pytest.mark.parametrize("name", ["vae.z", "keys", "training"])
def test_baselines_are_kept_for_sites_of_any_name(name):
    objective = ELBO()
    objective.loss_and_grads(*coins(name), X)
    assert len(objective.kept) == 1


def test_programs_wrapped_anew_at_each_step_keep_their_baselines():
    objective, (model, guide) = ELBO(), coins("c")
    weights = []
    for _ in range(3):
        objective.loss_and_grads(poutine.scale(model, scale=1.0), guide, X)
        with torch.enable_grad():
            objective.differentiable_loss(poutine.scale(model, scale=1.0), guide, X)
        weights.append(float(objective.kept["of c"].weight))
    assert weights == sorted(set(weights))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (ELBO(kl={"zz": "analytic"}), "`kl` names 'zz', .* draws 'z'. Did you mean 'z'?"),
        (ELBO(baseline={"y": "none"}), "`baseline` names 'y', which the guide does not draw"),
    ],
)
def test_settings_of_unknown_sites_are_refused(objective, message):
    pair = Scaled()
    with pytest.raises(ValueError, match=message):
        objective.loss(pair.model, pair.guide, X)


def test_free_bits_look_at_data_that_are_seen():
    """Half masked: the floor is that of the other half alone."""
    mask = torch.tensor([True, False] * 3)
    masked, half = Scaled(model_mask=mask, guide_mask=mask), Scaled()
    for per in ("site", "unit"):
        for floor in (0.05, 5.0):
            objective = ELBO(kl="analytic", free_bits=floor, free_bits_per=per)
            plain = ELBO(kl="analytic")
            added = [
                loss(objective, pair, x) - loss(plain, pair, x)
                for pair, x in ((masked, X), (half, X[mask]))
            ]
            assert added[0] == pytest.approx(added[1], abs=1e-9)


def test_where_a_schedule_stands_is_part_of_the_state():
    one, other, pair = ELBO(beta=WarmUp(10)), ELBO(beta=WarmUp(10)), Scaled()
    for _ in range(5):
        one.loss_and_grads(pair.model, pair.guide, X)
    other.load_state_dict(one.state_dict())
    other.loss_and_grads(pair.model, pair.guide, X)
    assert float(other.beta_now) == 0.5


def test_the_thermodynamic_objective_of_one_interval_has_the_elbos_gradient():
    """Cov_q(d log q, log w) of a sample, with K / (K - 1), has the score's expectation."""
    m = torch.zeros(20_000, 1, dtype=torch.float64, requires_grad=True)
    x = torch.full((20_000, 1), 0.7, dtype=torch.float64)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, 0.8).to_event(1))

    found = []
    for objective in (TVO(2, betas=(0.0,)), ELBO()):
        pyro.set_rng_seed(0)
        loss = objective.differentiable_loss(Scaled().model, guide, x)
        found.append(torch.autograd.grad(loss, m)[0])
    one, other = found
    error = ((one.var() + other.var()) / len(x)).sqrt()
    assert abs(one.mean() - other.mean()) < 4.5 * error
    assert error < 0.05 * other.mean().abs()


def test_looped_particles_have_learned_baselines():
    discrete = pvae.PyroPair(*coins("c"), vectorize_particles=False)
    fit(discrete, X, ELBO(3, baseline="learned"), steps=2, batch_size=3)


def test_cubos_gradient_with_many_particles_is_that_of_the_upper_bound():
    """E_q[w^2] by quadrature, of a guide that is a bit off, differentiated in its mean."""
    start, x = 0.1, torch.full((400, 1), 0.7, dtype=torch.float64)
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    m = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x[0])
    cubo = (2 * log_joint - dist.Normal(m, 0.8).log_prob(z)).logsumexp(0) / 2
    (expected,) = torch.autograd.grad(cubo, m)
    each = torch.full((400, 1), start, dtype=torch.float64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(each, 0.8).to_event(1))

    (found,) = torch.autograd.grad(CUBO(2000).differentiable_loss(Scaled().model, guide, x), each)
    error = found.std() / 20
    assert abs(found.mean() - expected) < 4.5 * error + 0.005 * abs(expected)  # biased by 1/K
    assert error < 0.05 * abs(expected)


def test_a_fit_by_cubo_stays_where_the_posterior_is():
    """Lowering the estimate of CUBO itself, through the draws, ends in NaN within 300 steps."""
    data = pvae.load_data("digits").train.subset(slice(400))
    torch.manual_seed(0)
    model = pvae.models.vae(data_size=64, latent_size=4, hidden=(50,))
    history = fit(model, data, CUBO(20), epochs=20, compile="auto").history
    assert history["train"].iloc[-1] > history["train"].iloc[0] + 10
    assert (history["train CUBO"] > history["train"]).all()
