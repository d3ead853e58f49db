"""Exact values of log p(x) against closed forms, brute-force sums and scipy's integrals."""

import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from pvae import Given, Latent, LatentModel, Learned, Observed, Predicted, PyroPair, exact
from pvae.nets import MLP, Linear, Table
from tests.exact import (
    GaussianMixture,
    LinearGaussian,
    LinearMixture,
    Ring,
    Square,
    TwoCategoricals,
    TwoLayers,
)
from tests.exact.parameters import normal, with_parameters

exactly = partial(assert_close, rtol=0, atol=1e-10)


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


# ------------------------------------------------------------------------------ which method

METHODS = {
    "enumeration": [GaussianMixture.drawn().declared(), TwoCategoricals.drawn().declared()],
    "linear-Gaussian": [
        LinearGaussian.drawn().declared(),
        TwoLayers.drawn().declared(),
        LinearMixture.drawn().declared(),
    ],
    "quadrature": [Ring().declared(), Square().declared()],
}


@pytest.mark.parametrize("how", METHODS)
def test_the_method_is_the_first_that_applies(how):
    for model in METHODS[how]:
        assert exact.method(model) == how


def net_model(latent_size: int = 3, **x) -> LatentModel:
    x = {"given": "z", "net": Linear(), "scale": 0.5} | x
    return LatentModel(z=Latent(dist.Normal, latent_size), x=Observed(dist.Normal, 4, **x))


NO_METHOD = {
    "a net that is not linear": net_model(net=MLP(5)),
    "a scale that depends on z": LatentModel(
        z=Latent(dist.Normal, 3), x=Observed(dist.Normal, 4, given="z", net=Linear())
    ),
    "a scale by a net of its own": net_model(scale=Predicted(Linear())),
    "another likelihood": LatentModel(
        z=Latent(dist.Normal, 3), x=Observed(dist.Bernoulli, 4, given="z", net=Linear())
    ),
    "a support that is not the real line": LatentModel(
        z=Latent(dist.Beta, 1), x=Observed(dist.Normal, 4, given="z", net=MLP(3), scale=0.5)
    ),
    "too many dimensions": LatentModel(
        y=Latent(dist.Normal, 2),
        z=Latent(dist.Normal, 1, given="y", net=MLP(3)),
        x=Observed(dist.Normal, 4, given="z", net=Linear(), scale=0.5),
    ),
    "discrete variables that are many": LatentModel(
        z=Latent(dist.Bernoulli, 3),
        x=Observed(dist.Normal, 4, given="z", net=Linear(), scale=0.5),
        guide={"z": Latent(dist.Bernoulli, 3, given="x", net=MLP(3))},
    ),
    "a hand-written pair": LinearGaussian.drawn(4).pair(),
}


@pytest.mark.parametrize("case", NO_METHOD)
def test_intractable_models_are_refused(case):
    model, x = NO_METHOD[case], torch.zeros(2, 4)
    assert exact.method(model) is None
    message = rf"log p\(x\) of '{model.name}' is not tractable: .* Use pvae.evaluate for bounds"
    with pytest.raises(exact.Intractable, match=message):
        exact.log_prob(model, x)
    assert issubclass(exact.Intractable, ValueError)


def test_the_posterior_of_other_models_is_refused():
    message = r"p\(z \| x\) of 'model' is known in closed form for linear-Gaussian models only"
    for truth in (Ring(), GaussianMixture.drawn()):
        with pytest.raises(exact.Intractable, match=message):
            exact.posterior(truth.declared(), truth.sample(2))


def test_quadrature_of_other_models_is_refused():
    for model in (net_model(3), net_model(3, net=MLP(3)), GaussianMixture.drawn(4).declared()):
        with pytest.raises(exact.Intractable, match="at most two real latent dimensions"):
            exact.quadrature(model, torch.zeros(2, 4))


def test_data_that_do_not_fit_are_refused():
    model = LinearGaussian.drawn().declared()
    with pytest.raises(ValueError, match=r"must have shape \(N, 5\), got \(2, 4\)"):
        exact.log_prob(model, torch.zeros(2, 4))


def test_exact_values_leave_no_trace():
    for truth in (LinearGaussian.drawn(), GaussianMixture.drawn(), Square()):
        model = truth.declared().train()
        before = torch.get_rng_state()
        value = exact.log_prob(model, truth.sample(3))
        assert not value.requires_grad
        assert all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), before)


def test_an_exact_value_is_of_its_own_datum():
    for truth in (LinearGaussian.drawn(), GaussianMixture.drawn(), TwoLayers.drawn(), Square()):
        x, order, model = truth.sample(8), torch.randperm(8), truth.declared()
        whole = exact.log_prob(model, x)
        exactly(exact.log_prob(model, x[order]), whole[order])
        exactly(torch.cat([exact.log_prob(model, x[[n]]) for n in range(8)]), whole)


