"""EM for mixtures of factor analysers against dense Gaussians, SciPy's and scikit-learn's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn import decomposition
from sklearn.datasets import load_wine
from torch import Tensor
from torch.distributions import (
    Categorical,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
)

import pvae
from pvae.baselines import MixtureOfFactorAnalysers, fit_mixture_of_factor_analysers, rows
from pvae.data import load_data
from tests.exact import LinearMixture

Q, C = 2, 3


def fit(x: Tensor, latent_size: int = Q, num_components: int = C, **options: object):
    return fit_mixture_of_factor_analysers(
        x, latent_size, num_components, **{"device": "cpu", **options}
    )


@pytest.fixture(scope="module")
def wine() -> Tensor:
    x = torch.from_numpy(load_wine().data)
    return (x - x.mean(dim=0)) / x.std(dim=0) + 3


@pytest.fixture(scope="module")
def fitted(wine) -> MixtureOfFactorAnalysers:
    return fit(wine, tol=0.0, max_iter=20)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return load_data("digits", dequantisation="uniform").train.realised().values[:800].double()


def drawn(D: int = 4) -> MixtureOfFactorAnalysers:
    random = torch.Generator().manual_seed(1)
    W, means = (torch.randn(C, D, n, generator=random).double() for n in (Q, 1))
    weights = torch.tensor([0.5, 0.3, 0.2]).double()
    psi = torch.linspace(0.1, 0.5, D).double()
    return MixtureOfFactorAnalysers(weights, W, 3 * means[..., 0], psi, psi.new_empty(0), False)


def covariances(m: MixtureOfFactorAnalysers) -> Tensor:
    return m.W @ m.W.mT + m.psi.diag()


def as_distribution(m: MixtureOfFactorAnalysers) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(m.weights), MultivariateNormal(m.means, covariances(m)))


def test_log_prob_is_scipys_sum_over_components(wine, fitted):
    parts = [
        multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(wine.numpy())
        for mean, covariance in zip(fitted.means, covariances(fitted), strict=True)
    ]
    expected = logsumexp(np.stack(parts, axis=1) + np.log(fitted.weights.numpy()), axis=1)
    torch.testing.assert_close(fitted.log_prob(wine), torch.from_numpy(expected), rtol=0, atol=1e-9)


def test_responsibilities_are_bayes_rule(wine, fitted):
    p = as_distribution(fitted)
    joint = p.component_distribution.log_prob(wine[:, None]) + fitted.weights.log()
    torch.testing.assert_close(fitted.responsibilities(wine), joint.softmax(1))


def test_posterior_of_the_factors_is_bayes_rule(wine, fitted):
    mean, covariance = fitted.posterior(wine)
    assert mean.shape == (len(wine), C, Q)
    z = torch.randn(Q, dtype=torch.float64)
    prior = MultivariateNormal(torch.zeros_like(z), torch.eye(Q).double()).log_prob(z)
    noise = fitted.psi.diag()
    likelihood = MultivariateNormal(fitted.means + fitted.W @ z, noise).log_prob(wine[:, None])
    posterior = MultivariateNormal(mean, covariance).log_prob(z)
    expected = MultivariateNormal(fitted.means, covariances(fitted)).log_prob(wine[:, None])
    torch.testing.assert_close(prior + likelihood - posterior, expected)


def test_one_update_is_the_formula_written_out():
    """Ghahramani & Hinton 1996, datum by datum, through the inverse of each dense covariance."""
    start = drawn()
    x = start.sample(40)
    r = as_distribution(start).component_distribution.log_prob(x[:, None]) + start.weights.log()
    r = r.softmax(1)
    expected_W, expected_means, left = [], [], torch.zeros(4).double()
    for c in range(C):
        W, beta = start.W[c], start.W[c].T @ torch.linalg.inv(covariances(start)[c])
        top, bottom = torch.zeros(4, Q + 1).double(), torch.zeros(Q + 1, Q + 1).double()
        for n in range(40):
            z = beta @ (x[n] - start.means[c])
            zz = torch.eye(Q).double() - beta @ W + z.outer(z)
            one = torch.ones(1).double()
            both = torch.cat([torch.cat([zz, z[:, None]], 1), torch.cat([z, one])[None]])
            top += r[n, c] * x[n].outer(torch.cat([z, one]))
            bottom += r[n, c] * both
        new = top @ torch.linalg.inv(bottom)
        left += (r[:, c, None] * x.square()).sum(0) - (new @ top.T).diagonal()
        expected_W.append(new[:, :Q])
        expected_means.append(new[:, Q])
    updated = fit(x, start=start, max_iter=1, regularisation=0.0)
    torch.testing.assert_close(updated.weights, r.mean(0))
    torch.testing.assert_close(updated.W, torch.stack(expected_W))
    torch.testing.assert_close(updated.means, torch.stack(expected_means))
    torch.testing.assert_close(updated.psi, left / 40)
    before = as_distribution(start).log_prob(x).mean()
    torch.testing.assert_close(updated.log_likelihood[0], before)


def test_log_likelihood_never_falls(digits):
    fitted = fit(digits, 4, 8, tol=0.0, max_iter=25, regularisation=0.0)
    assert fitted.log_likelihood.shape == (25,)
    assert not fitted.converged
    assert fitted.log_likelihood.diff().min() > -1e-10
    assert fitted.log_prob(digits).mean() > fitted.log_likelihood[-1] - 1e-10


def test_the_fit_is_a_maximum(wine):
    fitted = fit(wine[:, :6], 1, 2, tol=0.0, max_iter=1500, regularisation=0.0)
    parameters = (fitted.weights.log(), fitted.means, fitted.W, fitted.psi.log())
    log_weights, means, W, log_psi = (t.clone().requires_grad_() for t in parameters)
    components = LowRankMultivariateNormal(means, W, log_psi.exp().expand_as(means))
    p = MixtureSameFamily(Categorical(logits=log_weights), components)
    p.log_prob(wine[:, :6]).mean().backward()
    for gradient in (log_weights.grad, means.grad, W.grad, log_psi.grad):
        assert gradient.abs().max() < 1e-5


def test_one_component_is_scikit_learns_factor_analysis(wine):
    fitted = fit(wine, 3, 1, tol=0.0, max_iter=1500, regularisation=0.0)
    peer = decomposition.FactorAnalysis(3, svd_method="lapack", tol=1e-10, max_iter=5000)
    expected = torch.from_numpy(peer.fit(wine.numpy()).score_samples(wine.numpy()))
    torch.testing.assert_close(fitted.log_prob(wine), expected, rtol=0, atol=1e-3)
    assert (fitted.log_prob(wine).mean() - expected.mean()).abs() < 1e-6


def test_a_known_mixture_is_found_again():
    truth = drawn(D=6)
    train, test = truth.sample(20_000).split(10_000)
    fitted = fit(train, tol=1e-7, max_iter=1000)
    assert fitted.log_prob(train).mean() > truth.log_prob(train).mean()
    lost = truth.log_prob(test) - fitted.log_prob(test)
    # Half a nat a parameter by theory (Wilks), 62 parameters, over 10,000 data
    assert lost.mean() < 62 / 2 / 10_000 + 4.5 * lost.std() / 100
    order = [int((fitted.means - mean).norm(dim=1).argmin()) for mean in truth.means]
    assert sorted(order) == [0, 1, 2]
    close = {"rtol": 0, "atol": 0.3}
    torch.testing.assert_close(covariances(fitted)[order], covariances(truth), **close)


def test_the_declared_model_has_the_same_log_p_and_gradients(wine, fitted):
    model = fitted.to_model()
    result = pvae.evaluate(model, wine, device="cpu")
    assert result.is_exact
    expected = fitted.log_prob(wine)
    np.testing.assert_allclose(result.per_datum["exact"], expected, rtol=0, atol=1e-8)
    model.draw(wine).log_weights.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_empty_component_keeps_its_mean_and_has_no_weight(wine, fitted):
    means = torch.cat([fitted.means[:2], torch.full((1, 13), 1e4).double()])
    kept = fit(wine, start=replace(fitted, means=means), max_iter=3)
    assert kept.weights[2] == 0
    torch.testing.assert_close(kept.means[2], means[2])
    assert torch.equal(kept.W[2], fitted.W[2])
    assert kept.log_prob(wine).isfinite().all()
    value = pvae.exact.log_prob(kept.to_model(), wine)
    torch.testing.assert_close(value, kept.log_prob(wine))


def test_a_cluster_of_one_datum_has_factors_too(wine):
    x = torch.cat([wine, wine[:1] + 1000])
    fitted = fit(x, max_iter=1)
    assert fitted.W.isfinite().all()
    assert fitted.log_prob(x).isfinite().all()


def test_samples_have_the_mixtures_moments():
    truth, num = drawn(), 50_000
    draws, p = truth.sample(num), as_distribution(truth)
    z_score = (draws.mean(dim=0) - p.mean) / (p.variance / num).sqrt()
    assert z_score.abs().max() < 4.5
    # E log p(x) is minus the entropy, whoever draws: this sees the correlations too.
    ours, theirs = p.log_prob(draws), p.log_prob(p.sample((num,)))
    standard_error = ((ours.var() + theirs.var()) / num).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 4.5 * standard_error


def test_block_size_does_not_matter(wine, fitted, monkeypatch):
    expected = fitted.log_prob(wine)
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", (13 + 13 + 9 + 13) * 7)
    by_blocks = fit(wine, tol=0.0, max_iter=20)
    torch.testing.assert_close(by_blocks.log_likelihood, fitted.log_likelihood, rtol=0, atol=1e-8)
    torch.testing.assert_close(by_blocks.log_prob(wine), expected, rtol=0, atol=1e-6)


def test_a_start_goes_on_where_it_was_left(wine, fitted):
    part = fit(wine, start=fit(wine, max_iter=12, tol=0.0), max_iter=8, tol=0.0)
    torch.testing.assert_close(part.log_likelihood, fitted.log_likelihood[12:], rtol=0, atol=1e-9)


def test_seeds_reproduce_and_the_callers_random_state_is_untouched(digits):
    before = torch.get_rng_state()
    first, again, other = (fit(digits, max_iter=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.W, again.W)
    assert not torch.equal(first.means, other.means)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_starts_are_never_worse(digits):
    one, five = (fit(digits, num_starts=n, max_iter=5, seed=3) for n in (1, 5))
    assert five.log_likelihood[-1] > one.log_likelihood[-1]


def test_takes_data_and_images_in_their_own_type():
    data = load_data("digits", dequantisation="uniform").train
    values = data.realised().values.reshape(-1, 8, 8)
    from_data = fit(data, max_iter=3)
    assert torch.equal(from_data.W, fit(values.numpy(), max_iter=3).W)
    log_p = from_data.log_prob(data)
    assert {t.dtype for t in (from_data.W, from_data.psi, log_p)} == {torch.float32}
    double = fit(values.double(), max_iter=3).log_prob(values.double())
    torch.testing.assert_close(log_p.double(), double, rtol=0, atol=1e-3)


few = torch.arange(40.0).sin().reshape(10, 4)
started = fit(few, max_iter=1)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (few, {"num_components": 11}, r"of 11 factor analysers needs 11 data or more, got 10"),
        (few, {"num_components": 0}, r"`num_components` must be at least 1, got 0"),
        (few, {"latent_size": 4}, r"at least 1 and less than the 4 elements .* got 4"),
        (few, {"max_iter": 0}, r"`max_iter` must be at least 1, got 0"),
        (few, {"regularisation": -1.0}, r"`regularisation` must be a variance, .* got -1.0"),
        (few, {"start": started, "num_starts": 2}, r"begin from one place only"),
        (few, {"start": started, "latent_size": 1}, r"\(C, D, Q\) = \(3, 4, 1\), got \(3, 4, 2\)"),
        (few * torch.tensor([1, 1, 1, 0]), {"regularisation": 0.0}, r"not above 0.*`regularisat"),
        (few / 0, {}, r"has NaN or infinite values in 10 of 10 rows"),
    ],
)
def test_bad_input_is_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        fit(x, **options)


def test_data_that_do_not_fit_the_mixture_are_refused():
    for method in (started.log_prob, started.responsibilities, started.posterior):
        with pytest.raises(ValueError, match=r"must have 4 elements, .* got 3"):
            method(torch.ones(4, 3))


def test_analysers_that_share_their_factors_are_exact_with_the_factors_declared():
    """Too many for quadrature. `LinearMixture` is the same story, integrated by hand."""
    truth = LinearMixture.drawn(data_size=6, latent_size=5)
    x, model = truth.sample(40), truth.declared()
    assert pvae.exact.method(model) == "linear-Gaussian"
    value = pvae.exact.log_prob(model, x)
    torch.testing.assert_close(value, truth.log_prob(x), rtol=0, atol=1e-10)
    assert pvae.evaluate(model, x, num_particles=20, device="cpu").is_exact
    with pytest.raises(pvae.exact.Intractable, match="linear-Gaussian models only"):
        pvae.exact.posterior(model, x)
