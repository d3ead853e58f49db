"""Bounds and diagnostics against values worked out by hand and laws known in closed form."""

import math
from functools import partial

import pytest
import torch
from arviz_stats.base import array_stats
from torch.testing import assert_close

from pvae import bounds, log_weights
from pvae.particles import draw
from tests.exact import LinearGaussian
from tests.exact.parameters import generator, normal

exactly = partial(assert_close, rtol=0, atol=1e-12)

WEIGHTS = torch.tensor([[1.0, 10.0], [2.0, 10.0], [3.0, 10.0], [4.0, 10.0], [10.0, 10.0]])
LOG_WEIGHTS = WEIGHTS.double().log()


def logs(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def lognormal(num_particles: int, num_data: int, spread: float, seed: int = 0) -> torch.Tensor:
    """log w ~ N(0, spread^2), so that log E[w] = spread^2 / 2."""
    return spread * normal(num_particles, num_data, seed=seed)


# ------------------------------------------------------------------------------ by hand


def test_elbo_by_hand():
    mean = math.log(1 * 2 * 3 * 4 * 10) / 5
    exactly(bounds.elbo(LOG_WEIGHTS), torch.tensor([mean, math.log(10)], dtype=torch.float64))


@pytest.mark.parametrize(
    ("num_particles", "expected"),
    [
        (None, math.log(4.0)),
        (5, math.log(4.0)),
        (4, math.log(2.5)),
        (3, math.log(2.0)),
        (2, (math.log(1.5) + math.log(3.5)) / 2),
        (1, math.log(240) / 5),
    ],
)
def test_iwae_by_hand_over_disjoint_blocks(num_particles, expected):
    """Of five rows, two blocks of two: the fifth is left over."""
    found = bounds.iwae(LOG_WEIGHTS, num_particles)
    exactly(found, torch.tensor([expected, math.log(10)], dtype=torch.float64))


@pytest.mark.parametrize("num_particles", [1, 2, 3, 7, 20])
def test_blocks_are_disjoint(num_particles):
    log_w = normal(20, 4, seed=5)
    whole = 20 // num_particles
    values = [
        (log_w[i * num_particles : (i + 1) * num_particles].exp().mean(0)).log()
        for i in range(whole)
    ]
    exactly(bounds.iwae(log_w, num_particles), torch.stack(values).mean(0))


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.5, 2 * math.log((1 + 2 + 3) / 3)),
        (2.0, -math.log((1 + 1 / 4 + 1 / 9) / 3)),
        (-1.0, math.log((1 + 16 + 81) / 3) / 2),
        (0.0, math.log((1 + 4 + 9) / 3)),
        (1.0, math.log(36) / 3),
        (-math.inf, math.log(9)),
    ],
)
def test_renyi_by_hand(alpha, expected):
    assert bounds.renyi(logs(1, 4, 9).unsqueeze(1), alpha).item() == pytest.approx(expected)


def test_cubo_by_hand():
    log_w = logs(1, 4, 9).unsqueeze(1)
    assert bounds.cubo(log_w).item() == pytest.approx(math.log((1 + 16 + 81) / 3) / 2)
    assert bounds.cubo(log_w, order=3).item() == pytest.approx(math.log((1 + 64 + 729) / 3) / 3)


def test_effective_sample_size_by_hand():
    columns = [logs(1, 1, 1, 1), logs(1, 0, 0, 0), logs(1, 1, 0, 0), logs(1, 2, 3, 4)]
    found = bounds.effective_sample_size(torch.stack(columns, 1))
    exactly(found, torch.tensor([4.0, 1.0, 2.0, 100 / 30], dtype=torch.float64))


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_nothing_overflows_far_from_zero(shift):
    log_w = normal(40, 6, seed=1)
    near = partial(assert_close, rtol=0, atol=1e-9)
    near(bounds.iwae(log_w + shift, 10), bounds.iwae(log_w, 10) + shift)
    near(bounds.renyi(log_w + shift, 0.5), bounds.renyi(log_w, 0.5) + shift)
    near(bounds.cubo(log_w + shift), bounds.cubo(log_w) + shift)
    near(bounds.effective_sample_size(log_w + shift), bounds.effective_sample_size(log_w))
    near(bounds.pareto_khat(log_w + shift), bounds.pareto_khat(log_w))
    near(bounds.iwae_standard_error(log_w + shift), bounds.iwae_standard_error(log_w))


