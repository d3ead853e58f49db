"""Bounds by the aggregate posterior, held against quadrature, sums and closed forms."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import (
    Categorical,
    Delta,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
)
from torch import Tensor, nn

import pvae
from pvae import Given, Latent, LatentModel, Observed, PyroPair
from pvae.evaluation import aggregate
from pvae.evaluation.collapse import collapse
from pvae.nets import Linear, Table
from tests.evaluation.test_collapse import ENCODED, value
from tests.exact.linear_gaussian import identity
from tests.exact.parameters import normal, with_parameters
from tests.fitting import annealed_by_hand, binary

NORMAL = Normal(torch.zeros((), dtype=torch.float64), 1.0)
PROBS, LOCS = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.0, 2.0]).double()
TWO_BUMPS = MixtureSameFamily(Categorical(PROBS), Normal(LOCS, 0.5))


@dataclass(frozen=True)
class OnALine:
    """q(z | x) = N(0.8 x, s^2), z one number: all that is asked for is an integral over a line.

    Where a layout has room for two numbers, x has a second column of zeros and z a second part,
    which knows of nothing and is distributed as its prior N(0, s^2).
    """

    s: float = 0.625
    num_data: int = 15

    @property
    def x(self) -> Tensor:
        return 1.5 * normal(self.num_data, 1, seed=3)

    def integrals(self, prior) -> dict[str, Tensor]:
        """By datum: of each x_n, the mean over z ~ q(z | x_n) of each log-ratio."""
        z = torch.linspace(-15, 15, 6001, dtype=torch.float64)
        log_q = Normal(0.8 * self.x, self.s).log_prob(z)  # (N, grid)
        total, N = log_q.exp().sum(0), self.num_data
        others = (total - log_q.exp()).clamp(min=1e-300)
        ratios = {
            "KL": log_q - prior.log_prob(z),
            "information_lower": log_q - (total.clamp(min=1e-300) / N).log(),
            "information_upper": log_q - (others / (N - 1)).log(),
            "aggregate_KL_upper": (total.clamp(min=1e-300) / N).log() - prior.log_prob(z),
            "aggregate_KL_lower": (others / (N - 1)).log() - prior.log_prob(z),
        }
        return {name: (log_q.exp() * r).sum(1) * 0.005 for name, r in ratios.items()}

    def pair(self, layout: str) -> PyroPair:
        vectorize = layout != "one particle at a time"
        return PyroPair(
            partial(self.program, layout, "model"),
            partial(self.program, layout, "guide"),
            vectorize,
        )

    def program(self, layout: str, which: str, x: Tensor) -> None:
        both = torch.cat([x, torch.zeros_like(x)], 1)
        loc = 0.8 * both if which == "guide" else torch.zeros_like(both)
        scale = torch.tensor([1.0 if which == "model" else self.s, self.s]).double()
        if layout in ("parts in a plate", "data in the left plate"):
            data, parts = (-1, -2) if layout == "parts in a plate" else (-2, -1)
            loc, scale = (loc.T, scale[:, None]) if data == -1 else (loc, scale)
            with pyro.plate("data", len(x), dim=data):
                with pyro.plate("parts", 2, dim=parts):
                    pyro.sample("z", Normal(loc, scale))
                self._observe(which, x if data == -2 else x.T)
        else:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", Normal(loc, scale).to_event(1))
                self._observe(which, x[:, 0])

    @staticmethod
    def _observe(which: str, x: Tensor) -> None:
        if which == "model":
            pyro.sample("x", Normal(torch.zeros_like(x), 1.0), obs=x)


def assert_within_draws(result, expected: dict[str, Tensor]) -> None:
    """The mean, and each datum, within 4.5 standard errors over draws."""
    assert set(expected) == {str(name) for name in result.per_datum if not name.endswith("_se")}
    for name, truth in expected.items():
        found = result.per_datum[name].values
        se = result.per_datum[f"{name}_se"].values
        error = math.sqrt((se**2).sum()) / len(se)
        assert abs(found.mean() - float(truth.mean())) < 4.5 * error + 1e-9, name
        assert (abs(found - truth.numpy()) < 4.5 * se + 1e-9).all(), name
        assert error < 0.02, name


@pytest.mark.parametrize(
    "layout",
    ["one event", "parts in a plate", "data in the left plate", "one particle at a time"],
)
def test_each_datums_numbers_are_integrals_wherever_its_plate_is(layout):
    truth = OnALine(num_data=8 if layout == "one particle at a time" else 15)
    num_samples = 300 if layout == "one particle at a time" else 2000
    result = collapse(truth.pair(layout), truth.x, num_samples)
    assert_within_draws(result, truth.integrals(NORMAL))
    in_plates = layout in ("parts in a plate", "data in the left plate")
    assert (set(result.per_unit) == set()) == in_plates


@pytest.mark.parametrize("prior", [TWO_BUMPS, StudentT(torch.tensor(5.0).double())], ids=str)
def test_the_distance_is_to_whatever_prior_there_is(prior):
    """One that torch has no closed form for."""
    truth = OnALine()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior.expand([len(x)]))
            pyro.sample("x", Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(0.8 * x[:, 0], truth.s))

    result = collapse(PyroPair(model, guide), truth.x, 4000)
    expected = truth.integrals(prior)
    assert_within_draws(result, expected)
    assert result.per_unit["KL[z]"].attrs["how"] == "from draws"
    found = float(result.per_unit["KL[z]"][0])
    assert abs(found - float(expected["KL"].mean())) < 4.5 * value(result, "KL", "se (draws)")


def test_a_latent_that_is_summed_out_is_summed_out_of_the_prior():
    """c has two values, z | c is a bump each: p(z) is the mixture of both."""
    truth = OnALine()
    model = LatentModel(
        c=Latent(Categorical, 2, logits=pvae.Learned(0.0, 2)),
        z=Latent(Normal, 1, given="c", net=Table(), scale=0.5),
        x=Observed(Normal, 1, given=("z", "c"), net=Linear(), scale=1.0),
        guide={"z": Latent(Normal, 1, given="x", net=Linear(), scale=0.625)},
    ).double()
    with_parameters(model, c=(PROBS.log(),), z=(LOCS[:, None],))
    with torch.no_grad():
        weight, bias = model.guide_module_of("z").parameters()
        weight.fill_(0.8), bias.fill_(0.0)
    result = collapse(model, truth.x, 4000)
    assert_within_draws(result, truth.integrals(TWO_BUMPS))


# ------------------------------------------------------------------------------ in closed form


def test_bounds_lie_on_their_sides_and_their_errors_are_their_spread():
    """Means over 80 sets of 60 data, and over 40 of 240, where the bias is smaller."""
    few, many = (
        [collapse(ENCODED.pair(), ENCODED.sample(size, seed=9 * i), 1) for i in range(sets)]
        for size, sets in ((60, 80), (240, 40))
    )
    rows = {"I(x; z), at least": -1, "I(x; z), at most": 1, "KL[q(z) || p(z)], at most": 1}
    for row, side in rows.items():
        truth = ENCODED.information if row.startswith("I") else ENCODED.distance
        values = np.array([value(result, row) for result in few])
        error = values.std(ddof=1) / math.sqrt(len(values))
        bias = side * (values.mean() - truth)
        assert bias > -4.5 * error, row
        if row.startswith("I"):  # the other varies with the data's KL, and more than that
            assert bias > 4.5 * error, row
            assert side * (np.mean([value(result, row) for result in many]) - truth) < 0.7 * bias
        told = np.mean([value(result, row, "se (data)") for result in few])
        assert 0.6 < told / values.std(ddof=1) < 1.6, row  # 80 sets know a spread to 8 %


def test_errors_over_draws_are_the_spread_over_seeds():
    x = ENCODED.sample(30, seed=5)
    runs = [collapse(ENCODED.pair(), x, 20, seed=seed) for seed in range(60)]
    for row in ("I(x; z), at least", "I(x; z), at most", "KL[q(z) || p(z)], at most"):
        spread = np.std([value(run, row) for run in runs], ddof=1)
        told = np.mean([value(run, row, "se (draws)") for run in runs])
        assert 0.6 < told / spread < 1.6, row  # 60 seeds know a spread to 9 %; 4.5 of these


def test_a_discrete_latent_of_the_guide_is_a_sum():
    q = normal(6, 3, seed=61).softmax(-1)  # of three categories, at six data

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", Categorical(torch.ones(3).double() / 3))
            pyro.sample("x", Normal(c.double(), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", Categorical(q[x.long()]))

    result = collapse(PyroPair(model, guide), torch.arange(6).double(), 2000)
    others = (q.sum(0) - q) / 5
    expected = {
        "KL": (q * (3 * q).log()).sum(1),
        "information_lower": (q * (q / q.mean(0)).log()).sum(1),
        "information_upper": (q * (q / others).log()).sum(1),
        "aggregate_KL_upper": (q * (3 * q.mean(0)).log()).sum(1),
        "aggregate_KL_lower": (q * (3 * others).log()).sum(1),
    }
    assert_within_draws(result, expected)
    assert list(result.per_unit) == ["KL[c]", "KL_se[c]"]
    assert result.active_units == {}
    assert result.verdict.startswith("1 of 1 units of c carry 100 % of its ")
    assert "; 0 are collapsed (KL below 0.01 nats); of " in result.verdict


# ------------------------------------------------------------------------------ conditional models


def conditional(prior_given: str | None) -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(
        y=Given(categories=2),
        z=Latent(Normal, 2, given=prior_given or (), net=Table() if prior_given else None),
        x=Observed(Normal, 3, given=("z", "y"), net=Linear(), scale=1.0),
        guide={"z": Latent(Normal, 2, given="x", net=Linear())},
    )


def test_where_each_datum_has_its_own_prior_there_is_no_distance_to_it(monkeypatch):
    monkeypatch.setattr(aggregate, "MAX_ROWS", 20)  # the first data looked at have one y
    columns = {"x": torch.randn(40, 3), "y": torch.arange(40) // 20}
    own, common = (collapse(conditional(given), columns) for given in ("y", None))
    assert "aggregate_KL_upper" not in own.per_datum
    assert "KL[q(z) || p(z)], at most" not in own.summary().index
    assert "information_lower" in own.per_datum
    assert "aggregate_KL_upper" in common.per_datum


# ------------------------------------------------------------------------------ all programs


def test_networks_that_take_no_particle_dimension():
    """One that flattens all but the first dimension, in the model and in the guide."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    decoder = nn.Sequential(nn.Flatten(), nn.Linear(3, 4)).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros(3).double(), 1.0).to_event(1))
            pyro.sample("x", Normal(decoder(z).reshape(-1, 2, 2), 1.0).to_event(2), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(encoder(x), 0.5).to_event(1))

    x = normal(12, 2, 2, seed=0)
    result = collapse(PyroPair(model, guide, vectorize_particles=False), x, 40)
    means = encoder(x).detach()
    by_datum = (means.square() + 0.25 - 1 - math.log(0.25)).sum(1) / 2
    np.testing.assert_allclose(result.per_datum["KL"], by_datum, rtol=0, atol=1e-10)
    assert "aggregate_KL_upper" in result.per_datum
    error = value(result, "I(x; z), at least", "se (draws)")
    q = MultivariateNormal(means, 0.25 * identity(3))
    z = q.sample((4000,))
    log_q = q.log_prob(z[:, :, None])  # (draws, N, N)
    expected = q.log_prob(z) - log_q.logsumexp(-1) + math.log(12)
    again = float(expected.std()) / math.sqrt(expected.numel())
    difference = value(result, "I(x; z), at least") - float(expected.mean())
    assert abs(difference) < 4.5 * math.hypot(error, again) < 0.15


