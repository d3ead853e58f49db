"""What a guide's latents tell of x, unit by unit, held against closed forms."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import Normal
from torch import Tensor, nn

from pvae import Latent, LatentModel, Observed, PyroPair
from pvae.evaluation.collapse import collapse
from pvae.nets import Linear
from tests.exact import TwoCategoricals, TwoLayers
from tests.exact.linear_gaussian import identity
from tests.exact.parameters import normal
from tests.fitting import annealed_by_hand, binary, declare

GUIDED = ["gaussian_vae", "hierarchical_vae", "ppca", "vae"]


def log_det(covariance: Tensor) -> float:
    return float(torch.linalg.slogdet(covariance).logabsdet)


def value(result, row: str, column: str = "value") -> float:
    return float(result.summary().loc[row, column])


# ------------------------------------------------------------------------------ in closed form


@dataclass(frozen=True)
class Encoded:
    """x ~ N(0, C), q(z | x) = N(A x, diag s^2), p(z) = N(0, I): every quantity is a determinant."""

    A: Tensor  # (d, D)
    C: Tensor  # (D, D)
    s: Tensor  # (d,)

    @classmethod
    def drawn(cls) -> "Encoded":
        L = normal(4, 4, seed=51) / 2
        A = normal(3, 4, seed=52)
        A[2] = 0  # the last unit is collapsed
        return cls(A, L @ L.T + identity(4) / 4, torch.tensor([0.5, 0.75, 1.0]).double())

    def sample(self, num_data: int, seed: int) -> Tensor:
        return normal(num_data, 4, seed=seed) @ torch.linalg.cholesky(self.C).T

    @property
    def aggregate(self) -> Tensor:
        """Covariance of z."""
        return self.A @ self.C @ self.A.T + self.s.square().diag()

    @property
    def information(self) -> float:
        return (log_det(self.aggregate) - log_det(self.s.square().diag())) / 2

    @property
    def distance(self) -> float:
        """KL of the aggregate N(0, V) to the prior."""
        return float(self.aggregate.trace() - 3) / 2 - log_det(self.aggregate) / 2

    @property
    def unit_kl(self) -> Tensor:
        return (self.aggregate.diag() - 1 - 2 * self.s.log()) / 2

    def pair(self, vectorize_particles: bool = True) -> PyroPair:
        return PyroPair(self.model, self.guide, vectorize_particles)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(torch.zeros(3).double(), 1.0).to_event(1))
            pyro.sample("x", Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x @ self.A.T, self.s).to_event(1))


ENCODED = Encoded.drawn()


def test_kl_by_unit_is_the_closed_form_at_the_data():
    x = ENCODED.sample(50, seed=0)
    result = collapse(ENCODED.pair(), x, 2)
    by_datum = ((x @ ENCODED.A.T).square() + ENCODED.s.square() - 1 - 2 * ENCODED.s.log()) / 2
    kl, se = result.per_unit["KL[z]"], result.per_unit["KL_se[z]"]
    np.testing.assert_allclose(kl, by_datum.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(se, by_datum.std(0) / math.sqrt(50), rtol=0, atol=1e-12)
    assert kl.attrs["how"] == "closed form"
    total = result.per_datum["KL"]
    np.testing.assert_allclose(total, by_datum.sum(1), rtol=0, atol=1e-10)
    assert value(result, "KL", "se (draws)") < 1e-10
    activity = (x @ ENCODED.A.T).var(0)
    np.testing.assert_allclose(result.per_unit["activity[z]"], activity, rtol=0, atol=1e-12)


def test_one_set_of_data_tells_of_its_source():
    result = collapse(ENCODED.pair(), ENCODED.sample(600, seed=1), 4)
    kl, se = (result.per_unit[name].values for name in ("KL[z]", "KL_se[z]"))
    assert (abs(kl - ENCODED.unit_kl.numpy()) <= 4.5 * se).all()
    assert (se[:2] < 0.2 * kl[:2]).all()
    for truth, name in (
        (ENCODED.information, "I(x; z)"),
        (ENCODED.distance, "KL[q(z) || p(z)]"),
    ):
        for side, end in ((1, "at least"), (-1, "at most")):
            row = f"{name}, {end}"
            error = value(result, row, "se (data)")
            assert side * (value(result, row) - truth) < 4.5 * error
            assert abs(value(result, row) - truth) < 4.5 * error + 0.1
            assert error < 0.1 * truth


def test_two_layers_are_taken_together():
    """q(z1 | x) q(z2 | z1): z2 knows of x by way of z1 only, and adds nothing to the information.

    The guide is the posterior, so the aggregate is the prior, and KL is the model's I(x; z1).
    """
    truth = TwoLayers.drawn()
    noise = truth.t**2 * identity(len(truth.b))
    signal = truth.B @ truth.prior_covariance @ truth.B.T
    expected = (log_det(signal + noise) - log_det(noise)) / 2
    result = collapse(truth.pair(), truth.sample(600), 4)
    assert abs(value(result, "KL") - expected) < 4.5 * value(result, "KL", "se (data)")
    lower, upper = (f"I(x; z), at {end}" for end in ("least", "most"))
    assert value(result, lower) < expected + 4.5 * value(result, lower, "se (data)")
    assert value(result, upper) > expected - 4.5 * value(result, upper, "se (data)")
    assert value(result, upper) - value(result, lower) < 0.1 * expected
    assert value(result, "KL[z1]") + value(result, "KL[z2]") == pytest.approx(value(result, "KL"))
    assert result.active_units == {"z1": 3, "z2": 2}
    assert result.verdict.startswith("3 of 3 units of z1 are active; 2 of 2 units of z2 are active")


# ------------------------------------------------------------------------------ the extremes


def constant_guide(loc: float, scale: float = 1.0) -> LatentModel:
    """q(z | x) = N(loc, scale^2) for all x."""
    return LatentModel(
        z=Latent(Normal, 4),
        x=Observed(Normal, 3, given="z", net=Linear(), scale=1.0),
        guide={"z": Latent(Normal, 4, loc=loc, scale=scale)},
    )


def test_a_guide_that_is_the_prior_has_nothing_of_anything():
    result = collapse(constant_guide(0.0), torch.randn(40, 3), 3)
    for name, found in {**result.per_datum, **result.per_unit}.items():
        assert float(abs(found).max()) < 1e-10, name
    assert result.active_units == {"z": 0}
    assert result.collapsed_units == {"z": 4}
    assert not result.is_saturated
    assert result.verdict == (
        "0 of 4 units of z carry its 0.00 nats; 4 are collapsed (KL below 0.01 nats, activity "
        "below 0.01); of 0.00 nats in all, at least 0.00 +- 0.00 and at most 0.00 +- 0.00 tell of "
        "x."
    )


def test_nats_that_do_not_tell_of_x_are_told_apart():
    """KL[N(3, 1) || N(0, 1)] = 9 / 2 of each unit, and the aggregate is N(3, 1) as well."""
    result = collapse(constant_guide(3.0), torch.randn(40, 3), 3)
    np.testing.assert_allclose(result.per_unit["KL[z]"], 4.5, rtol=1e-6)
    for row in ("I(x; z), at least", "I(x; z), at most"):
        assert abs(value(result, row)) < 1e-10
    assert value(result, "KL[q(z) || p(z)], at most") == pytest.approx(18, rel=1e-6)
    assert result.collapsed_units == {"z": 0}
    assert result.verdict.startswith(
        "0 of 4 units of z carry 0 % of its 18.00 nats; 4 cost nats but do not move with x "
        "(activity below 0.01); 0 are collapsed"
    )


def test_a_guide_that_stores_the_index_saturates():
    truth = Encoded(1e4 * ENCODED.A, ENCODED.C, ENCODED.s)
    result = collapse(truth.pair(), truth.sample(50, seed=0), 2)
    found = result.per_datum["information_lower"]
    np.testing.assert_allclose(found, math.log(50), rtol=0, atol=1e-9)
    assert result.is_saturated
    assert truth.information > 2 * math.log(50)
    upper = value(result, "I(x; z), at most")
    assert upper > truth.information
    assert result.verdict.endswith(" tell of x (50 data show log N = 3.91 at most).")
    assert "at most log N = 3.91" in result.summary().loc["I(x; z), at least", "what it is"]


def test_the_verdict_counts_units():
    result = collapse(ENCODED.pair(), ENCODED.sample(100, seed=0), 2)
    kl, activity = result.per_unit["KL[z]"].values, result.per_unit["activity[z]"].values
    assert activity[2] == 0
    assert result.active_units == {"z": 2}
    assert result.collapsed_units == {"z": 1}
    lower, upper = (result.per_datum[f"information_{end}"] for end in ("lower", "upper"))
    expected = (
        f"2 of 3 units of z carry 100 % of its {kl.sum():.2f} nats; 1 are collapsed (KL below "
        f"0.01 nats, activity below 0.01); of {kl.sum():.2f} nats in all, at least "
        f"{float(lower.mean()):.2f} +- {float(lower.std(ddof=1)) / 10:.2f} and at most "
        f"{float(upper.mean()):.2f} +- {float(upper.std(ddof=1)) / 10:.2f} tell of x."
    )
    assert result.verdict == expected


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_noise_of_a_layers_mean_is_not_taken_for_activity(vectorize):
    """q(z2 | z1) depends on z1, and q(z1 | x) not on x: no unit of z2 knows of x."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("z2", Normal(z1, 1.0).to_event(1))
            pyro.sample("x", Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("z2", Normal(z1, 1.0).to_event(1))

    result = collapse(PyroPair(model, guide, vectorize), torch.randn(100, 4), 10)
    noise = 1 / 5  # the variance of a mean over five draws of z1
    assert float(abs(result.per_unit["activity[z2]"]).max()) < 4.5 * noise / math.sqrt(100)
    assert abs(value(result, "I(x; z), at least")) < 1e-4  # float32


# ------------------------------------------------------------------------------ a contract


@pytest.mark.parametrize("name", GUIDED)
def test_every_declared_model_keeps_the_contract(name):
    model = declare(name)
    result = collapse(model, binary(30), 3)
    parts = result.per_datum["information_lower"] + result.per_datum["aggregate_KL_upper"]
    np.testing.assert_allclose(parts, result.per_datum["KL"], rtol=0, atol=1e-9)
    assert (result.per_datum["information_lower"].mean() <= math.log(30)).all()
    guided = list(model.guide_sites)
    sizes = {name: math.prod(model.inputs[name].shape) for name in guided}
    assert {name: result.per_unit.sizes[f"unit of {name}"] for name in guided} == sizes
    assert set(result.active_units) == set(result.collapsed_units) == set(guided)
    units = sum(float(result.per_unit[f"KL[{name}]"].sum()) for name in guided)
    assert value(result, "KL") == pytest.approx(units, abs=1e-5)
    table = result.summary()
    assert list(table.columns) == ["value", "se (data)", "se (draws)", "unit", "what it is"]
    assert table.attrs["data"] == "tensor, values as given, 6 dimensions"
    assert result.title == (
        f"{name} on 30 data of tensor, values as given, 6 dimensions; 3 draws of the guide for each"
    )
    for text in (repr(result), result._repr_html_()):
        assert result.title in text
        assert result.verdict in text
        assert "lower bound (InfoNCE)" in text


# ------------------------------------------------------------------------------ nothing is changed


def normalised() -> LatentModel:
    """With a guide that drops units and counts batches, if it is not in evaluation mode."""
    encoder = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    return LatentModel(
        z=Latent(Normal, 3),
        x=Observed(Normal, 6, given="z", net=Linear(), scale=1.0),
        guide={"z": Latent(Normal, 3, given="x", net=encoder, scale=0.5)},
    )


@pytest.mark.parametrize(
    "make",
    [normalised, partial(declare, "hierarchical_vae"), lambda: annealed_by_hand()[0]],
    ids=["normalised", "hierarchical", "by hand"],
)
def test_everything_is_left_as_it_was(make):
    model, x = make(), binary(30)
    model.prepare(x)
    model.train()
    next(iter(model.children())).eval()  # a mixed mode, which is the caller's business
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [child.training for child in model.modules()]
    random_state = torch.get_rng_state()
    collapse(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [child.training for child in model.modules()] == modes
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert all((p.grad == 1).all() and p.requires_grad for p in model.parameters())


def test_a_seed_gives_the_same_numbers_and_another_one_others():
    x = ENCODED.sample(10, seed=0)
    one, same, other = (collapse(ENCODED.pair(), x, seed=seed) for seed in (1, 1, 2))
    assert one.per_datum.equals(same.per_datum)
    assert not one.per_datum.equals(other.per_datum)


def test_a_single_draw_has_no_error_over_draws():
    result = collapse(ENCODED.pair(), ENCODED.sample(10, seed=0), 1)
    assert math.isnan(value(result, "I(x; z), at least", "se (draws)"))
    assert not math.isnan(value(result, "I(x; z), at least", "se (data)"))
    assert result.title.endswith("; 1 draw of the guide for each")


def test_progress_is_shown_where_it_is_asked_for(capsys):
    collapse(ENCODED.pair(), ENCODED.sample(10, seed=0), progress=True)
    assert "pyro pair, log q(z | x) at all data: 100%" in capsys.readouterr().err
    collapse(ENCODED.pair(), ENCODED.sample(10, seed=0))
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------ errors


def test_latents_that_are_all_summed_out_are_refused():
    truth = TwoCategoricals.drawn()
    for model in (truth.pair(), truth.declared()):
        with pytest.raises(ValueError, match=r"has none that the guide draws: .* is summed out"):
            collapse(model, truth.sample(10))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({"device": "abacus"}, "No device 'abacus' here"),
    ],
)
def test_settings_without_meaning_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        collapse(ENCODED.pair(), ENCODED.sample(5, seed=0), **settings)


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        collapse(ENCODED.pair(), ENCODED.sample(1, seed=0))
    with pytest.raises(ValueError, match=r"must have shape \(N, 3\), got \(5, 4\)"):
        collapse(constant_guide(0.0), torch.zeros(5, 4))
