"""Trees for ArviZ: draws and densities against closed forms, and ArviZ's own functions on them."""

import json
import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro.distributions import Bernoulli, Categorical, Delta, MultivariateNormal, Normal, Uniform
from torch import nn

import pvae
from pvae import Given, Latent, LatentModel, Observed, PyroPair, inference_data
from pvae.data import DataSpec, load_data
from pvae.nets import MLP
from tests.evaluation.by_hand import bound
from tests.exact import LinearGaussian, TwoCategoricals
from tests.fitting import annealed_declared, binary, fit, gaussian, masked_by_a_column, ppca

TRUTH = LinearGaussian.drawn()
VAGUE = LinearGaussian.drawn(sigma=8.0)  # its data say little of z
X = TRUTH.sample(5)
STANDARD_ERRORS = 4.5  # of chance, one in 150,000


def array(variable: xr.DataArray) -> torch.Tensor:
    """The draws of the one chain, (S, ...)."""
    assert variable.dims[:2] == ("chain", "draw")
    assert variable.sizes["chain"] == 1
    return torch.as_tensor(variable.values[0])


def assert_close_in_se(draws: torch.Tensor, expected: torch.Tensor, effect: float) -> None:
    """Mean over draws within 4.5 standard errors, which are small against `effect`."""
    se = draws.std(0) / math.sqrt(len(draws))
    assert float(se.max()) < effect / 10
    assert float(((draws.mean(0) - expected).abs() / se).max()) < STANDARD_ERRORS


def gaussian_log_likelihood(tree: xr.DataTree, truth: LinearGaussian) -> torch.Tensor:
    """log N(x; W z + b, sigma^2 I) at the tree's own draws, term by term."""
    z, x = array(tree.posterior.z), torch.as_tensor(tree.observed_data.x.values)
    r = (x - z @ truth.W.T - truth.b) / truth.sigma
    return -0.5 * (r.square() + math.log(2 * math.pi * truth.sigma**2)).sum(-1)


# ---------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("vectorize", [True, False])
def test_densities_and_data_are_those_of_each_datum(vectorize, monkeypatch):
    monkeypatch.setattr(inference_data, "MAX_ROWS", 6)  # several blocks of data and of draws
    pair = PyroPair(TRUTH.model, partial(TRUTH.guide, spread=2.0), vectorize_particles=vectorize)
    tree = pvae.to_datatree(pair, X, 7)
    assert tree.posterior.z.dims == ("chain", "draw", "datum", "z_dim_0")
    assert tree.posterior.z.shape == (1, 7, 5, 3)
    np.testing.assert_array_equal(tree.observed_data.x, X)
    ours = array(tree.log_likelihood.x)
    torch.testing.assert_close(ours, gaussian_log_likelihood(tree, TRUTH))
    z = array(tree.posterior.z)
    mean, S = TRUTH.posterior(X)
    log_q = MultivariateNormal(mean, 2 * S).log_prob(z)
    log_w = Normal(0.0, 1.0).log_prob(z).sum(-1) + ours - log_q
    torch.testing.assert_close(array(tree.log_weights.log_weights), log_w)
    torch.testing.assert_close(
        torch.as_tensor(tree.log_weights.ess.values),
        log_w.softmax(0).square().sum(0).reciprocal(),
    )


def test_weights_of_an_exact_guide_are_log_p():
    tree = pvae.to_datatree(TRUTH.pair(), X, 40)
    log_p = TRUTH.log_prob(X)
    torch.testing.assert_close(array(tree.log_weights.log_weights), log_p.expand(40, -1))
    assert tree.log_weights.khat.dims == ("datum",)
    assert (tree.log_weights.khat == 0).all()


