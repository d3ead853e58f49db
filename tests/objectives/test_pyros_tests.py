"""What Pyro's tests of gradients and ELBOs cover, for every objective: plates, scales, masks.

Written anew from what those tests are about (pyro-ppl, tests/infer: test_gradient, test_inference,
test_enum, test_valid_models). Draws are tabled by particle and datum, so that gradients of batches,
masks and loops can be added up exactly.
"""

import copy
import math
from contextlib import nullcontext
from functools import partial
from itertools import combinations, cycle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.testing import assert_close

from pvae import PyroPair
from pvae.objectives import (
    CIWAE,
    CUBO,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    TVO,
    ForwardKL,
    Objective,
    Renyi,
    ReweightedWakeSleep,
)
from pvae.particles import Plates, draw
from tests.exact import LinearGaussian, LinearMixture
from tests.exact.parameters import normal

exactly = partial(assert_close, rtol=1e-9, atol=1e-9)

K, N = 4, 6
ANY_DRAWS = [
    ELBO(K),
    IWAE(K),
    IWAE(K, baseline="leave-one-out"),
    MIWAE(2, 2),
    CIWAE(K),
    PIWAE(2, 2),
    Renyi(K, alpha=0.5),
    Renyi(K, alpha=-1.0),
    CUBO(K),
    TVO(K),
    ReweightedWakeSleep(K),
    ForwardKL(K),
]
CUT_DRAWS = [ELBO(K, gradient="stl"), IWAE(K, "stl"), IWAE(K, "dreg"), ForwardKL(K, "dreg")]
CASES = [(one, True) for one in [*ANY_DRAWS, *CUT_DRAWS]] + [(one, False) for one in ANY_DRAWS]
every = pytest.mark.parametrize(
    ("objective", "reparameterised"), CASES, ids=lambda value: str(value)
)

TRUTH = LinearGaussian.drawn()
PRIOR = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)


class Tabled(dist.Normal):
    """A Normal whose noise is given, (K, N): of rows, all at once; or row by row, in a loop."""

    def __init__(self, loc, scale, table, rows=None):
        self.table, self.rows = table, iter(table) if rows is None else rows
        super().__init__(loc, scale)

    def rsample(self, sample_shape=()):
        many = len(self.batch_shape) > 1
        noise = self.table[: self.batch_shape[0]] if many else next(self.rows)
        return self.loc + self.scale * noise

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.rsample()

    def expand(self, batch_shape, _instance=None):
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return type(self)(loc, scale, self.table, self.rows)


class TabledScore(Tabled):
    """The same, whose draws are not differentiable."""

    has_rsample = False


class Score(dist.Normal):
    """A Normal whose draws are not differentiable."""

    has_rsample = False


