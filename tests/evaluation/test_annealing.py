"""Annealed importance sampling against models whose log p(x) is known, and both ways."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch.testing import assert_close

import pvae
from pvae import Latent, LatentModel, Observed, PyroPair
from pvae.evaluation import annealing_run
from pvae.evaluation.annealing import betas_of, fixed_by
from pvae.evaluation.latents import Latents
from pvae.evaluation.sandwich import Sandwich
from pvae.nets import MLP, Linear
from tests.evaluation.by_hand import bound
from tests.exact import LinearGaussian, LinearMixture, Ring, TwoCategoricals

TRUTH = LinearGaussian.drawn()


class GammaPoisson:
    """z ~ Gamma(2, 1), x | z ~ Poisson(z), so that x is negative binomial; z > 0."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(x + 1.5, 1.75))

    def sample(self, num_data):
        return (
            torch.distributions.NegativeBinomial(2.0, torch.tensor(0.5))
            .sample((num_data,))
            .double()
        )

    def log_prob(self, x):
        return torch.distributions.NegativeBinomial(2.0, torch.tensor(0.5).double()).log_prob(x)

    def pair(self):
        return PyroPair(self.model, self.guide)


CASES = {
    "linear-Gaussian": (TRUTH.declared(), TRUTH),
    "its guide, off": (TRUTH.pair(2.0), TRUTH),
    "with a category summed out": (LinearMixture.drawn().declared(), LinearMixture.drawn()),
    "ring": (Ring().declared(), Ring()),
    "on the positive half-line": (GammaPoisson().pair(), GammaPoisson()),
}


def weights(model, x, **settings):
    """log w of each chain, (C, N), by way of what `ais` keeps."""
    plan = {
        "num_chains": 8,
        "num_temperatures": 20,
        "start": "prior",
        "schedule": "sigmoid",
        "leapfrog_steps": 5,
        "seed": 0,
        "compile": "auto",
        "progress": False,
    }
    from pvae.evaluation.ais import Plan

    columns = model.columns(x).realised()
    return Plan(**plan | settings).anneal(model, columns, torch.device("cpu"))[0]["log_w"]


FITTING_GUIDES = ["its guide, off", "on the positive half-line"]  # others are untrained: too heavy
WALKS = [(case, "prior") for case in CASES] + [(case, "guide") for case in FITTING_GUIDES]


@pytest.mark.parametrize("schedule", ["sigmoid", "linear", "adaptive"])
@pytest.mark.parametrize(("case", "start"), WALKS)
def test_weights_are_unbiased(case, schedule, start):
    """E[w / p(x)] = 1: over 200 data, of which each has 8 chains of its own."""
    model, truth = CASES[case]
    x = truth.sample(200)
    log_w = weights(model, x, start=start, schedule=schedule)
    ratio = (log_w - truth.log_prob(x)).exp().mean(0)
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1) < 4.5 * error
    assert error < 0.15


def test_the_gap_of_a_chain_falls_as_one_over_the_temperatures():
    """Neal 2001, section 4: half the variance of log w, 1/T of a path walked in equilibrium."""
    x, grid = TRUTH.sample(40), [32, 64, 128, 256]
    gaps = []
    for T in grid:
        log_w = weights(TRUTH.declared(), x, num_temperatures=T, leapfrog_steps=10)
        gaps.append(float((TRUTH.log_prob(x) - log_w).mean()))
    slope = torch.tensor(gaps).log().diff() / torch.tensor(grid).log().diff()
    assert slope.mean().item() == pytest.approx(-1, abs=0.25)


def test_the_result_is_an_evaluation_in_terms_of_chains():
    x = TRUTH.sample(20)
    found = pvae.ais(TRUTH.declared(), x, 32, num_temperatures=50)
    assert list(found.per_datum.particles.values) == [1, 32]
    one, all_chains = found.per_datum["bound"].mean("datum").values
    assert one < all_chains
    assert found.kind == "exact"  # as the model is linear-Gaussian, beside the bounds
    assert_close(torch.tensor(found.log_p.values), TRUTH.log_prob(x))
    text = str(found)
    assert "32 chains from the prior, annealed over 50 temperatures" in text
    assert "AIS, 1 chain " in text
    assert "AIS, 32 chains" in text
    assert 0.4 < float(found.per_datum["acceptance"].mean()) <= 1


