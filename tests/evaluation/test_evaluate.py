"""Evaluations against models whose log p(x), posterior and KL are known in closed form."""

import math
import weakref

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import Bernoulli, LogNormal, Normal, Uniform
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pvae
from pvae import Latent, LatentModel, Observed, PyroPair, bounds, passes
from pvae.data import Data, load_data
from pvae.nets import MLP, Linear
from pvae.pair import Pair
from tests.exact import GaussianMixture, LinearGaussian, LinearMixture, Square, TwoLayers
from tests.fitting import binary, declare

TRUTH = LinearGaussian.drawn()
MIXTURE = GaussianMixture.drawn()


def mean(evaluation, column: str) -> float:
    return float(evaluation.per_datum[column].mean())


# ------------------------------------------------------------------------------ log p(x)


@pytest.mark.parametrize("truth", [TRUTH, TwoLayers.drawn()])
def test_the_exact_value_stands_beside_the_bounds(truth):
    x = truth.sample(20)
    result = pvae.evaluate(truth.declared(), x, num_particles=30)
    assert (result.is_exact, result.kind, result.num_particles) == (True, "exact", 30)
    np.testing.assert_allclose(result.log_p, truth.log_prob(x), rtol=0, atol=1e-9)
    assert mean(result, "bound") < mean(result, "exact")
    assert result.verdict.endswith("nats per datum, exactly computed.")


def test_where_every_latent_is_summed_out_the_exact_value_stands_alone():
    x = MIXTURE.sample(20)
    result = pvae.evaluate(MIXTURE.declared(), x)
    assert (result.is_exact, result.num_particles) == (True, 0)
    assert list(result.per_datum) == ["exact"]
    assert result.active_units == {}
    assert math.isnan(result.failing)
    np.testing.assert_allclose(result.log_p, MIXTURE.log_prob(x), rtol=0, atol=1e-10)
    assert list(result.summary().index) == ["log p(x)"]
    assert "log p(x) by summing out every latent" in result.title


def test_one_latent_dimension_is_integrated_where_that_costs_no_more_than_the_draws():
    x = Square().sample(10)
    found = pvae.evaluate(Square().declared(), x, num_particles=2049, grid=[1])
    np.testing.assert_allclose(found.log_p, Square().log_prob(x), rtol=0, atol=1e-3)
    assert found.kind == "exact"
    assert "bound" in found.per_datum


def test_quadrature_that_does_not_converge_leaves_the_bounds(monkeypatch):
    monkeypatch.setattr(pvae.exact, "CONVERGED", -1.0)
    monkeypatch.setattr(pvae.exact, "MOST_POINTS", {1: 2049})
    found = pvae.evaluate(Square().declared(), Square().sample(3), num_particles=2049, grid=[1])
    assert found.kind == "lower bound L_2049"


def test_other_models_get_bounds_only():
    x = Square().sample(10)
    result = pvae.evaluate(Square().declared(), x, num_particles=30)
    assert (result.is_exact, result.kind) == (False, "lower bound L_30")


def test_the_largest_bound_is_log_p_within_its_error():
    x = TRUTH.sample(50)
    result = pvae.evaluate(TRUTH.pair(spread=2.0), x, num_particles=4000)
    z_scores = (result.log_p - TRUTH.log_prob(x).numpy()) / result.per_datum["bound_se"][-1]
    assert float(abs(z_scores).max()) < 4.5
    assert result.failing == 0
    assert result.verdict.endswith("k-hat raises no doubt of the draws for any datum.")


def test_with_the_posterior_as_guide_every_weight_is_log_p():
    x = TRUTH.sample(20)
    result = pvae.evaluate(TRUTH.pair(), x, num_particles=100)
    expected = np.broadcast_to(TRUTH.log_prob(x), (4, 20))
    np.testing.assert_allclose(result.per_datum["bound"], expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.per_datum["ess"], 100)
    np.testing.assert_allclose(result.per_datum["bound_se"], 0, atol=1e-9)
    assert (result.per_datum["khat"] == 0).all()


