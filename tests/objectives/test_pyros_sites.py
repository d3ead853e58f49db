"""What Pyro's tests of ELBOs cover beside plates, for every objective: other sites, magnitudes.

Data imputed by `obs_mask`, factors, auxiliary sites of the guide, summed sites, and what a loop
over batches adds up to. See `test_pyros_tests`.
"""

import copy
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close

from pvae import PyroPair
from pvae.batches import source_of
from pvae.fence import fenced
from pvae.objectives import CIWAE, CUBO, ELBO, IWAE, MIWAE, PIWAE, Renyi
from pvae.particles import draw
from tests.exact import LinearGaussian, LinearMixture
from tests.exact.parameters import normal
from tests.fitting import fit, gaussian, parameters, ppca
from tests.objectives.test_pyros_tests import ANY_DRAWS, CUT_DRAWS, PRIOR, TRUTH, K, N

exactly = partial(assert_close, rtol=1e-9, atol=1e-9)


def exact_loss(objective, log_p: Tensor) -> float:
    """Where every weight is p(x): minus the bound, but for CUBO, which is itself to be lowered."""
    return float(log_p.sum()) * (1 if isinstance(objective, CUBO) else -1)


# ------------------------------------------------------------------------------ missing data


def test_data_that_are_missing_are_imputed_by_the_guide():
    """obs_mask makes a latent of each missing datum; drawn from p(x | z), it weighs nothing."""
    x, seen = TRUTH.sample(8), torch.arange(8) % 3 > 0
    mean, S = TRUTH.posterior(x)
    loc = torch.where(seen[:, None], mean, 0.0)
    covariance = torch.where(seen[:, None, None], S, torch.eye(3, dtype=torch.float64))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", PRIOR)
            likelihood = dist.Normal(z @ TRUTH.W.T + TRUTH.b, TRUTH.sigma).to_event(1)
            pyro.sample("x", likelihood, obs=x, obs_mask=seen)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(loc, covariance))
            with poutine.mask(mask=~seen):
                likelihood = dist.Normal(z @ TRUTH.W.T + TRUTH.b, TRUTH.sigma).to_event(1)
                pyro.sample("x_unobserved", likelihood)

    log_p = torch.where(seen, TRUTH.log_prob(x), 0.0)
    exactly(draw(model, guide, (x,), num_particles=3).log_weights, log_p.expand(3, -1))
    for objective in [*ANY_DRAWS, *CUT_DRAWS]:
        assert objective.loss(model, guide, x) == pytest.approx(exact_loss(objective, log_p))


@pytest.mark.parametrize("spread", [1.0, 1.5])
def test_pixels_that_are_missing_are_imputed_as_pyro_does(spread):
    """Against the marginal of the pixels seen, and draw for draw against Trace_ELBO."""
    x, seen = TRUTH.sample(8), torch.tensor([True, False, True, True, False])
    marginal = LinearGaussian(TRUTH.W[seen], TRUTH.b[seen], TRUTH.sigma)

    def pixels(z):
        return (z @ TRUTH.W.T + TRUTH.b).squeeze(-2)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", PRIOR)
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(pixels(z), TRUTH.sigma), obs=x, obs_mask=seen)

    def guide(x):
        mean, S = marginal.posterior(x[:, seen])
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.MultivariateNormal(mean.unsqueeze(1), spread * S))
            with pyro.plate("pixels", x.shape[1], dim=-1), poutine.mask(mask=~seen):
                pyro.sample("x_unobserved", dist.Normal(pixels(z), spread * TRUTH.sigma))

    log_p = marginal.log_prob(x[:, seen])
    if spread == 1:
        exactly(draw(model, guide, (x,), num_particles=3).log_weights, log_p.expand(3, -1))
    pyros = Trace_ELBO(5, max_plate_nesting=2, vectorize_particles=True)
    losses = []
    for objective in (ELBO(5), pyros):
        pyro.set_rng_seed(1)
        losses.append(objective.loss(model, guide, x))
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] > -float(log_p.sum()) - 1e-6


# ------------------------------------------------------------------------------ other sites


