"""Data of which entries are missing: log p of what was seen, and what was not seen, imputed."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

import pvae
from pvae import Given, Latent, LatentModel, Learned, Observed, exact
from pvae.data import Data, load_data
from pvae.missing import Seen
from pvae.nets import MLP, Linear, Table
from tests.exact import GaussianMixture, LinearGaussian
from tests.exact.parameters import generator, normal, with_parameters
from tests.fitting import assert_same_fit, fit, traced

NAN = math.nan
TRUTH = LinearGaussian.drawn()
MIXTURE = GaussianMixture.drawn(4, 3)


def holes(x: Tensor, seed: int = 7) -> Tensor:
    """Four tenths of all entries taken out; all of the first datum, and none of the second."""
    seen = torch.rand(x.shape, generator=generator(seed)) < 0.6
    seen[0], seen[1] = False, True
    return x.masked_fill(~seen, NAN)


def linear_gaussian(**guide: Latent) -> LatentModel:
    return TRUTH.declared(**guide).with_missing()


@pytest.fixture(scope="module")
def guided() -> LatentModel:
    """The same with a guide, broader than any posterior, that was trained on other data."""
    pyro.set_rng_seed(3)
    model = linear_gaussian(z=Latent(dist.Normal, 3, given="x", net=MLP(20), scale=1.05))
    model.model_modules.requires_grad_(False)
    settings = {"epochs": 40, "lr": 0.02, "batch_size": 100, "device": "cpu"}
    return fit(model, holes(TRUTH.sample(400, seed=50)), **settings).model


def gaussian_of_seen(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log N(x_seen; mean_seen, covariance_seen) of each row, by SciPy."""
    found = []
    for row in x:
        seen = ~row.isnan().numpy()
        own = mean.numpy()[seen], covariance.numpy()[np.ix_(seen, seen)]
        found.append(multivariate_normal(*own).logpdf(row[seen]) if seen.any() else 0.0)
    return torch.tensor(np.array(found))


def covariance() -> Tensor:
    return TRUTH.W @ TRUTH.W.T + TRUTH.sigma**2 * torch.eye(5, dtype=torch.float64)