def test_the_prior_as_proposal_works_and_its_khat_says_why_not():
    truth = LinearGaussian.drawn(data_size=20, latent_size=8, sigma=0.1)
    x = truth.sample(30)
    naive = pvae.evaluate(truth.declared(), x, num_particles=500, proposal="prior")
    guided = pvae.evaluate(truth.pair(), x, num_particles=500)
    assert naive.failing > 0.9
    assert guided.failing == 0
    easy = LinearGaussian.drawn(data_size=2, latent_size=1, sigma=2.0)
    y = easy.sample(30)
    right = pvae.evaluate(easy.pair(), y, num_particles=4000, proposal="prior")
    z_scores = (right.log_p - easy.log_prob(y).numpy()) / right.per_datum["bound_se"][-1]
    assert float(abs(z_scores).max()) < 4.5


def test_weights_of_zero_are_no_error():
    """A guide that leaves the support now and then: the ELBO is minus infinity, L_K is not."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", Uniform(z - 1, z + 1, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x, 0.7))

    x = torch.linspace(-1, 1, 9)
    result = pvae.evaluate(PyroPair(model, guide), x, num_particles=4000)
    standard = Normal(0.0, 1.0)
    log_p = ((standard.cdf(x + 1) - standard.cdf(x - 1)) / 2).log()
    z_scores = (result.log_p - log_p.numpy()) / result.per_datum["bound_se"][-1]
    assert float(abs(z_scores).max()) < 4.5
    assert result.summary().loc["ELBO", "value"] == -math.inf


# ------------------------------------------------------------------------------ the grid of K


def test_the_grid_is_that_of_the_bounds_of_the_same_weights():
    x, pair = TRUTH.sample(40), TRUTH.pair(spread=2.0)
    result = pvae.evaluate(pair, x, num_particles=600, grid=[1, 7, 50], seed=3)
    log_w = pvae.log_weights(pair, x, num_particles=600, seed=3)
    assert result.per_datum["particles"].values.tolist() == [1, 7, 50, 600]
    for size in (1, 7, 50, 600):
        row = result.per_datum.sel(particles=size)
        np.testing.assert_array_equal(row["bound"], bounds.iwae(log_w, size))
        np.testing.assert_array_equal(row["bound_se"], bounds.iwae_standard_error(log_w, size))
    np.testing.assert_array_equal(result.per_datum["ess"], bounds.effective_sample_size(log_w))
    np.testing.assert_array_equal(result.per_datum["khat"], bounds.pareto_khat(log_w))
    terms = result.per_datum["reconstruction[x]"] - result.per_datum["KL[z]"]
    assert abs(float((terms - result.per_datum["bound"][0]).mean())) < 0.5  # of other draws


def test_bounds_rise_with_k_and_stay_below_log_p():
    x = TRUTH.sample(200)
    table = pvae.evaluate(TRUTH.pair(spread=3.0), x, num_particles=5000).summary()
    rows = table.loc[["ELBO", "L_5", "L_50", "L_500", "L_5000"]]
    assert rows["value"].is_monotonic_increasing
    above = rows["value"] - float(TRUTH.log_prob(x).mean())
    assert (above < 4.5 * rows["se (draws)"]).all()
    assert above["ELBO"] < -0.5


def test_the_default_grid_ends_with_k():
    x = TRUTH.sample(3)
    for K, grid in {1: [1], 5: [1, 5], 30: [1, 5, 30], 501: [1, 5, 50, 500, 501]}.items():
        result = pvae.evaluate(TRUTH.pair(), x, num_particles=K)
        assert result.per_datum["particles"].values.tolist() == grid


# ------------------------------------------------------------------------------ draws and memory


@pytest.mark.parametrize(("K", "rows", "weights"), [(77, 10, 500), (77, 1000, 100), (5, 2, 1)])
def test_exactly_k_particles_are_drawn_for_each_datum(monkeypatch, K, rows, weights):
    monkeypatch.setattr(passes, "MAX_ROWS", rows)
    monkeypatch.setattr(passes, "MAX_WEIGHTS", weights)
    drawn = record_draws(monkeypatch)
    x, pair = TRUTH.sample(23), TRUTH.pair(spread=2.0)
    result = pvae.evaluate(pair, x, num_particles=K)
    counts = torch.zeros(23)
    for batch, size in drawn:
        counts += size * (x[:, None] == batch).all(-1).any(1)
    assert (counts == K).all()
    assert max(len(batch) * size for batch, size in drawn) <= max(rows, 1)
    assert len(result.log_p) == 23


def record_draws(monkeypatch) -> list[tuple[Tensor, int]]:
    drawn, draw = [], Pair.draw

    def recorded(self, batch, num_particles=1, proposal="guide"):
        drawn.append((batch, num_particles))
        return draw(self, batch, num_particles, proposal)

    monkeypatch.setattr(Pair, "draw", recorded)
    return drawn


class Memory(TorchDispatchMode):
    """The most bytes that tensors made within have held at once."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.held -= size


