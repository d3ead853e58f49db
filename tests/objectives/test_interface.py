"""What objectives say of themselves, what they refuse, and how they run under autocast."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import pvae
from pvae import Latent, LatentModel, Observed, objectives
from pvae.nets import MLP
from pvae.objectives import (
    CIWAE,
    CUBO,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    TVO,
    Cyclical,
    ForwardKL,
    Renyi,
    ReweightedWakeSleep,
    WarmUp,
)
from pvae.particles import draw

NAMES = {**{name: getattr(objectives, name) for name in objectives.__all__}, "inf": math.inf}

REPRS = [
    (ELBO(), "ELBO(num_particles=1)"),
    (ELBO(3, gradient="stl"), "ELBO(num_particles=3, gradient='stl')"),
    (ELBO(kl="analytic", beta=4.0), "ELBO(num_particles=1, kl='analytic', beta=4.0)"),
    (ELBO(kl={"z": "analytic"}), "ELBO(num_particles=1, kl={'z': 'analytic'})"),
    (ELBO(beta=WarmUp(9)), "ELBO(num_particles=1, beta=WarmUp(steps=9, start=0.0))"),
    (
        ELBO(beta=Cyclical(9, 3)),
        "ELBO(num_particles=1, beta=Cyclical(steps=9, cycles=3, rise=0.5))",
    ),
    (
        ELBO(free_bits=0.5, free_bits_per="unit"),
        "ELBO(num_particles=1, free_bits=0.5, free_bits_per='unit')",
    ),
    (ELBO(2, baseline="average"), "ELBO(num_particles=2, baseline='average')"),
    (
        ELBO(2, baseline={"z": "none", "c": "learned"}),
        "ELBO(num_particles=2, baseline={'z': 'none', 'c': 'learned'})",
    ),
    (IWAE(), "IWAE(num_particles=50)"),
    (IWAE(5, "dreg"), "IWAE(num_particles=5, gradient='dreg')"),
    (MIWAE(), "MIWAE(num_means=8, num_particles=8)"),
    (MIWAE(3, 2, "vimco"), "MIWAE(num_means=3, num_particles=2, baseline='vimco')"),
    (PIWAE(3, 2), "PIWAE(num_means=3, num_particles=2)"),
    (CIWAE(4), "CIWAE(num_particles=4)"),
    (CIWAE(4, 0.25), "CIWAE(num_particles=4, beta=0.25)"),
    (Renyi(4), "Renyi(num_particles=4)"),
    (Renyi(4, -math.inf), "Renyi(num_particles=4, alpha=-inf)"),
    (CUBO(4), "CUBO(num_particles=4)"),
    (CUBO(4, 3.0), "CUBO(num_particles=4, order=3.0)"),
    (TVO(), "TVO(num_particles=50)"),
    (TVO(4, [0, 0.5]), "TVO(num_particles=4, betas=(0, 0.5))"),
    (ReweightedWakeSleep(4), "ReweightedWakeSleep(num_particles=4)"),
    (ReweightedWakeSleep(4, "both"), "ReweightedWakeSleep(num_particles=4, guide='both')"),
    (ForwardKL(4), "ForwardKL(num_particles=4)"),
    (ForwardKL(4, "dreg"), "ForwardKL(num_particles=4, gradient='dreg')"),
]


@pytest.mark.parametrize(("objective", "text"), REPRS, ids=[text for _, text in REPRS])
def test_an_objective_prints_as_the_call_that_makes_it(objective, text):
    assert repr(objective) == text
    made = eval(text, dict(NAMES))
    assert repr(made) == text
    assert type(made) is type(objective)
    assert made.draws == objective.draws


def rising(step: int) -> float:
    return min(1.0, step / 10)


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (ELBO(beta=rising), "ELBO(num_particles=1, beta=rising)"),
        (ELBO(baseline={"z": nn.Linear(2, 1)}), "ELBO(num_particles=1, baseline={'z': Linear})"),
    ],
)
def test_functions_and_networks_print_by_name_and_without_addresses(objective, text):
    assert repr(objective) == text
    assert repr(copy.deepcopy(objective)) == text


def test_printing_is_the_same_after_use():
    x = torch.rand(8, 6).round()
    for objective, text in REPRS:
        used = copy.deepcopy(objective)
        if isinstance(used.baseline, dict) or isinstance(getattr(used, "kl", None), dict):
            continue  # the pair's latent is another
        used.loss(*programs(), x)
        assert repr(used) == text


# ------------------------------------------------------------------------------ refused

REFUSED = [
    (lambda: ELBO(0), "`num_particles` must be at least 1, got 0"),
    (lambda: ELBO(gradient="dreg"), "`gradient` must be 'pathwise' or 'stl', got 'dreg'"),
    (lambda: ELBO(kl="exact"), "`kl` must be 'sampled', 'analytic', or these by latent; got 'ex"),
    (lambda: ELBO(kl={"z": "exact"}), "`kl` must be 'sampled', 'analytic', or these by latent"),
    (lambda: ELBO(beta=-1.0), "`beta` must be a weight of at least 0, got -1.0"),
    (lambda: ELBO(beta=math.nan), "`beta` must be a weight of at least 0, got nan"),
    (lambda: ELBO(free_bits=-0.1), "`free_bits` must be at least 0 nats, got -0.1"),
    (lambda: ELBO(free_bits_per="pixel"), "`free_bits_per` must be 'site' or 'unit', got 'pixel'"),
    (lambda: ELBO(gradient="stl", kl="analytic"), "gradient='stl' leaves out the score of sampled"),
    (lambda: ELBO(gradient="stl", free_bits=1.0), "kl='sampled' and without free bits"),
    (lambda: ELBO(baseline="mean"), "`baseline` must be one of 'auto', .* a network, or these by"),
    (lambda: ELBO(baseline={"z": "mean"}), "`baseline` must be one of .* got 'mean'"),
    (lambda: IWAE(0), "`num_particles` must be at least 1, got 0"),
    (lambda: IWAE(5, "tight"), "`gradient` must be 'pathwise', 'stl' or 'dreg', got 'tight'"),
    (lambda: IWAE(5, baseline="mean"), "`baseline` must be one of"),
    (lambda: MIWAE(0, 5), "`num_means` must be at least 1, got 0"),
    (lambda: MIWAE(5, 0), "`num_particles` must be at least 1, got 0"),
    (lambda: PIWAE(0, 5), "`num_means` must be at least 1, got 0"),
    (lambda: CIWAE(5, beta=1.5), r"`beta` weighs the ELBO against L_K, in \[0, 1\]; got 1.5"),
    (lambda: CIWAE(5, beta=-0.5), r"`beta` weighs the ELBO against L_K, in \[0, 1\]; got -0.5"),
    (lambda: Renyi(5, math.inf), r"`alpha` must be a number or -inf \(VR-max\), got inf"),
    (lambda: Renyi(5, math.nan), r"`alpha` must be a number or -inf \(VR-max\), got nan"),
    (lambda: CUBO(5, 1.0), "`order` must be above 1 for an upper bound, got 1.0"),
    (lambda: TVO(1), "The covariances of TVO need at least 2 particles, got 1"),
    (lambda: TVO(5, [0.5]), r"`betas` must rise from 0, and lie below 1; got \(0.5,\)"),
    (lambda: TVO(5, [0, 0.5, 0.5]), r"`betas` must rise from 0"),
    (lambda: TVO(5, [0, 1.0]), r"`betas` must rise from 0, and lie below 1"),
    (lambda: TVO(5, []), r"`betas` must rise from 0, and lie below 1; got \(\)"),
    (lambda: ReweightedWakeSleep(5, "rest"), "`guide` must be 'wake', 'sleep' or 'both', got 'r"),
    (lambda: ForwardKL(5, "stl"), "`gradient` must be 'score' or 'dreg', got 'stl'"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_arguments_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [ELBO, IWAE, MIWAE, PIWAE, CIWAE, Renyi, CUBO, TVO, ForwardKL])
def test_a_number_of_particles_that_is_no_whole_number_is_refused(kind):
    with pytest.raises(TypeError, match=r"`num_(particles|means)` must be a whole number, got 2.5"):
        kind(2.5)


@pytest.mark.parametrize(
    "objective",
    [ELBO(2, gradient="stl"), IWAE(2, "stl"), IWAE(2, "dreg"), ForwardKL(2, "dreg")],
    ids=repr,
)
def test_gradients_through_draws_need_draws_to_go_through(objective):
    model = LatentModel(
        z=Latent(dist.Bernoulli, 3),
        x=Observed(dist.Bernoulli, 6, given="z", net=MLP(5)),
        guide={"z": Latent(dist.Bernoulli, 3, given="x", net=MLP(5))},
    )
    x, own = torch.rand(8, 6).round(), copy.deepcopy(objective)
    match = f"gradient='{own.gradient}' goes through .* those of 'z' are not reparameterised"
    with pytest.raises(ValueError, match=match):
        own.differentiable_loss(model.model, model.guide, x)


# ------------------------------------------------------------------------------ autocast


class Tutorial(nn.Module):
    """A VAE as in Pyro's tutorial, in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 6))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def programs():
    pair = Tutorial()
    return pair.model, pair.guide


