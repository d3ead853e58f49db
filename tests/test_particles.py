"""Log-weights against models whose log p(x) is known."""

import math
from functools import partial
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pvae import Given, Latent, LatentModel, Observed, PyroPair, bounds, log_weights
from pvae.nets import Linear, Table
from pvae.passes import blocks
from tests.exact import GaussianMixture, LinearGaussian, LinearMixture, TwoCategoricals, TwoLayers

exactly = partial(assert_close, rtol=0, atol=1e-10)


def scaled_log_q(truth, factor: float) -> PyroPair:
    """The exact guide, its log q multiplied by `factor`: a mutant that must be caught."""

    def guide(x):
        mean, S = truth.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Scaled(mean, S, factor))

    return PyroPair(truth.model, guide)


class Scaled(dist.MultivariateNormal):
    def __init__(self, mean, covariance, factor):
        self.factor = factor
        super().__init__(mean, covariance)

    def log_prob(self, value):
        return self.factor * super().log_prob(value)

    def expand(self, batch_shape, _instance=None):
        loc, S = self.loc.expand(*batch_shape, -1), self.covariance_matrix
        return Scaled(loc, S.expand(*batch_shape, *S.shape[-2:]), self.factor)


# ------------------------------------------------------------------------------ known log p(x)


@pytest.mark.parametrize("truth", [LinearGaussian.drawn(), TwoLayers.drawn()], ids=["one", "two"])
def test_the_exact_posterior_leaves_no_variance(truth):
    x = truth.sample(64)
    weights = log_weights(truth.pair(), x, 7)
    exactly(weights, truth.log_prob(x).expand(7, -1))


def test_the_exact_posterior_test_catches_one_percent_of_log_q():
    truth = LinearGaussian.drawn()
    x = truth.sample(64)
    exactly(log_weights(scaled_log_q(truth, 1.0), x, 3), truth.log_prob(x).expand(3, -1))
    with pytest.raises(AssertionError, match="not close"):
        exactly(log_weights(scaled_log_q(truth, 0.99), x, 3), truth.log_prob(x).expand(3, -1))


@pytest.mark.parametrize("make", ["by hand", "declared"])
@pytest.mark.parametrize("truth", [GaussianMixture.drawn(), TwoCategoricals.drawn()], ids=type)
def test_summed_latents_leave_no_variance(truth, make):
    x = truth.sample(64)
    pair = truth.pair() if make == "by hand" else truth.declared()
    exactly(log_weights(pair, x, 3), truth.log_prob(x).expand(3, -1))