def test_weights_of_zero_are_weights():
    log_w = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]], dtype=torch.float64)
    exactly(bounds.iwae(log_w), torch.tensor([-math.log(2), -math.inf], dtype=torch.float64))
    assert (bounds.elbo(log_w) == -math.inf).all()
    assert bounds.effective_sample_size(log_w)[1].isnan(), "no weight at all: not one particle"


# ------------------------------------------------------------------------------ laws


def test_renyi_falls_with_alpha_from_the_largest_weight_to_the_smallest():
    log_w = lognormal(50, 10, 2.0)
    alphas = (-math.inf, -100, -1.0, 0.0, 0.3, 0.999, 1.0, 1.001, 2.0, 100)
    values = torch.stack([bounds.renyi(log_w, alpha) for alpha in alphas])
    assert (values.diff(dim=0) < 0).all()
    assert (values[0] == log_w.max(0).values).all()
    assert (values[-1] - log_w.min(0).values).abs().max() < 0.1
    exactly(bounds.renyi(log_w, 0.0, 10), bounds.iwae(log_w, 10))
    exactly(bounds.renyi(log_w, 1.0, 10), bounds.elbo(log_w))


def test_iwae_rises_with_k_on_every_column():
    log_w = lognormal(64, 200, 3.0)
    values = torch.stack([bounds.iwae(log_w, 2**i) for i in range(7)])
    assert (values.diff(dim=0) >= 0).all(), "by Jensen's inequality, where blocks nest"
    exactly(values[0], bounds.elbo(log_w))


def test_bounds_enclose_log_p():
    """CUBO_2 = log p + log(1 + Var(w / p)) / 2, in closed form for the broad guide."""
    truth, spread = LinearGaussian.drawn(), 2.0
    x = truth.sample(64)
    log_p = truth.log_prob(x)
    log_w = log_weights(truth.pair(spread), x, 10_000)
    expected = log_p + math.log1p(truth.weight_variance(spread)) / 2
    squares = (2 * (log_w - log_p)).exp()
    error = squares.std(0) / squares.mean(0) / math.sqrt(10_000) / 2
    assert ((bounds.cubo(log_w) - expected) / error).abs().max() < 4.5
    assert (bounds.cubo(log_w) > log_p).all()
    assert (bounds.elbo(log_w) < log_p).all()


def test_effective_sample_size_is_that_of_the_weights_variance():
    """ESS / K -> 1 / (1 + Var(w / p)) (Kong 1992)."""
    truth, spread = LinearGaussian.drawn(), 2.0
    log_w = log_weights(truth.pair(spread), truth.sample(64), 10_000)
    found = bounds.effective_sample_size(log_w).mean() / 10_000
    assert found == pytest.approx(1 / (1 + truth.weight_variance(spread)), rel=0.01)


@pytest.mark.parametrize("num_particles", [1, 10, None])
def test_standard_errors_are_the_spread_of_repeated_draws(num_particles):
    """1,000 repetitions as columns; the errors' own accuracy is 1 / sqrt(2,000)."""
    log_w = lognormal(400, 1000, 0.8)
    values = bounds.iwae(log_w, num_particles)
    errors = bounds.iwae_standard_error(log_w, num_particles)
    ratio = errors.square().mean().sqrt() / values.std()
    assert ratio == pytest.approx(1, abs=4.5 / math.sqrt(2000))


def test_the_standard_error_of_one_block_by_hand():
    """sd(w) / (sqrt(K) mean(w)) of the weights 1, 2, 3."""
    found = bounds.iwae_standard_error(logs(1, 2, 3).unsqueeze(1))
    assert found.item() == pytest.approx(1 / (math.sqrt(3) * 2))
    assert bounds.iwae_standard_error(LOG_WEIGHTS[:1]).isnan().all(), "one particle has no spread"


# ------------------------------------------------------------------------------ k-hat


