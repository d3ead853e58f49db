"""Objectives against Pyro's own, draw for draw, and against bounds written out by enumeration."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.testing import assert_close

import pvae
from pvae import ELBO, IWAE, Latent, LatentModel, Observed, bounds
from pvae.nets import MLP
from pvae.objectives import Objective
from tests.exact import GaussianMixture, GuidedCoin, LinearGaussian, LinearMixture, TwoCategoricals

exactly = partial(assert_close, rtol=1e-10, atol=1e-10)  # gradients are as large as they are


class Pair(nn.Module):
    """A linear VAE written as in Pyro's tutorial, in float64."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(3, 5).double(), nn.Linear(5, 6).double()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.7).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def vae() -> LatentModel:
    return LatentModel(
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Bernoulli, 5, given="z", net=MLP(7)),
    ).double()


def ladder() -> LatentModel:
    return LatentModel(
        z2=Latent(dist.Normal, 2),
        z1=Latent(dist.Normal, 3, given="z2", net=MLP(4)),
        x=Observed(dist.Normal, 5, given=("z1", "z2"), net=MLP(4)),
        guide={
            "z1": Latent(dist.Normal, 3, given="x", net=MLP(4)),
            "z2": Latent(dist.Normal, 2, given=("z1", "x"), net=MLP(4)),
        },
    ).double()


def discrete_guide() -> LatentModel:
    """The guide draws z1, which is reparameterised, and z2, which is not, given z1."""
    return LatentModel(
        z1=Latent(dist.Normal, 2),
        z2=Latent(dist.Bernoulli, 3, given="z1", net=MLP(4)),
        x=Observed(dist.Bernoulli, 5, given=("z1", "z2"), net=MLP(4)),
        guide={
            "z1": Latent(dist.Normal, 2, given="x", net=MLP(4)),
            "z2": Latent(dist.Bernoulli, 3, given=("z1", "x"), net=MLP(4)),
        },
    ).double()


def binary(num_data: int = 20) -> torch.Tensor:
    return torch.bernoulli(torch.full((num_data, 5), 0.4, dtype=torch.float64))


def loss_and_gradients(objective, pair: nn.Module, x: torch.Tensor, seed: int = 3):
    """The loss and each parameter's gradient, by `loss_and_grads`, with a seed of its own."""
    objective.loss(pair.model, pair.guide, x)  # both look for plates once, at the cost of draws
    pair.zero_grad()
    pyro.set_rng_seed(seed)
    loss = objective.loss_and_grads(pair.model, pair.guide, x)
    return loss, {name: p.grad.clone() for name, p in pair.named_parameters()}


def vectorised(kind, num_particles: int):
    return kind(num_particles=num_particles, max_plate_nesting=1, vectorize_particles=True)


# ------------------------------------------------------------------------------ against Pyro


@pytest.mark.uses_param_store
@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize("make", [Pair, vae, ladder])
def test_elbo_is_trace_elbo_draw_for_draw(make, num_particles):
    pair, x = make(), binary()
    ours = loss_and_gradients(ELBO(num_particles), pair, x)
    pyros = loss_and_gradients(vectorised(Trace_ELBO, num_particles), pair, x)
    exactly(ours, pyros)
    assert all(gradient.abs().sum() > 0 for gradient in ours[1].values())


@pytest.mark.parametrize("num_particles", [1, 5])
def test_elbo_is_trace_elbo_but_for_a_gradient_of_no_expectation(num_particles):
    """Where the guide draws z2 without reparameterisation, Pyro leaves out E_q[grad log q] = 0."""
    model, x = discrete_guide(), binary()
    our_loss, ours = loss_and_gradients(ELBO(num_particles, baseline="none"), model, x)
    pyros_loss, pyros = loss_and_gradients(vectorised(Trace_ELBO, num_particles), model, x)
    pyro.set_rng_seed(3)
    model.zero_grad()
    model.draw(x, num_particles).log_q["z2"].mean(0).sum().backward()
    exactly(our_loss, pyros_loss)
    for name, parameter in model.named_parameters():
        extra = 0 if parameter.grad is None else parameter.grad
        exactly(ours[name], pyros[name] + extra)


@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize(
    "truth", [GaussianMixture.drawn(), TwoCategoricals.drawn(), LinearMixture.drawn()], ids=type
)
def test_elbo_is_trace_enum_elbo_draw_for_draw(truth, num_particles):
    pair, x = truth.declared(), truth.sample(20)
    ours = loss_and_gradients(ELBO(num_particles), pair, x)
    pyros = loss_and_gradients(vectorised(TraceEnum_ELBO, num_particles), pair, x)
    exactly(ours, pyros)