def test_annealing_leaves_everything_as_it_was():
    model, x = Ring().declared(), Ring().sample(10)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    first = pvae.ais(model, x, 4, num_temperatures=10)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.rand(3)
    assert first.per_datum.equals(pvae.ais(model, x, 4, num_temperatures=10).per_datum)


def test_lowered_chains_are_those_of_pyro():
    model, x = LinearMixture.drawn().declared(), LinearMixture.drawn().sample(10)
    traced, eager = (weights(model, x, compile=compile) for compile in ("auto", False))
    assert_close(traced, eager, rtol=0, atol=1e-9)


class Killed(Exception):
    """Stands for a process that ends."""


@pytest.mark.parametrize("steps", [3, 12, 23, 44, 70, 95])
def test_a_run_that_was_killed_goes_on_to_the_same_numbers(tmp_path, monkeypatch, steps):
    """In the first walk, in the second, and in the second block; saved at every temperature."""
    model, x = Ring().declared(), Ring().sample(6)
    settings = {"num_chains": 4, "num_temperatures": 30, "leapfrog_steps": 3}
    monkeypatch.setattr(annealing_run, "MAX_ROWS", 12)  # three data a block
    expected = pvae.ais(model, x, **settings)
    monkeypatch.setattr(annealing_run, "SAVE_EVERY", 0.0)
    taken = 0
    step = annealing_run.Walk.step

    def counted(walk):
        nonlocal taken
        taken += 1
        if taken > steps:
            raise Killed
        step(walk)

    monkeypatch.setattr(annealing_run.Walk, "step", counted)
    with pytest.raises(Killed):
        pvae.ais(model, x, **settings, folder=tmp_path)
    monkeypatch.setattr(annealing_run.Walk, "step", step)
    found = pvae.ais(model, x, **settings, folder=tmp_path)
    assert found.per_datum.equals(expected.per_datum)
    again = pvae.ais(model, x, **settings, folder=tmp_path)  # nothing is left to do
    assert again.per_datum.equals(expected.per_datum)
    with pytest.raises(ValueError, match=r"holds another run \(another num_chains\)"):
        pvae.ais(model, x, **settings | {"num_chains": 5}, folder=tmp_path)
    (tmp_path / "annealing.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        pvae.ais(model, x, **settings, folder=tmp_path)


def test_schedules_rise_from_zero_to_one():
    for schedule in ("sigmoid", "linear"):
        betas = betas_of(schedule, 10)
        assert betas[0] == 0
        assert betas[-1] == 1
        assert (betas.diff() > 0).all()
    assert_close(betas_of("linear", 4).tolist(), [0.0, 0.25, 0.5, 0.75, 1.0])
    s = [1 / (1 + math.exp(-4 + 8 * t / 10)) for t in range(11)]
    expected = [(s[0] - v) / (s[0] - s[-1]) for v in s]
    assert_close(betas_of("sigmoid", 10).tolist(), expected)


def test_an_adaptive_schedule_takes_equal_shares_of_thermodynamic_length():
    class Found:
        betas = betas_of("linear", 100)
        state = {  # noqa: RUF012
            "spread": torch.where(betas[:-1] < 0.5, 3.0, 1.0),
            "sizes": torch.full((99, 2), 0.25),
        }

    betas, sizes = fixed_by(Found, "adaptive", 40)
    assert_close(betas[[0, 10, 20, 30, 40]].tolist(), [0.0, 1 / 6, 1 / 3, 0.5, 1.0])
    assert_close(sizes, torch.full((39, 2), 0.25))


# ------------------------------------------------------------------------------ both ways


@pytest.mark.parametrize("case", ["linear-Gaussian", "ring", "on the positive half-line"])
def test_bounds_from_both_ways_hold_log_p_between_them(case):
    model, truth = CASES[case]
    if isinstance(model, PyroPair):
        model.prepare(truth.sample(5))
    found = pvae.sandwich(model, num_data=200, num_chains=8, num_temperatures=40, seed=1)
    lower, upper = (torch.tensor(found.simulated[k].values).double() for k in ("lower", "upper"))
    gap, error = found.gap
    assert gap > 0
    drawn = simulated(model, 200, seed=1)
    log_p = truth.log_prob(drawn.double())
    for below in (log_p - lower, upper - log_p):
        error = below.std() / math.sqrt(200)
        assert below.mean() > -4.5 * error
        assert below.mean() < 0.5
    known = ["log p(x)"] if case == "linear-Gaussian" else []
    assert list(found.summary().index) == ["lower", *known, "upper", "gap"]


def simulated(model, num_data, seed):
    """What `sandwich` draws."""
    from pvae.fence import evaluating, fenced

    with evaluating(model), fenced(seed, torch.device("cpu")):
        return model.prior_predictive(num_data)["x"]


def test_the_gap_of_a_sandwich_closes_as_the_walk_is_slower():
    model = TRUTH.declared()
    gaps = [
        pvae.sandwich(model, num_data=60, num_chains=4, num_temperatures=T).gap[0] for T in (10, 80)
    ]
    assert gaps[1] < gaps[0] / 2


def test_real_data_have_a_lower_bound_alone():
    found = pvae.sandwich(
        TRUTH.declared(), TRUTH.sample(10), num_data=10, num_chains=4, num_temperatures=10
    )
    assert found.real is not None
    assert "It need not be so" in found.verdict
    assert "real" in found.summary().index


# ------------------------------------------------------------------------------ what is refused


def test_latents_move_freely_and_back():
    pair = GammaPoisson().pair()
    x = GammaPoisson().sample(4)
    pair.prepare(x)
    latents = Latents(pair, x, "A test")
    z = torch.tensor([0.5, 1.0, 2.0, 3.0]).double().expand(3, 4)
    values, log_jacobian = latents.unflatten(latents.flatten({"z": z}))
    assert_close(values["z"], z)
    assert_close(log_jacobian, z.log())  # z = exp(free)


def discrete() -> LatentModel:
    return LatentModel(
        z=Latent(dist.Bernoulli, 3),
        x=Observed(dist.Normal, 2, given="z", net=MLP(3)),
        guide={"z": Latent(dist.Bernoulli, 3, given="x", net=MLP(3))},
    )


def in_a_plate() -> PyroPair:
    def model(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 2, dim=-2):
            pyro.sample("z", dist.Normal(x.T / 2, 1.0))

    return PyroPair(model, guide)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (discrete, "moves continuous latents by their gradient, and 'z' .* is discrete"),
        (in_a_plate, "takes latents that lie in the data's plate alone"),
    ],
)
def test_latents_that_no_gradient_moves_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        pvae.ais(make(), torch.randn(4, 2), 2, num_temperatures=5)