def test_a_pair_with_networks_and_scaled_sites():
    """Scales are of the objective, and have no part in densities."""
    torch.manual_seed(0)
    pair, programs = annealed_by_hand(1.0)
    plain = collapse(pair, binary(20))
    programs.beta = 0.25
    scaled = collapse(pair, binary(20))
    assert plain.per_datum.equals(scaled.per_datum)


# ------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize("vectorize", [True, False])
def test_chunks_change_memory_and_nothing_else(monkeypatch, vectorize):
    x, pair = ENCODED.sample(23, seed=0), ENCODED.pair(vectorize)
    whole = collapse(pair, x, 3)
    monkeypatch.setattr(aggregate, "MAX_PAIRS", {"cpu": 40})
    monkeypatch.setattr(aggregate, "DRAWS_TOGETHER", 7)
    sizes = []
    original = aggregate._log_q

    def counted(*args):
        sizes.append(original(*args).numel())
        return original(*args)

    monkeypatch.setattr(aggregate, "_log_q", counted)
    few = collapse(pair, x, 3)
    assert max(sizes) <= 40
    assert sum(sizes) == 3 * 23 * 23
    for name in whole.per_datum:
        np.testing.assert_allclose(whole.per_datum[name], few.per_datum[name], rtol=0, atol=1e-10)


