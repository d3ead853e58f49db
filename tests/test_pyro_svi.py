"""`from_pyro_svi`: any model and guide of Pyro, against conjugate posteriors and sums by hand."""

import copy
import math

import arviz as az
import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.distributions import Bernoulli, Categorical, Delta, Dirichlet, MultivariateNormal, Normal
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints

import pvae
from pvae.pyro_svi import _Program
from tests.exact import LinearGaussian
from tests.test_inference_data import array, assert_close_in_se

pytestmark = pytest.mark.uses_param_store

Y = 1.5 + torch.randn(8, generator=torch.Generator().manual_seed(3))


def model(y):
    """mu ~ N(0, 2^2), y_i ~ N(mu, 1)."""
    mu = pyro.sample("mu", Normal(0.0, 2.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("units", len(y)):
        pyro.deterministic("residual", y - mu)
        pyro.sample("y", Normal(mu, 1.0), obs=y)


def posterior(y):
    """Mean and standard deviation of mu."""
    precision = 1 / 4 + len(y)
    return y.sum() / precision, precision**-0.5


def guide(y):
    """p(mu | y), once its parameters are those of `posterior`."""
    mean, sd = posterior(Y)
    loc = pyro.param("loc", mean)
    scale = pyro.param("scale", torch.tensor(sd), constraint=constraints.positive)
    pyro.sample("mu", Normal(loc, scale))


def trained(model, guide, *args, steps=1, loss=None, lr=0.0):
    svi = SVI(model, guide, Adam({"lr": lr}), loss or Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return svi


@pytest.fixture
def vectorized(monkeypatch):
    """Whether guide and model ran all at once, in this order."""
    found = []
    run = _Program.run

    def kept(self, given, size):
        result = run(self, given, size)
        found.append(self.vectorize)
        return result

    monkeypatch.setattr(_Program, "run", kept)
    return found


# ------------------------------------------------------------------------ what is drawn


def test_a_global_latent_is_drawn_from_the_guide(vectorized):
    tree = pvae.from_pyro_svi(trained(model, guide, Y), Y, num_samples=4000)
    assert vectorized == [True, True, True, True]
    mean, sd = posterior(Y)
    mu = array(tree.posterior.mu)
    assert mu.shape == (4000,)
    assert_close_in_se(mu, mean, effect=1.0)
    assert_close_in_se((mu - mean).square(), torch.tensor(sd**2), effect=0.2)
    assert_close_in_se(array(tree.prior.mu).square(), torch.tensor(4.0), effect=4.0)
    y = array(tree.posterior_predictive.y)
    assert_close_in_se(y, mean.expand(8), effect=1.0)
    assert_close_in_se((y - mean).square(), torch.full((8,), 1 + sd**2), effect=1.0)
    assert_close_in_se(array(tree.prior_predictive.y).square(), torch.full((8,), 5.0), effect=4.0)


def test_densities_are_those_of_the_draws():
    tree = pvae.from_pyro_svi(trained(model, guide, Y), Y, num_samples=50)
    assert tree.log_likelihood.y.dims == ("chain", "draw", "units")
    np.testing.assert_array_equal(tree.observed_data.y, Y)
    mu = array(tree.posterior.mu)
    by_hand = -0.5 * ((Y - mu[:, None]).square() + math.log(2 * math.pi))
    torch.testing.assert_close(array(tree.log_likelihood.y), by_hand)
    covariance = torch.eye(8) + 4.0  # of y, mu integrated out; the guide is the posterior
    log_p = MultivariateNormal(torch.zeros(8), covariance).log_prob(Y)
    torch.testing.assert_close(array(tree.log_weights.log_weights), log_p.expand(50))


def test_deterministic_sites_follow_from_the_draws():
    tree = pvae.from_pyro_svi(trained(model, guide, Y), Y, num_samples=6)
    for group in (tree.posterior, tree.prior):
        assert group.twice.dims == ("chain", "draw")
        np.testing.assert_array_equal(group.twice, 2 * group.mu)
        assert group.residual.dims == ("chain", "draw", "units")
        np.testing.assert_array_equal(group.residual.values[0], Y - array(group.mu)[:, None])
    assert set(tree.observed_data) == set(tree.prior_predictive) == {"y"}


def test_leaving_one_out_is_exact_for_an_exact_guide():
    found = az.loo(
        pvae.from_pyro_svi(trained(model, guide, Y), Y, num_samples=8000), pointwise=True
    )
    exact = []
    for i in range(8):
        others = torch.cat([Y[:i], Y[i + 1 :]])
        mean, sd = posterior(others)
        exact.append(float(Normal(mean, (1 + sd**2) ** 0.5).log_prob(Y[i])))
    np.testing.assert_allclose(found.elpd_i, exact, rtol=0, atol=0.02)
    assert np.ptp(exact) > 0.5


def test_arviz_summarises_and_draws_any_run():
    tree = pvae.from_pyro_svi(trained(model, guide, Y), Y, num_samples=300)
    table = az.summary(tree, var_names=["mu"], kind="stats", round_to="none")
    assert table.loc["mu", "mean"] == pytest.approx(float(tree.posterior.mu.mean()))
    az.plot_forest(tree, var_names=["mu"], combined=True)
    az.plot_ppc_dist(tree, num_samples=5)
    az.plot_prior_posterior(tree, var_names=["mu"])


def test_latents_of_each_datum_have_weights_of_their_own():
    truth = LinearGaussian.drawn()
    x = truth.sample(5)

    tree = pvae.from_pyro_svi(None, x, model=truth.model, guide=truth.guide, num_samples=20)
    assert tree.posterior.z.dims == ("chain", "draw", "data", "z_dim_0")
    weights = array(tree.log_weights.log_weights)
    torch.testing.assert_close(weights, truth.log_prob(x).expand(20, -1))
    ours = pvae.to_datatree(truth.pair(), x, 20)
    assert tree.log_likelihood.x.shape == ours.log_likelihood.x.shape


def test_plates_in_plates_keep_their_names_and_order():
    def model(x):
        a = pyro.sample("a", Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("columns", 3, dim=-1):
            b = pyro.sample("b", Normal(a.sum(-1), 0.1))
            with pyro.plate("rows", 4, dim=-2):
                pyro.sample("x", Normal(b, 1.0), obs=x)

    def guide(x):
        pyro.sample("a", Normal(torch.tensor([1.0, 2.0]), 0.1).to_event(1))
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("b", Normal(torch.tensor([1.0, 2.0, 3.0]), 0.1))

    x = torch.randn(4, 3)
    coords = {"columns": ["left", "middle", "right"], "pair": ["first", "second"]}
    tree = pvae.from_pyro_svi(
        None, x, model=model, guide=guide, num_samples=9, coords=coords, dims={"a": ["pair"]}
    )
    assert tree.posterior.a.dims == ("chain", "draw", "pair")
    assert tree.posterior.b.dims == ("chain", "draw", "columns")
    assert tree.log_likelihood.x.dims == ("chain", "draw", "rows", "columns")
    assert tree.posterior.b.sel(columns="right").mean() == pytest.approx(3.0, abs=0.2)
    by_hand = Normal(array(tree.posterior.b)[:, None], 1.0).log_prob(x)
    torch.testing.assert_close(array(tree.log_likelihood.x), by_hand)
    a, b = array(tree.posterior.a), array(tree.posterior.b)
    log_w = (
        Normal(0.0, 1.0).log_prob(a).sum(-1)
        + Normal(a.sum(-1, keepdim=True), 0.1).log_prob(b).sum(-1)
        + by_hand.sum((1, 2))
        - Normal(torch.tensor([1.0, 2.0]), 0.1).log_prob(a).sum(-1)
        - Normal(torch.tensor([1.0, 2.0, 3.0]), 0.1).log_prob(b).sum(-1)
    )
    torch.testing.assert_close(array(tree.log_weights.log_weights), log_w)


# ------------------------------------------------------------------------ one by one


def regression(x, y):
    """Reads the coefficients one by one, which takes draws for coefficients in a plate of them."""
    w = pyro.sample("w", Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("units", 2):
        pyro.sample("y", Normal(w[0] + 0 * x, 1.0), obs=y)


def by_item(x, y):
    w = pyro.sample("w", Normal(torch.zeros(2), 1.0).to_event(1))
    mean = float(w[..., 0])
    with pyro.plate("units", 2):
        pyro.sample("y", Normal(mean + 0 * x, 1.0), obs=y)


@pytest.mark.parametrize("model", [regression, by_item])
def test_programs_that_cannot_run_all_at_once_run_one_by_one(model, vectorized):
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])

    def guide(x, y):
        pyro.sample("w", Normal(torch.tensor([0.0, 5.0]), 1.0).to_event(1))

    tree = pvae.from_pyro_svi(None, x, y=y, model=model, guide=guide, num_samples=12)
    assert vectorized == [True, False, False, False]
    w = array(tree.posterior.w)
    by_hand = Normal(w[:, :1], 1.0).log_prob(y)
    torch.testing.assert_close(array(tree.log_likelihood.y), by_hand)
    assert tree.prior.w.shape == (1, 12, 2)


def test_both_ways_give_the_same_densities(monkeypatch):
    svi = trained(model, guide, Y)
    together = pvae.from_pyro_svi(svi, Y, num_samples=1500)
    monkeypatch.setattr(
        _Program, "_tried", lambda self, given, size: setattr(self, "vectorize", False)
    )
    alone = pvae.from_pyro_svi(svi, Y, num_samples=1500)
    for tree in (together, alone):
        mu = array(tree.posterior.mu)
        assert_close_in_se(mu, posterior(Y)[0], effect=1.0)
        by_hand = Normal(mu[:, None], 1.0).log_prob(Y)
        torch.testing.assert_close(array(tree.log_likelihood.y), by_hand)
    assert together.groups == alone.groups
    assert together.log_likelihood.sizes == alone.log_likelihood.sizes


# ------------------------------------------------------------------------ guides of all kinds


@pytest.mark.parametrize("together", [True, False])
def test_discrete_latents_without_a_guide_are_drawn_given_the_rest(together, vectorized):
    """c ~ Categorical, x ~ N(mu_c, 1): p(c | x, mu) by Bayes' rule at each draw of mu."""
    x = torch.tensor([-2.0, 0.1, 2.0])
    num_samples = 3000 if together else 300

    def mixture(x):
        mu = pyro.sample("mu", Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", 3):
            c = pyro.sample("c", Categorical(torch.tensor([0.3, 0.7])))
            mean = torch.where(c == 0, mu[..., 0], mu[..., 1]) if together else mu[c]
            pyro.sample("x", Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", Normal(torch.tensor([-1.0, 1.0]), 0.2).to_event(1))

    tree = pvae.from_pyro_svi(None, x, model=mixture, guide=guide, num_samples=num_samples)
    assert vectorized == [True, together, together, together]
    mu, c = array(tree.posterior.mu), array(tree.posterior.c)
    joint = Normal(mu[:, None], 1.0).log_prob(x[:, None]) + torch.tensor([0.3, 0.7]).log()
    error = (c == 1).float() - joint.softmax(-1)[..., 1]
    assert_close_in_se(error, torch.zeros(3), effect=0.3)
    by_hand = Normal(mu.gather(1, c), 1.0).log_prob(x)
    torch.testing.assert_close(array(tree.log_likelihood.x), by_hand)
    assert "log_weights" not in tree.children
    assert float(array(tree.prior.c).float().mean()) == pytest.approx(0.7, abs=0.08)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides_are_drawn_from(kind, vectorized):
    svi = trained(model, kind(model), Y, steps=600, lr=0.03)
    tree = pvae.from_pyro_svi(svi, Y, num_samples=4000)
    assert all(vectorized)
    mean, sd = posterior(Y)
    mu = array(tree.posterior.mu)
    assert abs(mu.mean() - mean) < 0.15
    assert abs(mu.std() / sd - 1) < 0.3
    covariance = torch.eye(8) + 4.0
    log_p = MultivariateNormal(torch.zeros(8), covariance).log_prob(Y)
    weights = array(tree.log_weights.log_weights)
    assert abs(weights.logsumexp(0) - math.log(4000) - log_p) < 0.05
    assert set(tree.posterior) == {"mu", "twice", "residual"}


def test_rounding_sends_no_guide_to_run_one_by_one(vectorized):
    """Matrix products of many draws and of one differ in their last bits."""
    M = torch.randn(200, 200)

    def model(y):
        w = pyro.sample("w", Normal(torch.zeros(200), 1.0).to_event(1))
        pyro.sample("y", Normal(w[..., :8], 1.0).to_event(1), obs=y)

    def guide(y):
        noise = Normal(torch.zeros(200), 1.0).to_event(1)
        aux = pyro.sample("aux", noise, infer={"is_auxiliary": True})
        pyro.sample("w", Delta(aux @ M, event_dim=1))

    pvae.from_pyro_svi(None, Y, model=model, guide=guide, num_samples=100)
    assert all(vectorized)


def test_a_point_has_no_weights():
    svi = trained(model, AutoDelta(model), Y, steps=2)
    tree = pvae.from_pyro_svi(svi, Y, num_samples=5, num_prior=0)
    assert "log_weights" not in tree.children
    assert np.ptp(tree.posterior.mu.values) == 0
    assert not {"prior", "prior_predictive"} & set(tree.children)


def test_masked_elements_have_no_log_likelihood():
    def masked(y):
        mu = pyro.sample("mu", Normal(0.0, 2.0))
        with pyro.plate("units", 8), poutine.mask(mask=torch.arange(8) < 5):
            pyro.sample("y", Normal(mu, 1.0), obs=y)

    tree = pvae.from_pyro_svi(None, Y, model=masked, guide=guide_of_mu, num_samples=4)
    assert (array(tree.log_likelihood.y)[:, 5:] == 0).all()
    assert (array(tree.log_likelihood.y)[:, :5] < 0).all()


def guide_of_mu(y):
    pyro.sample("mu", Normal(1.0, 0.5))


def test_a_factor_is_no_data():
    def soft(y):
        mu = pyro.sample("mu", Normal(0.0, 2.0))
        pyro.factor("liking", -mu.square())
        with pyro.plate("units", 8):
            pyro.sample("y", Normal(mu, 1.0), obs=y)

    tree = pvae.from_pyro_svi(None, Y, model=soft, guide=guide_of_mu, num_samples=4)
    assert set(tree.observed_data) == set(tree.log_likelihood) == {"y"}
    assert "log_weights" not in tree.children  # the factor's share of them is not known by site


# ------------------------------------------------------------------------ what stays as it was


def test_training_goes_on_as_if_nothing_had_been():
    kept, converted = [], []
    for steps in (kept, converted):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = trained(model, AutoNormal(model), Y, steps=3, lr=0.1)
        if steps is converted:
            state = torch.get_rng_state()
            names = set(pyro.get_param_store())
            pvae.from_pyro_svi(svi, Y, num_samples=7)
            assert torch.equal(torch.get_rng_state(), state)
            assert set(pyro.get_param_store()) == names
        steps += [svi.step(Y) for _ in range(5)]
        steps += [value.detach().clone() for value in pyro.get_param_store().values()]
    assert len(kept) == 7
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(kept, converted, strict=True)
    )


def test_nets_are_evaluated_and_keep_their_modes():
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    x = torch.randn(5, 6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", Normal(z.sum(-1), 1.0), obs=x[:, 0])

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(net(x), 1e-6).to_event(1))

    svi = trained(model, guide, x)
    before = copy.deepcopy(net.state_dict())
    tree = pvae.from_pyro_svi(svi, x, num_samples=4)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        expected = net.eval()(x).expand(4, -1, -1)
    torch.testing.assert_close(array(tree.posterior.z), expected, rtol=0, atol=1e-4)


def test_attributes_tell_the_programs_and_a_seed_is_a_tree(tmp_path):
    svi = trained(model, guide, Y, loss=TraceMeanField_ELBO())
    one, same, other = (pvae.from_pyro_svi(svi, Y, num_samples=3, seed=s) for s in (1, 1, 2))
    xr.testing.assert_identical(one, same)
    assert not np.array_equal(one.posterior.mu, other.posterior.mu)
    told = {key: one.attrs[key] for key in ("model", "guide", "objective", "seed", "num_samples")}
    assert told == {
        "model": "model",
        "guide": "guide",
        "objective": "TraceMeanField_ELBO",
        "seed": 1,
        "num_samples": 3,
    }
    one.to_netcdf(tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as read:
        xr.testing.assert_identical(read.load(), one)


# ------------------------------------------------------------------------ refusals


def test_what_is_no_run_is_refused():
    with pytest.raises(TypeError, match=r"`svi` must be a pyro.infer.SVI, or .* got function"):
        pvae.from_pyro_svi(model, Y)
    with pytest.raises(TypeError, match="got NoneType"):
        pvae.from_pyro_svi(None, Y, model=model)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        pvae.from_pyro_svi(trained(model, guide, Y), Y, num_samples=0)
    with pytest.raises(ValueError, match="`num_prior` must be at least 1, got -1"):
        pvae.from_pyro_svi(trained(model, guide, Y), Y, num_prior=-1)


def test_parameters_that_were_never_trained_are_refused():
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ValueError, match="Parameter 'loc' is not in Pyro's param store"):
        pvae.from_pyro_svi(svi, Y)
    assert set(pyro.get_param_store()) == set()
    automatic = SVI(model, AutoNormal(model), Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"Parameter 'AutoNormal\.locs\.mu' is not in Pyro's"):
        pvae.from_pyro_svi(automatic, Y)


def test_automatic_guides_hold_their_own_parameters():
    svi = trained(model, AutoNormal(model), Y, steps=3, lr=0.1)
    one = pvae.from_pyro_svi(svi, Y, num_samples=3)
    pyro.clear_param_store()
    xr.testing.assert_identical(pvae.from_pyro_svi(svi, Y, num_samples=3), one)


def test_a_subsample_is_refused():
    def subsampled(y):
        mu = pyro.sample("mu", Normal(0.0, 2.0))
        with pyro.plate("units", 8, subsample_size=3) as some:
            pyro.sample("y", Normal(mu, 1.0), obs=y[some])

    with pytest.raises(ValueError, match="Plate 'units' takes 3 of 8 elements"):
        pvae.from_pyro_svi(None, Y, model=subsampled, guide=guide_of_mu)


def test_a_latent_that_nobody_draws_is_refused():
    def nothing(y):
        """An empty guide."""

    with pytest.raises(ValueError, match=r"Latent 'mu' \(Normal\) is neither drawn by the guide"):
        pvae.from_pyro_svi(None, Y, model=model, guide=nothing)


def test_sites_that_come_and_go_are_refused():
    def branching(y):
        coin = pyro.sample("coin", Bernoulli(0.5))
        more = pyro.sample("more", Normal(0.0, 1.0)) if float(coin) else 0.0
        pyro.sample("y", Normal(more * torch.ones(8), 1.0).to_event(1), obs=y)

    def guide(y):
        coin = pyro.sample("coin", Bernoulli(0.5))
        if float(coin):
            pyro.sample("more", Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"(in some runs only|from run to run)"):
        pvae.from_pyro_svi(None, Y, model=branching, guide=guide, num_samples=40)


def test_a_site_cannot_be_called_like_a_dimension():
    def named(y):
        mu = pyro.sample("draw", Normal(0.0, 2.0))
        pyro.sample("y", Normal(mu * torch.ones(8), 1.0).to_event(1), obs=y)

    def guide(y):
        pyro.sample("draw", Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'draw' is the name of a dimension"):
        pvae.from_pyro_svi(None, Y, model=named, guide=guide)


def test_proportions_are_drawn_on_their_simplex():
    def model(y):
        p = pyro.sample("p", Dirichlet(torch.ones(3)))
        with pyro.plate("units", 4):
            pyro.sample("y", Categorical(p), obs=y)

    y = torch.tensor([0, 1, 1, 2])

    def guide(y):  # conjugate
        pyro.sample("p", Dirichlet(torch.tensor([2.0, 3.0, 2.0])))

    tree = pvae.from_pyro_svi(None, y, model=model, guide=guide, num_samples=10)
    p = array(tree.posterior.p)
    torch.testing.assert_close(p.sum(-1), torch.ones(10))
    torch.testing.assert_close(array(tree.log_likelihood.y), p[:, y].log())
    # p(y) = B(2, 3, 2) / B(1, 1, 1) = (1! 2! 1! / 6!) / (1 / 2!)
    log_p = torch.full((10,), math.log(2 / 720 * 2))
    torch.testing.assert_close(array(tree.log_weights.log_weights), log_p)