def test_memory_does_not_grow_with_k(monkeypatch):
    monkeypatch.setattr(passes, "MAX_WEIGHTS", 2**15)
    x, pair = TRUTH.sample(20), TRUTH.pair(spread=2.0)
    peaks = {}
    for K in (2000, 20_000):
        with Memory() as memory:
            pvae.evaluate(pair, x, num_particles=K, compile=False)
        peaks[K] = memory.peak
    assert peaks[20_000] <= peaks[2000] < 8 * 2**15 * 8  # a few copies of the weights in float64


def test_particles_are_let_go_as_they_are_weighed(monkeypatch):
    """Each holds the model's activations: only their weights and sums may stay."""
    monkeypatch.setattr(passes, "MAX_ROWS", 20)
    alive, most, draw = weakref.WeakSet(), 0, Pair.draw

    class Kept:
        pass

    def counted(self, *args):
        nonlocal most
        drawn = draw(self, *args)
        token = Kept()
        object.__setattr__(drawn, "token", token)
        alive.add(token)
        most = max(most, len(alive))
        return drawn

    monkeypatch.setattr(Pair, "draw", counted)
    pvae.evaluate(TRUTH.pair(spread=2.0), TRUTH.sample(20), num_particles=100)
    assert most <= 2


# ------------------------------------------------------------------------------ units

