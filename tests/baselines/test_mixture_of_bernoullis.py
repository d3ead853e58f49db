"""EM for mixtures of Bernoullis against sums written out, and its densities against SciPy's."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import bernoulli
from torch import Tensor
from torch.nn.functional import logsigmoid

import pvae
from pvae.baselines import BernoulliMixture, fit_mixture_of_bernoullis, rows
from pvae.data import load_data


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return load_data("digits", binarisation="threshold").train.values.double()


def fit(x: Tensor, num_components: int = 8, **options: object) -> BernoulliMixture:
    return fit_mixture_of_bernoullis(x, num_components, device="cpu", **options)


def mixture(weights: Tensor, probs: Tensor) -> BernoulliMixture:
    return BernoulliMixture(weights, probs.logit(), torch.empty(0), converged=False)


def drawn(C: int = 3, D: int = 6) -> BernoulliMixture:
    return mixture(torch.randn(C).double().softmax(0), torch.rand(C, D).double())


def written_out(m: BernoulliMixture, x: Tensor) -> np.ndarray:
    """p(c, x), (N, C)."""
    parts = bernoulli.pmf(x.numpy()[:, None], m.probs.numpy()).prod(axis=-1)
    return m.weights.numpy() * parts


def test_log_prob_is_scipys_sum_over_components():
    truth = drawn()
    x = torch.rand(50, 6).round().double()
    expected = torch.from_numpy(np.log(written_out(truth, x).sum(axis=1)))
    torch.testing.assert_close(truth.log_prob(x), expected, rtol=0, atol=1e-12)


def test_probabilities_of_all_patterns_sum_to_one():
    patterns = torch.tensor(list(product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    assert drawn().log_prob(patterns).logsumexp(0).item() == pytest.approx(0, abs=1e-12)


def test_responsibilities_are_bayes_rule():
    truth = drawn()
    x = torch.rand(50, 6).round().double()
    joint = written_out(truth, x)
    expected = torch.from_numpy(joint / joint.sum(axis=1, keepdims=True))
    torch.testing.assert_close(truth.responsibilities(x), expected)


def test_one_update_is_the_formula_written_out():
    start, x = drawn(), torch.rand(40, 6).round().double()
    joint = written_out(start, x)
    r = joint / joint.sum(axis=1, keepdims=True)
    N = r.sum(axis=0)
    probs = (r.T @ x.numpy() + 0.25) / (N + 0.5)[:, None]
    updated = fit(x, 3, start=start, max_iter=1, prior_count=0.25)
    torch.testing.assert_close(updated.weights, torch.from_numpy(N / 40))
    torch.testing.assert_close(updated.probs, torch.from_numpy(probs))
    before = torch.tensor([np.log(joint.sum(axis=1)).mean()], dtype=torch.float64)
    torch.testing.assert_close(updated.log_likelihood, before)


def test_log_likelihood_never_falls(digits):
    fitted = fit(digits, tol=0.0, max_iter=50, prior_count=1e-9)
    assert fitted.log_likelihood.shape == (50,)
    assert not fitted.converged
    assert fitted.log_likelihood.diff().min() > -1e-9
    assert fitted.log_prob(digits).mean() > fitted.log_likelihood[-1] - 1e-9


def test_the_fit_is_a_maximum_of_the_posterior(digits):
    x, count = digits[:300], 1.0
    fitted = fit(x, 3, tol=0.0, max_iter=500, prior_count=count)
    log_weights = fitted.weights.log().requires_grad_()
    logits = fitted.logits.clone().requires_grad_()
    ones, zeros = logsigmoid(logits), logsigmoid(-logits)
    log_p = (log_weights.log_softmax(0) + x @ ones.T + (1 - x) @ zeros.T).logsumexp(1).sum()
    (log_p + count * (ones + zeros).sum()).backward()
    assert log_weights.grad.abs().max() < 1e-6
    assert logits.grad.abs().max() < 1e-6


def test_a_known_mixture_is_found_again():
    probs = torch.cat([torch.full((1, 12), 0.9), torch.full((1, 12), 0.1)]).double()
    truth = mixture(torch.tensor([0.3, 0.7]).double(), probs)
    x = truth.sample(20_000)
    fitted = fit(x, 2, tol=1e-9)
    order = fitted.weights.argsort()
    N = torch.tensor([6000.0, 14000.0])[:, None]
    standard_error = (0.9 * 0.1 / N).sqrt()  # the components hardly overlap
    assert ((fitted.probs[order] - probs) / standard_error).abs().max() < 4.5
    assert (fitted.weights[order[0]] - 0.3).abs() < 4.5 * math.sqrt(0.3 * 0.7 / 20_000)


def test_one_component_is_the_frequency_of_ones(digits):
    fitted = fit(digits, 1, prior_count=0.5)
    expected = (digits.sum(dim=0) + 0.5) / (len(digits) + 1)
    torch.testing.assert_close(fitted.probs[0], expected)


def test_a_bit_never_seen_keeps_a_probability():
    x = torch.zeros(30, 4)
    x[:15, 0] = 1
    new = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    for count in (0.1, 1e-6):
        fitted = fit(x, 1, prior_count=count)
        assert fitted.log_prob(new).isfinite().all()
        torch.testing.assert_close(fitted.probs[0, 3].item(), count / (30 + 2 * count))


def test_the_declared_model_has_the_same_log_p(digits):
    fitted = fit(digits, max_iter=5)
    result = pvae.evaluate(fitted.to_model(), digits, device="cpu")
    assert result.is_exact
    np.testing.assert_allclose(
        result.per_datum["exact"], fitted.log_prob(digits), rtol=0, atol=1e-10
    )


def test_an_update_of_the_declared_model_is_one_of_em(digits):
    """The gradient at weights and logits is that of EM's objective there (Bishop 2006, 9.4)."""
    x, fitted = digits[:200], fit(digits, max_iter=2)
    model = fitted.to_model()
    model.draw(x).log_weights.sum().backward()
    r = fitted.responsibilities(x)
    gradient = model.module_of("x").nets["net"].rows["logits"].grad
    torch.testing.assert_close(gradient, r.T @ x - r.sum(0)[:, None] * fitted.probs)
    expected = r.sum(0) - len(x) * fitted.weights
    torch.testing.assert_close(model.module_of("c").learned["logits"].grad, expected)