@pytest.mark.parametrize("vectorize", [True, False])
def test_draws_have_the_moments_of_guide_and_model(vectorize):
    num_samples = 4000 if vectorize else 600
    pair = PyroPair(TRUTH.model, TRUTH.guide, vectorize_particles=vectorize)
    tree = pvae.to_datatree(pair, X[:2], num_samples)
    mean, S = TRUTH.posterior(X[:2])
    z = array(tree.posterior.z)
    assert_close_in_se(z, mean, effect=1.0)
    assert_close_in_se((z - mean).square(), S.diagonal().expand(2, -1), effect=1.0)
    x = array(tree.posterior_predictive.x)
    assert_close_in_se(x, mean @ TRUTH.W.T + TRUTH.b, effect=1.0)
    C = TRUTH.W @ S @ TRUTH.W.T + TRUTH.sigma**2 * torch.eye(5)
    assert_close_in_se((x - x.mean(0)).square(), C.diagonal().expand(2, -1), effect=5.0)
    prior, dreamt = array(tree.prior.z), array(tree.prior_predictive.x)
    assert prior.shape == (num_samples, 2, 3)
    assert_close_in_se(prior, torch.zeros(2, 3), effect=1.0)
    assert_close_in_se(prior.square(), torch.ones(2, 3), effect=1.0)
    assert_close_in_se(dreamt, TRUTH.b.expand(2, -1), effect=2.0)
    residual = dreamt - prior @ TRUTH.W.T - TRUTH.b  # x goes with the z it was drawn from
    noise = torch.full((2, 5), TRUTH.sigma**2, dtype=torch.float64)
    assert_close_in_se(residual.square(), noise, effect=0.3)


def test_resampled_draws_have_the_moments_of_the_posterior():
    """From a guide four times too broad; the error is of S choices among ESS candidates."""
    num_samples = 3000
    tree = pvae.to_datatree(TRUTH.pair(spread=4.0), X[:2], num_samples, weights="resample")
    mean, S = TRUTH.posterior(X[:2])
    z = array(tree.posterior.z)
    ess = torch.as_tensor(tree.log_weights.ess.values)
    se = (2 * S.diagonal().square() * (1 / num_samples + 1 / ess[:, None])).sqrt()
    error = (z - mean).square().mean(0) - S.diagonal()
    assert float((se / S.diagonal()).max()) < 0.1  # against 3 for draws that were not resampled
    assert float((error.abs() / se).max()) < STANDARD_ERRORS
    torch.testing.assert_close(array(tree.log_likelihood.x), gaussian_log_likelihood(tree, TRUTH))
    weights = tree.log_weights.log_weights
    assert weights.dims == ("chain", "candidate", "datum")
    assert weights.sizes["candidate"] == 10 * num_samples
    estimate = np.logaddexp.reduce(weights.values[0]) - math.log(10 * num_samples)
    error_of_log = TRUTH.weight_variance(4.0) ** 0.5 / math.sqrt(10 * num_samples)
    assert np.abs(estimate - TRUTH.log_prob(X[:2]).numpy()).max() < STANDARD_ERRORS * error_of_log
    assert tree.attrs["draws_from"] == "guide, resampled by weight"


def test_summed_latents_are_drawn_from_their_posterior():
    truth = TwoCategoricals.drawn()
    x = torch.tensor([0, 3, 4])
    for pair in (truth.pair(), truth.declared()):
        tree = pvae.to_datatree(pair, x, 4000)
        a, b = array(tree.posterior.a), array(tree.posterior.b)
        for (i, j), p in truth.posterior(x).items():
            assert_close_in_se(((a == i) & (b == j)).double(), p.double(), effect=0.1)
        by_hand = truth.x.double().log()[a, b, x]
        ours = array(tree.log_likelihood.x).double()
        torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-5)
        log_p = truth.log_prob(x).double().expand(4000, -1)
        weights = array(tree.log_weights.log_weights).double()
        torch.testing.assert_close(weights, log_p, rtol=0, atol=1e-5)


@pytest.mark.parametrize("inner_is_right", [True, False])
@pytest.mark.parametrize("vectorize", [True, False])
def test_plates_within_a_datum_come_after_it(inner_is_right, vectorize):
    """z of each datum, y and x of each of its four parts."""
    x = torch.randn(3, 4)
    outer, inner = (-2, -1) if inner_is_right else (-1, -2)

    def lies(values):
        return values if inner_is_right else values.mT

    def model(x):
        with pyro.plate("data", len(x), dim=outer):
            z = pyro.sample("z", Normal(0.0, 1.0))
            with pyro.plate("parts", 4, dim=inner):
                y = pyro.sample("y", Normal(z, 0.5))
                pyro.sample("x", Normal(y, 2.0), obs=lies(x))

    def guide(x):
        with pyro.plate("data", len(x), dim=outer):
            pyro.sample("z", Normal(lies(x.mean(1, keepdim=True)), 0.3))
            with pyro.plate("parts", 4, dim=inner):
                pyro.sample("y", Normal(lies(x), 0.1))

    pair = PyroPair(model, guide, vectorize_particles=vectorize)
    tree = pvae.to_datatree(pair, x, 6)
    assert tree.posterior.y.shape == (1, 6, 3, 4)
    assert tree.observed_data.x.shape == (3, 4)
    np.testing.assert_array_equal(tree.observed_data.x, x)
    y, z = array(tree.posterior.y), array(tree.posterior.z)
    torch.testing.assert_close(y, x.expand(6, -1, -1), rtol=0, atol=0.1 * 5)
    torch.testing.assert_close(z, x.mean(1).expand(6, -1), rtol=0, atol=0.3 * 5)
    by_hand = Normal(y, 2.0).log_prob(x).sum(-1)
    torch.testing.assert_close(array(tree.log_likelihood.x), by_hand)