# ------------------------------------------------------------------------------ enumeration


@pytest.mark.parametrize(
    "truth",
    [
        GaussianMixture.drawn(),
        GaussianMixture.drawn(1, 7),
        TwoCategoricals.drawn(),
        TwoCategoricals.drawn((5, 2, 3)),
    ],
)
def test_enumeration_is_the_sum_written_out(truth):
    x = truth.sample(64)
    exactly(exact.log_prob(truth.declared(), x), truth.log_prob(x))


def test_enumeration_is_scipys_mixture():
    truth = GaussianMixture.drawn()
    x = truth.sample(20)
    density = sum(
        float(p) * multivariate_normal(m.numpy(), s.square().diag().numpy()).pdf(x.numpy())
        for p, m, s in zip(truth.probs, truth.loc, truth.scale, strict=True)
    )
    exactly(exact.log_prob(truth.declared(), x), torch.from_numpy(density).log())


def test_probabilities_of_a_discrete_x_sum_to_one():
    model = TwoCategoricals.drawn((3, 4, 6)).declared()
    total = exact.log_prob(model, torch.arange(6)).logsumexp(0)
    exactly(total, torch.zeros_like(total))


def test_enumeration_far_from_every_component_does_not_underflow():
    truth = GaussianMixture.drawn()
    x = truth.sample(4) + 1e3
    value = exact.log_prob(truth.declared(), x)
    assert (value < -1e4).all()
    assert_close(value, truth.log_prob(x), rtol=1e-12, atol=0)


def test_enumeration_in_blocks_is_enumeration(monkeypatch):
    truth = GaussianMixture.drawn()
    x = truth.sample(50)
    monkeypatch.setattr(exact, "MAX_ROWS", 21)
    exactly(exact.log_prob(truth.declared(), x), truth.log_prob(x))


# ------------------------------------------------------------------------------ linear-Gaussian


@pytest.mark.parametrize(
    "truth",
    [
        LinearGaussian.drawn(),
        LinearGaussian.drawn(2, 6),
        TwoLayers.drawn(),
        TwoLayers.drawn(6, (2, 4)),
    ],
)
def test_linear_gaussian_models_are_gaussian(truth):
    x = truth.sample(64)
    exactly(exact.log_prob(truth.declared(), x), truth.log_prob(x))


def test_float32_models_lose_only_their_parameters_digits():
    truth = LinearGaussian.drawn()
    x = truth.sample(20)
    value = exact.log_prob(truth.declared().float(), x.float())
    assert value.dtype == torch.float32
    assert_close(value.double(), truth.log_prob(x), rtol=0, atol=1e-4)


def test_the_posterior_obeys_bayes_rule():
    """Mean and covariance by the precision, and log p(x) = log p(x, z) - log p(z | x) at any z."""
    truth = LinearGaussian.drawn()
    x = truth.sample(16)
    posterior = exact.posterior(truth.declared(), x)["z"]
    mean, S = truth.posterior(x)
    exactly(posterior.mean, mean)
    exactly(posterior.covariance_matrix, S.expand(16, 3, 3))
    z = normal(16, 3, seed=1)
    likelihood = dist.Normal(z @ truth.W.T + truth.b, truth.sigma).log_prob(x).sum(1)
    joint = likelihood + dist.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(1)
    exactly(joint - posterior.log_prob(z), truth.log_prob(x))


def test_the_posterior_of_two_layers_is_each_layers_own():
    truth = TwoLayers.drawn()
    x = truth.sample(16)
    posterior = exact.posterior(truth.declared(), x)
    for name, (mean, S) in {"z1": truth.posterior_z1(x), "z2": truth.posterior_z2(x)}.items():
        exactly(posterior[name].mean, mean)
        exactly(posterior[name].covariance_matrix, S.expand(16, *S.shape))


def test_labels_that_are_given_shift_the_mean():
    """z ~ N(m_label, 1/4 I), x | z, label ~ N(W z + V_label + b, 1/4 I)."""
    W, V, b, m = (normal(*shape, seed=i) for i, shape in enumerate([(4, 2), (4, 3), (4,), (3, 2)]))
    model = LatentModel(
        label=Given(categories=3),
        z=Latent(dist.Normal, 2, given="label", net=Linear(), scale=0.5),
        x=Observed(dist.Normal, 4, given=("z", "label"), net=Linear(), scale=0.5),
    )
    zero = torch.zeros(2, dtype=torch.float64)
    model = with_parameters(model, z=(m.T, zero), x=(torch.cat([W, V], 1), b))
    x, label = normal(30, 4, seed=9), torch.arange(30) % 3
    assert exact.method(model) == "linear-Gaussian"
    truth = MultivariateNormal(m[label] @ W.T + V.T[label] + b, (W @ W.T + identity(4)) / 4)
    exactly(exact.log_prob(model, {"x": x, "label": label}), truth.log_prob(x))
    S = torch.linalg.inv(4 * identity(2) + 4 * W.T @ W)
    mean = (4 * m[label] + 4 * (x - V.T[label] - b) @ W) @ S
    exactly(exact.posterior(model, {"x": x, "label": label})["z"].mean, mean)