def pareto(shape: float, num_particles: int = 4000, num_data: int = 40) -> torch.Tensor:
    """log of weights whose tail is Pareto: P(w > t) = t^(-1 / shape)."""
    uniform = torch.rand(num_particles, num_data, generator=generator(3), dtype=torch.float64)
    return -shape * uniform.log()


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9, 1.5])
def test_khat_is_the_shape_of_the_tail(shape):
    khat = bounds.pareto_khat(pareto(shape))
    error = float(khat.std()) / math.sqrt(len(khat))
    assert khat.mean() == pytest.approx(shape, abs=4.5 * error + 0.03)  # ArviZ's prior pulls to 0.5


def test_khat_flags_heavy_tails_and_not_light_ones():
    """ArviZ's psislw negates its input: given log w it would let the heavy tail pass."""
    threshold = bounds.khat_threshold(4000)
    assert bounds.pareto_khat(pareto(0.9)).median() > threshold
    assert (bounds.pareto_khat(pareto(0.2)) < threshold).all()
    assert (bounds.pareto_khat(-pareto(0.9)) < threshold).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_khat_of_constant_weights_is_zero(dtype):
    log_w = torch.full((200, 3), -87.3, dtype=dtype)
    log_w[:, 1] += torch.randn(200, dtype=dtype) * 4 * torch.finfo(dtype).eps * 87.3
    log_w[:50, 2] -= 5.0
    exactly(bounds.pareto_khat(log_w), torch.zeros(3, dtype=torch.float64))


def test_khat_of_an_exact_guide_is_zero():
    truth = LinearGaussian.drawn()
    x = truth.sample(8)
    assert (bounds.pareto_khat(log_weights(truth.pair(), x, 100)) == 0).all()


def test_khat_needs_30_draws():
    log_w = pareto(0.5, num_particles=30)
    for too_few in (1, 24, 25, 29):
        assert bounds.pareto_khat(log_w[:too_few]).isnan().all()
    assert bounds.pareto_khat(log_w).isfinite().all()


def test_khat_takes_weights_of_zero():
    log_w = pareto(0.5, 200, 4)
    log_w[::2, 1] = -math.inf
    log_w[3:, 2] = -math.inf
    log_w[:, 3] = -math.inf
    khat = bounds.pareto_khat(log_w)
    assert khat[:2].isfinite().all()
    assert khat[2] == math.inf, "three particles carry everything, which is no tail to trust"
    assert khat[3].isnan(), "no weight above zero says nothing"


@pytest.mark.parametrize("gap", [50.0, 700.0, 1e4])
def test_khat_of_one_particle_with_all_the_weight_is_bad(gap):
    log_w = pareto(0.2, 1000, 1)
    log_w[17] += gap
    assert bounds.pareto_khat(log_w) > bounds.khat_threshold(1000)


def test_khat_of_few_distinct_weights_is_not_made_up():
    """Guided discrete latents have few values, so that most of the tail is one of them."""
    log_w = torch.zeros(1000, 1, dtype=torch.float64)
    log_w[:5] = 1.0
    assert bounds.pareto_khat(log_w).isnan().all()


def test_khat_of_each_datum_is_its_own():
    log_w = torch.cat([pareto(0.9, num_data=2), pareto(0.2, num_data=2)], 1)
    alone = torch.cat([bounds.pareto_khat(log_w[:, [i]]) for i in range(4)])
    exactly(bounds.pareto_khat(log_w), alone)


@pytest.mark.parametrize(
    ("num_particles", "expected"), [(1, -math.inf), (10, 0.0), (100, 0.5), (10**4, 0.7)]
)
def test_khat_threshold_by_hand(num_particles, expected):
    assert bounds.khat_threshold(num_particles) == pytest.approx(expected)


# ------------------------------------------------------------------------------ errors

FUNCTIONS = [
    bounds.elbo,
    bounds.iwae,
    bounds.iwae_standard_error,
    partial(bounds.renyi, alpha=0.5),
    bounds.cubo,
    bounds.effective_sample_size,
    bounds.pareto_khat,
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 3, 4)])
def test_shapes_that_are_no_weights_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"shape \(K, N\), particles first, with K >= 1; got \("):
        function(torch.zeros(shape))


