"""Evaluations that are checked by others: what is said where they disagree, and where not."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro.distributions import Normal

import pvae
from pvae import PyroPair
from pvae.evaluation.agreement import Agreement
from tests.evaluation.by_hand import adaptive, bound, exact
from tests.exact import LinearGaussian, Square

TRUTH = LinearGaussian.drawn()


def known(result: pvae.Evaluation, log_p) -> pvae.Evaluation:
    """The evaluation of a model whose log p(x) is known exactly as well."""
    return replace(result, per_datum=result.per_datum.assign(exact=("datum", np.asarray(log_p))))


# ------------------------------------------------------------------------------ by hand


def test_a_datum_differs_beyond_four_standard_errors_of_both_estimates():
    errors = np.array([0.3, 0.3, 0.3, 0.3, 0.0])
    second = np.array([-8.01, -7.99, -12.01, -10.0, -9.0])  # 4 errors of both are 2 nats
    found = Agreement.of((np.full(5, -10.0), errors), (second, errors * 4 / 3))
    assert found.higher.tolist() == [False, True, False, False, True]
    assert found.lower.tolist() == [False, False, True, False, False]
    difference = second + 10
    assert found.mean == pytest.approx(
        (difference.mean(), difference.std(ddof=1) / math.sqrt(5), 0.5 * math.sqrt(4) / 5), rel=1e-4
    )


def test_the_mean_tells_what_no_datum_does():
    """Of 100 data each 0.3 nats above with an error of 0.1 each: 3 errors by datum, 30 in all."""
    first, second = bound(*100 * [-5.0]), bound(*100 * [-4.7], se=0.0, proposal="prior")
    found = Agreement.between(first, second)
    assert not found.higher.any()
    assert (found.in_the_mean, found.error_of_mean) == (1, pytest.approx(0.01, rel=1e-6))
    assert Agreement.between(second, first).in_the_mean == -1
    verdict = first.checked_by(second).verdict
    assert verdict.endswith(
        "But 500 particles from the prior put log p(x) higher in the mean over data (by 0.300 +- "
        "0.010 nats); the bound of 500 particles from the guide is loose, by less than single data "
        "tell."
    )


def test_weights_that_are_all_zero_are_a_disagreement():
    none, some = bound(-math.inf, -5.0, se=np.array([math.nan, 0.1])), bound(-3.0, -5.0)
    assert Agreement.between(none, some).higher.tolist() == [True, False]
    assert Agreement.between(some, none).lower.tolist() == [True, False]
    assert Agreement.between(none, none).agrees
    assert "higher for 1 of 2 data (infinitely) and" in none.checked_by(some).verdict
    assert "in the mean over data (infinitely); " in none.checked_by(some).verdict
    above = none.checked_by(some).summary().loc["check above", "what it is"]
    assert above == "share of data above the bound by over 4 standard errors, infinitely"
    assert not Agreement.between(bound(*[-math.inf] + 199 * [-5.0]), bound(*200 * [-5.0])).agrees


def test_one_datum_of_many_beyond_error_is_chance():
    """As where few draws have skewed weights, whose standard errors come out too small at times."""
    first = bound(*200 * [-5.0])
    one, five = (bound(*k * [-4.3], *(200 - k) * [-5.0], proposal="prior") for k in (1, 5))
    assert Agreement.between(first, one).higher.sum() == 1
    assert (
        "agree, within 4 standard errors for 199 of 200 data and in"
        in first.checked_by(one).verdict
    )
    assert "higher for 5 of 200 data (by 0.70 nats); k-hat" in first.checked_by(five).verdict
    assert first.checked_by(one).summary().loc["check above", "value"] == 0.5


def test_rounding_is_no_disagreement():
    one, other = bound(-100.0, -200.0, se=0.0), bound(-100.00002, -199.9999, se=0.0)
    assert Agreement.between(one, other).agrees
    assert not Agreement.between(one, bound(-100.01, -200.0, se=0.0)).agrees


@pytest.mark.parametrize(
    ("khat", "expected"),
    [
        (0.1, "k-hat doubts none of these data, so 500 particles from the guide miss part of the "
              "posterior there, and their bound is loose."),
        (np.array([0.9, 0.1, 0.9]), "k-hat doubts 1 of these data; for the others 500 particles "
              "from the guide miss part of the posterior, and their bound is loose."),
        (np.array([0.9, 0.9, 0.1]), "is loose there, as k-hat says."),
        (math.nan, "is loose there, and draws are too few for k-hat to say so."),
    ],
)  # fmt: skip
def test_what_follows_depends_on_what_khat_says_of_the_data_that_differ(khat, expected):
    poor = bound(-5.0, -6.0, -7.0, khat=khat)
    verdict = poor.checked_by(bound(-4.0, -5.0, -7.0, proposal="defensive")).verdict
    said = (
        "But 500 particles from the defensive mixture put log p(x) higher for 2 of 3 data (by 1.00"
    )
    assert said in verdict
    assert expected in verdict


def test_a_check_that_is_lower_says_nothing_against_the_evaluation():
    verdict = bound(-4.0, -5.0, -7.0).checked_by(bound(-5.0, -6.0, -7.0)).verdict
    assert "put log p(x) lower for 2 of 3 data (by 1.00 nats)" in verdict
    assert verdict.endswith("; the looser bound is that of the check.")


def test_the_summary_has_both_estimates_and_their_differences():
    check = bound(-4.0, -5.0, -7.5, se=0.3, khat=0.9, proposal="defensive")
    result = known(bound(-5.0, -6.0, -7.5), [-3.9, -4.9, -7.4]).checked_by(check)
    table = result.summary()
    columns = ["value", "se (data)", "se (draws)"]
    three = math.sqrt(3)
    for row, expected in {
        "check": (-5.5, math.sqrt((1.5**2 + 0.5**2 + 2**2) / 2) / three, 0.3 / three),
        "check less bound": (2 / 3, 1 / 3, math.sqrt(0.1) / three),
        "exact less bound": (2.3 / 3, 1 / 3, 0.1 / three),
    }.items():
        assert table.loc[row, columns].tolist() == pytest.approx(expected, rel=1e-4)
    assert table.loc["check", "what it is"] == (
        "lower bound, 500 particles from the defensive mixture, k-hat too high for 100 %"
    )
    shares = ["check above", "check below", "exact above", "exact below"]
    assert table.loc[shares, "value"].tolist() == pytest.approx([0, 0, 200 / 3, 0])
    assert table.loc["exact above", "what it is"].endswith(", by 1.10 nats")
    bits = result.summary(bits=True).loc["check less bound", "value"]
    assert bits == pytest.approx(2 / 3 / (3 * math.log(2)))
    assert "check" not in bound(-5.0, -6.0).summary().index


def test_the_evaluation_itself_stays_as_it_was():
    first, second = bound(-5.0, -6.0), bound(-4.0, -5.0)
    checked = first.checked_by(second)
    assert (first.check, checked.check) == (None, second)
    xr.testing.assert_identical(checked.per_datum, first.per_datum)
    assert checked.log_p.values.tolist() == [-5.0, -6.0]


def test_draws_of_each_datums_own_number_are_checked_by_all_of_them():
    first = adaptive([-4.0, -5.0], [0.1, 0.1], [1000, 4000])  # at K = 1000, half a nat lower
    assert Agreement.between(first, bound(-4.0, -5.0)).agrees


# ------------------------------------------------------------------------------ real models


def right_mode(x):
    """Of the two modes at +-sqrt(x) the one, with its own width."""
    mode = x.squeeze(1).clamp(min=0.01).sqrt()
    with pyro.plate("data", len(x)):
        pyro.sample("z", Normal(mode.unsqueeze(1), 0.07 / mode.unsqueeze(1)).to_event(1))


SQUARE = Square()
MISSING = PyroPair(SQUARE.declared().model, right_mode, name="two modes")
X = torch.linspace(1.5, 2.5, 8, dtype=torch.float64).unsqueeze(1)


def test_a_mode_that_the_guide_misses_is_found_by_the_defensive_proposal_and_by_annealing():
    guide = pvae.evaluate(MISSING, X, 2000, grid=[2000])
    assert guide.failing == 0
    assert guide.verdict.endswith("k-hat raises no doubt of the draws for any datum.")
    guide = known(guide, SQUARE.log_prob(X))
    checks = (
        pvae.evaluate(MISSING, X, 40_000, proposal="defensive", grid=[40_000]),
        pvae.ais(MISSING, X, 64, num_temperatures=200),
    )
    for check in checks:
        result = guide.checked_by(check)
        table = result.summary()
        half, error = table.loc["check less bound", ["value", "se (draws)"]]
        assert error < 0.05
        assert abs(half - math.log(2)) < 4.5 * error  # the other half of p(x)
        assert table.loc["check above", "value"] > 90
        assert table.loc["exact above", "value"] == 100
        expected = (
            "so 2000 particles from the guide miss part of the posterior there, and their bound "
            "is loose. The exact log p(x) is higher for 8 of 8 data (by 0."
        )
        for text in (result.verdict, repr(result), result._repr_html_()):
            assert f"But {check.how} put log p(x) higher for " in text
            assert expected in text


def test_good_proposals_agree_with_each_other_and_with_the_exact_value():
    x = TRUTH.sample(300)
    pair = TRUTH.pair(spread=1.3)
    guide, other, defensive = (
        pvae.evaluate(pair, x, 1000, grid=[1000], seed=seed, proposal=proposal)
        for seed, proposal in enumerate(("guide", "guide", "defensive"))
    )
    assert Agreement.between(guide, other).agrees
    result = known(guide, TRUTH.log_prob(x)).checked_by(defensive)
    assert (
        "1000 particles from the defensive mixture agree, within 4 standard errors for "
        in result.verdict
    )
    assert (
        "The exact log p(x) agrees with the bound of 1000 particles from the guide, within"
        in result.verdict
    )
    z_scores = Agreement.between(guide, other)
    z_scores = z_scores.difference / z_scores.error
    assert 0.85 < z_scores.std() < 1.15  # 300 of variance one, known to 4 %


def test_an_exact_guide_agrees_with_itself_whatever_the_draws():
    x = TRUTH.sample(20)
    one, other = (pvae.evaluate(TRUTH.pair(), x, 100, seed=seed) for seed in (0, 1))
    assert Agreement.between(one, other).agrees


def test_a_checked_evaluation_is_kept_with_its_verdict(tmp_path):
    result = bound(-5.0, -6.0, -7.0).checked_by(bound(-4.0, -5.0, -6.0))
    result.to_datatree().to_netcdf(tmp_path / "checked.nc")
    with xr.open_datatree(tmp_path / "checked.nc") as tree:
        assert tree.attrs["verdict"] == result.verdict
        xr.testing.assert_identical(tree["per_datum"].to_dataset().load(), result.per_datum)


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("check", "match"),
    [
        (bound(-1.0, -2.0, model="other"), "of the same model; these are of 'model' and 'other'"),
        (bound(-1.0, -2.0, parameters="other"), "same model; the parameters of these two differ"),
        (bound(-1.0, -2.0, seed=3), "independent draws: both are from the guide with seed 3"),
        (bound(-1.0, -2.0, fingerprint="of Y"), "are evaluated on different data"),
        (bound(-1.0, -2.0, measure="density"), "a probability under the one and a density"),
        (
            bound(-1.0, -2.0, se=math.nan, K=1),
            "standard errors over draws, and none come with 1 particle",
        ),
    ],
)
def test_other_models_other_data_and_estimates_without_errors_are_refused(check, match):
    with pytest.raises(ValueError, match=match):
        bound(-1.0, -2.0, parameters="these", seed=3).checked_by(check)


def test_other_seeds_proposals_and_parameters_that_are_not_known_may_check():
    result = bound(-1.0, -2.0, parameters="these", seed=3)
    for changes in ({"seed": 4}, {"seed": None}, {"proposal": "prior", "seed": 3}):
        assert result.checked_by(bound(-1.0, -2.0, **changes)).check is not None
    assert bound(-1.0).checked_by(bound(-1.0)).check is not None


def test_a_model_that_has_changed_is_refused():
    match = r"the exact log p\(x\) of these two differs, so that 'model' has changed"
    with pytest.raises(ValueError, match=match):
        known(bound(-5.0), [-4.0]).checked_by(known(bound(-5.0), [-4.1]))


def test_an_exact_value_has_no_draws_to_check():
    with pytest.raises(ValueError, match="'model' is exact, by summing out every latent: it has"):
        exact(-5.0).checked_by(bound(-5.0))
    with pytest.raises(TypeError, match="takes what `evaluate` or `ais` returns, got float"):
        bound(-5.0).checked_by(-5.0)
