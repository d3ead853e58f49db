"""Plates, scales and masks of hand-written Pyro pairs, against linear-Gaussian truth."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.testing import assert_close

from pvae import ELBO, IWAE, PyroPair, log_weights
from pvae.particles import Plates, draw, find_plates
from tests.exact import GaussianMixture, LinearGaussian, TwoCategoricals

exactly = partial(assert_close, rtol=0, atol=1e-10)

TRUTH = LinearGaussian.drawn()
PRIOR = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)


def nothing(x):
    """A guide that draws nothing."""


def pixels_inside(x):
    """The data's plate at dim -2, a plate of pixels inside it."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", PRIOR)
        with pyro.plate("pixels", x.shape[1], dim=-1):
            mean = (z @ TRUTH.W.T + TRUTH.b).squeeze(-2)
            pyro.sample("x", dist.Normal(mean, TRUTH.sigma), obs=x)


def posterior_inside(x):
    mean, S = TRUTH.posterior(x)
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.MultivariateNormal(mean.unsqueeze(1), S))


def pixels_outside(x):
    """The data's plate at dim -1, a plate of pixels at dim -2: x is transposed."""
    pixels = pyro.plate("pixels", x.shape[1], dim=-2)
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", PRIOR)
        mean = (z @ TRUTH.W.T + TRUTH.b).transpose(-1, -2)
        mean = mean.reshape(*mean.shape[:-3], *mean.shape[-2:])
        with pixels:
            pyro.sample("x", dist.Normal(mean, TRUTH.sigma), obs=x.T)


@pytest.mark.parametrize(
    ("model", "guide", "plates"),
    [
        (TRUTH.model, TRUTH.guide, Plates("data", -1, 1)),
        (pixels_inside, posterior_inside, Plates("data", -2, 2)),
        (pixels_outside, TRUTH.guide, Plates("data", -1, 2)),
    ],
    ids=["alone", "inside", "outside"],
)
def test_the_plate_of_the_data_is_found(model, guide, plates):
    x = TRUTH.sample(8)
    assert find_plates(model, guide, (x,), {}) == plates
    assert find_plates(model, guide, (), {"x": x}) == plates
    weights = log_weights(PyroPair(model, guide), x, 3)
    exactly(weights, TRUTH.log_prob(x).expand(3, -1))


def test_of_two_plates_that_hold_everything_the_one_of_the_datas_size_is_taken():
    """x_np ~ N(z_np, 1), z_np ~ N(0, 1) for each pixel: the data are the rows."""

    def model(x):
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = TRUTH.sample(8)
    assert find_plates(model, guide, (x,), {}) == Plates("rows", -2, 2)
    log_p = dist.Normal(x.new_zeros(()), 2**0.5).log_prob(x).sum(1)
    exactly(draw(model, guide, (x,), num_particles=3).log_weights, log_p.expand(3, -1))


def test_a_category_of_the_datum_is_summed_over_all_its_pixels():
    truth = GaussianMixture.drawn(5)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            c = pyro.sample("c", dist.Categorical(truth.probs)).squeeze(-1)
            with pyro.plate("pixels", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(truth.loc[c], truth.scale[c]), obs=x)

    x = truth.sample(8)
    exactly(draw(model, nothing, (x,)).log_weights[0], truth.log_prob(x))