def z_scores(weights: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    relative = (weights - bounds.iwae(weights)).exp()
    standard_error = relative.std(0) / math.sqrt(len(weights))
    return (bounds.iwae(weights) - log_p) / standard_error


BROAD = Latent(dist.Normal, 3, scale=1.5)
POOR = {
    "one layer": (LinearGaussian.drawn(), lambda truth: truth.pair(spread=2.0)),
    "two layers": (TwoLayers.drawn(), lambda truth: truth.pair(spread=2.0)),
    "discrete and continuous": (LinearMixture.drawn(), lambda truth: truth.pair()),
    "declared": (LinearGaussian.drawn(), lambda truth: truth.declared(z=BROAD)),
}


@pytest.mark.parametrize("case", POOR)
def test_a_poor_guide_still_recovers_log_p(case):
    truth, pair = POOR[case]
    x = truth.sample(64)
    weights = log_weights(pair(truth), x, 10_000)
    assert z_scores(weights, truth.log_prob(x)).abs().max() < 4.5  # 64 data: 1 failure in 2,000


def test_the_prior_as_proposal_recovers_log_p():
    truth = LinearGaussian.drawn(2, 2, 1.0)
    x = truth.sample(64)
    weights = log_weights(truth.pair(), x, 10_000, proposal="prior")
    assert z_scores(weights, truth.log_prob(x)).abs().max() < 4.5
    assert weights.std(0).min() > 0.1, "the exact guide must not have been used"


def test_the_prior_as_proposal_weighs_by_the_likelihood_alone():
    truth = LinearGaussian.drawn()
    x = truth.sample(5)
    particles = truth.pair().draw(x, 4, proposal="prior")
    mean = particles.values["z"] @ truth.W.T + truth.b
    exactly(particles.log_weights, dist.Normal(mean, truth.sigma).log_prob(x).sum(-1))


@pytest.mark.parametrize("truth", [LinearMixture.drawn(), GaussianMixture.drawn()], ids=type)
def test_the_prior_as_proposal_sums_out_what_the_guide_would(truth):
    for pair in (truth.pair(), truth.declared()):
        particles = pair.draw(truth.sample(5), 4, proposal="prior")
        assert pair.summed == ["c"]
        assert set(particles.log_q) == {"z"} & set(pair.draw(truth.sample(5)).log_q)
        assert particles.summed == ("c",)


def test_the_gap_to_log_p_falls_like_one_over_K():
    """E[L_K] = log p - Var(w / p) / 2K + O(1 / K^2): a slope of -1, and the constant as well.

    The mean weight is p(x) in expectation, so mean(w) / p - 1 is subtracted as a control variate.
    """
    truth, spread = LinearGaussian.drawn(latent_size=2), 1.8  # bounded weights: all moments finite
    x = truth.sample(64)
    relative = log_weights(truth.pair(spread), x, 4096) - truth.log_prob(x)
    sizes = torch.tensor([8, 16, 32, 64, 128])
    gaps, errors = [], []
    for K in sizes.tolist():
        mean = relative.reshape(-1, K, 64).exp().mean(1).flatten()
        exactly(bounds.iwae(relative, K).mean(), mean.log().mean())
        gap = mean - 1 - mean.log()
        gaps.append(gap.mean())
        errors.append(gap.std() / math.sqrt(len(gap)) / gap.mean())
    log_K, log_gap, error = sizes.log(), torch.stack(gaps).log(), torch.stack(errors)
    centred = log_K - log_K.mean()
    slope = float((centred * log_gap).sum() / centred.square().sum())
    slope_error = float((centred * error).square().sum().sqrt() / centred.square().sum())
    assert abs(slope + 1) < 4.5 * slope_error
    assert slope_error < 0.05
    constant = truth.weight_variance(spread) / 2
    assert gaps[-1] * 128 == pytest.approx(constant, rel=4.5 * float(errors[-1]))


def test_the_bound_rises_with_K():
    truth = LinearGaussian.drawn()
    x = truth.sample(64)
    weights = log_weights(truth.pair(spread=3.0), x, 256)
    grid = torch.stack([bounds.iwae(weights, 2**i) for i in range(9)])
    assert (grid.diff(dim=0) >= -1e-12).all(), "blocks nest, so each datum's bound rises"
    assert (grid.mean(1).diff() > 0).all()


# ------------------------------------------------------------------------------ chunks and order


@pytest.mark.parametrize("max_rows", [1, 3, 10, 64, 10_000])
def test_chunks_do_not_matter_to_an_exact_guide(max_rows):
    truth = LinearGaussian.drawn()
    x = truth.sample(20)
    weights = log_weights(truth.pair(), x, 10, max_rows=max_rows)
    exactly(weights, truth.log_prob(x).expand(10, -1))


@pytest.mark.parametrize("max_rows", [1, 3, 7, 64, 1000])
def test_chunking_changes_memory_not_the_number_of_draws(max_rows):
    truth = LinearGaussian.drawn()
    weights = log_weights(truth.pair(spread=2.0), truth.sample(8), 10, max_rows=max_rows)
    assert weights.shape == (10, 8)
    assert len(weights.unique()) == 80, "each draw is a fresh one"


def test_chunks_do_not_change_the_law():
    """100 draws in chunks of 30 are 100 draws (scvi-tools makes 120 of them and divides by 100)."""
    truth = LinearGaussian.drawn()
    x = truth.sample(16)
    bound = []
    for max_rows in (16 * 30, 16 * 100):
        weights = log_weights(truth.pair(spread=2.0), x, 20_000, max_rows=max_rows)
        own = weights.reshape(200, 100, 16).logsumexp(1) - math.log(100)
        exactly(bounds.iwae(weights, 100), own.mean(0))
        bound.append((own.mean(0), own.std(0) / math.sqrt(200)))
    (few, few_error), (many, many_error) = bound
    assert ((few - many) / (few_error**2 + many_error**2).sqrt()).abs().max() < 4.5


def test_the_order_of_data_does_not_matter():
    truth = LinearGaussian.drawn()
    x, order = truth.sample(32), torch.randperm(32)
    exactly(log_weights(truth.pair(), x[order], 3), log_weights(truth.pair(), x, 3)[:, order])
    poor = truth.pair(spread=2.0)
    weights, permuted = log_weights(poor, x, 4000), log_weights(poor, x[order], 4000, seed=1)
    difference = permuted.mean(0) - weights.mean(0)[order]
    error = (permuted.var(0) + weights.var(0)[order]).sqrt() / math.sqrt(4000)
    assert (difference / error).abs().max() < 4.5


@pytest.mark.parametrize("num_data", [1, 2, 7, 100])
@pytest.mark.parametrize("num_particles", [1, 2, 30, 100, 101])
def test_blocks_cover_every_datum_and_draw_once(num_data, num_particles):
    for max_rows, max_weights in product((1, 7, 30, 64, 10_000), repeat=2):
        found = list(blocks(num_data, num_particles, max_rows, max_weights))
        covered = [i for rows, _ in found for i in range(rows.start, rows.stop)]
        assert covered == list(range(num_data))
        for rows, passes in found:
            size = rows.stop - rows.start
            assert sum(passes) == num_particles
            assert all(size * particles <= max_rows for particles in passes)
            assert size == 1 or size * num_particles <= max_weights


@pytest.mark.parametrize("max_rows", [30, 100])
def test_no_pass_is_larger_than_asked(max_rows):
    truth, rows = LinearMixture.drawn(), []

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Categorical(truth.probs))
            z = pyro.sample("z", dist.Normal(truth.loc[c], truth.s).to_event(1))
            rows.append(math.prod((z @ truth.W.T + truth.b[c]).shape[:-1]))
            pyro.sample("x", dist.Normal(z @ truth.W.T + truth.b[c], 1.0).to_event(1), obs=x)

    log_weights(PyroPair(model, truth.guide), truth.sample(20), 50, max_rows=max_rows)
    assert max(rows) <= max_rows