class Chain(nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(a z1, 1), x ~ N(z2 + b, 1/2); q(z1 | x) q(z2 | z1, x), draws tabled."""

    def __init__(self, reparameterised: bool = True):
        super().__init__()
        self.of_model = nn.Parameter(torch.tensor([0.8, -0.3], dtype=torch.float64))
        self.of_guide = nn.Parameter(torch.tensor([0.3, 0.1, 0.5, 0.4], dtype=torch.float64))
        self.kind = Tabled if reparameterised else TabledScore
        self.noise = {"z1": normal(K, N, seed=1), "z2": normal(K, N, seed=2)}
        self.x = normal(N, seed=3)

    def rewind(self) -> None:
        """Begin the tables anew."""
        self.rows = {name: cycle(table) for name, table in self.noise.items()}

    def tabled(self, name: str, loc: Tensor, scale: Tensor, index: Tensor) -> dist.Normal:
        rows = (row[index] for row in self.rows[name])
        return self.kind(loc, scale, self.noise[name][:, index], rows)

    def model(self, index: Tensor, size: int | None = None) -> None:
        a, b = self.of_model
        with pyro.plate("data", size or len(index), subsample=index):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            z2 = pyro.sample("z2", dist.Normal(a * z1, 1.0))
            pyro.sample("x", dist.Normal(z2 + b, 0.5), obs=self.x[index])

    def guide(self, index: Tensor, size: int | None = None) -> None:
        c, log_s, d, e = self.of_guide
        x = self.x[index]
        with pyro.plate("data", size or len(index), subsample=index):
            z1 = pyro.sample("z1", self.tabled("z1", c * x, log_s.exp(), index))
            pyro.sample("z2", self.tabled("z2", d * z1 + e * x, log_s.exp(), index))

    def gradients(self, objective: Objective, index=None, size=None, wrap=lambda p: p) -> Tensor:
        """The loss and its gradient, one vector."""
        index = torch.arange(N) if index is None else torch.as_tensor(index)
        objective, model, guide = copy.deepcopy(objective), wrap(self.model), wrap(self.guide)
        self.rewind()
        loss = objective.differentiable_loss(model, guide, index, size)
        found = torch.autograd.grad(loss, [self.of_model, self.of_guide])
        return torch.cat([loss.detach().reshape(1), *found])


# ------------------------------------------------------------------------------ subsamples


@every
def test_the_mean_over_all_subsamples_is_the_full_batch(objective, reparameterised):
    """Size 6, batch 2: all 15 of them."""
    chain = Chain(reparameterised)
    whole = chain.gradients(objective)
    parts = [chain.gradients(objective, rows, N) for rows in combinations(range(N), 2)]
    exactly(torch.stack(parts).mean(0), whole)
    assert (whole.abs() > 1e-3).all(), "no gradient is zero"


@every
def test_a_subsample_is_scaled_by_size_over_batch(objective, reparameterised):
    chain = Chain(reparameterised)
    alone = chain.gradients(objective, [1, 4])
    exactly(chain.gradients(objective, [1, 4], 50), 25 * alone)


def subsampled(reparameterised: bool, size: int, batch: int):
    """x_n ~ N(z_n, 1), z_n ~ N(0, 1), Pyro's own random subsample; the ELBO is quadratic."""
    phi = torch.tensor([0.1, -1.0], dtype=torch.float64, requires_grad=True)
    x = 2 * normal(size, seed=5)

    def model():
        with pyro.plate("data", size, subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", size, subsample_size=batch) as index:
            q = dist.Normal(phi[0] * x[index], phi[1].exp())
            pyro.sample("z", q.has_rsample_(reparameterised))

    loc, variance = phi[0].detach() * x, (2 * phi[1].detach()).exp()
    expected = torch.stack([((x - 2 * loc) * x).sum(), size * (1 - 2 * variance)])
    return model, guide, phi, expected


@pytest.mark.parametrize("reparameterised", [True, False])
@pytest.mark.parametrize(("num_particles", "rounds"), [(1, 1000), (5, 250)])
def test_random_subsamples_have_the_gradient_of_all_data(reparameterised, num_particles, rounds):
    model, guide, phi, expected = subsampled(reparameterised, size=8, batch=3)
    objective = ELBO(num_particles)
    found = []
    for _ in range(rounds):
        loss = objective.differentiable_loss(model, guide)
        found.append(-torch.autograd.grad(loss, phi)[0])
    gradients = torch.stack(found)
    error = gradients.std(0) / rounds**0.5
    assert ((gradients.mean(0) - expected).abs() < 4.5 * error).all()
    assert (4.5 * error < 0.6 * expected.abs()).all(), "a wrong scale would be seen"


# ------------------------------------------------------------------------------ scales and masks


def only(rows: Tensor):
    return lambda program: poutine.mask(program, mask=rows)


@every
def test_masked_data_have_no_gradient(objective, reparameterised):
    chain = Chain(reparameterised)
    seen = torch.tensor([True, False, True, True, False, False])
    alone = chain.gradients(objective, seen.nonzero().flatten())
    exactly(chain.gradients(objective, wrap=only(seen)), alone)


@every
def test_a_scale_multiplies_each_datums_gradient(objective, reparameterised):
    """sum_n s_n grad L_n, each L_n with the other data masked. Inside a log it would be another."""
    chain = Chain(reparameterised)
    scales = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25, 7.0], dtype=torch.float64)
    each = torch.stack([chain.gradients(objective, wrap=only(row)) for row in torch.eye(N) > 0])
    scaled = chain.gradients(objective, wrap=lambda p: poutine.scale(p, scales))
    exactly(scaled, scales @ each)
    exactly(chain.gradients(objective, wrap=lambda p: poutine.scale(p, 3.0)), 3 * each.sum(0))


@pytest.mark.parametrize("objective", [*ANY_DRAWS[1:], *CUT_DRAWS[1:]], ids=repr)
def test_scales_that_differ_by_site_have_a_meaning_for_the_elbo_only(objective):
    chain = Chain()

    def model(index, size):
        with pyro.plate("data", len(index)):
            with poutine.scale(scale=0.5):
                z1 = pyro.sample("z1", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 0.5), obs=chain.x[index])

    chain.rewind()
    index = torch.arange(N)
    with pytest.raises(ValueError, match=r"one scale for all .* has a meaning for pvae\.ELBO only"):
        objective.differentiable_loss(model, chain.guide, index, None)
    chain.rewind()
    assert math.isfinite(ELBO(K).loss(model, chain.guide, index, None))


