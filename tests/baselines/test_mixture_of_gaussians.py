"""EM against scikit-learn's, and its densities against torch.distributions, on real digits."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import mixture as sklearn_mixture
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from pvae.baselines import GaussianMixture, fit_em, mixture_of_gaussians, rows
from pvae.baselines.mixture_of_gaussians import COVARIANCES
from pvae.data import load_data

NUM_COMPONENTS = 8
every_covariance = pytest.mark.parametrize("covariance", COVARIANCES)


def dequantised_digits() -> Tensor:
    grey = load_digits().data  # (1797, 64), levels 0 to 16
    return torch.from_numpy((grey + np.random.default_rng(0).random(grey.shape)) / 17)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return dequantised_digits().split([1300, 497])


def fit(x: Tensor, covariance: str = "diag", **options: object) -> GaussianMixture:
    return fit_em(x, NUM_COMPONENTS, covariance, device="cpu", **options)


def as_distribution(fitted: GaussianMixture) -> MixtureSameFamily:
    weights, means, scale = fitted.weights, fitted.means, fitted.scale_tril
    if fitted.covariance == "spherical":
        scale = scale[:, None].expand_as(means)
    if fitted.covariance in ("diag", "spherical"):
        components = Independent(Normal(means, scale), 1)
    else:
        components = MultivariateNormal(means, scale_tril=scale)
    return MixtureSameFamily(Categorical(weights), components)


def fit_with_sklearn(
    x: Tensor, start: GaussianMixture, max_iter: int, tol: float = 1e-3
) -> sklearn_mixture.GaussianMixture:
    scale = start.scale_tril
    if start.covariance in ("diag", "spherical"):
        precisions = scale**-2
    else:
        precisions = torch.linalg.inv(scale @ scale.mT)
    peer = sklearn_mixture.GaussianMixture(
        NUM_COMPONENTS,
        covariance_type=start.covariance,
        weights_init=start.weights.numpy(),
        means_init=start.means.numpy(),
        precisions_init=precisions.numpy(),
        max_iter=max_iter,
        tol=tol,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return peer.fit(x.numpy())


@every_covariance
def test_held_out_log_likelihood_is_that_of_scikit_learn_on_the_same_start(digits, covariance):
    train, test = digits
    start = fit(train, covariance, max_iter=1)
    ours = fit(train, covariance, start=start)
    peer = fit_with_sklearn(train, start, max_iter=100)
    assert ours.converged
    assert len(ours.log_likelihood) == peer.n_iter_ > 2
    torch.testing.assert_close(ours.means, torch.from_numpy(peer.means_))
    expected = torch.from_numpy(peer.score_samples(test.numpy()))
    torch.testing.assert_close(ours.log_prob(test), expected, rtol=0, atol=1e-8)
    log_likelihood = torch.tensor(peer.lower_bounds_, dtype=torch.float64)
    torch.testing.assert_close(ours.log_likelihood, log_likelihood, rtol=0, atol=1e-8)


@every_covariance
def test_our_own_start_ends_as_well_as_scikit_learns(digits, covariance):
    x = digits[0]
    ours = fit(x, covariance, num_starts=5).log_prob(x).mean()
    peer = sklearn_mixture.GaussianMixture(
        NUM_COMPONENTS, covariance_type=covariance, n_init=5, random_state=0
    ).fit(x.numpy())
    assert ours > peer.score(x.numpy()) - 0.5  # local maxima lie up to 2 nats apart


@every_covariance
def test_log_likelihood_never_falls(digits, covariance):
    fitted = fit(digits[0], covariance, tol=0.0, max_iter=30, regularisation=0.0)
    assert fitted.log_likelihood.shape == (30,)
    assert not fitted.converged
    assert fitted.log_likelihood.diff().min() > -1e-11
    assert fitted.log_prob(digits[0]).mean() > fitted.log_likelihood[-1] - 1e-11


@every_covariance
def test_log_prob_is_that_of_torch_distributions(digits, covariance):
    train, test = digits
    fitted = fit(train, covariance, max_iter=3)
    expected = as_distribution(fitted).log_prob(test)
    torch.testing.assert_close(fitted.log_prob(test), expected, rtol=0, atol=1e-9)


@every_covariance
def test_responsibilities_are_the_posterior_of_the_component(digits, covariance):
    train, test = digits
    fitted = fit(train, covariance, max_iter=3)
    p = as_distribution(fitted)
    log_joint = p.component_distribution.log_prob(test[:, None]) + fitted.weights.log()
    responsibilities = fitted.responsibilities(test)
    torch.testing.assert_close(responsibilities, (log_joint - p.log_prob(test)[:, None]).exp())
    torch.testing.assert_close(
        responsibilities.sum(dim=1), torch.ones(len(test), dtype=torch.float64)
    )


@every_covariance
def test_block_size_does_not_matter(digits, covariance, monkeypatch):
    train, test = digits[0][:300], digits[1]
    whole = fit(train, covariance, max_iter=4, tol=0.0)
    expected = whole.log_prob(test)
    monkeypatch.setitem(
        rows.BLOCK_ELEMENTS, "cpu", (64 + 64 + 8) * 7
    )  # 7 rows, the last block has 6
    by_blocks = fit(train, covariance, max_iter=4, tol=0.0)
    torch.testing.assert_close(by_blocks.log_likelihood, whole.log_likelihood, rtol=0, atol=1e-8)
    torch.testing.assert_close(by_blocks.log_prob(test), expected, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("offset", [0, 100])
@every_covariance
def test_float32_is_close_to_float64(digits, covariance, offset):
    train, test = ((part + offset).float() for part in digits)
    start = fit(train.double(), covariance, max_iter=1)
    fitted = fit(train, covariance, start=start, max_iter=20, tol=0.0)
    expected = fit(train.double(), covariance, start=start, max_iter=20, tol=0.0)
    tensors = (fitted.weights, fitted.means, fitted.scale_tril, fitted.log_prob(test))
    assert {t.dtype for t in tensors} == {torch.float32}
    close = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(fitted.log_likelihood, expected.log_likelihood, **close)
    # Rounded to float32, the means alone move log p(x) by up to 0.03 nats at the offset.
    atol = 1e-3 if offset == 0 else 0.1
    log_p = fitted.log_prob(test).double()
    torch.testing.assert_close(log_p, expected.log_prob(test.double()), rtol=0, atol=atol)


@pytest.fixture
def steps_in(monkeypatch) -> list[torch.dtype]:
    """The type of each pass over the data, in turn."""
    types = []
    add_up = mixture_of_gaussians._add_up

    def record(x: Tensor, centre: Tensor, *rest: object) -> object:
        types.append(centre.dtype)
        return add_up(x, centre, *rest)

    monkeypatch.setattr(mixture_of_gaussians, "_add_up", record)
    return types


@pytest.mark.parametrize("covariance", ["diag", "spherical"])
def test_steps_are_in_the_type_of_the_data(digits, covariance, steps_in):
    start = fit(digits[0], covariance, max_iter=1)
    for x in (digits[0], digits[0].float()):
        steps_in.clear()
        fit(x, covariance, start=start, max_iter=5, tol=0.0)
        assert steps_in == [x.dtype] * 5


def two_narrow_components() -> Tensor:
    centres = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, 300)
    spread = 2.0**-11  # squared and divided by, the distance 1/2 to the centre is 10^6
    return (centres.repeat(200, 1) + spread * torch.randn(400, 300).double()).float()


def at_quarters(scale: float) -> GaussianMixture:
    return GaussianMixture(
        weights=torch.tensor([0.5, 0.5]),
        means=torch.tensor([[0.25], [0.75]]).expand(2, 300),
        scale_tril=torch.full((2, 300), scale),
        covariance="diag",
        log_likelihood=torch.empty(0),
        converged=False,
    )


def test_components_that_turn_narrow_are_found_again_in_float64(steps_in):
    x = two_narrow_components()
    fitted = fit_em(x, 2, start=at_quarters(1.0), max_iter=1, device="cpu", regularisation=0.0)
    assert steps_in == [torch.float32, torch.float64]
    spread = torch.stack([half.double().std(dim=0, correction=0) for half in (x[::2], x[1::2])])
    torch.testing.assert_close(fitted.scale_tril, spread.float())


def test_components_too_narrow_for_float32_are_left_in_float64(steps_in):
    x = two_narrow_components()
    narrow = at_quarters(2.0**-11)
    fitted = fit_em(x, 2, start=narrow, max_iter=1, device="cpu", regularisation=1.0)
    assert steps_in == [torch.float64]
    expected = fit_em(
        x.double(), 2, start=narrow, max_iter=1, device="cpu", regularisation=1.0
    ).log_likelihood
    torch.testing.assert_close(fitted.log_likelihood, expected, rtol=0, atol=1e-6)


def test_squares_that_overflow_float32_do_no_harm(digits):
    x, scale = digits[0].float(), 2.0**100
    options = {"max_iter": 3, "tol": 0.0, "regularisation": 0.0}
    expected = fit(x, means=x[:NUM_COMPONENTS], **options)
    scaled = fit(x * scale, means=x[:NUM_COMPONENTS] * scale, **options)
    torch.testing.assert_close(scaled.means / scale, expected.means)
    change = -64 * 100 * math.log(2)  # log p is a density: of 64 elements, each 2^100 as wide
    torch.testing.assert_close(
        scaled.log_likelihood, expected.log_likelihood + change, rtol=0, atol=2e-3
    )


def test_float32_products_of_fewer_digits_are_not_used(digits, steps_in):
    start = fit(digits[0], max_iter=1)
    steps_in.clear()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        fit(digits[0].float(), start=start, max_iter=1)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert steps_in == [torch.float64]


def test_narrow_components_far_from_the_centre_keep_their_digits_in_float32():
    x = two_narrow_components()
    fitted = fit_em(x, 2, means=x[:2], device="cpu", regularisation=0.0)
    p = as_distribution(fitted)
    components = Independent(Normal(fitted.means.double(), fitted.scale_tril.double()), 1)
    p = MixtureSameFamily(Categorical(fitted.weights.double()), components)
    torch.testing.assert_close(fitted.log_prob(x), p.log_prob(x.double()).float())


@every_covariance
def test_samples_have_the_mixtures_moments(covariance):
    torch.manual_seed(0)
    x = torch.randn(500, 3) @ torch.randn(3, 3) + torch.randn(2, 3)[torch.arange(500) % 2] * 4
    fitted = fit_em(x.double(), 2, covariance, device="cpu")
    num = 100_000
    draws = fitted.sample(num)
    assert draws.shape == (num, 3)
    assert draws.dtype == torch.float64
    p = as_distribution(fitted)
    z_score = (draws.mean(dim=0) - p.mean) / (p.variance / num).sqrt()
    assert z_score.abs().max() < 4.5
    # E log p(x) is minus the entropy, whoever draws: this sees the correlations too.
    ours, theirs = p.log_prob(draws), p.log_prob(p.sample((num,)))
    standard_error = ((ours.var() + theirs.var()) / num).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 4.5 * standard_error


def test_samples_follow_torchs_global_seed(digits):
    fitted = fit(digits[0], max_iter=2)
    torch.manual_seed(3)
    first = fitted.sample(5)
    assert not torch.equal(first, fitted.sample(5))
    torch.manual_seed(3)
    assert torch.equal(first, fitted.sample(5))


def test_seeds_reproduce_and_the_callers_random_state_is_untouched(digits):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (fit(digits[0], max_iter=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.means, again.means)
    assert not torch.equal(first.means, other.means)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_more_starts_are_never_worse(digits):
    one, five = (fit(digits[0], num_starts=n, max_iter=10) for n in (1, 5))
    assert five.log_likelihood[-1] > one.log_likelihood[-1]


def test_one_component_is_the_maximum_likelihood_gaussian(digits):
    x = digits[0]
    fitted = fit_em(x, 1, "full", device="cpu", regularisation=0.0)
    torch.testing.assert_close(fitted.means[0], x.mean(dim=0))
    covariance = fitted.scale_tril[0] @ fitted.scale_tril[0].T
    torch.testing.assert_close(covariance, x.T.cov(correction=0))


def test_means_begin_with_each_datum_at_the_nearest():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 1.0], [10.0, 3.0], [10.0, 5.0]])
    fitted = fit_em(x, 2, means=torch.tensor([[1.0, 1.0], [9.0, 1.0]]), max_iter=1, device="cpu")
    torch.testing.assert_close(fitted.weights, torch.tensor([0.4, 0.6]))
    torch.testing.assert_close(fitted.means, torch.tensor([[1.0, 0.0], [10.0, 3.0]]))
    variance = torch.tensor([[1.0, 0.0], [0.0, 8 / 3]]) + 1e-6
    torch.testing.assert_close(fitted.scale_tril, variance.sqrt())


@every_covariance
def test_an_empty_component_keeps_its_mean_and_has_no_weight(digits, covariance):
    far = torch.full((1, 64), 100.0)
    fitted = fit_em(
        digits[0], 3, covariance, means=torch.cat([digits[0][:2], far]), max_iter=3, device="cpu"
    )
    assert fitted.weights[2] == 0
    torch.testing.assert_close(fitted.means[2], far[0].double())
    assert fitted.scale_tril.isfinite().all()
    assert fitted.log_prob(digits[1]).isfinite().all()
    assert (fitted.responsibilities(digits[1])[:, 2] == 0).all()
    assert fitted.sample(10).isfinite().all()


def test_equal_data_fill_one_component():
    fitted = fit_em(torch.ones(20, 3), 4, device="cpu")
    assert sorted(fitted.weights.tolist()) == [0, 0, 0, 1]
    assert (fitted.means == 1).all()


def test_takes_data_arrays_and_images():
    data = load_data("digits", dequantisation="uniform").train
    values = data.realised().values
    expected = fit(values.flatten(1), max_iter=2).means
    for x in (data, values, values.numpy(), values.reshape(-1, 8, 8)):
        assert torch.equal(fit(x, max_iter=2).means, expected)
    fitted = fit(data, max_iter=2)
    assert torch.equal(fitted.log_prob(values.reshape(-1, 8, 8)), fitted.log_prob(data))


few = torch.arange(12.0).reshape(6, 2)
started = fit_em(few, 2, max_iter=1, device="cpu")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (few, {"num_components": 7}, r"mixture of 7 Gaussians needs 7 data or more, got 6"),
        (few[:1], {"num_components": 1}, r"mixture of 1 Gaussians needs 2 data or more, got 1"),
        (few, {"num_components": 0}, r"`num_components` must be at least 1, got 0"),
        (few, {"num_starts": 0}, r"`num_starts` must be at least 1, got 0"),
        (few, {"max_iter": 0}, r"`max_iter` must be at least 1, got 0"),
        (few, {"regularisation": -1.0}, r"`regularisation` must be a variance, .* got -1.0"),
        (few, {"covariance": "diagonal"}, r"must be one of diag, .* Did you mean 'diag'\?"),
        (few / 0, {}, r"has NaN or infinite values in 6 of 6 rows"),
        (few, {"means": torch.ones(3, 2)}, r"shape \(C, D\) = \(2, 2\), got \(3, 2\)"),
        (few, {"means": torch.ones(2, 2) / 0}, r"means to begin from must be finite"),
        (few, {"means": few[:2], "num_starts": 2}, r"begin from one place only"),
        (few, {"means": few[:2], "start": started}, r"begin from one place only"),
        (
            few,
            {"start": started, "covariance": "full"},
            r"covariance asked for, 'full', got 'diag'",
        ),
        (few, {"start": replace(started, means=few[:3])}, r"\(C, D\) = \(2, 2\), got \(3, 2\)"),
    ],
)
def test_bad_input_is_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        fit_em(data, **({"num_components": 2, "device": "cpu"} | options))


@every_covariance
def test_a_singular_covariance_says_to_raise_the_regularisation(covariance):
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [5.0, 1.0], [5.0, 1.0]])
    with pytest.raises(ValueError, match=r"positive definite.*Raise `regularisation`"):
        fit_em(x, 2, covariance, means=x[1:3], regularisation=0.0, device="cpu")


@pytest.mark.parametrize("method", ["log_prob", "responsibilities"])
def test_data_that_do_not_fit_the_mixture_are_refused(method):
    with pytest.raises(ValueError, match=r"must have 2 elements, .* got 3: data of shape \(4, 3\)"):
        getattr(started, method)(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"has NaN or infinite values in 1 of 2 rows"):
        getattr(started, method)(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]))