def test_elbo_has_the_expectation_of_trace_mean_field_elbo():
    """Which takes each KL in closed form: other numbers, the same bound."""
    pair, x = vae(), binary()

    def losses(objective):
        objective.max_plate_nesting = 1
        return torch.tensor([objective.loss(pair.model, pair.guide, x) for _ in range(400)])

    ours, pyros = losses(ELBO()), losses(TraceMeanField_ELBO())
    error = math.sqrt(float(ours.var() + pyros.var()) / 400)
    assert abs(float(ours.mean() - pyros.mean())) < 4.5 * error
    assert pyros.std() < ours.std()


@pytest.mark.uses_param_store
@pytest.mark.parametrize("objective", [ELBO(3), IWAE(3)], ids=repr)
@pytest.mark.parametrize("make", [Pair, vae])
def test_objectives_run_in_pyros_svi(objective, make):
    pair, x = make(), binary(50)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.02}), objective)
    before = copy.deepcopy(pair.state_dict())
    start = sum(svi.evaluate_loss(x) for _ in range(20)) / 20
    losses = [svi.step(x) for _ in range(60)]
    assert all(isinstance(loss, float) for loss in losses)
    assert all((value != before[name]).any() for name, value in pair.state_dict().items())
    assert sum(losses[-20:]) / 20 < start


def test_svi_takes_the_steps_that_trace_elbo_would():
    """Adam's path of 10 steps, parameter for parameter."""
    paths = []
    for objective in (ELBO(5), vectorised(Trace_ELBO, 5)):
        pyro.set_rng_seed(0)
        model, x = vae(), binary()
        objective.loss(model.model, model.guide, x)
        pyro.set_rng_seed(1)
        svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.01}), objective)
        for _ in range(10):
            svi.step(x)
        paths.append(model.state_dict())
    exactly(paths[0], paths[1])


@pytest.mark.parametrize("objective", [ELBO(3), IWAE(3)], ids=repr)
def test_an_objective_called_with_a_pair_is_pyros_module(objective):
    model, x = vae(), binary()
    loss = objective(model.model, model.guide)
    assert isinstance(loss, pyro.infer.elbo.ELBOModule)
    loss(x)
    pyro.set_rng_seed(2)
    value = loss(x)
    pyro.set_rng_seed(2)
    exactly(value.item(), objective.loss(model.model, model.guide, x))
    value.backward()
    assert all(p.grad is not None for p in model.parameters())


# ------------------------------------------------------------------------------ three faces


@pytest.mark.parametrize("objective", [ELBO(1), ELBO(4), IWAE(1), IWAE(4)], ids=repr)
@pytest.mark.parametrize("make", [vae, discrete_guide])
def test_the_three_losses_agree(objective, make):
    pair, x = make(), binary()
    objective.baseline = "none"  # an average would differ between the calls
    loss, gradients = loss_and_gradients(objective, pair, x)
    pair.zero_grad()
    pyro.set_rng_seed(3)
    differentiable = objective.differentiable_loss(pair.model, pair.guide, x)
    differentiable.backward()
    exactly(differentiable.item(), loss)
    exactly({name: p.grad for name, p in pair.named_parameters()}, gradients)
    pyro.set_rng_seed(3)
    assert objective.loss(pair.model, pair.guide, x) == pytest.approx(loss, abs=1e-10)
    assert isinstance(loss, float)


def test_loss_and_grads_adds_to_gradients():
    pair, x, objective = vae(), binary(), ELBO()
    _, once = loss_and_gradients(objective, pair, x)
    pyro.set_rng_seed(3)
    objective.loss_and_grads(pair.model, pair.guide, x)
    for name, parameter in pair.named_parameters():
        exactly(parameter.grad, 2 * once[name])


def test_iwae_of_one_particle_is_the_elbo():
    for make in (vae, discrete_guide):
        pair, x = make(), binary()
        exactly(loss_and_gradients(IWAE(1), pair, x), loss_and_gradients(ELBO(1), pair, x))


def test_iwae_is_the_bound_of_the_log_weights_it_drew():
    pair, x = vae(), binary()
    particles = pair.draw(x, 7)
    for objective, bound in ((IWAE(7), bounds.iwae), (ELBO(7), bounds.elbo)):
        expected = bound(particles.log_weights)
        exactly(objective.bound(particles), expected)
        exactly(objective.surrogate(particles), expected.sum())