def test_an_empty_component_has_no_weight_and_harms_nothing(digits):
    first = fit(digits, 3, max_iter=1)
    weights = torch.tensor([0.5, 0.5, 0.0]).double()
    fitted = fit(digits, 3, start=replace(first, weights=weights), max_iter=3)
    assert fitted.weights[2] == 0
    assert torch.equal(fitted.logits[2], first.logits[2])
    assert fitted.log_prob(digits).isfinite().all()
    value = pvae.exact.log_prob(fitted.to_model(), digits)
    torch.testing.assert_close(value, fitted.log_prob(digits))


def test_samples_have_the_mixtures_moments():
    truth, num = drawn(), 50_000
    draws = truth.sample(num)
    mean = truth.weights @ truth.probs
    assert ((draws.mean(dim=0) - mean) / (mean * (1 - mean) / num).sqrt()).abs().max() < 4.5
    both = (truth.weights[:, None] * truth.probs).T @ truth.probs  # E[x_i x_j], i != j
    pairs = draws.T @ draws / num
    z_score = (pairs - both) / (both * (1 - both) / num).sqrt()
    assert z_score[~torch.eye(6, dtype=torch.bool)].abs().max() < 4.5


def test_block_size_does_not_matter(digits, monkeypatch):
    x = digits[:300]
    whole = fit(x, max_iter=4, tol=0.0)
    expected = whole.log_prob(x)
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", (64 + 64 + 8) * 7)
    by_blocks = fit(x, max_iter=4, tol=0.0)
    torch.testing.assert_close(by_blocks.log_likelihood, whole.log_likelihood, rtol=0, atol=1e-9)
    torch.testing.assert_close(by_blocks.log_prob(x), expected, rtol=0, atol=1e-9)


def test_a_start_goes_on_where_it_was_left(digits):
    whole = fit(digits, max_iter=5, tol=0.0)
    part = fit(digits, start=fit(digits, max_iter=3, tol=0.0), max_iter=2, tol=0.0)
    assert torch.equal(part.log_likelihood, whole.log_likelihood[3:])
    assert torch.equal(part.logits, whole.logits)


def test_seeds_reproduce_and_the_callers_random_state_is_untouched(digits):
    before = torch.get_rng_state()
    first, again, other = (fit(digits, max_iter=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.logits, other.logits)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_starts_are_never_worse(digits):
    one, five = (fit(digits, num_starts=n, max_iter=10, seed=2) for n in (1, 5))
    assert five.log_likelihood[-1] > one.log_likelihood[-1]


def test_takes_data_arrays_and_images_in_their_own_type():
    data = load_data("digits", binarisation="dynamic").train
    bits = data.realised().values
    expected = fit(bits, max_iter=2).logits
    assert expected.dtype == torch.float32
    for x in (data, bits.numpy(), bits.reshape(-1, 8, 8)):
        assert torch.equal(fit(x, max_iter=2).logits, expected)
    double = fit(bits.double(), max_iter=2)
    torch.testing.assert_close(double.logits.float(), expected)


bits = (torch.arange(24).reshape(6, 4) % 5 > 2).double()
started = fit(bits, 2, max_iter=1)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (
            bits / 2,
            {},
            r"needs bits, 0 or 1, and \d of 6 data are not.* \(`load_data\(.*'dynamic'\)`\)",
        ),
        (bits, {"num_components": 7}, r"mixture of 7 Bernoullis needs 7 data or more, got 6"),
        (bits, {"num_components": 0}, r"`num_components` must be at least 1, got 0"),
        (bits, {"num_starts": 0}, r"`num_starts` must be at least 1, got 0"),
        (bits, {"max_iter": 0}, r"`max_iter` must be at least 1, got 0"),
        (bits, {"prior_count": 0.0}, r"`prior_count` must be finite and above 0, got 0.0"),
        (bits, {"start": started, "num_starts": 2}, r"begin from one place only"),
        (bits, {"start": started, "num_components": 3}, r"\(C, D\) = \(3, 4\), got \(2, 4\)"),
    ],
)
def test_bad_input_is_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        fit(x, **({"num_components": 2} | options))


def test_data_that_do_not_fit_the_mixture_are_refused():
    for method in (started.log_prob, started.responsibilities):
        with pytest.raises(ValueError, match=r"must have 4 elements, .* got 3"):
            method(torch.ones(4, 3))
        with pytest.raises(ValueError, match=r"needs bits, 0 or 1, and 1 of 2 data are not"):
            method(torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.5, 0.0, 0.0]]))
