"""Wrong numbers that other systems report, each beside the right one, known in closed form.

The systems are Pyro, which is run here; pythae, scvi-tools and PyTorch-VAE, whose formulas are
written out; and pyroVED, whose loop is.
"""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from torch import Tensor, nn
from torch.testing import assert_close

import pvae
from pvae import Latent, LatentModel, Observed, PyroPair, bounds, evaluate, log_weights, objectives
from pvae.data import DataSpec
from pvae.nets import MLP
from pvae.objectives import ELBO, IWAE
from tests.exact import LinearGaussian
from tests.fitting import declare, fit, parameters, ppca

exactly = partial(assert_close, rtol=0, atol=1e-10)

TRUTH = LinearGaussian.drawn()
SPREAD = 2.0  # of the guide's covariance: weights reach p(x) 2^(3/2) at most
VARIANCE = TRUTH.weight_variance(SPREAD)  # of w / p(x), the same for each datum
KL = 1.5 * (SPREAD - 1 - math.log(SPREAD))  # of the guide from the posterior, d = 3
X = TRUTH.sample(8)
LOG_P = float(TRUTH.log_prob(X).sum())

EVERY = [
    objectives.ELBO(2),
    objectives.IWAE(2),
    objectives.MIWAE(2, 2),
    objectives.CIWAE(2),
    objectives.PIWAE(2, 2),
    objectives.Renyi(2),
    objectives.CUBO(2),
    objectives.TVO(2),
    objectives.ReweightedWakeSleep(2),
    objectives.ForwardKL(2),
]


def broad_guide(x: Tensor) -> None:
    TRUTH.guide(x, SPREAD)


def pyros_renyi(num_particles: int, **settings) -> RenyiELBO:
    """Of order 0, which is IWAE."""
    return RenyiELBO(0, num_particles, max_plate_nesting=1, vectorize_particles=True, **settings)


def mean_and_error(draw, rounds: int = 200) -> tuple[float, float]:
    """Of what `draw()` returns, and the standard error of that mean."""
    values = torch.tensor([float(draw()) for _ in range(rounds)], dtype=torch.float64)
    return float(values.mean()), float(values.std()) / math.sqrt(rounds)


# ------------------------------------------------------------------------------ Pyro


def subsampled(size: int):
    """A batch out of `size` data: Pyro scales by size / batch."""
    prior = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)

    def model(x):
        with pyro.plate("data", size, subsample=x):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ TRUTH.W.T + TRUTH.b, TRUTH.sigma).to_event(1), obs=x)

    def guide(x):
        mean, S = TRUTH.posterior(x)
        with pyro.plate("data", size, subsample=x):
            pyro.sample("z", dist.MultivariateNormal(mean, SPREAD * S))

    return model, guide


def scaled(scale: float):
    return poutine.scale(TRUTH.model, scale), poutine.scale(broad_guide, scale)


@pytest.mark.parametrize("programs", [subsampled(200), scaled(25.0)], ids=["plate", "scale"])
def test_pyros_renyi_elbo_has_the_scale_inside_the_log_sum_exp(programs):
    """log (1/K) sum_k w_k^25 tends to 25 max_k log w_k, above 25 log p by up to 26 nats a datum."""
    ours, error = mean_and_error(lambda: -IWAE(50).loss(*programs, X))
    gap = 25 * 8 * VARIANCE / (2 * 50)  # of L_50, to first order
    assert 25 * LOG_P - 2 * gap < ours < 25 * LOG_P + 4.5 * error
    assert error < 1.0
    pyros, error = mean_and_error(lambda: -pyros_renyi(50).loss(*programs, X))
    assert pyros - 4.5 * error > 25 * LOG_P + 90


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_pyros_renyi_elbo_cannot_be_called_with_a_pair(objective):
    pair = ppca()
    loss = objective(pair.model, pair.guide)(X)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pair.parameters())


def test_pyros_renyi_elbo_has_no_differentiable_loss():
    with pytest.raises(AttributeError, match="no attribute 'differentiable_loss'"):
        pyros_renyi(2)(TRUTH.model, TRUTH.guide)(X)


def test_trace_elbo_of_k_particles_is_the_mean_of_k_elbos_and_not_iwae():
    pyros = Trace_ELBO(50, max_plate_nesting=1, vectorize_particles=True)
    for averaged in (pyros, ELBO(50)):
        mean, error = mean_and_error(lambda own=averaged: -own.loss(TRUTH.model, broad_guide, X))
        assert abs(mean - (LOG_P - 8 * KL)) < 4.5 * error
        assert 4.5 * error < 0.1 * 8 * KL
    bound, error = mean_and_error(lambda: -IWAE(50).loss(TRUTH.model, broad_guide, X))
    assert LOG_P - 8 * VARIANCE / 50 < bound < LOG_P + 4.5 * error
    assert error < 0.02 * 8 * KL


