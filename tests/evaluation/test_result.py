"""What an evaluation says: bounds with their standard errors, and in words."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from pyro.distributions import Bernoulli, Normal, Uniform

import pvae
from tests.evaluation.by_hand import adaptive, bound, exact
from tests.exact import LinearGaussian

TRUTH = LinearGaussian.drawn()


# ------------------------------------------------------------------------------ standard errors


def test_standard_errors_by_formula():
    x, pair = TRUTH.sample(40), TRUTH.pair(spread=2.0)
    table = pvae.evaluate(pair, x, num_particles=200, seed=5).summary()
    w = pvae.log_weights(pair, x, num_particles=200, seed=5).numpy()
    block_values = np.log(np.exp(w.reshape(40, 5, 40)).mean(1))  # 40 blocks of 5 particles
    of_five = block_values.std(0, ddof=1) / math.sqrt(40)
    relative = np.exp(w - w.max(0))
    of_all = relative.std(0, ddof=1) / (math.sqrt(200) * relative.mean(0))
    for row, per_datum, draws in (
        ("ELBO", w.mean(0), w.std(0, ddof=1) / math.sqrt(200)),
        ("L_5", block_values.mean(0), of_five),
        ("L_200", np.log(relative.mean(0)) + w.max(0), of_all),
    ):
        expected = (
            per_datum.mean(),
            per_datum.std(ddof=1) / math.sqrt(40),
            math.sqrt((draws**2).sum()) / 40,
        )
        found = table.loc[row, ["value", "se (data)", "se (draws)"]].astype(float)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_standard_errors_over_draws_are_the_spread_over_seeds():
    x, pair = TRUTH.sample(20), TRUTH.pair(spread=2.0)
    runs = [pvae.evaluate(pair, x, num_particles=100, seed=seed).summary() for seed in range(60)]
    for row in ("ELBO", "L_5", "L_100"):
        spread = np.std([run.loc[row, "value"] for run in runs], ddof=1)
        told = np.mean([run.loc[row, "se (draws)"] for run in runs])
        assert 0.6 < told / spread < 1.6  # 60 seeds know a spread to 9 %; 4.5 of these


def test_a_single_particle_has_no_error_over_draws():
    result = pvae.evaluate(TRUTH.pair(spread=2.0), TRUTH.sample(10), num_particles=1)
    assert math.isnan(result.summary().loc["ELBO", "se (draws)"])
    assert "k-hat" not in result.summary().index
    assert result.verdict.endswith("(ELBO, in expectation); too few particles for k-hat.")


def test_a_single_datum_has_no_error_over_data():
    result = pvae.evaluate(TRUTH.pair(), TRUTH.sample(1), num_particles=50)
    assert math.isnan(result.summary().loc["L_50", "se (data)"])
    assert "+-" not in result.verdict
    assert result.active_units == {}


def test_a_datum_without_khat_is_not_counted_as_good():
    result = pvae.evaluate(TRUTH.pair(), TRUTH.sample(4), num_particles=50)
    result.per_datum["khat"][1] = math.nan
    assert result.failing == 0.25


# ------------------------------------------------------------------------------ CUBO


def test_cubo_is_half_the_log_of_the_second_moment_of_the_weights():
    x, pair = TRUTH.sample(20), TRUTH.pair(spread=2.0)
    result = pvae.evaluate(pair, x, num_particles=400, seed=5)
    w = pvae.log_weights(pair, x, num_particles=400, seed=5).numpy()
    expected = np.log((np.exp(w - w.max(0)) ** 2).mean(0)) / 2 + w.max(0)
    np.testing.assert_allclose(result.per_datum["cubo"], expected, rtol=1e-12)
    assert result.summary().loc["CUBO", "value"] == pytest.approx(expected.mean())
    # a broad guide has bounded weights: the upper bound is one, and says so of all data
    assert (result.per_datum["cubo"] > TRUTH.log_prob(x).numpy()).all()
    assert result.summary().loc["CUBO", "what it is"] == CUBO.format(0)


CUBO = (
    "upper bound in the limit of draws, its estimate errs downward; says nothing for {} % of data "
    "(k-hat > 0.5: second moment infinite)"
)


def test_cubo_says_where_the_second_moment_of_the_weights_is_infinite():
    """q narrower than the posterior by over sqrt(2): the integral of p^2 / q diverges."""
    result = pvae.evaluate(TRUTH.pair(spread=0.3), TRUTH.sample(40), num_particles=1000)
    above = float((result.per_datum["khat"] > 0.5).mean())
    assert above > 0.9
    assert result.summary().loc["CUBO", "what it is"] == CUBO.format(f"{100 * above:.3g}")
    result.per_datum["khat"][:] = [0.4, 0.6, math.inf, math.nan] * 10  # NaN is not good
    assert result.summary().loc["CUBO", "what it is"] == CUBO.format(75)


@pytest.mark.parametrize("num_particles", [1, 29])
def test_cubo_of_fewer_draws_than_khat_needs_is_left_out(num_particles):
    """At K = 1 it is the ELBO, a lower bound."""
    result = pvae.evaluate(TRUTH.pair(spread=2.0), TRUTH.sample(5), num_particles)
    assert "CUBO" not in result.summary().index
    assert "cubo" in result.per_datum
    assert "CUBO" not in exact(-1.0, -2.0).summary().index


# ------------------------------------------------------------------------------ draws by datum

DRAWS = adaptive(
    [-4.0, -5.0, -6.0, -7.0],
    [0.04, 0.05, 0.06, math.nan],
    [1000, 1000, 4000, 64_000],
    khat=np.array([0.6, 0.68, 0.68, 0.1]),
    target_se=0.05,
)


def test_log_p_is_the_bound_from_all_draws_of_each_datum():
    assert DRAWS.log_p.values.tolist() == [-4.0, -5.0, -6.0, -7.0]
    assert DRAWS.kind == "lower bound L_K, K by datum from 1,000 to 64,000"
    assert DRAWS.title.endswith("; 1,000 to 64,000 particles from the guide")
    known = DRAWS.per_datum.assign(exact=("datum", [-3.0, -3.0, -3.0, -3.0]))
    assert replace(DRAWS, per_datum=known).log_p.values.tolist() == 4 * [-3.0]


def test_each_khat_is_held_against_the_threshold_of_its_own_draws():
    """1 - 1 / log10(1000) = 0.667 and 1 - 1 / log10(4000) = 0.722, at most 0.7."""
    assert DRAWS.fails.values.tolist() == [False, True, False, False]
    assert DRAWS.failing == 0.25
    assert bound(-4.0, -5.0, K=1000, khat=np.array([0.6, 0.68])).failing == 0.5


def test_data_that_did_not_reach_the_target_are_told():
    assert DRAWS.not_reached.tolist() == [2, 3]
    assert "; 2 of 4 data did not reach a standard error of 0.05 nats; k-hat" in DRAWS.verdict
    assert replace(DRAWS, target_se=None).not_reached.tolist() == []
    all_of_them = replace(bound(-4.0, -5.0, se=0.01), target_se=0.05)
    assert all_of_them.not_reached.tolist() == []
    assert "did not reach" not in all_of_them.verdict


def test_the_summary_of_draws_by_datum():
    table = DRAWS.summary()
    assert list(table.index) == [
        "ELBO",
        "L_1000",
        "L_K",
        "draws",
        "target not reached",
        "k-hat",
        "k-hat too high",
        "ESS",
    ]
    assert table.loc["L_K", "value"] == -5.5
    assert table.loc["draws", ["value", "unit"]].tolist() == [2500, "particles"]
    assert table.loc["draws", "what it is"] == "median over data; most: 64,000"
    assert table.loc["target not reached", ["value", "unit"]].tolist() == [2, "data"]
    assert table.loc["target not reached", "what it is"] == "of 4: se over draws above 0.05 nats"
    assert table.loc["k-hat too high", "what it is"].endswith("k-hat above that of its own K")
    known = adaptive([-4.0, -5.0], [0.3, 0.4], [1000, 2000]).summary()
    assert known.loc["L_K", "se (draws)"] == pytest.approx(0.25)
    assert "target not reached" not in known.index


def test_equal_numbers_of_draws_are_one_number():
    same = adaptive([-4.0, -5.0], [0.1, 0.1], [1000, 1000])
    assert same.kind == "lower bound L_1000"
    assert same.title.endswith("; 1000 particles from the guide")


def test_draws_by_datum_are_kept_in_netcdf(tmp_path):
    DRAWS.to_datatree().to_netcdf(tmp_path / "draws.nc")
    with xr.open_datatree(tmp_path / "draws.nc") as tree:
        assert tree.attrs["log_p"] == DRAWS.kind
        xr.testing.assert_identical(tree["per_datum"].to_dataset().load(), DRAWS.per_datum)


# ------------------------------------------------------------------------------ what is printed


def test_one_of_a_thing_is_told_in_the_singular():
    title = bound(-1.0, K=1).title
    assert title.startswith("model on 1 datum of tensor")
    assert title.endswith("; 1 particle from the guide")
    assert bound(-1.0, K=1, sampler="chains").title.endswith("; 1 chain from the guide")
    assert bound(-1.0, -2.0).title.startswith("model on 2 data of tensor")


def test_the_summary_says_what_each_number_is():
    result = pvae.evaluate(TRUTH.declared(), TRUTH.sample(20), num_particles=50)
    table = result.summary()
    assert list(table.columns) == ["value", "se (data)", "se (draws)", "unit", "what it is"]
    assert list(table.index) == [
        "ELBO",
        "L_5",
        "L_50",
        "PSIS",
        "CUBO",
        "log p(x)",
        "exact less bound",
        "exact above",
        "exact below",
        "k-hat",
        "k-hat too high",
        "ESS",
        "reconstruction[x]",
        "KL[z]",
        "active units of z",
    ]
    psis = "estimate, largest weights smoothed (PSIS)"
    assert table["what it is"].tolist()[:4] == 3 * ["lower bound"] + [psis]
    assert table.loc["log p(x)", "what it is"] == "exact"
    assert table.loc["k-hat too high", "what it is"] == "share of data with k-hat above 0.41"
    assert table.loc["ESS", "value"] == float(result.per_datum["ess"].median())
    assert table.attrs["data"] == "tensor, values as given, 5 dimensions"
    assert result.title.endswith("; 50 particles from the guide")
    for text in (repr(result), result._repr_html_()):
        assert result.title in text
        assert "lower bound" in text
        assert "nats per datum" in text


def test_bits_per_dimension_are_nats_over_log_two_and_the_dimensions():
    result = pvae.evaluate(TRUTH.declared(), TRUTH.sample(20), num_particles=50)
    nats, bits = result.summary(), result.summary(bits=True)
    rows = ["ELBO", "L_5", "L_50", "log p(x)"]
    assert set(bits.loc[rows, "unit"]) == {"bits per dimension"}
    columns = ["value", "se (data)", "se (draws)"]
    expected = nats.loc[rows, columns].astype(float) / (5 * math.log(2))
    np.testing.assert_allclose(bits.loc[rows, columns].astype(float), expected)
    kl = float(nats.loc["KL[z]", "value"]) / (5 * math.log(2))
    np.testing.assert_allclose(float(bits.loc["KL[z]", "value"]), kl)
    assert bits.loc["KL[z]", "unit"] == "bits per dimension"


def test_dimensions_are_of_what_is_observed_whatever_the_order_of_columns():
    x, y = torch.rand(20, 6).round(), torch.randn(20, 3)
    model = pvae.LatentModel(
        y=pvae.Given(3),
        z=pvae.Latent(Normal, 2),
        x=pvae.Observed(Bernoulli, 6, given=("z", "y"), net=pvae.nets.MLP(4)),
        s=pvae.Observed(Normal, given="z", net=pvae.nets.Linear()),
    )
    columns = {"y": y, "s": torch.randn(20), "x": x}
    results = [
        pvae.evaluate(model, {name: columns[name] for name in order}, num_particles=30)
        for order in (("y", "s", "x"), ("x", "y", "s"))
    ]
    assert [result.dimensions for result in results] == [7, 7]
    assert results[0].fingerprint == results[1].fingerprint
    assert results[0].measure == "both"


def test_the_verdict_tells_where_importance_sampling_fails():
    truth = LinearGaussian.drawn(data_size=20, latent_size=8, sigma=0.1)
    result = pvae.evaluate(truth.pair(), truth.sample(20), num_particles=100, proposal="prior")
    assert result.failing == 1
    value, se = float(result.log_p.mean()), float(result.log_p.std(ddof=1)) / math.sqrt(20)
    assert result.verdict == (
        f"log p(x) >= {value:.2f} +- {se:.2f} nats per datum (L_100, in expectation); k-hat is too "
        "high for 100 % of the data, where log p(x) may lie well above."
    )


def test_densities_are_told_in_units_of_the_data_as_measured_too():
    """Columns times ten, standardised: log p falls by log 10 a column, and by log sd for each."""
    result = bound(-3.0, -5.0, measure="density")
    result.per_datum["log_jacobian"] = ("datum", [-math.log(2 * 5 * 10)] * 2)
    row = result.summary().loc["as measured"]
    assert row["value"] == pytest.approx(-4.0 - math.log(2 * 5 * 10))
    assert row["what it is"] == ("lower bound L_500, in units of the data as measured: -4.61 nats")
    in_bits = result.summary(bits=True).loc["as measured", "value"]
    assert in_bits == pytest.approx(row["value"] / 3 / math.log(2))


@pytest.mark.parametrize("how", ["evaluate", "ais"])
def test_scaled_columns_that_were_seen_are_told_as_measured(how):
    """Two tables on two scales, entries of one missing: each datum has a shift of its own."""
    z = pvae.Latent(Normal, 2)
    x, y = (
        pvae.Observed(Normal, 3, given="z", net=pvae.nets.Linear(), scale=1.0, missing=m)
        for m in (True, False)
    )
    model = pvae.LatentModel(z=z, x=x, y=y, u=pvae.Given(2))
    raw = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 5, 9])
    a, b, u = (
        pvae.load_data(rows.numpy(), standardisation="columns").train
        for rows in (raw, 3 + 4 * raw, raw[:, :2])
    )
    mask = torch.rand(len(a), 3) < 0.6
    mask[:, 0] = True
    columns = {"x": a.masked(mask), "y": b, "u": u}
    if how == "ais":
        result = pvae.ais(model, columns, num_chains=2, num_temperatures=3)
    else:
        result = pvae.evaluate(model, columns, 30)
    shift = -(mask.float() @ torch.tensor(a.spec.scale).log()) - sum(map(math.log, b.spec.scale))
    np.testing.assert_allclose(result.per_datum["log_jacobian"], shift, rtol=1e-5)
    row = result.summary().loc["as measured"]
    assert row["value"] == pytest.approx(float((result.log_p.values + shift.numpy()).mean()), 1e-4)
    assert row["what it is"].endswith(f"as measured: {float(shift.mean()):+.2f} nats")


@pytest.mark.parametrize("changes", [{"measure": "density"}, {"measure": "probability"}])
def test_values_as_given_have_no_other_unit(changes):
    assert "as measured" not in bound(-3.0, -5.0, **changes).summary().index


def test_dequantised_levels_give_bits_per_dimension_of_the_levels():
    """A uniform density over [0, 1] gives each of 256 levels eight bits."""
    bytes_ = torch.randint(256, (30, 5), dtype=torch.uint8)
    data = pvae.load_data(bytes_, dequantisation="uniform").train
    model = pvae.LatentModel(x=pvae.Observed(Uniform, 5, low=0.0, high=1.0))
    table = pvae.evaluate(model, data).summary(bits=True)
    assert table.loc["as measured", "value"] == pytest.approx(-8.0)
