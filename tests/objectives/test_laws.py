"""Laws of bounds and of their gradients: rates in K with fitted slopes, and orderings.

Where the guide is the posterior made broader by a factor s, every bound has a closed form, and all
of them differ from log p(x) by a function of s and of the number of latents d alone.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pvae import CIWAE, CUBO, ELBO, IWAE, MIWAE, PIWAE, TVO, Renyi, bounds
from pvae.particles import draw
from tests.exact import LinearGaussian
from tests.objectives.small_models import Gaussian, drawn_gradients

TRUTH, LATENTS, SPREAD = LinearGaussian.drawn(), 3, 1.5
GROUPS = 32
BETAS = (0.0, 0.1, 0.4, 0.7)


def log_weights(num_particles: int, num_data: int, spread: float = SPREAD) -> tuple[Tensor, Tensor]:
    """Of copies of one datum, (K, N), and its log p(x)."""
    x = TRUTH.sample(1)
    guide = partial(TRUTH.guide, spread=spread)
    data = (x.expand(num_data, -1),)
    particles = draw(TRUTH.model, guide, data, num_particles=num_particles)
    return particles.log_weights, TRUTH.log_prob(x)


# ------------------------------------------------------------------------------ rates


def slope(num_particles, values: Tensor) -> Tensor:
    """Of log values against log K, by least squares: (sizes, *) -> (*,)."""
    log_K = torch.tensor(num_particles, dtype=torch.float64).log()
    log_K = log_K - log_K.mean()
    return (log_K @ values.log()) / log_K.square().sum()


def test_the_gap_of_iwae_falls_as_1_over_K():
    """To Var[w / p(x)] / 2K (Maddison et al. 2017, proposition 1).

    Since E[w / p(x)] = 1, the gap is the mean of r - 1 - log r for r = mean_k w_k / p(x), which
    has far less variance than -log r.
    """
    sizes = [16, 32, 64, 128, 256]
    log_w, log_p = log_weights(256, 125 * GROUPS, spread=1.2)
    gaps = []
    for K in sizes:
        log_r = IWAE(K).value(log_w.reshape(K, -1)) - log_p
        gaps.append((log_r.exp() - 1 - log_r).reshape(GROUPS, -1).mean(1))
    slopes = slope(sizes, torch.stack(gaps))
    error = slopes.std() / math.sqrt(GROUPS)
    assert error < 0.02
    assert abs(slopes.mean() + 1) < 4.5 * error
    scaled = 2 * 256 * gaps[-1]
    error = scaled.std() / math.sqrt(GROUPS)
    assert abs(scaled.mean() - TRUTH.weight_variance(1.2)) < 4.5 * error


def signal_to_noise(moments: Tensor) -> Tensor:
    """|mean| / standard deviation from first and second moments, (2, *)."""
    first, second = moments
    return first.abs() / (second - first.square()).sqrt()


def slope_of_signal_to_noise(objective, sizes, parameter: int) -> tuple[float, float]:
    """Of one parameter's gradient, with its standard error: groups of draws, bootstrapped."""
    toy = Gaussian()
    toy.phi = {"a": 0.3, "b": 0.1, "c": -0.2}  # not far off the posterior
    moments = []
    for K in sizes:
        gradients = drawn_gradients(objective(K), toy, 2**20 // K, 2)[parameter]
        groups = gradients.reshape(GROUPS, -1)
        moments.append(torch.stack([groups.mean(1), groups.square().mean(1)]))
    by_group = torch.stack(moments, 1)  # (2, sizes, groups)
    again = torch.randint(GROUPS, (200, GROUPS))
    resampled = slope(sizes, signal_to_noise(by_group[..., again].mean(-1)))
    return float(slope(sizes, signal_to_noise(by_group.mean(-1)))), float(resampled.std())


M, A = 0, 2  # the prior's mean, the guide's weight


@pytest.mark.parametrize(
    ("gradient", "parameter", "sizes", "expected"),
    [
        ("pathwise", A, [4, 16, 64], -0.5),
        ("dreg", A, [32, 128, 512], 0.5),
        ("pathwise", M, [32, 128, 512], 0.5),
    ],
    ids=["pathwise, guide", "dreg, guide", "model"],
)
def test_the_signal_to_noise_ratio_changes_as_a_power_of_K(gradient, parameter, sizes, expected):
    """Rainforth et al. 2018, theorem 1; for DReG Tucker et al. 2018, section 5."""
    found, error = slope_of_signal_to_noise(partial(IWAE, gradient=gradient), sizes, parameter)
    assert error < 0.05
    assert abs(found - expected) < 4.5 * error


@pytest.mark.parametrize(
    ("objective", "beta"),
    [
        (ELBO(gradient="stl"), 1.0),
        (ELBO(2, gradient="stl", beta=0.4), 0.4),
        (IWAE(5, "stl"), 1.0),
        (IWAE(5, "dreg"), 1.0),
    ],
    ids=str,
)
def test_gradients_through_draws_have_no_variance_at_the_exact_guide(objective, beta):
    """Roeder et al. 2017, section 3: log w is the same at every draw. The score is what varies.

    With a KL weight beta the guide that is best is p(z) p(x | z)^(1 / beta).
    """
    toy = Gaussian()
    noise = beta * 0.7**2
    precision = 1 + toy.theta["w"] ** 2 / noise
    mean = (toy.theta["m"] + toy.theta["w"] * toy.x / noise) / precision
    toy.phi = {"a": 0.5, "b": mean - 0.5 * toy.x, "c": -math.log(precision) / 2}
    gradients = drawn_gradients(objective, toy, 200, 1)[2:]
    assert_close(gradients, torch.zeros_like(gradients), rtol=0, atol=1e-12)
    pathwise = drawn_gradients(ELBO(beta=beta), toy, 200, 1)[2:]
    assert pathwise.std(1).min() > 0.1


# ------------------------------------------------------------------------------ closed forms


def variance(beta: float) -> float:
    """Of each latent under pi_beta, in units of the posterior's."""
    return 1 / (beta + (1 - beta) / SPREAD)


def thermodynamic(beta: float) -> float:
    """E_{pi_beta}[log w] - log p(x): at 0 the ELBO, at 1 the upper end, E_{p(z | x)}[log w]."""
    return LATENTS / 2 * (math.log(SPREAD) - (1 - 1 / SPREAD) * variance(beta))


def renyi(alpha: float) -> float:
    """The bound of order alpha less log p(x), for any number but 1; below 0 it is above log p."""
    if alpha == -math.inf:
        return LATENTS / 2 * math.log(SPREAD)
    precision = alpha / SPREAD + 1 - alpha
    return LATENTS / 2 * (-alpha * math.log(SPREAD) - math.log(precision)) / (1 - alpha)


def riemann(at) -> float:
    """The sum over the intervals of BETAS, the integrand taken at these points."""
    widths = torch.tensor([*BETAS, 1.0], dtype=torch.float64).diff().tolist()
    return sum(width * thermodynamic(beta) for width, beta in zip(widths, at, strict=True))


IN_THE_LIMIT = [
    (IWAE(4000).value, 0.0),
    (Renyi(4000, 1.5).value, renyi(1.5)),  # of higher order the estimate's variance is infinite
    (Renyi(4000, 1.0).value, thermodynamic(0.0)),
    (Renyi(4000, 0.5).value, renyi(0.5)),
    (Renyi(4000, -1.0).value, renyi(-1.0)),
    (partial(bounds.cubo, order=2), renyi(-1.0)),
    (partial(bounds.cubo, order=3), renyi(-2.0)),
    (TVO(4000, BETAS).value, riemann(BETAS)),
    (partial(bounds.tvo, betas=BETAS, upper=True), riemann([*BETAS[1:], 1.0])),
]


def test_many_particles_reach_the_closed_forms():
    log_w, log_p = log_weights(4000, 400)
    for value, above in IN_THE_LIMIT:
        found = value(log_w) - log_p
        error = found.std() / math.sqrt(len(found))
        assert abs(found.mean() - above) < 4.5 * error + 0.2 / 4000  # the bias falls as 1/K
        assert error < 0.002
    found = Renyi(4000, -math.inf).value(log_w) - log_p
    assert (found < renyi(-math.inf)).all()  # no weight is larger than at the mode
    assert found.mean() == pytest.approx(renyi(-math.inf), abs=0.01)


# ------------------------------------------------------------------------------ orderings


def assert_falling(values: list[Tensor]) -> None:
    """In expectation: each step down is above 4.5 standard errors of the paired differences."""
    for high, low in pairwise(values):
        step = high - low
        assert step.mean() > 4.5 * step.std() / math.sqrt(len(step))


def test_cubo_is_above_log_p_and_the_lower_bounds_rise_with_K():
    log_w, log_p = log_weights(1000, 2000)
    iwae = [bounds.iwae(log_w, K) for K in (40, 10, 2, 1)]  # every block of K
    assert_falling([-CUBO(1000).value(log_w), log_p.expand(2000), *iwae])
    assert_close(iwae[-1], bounds.elbo(log_w))


def test_the_thermodynamic_sums_are_on_either_side_of_log_p():
    log_w, log_p = log_weights(1000, 500)
    left, right = (bounds.tvo(log_w, BETAS, upper=upper) for upper in (False, True))
    w = log_w.softmax(0)
    upper_end = (w * log_w).sum(0)
    assert_falling([upper_end, right, log_p.expand(500), left, bounds.elbo(log_w)])
    in_closed_form = [thermodynamic(1.0), riemann([*BETAS[1:], 1.0]), 0.0, riemann(BETAS)]
    assert sorted(in_closed_form, reverse=True) == in_closed_form
    # draw for draw they enclose L_K, which is the integral itself for weights at hand
    assert (left < bounds.iwae(log_w)).all()
    assert (bounds.iwae(log_w) < right).all()
    assert (right < upper_end).all()


def test_finer_thermodynamic_sums_meet_at_L_K():
    """As 1/S for S intervals, and their mean, the trapezoidal rule, as 1/S^2."""
    log_w, _ = log_weights(100, 20)
    errors = []
    for intervals in (10, 20, 40):
        betas = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)[:-1].tolist()
        left, right = TVO(100, betas).value(log_w), bounds.tvo(log_w, betas, upper=True)
        iwae = bounds.iwae(log_w)
        errors.append(torch.stack([iwae - left, right - iwae, (left + right) / 2 - iwae]).abs())
    slopes = slope([10, 20, 40], torch.stack(errors).mean(2))
    assert_close(slopes, torch.tensor([-1.0, -1.0, -2.0]).double(), rtol=0, atol=0.05)