# ------------------------------------------------------------------------------ seeds and modes


def test_a_seed_names_the_draws():
    truth = LinearGaussian.drawn()
    pair, x = truth.pair(spread=2.0), truth.sample(5)
    assert_close(log_weights(pair, x, 4, seed=3), log_weights(pair, x, 4, seed=3), rtol=0, atol=0)
    assert not torch.equal(log_weights(pair, x, 4, seed=3), log_weights(pair, x, 4, seed=4))


def test_weighing_leaves_the_callers_random_state():
    truth = LinearGaussian.drawn()
    x = truth.sample(5)
    for pair in (truth.pair(spread=2.0), truth.declared()):
        before = torch.get_rng_state()
        log_weights(pair, x, 4)
        assert torch.equal(torch.get_rng_state(), before)


def test_weighing_changes_neither_parameters_nor_modes():
    model = LinearGaussian.drawn().declared().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = log_weights(model, LinearGaussian.drawn().sample(5), 4)
    assert not weights.requires_grad
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_particles_one_at_a_time_have_the_same_law():
    truth = LinearMixture.drawn()
    x = truth.sample(6)
    pair = PyroPair(truth.model, truth.guide, vectorize_particles=False)
    particles = pair.draw(x, 5)
    assert particles.shape == (5, 6)
    z = particles.values["z"]
    log_q = dist.Normal(torch.zeros((), dtype=x.dtype), 2.0).log_prob(z).sum(-1)
    exactly(particles.log_weights, truth.joint(x, z).logsumexp(0) - log_q)
    exactly(sum_of_terms(particles), particles.log_weights)


@pytest.mark.parametrize(("num_particles", "proposal", "message"), [
    (0, "guide", "`num_particles` must be at least 1, got 0"),
    (1, "posterior", "`proposal` must be one of 'guide', 'prior', 'defensive', got 'posterior'"),
])  # fmt: skip
def test_arguments_without_meaning_are_refused(num_particles, proposal, message):
    truth = LinearGaussian.drawn()
    with pytest.raises(ValueError, match=message):
        truth.pair().draw(truth.sample(2), num_particles, proposal)


# ------------------------------------------------------------------------------ sums


def sum_of_terms(particles) -> torch.Tensor:
    signs = {True: 1, False: -1}
    return sum(signs[n.startswith("reconstruction")] * t for n, t in particles.terms().items())