def test_deterministic_sites_are_values_of_the_draws():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x / 2, 0.5**0.5))

    tree = pvae.to_datatree(PyroPair(model, guide), torch.randn(3), 8)
    for group in (tree.posterior, tree.prior):
        assert group.twice.shape == (1, 8, 3)
        np.testing.assert_array_equal(group.twice, 2 * group.z)
    assert set(tree.log_likelihood) == set(tree.observed_data) == {"x"}


def test_what_the_guide_alone_draws_is_no_latent():
    """z = aux exactly, so that q(z) is q(aux)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(0.0, 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            aux = pyro.sample("aux", Normal(x / 2, 0.5**0.5), infer={"is_auxiliary": True})
            pyro.sample("z", Delta(aux))

    x = torch.randn(3)
    tree = pvae.to_datatree(PyroPair(model, guide), x, 5)
    assert set(tree.posterior) == set(tree.prior) == {"z"}
    log_p = Normal(0.0, 2**0.5).log_prob(x).expand(5, -1)
    torch.testing.assert_close(array(tree.log_weights.log_weights), log_p)


def test_given_columns_are_constant_data():
    torch.manual_seed(0)
    model = LatentModel(
        label=Given(3),
        z=Latent(Normal, 2),
        x=Observed(Bernoulli, 6, given=("z", "label"), net=MLP(4)),
        guide={"z": Latent(Normal, 2, given="x", net=MLP(4))},
    )
    data = {"x": binary(5), "label": torch.eye(3)[[0, 1, 2, 0, 1]]}
    tree = pvae.to_datatree(model, data, 4)
    assert set(tree.constant_data) == {"label"}
    np.testing.assert_array_equal(tree.constant_data.label, data["label"])
    assert set(tree.observed_data) == set(tree.prior_predictive) == {"x"}
    specs = json.loads(tree.attrs["data_spec"])
    assert set(specs) == {"x", "label"}
    with pytest.raises(ValueError, match=r"from its prior either: pass `data`\. .* on label"):
        pvae.to_datatree(model)


def test_masked_data_have_no_log_likelihood():
    data = {"x": binary(4), "seen": torch.tensor([[1.0], [0.0], [1.0], [0.0]])}
    tree = pvae.to_datatree(masked_by_a_column(), data, 3)
    ours = array(tree.log_likelihood.x)
    assert (ours[:, [1, 3]] == 0).all()
    assert (ours[:, [0, 2]] < 0).all()
    np.testing.assert_array_equal(tree.constant_data.seen, data["seen"])


def test_a_model_without_latents_has_no_posterior():
    tree = pvae.to_datatree(gaussian(), torch.zeros(3, 1), 2)
    assert "posterior" not in tree.children
    assert "prior" not in tree.children
    expected = np.full((1, 2, 3), -0.5 * math.log(2 * math.pi))
    np.testing.assert_allclose(tree.log_likelihood.x, expected, rtol=1e-6)


def test_without_data_there_are_prior_draws():
    tree = pvae.to_datatree(TRUTH.declared(), num_prior=4000)
    assert set(tree.children) == {"prior", "prior_predictive"}
    assert tree.prior.z.dims == ("chain", "draw", "z_dim_0")
    assert_close_in_se(array(tree.prior_predictive.x), TRUTH.b, effect=2.0)
    seen = TRUTH.pair()
    pvae.log_weights(seen, X)  # a hand-written pair learns from data what a datum is like
    tree = pvae.to_datatree(seen, num_samples=3)
    assert tree.prior.z.shape == (1, 3, 3)
    assert tree.prior_predictive.x.shape == (1, 3, 5)


def test_a_seed_is_a_tree_and_nothing_else_changes():
    model, _ = annealed_declared()
    x = binary(6)
    pvae.log_weights(model, x)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    one, same, other = (pvae.to_datatree(model, x, 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    xr.testing.assert_identical(one, same)
    assert not np.array_equal(one.posterior.z, other.posterior.z)
    assert (one.attrs["seed"], other.attrs["seed"]) == (1, 2)


def test_attributes_tell_what_the_draws_are_of():
    digits = load_data("digits").test
    tree = pvae.to_datatree(pvae.models.vae(64, 2, (4,)), digits, 1)
    assert tree.attrs["model"] == "vae"
    assert tree.attrs["data"] == digits.spec.space()
    assert DataSpec.from_json(json.loads(tree.attrs["data_spec"])) == digits.spec
    assert tree.attrs["num_data"] == len(digits)
    assert tree.attrs["inference_library_version"] == pvae.__version__
    assert tree.attrs["pyro_version"] == pyro.__version__
    assert tree.attrs["torch_version"] == torch.__version__


# ---------------------------------------------------------------------------- results


def test_a_fit_gives_its_history_and_settings():
    x = TRUTH.sample(40)
    fitted = fit(ppca(), x, pvae.IWAE(3), epochs=4, validation=x)
    tree = fitted.to_datatree(x[:5], 6, num_prior=2, weights="resample", seed=3)
    assert tree.history.sizes == {"epoch": 4}
    np.testing.assert_array_equal(tree.history["valid"], fitted.history["valid"])
    assert json.loads(tree.attrs["settings"]) == fitted.settings
    assert tree.attrs["objective"] == fitted.settings["objective"]
    assert (tree.attrs["stopped"], tree.attrs["best_epoch"]) == ("epochs", fitted.best_epoch)
    assert tree.posterior.sizes["draw"] == 6
    assert tree.prior.sizes["draw"] == 2
    same = pvae.to_datatree(fitted.model, x[:5], 6, num_prior=2, weights="resample", seed=3)
    xr.testing.assert_equal(tree.posterior.to_dataset(), same.posterior.to_dataset())
    assert set(fitted.to_datatree().children) == {"prior", "prior_predictive", "history"}


def test_an_evaluation_gives_its_numbers_and_no_draws():
    result = pvae.evaluate(ppca(), X, num_particles=50)
    tree = result.to_datatree()
    assert set(tree.children) == {"per_datum", "per_unit"}
    xr.testing.assert_identical(tree.per_datum.to_dataset(), result.per_datum)
    xr.testing.assert_identical(tree.per_unit.to_dataset(), result.per_unit)
    assert DataSpec.from_json(json.loads(tree.attrs["data_spec"])) == result.spec
    assert tree.attrs["log_p"] == "exact"
    assert tree.attrs["num_particles"] == 50


def test_an_evaluation_keeps_the_seed_and_the_fingerprint_of_the_parameters():
    tree = bound(-1.0, -2.0, parameters="a1b2", seed=7).to_datatree()
    assert (tree.attrs["parameters"], tree.attrs["seed"]) == ("a1b2", 7)
    assert not {"parameters", "seed"} & set(bound(-1.0, -2.0).to_datatree().attrs)


def trees() -> dict[str, xr.DataTree]:
    x = TRUTH.sample(20)
    fitted = fit(ppca(), x, epochs=2)
    return {
        "fit": fitted.to_datatree(x, 5, weights="resample"),
        "evaluation": pvae.evaluate(fitted.model, x, num_particles=40).to_datatree(),
        "summed": pvae.to_datatree(TwoCategoricals.drawn().pair(), torch.tensor([1, 2]), 3),
    }


def test_trees_are_kept_in_netcdf(tmp_path):
    for name, tree in trees().items():
        tree.to_netcdf(tmp_path / f"{name}.nc")
        with xr.open_datatree(tmp_path / f"{name}.nc") as read:
            xr.testing.assert_identical(read.load(), tree)


def test_elpd_is_log_p_by_datum():
    result = pvae.evaluate(TRUTH.pair(spread=2.0), X, num_particles=200)
    elpd = pvae.to_elpd(result)
    bound = result.per_datum["bound"][-1].values
    np.testing.assert_array_equal(elpd.elpd_i, bound)
    assert elpd.elpd == pytest.approx(bound.sum())
    assert elpd.se == pytest.approx(bound.std(ddof=1) * math.sqrt(5))
    np.testing.assert_array_equal(elpd.pareto_k, result.per_datum["khat"])
    assert elpd.good_k == pvae.bounds.khat_threshold(200)
    assert not elpd.warning
    known = pvae.to_elpd(pvae.evaluate(TRUTH.declared(), X, num_particles=50))
    np.testing.assert_allclose(known.elpd_i, TRUTH.log_prob(X), rtol=0, atol=1e-9)
    assert not known.warning  # whatever k-hat says of the bound beside it


def test_elpd_warns_where_khat_is_high_or_unknown():
    narrow = PyroPair(TRUTH.model, partial(TRUTH.guide, spread=0.1))
    assert pvae.to_elpd(pvae.evaluate(narrow, X, num_particles=500)).warning
    few = pvae.to_elpd(pvae.evaluate(narrow, X, num_particles=5))
    assert few.warning
    assert np.isposinf(few.pareto_k).all()  # five draws have no tail
    assert "elpd_loo" in str(few)
    enumerated = pvae.to_elpd(pvae.evaluate(TwoCategoricals.drawn().declared(), torch.arange(4)))
    assert (enumerated.pareto_k == 0).all()
    assert not enumerated.warning
    assert "elpd_loo" in str(enumerated)


# ---------------------------------------------------------------------------- refusals


def test_bad_input_is_refused():
    pair = TRUTH.pair()
    with pytest.raises(TypeError, match=r"LatentModel or a PyroPair, got method\. Results have"):
        pvae.to_datatree(TRUTH.model, X)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        pvae.to_datatree(pair, X, 0)
    with pytest.raises(TypeError, match=r"`num_prior` must be a whole number, got 1\.5"):
        pvae.to_datatree(pair, X, num_prior=1.5)
    with pytest.raises(ValueError, match="`weights` must be None or 'resample', got 'psis'"):
        pvae.to_datatree(pair, X, weights="psis")
    with pytest.raises(ValueError, match="`num_prior=0` there is nothing to draw"):
        pvae.to_datatree(TRUTH.declared(), num_prior=0)
    with pytest.raises(
        ValueError, match=r"from its prior either: pass `data`. .* has seen no data yet"
    ):
        pvae.to_datatree(TRUTH.pair())


def test_no_prior_draws_where_none_are_wanted():
    tree = pvae.to_datatree(TRUTH.pair(), X, 3, num_prior=0)
    assert not {"prior", "prior_predictive"} & set(tree.children)


def test_weights_that_choose_nothing_are_refused(monkeypatch):
    """x is within 1 of z, and the guide draws z for the second datum 50 away, and then nowhere."""
    monkeypatch.setattr(inference_data, "MAX_ROWS", 1)  # a block for each datum
    far = torch.tensor(50.0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", Uniform(z - 1, z + 1, validate_args=False), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(torch.where(x[:, 1] > 0, far, 0.0), 0.1))

    pair, x = PyroPair(model, guide), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert pvae.to_datatree(pair, x, 3).log_weights.ess[0] > 1
    with pytest.raises(FloatingPointError, match="draw for datum 1 has weight zero"):
        pvae.to_datatree(pair, x, 3, weights="resample")
    far.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="NaN or infinite for datum 1"):
        pvae.to_datatree(pair, x, 3)


def test_a_site_cannot_be_called_like_a_dimension():
    model = LatentModel(
        datum=Latent(Categorical, 2), x=Observed(Normal, 1, given="datum", net=MLP(2))
    )
    with pytest.raises(ValueError, match="'datum' is the name of a dimension"):
        pvae.to_datatree(model, torch.zeros(3, 1), 2)


def test_nets_draw_in_evaluation_mode_and_keep_their_own():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample(
                "x",
                Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 6), 1.0).to_event(1),
                obs=x,
            )

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(net(x), 1e-6).to_event(1))

    net.train()
    x = torch.randn(3, 6)
    tree = pvae.to_datatree(PyroPair(model, guide), x, 4)
    assert net.training
    with torch.no_grad():
        expected = net[1](x).expand(4, -1, -1)  # nothing dropped
    torch.testing.assert_close(array(tree.posterior.z), expected, rtol=0, atol=1e-4)
