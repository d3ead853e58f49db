"""Probabilistic PCA against scikit-learn's and against the Gaussian it stands for."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import MultivariateNormal

from pvae.baselines import ProbabilisticPCA, fit_ppca
from pvae.data import load_data

LATENT_SIZE = 5


@pytest.fixture(scope="module")
def digits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    grey = torch.from_numpy(load_digits().data)
    noise = torch.rand(grey.shape, generator=generator, dtype=grey.dtype)
    return (grey + noise)[:800] / 17


@pytest.fixture(scope="module")
def fitted(digits) -> ProbabilisticPCA:
    return fit_ppca(digits, LATENT_SIZE)


def marginal(fitted: ProbabilisticPCA) -> MultivariateNormal:
    noise = fitted.sigma2 * torch.eye(len(fitted.mu), dtype=fitted.W.dtype)
    return MultivariateNormal(fitted.mu, fitted.W @ fitted.W.T + noise)


def test_log_prob_is_that_of_scikit_learn(digits, fitted):
    pca = PCA(LATENT_SIZE, svd_solver="full").fit(digits.numpy())
    to_maximum_likelihood = (len(digits) - 1) / len(digits)  # scikit-learn divides by N - 1
    pca.explained_variance_ *= to_maximum_likelihood
    pca.noise_variance_ *= to_maximum_likelihood
    expected = torch.from_numpy(pca.score_samples(digits.numpy()))
    torch.testing.assert_close(fitted.log_prob(digits), expected, rtol=0, atol=1e-9)
    assert fitted.sigma2.item() == pytest.approx(pca.noise_variance_)


def test_log_prob_is_that_of_the_marginal_gaussian(digits, fitted):
    expected = marginal(fitted).log_prob(digits)
    torch.testing.assert_close(fitted.log_prob(digits), expected, rtol=0, atol=1e-9)


def test_the_fit_is_a_maximum(digits, fitted):
    parameters = [fitted.W, fitted.mu, fitted.sigma2]
    W, mu, sigma2 = (p.clone().requires_grad_() for p in parameters)
    p = MultivariateNormal(mu, W @ W.T + sigma2 * torch.eye(64, dtype=W.dtype))
    p.log_prob(digits).mean().backward()
    for gradient in (W.grad, mu.grad, sigma2.grad):
        assert gradient.abs().max() < 1e-8


def test_posterior_obeys_bayes_rule(digits, fitted):
    mean, covariance = fitted.posterior(digits)
    assert mean.shape == (len(digits), LATENT_SIZE)
    assert covariance.shape == (LATENT_SIZE, LATENT_SIZE)
    z = torch.randn(LATENT_SIZE, dtype=torch.float64)
    zeros, ones = torch.zeros_like(fitted.mu), torch.ones_like(fitted.mu)
    prior = MultivariateNormal(zeros[:LATENT_SIZE], ones[:LATENT_SIZE].diag()).log_prob(z)
    noise = (fitted.sigma2 * ones).diag()
    likelihood = MultivariateNormal(fitted.W @ z + fitted.mu, noise).log_prob(digits)
    posterior = MultivariateNormal(mean, covariance).log_prob(z)
    torch.testing.assert_close(prior + likelihood - posterior, fitted.log_prob(digits))


def test_samples_have_the_moments_of_the_marginal(fitted):
    torch.manual_seed(0)
    draws, p = fitted.sample(20_000), marginal(fitted)
    assert draws.shape == (20_000, 64)
    z_score = (draws.mean(dim=0) - p.mean) / (p.variance / len(draws)).sqrt()
    assert z_score.abs().max() < 4.5
    log_p = p.log_prob(draws)  # its mean is minus the entropy
    z_score = (log_p.mean() + p.entropy()) / (log_p.std() / len(draws) ** 0.5)
    assert z_score.abs() < 4.5


def test_float32_is_close_to_float64(digits, fitted):
    single = fit_ppca(digits.float(), LATENT_SIZE)
    log_p = single.log_prob(digits.float())
    assert {t.dtype for t in (single.W, single.mu, single.sigma2, log_p)} == {torch.float32}
    torch.testing.assert_close(log_p.double(), fitted.log_prob(digits), rtol=0, atol=1e-3)


def test_takes_data_and_images():
    data = load_data("digits", dequantisation="uniform").train
    values = data.realised().values.reshape(-1, 8, 8)
    from_data, from_images = fit_ppca(data, 3), fit_ppca(values.numpy(), 3)
    assert torch.equal(from_data.W, from_images.W)
    assert torch.equal(from_data.log_prob(data), from_images.log_prob(values))


@pytest.mark.parametrize("latent_size", [0, 4, 5])
def test_latent_size_must_leave_room_for_noise(latent_size):
    with pytest.raises(ValueError, match=rf"less than the 4 elements .* got {latent_size}"):
        fit_ppca(torch.randn(10, 4), latent_size)


def test_one_datum_has_no_variance():
    with pytest.raises(ValueError, match="PPCA needs at least 2 data, got 1"):
        fit_ppca(torch.randn(1, 4), 2)


@pytest.mark.parametrize(
    "x", [torch.ones(10, 4), torch.randn(3, 4), torch.randn(10, 2).repeat(1, 2)]
)
def test_data_without_noise_have_no_maximum(x):
    with pytest.raises(ValueError, match=r"vary in more than `latent_size` = 2 dimensions"):
        fit_ppca(x, 2)


def test_data_must_be_finite_and_fit(fitted):
    with pytest.raises(ValueError, match="has NaN or infinite values in 2 of 2 rows"):
        fit_ppca(torch.full((2, 4), torch.inf), 2)
    for method in (fitted.log_prob, fitted.posterior):
        with pytest.raises(ValueError, match=r"must have 64 elements, .* got 63"):
            method(torch.ones(2, 63))