# Orthogonal columns, so that the posterior factorises; the third unit does nothing.
W = torch.tensor([[2.0, 0, 0], [0, 0.5, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.float64)
UNITS = LinearGaussian(W, torch.zeros(4, dtype=torch.float64), sigma=0.5)


def posterior_guide(x: Tensor) -> None:
    location, S = UNITS.posterior(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", Normal(location, S.diagonal().sqrt()).to_event(1))


def test_units_have_their_known_kl_and_activity():
    x = UNITS.sample(400)
    pair = PyroPair(UNITS.model, posterior_guide)
    result = pvae.evaluate(pair, x, num_particles=200)
    location, S = UNITS.posterior(x)
    s2 = S.diagonal()
    kl = ((s2 + location**2 - 1 - s2.log()) / 2).mean(0)
    found = result.per_unit["KL[z]"]
    np.testing.assert_allclose(found, kl, rtol=0, atol=4.5 / math.sqrt(400 * 64))
    assert abs(float(found[2])) < 1e-12
    np.testing.assert_allclose(result.per_unit["activity[z]"], location.var(0), rtol=1e-6)
    assert result.active_units == {"z": 2}
    assert float(found.sum()) == pytest.approx(mean(result, "KL[z]"), rel=1e-9)
    row = result.summary().loc["active units of z"]
    assert (row["value"], row["what it is"][:5]) == (2, "of 3:")


@pytest.mark.parametrize(
    "declare",
    [
        lambda: pvae.models.hierarchical_vae(6, (4, 2), (5,), (5,)),
        lambda: LatentModel(z=Latent(Normal), x=Observed(Bernoulli, 6, given="z", net=MLP(4))),
        lambda: LatentModel(z=Latent(LogNormal), x=Observed(Bernoulli, 6, given="z", net=MLP(4))),
        lambda: LatentModel(
            z=Latent(Normal, (2, 3)), x=Observed(Bernoulli, 6, given="z", net=MLP(4))
        ),
        lambda: LatentModel(
            b=Latent(Bernoulli, 3),
            x=Observed(Bernoulli, 6, given="b", net=MLP(4)),
            guide={"b": Latent(Bernoulli, 3, given="x", net=Linear())},
        ),
    ],
)
def test_the_kl_of_the_units_sums_to_the_kl_of_the_site(declare):
    model = declare()
    result = pvae.evaluate(model, torch.rand(30, 6).round(), num_particles=100)
    for name in model.latents:
        units = result.per_unit[f"KL[{name}]"]
        assert units.size == math.prod(model.inputs[name].shape)
        assert float(units.sum()) == pytest.approx(mean(result, f"KL[{name}]"), rel=1e-4)


def test_a_summed_site_has_its_own_kl_beside_the_guided_ones():
    truth = LinearMixture.drawn()
    result = pvae.evaluate(truth.declared(), truth.sample(20), num_particles=100)
    assert {"KL[z]", "KL[c]", "reconstruction[x]"} <= set(result.per_datum)
    assert set(result.active_units) == {"z"}


def test_latents_in_a_plate_within_the_datum_count_in_the_bound_only():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            z = pyro.sample("z", Normal(torch.zeros(3, len(x)), 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("z", Normal(x.T / 2, math.sqrt(0.5)))  # the posterior

    x = torch.randn(7, 3)
    result = pvae.evaluate(PyroPair(model, guide), x, num_particles=30)
    expected = Normal(0.0, math.sqrt(2)).log_prob(x).sum(1)
    np.testing.assert_allclose(result.log_p, expected, rtol=0, atol=1e-5)
    assert result.active_units == {}


# ------------------------------------------------------------------------------ nothing is changed


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.last = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 5)

    def forward(self, z: Tensor) -> Tensor:
        flat = self.dropout(self.norm(z.reshape(-1, 3)))
        return self.last(flat).reshape(*z.shape[:-1], 5)


def normalised() -> LatentModel:
    return LatentModel(
        z=Latent(Normal, 3), x=Observed(Normal, 5, given="z", net=Normalised(), scale=1.0)
    )


class Decoder(nn.Module):
    """Written by hand, with parameters of both kinds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", Normal(self.linear(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        V = pyro.param("V", torch.zeros(3, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x @ V, 1.0).to_event(1))


def by_hand() -> PyroPair:
    decoder = Decoder()
    return PyroPair(decoder.model, decoder.guide, name="by hand")


@pytest.mark.parametrize(
    ("make", "data_size"),
    [
        (normalised, 5),
        (lambda: pvae.models.ppca(5, 2), 5),
        (lambda: pvae.models.mixture_of_gaussians(5, 2), 5),
        (by_hand, 3),
    ],
)
def test_evaluation_leaves_everything_as_it_was(make, data_size):
    model, x = make(), torch.randn(30, data_size)
    model.prepare(x)
    model.train()
    list(model.children())[-1].eval()  # a mixed mode, which is the caller's business
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    pvae.evaluate(model, x, num_particles=50)
    pvae.evaluate(model, x, num_particles=50, proposal="prior")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert all((p.grad == 1).all() and p.requires_grad for p in model.parameters())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_failing_evaluation_leaves_everything_as_it_was_too():
    model, x = pvae.models.gaussian_vae(5, 2, (4,)), torch.zeros(4, 5)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    random_state = torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="is NaN or infinite"):
        pvae.evaluate(model, x, num_particles=10)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training for module in model.modules())


def test_a_seed_gives_the_same_numbers_and_another_one_others():
    x, pair = TRUTH.sample(10), TRUTH.pair(spread=2.0)
    one, same, other = (pvae.evaluate(pair, x, 100, seed=seed) for seed in (1, 1, 2))
    assert one.per_datum.equals(same.per_datum)
    assert not one.per_datum.equals(other.per_datum)


def test_noise_of_training_data_is_drawn_once():
    train = load_data("digits").train
    few = Data(train.values[:30], None, train.spec, resampled=True)
    model = pvae.models.vae(64, 2, (4,))
    one, again = (pvae.evaluate(model, few, num_particles=30) for _ in range(2))
    assert one.per_datum.equals(again.per_datum)
    assert one.fingerprint == few.realised().fingerprint()
    assert one.spec == few.spec


def test_a_pyro_pair_with_parameters_evaluates():
    decoder = Decoder()
    pair, net = PyroPair(decoder.model, decoder.guide, name="by hand"), decoder.linear
    x = torch.randn(30, 3)
    result = pvae.evaluate(pair, x, num_particles=3000)
    C = net.weight @ net.weight.T + torch.eye(3)
    log_p = torch.distributions.MultivariateNormal(net.bias, C).log_prob(x).detach()
    z_scores = (result.log_p - log_p.numpy()) / result.per_datum["bound_se"][-1]
    assert float(abs(z_scores).max()) < 4.5
    assert result.title.startswith("by hand on 30 data of tensor, values as given, 3 dimensions; ")


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_particles": 0}, "`num_particles` must be at least 1, got 0"),
        ({"num_particles": 9, "grid": [1, 10]}, r"`grid` must lie in 1\.\.9, .* got \[10\]"),
        ({"num_particles": 9, "grid": [0]}, r"`grid` must lie in 1\.\.9, .* got \[0\]"),
        (
            {"proposal": "posterior"},
            "`proposal` must be one of 'guide', 'prior', 'defensive', got 'posterior'",
        ),
        ({"device": "abacus"}, "No device 'abacus' here"),
    ],
)
def test_settings_without_meaning_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        pvae.evaluate(TRUTH.declared(), TRUTH.sample(5), **settings)


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \(N, 5\), got \(3, 4\)"):
        pvae.evaluate(TRUTH.declared(), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="NaN or infinite values"):
        pvae.evaluate(TRUTH.declared(), torch.full((3, 5), math.nan))


@pytest.mark.parametrize("make", [pvae.models.gaussian_vae, pvae.models.mixture_of_gaussians])
def test_a_model_that_gives_nan_is_an_error_that_names_the_datum(make):
    model = make(5, 2)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    match = r"NaN or infinite for 6 of 6 data, the first is datum 0.* parameters are finite"
    with pytest.raises(FloatingPointError, match=match):
        pvae.evaluate(model, torch.zeros(6, 5), num_particles=30)


def test_progress_is_shown_where_it_is_asked_for(capsys):
    pvae.evaluate(TRUTH.pair(), TRUTH.sample(20), num_particles=30, progress=True)
    assert "pyro pair, log p(x): 100%" in capsys.readouterr().err
    pvae.evaluate(TRUTH.pair(), TRUTH.sample(20), num_particles=30)
    assert capsys.readouterr().err == ""


def test_the_noise_of_a_layers_mean_is_not_taken_for_activity():
    """q(z2 | z1) depends on z1, and q(z1 | x) not on x: no unit of z2 knows of x."""
    torch.manual_seed(0)
    model = pvae.LatentModel(
        z2=Latent(Normal, 40),
        z1=Latent(Normal, 40, given="z2", net=Linear()),
        x=Observed(Normal, 5, given="z1", net=Linear(), scale=1.0),
        guide={
            "z1": Latent(Normal, 40),
            "z2": Latent(Normal, 40, given="z1", net=Linear()),
        },
    )
    result = pvae.evaluate(model, torch.randn(400, 5), num_particles=64)
    assert result.active_units == {"z1": 0, "z2": 0}


def test_parts_of_the_prior_are_not_told_as_the_guides():
    found = pvae.evaluate(declare("vae"), binary(), 40, proposal="prior")
    assert not [name for name in found.per_datum if str(name).startswith("KL[")]
    assert not found.active_units
    refined = pvae.evaluate(declare("vae"), binary(), 40, proposal="refined").summary()
    assert refined.loc["KL[z]", "what it is"] == "part of the ELBO of the refined guide, few draws"