def test_draws_in_blocks_are_as_many_as_asked_for(monkeypatch):
    monkeypatch.setattr(aggregate, "MAX_ROWS", 10)
    x = ENCODED.sample(23, seed=0)
    result = collapse(ENCODED.pair(), x, 3)
    by_datum = ((x @ ENCODED.A.T).square() + ENCODED.s.square() - 1 - 2 * ENCODED.s.log()) / 2
    np.testing.assert_allclose(result.per_datum["KL"], by_datum.sum(1), rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------ errors


def point(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", Delta(x[:, :3]).to_event(1))


def auxiliary(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", Normal(x[:, 0], 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", Normal(a[..., None].expand(*a.shape, 3), 1.0).to_event(1))


MASKED = "'z' of 'pyro pair' is masked for some data"


def masked(program, x: Tensor) -> None:
    with pyro.poutine.mask(mask=x[:, 0] > 0):
        program(x)


@pytest.mark.parametrize(
    ("model", "guide", "match"),
    [
        (ENCODED.model, point, r"'z' of 'pyro pair' is a point under the guide \(Delta\)"),
        (ENCODED.model, auxiliary, "The guide draws 'a', which the model does not have"),
        (partial(masked, ENCODED.model), partial(masked, ENCODED.guide), MASKED),
        (partial(masked, ENCODED.model), ENCODED.guide, MASKED),
        (ENCODED.model, partial(masked, ENCODED.guide), MASKED),
    ],
)
def test_guides_without_a_density_are_refused(model, guide, match):
    with pytest.raises(ValueError, match=match):
        collapse(PyroPair(model, guide), ENCODED.sample(10, seed=0))


def test_a_guide_that_subsamples_is_refused():
    def half(program, x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=5) as index:
            z = pyro.sample("z", Normal(x.new_zeros(5), 1.0))
            if program == "model":
                pyro.sample("x", Normal(z, 1.0), obs=x[index, 0])

    pair = PyroPair(partial(half, "model"), partial(half, "guide"))
    with pytest.raises(ValueError, match=r"took 5 of 10\. Leave the batches to pvae"):
        collapse(pair, ENCODED.sample(10, seed=0))


def test_a_model_that_gives_nan_is_an_error_that_names_the_datum():
    model = pvae.models.gaussian_vae(5, 2, (4,))
    with torch.no_grad():
        for parameter in model.guide_modules.parameters():
            parameter.fill_(math.nan)
    random_state = torch.get_rng_state()
    with pytest.raises(FloatingPointError, match=r"is NaN for 6 of 6 .* first is datum 0"):
        collapse(model, torch.zeros(6, 5))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(child.training for child in model.modules())