@pytest.mark.parametrize("truth", [TwoCategoricals.drawn(), TwoCategoricals.drawn((4, 2, 3))])
def test_responsibilities_obey_bayes_rule(truth):
    x = truth.sample(20)
    particles = truth.pair().draw(x, 2)
    A, B = truth.b.shape
    assert particles.summed == ("a", "b"), "from the rightmost dimension, which runs fastest"
    r = particles.log_responsibilities().exp().reshape(B, A, 2, 20)
    for (a, b), expected in truth.posterior(x).items():
        exactly(r[b, a], expected.expand(2, -1))


def test_responsibilities_given_continuous_latents_obey_bayes_rule():
    truth = LinearMixture.drawn()
    x = truth.sample(10)
    particles = truth.declared().draw(x, 4)
    joint = truth.joint(x, particles.values["z"].detach())
    exactly(particles.log_responsibilities().detach(), joint - joint.logsumexp(0))


def test_summed_latents_are_drawn_from_their_posterior():
    truth = TwoCategoricals.drawn()
    x = torch.arange(5.0)
    drawn = truth.pair().draw(x, 20_000).posterior_values()
    for (a, b), p in truth.posterior(x).items():
        share = ((drawn["a"] == a) & (drawn["b"] == b)).double().mean(0)
        assert ((share - p) / (p * (1 - p) / 20_000).sqrt()).abs().max() < 4.5


@pytest.mark.parametrize("num_particles", [1, 6])
@pytest.mark.parametrize(
    "make",
    [
        LinearGaussian.drawn().declared,
        LinearMixture.drawn(5).declared,
        LinearMixture.drawn(5).pair,
        TwoLayers.drawn(5).declared,
        GaussianMixture.drawn(5).declared,
    ],
)
def test_terms_add_up_to_the_log_weights(make, num_particles):
    particles = make().draw(LinearGaussian.drawn(5).sample(4), num_particles)
    assert_close(sum_of_terms(particles), particles.log_weights, rtol=1e-12, atol=1e-10)
    assert all(term.shape == (num_particles, 4) for term in particles.terms().values())


def test_terms_are_the_known_divergences():
    """With the exact posterior of a mixture, KL[c] = sum_c r_c log(r_c / pi_c)."""
    truth = GaussianMixture.drawn()
    x = truth.sample(12)
    terms = truth.pair().draw(x).terms()
    log_r = truth.joint(x) - truth.log_prob(x)
    kl = (log_r.exp() * (log_r - truth.probs.log()[:, None])).sum(0)
    exactly(terms["KL[c]"][0], kl)
    exactly(terms["reconstruction[x]"][0], truth.log_prob(x) + kl)


def test_a_category_of_no_probability_adds_nothing():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5, 0.0])))
            pyro.sample("x", dist.Normal(c.double(), 1.0), obs=x)

    x = torch.tensor([0.3, 2.0], dtype=torch.float64)
    particles = PyroPair(model, lambda x: None).draw(x)
    two = torch.stack([dist.Normal(m, 1.0).log_prob(x) for m in (0.0, 1.0)])
    assert_close(particles.log_weights[0], two.logsumexp(0) - math.log(2), rtol=0, atol=1e-6)
    assert_close(sum_of_terms(particles), particles.log_weights)


def test_inputs_that_are_given_reach_model_and_guide():
    model = LatentModel(
        label=Given(categories=2),
        z=Latent(dist.Normal, 2, given="label", net=Table(), scale=0.5),
        x=Observed(dist.Normal, 3, given=("z", "label"), net=Linear(), scale=0.5),
        guide={"z": Latent(dist.Normal, 2, given="label", net=Table(), scale=0.75)},
    ).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    data = {"x": x, "label": torch.arange(40) % 2}
    weights = log_weights(model, data, 20_000)
    W = model.module_of("x").nets["net"].body.weight.detach()
    loc = model.module_of("z").nets["net"].rows["loc"].detach()
    label = data["label"]
    mean = loc[label] @ W[:, :2].T + W[:, 2:].T[label]
    C = 0.25 * W[:, :2] @ W[:, :2].T + 0.25 * torch.eye(3, dtype=torch.float64)
    log_p = torch.distributions.MultivariateNormal(mean, C).log_prob(x)
    assert z_scores(weights, log_p).abs().max() < 4.5