def conditional(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, D) and variance (N, D) of p(x | x_seen), zero variance where seen."""
    C, mean, variance = covariance(), x.clone(), torch.zeros_like(x)
    for row, (m, v) in zip(x, zip(mean, variance, strict=True), strict=True):
        seen = ~row.isnan()
        gain = C[~seen][:, seen] @ torch.linalg.inv(C[seen][:, seen])
        m[~seen] = TRUTH.b[~seen] + gain @ (row[seen] - TRUTH.b[seen])
        v[~seen] = (C[~seen][:, ~seen] - gain @ C[seen][:, ~seen]).diag()
    return mean, variance


# ------------------------------------------------------------------------------ exact values


def test_a_linear_gaussian_model_has_the_marginal_of_what_was_seen():
    x = holes(TRUTH.sample(30))
    model = linear_gaussian()
    assert exact.method(model) == "linear-Gaussian"
    expected = gaussian_of_seen(x, TRUTH.b, covariance())
    assert_close(exact.log_prob(model, x), expected, rtol=0, atol=1e-9)
    result = pvae.evaluate(model, x, num_particles=20, device="cpu")
    assert_close(torch.tensor(result.per_datum["exact"].values), expected, rtol=0, atol=1e-9)


def test_its_posterior_knows_only_what_was_seen():
    x = holes(TRUTH.sample(12))
    posterior = exact.posterior(linear_gaussian(), x)["z"]
    for row, mean, S in zip(x, posterior.mean, posterior.covariance_matrix, strict=True):
        seen = ~row.isnan()
        few = LinearGaussian(TRUTH.W[seen], TRUTH.b[seen], TRUTH.sigma)
        expected = few.posterior(row[seen][None])
        assert_close(mean, expected[0][0], rtol=0, atol=1e-9)
        assert_close(S, expected[1], rtol=0, atol=1e-9)


def factor(components: int) -> Tensor:
    return 0.7 * normal(components, 4, 4, seed=3).tril() + 0.5 * torch.eye(4, dtype=torch.float64)


def low_rank() -> tuple[Tensor, Tensor]:
    return normal(3, 4, 2, seed=5), normal(3, 4, seed=6).exp()


def mixture_of(form: str) -> tuple[LatentModel, Tensor]:
    """A mixture of Gaussians with parameters, and the covariance of each component."""
    families = {
        "diagonal": (dist.Normal, {}),
        "full": (dist.MultivariateNormal, {}),
        "low rank": (dist.LowRankMultivariateNormal, {"cov_diag": Learned(1.0, 4)}),
    }
    family, options = families[form]
    W, D = low_rank()
    if form == "low rank":
        options = {"cov_factor": Learned(W[0]), "cov_diag": Learned(D[0])}
    model = LatentModel(
        c=Latent(dist.Categorical, 3, logits=Learned(MIXTURE.probs.log())),
        x=Observed(family, 4, given="c", net=Table(), missing=True, **options),
    ).double()
    x = model.module_of("x")
    x.assign("loc", MIXTURE.loc)
    if form == "diagonal":
        x.assign("scale", MIXTURE.scale)
        return model, MIXTURE.scale.square().diag_embed()
    if form == "full":
        L = factor(3)
        L = L.tril(-1) + L.diagonal(dim1=-2, dim2=-1).abs().diag_embed()
        x.assign("scale_tril", L)
        return model, L @ L.mT
    return model, (W[0] @ W[0].T + D[0].diag()).expand(3, 4, 4)


@pytest.mark.parametrize("form", ["diagonal", "full", "low rank"])
def test_a_mixture_marginalises_exactly(form):
    model, covariances = mixture_of(form)
    x = holes(MIXTURE.sample(25))
    parts = [
        math.log(p) + gaussian_of_seen(x, loc, C)
        for p, loc, C in zip(MIXTURE.probs, MIXTURE.loc, covariances, strict=True)
    ]
    expected = torch.stack(parts).logsumexp(0)
    assert_close(pvae.log_weights(model, x)[0], expected, rtol=0, atol=1e-5)
    assert_close(exact.log_prob(model, x)[0].item(), 0.0, rtol=0, atol=1e-7)


def test_a_label_of_a_mixture_is_summed_out_where_it_is_missing():
    model = LatentModel(
        c=Observed(dist.Categorical, 3, logits=MIXTURE.probs.log(), missing=True),
        x=Observed(dist.Normal, 4, given="c", net=Table(), missing=True),
    )
    model = with_parameters(model, x=(MIXTURE.loc, MIXTURE.scale.log()))
    x, c = holes(MIXTURE.sample(9)), torch.arange(9.0) % 3
    c[4:] = NAN
    parts = zip(MIXTURE.probs, MIXTURE.loc, MIXTURE.scale, strict=True)
    joint = torch.stack([p.log() + gaussian_of_seen(x, m, s.square().diag()) for p, m, s in parts])
    expected = joint.logsumexp(0)
    expected[:4] = joint[c[:4].long(), torch.arange(4)]
    data = {"c": c, "x": x}
    assert exact.method(model) == "enumeration"
    assert_close(exact.log_prob(model, data), expected, rtol=0, atol=1e-6)
    found = pvae.impute(model, data, 10, 3)
    responsibilities = (joint - joint.logsumexp(0)).exp().T
    assert_close(found.probabilities["c"][4:], responsibilities[4:], rtol=0, atol=1e-6)
    assert found.mean["c"][:4].tolist() == [0.0, 1.0, 2.0, 0.0]
    assert bool((found.draws["c"][:, :4] == c[:4]).all())


SITES = [
    dist.Bernoulli(logits=torch.randn(3, 4)),
    dist.Beta(torch.rand(3, 4) + 0.5, torch.rand(3, 4) + 0.5),
    dist.Binomial(5, torch.rand(3, 4)),
    dist.Categorical(logits=torch.randn(3, 4, 5)),
    dist.Cauchy(torch.randn(3, 4), 1.0),
    dist.ContinuousBernoulli(torch.rand(3, 4)),
    dist.Gamma(torch.rand(3, 4) + 0.5, 1.0),
    dist.LogNormal(torch.randn(3, 4), 0.5),
    dist.NegativeBinomial(3.0, torch.rand(3, 4)),
    dist.Normal(torch.randn(3, 4), 0.5),
    dist.Poisson(torch.rand(3, 4) + 0.5),
    dist.StudentT(3.0, torch.randn(3, 4), 1.0),
    dist.Uniform(torch.full((3, 4), 2.0), torch.full((3, 4), 3.0)),
    dist.ZeroInflatedPoisson(gate=torch.rand(3, 4), rate=torch.rand(3, 4) + 0.5),
]


@pytest.mark.parametrize("d", SITES, ids=lambda d: type(d).__name__)
def test_independent_entries_that_are_missing_leave_no_factor(d):
    x = d.sample().float()
    seen = torch.tensor([[True] * 4, [False] * 4, [True, False, False, True]])
    expected = (d.log_prob(x) * seen).sum(-1)
    found = Seen(d.to_event(1)).log_prob(x.masked_fill(~seen, NAN))
    assert_close(found, expected, rtol=0, atol=1e-6)
    assert found[1] == 0


# ------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("proposal", ["guide", "prior", "defensive", "refined"])
def test_weights_are_unbiased_for_what_was_seen(guided, proposal):
    x = holes(TRUTH.sample(10))
    log_w = pvae.log_weights(guided, x, 40_000, proposal=proposal, seed=5)
    relative = (log_w - gaussian_of_seen(x, TRUTH.b, covariance())).exp()
    error = relative.std(0) / math.sqrt(len(relative))
    assert bool(((relative.mean(0) - 1).abs() < 4.5 * error + 1e-6).all())
    assert float(error.max()) < 0.1, "there are enough draws for the test to tell"


def test_annealing_reaches_what_was_seen():
    x = holes(TRUTH.sample(10))
    result = pvae.ais(linear_gaussian(), x, 16, num_temperatures=100, device="cpu")
    difference = torch.tensor(result.log_p.values) - gaussian_of_seen(x, TRUTH.b, covariance())
    assert float(difference.mean().abs()) < 0.1


def test_annealing_from_the_prior_takes_labels_for_data():
    """z depends on y, and what is walked to is p(x, y) where y was seen, p(x) where not."""
    torch.manual_seed(0)
    model = LatentModel(
        y=Observed(dist.Categorical, 3, logits=torch.tensor([0.0, 1.0, 2.0]), missing=True),
        z=Latent(dist.Normal, 1, given="y", net=Table()),
        x=Observed(dist.Normal, 3, given=("z", "y"), net=MLP(4)),
    ).double()
    data = {"y": torch.tensor([0.0, 1.0, 2.0, NAN, NAN]), "x": normal(5, 3, seed=2)}
    expected = exact.log_prob(model, data)
    result = pvae.ais(model, data, 64, num_temperatures=100, start="prior", device="cpu")
    assert_close(torch.tensor(result.log_p.values), expected, rtol=0, atol=0.2)


def vae(missing: bool = True) -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Normal, 6, given="z", net=MLP(5), scale=Learned(1.0, 6), missing=missing),
    )


def labelled(missing: bool = True) -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(
        y=Observed(dist.Categorical, 3, missing=missing),
        z=Latent(dist.Normal, 2),
        x=Observed(dist.Bernoulli, 6, given=("z", "y"), net=MLP(5), missing=missing),
    )


def full(seed: int = 1) -> dict[str, Tensor]:
    y = torch.randint(3, (40,), generator=generator(seed)).float()
    return {"y": y, "x": torch.rand(40, 6, generator=generator(seed)).round()}


def partly() -> dict[str, Tensor]:
    data = full()
    return {"y": torch.where(torch.arange(40) < 15, data["y"], NAN), "x": holes(data["x"])}


def test_with_nothing_missing_all_is_as_without_the_feature_bit_for_bit():
    x = full()["x"]
    one, other = (fit(vae(m), x, pvae.IWAE(3), epochs=3, device="cpu") for m in (True, False))
    assert_same_fit(one, other)
    assert torch.equal(*(pvae.log_weights(f.model, x, 5) for f in (one, other)))


def test_labels_that_are_all_there_are_conditioned_on():
    """As where they are observed; other categories are summed over with weight zero."""
    data = full()
    one, other = (fit(labelled(m), data, epochs=3, device="cpu") for m in (True, False))
    weights = (pvae.log_weights(f.model, data, 5) for f in (one, other))
    assert_close(*weights, rtol=0, atol=1e-4)
    assert one.history["train"].iloc[-1] == pytest.approx(other.history["train"].iloc[-1], abs=1e-4)


def test_full_covariances_with_nothing_missing_are_as_they_were_bit_for_bit():
    x = MIXTURE.sample(30)
    with_holes = mixture_of("full")[0]
    without = LatentModel.from_json(with_holes.to_json())
    without.double().load_state_dict(with_holes.state_dict())
    without.sites["x"] = Observed(dist.MultivariateNormal, 4, given="c", net=Table())
    assert torch.equal(exact.log_prob(with_holes, x), exact.log_prob(without, x))


@pytest.mark.parametrize("declare", [vae, labelled])
def test_a_traced_fit_with_missing_data_is_the_eager_one(declare):
    data = partly() if declare is labelled else partly()["x"]
    eager = fit(declare(), data, pvae.IWAE(3), epochs=3, device="cpu", compile=False)
    assert_same_fit(traced(declare(), data, pvae.IWAE(3), epochs=3, device="cpu"), eager)
    assert eager.history.notna().all(axis=None)


def test_compiled_weights_are_the_same_but_for_rounding():
    model, x = labelled(), partly()
    slow, fast = (
        pvae.evaluate(model, x, 200, device="cpu", compile=compile) for compile in (False, True)
    )
    np.testing.assert_allclose(slow.log_p, fast.log_p, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "objective",
    [
        pvae.ELBO(kl="analytic", beta=0.5),
        pvae.IWAE(4, gradient="dreg"),
        pvae.ReweightedWakeSleep(4, guide="both"),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_every_kind_of_objective_learns_from_data_with_missing_entries(objective):
    history = fit(labelled(), partly(), objective, epochs=40, lr=0.02, device="cpu").history
    assert history.notna().all(axis=None)
    assert history["train"].iloc[-1] > history["train"].iloc[0] + 0.2


def test_a_loader_streams_missing_entries():
    loader = DataLoader(partly()["x"], 20)
    history = fit(vae(), loader, epochs=2, device="cpu").history
    assert history.notna().all(axis=None)


def test_results_are_named_after_the_data_and_not_after_their_labels():
    result = pvae.evaluate(labelled(), partly(), 5, device="cpu")
    assert result.spec.event_shape == (6,)
    assert result.of == "x, y"
    seen = float(sum((~values.isnan()).sum() for values in partly().values())) / 40
    assert (result.measure, result.dimensions) == ("probability", pytest.approx(seen))
    bits, nats = (float(result.summary(bits=b).loc["L_5", "value"]) for b in (True, False))
    assert bits == pytest.approx(nats / seen / math.log(2))
    assert set(result.per_datum) >= {"reconstruction[x]", "KL[z]", "KL[y]"}
    assert "reconstruction[y_seen]" not in result.per_datum


def test_a_learned_baseline_reads_zeros_for_what_is_missing():
    model = LatentModel(
        z=Latent(dist.Bernoulli, 2),
        x=Observed(dist.Bernoulli, 6, given="z", net=MLP(5), missing=True),
        guide={"z": Latent(dist.Bernoulli, 2, given="x", net=MLP(5))},
    )
    fitted = fit(model, partly()["x"], pvae.ELBO(2, baseline="learned"), epochs=2, device="cpu")
    assert fitted.history.notna().all(axis=None)


def test_what_the_guide_reads_is_zero_where_it_is_missing_and_no_category():
    model, data = labelled(), partly()
    x, y = data["x"].nan_to_num(0.0), data["y"]
    values = {"x": x, "y": y.nan_to_num(7.0)}  # which is none of 0, 1, 2
    expected = model.guide_module_of("z")(values).mean
    assert torch.equal(model.encode(data)["z"], expected)


def test_everything_else_takes_data_with_missing_entries():
    model, data = labelled(), partly()
    told = pvae.collapse(model, data, device="cpu").per_datum
    assert bool(told.notnull().all().to_array().all())
    posterior = model.posterior(data, 50)
    assert set(posterior) == {"z", "y"}
    assert bool((posterior["y"][:, :15] == data["y"][:15]).all()), "what was seen is known"
    assert len(posterior["y"][:, 15:].unique()) == 3
    for name, value in model.reconstruct(data).items():
        assert name == "x"
        assert bool(value.isfinite().all())
    chosen = {"z": torch.zeros(3, 2), "y": torch.arange(3)}
    expected = model.module_of("x")(chosen).mean
    assert torch.equal(model.decode(chosen)["x"], expected)
    tree = pvae.to_datatree(model, data, 4)
    assert bool(tree["log_likelihood"]["x"].notnull().all())
    drawn = model.prior_predictive(5)
    assert not any(value.isnan().any() for value in drawn.values())


# ------------------------------------------------------------------------------ imputation


def assert_mean(found: Tensor, expected: Tensor) -> None:
    """Of independent runs, within 4.5 standard errors."""
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all())
    assert float(error.max()) < 0.1, "there are enough draws for the test to tell"


def test_the_conditional_mean_and_spread_of_a_linear_gaussian_model_are_imputed(guided):
    x = holes(TRUTH.sample(8))
    runs = [pvae.impute(guided, x, 2000, 200, proposal="guide", seed=seed) for seed in range(20)]
    mean, variance = conditional(x)
    draws = torch.stack([run.draws["x"] for run in runs])
    assert_mean(torch.stack([run.mean["x"] for run in runs]), mean)
    assert_mean(draws.mean(1), mean)
    assert_mean((draws - mean).square().mean(1), variance)
    seen = ~x.isnan()
    assert torch.equal(runs[0].mean["x"][seen], x[seen])
    assert torch.equal(runs[0].draws["x"][:, seen], x[seen].expand(200, -1))
    assert float(runs[0].ess.min()) > 50


def regressed(x: Tensor, mean: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, D) and second moment (N, D) of N(mean, C) given the entries that are not NaN."""
    found, squares = x.clone(), x.square()
    for row, square in zip(found, squares, strict=True):
        s = ~row.isnan()
        gain = C[~s][:, s] @ torch.linalg.inv(C[s][:, s])
        square[~s] = (C[~s][:, ~s] - gain @ C[s][:, ~s]).diag()
        row[~s] = mean[~s] + gain @ (row[s] - mean[s])
        square[~s] += row[~s].square()
    return found, squares


