"""Every estimator of log p(x) beside the exact value, 200 times over.

    ESTIMATORS x KNOWN --run--> 200 independent estimates of one log p(x), in one run

A datum is given 200 times over as data, of which each has draws of its own. A new estimator is one
line of `ESTIMATORS`, and one of `REFUSED` for each model that it does not take. The refusals
themselves are tested with each estimator.
"""

import math
import random
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from scipy.stats import t as student_t

import pvae
from pvae import Evaluation
from tests.evaluation.test_annealing import simulated
from tests.evaluation.test_evaluate import normalised
from tests.exact import LinearGaussian
from tests.exact.guided import COIN, KNOWN, PHI

TIMES, DRAWS = 200, 1000
sampled = partial(pvae.evaluate, num_particles=DRAWS, grid=[1, 10, 100])
annealed = partial(pvae.ais, num_chains=6, num_temperatures=20, leapfrog_steps=3)

ESTIMATORS: dict[str, Any] = {
    "guide": sampled,
    "guide, few draws": partial(pvae.evaluate, num_particles=10, grid=[1]),
    "prior": partial(sampled, proposal="prior"),
    "defensive": partial(sampled, proposal="defensive"),
    "refined guide": partial(sampled, proposal=pvae.Refine(steps=20)),
    "Sobol points": partial(sampled, points="sobol"),
    "AIS from the prior": annealed,
    "AIS from the guide": partial(annealed, start="guide"),
}
REFUSED = {
    ("categories", "defensive"),  # every latent is summed out
    ("square", "refined guide"),  # no parameter to move
    ("categories", "refined guide"),
    ("square", "Sobol points"),  # no quantile function
    ("coin", "AIS from the prior"),  # no continuous latent
    ("coin", "AIS from the guide"),
    ("categories", "AIS from the prior"),
    ("categories", "AIS from the guide"),
    ("categories", "prior"),  # nothing is drawn from it either
    ("categories", "Sobol points"),
    ("coin", "Sobol points"),
}
CASES = [(m, e) for m in KNOWN for e in ESTIMATORS if (m, e) not in REFUSED]
CONTINUOUS = ["linear-Gaussian", "two layers", "mixture", "ring", "square"]
EXACTLY = 1e-9  # nats, of rounding

SAMPLED = [(m, e) for m, e in CASES if ESTIMATORS[e].keywords.get("num_particles") == DRAWS]
HEAVY = {  # in the tail of their weights
    ("linear-Gaussian", "prior"),
    ("two layers", "prior"),
    ("mixture", "refined guide"),  # best for few particles, so narrower than three bumps
}

every_case = pytest.mark.parametrize(("model", "estimator"), CASES)
where_khat_is_good = pytest.mark.parametrize(
    ("model", "estimator"), [case for case in SAMPLED if case not in HEAVY]
)


@cache
def run(model: str, estimator: str, seed: int = 0, times: int = TIMES) -> Evaluation:
    known = KNOWN[model]
    return ESTIMATORS[estimator](known.pair, known.repeated(times), seed=seed)


def errors(found: Evaluation, log_p: Any, column: str = "bound") -> np.ndarray:
    """What is found less log p(x), (N,) or (grid, N)."""
    return found.per_datum[column].values - log_p


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


# ------------------------------------------------------------------------------ the exact value


@every_case
def test_the_mean_estimate_is_the_exact_value(model, estimator):
    """E[p-hat / p(x)] = 1, and no two estimates share their draws."""
    ratio = np.exp(errors(run(model, estimator), KNOWN[model].log_p)[-1])
    mean, error = mean_and_error(ratio)
    assert abs(mean - 1) < 4.5 * error + EXACTLY
    assert error < 0.08
    if model in CONTINUOUS:
        assert len(set(ratio)) == TIMES


@every_case
def test_bounds_lie_below_the_exact_value_and_rise_to_it(model, estimator):
    grid = errors(run(model, estimator), KNOWN[model].log_p)
    for row in grid:
        mean, error = mean_and_error(row)
        assert mean < 4.5 * error + EXACTLY
    for rise in np.diff(grid, axis=0):
        mean, error = mean_and_error(rise)
        assert mean > -4.5 * error - EXACTLY
    if model != "categories":  # which has nothing to draw
        mean, error = mean_and_error(grid[0])
        assert mean < -3 * error