def test_images_are_vectors_of_another_shape():
    truth = LinearGaussian.drawn(6, 4)
    model = LatentModel(
        z=Latent(dist.Normal, (2, 2)),
        x=Observed(dist.Normal, (1, 2, 3), given="z", net=Linear(), scale=truth.sigma),
    )
    model = with_parameters(model, x=(truth.W, truth.b))
    x = truth.sample(10)
    images = x.reshape(10, 1, 2, 3)
    exactly(exact.log_prob(model, images), truth.log_prob(x))
    exactly(exact.posterior(model, images)["z"].mean, truth.posterior(x)[0])


def test_scales_of_each_dimension_and_full_covariances():
    """z ~ N(m, L L'), x | z ~ N(W z + b, diag s^2), L and s free parameters."""
    W, b, m = normal(3, 2, seed=1), normal(3, seed=2), normal(2, seed=3)
    L = torch.tensor([[0.5, 0.0], [0.75, 1.25]], dtype=torch.float64)
    s = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    model = LatentModel(
        z=Latent(
            dist.MultivariateNormal, 2, loc=Learned(m.tolist()), scale_tril=Learned(L.tolist())
        ),
        x=Observed(dist.Normal, 3, given="z", net=Linear(), scale=Learned([0.5, 1.0, 2.0])),
    ).double()
    for parameter, value in zip(model.module_of("x").nets.parameters(), (W, b), strict=True):
        parameter.data.copy_(value)
    model.module_of("z").learned["loc"].data.copy_(m)
    x = normal(20, 3, seed=4)
    assert exact.method(model) == "linear-Gaussian"
    truth = MultivariateNormal(W @ m + b, W @ L @ L.T @ W.T + s.square().diag())
    assert_close(exact.log_prob(model, x), truth.log_prob(x), rtol=0, atol=1e-5)
    P = torch.linalg.inv(L @ L.T)
    S = torch.linalg.inv(P + W.T @ (1 / s.square()).diag() @ W)
    mean = (P @ m + (x - b) / s.square() @ W) @ S
    assert_close(exact.posterior(model, x)["z"].mean, mean, rtol=0, atol=1e-5)


def test_several_observed_sites_are_one_gaussian():
    """y | z and x | z, y: data that are parents of data."""
    A, B, C = normal(2, 2, seed=1), normal(3, 2, seed=2), normal(3, 2, seed=3)
    model = LatentModel(
        z=Latent(dist.Normal, 2),
        y=Observed(dist.Normal, 2, given="z", net=Linear(), scale=0.5),
        x=Observed(dist.Normal, 3, given=("z", "y"), net=Linear(), scale=0.25),
    )
    zeros = partial(torch.zeros, dtype=torch.float64)
    model = with_parameters(model, y=(A, zeros(2)), x=(torch.cat([B, C], 1), zeros(3)))
    factor = torch.cat(  # (y, x) by the noises of z, y and x
        [
            torch.cat([A, 0.5 * identity(2), zeros(2, 3)], 1),
            torch.cat([B + C @ A, 0.5 * C, 0.25 * identity(3)], 1),
        ]
    )
    data = normal(20, 5, seed=4)
    truth = MultivariateNormal(zeros(5), factor @ factor.T).log_prob(data)
    exactly(exact.log_prob(model, {"y": data[:, :2], "x": data[:, 2:]}), truth)


# ------------------------------------------------------------------------------ quadrature