def moments_of_mixture(x: Tensor, loc: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Of x given what was seen, component by component."""
    parts = list(zip(MIXTURE.probs, loc, covariances, strict=True))
    joint = torch.stack([p.log() + gaussian_of_seen(x, m, C) for p, m, C in parts])
    moments = [regressed(x, m, C) for _, m, C in parts]
    weights = joint.softmax(0).unsqueeze(-1)
    mean, square = (sum(w * m[i] for w, m in zip(weights, moments, strict=True)) for i in (0, 1))
    return mean, square


def assert_imputes(found: pvae.Imputation, mean: Tensor, square: Tensor) -> None:
    """Draws within 4.5 standard errors."""
    assert_close(found.mean["x"], mean, rtol=0, atol=1e-6)
    draws = found.draws["x"]
    for values, expected in ((draws, mean), (draws.square(), square)):
        error = values.std(0) / math.sqrt(len(values))
        assert bool(((values.mean(0) - expected).abs() <= 4.5 * error + 1e-6).all())


@pytest.mark.parametrize("form", ["diagonal", "full", "low rank"])
def test_a_mixture_imputes_its_exact_mean(form):
    """Entries that are correlated in a component tell of each other."""
    model, covariances = mixture_of(form)
    x = holes(MIXTURE.sample(12))
    found = pvae.impute(model, x, 3, 4000)
    assert_imputes(found, *moments_of_mixture(x, MIXTURE.loc, covariances))
    assert_close(found.ess, torch.full((12,), 3.0, dtype=torch.float64))


def test_a_linear_gaussian_model_imputes_exactly_whatever_its_guide():
    x = holes(TRUTH.sample(12))
    found = pvae.impute(linear_gaussian(), x, 1, 4000)
    mean, variance = conditional(x)
    assert_imputes(found, mean, mean.square() + variance)
    assert bool(found.ess.isinf().all())
    assert repr(found) == "Imputation of x (4000, 12, 5): draws, data, event; exact"


def test_a_mixture_of_factor_analysers_imputes_exactly():
    torch.manual_seed(4)
    model = pvae.models.mixture_of_factor_analysers(4, latent_size=2, num_components=3).double()
    model.module_of("c").assign("logits", MIXTURE.probs.log())
    x, components = holes(MIXTURE.sample(12)), model.module_of("x")({"c": torch.arange(3)})
    found = pvae.impute(model.with_missing(), x, 1, 4000)
    moments = moments_of_mixture(x, components.loc.detach(), components.covariance_matrix.detach())
    assert_imputes(found, *moments)


def test_a_mixture_behind_a_linear_decoder_imputes_exactly_whatever_its_guide():
    m, s = normal(3, 2, seed=1), normal(3, 2, seed=2).exp()
    W, b = normal(4, 2, seed=3), normal(4, seed=4)
    model = LatentModel(
        c=Latent(dist.Categorical, 3, logits=MIXTURE.probs.log()),
        z=Latent(dist.Normal, 2, given="c", net=Table()),
        x=Observed(dist.Normal, 4, given="z", net=Linear(), scale=0.5, missing=True),
    )
    model = with_parameters(model, z=(m, s.log()), x=(W, b))
    assert exact.method(model) == "linear-Gaussian"
    x = holes(MIXTURE.sample(12))
    covariances = W @ s.square().diag_embed() @ W.T + 0.25 * torch.eye(4, dtype=torch.float64)
    found = pvae.impute(model, x, 1, 4000)
    assert bool(found.ess.isinf().all())
    assert_imputes(found, *moments_of_mixture(x, m @ W.T + b, covariances))


def test_draws_are_given_the_parents_that_were_seen():
    """w | z, x is near 2 x: had x been drawn again, w would be near twice that."""
    model = LatentModel(
        z=Latent(dist.Normal, 1),
        x=Observed(dist.Normal, 1, given="z", net=Linear(), scale=1.0),
        w=Observed(dist.Normal, 1, given="x", net=Linear(), scale=0.1, missing=True),
    )
    one = torch.ones(1, 1)
    model = with_parameters(model, x=(one, 0 * one[0]), w=(2 * one, 0 * one[0]))
    data = {"x": torch.full((3, 1), 5.0), "w": torch.full((3, 1), NAN)}
    found = pvae.impute(model, data, 4000, 400, proposal="prior").draws["w"]
    error = 0.1 / math.sqrt(400)
    assert bool(((found.mean(0) - 10).abs() < 4.5 * error).all())
    assert_close(found.std(0), torch.full((3, 1), 0.1, dtype=found.dtype), rtol=0.2, atol=0)


def test_few_effective_particles_are_told():
    x = holes(TRUTH.sample(8))
    with pytest.warns(
        UserWarning, match=r"below 5 for \d+ % of data, .*: try `proposal=\"refined\""
    ):
        pvae.impute(linear_gaussian(), x, 30, 1, proposal="prior")


def test_passes_over_few_particles_each_impute_the_same(guided, monkeypatch):
    x = holes(TRUTH.sample(8))
    monkeypatch.setattr("pvae.passes.MAX_ROWS", 8 * 50)
    runs = [pvae.impute(guided, x, 1000, 400, proposal="guide", seed=seed) for seed in range(30)]
    mean, variance = conditional(x)
    draws = torch.stack([run.draws["x"] for run in runs])
    assert_mean(torch.stack([run.mean["x"] for run in runs]), mean)
    assert_mean((draws - mean).square().mean(1), variance)


def test_the_upper_half_of_digits_is_completed_from_the_lower():
    digits = load_data("digits", binarisation="threshold")
    torch.manual_seed(0)
    model = pvae.models.mixture_of_bernoullis(64, num_components=30).with_missing()
    fit(model, digits.train, epochs=15, batch_size=50, lr=0.05, device="cpu")
    lower = torch.arange(64) >= 32
    found = pvae.impute(model, digits.test.masked(lower), 1, 5).mean["x"]
    assert torch.equal(found[:, lower], digits.test[:][:, lower])
    truth = digits.test[:][:, ~lower]
    error = (found[:, ~lower] - truth).square().mean(1)
    by_mean = (digits.train[:].mean(0)[~lower] - truth).square().mean(1)
    gain = by_mean - error
    assert float(gain.mean()) > 4.5 * float(gain.std()) / math.sqrt(len(gain))


def test_the_random_state_stays_as_it_was_and_the_seed_decides():
    model, x = vae(), partly()["x"]
    before = torch.get_rng_state()
    one, same, other = (pvae.impute(model, x, 200, 2, seed=seed).draws["x"] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ------------------------------------------------------------------------------ the declaration


def test_it_survives_json_and_is_told():
    model = labelled()
    text = json.dumps(model.to_json())
    read = LatentModel.from_json(text)
    assert json.dumps(read.to_json()) == text
    read.load_state_dict(model.state_dict())
    data = partly()
    assert torch.equal(*(pvae.log_weights(m, data, 3) for m in (model, read)))
    assert "observed, summed out, where missing" in str(model)
    assert "observed, or missing" in str(model)
    assert "missing" not in json.dumps(vae(missing=False).to_json())


def test_with_missing_shares_parameters_and_leaves_the_model_as_it_was():
    model = pvae.models.vae(6, latent_size=2, hidden=(5,))
    other = model.with_missing()
    shared = zip(model.parameters(), other.parameters(), strict=True)
    assert all(one is another for one, another in shared)
    x = partly()["x"]
    assert bool(pvae.log_weights(other, x, 2).isfinite().all())
    with pytest.raises(ValueError, match="NaN or infinite"):
        pvae.log_weights(model, x, 2)
    with pytest.raises(ValueError, match="observes x, not 'z'"):
        model.with_missing("z")


def test_sites_that_do_not_factorise_are_refused():
    for family in (dist.OneHotCategorical, dist.Dirichlet):
        with pytest.raises(
            ValueError, match=rf"'x' cannot be missing: those of a {family.__name__}"
        ):
            LatentModel(x=Observed(family, 3, missing=True))
    with pytest.raises(
        ValueError, match=r"'b' is given 'a' \(Normal, event shape \(2,\)\), which would"
    ):
        LatentModel(
            a=Observed(dist.Normal, 2, missing=True),
            b=Observed(dist.Normal, 3, given="a", net=Linear()),
        )


# ------------------------------------------------------------------------------ data


def test_nan_is_refused_where_nobody_has_said_what_it_means():
    x = partly()["x"]
    for enter in (Data.of, load_data, lambda x: pvae.log_weights(vae(missing=False), x)):
        with pytest.raises(ValueError, match=r"NaN or infinite values.*missing=True"):
            enter(x)
    with pytest.raises(ValueError, match=r"Datum 0 of 'x' has entries that are missing .*Observed"):
        pvae.log_weights(vae(missing=False), Data.of(x, missing=True))
    with pytest.raises(ValueError, match="baselines take none"):
        pvae.fit_em(Data.of(x, missing=True), 2)
    conditional = LatentModel(
        y=Given(2), x=Observed(dist.Normal, 6, given="y", net=Linear(), missing=True)
    )
    y = Data.of(torch.full((40, 2), NAN), missing=True)
    with pytest.raises(ValueError, match=r"Datum 0 of 'y' .*leave those data out, or fill them in"):
        pvae.log_weights(conditional, {"x": x, "y": y})


def test_infinity_and_what_is_outside_the_support_are_refused_among_missing_entries():
    x = partly()["x"].clone()
    x[3, 2] = math.inf
    with pytest.raises(ValueError, match=r"in 1 of 40 rows, the first is row 3, place \(2\): inf"):
        pvae.log_weights(vae(), x)
    x[3, 2] = -2.0
    with pytest.raises(ValueError, match=r"Datum 3 lies outside the support"):
        pvae.log_weights(labelled(), partly() | {"x": x})


def test_only_a_declared_model_imputes():
    with pytest.raises(TypeError, match="`impute` takes a declared LatentModel, got PyroPair"):
        pvae.impute(TRUTH.pair(), TRUTH.sample(3))


def test_an_imputation_shows_its_sizes_and_on_how_many_particles_it_rests():
    model = TRUTH.declared().with_missing()
    found = pvae.impute(model, TRUTH.sample(4), 50, 3, proposal="defensive")
    assert repr(found).startswith("Imputation of x (3, 4, 5): draws, data, event; effective sample")