@pytest.mark.parametrize(("model", "estimator"), SAMPLED)
def test_khat_is_too_high_where_weights_are_heavy_and_nowhere_else(model, estimator):
    failing = run(model, estimator).failing
    assert failing > 0.5 if (model, estimator) in HEAVY else failing < 0.15


@where_khat_is_good
def test_told_errors_are_the_spread_of_estimates(model, estimator):
    """The mean of se^2 is the variance of the estimate."""
    found = run(model, estimator)
    difference = errors(found, KNOWN[model].log_p)[-1]
    told = found.per_datum["bound_se"].values[-1]
    squares = (difference - difference.mean()) ** 2 * TIMES / (TIMES - 1)
    mean, error = mean_and_error(squares - told**2)
    assert abs(mean) < 4.5 * error + EXACTLY
    assert error < 0.25 * squares.mean() + EXACTLY


@where_khat_is_good
def test_the_bias_of_smoothed_estimates_is_within_their_error(model, estimator):
    """PSIS is no unbiased estimate: what it is off by must not show in one run."""
    found = run(model, estimator)
    mean, error = mean_and_error(np.exp(errors(found, KNOWN[model].log_p, "psis")))
    told = math.sqrt((found.per_datum["bound_se"].values[-1] ** 2).mean())
    assert abs(mean - 1) < told + EXACTLY
    assert 4.5 * error < told + EXACTLY


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_other_seeds_give_other_draws_that_agree(estimator):
    log_p = KNOWN["ring"].log_p
    found = [errors(run("ring", estimator, seed, times=60), log_p)[-1] for seed in (1, 2, 3)]
    assert len(set(np.concatenate(found))) == 3 * 60
    for one, other in ((0, 1), (1, 2), (2, 0)):
        (a, a_error), (b, b_error) = (mean_and_error(np.exp(found[i])) for i in (one, other))
        assert abs(a - b) < 4.5 * math.hypot(a_error, b_error)


# ------------------------------------------------------------------------------ intervals


def share_covered(found: Evaluation, truth: Any, row: int = -1, width: float = 1.96) -> float:
    """Of the 95 % intervals for a bound of the grid."""
    error = errors(found, truth)[row]
    return float((abs(error) < width * found.per_datum["bound_se"].values[row]).mean())


def nominal(times: int) -> tuple[float, float]:
    """Between these the share lies but for 7 in a million."""
    low, high = binom.interval(1 - 6.8e-6, times, 0.95)
    return low / times, high / times


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("linear-Gaussian", {}),
        ("mixture", {}),
        ("ring", {}),
        ("square", {}),
        ("square", {"proposal": "prior"}),
        ("coin", {}),
    ],
)
def test_intervals_cover_at_their_nominal_rate(model, settings):
    known = KNOWN[model]
    found = pvae.evaluate(known.pair, known.repeated(600), 500, grid=[500], **settings)
    low, high = nominal(600)
    assert found.failing < 0.02
    assert low <= share_covered(found, known.log_p) <= high


def test_intervals_of_annealed_chains_cover_at_their_nominal_rate():
    known = KNOWN["square"]
    settings = {"num_chains": 20, "num_temperatures": 10, "leapfrog_steps": 3, "start": "guide"}
    found = pvae.ais(known.pair, known.repeated(TIMES), **settings)
    low, high = nominal(TIMES)
    assert low <= share_covered(found, known.log_p) <= high


@pytest.mark.parametrize("model", ["linear-Gaussian", "ring"])
def test_intervals_at_sobol_points_cover_by_students_t(model):
    """The error is that of eight sets of points, which know it with seven degrees of freedom."""
    known = KNOWN[model]
    found = pvae.evaluate(known.pair, known.repeated(600), 512, grid=[512], points="sobol")
    low, high = nominal(600)
    assert low <= share_covered(found, known.log_p, width=float(student_t.ppf(0.975, 7))) <= high


def test_intervals_of_each_bound_cover_what_the_bound_is_in_expectation():
    """L_1 and L_5 of a model with two latent values, whose expectations are sums."""
    known = KNOWN["coin"]
    found = pvae.evaluate(known.pair, known.repeated(1000), 500, grid=[1, 5])
    low, high = nominal(1000)
    for row, size in enumerate((1, 5)):
        expected = float(COIN.bound(known.x, PHI, size))
        assert expected < known.log_p - 0.005
        assert low <= share_covered(found, expected, row) <= high


# ------------------------------------------------------------------------------ k-hat

FLAT = LinearGaussian.drawn(data_size=2, latent_size=2, sigma=1.0)
FLAT_X = FLAT.sample(1)