def test_iwaes_gradient_weighs_each_particle_by_its_share():
    """Burda et al. 2016, eq. 14: grad L_K = sum_k w_k / (sum_j w_j) grad log w_k."""
    pair, x = vae(), binary()
    _, gradients = loss_and_gradients(IWAE(7), pair, x, seed=5)
    pyro.set_rng_seed(5)
    log_w = pair.draw(x, 7).log_weights
    share = log_w.detach().softmax(0)
    expected = torch.autograd.grad(-(share * log_w).sum(), list(pair.parameters()))
    exactly(list(gradients.values()), list(expected))


def test_iwae_is_at_least_as_tight_as_the_elbo():
    truth = LinearGaussian.drawn()
    x = truth.sample(64)
    model = truth.declared(z=Latent(dist.Normal, 3, scale=1.5))
    elbo, iwae = (kind(500).loss(model.model, model.guide, x) for kind in (ELBO, IWAE))
    assert elbo > iwae + 64
    assert iwae == pytest.approx(-float(truth.log_prob(x).sum()), abs=64 * 0.5)


# ------------------------------------------------------------------------------ score functions


@pytest.mark.parametrize("kind", [ELBO, IWAE])
@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_discrete_draws_have_the_bounds_own_gradient(kind, num_particles):
    """Against the expectation over all 2^K draws, differentiated."""
    coin = GuidedCoin()
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)
    phi = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    exact = coin.bound(x, phi, num_particles if kind is IWAE else 1)
    (expected,) = torch.autograd.grad(exact.sum(), phi)
    objective, rounds = kind(num_particles), 200
    copies = x.repeat(200)  # as many draws in one pass
    objective.loss(coin.model, coin.guide, copies, phi)
    losses, gradients = [], []
    for _ in range(rounds):
        loss = objective.differentiable_loss(coin.model, coin.guide, copies, phi)
        gradients.append(-torch.autograd.grad(loss, phi)[0] / 200)
        losses.append(-loss.detach() / 200)
    for found, truth in ((losses, exact.detach().sum()), (gradients, expected)):
        values = torch.stack(found)
        error = values.std() / math.sqrt(rounds)
        assert abs(values.mean() - truth) < 4.5 * error
        assert error < 0.03 * max(1, abs(truth))


# ------------------------------------------------------------------------------ the rest


def test_one_objective_serves_pairs_with_their_data_elsewhere():
    """Plates are found for each pair: a data plate at dim -2 would else be taken for one at -1."""
    truth, objective = LinearGaussian.drawn(), IWAE(3)
    x = truth.sample(8)
    prior = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)

    def model(x):
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", prior).squeeze(-2)
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z @ truth.W.T + truth.b, truth.sigma), obs=x)

    def guide(x):
        mean, S = truth.posterior(x)
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", dist.MultivariateNormal(mean.unsqueeze(1), S))

    log_p = float(truth.log_prob(x).sum())
    for _ in range(2):
        assert objective.loss(model, guide, x) == pytest.approx(-log_p)
        assert objective.loss(truth.model, truth.guide, x) == pytest.approx(-log_p)


def test_looking_for_plates_draws_no_random_numbers():
    model, x, objective = vae(), binary(), IWAE(3)
    losses = []
    for _ in range(2):  # plates are looked for in the first round only
        pyro.set_rng_seed(1)
        losses.append(objective.loss(model.model, model.guide, x))
    assert losses[0] == losses[1]


def test_data_may_come_by_keyword():
    truth = LinearGaussian.drawn()
    x = truth.sample(8)
    loss = ELBO().loss(truth.model, truth.guide, x=x)
    assert loss == pytest.approx(-float(truth.log_prob(x).sum()))


def test_objectives_say_what_they_are():
    assert repr(pvae.ELBO()) == "ELBO(num_particles=1)"
    assert repr(pvae.IWAE()) == "IWAE(num_particles=50)"
    assert isinstance(ELBO(), pyro.infer.ELBO)
    assert issubclass(IWAE, Objective)


@pytest.mark.parametrize("kind", [ELBO, IWAE])
def test_fewer_than_one_particle_is_refused(kind):
    with pytest.raises(ValueError, match="`num_particles` must be at least 1, got 0"):
        kind(0)