@pytest.mark.parametrize("sizes", [(3, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("sigma", [0.5, 0.0625])
def test_quadrature_is_the_closed_form(sizes, sigma):
    truth = LinearGaussian.drawn(*sizes, sigma)
    x = truth.sample(16)
    exactly(exact.quadrature(truth.declared(), x), truth.log_prob(x))


def test_quadrature_of_two_latent_sites_is_the_closed_form():
    truth = TwoLayers.drawn(3, (1, 1))
    x = truth.sample(16)
    exactly(exact.quadrature(truth.declared(), x), truth.log_prob(x))


@pytest.mark.parametrize("latent_size", [1, 2])
def test_quadrature_sums_discrete_latents_out(latent_size):
    truth = LinearMixture.drawn(2, latent_size)
    x = truth.sample(16)
    exactly(exact.log_prob(truth.declared(), x), truth.log_prob(x))


@pytest.mark.parametrize("sigma", [0.5, 0.125, 2**-6])
def test_quadrature_finds_both_modes(sigma):
    truth = Square(sigma)
    x = truth.sample(64)
    exactly(exact.log_prob(truth.declared(), x), truth.log_prob(x))


@pytest.mark.parametrize("sigma", [0.5, 0.125])
def test_quadrature_of_the_ring_is_scipys(sigma):
    """The map jumps at the origin, so the rule converges slowly, and to a part of a thousandth."""
    truth = Ring(sigma)
    x = truth.sample(6)
    found, expected = exact.log_prob(truth.declared(), x), truth.log_prob(x)
    assert_close(found, expected, rtol=0, atol=1e-3)


def test_quadrature_of_a_bernoulli_is_scipys():
    """p(x) = int N(z; 0, 1) prod_d sigmoid(+-(w_d z + b_d)) dz."""
    w, b = normal(4, 1, seed=1) * 2, normal(4, seed=2)
    model = LatentModel(
        z=Latent(dist.Normal, 1), x=Observed(dist.Bernoulli, 4, given="z", net=Linear())
    )
    model = with_parameters(model, x=(w, b))
    x = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.float64)

    def density(row):
        def integrand(z):
            logits = (w[:, 0] * z + b) * (2 * row - 1)
            return norm.pdf(z) * float(logits.sigmoid().prod())

        return quad(integrand, -12, 12, epsabs=1e-13)[0]

    expected = torch.tensor([math.log(density(row)) for row in x], dtype=torch.float64)
    exactly(exact.log_prob(model, x), expected)


def test_quadrature_with_labels_that_are_given():
    """z ~ N(m_label, 1), far apart for the two labels, and x | z ~ N(z^2, 1/4)."""

    class SquareMap(nn.Module):
        def forward(self, z):
            return z.square()

    model = LatentModel(
        label=Given(categories=2),
        z=Latent(dist.Normal, 1, given="label", net=Table(), scale=1.0),
        x=Observed(dist.Normal, 1, given="z", net=SquareMap(), scale=0.5),
    )
    means = (-4.0, 1.0)
    model = with_parameters(model, z=(torch.tensor(means, dtype=torch.float64),))
    x, label = torch.tensor([[9.0], [9.0], [0.5], [0.5]]).double(), torch.tensor([0, 1, 0, 1])

    def density(x, m):
        def integrand(z):
            return norm.pdf(z, m) * norm.pdf(x, z * z, 0.5)

        return quad(integrand, -15, 15, points=[-math.sqrt(x), math.sqrt(x)], epsrel=1e-12)[0]

    pairs = zip(x.flatten().tolist(), label.tolist(), strict=True)
    expected = torch.tensor([math.log(density(value, means[i])) for value, i in pairs])
    found = exact.log_prob(model, {"x": x, "label": label})
    assert_close(found, expected.double(), rtol=0, atol=1e-6)


def test_quadrature_holds_few_rows_at_once(monkeypatch):
    """Two dimensions are 129^2 points a datum, and no pass may hold those of all data."""
    shapes = []

    class Recording(nn.Module):
        def forward(self, z):
            shapes.append(z.shape)
            return z.sin()

    model = LatentModel(
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Normal, 2, given="z", net=Recording(), scale=0.5),
    ).double()
    x = normal(8, 2, seed=1)
    whole = exact.log_prob(model, x)
    assert max(points * data for points, data, _ in shapes[1:]) <= exact.MAX_ROWS
    shapes.clear()
    monkeypatch.setattr(exact, "MAX_ROWS", 5000)
    exactly(exact.log_prob(model, x), whole)
    assert max(points * data for points, data, _ in shapes[1:]) <= 5000
    assert max(data for _, data, _ in shapes[1:]) == 1, "whose grid alone is larger"


def test_quadrature_that_has_not_converged_says_so(monkeypatch):
    truth = LinearGaussian.drawn(1, 2, 2**-8)  # a ridge: narrow in one direction, wide in the other
    monkeypatch.setattr(exact, "MOST_POINTS", {1: 2049, 2: 257})
    with pytest.raises(exact.Intractable, match="has not converged with 257 points in each latent"):
        exact.quadrature(truth.declared(), truth.sample(4))


def test_a_ridge_is_integrated_on_a_finer_grid():
    truth = LinearGaussian.drawn(1, 2, 2**-6)
    x = truth.sample(4)
    exactly(exact.quadrature(truth.declared(), x), truth.log_prob(x))


def test_a_wrapped_pair_has_no_exact_value():
    truth = Square()
    pair = PyroPair(truth.declared().model, truth.declared().guide)
    assert exact.method(pair) is None