@cache
def narrow(tail: float, proposal: str = "guide") -> Evaluation:
    """By a guide whose covariance is 1 - k times the posterior's, in two dimensions.

    Its weights are (1 - k) p(x) exp(k e), e ~ Exponential(1): Pareto of tail index k.
    """
    pair, x = FLAT.pair(1 - tail), FLAT_X.expand(TIMES, -1)
    return pvae.evaluate(pair, x, 4000, grid=[4000], proposal=proposal)


@pytest.mark.parametrize("tail", [0.2, 0.5, 0.9])
def test_khat_of_an_evaluation_is_the_known_tail_index(tail):
    """But for the ten draws of k = 0.5 that ArviZ adds to the 190 of the tail."""
    mean, error = mean_and_error(narrow(tail).per_datum["khat"].values)
    size = math.ceil(3 * math.sqrt(4000))
    assert abs(mean - (size * tail + 10 * 0.5) / (size + 10)) < 4.5 * error + 0.01
    assert error < 0.01


def test_where_the_guide_is_too_narrow_intervals_fail_and_khat_says_so():
    """The other way round, k-hat of 1 / w would let it pass. The defensive proposal mends both."""
    log_p = float(FLAT.log_prob(FLAT_X))
    low, high = nominal(TIMES)
    assert share_covered(narrow(0.9), log_p) < 0.5
    assert narrow(0.9).failing > 0.9
    assert low <= share_covered(narrow(0.9, "defensive"), log_p) <= high
    assert narrow(0.9, "defensive").failing < 0.02
    broad = pvae.evaluate(FLAT.pair(2.0), FLAT_X.expand(TIMES, -1), 1000)
    assert low <= share_covered(broad, log_p) <= high
    assert broad.failing == 0


# ------------------------------------------------------------------------------ brackets


@pytest.mark.parametrize(
    ("model", "start"),  # tests/evaluation/test_annealing.py has others from the prior
    [*((model, "guide") for model in CONTINUOUS), ("two layers", "prior"), ("square", "prior")],
)
def test_brackets_hold_the_exact_value(model, start):
    """E[exp(lower)] = p(x) and E[exp(-upper)] = 1 / p(x), hence lower <= log p(x) <= upper."""
    known = KNOWN[model]
    settings = {"num_chains": 4, "leapfrog_steps": 4, "seed": 2}
    settings["num_temperatures"] = 30 if start == "prior" else 10
    found = pvae.sandwich(known.pair, num_data=TIMES, start=start, **settings).simulated
    log_p = known.truth.log_prob(simulated(known.pair, TIMES, seed=2)).numpy()
    for below in (found["lower"].values - log_p, log_p - found["upper"].values):
        mean, error = mean_and_error(below)
        assert -1 < mean < 4.5 * error
        mean, error = mean_and_error(np.exp(below))
        assert abs(mean - 1) < 4.5 * error


# ------------------------------------------------------------------------------ nothing is changed


def bracketed(model: Any, data: Any) -> None:
    pvae.sandwich(model, data, num_data=5, num_chains=2, num_temperatures=5)


CHANGING_NOTHING = {
    **ESTIMATORS,
    "sandwich": bracketed,
}


@pytest.mark.parametrize("estimator", CHANGING_NOTHING)
def test_no_estimator_changes_the_model_or_the_random_state(estimator):
    """Parameters, their gradients, buffers, modes, and the state of each generator, to the bit."""
    model, x = normalised(), torch.randn(6, 5)
    model.prepare(x)
    model.train()
    list(model.children())[-1].eval()  # a mixed mode, which is the caller's business
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = everything(model)
    CHANGING_NOTHING[estimator](model, x)
    after = everything(model)
    assert before.keys() == after.keys()
    assert all(np.array_equal(value, after[key]) for key, value in before.items())


def everything(model: Any) -> dict[str, Any]:
    kept = {f"value of {name}": v.clone().numpy() for name, v in model.state_dict().items()}
    kept |= {f"gradient of {k}": p.grad.clone().numpy() for k, p in model.named_parameters()}
    kept |= {f"needs one, {name}": p.requires_grad for name, p in model.named_parameters()}
    kept |= {f"mode of {name}": module.training for name, module in model.named_modules()}
    kept["random state of torch"] = torch.get_rng_state().numpy()
    kept["random state of NumPy"] = np.random.get_state()[1].copy()
    kept["random state of Python"] = random.getstate()[1]
    return kept
