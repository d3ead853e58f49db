"""What an evaluation says: bounds with their standard errors, and in words."""

import math

import numpy as np
import torch
from pyro.distributions import Bernoulli, Normal

import pvae
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


# ------------------------------------------------------------------------------ what is printed


def test_the_summary_says_what_each_number_is():
    result = pvae.evaluate(TRUTH.declared(), TRUTH.sample(20), num_particles=50)
    table = result.summary()
    assert list(table.columns) == ["value", "se (data)", "se (draws)", "unit", "what it is"]
    assert list(table.index) == [
        "ELBO",
        "L_5",
        "L_50",
        "PSIS",
        "log p(x)",
        "k-hat",
        "k-hat too high",
        "ESS",
        "reconstruction[x]",
        "KL[z]",
        "active units of z",
    ]
    psis = "estimate, largest weights smoothed (PSIS)"
    assert table["what it is"].tolist()[:5] == 3 * ["lower bound"] + [psis, "exact"]
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