def factored(x):
    """N(z; 0, 1) exp(-z^2) is N(z; 0, 1/3) / sqrt(3)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.factor("f", -z.square())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def posterior_of_factored(x, spread=1.0):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 4, spread * 0.5))


@pytest.mark.parametrize("objective", [*ANY_DRAWS, *CUT_DRAWS], ids=repr)
def test_a_factor_of_the_model_weighs_the_draws(objective):
    x = normal(6, seed=1)
    log_p = dist.Normal(0.0, (4 / 3) ** 0.5).log_prob(x) - 0.5 * torch.tensor(3.0).log()
    found = copy.deepcopy(objective).loss(factored, posterior_of_factored, x)
    assert found == pytest.approx(exact_loss(objective, log_p), rel=1e-6)
    particles = draw(factored, partial(posterior_of_factored, spread=2.0), (x,), num_particles=3)
    assert particles.log_weights.std() > 0.1


def test_a_factor_counts_as_in_trace_elbo():
    x, guide = normal(6, seed=1), partial(posterior_of_factored, spread=2.0)
    losses = []
    for objective in (ELBO(5), Trace_ELBO(5, max_plate_nesting=1, vectorize_particles=True)):
        pyro.set_rng_seed(1)
        losses.append(objective.loss(factored, guide, x))
    assert losses[0] == pytest.approx(losses[1])


class Auxiliary(nn.Module):
    """q(z | x) = N(m x, s^2), as it is or as the image of u ~ N(0, 1), which the model lacks."""

    def __init__(self, auxiliary: bool):
        super().__init__()
        self.auxiliary = auxiliary
        self.phi = nn.Parameter(torch.tensor([0.4, -0.3], dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        m, log_s = self.phi
        with pyro.plate("data", len(x)):
            if not self.auxiliary:
                pyro.sample("z", dist.Normal(m * x, log_s.exp()))
                return
            u = pyro.sample("u", dist.Normal(torch.zeros_like(x), 1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(m * x + log_s.exp() * u, log_density=-log_s))


PATHWISE = [ELBO(K), IWAE(K), MIWAE(2, 2), CIWAE(K), PIWAE(2, 2), Renyi(K)]


@pytest.mark.parametrize("objective", PATHWISE, ids=repr)
def test_an_auxiliary_site_of_the_guide_is_a_change_of_variables(objective):
    x, found = normal(6, seed=1), []
    for auxiliary in (True, False):
        pair, own = Auxiliary(auxiliary), copy.deepcopy(objective)
        own.loss(pair.model, pair.guide, x)
        pyro.set_rng_seed(3)
        loss = own.loss_and_grads(pair.model, pair.guide, x)
        found.append((torch.tensor(loss), pair.phi.grad))
    exactly(found[0], found[1])


# ------------------------------------------------------------------------------ enumeration


def summed_beside(truth: LinearMixture, phi: Tensor):
    """c and z independent in the prior, c summed out, q(z) = N(phi_0, exp(phi_1)^2)."""
    zero = torch.zeros(2, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Categorical(truth.probs), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ truth.W.T + truth.b[c], truth.t).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(phi[0].expand(2), phi[1].exp()).to_event(1))

    return model, guide


@pytest.mark.parametrize("kl", ["sampled", "analytic"])
def test_summed_sites_agree_with_trace_enum_elbo(kl):
    """Draw for draw if sampled; in closed form the same expectation, of less variance."""
    truth = LinearMixture.drawn()
    phi = torch.tensor([0.3, -0.5], dtype=torch.float64, requires_grad=True)
    x, rounds = truth.sample(5), 80
    model, guide = summed_beside(truth, phi)
    settings = {"max_plate_nesting": 1, "vectorize_particles": True}
    objectives = (ELBO(4, kl=kl), TraceEnum_ELBO(4, **settings))
    found: list[list[Tensor]] = [[], []]
    for i in range(rounds):
        for own, objective in zip(found, objectives, strict=True):
            pyro.set_rng_seed(i)
            loss = objective.differentiable_loss(model, guide, x)
            own.append(torch.stack([loss, *torch.autograd.grad(loss, phi)[0]]).detach())
    ours, pyros = (torch.stack(own) for own in found)
    if kl == "sampled":
        exactly(ours, pyros)
        return
    difference = ours - pyros
    error = difference.std(0) / rounds**0.5
    assert (difference.mean(0).abs() < 4.5 * error).all()
    assert (error > 0).all(), "these are other numbers"
    assert (4.5 * error < 0.2 * pyros.mean(0).abs()).all()


def test_a_latent_given_a_summed_one_has_no_closed_form_and_is_sampled():
    """p(z | c) has as many divergences as categories: TraceEnum_ELBO's numbers are ours."""
    truth = LinearMixture.drawn()
    x, losses = truth.sample(5), []
    settings = {"max_plate_nesting": 1, "vectorize_particles": True}
    for objective in (ELBO(4, kl="analytic"), TraceEnum_ELBO(4, **settings)):
        pyro.set_rng_seed(1)
        losses.append(objective.loss(truth.model, truth.guide, x))
    assert losses[0] == pytest.approx(losses[1])
    with pytest.raises(ValueError, match=r"KL\[z\] has no closed form here"):
        ELBO(4, kl={"z": "analytic"}).loss(truth.model, truth.guide, x)