def test_renyis_bound_falls_as_its_order_rises():
    """Draw for draw: it is the log of a power mean."""
    log_w, _ = log_weights(20, 100)
    orders = [-math.inf, -5.0, -1.0, -0.2, 0.0, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0]
    values = torch.stack([Renyi(20, alpha).value(log_w) for alpha in orders])
    assert (values.diff(dim=0) < 0).all()
    assert_close(values[4], IWAE(20).value(log_w))
    assert_close(values[7], bounds.elbo(log_w))


def test_bounds_that_share_particles_out_lie_between_the_elbo_and_L_MK():
    """Draw for draw, by Jensen's inequality (Rainforth et al. 2018, section 5)."""
    log_w, _ = log_weights(24, 100)
    elbo, iwae = bounds.elbo(log_w), IWAE(24).value(log_w)
    for between in (MIWAE(4, 6), MIWAE(6, 4), CIWAE(24, 0.1), CIWAE(24, 0.9)):
        value = between.value(log_w)
        assert (elbo < value).all()
        assert (value < iwae).all()
    assert (CIWAE(24, 0.9).value(log_w) < CIWAE(24, 0.1).value(log_w)).all()
    assert_close(PIWAE(4, 6).value(log_w), iwae)
    for ends in ((MIWAE(24, 1), MIWAE(1, 24)), (CIWAE(24, 1.0), CIWAE(24, 0.0))):
        assert_close([end.value(log_w) for end in ends], [elbo, iwae])


def test_thermodynamic_sums_of_two_weights_by_hand():
    """w = 1, 9: the integrand is 9^beta / (1 + 9^beta) log 9, at 0, 1/2, 1 of 1/2, 3/4, 9/10."""
    log_w = torch.tensor([[1.0], [9.0]], dtype=torch.float64).log()
    left, right = (1 / 2 + 3 / 4) / 2, (3 / 4 + 9 / 10) / 2
    assert float(bounds.tvo(log_w, (0.0, 0.5))) == pytest.approx(left * math.log(9))
    assert float(bounds.tvo(log_w, (0.0, 0.5), upper=True)) == pytest.approx(right * math.log(9))
    assert float(TVO(2, (0.0, 0.5)).value(log_w)) == pytest.approx(left * math.log(9))
    assert float(TVO(2, (0.0,)).value(log_w)) == pytest.approx(math.log(9) / 2)  # the ELBO