def test_vectorized_importance_weights_are_joint_over_the_batch():
    """ESS / K tends to 1 / (1 + V) for one datum, and to 1 / (1 + V)^N for N of them jointly."""
    K, x = 4000, TRUTH.sample(32)
    settings = {"num_samples": K, "max_plate_nesting": 1}
    joint, _, _ = vectorized_importance_weights(TRUTH.model, broad_guide, x, **settings)
    own = log_weights(TRUTH.pair(SPREAD), x, K)
    assert joint.shape == (K,)
    assert own.shape == (K, 32)
    share = bounds.effective_sample_size(own) / K
    error = float(share.std()) / math.sqrt(32)
    assert abs(float(share.mean()) - 1 / (1 + VARIANCE)) < 4.5 * error
    assert error < 0.01
    assert bounds.effective_sample_size(joint[:, None]) < 0.05 * K * float(share.min())
    with pytest.raises(TypeError, match="logsumexp"):
        vectorized_importance_weights(TRUTH.model, broad_guide, x, normalized=True, **settings)


def test_psis_diagnostic_is_one_number_that_grows_with_the_batch():
    """Of one datum the weights are bounded; the product of 64 has a tail however good each is."""
    x, settings = TRUTH.sample(64), {"num_particles": 4000, "max_simultaneous_particles": 4000}
    settings["max_plate_nesting"] = 1
    joint = psis_diagnostic(TRUTH.model, broad_guide, x, **settings)
    own = bounds.pareto_khat(log_weights(TRUTH.pair(SPREAD), x, 4000))
    assert isinstance(joint, float)
    assert own.shape == (64,)
    assert float(own.max()) < 0, "bounded"
    assert joint > 0.7


@pytest.mark.uses_param_store
def test_loading_the_param_store_leaves_modules_as_they_are(tmp_path):
    net = nn.Linear(2, 2)
    pyro.module("net", net)
    trained = net.weight.detach().clone()
    saved = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    fresh = nn.Linear(2, 2)
    pyro.get_param_store().set_state(saved)  # what `load` does with what it has read
    pyro.module("net", fresh)
    assert not torch.equal(fresh.weight, trained)

    fitted = fit(ppca(), X, epochs=2, folder=tmp_path / "run")
    other = ppca(seed=1)
    assert not torch.equal(parameters(other), parameters(fitted.model))
    loaded = pvae.load(tmp_path / "run", other)
    assert loaded.model is other
    assert torch.equal(parameters(other), parameters(fitted.model))


def test_evaluating_by_svi_step_without_gradients_moves_the_weights():
    """As pyroVED does: there are no gradients, but Adam has its momentum."""
    model = ppca()
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(X)
    before = parameters(model)
    with torch.no_grad():
        svi.step(X)
    assert not torch.equal(parameters(model), before)


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_evaluating_leaves_the_weights_bit_identical(objective):
    model = ppca()
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.01}), objective)
    for _ in range(3):
        svi.step(X)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    svi.evaluate_loss(X)
    evaluate(model, X, 10)
    objective.loss(model.model, model.guide, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------ pythae


def pythaes_iwae(log_w: Tensor) -> Tensor:
    """What pythae reports, with its sign turned: sum_k w~_k log w_k."""
    return (log_w.softmax(0) * log_w).sum(0)


def test_pythaes_iwae_passes_log_p():
    log_w = log_weights(TRUTH.pair(SPREAD), TRUTH.sample(64), 50 * 40).reshape(40, 50, 64)
    relative = log_w - TRUTH.log_prob(TRUTH.sample(64))
    theirs = torch.stack([pythaes_iwae(own) for own in relative]).mean(1)
    ours = torch.stack([bounds.iwae(own) for own in relative]).mean(1)
    w = relative.softmax(1)
    exactly(theirs - ours, (w * (50 * w).log()).sum(1).mean(1))  # KL(w~, uniform)
    error = (theirs.std() / math.sqrt(40), ours.std() / math.sqrt(40))
    assert theirs.mean() - 4.5 * error[0] > 0.1, "above log p"
    assert -VARIANCE / 50 < ours.mean() < 4.5 * error[1]


def test_pythaes_best_model_is_the_one_with_the_worse_guide():
    """The exact guide reports log p, a broad one more than that."""
    x = TRUTH.sample(64)
    exact, broad = (log_weights(TRUTH.pair(spread), x, 500) for spread in (1.0, SPREAD))
    assert pythaes_iwae(broad).mean() > pythaes_iwae(exact).mean() + 0.1
    for num_particles in (1, 5, 50):
        assert bounds.iwae(exact, num_particles).mean() > bounds.iwae(broad, num_particles).mean()


@pytest.mark.parametrize(("num_particles", "max_rows"), [(3, 10_000), (100, 30), (7, 7)])
def test_pythaes_get_nll_has_the_wrong_sign_and_ignores_the_number_of_draws(
    num_particles, max_rows
):
    """log p(x) is negative for all of these data; each is drawn for K times, whatever fits."""
    drawn = []

    def guide(x):
        mean, S = TRUTH.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.MultivariateNormal(mean, S))
        drawn.append(z.reshape(-1, len(x), 3).shape[0] * len(x))

    pair = PyroPair(TRUTH.model, guide)
    pair.prepare(X)
    drawn.clear()
    log_w = log_weights(pair, X, num_particles, max_rows=max_rows)
    assert sum(drawn) == num_particles * len(X)
    assert LOG_P < 0
    exactly(bounds.iwae(log_w), TRUTH.log_prob(X))
    assert IWAE(num_particles).loss(pair.model, pair.guide, X) == pytest.approx(-LOG_P)