def test_a_model_without_latents_to_move_is_refused():
    truth = TwoCategoricals.drawn()
    with pytest.raises(ValueError, match="has none that the guide draws"):
        pvae.ais(truth.declared(), truth.sample(4), 2, num_temperatures=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chains": 0}, "`num_chains` must be at least 1, got 0"),
        ({"num_temperatures": 0}, "`num_temperatures` must be at least 1, got 0"),
        ({"start": "posterior"}, "`start` must be one of 'prior', 'guide', got 'posterior'"),
        ({"schedule": "cosine"}, "`schedule` must be one of 'sigmoid', 'linear', 'adaptive'"),
        ({"compile": "yes"}, "`compile` must be one of True, False, 'auto', got 'yes'"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pvae.ais(TRUTH.declared(), TRUTH.sample(4), **settings)


def test_nan_weights_name_their_datum():
    model = LatentModel(
        z=Latent(dist.Normal, 1), x=Observed(dist.Normal, 2, given="z", net=Linear(), scale=1.0)
    )
    with torch.no_grad():
        for parameter in model.model_modules.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN or infinite for 3 of 3 data, the first is"):
        pvae.ais(model, torch.randn(3, 2), 2, num_temperatures=5)


def test_a_sandwich_has_the_exact_value_between_where_it_is_known():
    model = LinearGaussian.drawn().declared()
    found = pvae.sandwich(model, num_data=20, num_chains=4, num_temperatures=20, seed=3)
    simulated = found.simulated
    assert simulated["exact"].shape == (20,)
    assert simulated["lower"].mean() < simulated["exact"].mean() < simulated["upper"].mean()
    assert list(found.summary().index) == ["lower", "log p(x)", "upper", "gap"]


def test_angles_stay_within_half_a_turn():
    """torch calls their support real, and a decoder that is not periodic would see others."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(x.clamp(-3, 3), 3.0))

    x = torch.tensor([0.0, 1.5, 3.0, 4.5], dtype=torch.float64)
    found = pvae.ais(PyroPair(model, guide), x, 64, num_temperatures=100)
    z = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64).unsqueeze(1)
    joint = dist.VonMises(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x)
    expected = joint.logsumexp(0) + math.log(2 * math.pi / 20_000)
    assert_close(torch.tensor(found.log_p.values), expected, rtol=0, atol=0.3)


def test_a_folder_of_other_parameters_is_refused(tmp_path):
    model, x = LinearGaussian.drawn().declared(), LinearGaussian.drawn().sample(3)
    pvae.ais(model, x, 2, num_temperatures=3, folder=tmp_path)
    next(model.parameters()).data += 0.1
    with pytest.raises(ValueError, match=r"holds another run \(another parameters\)"):
        pvae.ais(model, x, 2, num_temperatures=3, folder=tmp_path)


def test_pairs_that_take_particles_one_at_a_time_have_no_chains():
    pair = PyroPair(
        LinearGaussian.drawn().model, LinearGaussian.drawn().guide, vectorize_particles=False
    )
    with pytest.raises(ValueError, match="takes particles one at a time"):
        pvae.ais(pair, LinearGaussian.drawn().sample(3), 2)


# ------------------------------------------------------------------------------ what is said


def sandwiched(*gaps, real=None, lower=-10.0, chains=8):
    """Of bounds that are these gaps apart."""
    low = np.full(len(gaps), lower)
    simulated = {"lower": ("datum", low), "upper": ("datum", low + np.array(gaps))}
    return Sandwich("model", xr.Dataset(simulated), chains, 10 * chains, real, 0.0)


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ((0.2, 0.3, 0.4), "log p(x) lies between bounds 0.30 +- 0.06 nats apart, in expectation."),
        ((-0.3, 0.1, 0.5), "the bounds of log p(x) differ by less than 0.57 nats, in expectation."),
        ((-0.5, -0.1, 0.3), "the bounds of log p(x) differ by less than 0.37 nats, in expect"),
        ((-0.4, -0.3, 0.0), "differ by less than 0.01 nats"),  # below zero by 1.9 errors
        ((-0.3, -0.3, -0.1), "cross: the upper one is below the lower one by 0.23 +- 0.07 nats, "
                             "more than chance often gives. Simulate more data."),
        ((-0.4, -0.3, -0.2), "by 0.30 +- 0.06 nats, which chance does not explain. Something is "
                             "wrong with the densities of the model, or with the support of one"),
        ((0.0, 0.0, -1e-6), "the bounds of log p(x) differ by less than 0.01 nats"),  # rounding
        ((-0.02,), "the upper bound of log p(x) is -0.02 nats from the lower, error unknown"),
        ((0.1, math.inf), "the bounds of log p(x) are infinitely far apart, in expectation."),
    ],
)  # fmt: skip
def test_a_sandwich_says_what_its_gap_and_the_error_of_it_allow(gaps, said):
    """By hand: (0.2, 0.3, 0.4) have a standard deviation of 0.1, over the root of 3."""
    assert said in sandwiched(*gaps).verdict


@pytest.mark.parametrize(("gaps", "most"), [((0.2, 0.3, 0.4), "0.42"), ((-0.3, 0.1, 0.5), "0.57")])
def test_what_a_bound_of_real_data_misses_has_the_error_of_the_gap_in_it(gaps, most):
    verdict = sandwiched(*gaps, real=bound(-5.0, -7.0)).verdict
    assert verdict.endswith(
        "if the given data are like these, the lower bound of -6.00 nats for them misses no more "
        f"than about {most} nats. It need not be so."
    )


@pytest.mark.parametrize("gaps", [(-0.4, -0.3, -0.2), (0.1, math.inf), (0.1,)])
def test_bounds_that_cross_or_have_no_error_say_nothing_of_real_data(gaps):
    assert "given data" not in sandwiched(*gaps, real=bound(-5.0, -7.0)).verdict


def test_the_title_of_a_sandwich_knows_one_from_many():
    assert sandwiched(0.1, chains=1).title == (
        "model: 1 chain each way over 10 temperatures, 1 simulated datum; nats per datum"
    )
    assert "8 chains each way over 80 temperatures, 2 simulated data;" in repr(sandwiched(0.1, 0.2))