def test_a_category_of_each_pixel_is_refused():
    """A sum for each pixel, multiplied: not one sum for the datum."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", x.shape[1], dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    with pytest.raises(ValueError, match="'c' cannot be summed out in plate 'pixels', inside"):
        draw(model, nothing, (TRUTH.sample(8),))


# ------------------------------------------------------------------------------ scales


def subsampled(size: int, spread: float = 1.0):
    """Model and guide that see a batch out of `size` data, so that Pyro scales by size / batch."""

    def model(x):
        with pyro.plate("data", size, subsample=x):
            z = pyro.sample("z", PRIOR)
            pyro.sample("x", dist.Normal(z @ TRUTH.W.T + TRUTH.b, TRUTH.sigma).to_event(1), obs=x)

    def guide(x):
        mean, S = TRUTH.posterior(x)
        with pyro.plate("data", size, subsample=x):
            pyro.sample("z", dist.MultivariateNormal(mean, spread * S))

    return model, guide


@pytest.mark.parametrize("objective", [ELBO(1), ELBO(4), IWAE(1), IWAE(4)], ids=repr)
def test_a_subsampled_plate_multiplies_the_bound(objective):
    x = TRUTH.sample(8)
    model, guide = subsampled(size=200)
    assert objective.loss(model, guide, x) == pytest.approx(-25 * float(TRUTH.log_prob(x).sum()))


def test_a_scale_is_kept_out_of_the_log_sum_exp_where_pyros_renyi_elbo_puts_it():
    """Inside, log (1/K) sum_k w_k^25 tends to 25 max_k log w_k: far above N/B log p.

    Weights of the broad guide reach p(x) 2^(3/2), so that the trap would be 26 nats a datum.
    """
    x = TRUTH.sample(8)
    model, guide = subsampled(size=200, spread=2.0)
    bounds = torch.tensor([-IWAE(50).loss(model, guide, x) for _ in range(100)])
    log_p = 25 * float(TRUTH.log_prob(x).sum())
    gap = 25 * 8 * TRUTH.weight_variance(2.0) / (2 * 50)
    standard_error = float(bounds.std()) / 10
    assert log_p - 2 * gap < bounds.mean() < log_p + 4.5 * standard_error
    assert standard_error < 1.0


def test_every_log_weight_is_without_its_scale():
    x = TRUTH.sample(8)
    model, guide = subsampled(size=200)
    exactly(log_weights(PyroPair(model, guide), x, 3), TRUTH.log_prob(x).expand(3, -1))


@pytest.mark.parametrize("scale", [3.0, torch.linspace(0.5, 2.0, 8, dtype=torch.float64)])
@pytest.mark.parametrize("objective", [ELBO(4), IWAE(4)], ids=repr)
def test_poutine_scale_multiplies_the_bound_of_each_datum(objective, scale):
    x = TRUTH.sample(8)
    model, guide = (poutine.scale(program, scale=scale) for program in (TRUTH.model, TRUTH.guide))
    loss = objective.loss(model, guide, x)
    assert loss == pytest.approx(-float((scale * TRUTH.log_prob(x)).sum()))


def annealed(beta_p: float, beta_q: float, broad: torch.Tensor):
    """KL annealing: the site z alone is scaled, in the model, in the guide or in both."""

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta_p):
                z = pyro.sample("z", PRIOR)
            pyro.sample("x", dist.Normal(z @ TRUTH.W.T + TRUTH.b, TRUTH.sigma).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=beta_q):
            pyro.sample("z", dist.Normal(x[:, :3] * broad, broad.exp()).to_event(1))

    return model, guide


@pytest.mark.parametrize(("beta_p", "beta_q"), [(0.3, 0.3), (0.3, 1.0), (1.0, 0.3), (0.2, 0.7)])
@pytest.mark.parametrize("num_particles", [1, 5])
def test_elbo_anneals_like_trace_elbo(beta_p, beta_q, num_particles):
    broad = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    x = TRUTH.sample(8)
    model, guide = annealed(beta_p, beta_q, broad)
    found = []
    pyros = Trace_ELBO(num_particles, max_plate_nesting=1, vectorize_particles=True)
    for objective in (ELBO(num_particles), pyros):
        objective.loss(model, guide, x)  # plates are found once, at the cost of draws
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(model, guide, x)
        found.append((loss.detach(), torch.autograd.grad(loss, broad)[0]))
    exactly(found[0], found[1])


@pytest.mark.parametrize(("beta_p", "beta_q"), [(0.3, 0.3), (0.3, 1.0), (1.0, 0.3)])
def test_iwae_refuses_different_scales_at_sites(beta_p, beta_q):
    model, guide = annealed(beta_p, beta_q, torch.tensor(0.2, dtype=torch.float64))
    with pytest.raises(ValueError, match="needs one scale for all sites of a datum, got different"):
        IWAE(5).loss(model, guide, TRUTH.sample(8))


def test_elbo_refuses_different_scales_where_a_site_is_summed_out():
    truth = TwoCategoricals.drawn()

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(truth.a))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Categorical(truth.x[a, 0]), obs=x)

    with pytest.raises(ValueError, match=r"needs one scale .* has a meaning for pvae.ELBO only"):
        ELBO().loss(model, nothing, truth.sample(8))


# ------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("objective", [ELBO(3), IWAE(3)], ids=repr)
def test_masked_data_count_nothing(objective):
    x, mask = TRUTH.sample(8), torch.arange(8) % 3 > 0
    model, guide = (poutine.mask(program, mask=mask) for program in (TRUTH.model, TRUTH.guide))
    expected = torch.where(mask, TRUTH.log_prob(x), 0.0)
    exactly(draw(model, guide, (x,), num_particles=3).log_weights, expected.expand(3, -1))
    assert objective.loss(model, guide, x) == pytest.approx(-float(expected.sum()))


def test_masked_pixels_are_integrated_out():
    """log p of the pixels that are seen, with the posterior given those as guide."""
    seen = torch.tensor([True, False, True, True, False])
    marginal = LinearGaussian(TRUTH.W[seen], TRUTH.b[seen], TRUTH.sigma)

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", PRIOR)
            with pyro.plate("pixels", x.shape[1], dim=-1), poutine.mask(mask=seen):
                mean = (z @ TRUTH.W.T + TRUTH.b).squeeze(-2)
                pyro.sample("x", dist.Normal(mean, TRUTH.sigma), obs=x)

    def guide(x):
        mean, S = marginal.posterior(x[:, seen])
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.MultivariateNormal(mean.unsqueeze(1), S))

    x = TRUTH.sample(8)
    weights = log_weights(PyroPair(model, guide), x, 3)
    exactly(weights, marginal.log_prob(x[:, seen]).expand(3, -1))


# ------------------------------------------------------------------------------ errors


def without_plate(x):
    pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)


def whole_batch_as_one_event(x):
    pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(2), obs=x)


def loose_pixels(x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)


def global_latent(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean.expand(x.shape), 1.0).to_event(1), obs=x)


def global_guide(x):
    pyro.sample("mean", dist.Normal(0.0, 1.0))


def other_plate(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("z", PRIOR)


def one_datum_at_a_time(x):
    for n in pyro.plate("data", len(x)):
        pyro.sample(f"x_{n}", dist.Normal(torch.zeros_like(x[n]), 1.0).to_event(1), obs=x[n])


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (without_plate, nothing, r"'x' has .* shape \(8,\), of which dimension -1 .* no plate"),
        (without_plate, nothing, r"if they are data, write a plate:\n(.|\n)*pyro\.plate\(.data"),
        (whole_batch_as_one_event, nothing, r"Site 'x' lies in no vectorised plate over the data"),
        (loose_pixels, nothing, r"dimension -1 .* parts of one datum, add `\.to_event\(1\)`"),
        (global_latent, global_guide, r"Site 'mean' lies in no vectorised plate over the data"),
        (TRUTH.model, other_plate, r"one vectorised plate .* found \['data', 'rows'\] and 0 that"),
        (one_datum_at_a_time, nothing, r"Site 'x_0' lies in no vectorised plate over the data"),
    ],
)
def test_data_that_cannot_be_told_apart_are_refused(model, guide, message):
    x = TRUTH.sample(8)
    for refused in (partial(draw, model, guide, (x,)), partial(ELBO().loss, model, guide, x)):
        with pytest.raises(ValueError, match=message):
            refused()


def test_a_latent_that_nobody_draws_is_refused():
    with pytest.raises(ValueError, match=r"'z' \(Independent\) is neither drawn by the guide nor"):
        draw(TRUTH.model, nothing, (TRUTH.sample(8),))


def test_a_site_that_the_model_lacks_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", PRIOR)
            pyro.sample("y", dist.Normal(x.new_zeros(()), 1.0))

    with pytest.raises(ValueError, match="The guide draws 'y', which is no site of the model"):
        draw(TRUTH.model, guide, (TRUTH.sample(8),))