@pytest.mark.parametrize("size", [0, -1, 6])
def test_blocks_larger_than_the_matrix_are_refused(size):
    message = rf"`num_particles` must lie in 1\.\.5, the particles drawn; got {size}"
    for function in (bounds.iwae, bounds.iwae_standard_error, partial(bounds.renyi, alpha=0.5)):
        with pytest.raises(ValueError, match=message):
            function(LOG_WEIGHTS, num_particles=size)


@pytest.mark.parametrize("order", [1.0, 0.5, -2.0])
def test_an_order_that_gives_no_upper_bound_is_refused(order):
    with pytest.raises(ValueError, match="`order` must be above 1 for an upper bound, got"):
        bounds.cubo(LOG_WEIGHTS, order)


# ------------------------------------------------------------------------------ smoothed weights


@pytest.mark.parametrize("num_particles", [100, 300, 3000])
def test_psis_is_arvizs_smoothing_of_all_weights(num_particles):
    """Which normalises them: the weight that is smallest tells by what."""
    log_w = 40 + torch.distributions.StudentT(4.0).sample((num_particles, 6)).double()
    smoothed, khat = array_stats.psislw(-log_w.T.numpy(), axis=1)
    least = log_w.argmin(0)
    total = log_w[least, range(6)] - torch.as_tensor(smoothed)[range(6), least]
    estimate, found = bounds.psis(log_w)
    assert_close(estimate, total - math.log(num_particles), rtol=0, atol=1e-9)
    assert_close(found, torch.as_tensor(khat), rtol=0, atol=1e-9)


def test_psis_estimates_log_p_with_less_noise_than_the_bound_has_where_khat_is_good():
    truth = LinearGaussian.drawn()
    x = truth.sample(1).expand(400, -1)
    log_w = draw(truth.model, partial(truth.guide, spread=0.6), (x,), num_particles=500).log_weights
    log_p = truth.log_prob(x[:1])
    estimate, khat = bounds.psis(log_w)
    assert khat.median() < 0.7
    assert (estimate - log_p).std() < (bounds.iwae(log_w) - log_p).std()
    assert abs((estimate - log_p).mean()) < 0.1


def test_psis_is_the_bound_where_there_is_no_tail():
    for log_w in (torch.randn(20, 3), torch.full((200, 3), 5.0), torch.eye(200)[:, :3] * 1e4):
        assert_close(bounds.psis(log_w)[0], bounds.iwae(log_w).double())


def test_a_tail_hundreds_of_nats_wide_has_a_khat_and_an_estimate():
    """ArviZ's quantiles overflow there; no smoothed weight is above the largest."""
    low, high = torch.linspace(-599.0, -580.0, 170), torch.linspace(-2.0, 0.0, 30)
    log_w = torch.cat([low, high]).double().unsqueeze(1)
    estimate, khat = bounds.psis(log_w)
    assert khat > 100
    assert -math.log(200) < estimate < math.log(42 / 200)  # of a tail of 42


def test_a_tail_of_one_value_above_the_rest_is_no_tail():
    """As it comes of a guided category: the largest six of thirty weights are equal."""
    parts = [torch.full((6,), 0.4667), torch.full((7,), 0.1276), torch.full((17,), -0.299)]
    assert bounds.pareto_khat(torch.cat(parts).unsqueeze(1)) == 0


@pytest.mark.parametrize(("num_draws", "zeros"), [(200, 1), (200, 60), (1000, 700), (5000, 4500)])
def test_psis_of_weights_of_which_some_are_zero(num_draws, zeros):
    """What is zero lowers the mean, and says nothing of the tail."""
    rest = 0.3 * torch.randn(num_draws - zeros, 5).double() - 50
    log_w = torch.cat([torch.full((zeros, 5), -math.inf), rest])[torch.randperm(num_draws)]
    assert_close(bounds.psis(log_w)[0], bounds.iwae(log_w), rtol=0, atol=0.1)
    expected = -50 + 0.3**2 / 2 + math.log(1 - zeros / num_draws)
    assert_close(bounds.psis(log_w)[0].mean().item(), expected, rtol=0, atol=0.1)