# ------------------------------------------------------------------------------ plates


class Pixels(nn.Module):
    """A latent and an observation for each of 3 pixels: in plates, or as one event."""

    def __init__(self, how: str, reparameterised: bool):
        super().__init__()
        self.how, self.reparameterised = how, reparameterised
        self.phi = nn.Parameter(torch.tensor([0.4, -0.2, 0.7], dtype=torch.float64))

    def plates(self, x):
        if self.how == "event":
            return pyro.plate("data", len(x), dim=-1), nullcontext()
        return pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 3, dim=-1)

    def normals(self, loc, scale, reparameterised=True):
        normals = (dist.Normal if reparameterised else Score)(loc, scale)
        return normals.to_event(1) if self.how == "event" else normals

    def model(self, x):
        rows, pixels = self.plates(x)
        with rows, pixels:
            z = pyro.sample("z", self.normals(torch.zeros_like(x), 1.0))
            pyro.sample("x", self.normals(self.phi[2] * z, 1.0), obs=x)

    def guide(self, x):
        rows, pixels = self.plates(x)
        with rows, pixels:
            loc, scale = self.phi[0] * x, self.phi[1].exp()
            pyro.sample("z", self.normals(loc, scale, self.reparameterised))


@every
def test_a_plate_within_the_datum_is_its_event(objective, reparameterised):
    """Draw for draw: one weight a datum, however its parts are written."""
    x, found = normal(5, 3, seed=4), []
    for how in ("plates", "event"):
        pair, own = Pixels(how, reparameterised), copy.deepcopy(objective)
        own.loss(pair.model, pair.guide, x)
        pyro.set_rng_seed(2)
        loss = own.loss_and_grads(pair.model, pair.guide, x)
        found.append((torch.tensor(loss), pair.phi.grad))
    exactly(found[0], found[1])
    assert (found[0][1].abs() > 1e-3).all()


@pytest.mark.parametrize("objective", [*ANY_DRAWS, *CUT_DRAWS], ids=repr)
def test_a_loop_over_data_is_refused_and_one_within_the_datum_is_not(objective):
    def looped(x):
        for n in pyro.plate("data", len(x)):
            pyro.sample(f"x_{n}", dist.Normal(torch.zeros_like(x[n]), 1.0).to_event(1), obs=x[n])

    def within(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", PRIOR)
            mean = z @ TRUTH.W.T + TRUTH.b
            for i in pyro.plate("pixels", x.shape[1]):
                pyro.sample(f"x_{i}", dist.Normal(mean[..., i], TRUTH.sigma), obs=x[:, i])

    x, objective = TRUTH.sample(5), copy.deepcopy(objective)
    with pytest.raises(ValueError, match="Site 'x_0' lies in no vectorised plate over the data"):
        objective.loss(looped, lambda x: None, x)
    log_p = float(TRUTH.log_prob(x).sum())
    exact = log_p if isinstance(objective, CUBO) else -log_p  # which is to be lowered
    assert objective.loss(within, TRUTH.guide, x) == pytest.approx(exact)


# ------------------------------------------------------------------------------ loops of particles


@every
def test_particles_in_a_loop_have_the_gradient_of_those_in_one_pass(objective, reparameterised):
    chain, found = Chain(reparameterised), []
    for vectorized in (True, False):
        pair = PyroPair(chain.model, chain.guide, vectorize_particles=vectorized)
        chain.rewind()
        index, own = torch.arange(N), copy.deepcopy(objective)
        programs = pair.programs(index)
        own.prepare(programs)
        chain.rewind()
        particles, total = own.estimate(programs)
        assert particles.shape == (K, N)
        found.append((total.detach(), *torch.autograd.grad(total, [*chain.parameters()])))
    exactly(found[0], found[1])


@pytest.mark.parametrize("objective", ANY_DRAWS, ids=repr)
def test_summed_sites_have_the_law_of_one_pass_in_a_loop_too(objective):
    """With z at the same values, the categories are summed out to the same weights."""
    truth = LinearMixture.drawn()
    x, table = truth.sample(5), normal(K, 5, 2, seed=8)

    def guide(x, at):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(at, event_dim=1))

    settings = {"num_particles": K, "plates": Plates()}
    whole = draw(truth.model, partial(guide, at=table), (x,), **settings)
    rows = iter(table)
    looped = draw(truth.model, lambda x: guide(x, next(rows)), (x,), vectorize=False, **settings)
    exactly(looped.log_weights, whole.log_weights)
    exactly(objective.bound(looped), objective.bound(whole))
    exactly(whole.log_weights, truth.joint(x, table).logsumexp(0))