def declared() -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(
        z=Latent(dist.Normal, 4), x=Observed(dist.Bernoulli, 6, given="z", net=MLP(32))
    )


AUTOCAST = [
    ELBO(5),
    ELBO(5, kl="analytic"),
    ELBO(5, gradient="stl"),
    ELBO(5, beta=WarmUp(10)),
    ELBO(5, free_bits=0.5, free_bits_per="unit"),
    IWAE(5),
    IWAE(5, "stl"),
    IWAE(5, "dreg"),
    MIWAE(2, 3),
    PIWAE(2, 3),
    CIWAE(5),
    Renyi(5),
    CUBO(5),
    TVO(5),
    ReweightedWakeSleep(5, "both"),
    ForwardKL(5),
    ForwardKL(5, "dreg"),
]


@pytest.mark.parametrize("make", [Tutorial, declared])
@pytest.mark.parametrize("objective", AUTOCAST, ids=repr)
def test_under_autocast_gradients_are_those_of_float32_but_for_rounding(make, objective):
    """bfloat16 has 8 bits: within 5 percent of the gradient's length, and 0.1 nats a datum."""
    pair, x, found = make(), torch.rand(200, 6).round(), []
    for enabled in (False, True):
        own = copy.deepcopy(objective)
        own.loss(pair.model, pair.guide, x)
        pair.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = own(pair.model, pair.guide)(x)
        loss.backward()
        assert loss.dtype == torch.float32
        gradient = torch.cat([p.grad.flatten() for p in pair.parameters()])
        found.append((loss.detach(), gradient))
    (exact, expected), (loss, gradient) = found
    assert_close(loss, exact, rtol=0, atol=200 * 0.1)
    assert (gradient - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(gradient, expected), "autocast has changed something"


@pytest.mark.parametrize("make", [Tutorial, declared])
def test_a_plain_loop_under_autocast_trains(make):
    pair, x, objective = make(), torch.rand(64, 6).round(), IWAE(5, "dreg")
    x[:, :3] = x[:, :1]
    objective.loss(pair.model, pair.guide, x)
    optimizer = torch.optim.Adam(pair.parameters(), lr=0.02)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(pair.model, pair.guide)(x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) < sum(losses[:10]) - 10 * 64 * 0.3


@pytest.mark.parametrize("make", [Tutorial, declared])
def test_log_weights_are_in_float32_under_autocast(make):
    pair, x = make(), torch.rand(8, 6).round()
    IWAE(2).loss(pair.model, pair.guide, x)
    with torch.autocast("cpu", torch.bfloat16):
        particles = draw(pair.model, pair.guide, (x,), num_particles=3)
    assert particles.log_weights.dtype == torch.float32


def test_a_discrete_guide_of_a_continuous_latent_is_refused():
    """Its weights would have no meaning, and pass every check."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))

    x = torch.randn(4, 2)
    for objective in (ELBO(), IWAE(3)):
        with pytest.raises(ValueError, match="one is discrete and the other is not"):
            objective.loss(model, guide, x)
    with pytest.raises(ValueError, match="one is discrete and the other is not"):
        pvae.log_weights(pvae.PyroPair(model, guide), x, 3)
    with pytest.raises(ValueError, match=r"The guide draws 'z' from .* in the model it lies in"):
        pvae.LatentModel(
            z=pvae.Latent(dist.Normal, 2),
            x=pvae.Observed(dist.Normal, 3, given="z", net=MLP(4)),
            guide={"z": pvae.Latent(dist.Bernoulli, 2, given="x", net=MLP(4))},
        )


def test_what_is_no_pair_is_named():
    fitted = pvae.fit(pvae.models.ppca(3, 1), torch.randn(20, 3), steps=1, progress=False)
    for evaluate in (pvae.evaluate, pvae.ais):
        with pytest.raises(TypeError, match="PyroPair, got Fit: pass its `model`"):
            evaluate(fitted, torch.randn(4, 3))
    with pytest.raises(TypeError, match="`guide` must be a Pyro program, got 2"):
        pvae.PyroPair(print, 2)
    with pytest.raises(TypeError, match="must be a number or a function of the step, got 'warmup'"):
        ELBO(beta="warmup")
