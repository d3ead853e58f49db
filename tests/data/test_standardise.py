"""Standardised data against scikit-learn, and their densities against closed forms."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch.distributions import MultivariateNormal

import pvae
from pvae.data import TOYS, Data, DataSpec, load_data


def rows(num: int = 40, dimensions: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(2, 3, size=(num, dimensions))


def test_the_scale_is_that_of_scikit_learn_on_train():
    plain = load_data("breast-cancer")
    scaled = load_data("breast-cancer", standardisation="columns")
    scaler = StandardScaler().fit(plain.train.values.double())
    for before, after in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(after.values, scaler.transform(before.values), atol=2e-4)
        assert torch.equal(before.labels, after.labels)
        assert after.spec.standardisation == "columns"
    np.testing.assert_allclose(scaled.test.spec.location, scaler.mean_, rtol=1e-9)
    np.testing.assert_allclose(scaled.test.spec.scale, scaler.scale_, rtol=1e-9)
    all_rows = load_breast_cancer().data  # of train alone
    assert not np.allclose(scaled.test.spec.location, all_rows.mean(0), rtol=1e-4)


def test_values_come_back_for_plots():
    plain, scaled = load_data("wine"), load_data("wine", standardisation="columns")
    back = scaled.test.spec.unstandardise(scaled.test.values)
    torch.testing.assert_close(back, plain.test.values, rtol=1e-5, atol=1e-5)
    many = scaled.test.values.expand(4, *scaled.test.values.shape)  # as samples are
    assert torch.equal(scaled.test.spec.unstandardise(many)[2], back)
    assert plain.test.spec.unstandardise(back) is back
    with pytest.raises(
        ValueError, match=r"'wine' must have shape \(..., \*\(13,\)\), got \(2, 4\)"
    ):
        scaled.test.spec.unstandardise(torch.zeros(2, 4))


def test_images_come_back_in_the_unit_interval_flat_or_not():
    options = {"dequantisation": "uniform", "standardisation": "columns"}
    flat, square = (load_data("digits", flatten=flatten, **options) for flatten in (True, False))
    plain = load_data("digits", dequantisation="uniform").test.values
    for splits in (flat, square):
        back = splits.test.spec.unstandardise(splits.test.values)
        torch.testing.assert_close(back.flatten(1), plain, rtol=0, atol=1e-6)
    assert square.test.values.shape == (360, 1, 8, 8)
    assert flat.test.spec.space() == square.test.spec.space()
    assert flat.test.fingerprint() == square.test.fingerprint()


def test_a_density_of_standardised_values_shifts_by_the_log_jacobian():
    """N(b, C) standardised is N((b - m) / s, C / s sᵀ): both log-densities are in closed form."""
    toy = TOYS["linear-gaussian"]
    train = load_data("linear-gaussian", standardisation="columns").train
    m, s = (torch.tensor(numbers) for numbers in (train.spec.location, train.spec.scale))
    m, s = m.double(), s.double()
    covariance = toy.W @ toy.W.mT + 0.25 * torch.eye(5, dtype=torch.float64)
    stored = MultivariateNormal((toy.b - m) / s, covariance / s.outer(s))
    y = train.values[:50].double()
    measured = toy.log_prob(train.spec.unstandardise(y))
    assert abs(train.spec.log_jacobian) > 0.2  # so that a wrong sign would show
    torch.testing.assert_close(
        stored.log_prob(y) + train.spec.log_jacobian, measured, rtol=0, atol=1e-6
    )


def test_the_log_jacobian_keeps_the_integral_at_one():
    """A density of measured values, carried to stored ones, still integrates to one."""
    spec = load_data("pinwheel", standardisation="columns").test.spec
    side = 8 / 400
    middle = -4 + side * (torch.arange(400, dtype=torch.float64) + 0.5)
    stored = torch.cartesian_prod(middle, middle)
    log_p = TOYS["pinwheel"].log_prob(spec.unstandardise(stored)) - spec.log_jacobian
    assert (log_p.exp().sum() * side**2).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("standardisation", ["none", "columns"])
def test_dequantised_levels_have_their_own_probabilities_back(standardisation):
    """A histogram over stored values, as a density, plus the log Jacobian is log P(level)."""
    levels = torch.tensor([0, 0, 0, 1, 255], dtype=torch.uint8).repeat(200)[:, None]
    train = load_data(levels, dequantisation="uniform", standardisation=standardisation).train
    counts = torch.bincount((train.values[:, 0] * 255).round().long(), minlength=256)
    width = 1 / 256 / (train.spec.scale or (1,))[0]  # of a level, as stored
    density = counts / counts.sum() / width
    log_p = density.log() + train.spec.log_jacobian
    expected = (counts / counts.sum()).log()
    torch.testing.assert_close(log_p[[0, 1, 255]], expected[[0, 1, 255]], rtol=0, atol=1e-5)
    stored = train.realised().values[:, 0]
    start = (0 - (train.spec.location or (0,))[0]) / (train.spec.scale or (1,))[0]
    found = torch.bincount(((stored - start) / width).floor().long(), minlength=256)
    assert torch.equal(found, counts)


@pytest.mark.parametrize(
    ("options", "log_jacobian"),
    [
        ({}, 0),
        ({"binarisation": "threshold"}, 0),
        ({"binarisation": "none"}, -64 * math.log(16)),
        ({"dequantisation": "uniform"}, -64 * math.log(17)),
    ],
)
def test_unit_scaled_grey_levels_are_accounted_for(options, log_jacobian):
    spec = load_data("digits", **options).test.spec
    assert spec.log_jacobian == pytest.approx(log_jacobian, abs=1e-9)
    assert math.copysign(1, load_data(rows()).test.spec.log_jacobian) == 1  # 0, and not -0


def test_noise_is_part_of_the_mean_and_the_deviation():
    """Train drawn anew has mean 0 and deviation 1, had without drawing: Var U[0, 1) is 1/12."""
    levels = torch.randint(0, 4, (4000, 2), dtype=torch.uint8)
    train = load_data(levels, dequantisation="uniform", standardisation="columns").train
    assert train.resampled
    draws = torch.cat([train[:] for _ in range(10)])
    assert not torch.equal(draws[:3200], draws[3200:6400])
    # The levels are the same each time, and their mean is taken out: only the noise is left.
    unit = torch.tensor(train.spec.scale) * 256
    error = (1 / 12 / len(draws)) ** 0.5 / unit
    assert (draws.mean(0).abs() / error).max() < 4.5
    assert (draws.var(0) - 1).abs().max() < 0.01
    once = train.realised()
    assert torch.equal(once.values, train.realised().values)
    assert once.values.mean(0).abs().max() < 0.03


def test_a_constant_column_is_only_centred():
    table = np.concatenate([rows(), np.full((40, 1), 0.1)], axis=1)
    splits = load_data(table, standardisation="columns")
    assert splits.train.spec.scale[3] == 1
    assert splits.train.values[:, 3].abs().max() < 1e-15
    without = load_data(table[:, :3], standardisation="columns")
    assert splits.test.spec.log_jacobian == pytest.approx(without.test.spec.log_jacobian)


def test_the_specification_tells_scales_apart_and_is_stored():
    plain, one = load_data(rows()), load_data(rows(), standardisation="columns")
    other = load_data(1.001 * rows(), standardisation="columns")
    assert one.train.spec.space() == one.test.spec.space()
    assert len({s.test.spec.space() for s in (plain, one, other)}) == 3
    assert one.test.spec.space().startswith("tensor, values as given, columns standardised (")
    assert DataSpec.from_json(json.loads(json.dumps(one.test.spec.to_json()))) == one.test.spec
    assert load_data(rows(), standardisation="columns").test.spec == one.test.spec


def test_a_fit_draws_noise_and_standardises_it_within_the_step():
    train = load_data("digits", dequantisation="uniform", standardisation="columns").train
    few = train.subset(slice(60))
    model = pvae.models.ppca(64, 2)
    fit = pvae.fit(model, few, epochs=1, batch_size=30, progress=False)
    assert math.isfinite(fit.history["train"].iloc[-1])
    result = pvae.evaluate(model, few, num_particles=2)
    assert result.spec == few.spec


def test_moving_and_choosing_keep_the_scale():
    train = load_data("digits", dequantisation="uniform", standardisation="columns").train
    moved = train.subset(slice(5)).to("meta")
    assert moved[:].device.type == "meta"
    assert isinstance(moved, Data)
    assert moved.spec == train.spec


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"standardisation": "rows"}, "`standardisation` must be one of none, columns; got 'rows'"),
        (
            {"standardisation": "columns", "binarisation": "dynamic"},
            "Bits are not standardised: got binarisation='dynamic' and standardisation='columns'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        load_data("digits", **options)


def test_grey_levels_are_standardised_without_noise_on_demand():
    spec = load_data("digits", standardisation="columns").test.spec
    assert (spec.binarisation, spec.dequantisation) == ("none", "none")
    assert spec.space().startswith("digits, 17 grey levels in [0, 1], columns standardised (")