# ------------------------------------------------------------------------------ scvi-tools


def test_scvis_marginal_ll_draws_ceil_n_over_chunk_chunks_and_divides_by_n():
    """100 draws in chunks of 30 are 120, whose sum over 100 adds log 1.2 = 0.18 nats."""
    log_w = log_weights(TRUTH.pair(), X, 120)
    scvis = log_w.logsumexp(0) - math.log(100)
    exactly(scvis, TRUTH.log_prob(X) + math.log(1.2))
    chunked = log_weights(TRUTH.pair(), X, 100, max_rows=30)
    assert chunked.shape == (100, 8)
    exactly(bounds.iwae(chunked), TRUTH.log_prob(X))
    bound = evaluate(TRUTH.pair(), X, 100, grid=[100]).per_datum["bound"].values
    exactly(torch.tensor(bound[-1]), TRUTH.log_prob(X))


# ------------------------------------------------------------------------------ PyTorch-VAE


@pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg"])
def test_pytorch_vaes_iwae_weighs_the_worst_samples_most(gradient):
    """Its weights are those of the loss: softmax(-log w). The model's gradient must have w~."""
    means: list[Tensor] = []

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
            means.append((z @ TRUTH.W.T).detach().requires_grad_())
            pyro.sample("x", dist.Normal(means[-1] + TRUTH.b, TRUTH.sigma).to_event(1), obs=x)

    objective = IWAE(6, gradient)
    objective.loss(model, broad_guide, X)
    pyro.set_rng_seed(1)
    log_w = PyroPair(model, broad_guide).draw(X, 6).log_weights.detach()
    pyro.set_rng_seed(1)
    objective.differentiable_loss(model, broad_guide, X).backward()
    of_each = (X - means[-1] - TRUTH.b).detach() / TRUTH.sigma**2  # d log p(x | z) / d mean
    share = (-means[-1].grad / of_each).mean(-1)
    exactly(share, log_w.softmax(0))
    assert torch.equal(share.argmax(0), log_w.argmax(0))
    assert not torch.equal(share.argmax(0), (-log_w).softmax(0).argmax(0))


@pytest.mark.parametrize(
    "weighted", [ELBO(beta=4.0), ELBO(beta=0.0), ELBO(free_bits=1e4)], ids=repr
)
def test_pytorch_vae_validates_with_another_kl_weight(weighted):
    """Here both report the bound; what is weighted is labelled so, and is not for comparison."""
    plain, own = (
        fit(ppca(), X, objective, epochs=2, lr=0.0, validation=TRUTH.sample(8, seed=9))
        for objective in (ELBO(), weighted)
    )
    for column in ("train", "valid"):
        assert plain.history[column].equals(own.history[column])
    assert "train weighted" not in plain.history
    assert (own.history["train weighted"] - own.history["train"]).abs().min() > 0.5
    assert "valid weighted" not in own.history


# ------------------------------------------------------------------------------ grey levels


def test_grey_levels_under_a_bernoulli_are_no_log_probability():
    """x log p + (1 - x) log (1 - p), as in Pyro's example: at p = 1/2 it is log 1/2 wherever x is.

    So p(x) integrates to 2^-6 over [0, 1]^6.
    """
    grey, logits = torch.rand(4, 6), torch.zeros(6)
    unchecked = dist.Bernoulli(logits=logits, validate_args=False).to_event(1)
    assert_close(unchecked.log_prob(grey), torch.full((4,), -6 * math.log(2)))
    model = LatentModel(
        z=Latent(dist.Normal, 2), x=Observed(dist.Bernoulli, 6, given="z", net=MLP(5))
    )
    for refused in (partial(fit, model, grey), partial(evaluate, model, grey)):
        with pytest.raises(ValueError, match="look like grey levels, under which a Bernoulli"):
            refused()


def test_numbers_tell_how_the_data_were_binarised():
    """Bits of `round()` and fresh Bernoulli draws are other data, with other log-probabilities."""
    images = torch.rand(40, 6)
    told = set()
    for binarisation in ("threshold", "dynamic"):
        test = pvae.load_data(images, binarisation=binarisation).test
        assert set(test[:].unique().tolist()) <= {0.0, 1.0}
        found = evaluate(declare("vae"), test, 5)
        assert isinstance(found.spec, DataSpec)
        assert found.spec.binarisation == binarisation
        told.add(found.summary().attrs["data"])
    assert len(told) == 2
    assert any("threshold 1/2" in one for one in told)
    assert any("Bernoulli draws" in one for one in told)