# ------------------------------------------------------------------------------ magnitudes


def sgd(rate: float):
    return pyro.optim.SGD({"lr": rate})


@pytest.mark.parametrize("objective", [*ANY_DRAWS, *CUT_DRAWS], ids=repr)
def test_pyros_loop_sums_over_data_and_fit_takes_their_mean(objective):
    """A step of SGD at rate r / N in SVI is one at rate r in fit."""
    x, paths = normal(N, 5, seed=4), []
    for loop in ("fit", "svi"):
        model, own = ppca(), copy.deepcopy(objective)
        if loop == "fit":
            settings = {"optimizer": torch.optim.SGD, "batch_size": N, "compile": False}
            fit(model, x, own, lr=0.01, epochs=1, **settings)
        else:
            own.loss(model.model, model.guide, x)
            with fenced(0, torch.device("cpu")):
                order = next(iter(source_of(model, x, N, 0, torch.device("cpu")).epoch(1)))[1]
                SVI(model.model, model.guide, sgd(0.01 / N), own).step(x[order])
        paths.append(parameters(model))
    exactly(paths[0], paths[1])


@pytest.mark.parametrize("batch_size", [6, 2])
@pytest.mark.parametrize("objective", [*ANY_DRAWS, *CUT_DRAWS], ids=repr)
def test_full_batch_and_mini_batch_have_the_same_optimum(objective, batch_size):
    """x ~ N(mu, 1) has it at the mean of the data; rates fall as 1 / t, so that mu averages."""
    x = 1 + normal(6, 1, seed=6)
    settings = {"optimizer": torch.optim.SGD, "batch_size": batch_size, "lr": 1.0, "epochs": 15}
    fitted = fit(
        gaussian(),
        x,
        objective,
        scheduler=lambda o: LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
        **settings,
    )
    mu = parameters(fitted.model)
    assert_close(mu, x.mean(0), rtol=0, atol=0.05)
    assert abs(x.mean()) > 0.2, "mu starts at 0"
    mean = dist.Normal(mu, 1.0).log_prob(x).mean()
    assert fitted.history["train"].iloc[-1] == pytest.approx(float(mean), abs=0.05)


class Shifted(nn.Module):
    """z ~ N(0, 1), x | z ~ N(z + mu, 1), and a guide that is off and stays so: N(0.6, 0.8)."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, x):
        pyro.module("shifted", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + self.mu, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_full((), 0.6), 0.8))


def optimum(num_particles: int, x: Tensor) -> float:
    """The mu of the largest L_K, K one or two, by Gauss-Hermite in each draw."""
    e, chance = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(24))
    z, chance = 0.6 + 0.8 * e, chance / chance.sum()
    mu = torch.linspace(-1, 2, 601, dtype=torch.float64)[:, None, None]
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z + mu, 1.0).log_prob(x[:, None])
    bound = log_p - dist.Normal(0.6, 0.8).log_prob(z)  # (mu, data, draws)
    if num_particles == 2:
        pairs = torch.logaddexp(bound[..., None], bound[..., None, :]) - math.log(2)
        bound = (pairs * chance).sum(-1)
    return float(mu[(bound * chance).sum(-1).mean(-1).argmax()])


@pytest.mark.parametrize("batch_size", [6, 2])
@pytest.mark.parametrize(("objective", "num_particles"), [(ELBO(), 1), (IWAE(2), 2)])
def test_each_bound_has_an_optimum_of_its_own_whatever_the_batch(
    objective, num_particles, batch_size
):
    """Gradients spread by less than one: 7,200 of them leave an error below 0.012."""
    x, shifted = 1 + normal(6, seed=6), Shifted()
    fit(
        PyroPair(shifted.model, shifted.guide),
        x,
        objective,
        optimizer=torch.optim.SGD,
        batch_size=batch_size,
        lr=1.0,
        epochs=1200,
        scheduler=lambda o: LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    )
    assert float(shifted.mu.detach()) == pytest.approx(optimum(num_particles, x), abs=0.06)
    assert optimum(2, x) > optimum(1, x) + 0.12
    assert optimum(1, x) == pytest.approx(float(x.mean()) - 0.6, abs=0.005)
