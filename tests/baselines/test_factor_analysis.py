"""Factor analysis against scikit-learn's and against the Gaussian it stands for."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn import decomposition
from sklearn.datasets import load_digits, load_wine
from torch import Tensor
from torch.distributions import MultivariateNormal

import pvae
from pvae.baselines import FactorAnalysis, fit_factor_analysis, fit_ppca
from pvae.data import load_data

LATENT_SIZE = 3


@pytest.fixture(scope="module")
def wine() -> Tensor:
    return torch.from_numpy(load_wine().data)  # (178, 13), standard deviations from 0.1 to 315


@pytest.fixture(scope="module")
def fitted(wine) -> FactorAnalysis:
    return fit_factor_analysis(wine, LATENT_SIZE, tol=1e-12, max_iter=5000)


def marginal(fitted: FactorAnalysis) -> MultivariateNormal:
    return MultivariateNormal(fitted.mu, fitted.W @ fitted.W.T + fitted.psi.diag())


def test_log_prob_is_scipys(wine, fitted):
    covariance = (fitted.W @ fitted.W.T + fitted.psi.diag()).numpy()
    expected = multivariate_normal(fitted.mu.numpy(), covariance).logpdf(wine.numpy())
    torch.testing.assert_close(fitted.log_prob(wine), torch.from_numpy(expected), rtol=0, atol=1e-9)


def test_the_data_give_scikit_learn_the_same_fit_as_their_covariance(wine, fitted):
    peer = decomposition.FactorAnalysis(
        LATENT_SIZE,
        svd_method="lapack",
        tol=1e-12 * len(wine),
        max_iter=5000,
        noise_variance_init=wine.var(dim=0).numpy(),
    ).fit(wine.numpy())
    expected = torch.from_numpy(peer.score_samples(wine.numpy()))
    torch.testing.assert_close(fitted.log_prob(wine), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        fitted.psi, torch.from_numpy(peer.noise_variance_), rtol=1e-5, atol=0
    )


def test_the_fit_is_a_maximum(wine, fitted):
    W, mu, log_psi = (t.clone().requires_grad_() for t in (fitted.W, fitted.mu, fitted.psi.log()))
    scale = wine.std(dim=0)  # gradients in units of the data
    MultivariateNormal(mu, W @ W.T + log_psi.exp().diag()).log_prob(wine).mean().backward()
    for gradient in (W.grad * scale[:, None], mu.grad * scale, log_psi.grad):
        assert gradient.abs().max() < 1e-5


def test_the_log_likelihood_never_falls_and_ends_at_that_of_the_fit(wine, fitted):
    assert fitted.converged
    assert fitted.log_likelihood.diff().min() > -1e-10
    last = fitted.log_prob(wine).mean()
    torch.testing.assert_close(fitted.log_likelihood[-1], last, rtol=0, atol=1e-8)


def test_a_fit_cut_short_says_so(wine):
    short = fit_factor_analysis(wine, LATENT_SIZE, max_iter=2)
    assert not short.converged
    assert len(short.log_likelihood) == 2


def test_other_units_give_the_same_factors_and_in_ppca_other_ones(wine, fitted):
    unit = torch.logspace(-2, 2, 13, dtype=torch.float64)
    rescaled = fit_factor_analysis(wine * unit, LATENT_SIZE, tol=1e-12, max_iter=5000)
    shift = unit.log().sum()
    expected = fitted.log_prob(wine) - shift
    torch.testing.assert_close(rescaled.log_prob(wine * unit), expected, rtol=0, atol=1e-5)
    codes, same = fitted.posterior(wine)[0], rescaled.posterior(wine * unit)[0]
    torch.testing.assert_close(same.abs(), codes.abs(), rtol=0, atol=1e-4)  # the sign is free
    ppca = [fit_ppca(x, LATENT_SIZE).log_prob(x).mean() for x in (wine, wine * unit)]
    assert (ppca[0] - shift - ppca[1]).abs() > 1


def test_posterior_obeys_bayes_rule(wine, fitted):
    mean, covariance = fitted.posterior(wine)
    assert mean.shape == (len(wine), LATENT_SIZE)
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-9
    z = torch.randn(LATENT_SIZE, dtype=torch.float64)
    prior = MultivariateNormal(torch.zeros_like(z), torch.eye(LATENT_SIZE).double()).log_prob(z)
    likelihood = MultivariateNormal(fitted.W @ z + fitted.mu, fitted.psi.diag()).log_prob(wine)
    posterior = MultivariateNormal(mean, covariance).log_prob(z)
    torch.testing.assert_close(prior + likelihood - posterior, fitted.log_prob(wine))


def test_the_declared_model_has_the_same_log_p_and_every_weight_is_it(wine, fitted):
    model = fitted.to_model()
    expected = fitted.log_prob(wine)
    torch.testing.assert_close(pvae.exact.log_prob(model, wine), expected, rtol=0, atol=1e-8)
    weights = pvae.log_weights(model, wine, num_particles=3)
    torch.testing.assert_close(weights, expected.expand(3, -1), rtol=0, atol=1e-7)
    result = pvae.evaluate(model, wine, num_particles=20, device="cpu")
    assert result.is_exact
    np.testing.assert_allclose(result.per_datum["exact"], expected, rtol=0, atol=1e-8)


def test_samples_have_the_moments_of_the_marginal(fitted):
    draws, p = fitted.sample(20_000), marginal(fitted)
    assert draws.shape == (20_000, 13)
    z_score = (draws.mean(dim=0) - p.mean) / (p.variance / len(draws)).sqrt()
    assert z_score.abs().max() < 4.5
    log_p = p.log_prob(draws)  # its mean is minus the entropy
    assert (log_p.mean() + p.entropy()).abs() < 4.5 * log_p.std() / len(draws) ** 0.5


def test_an_element_without_noise_of_its_own_keeps_a_finite_density():
    random = torch.randn(500, 3).double()
    z, a, b = torch.linalg.qr(random - random.mean(dim=0)).Q.T * 500**0.5  # of covariance I
    x = torch.stack([z, z / 2 + a, z / 2 - a / 5 + b], dim=1)  # s_12 s_13 / s_23 exceeds s_11
    fitted = fit_factor_analysis(x, 1, tol=1e-12)
    assert fitted.psi[0] < 0.01  # zero in the limit: a Heywood case
    expected = marginal(fitted).log_prob(x)
    torch.testing.assert_close(fitted.log_prob(x), expected, rtol=0, atol=1e-9)


def test_takes_data_and_images_in_their_own_type():
    data = load_data("digits", dequantisation="uniform").train
    images = data.realised().values.reshape(-1, 8, 8)
    from_data, from_images = fit_factor_analysis(data, 4), fit_factor_analysis(images.numpy(), 4)
    assert torch.equal(from_data.W, from_images.W)
    log_p = from_data.log_prob(data)
    assert {t.dtype for t in (from_data.W, from_data.mu, from_data.psi, log_p)} == {torch.float32}
    double = fit_factor_analysis(images.double(), 4)
    torch.testing.assert_close(log_p.double(), double.log_prob(images.double()), rtol=0, atol=1e-3)


grey = torch.from_numpy(load_digits().data)
random = torch.arange(40.0).sin().reshape(10, 4)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (grey, {}, r"Each element must vary, and 3 of 64 do not, the first is element 0: .*dequ"),
        (random[:, [0, 1, 2, 2, 3]], {}, r"no maximum: some elements are, without any noise, func"),
        (random, {"latent_size": 4}, r"at least 1 and less than the 4 elements .* got 4"),
        (random, {"max_iter": 0}, r"`max_iter` must be at least 1, got 0"),
        (random[:1], {}, r"Factor analysis needs at least 2 data, got 1"),
        (random / 0, {}, r"has NaN or infinite values in 10 of 10 rows"),
    ],
)
def test_bad_input_is_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        fit_factor_analysis(x, **({"latent_size": 2} | options))


def test_data_that_do_not_fit_are_refused(fitted):
    for method in (fitted.log_prob, fitted.posterior):
        with pytest.raises(ValueError, match=r"must have 13 elements, .* got 12"):
            method(torch.ones(2, 12))
