"""Comparisons by hand, and what may not be compared."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from pyro.distributions import Bernoulli, Normal

import pvae
from pvae import Evaluation, compare
from pvae.data import Data, DataSpec, load_data
from tests.exact import LinearGaussian

TRUTH = LinearGaussian.drawn()
X = TRUTH.sample(30)
SPEC = Data.of(torch.zeros(4, 3)).spec


def bound(*log_p: float, num_particles: int = 500, khat: float = 0.1, **changes) -> Evaluation:
    """An evaluation whose largest bound is `log_p`."""
    columns = {
        "bound": (("particles", "datum"), [[value - 1 for value in log_p], list(log_p)]),
        "khat": ("datum", np.full(len(log_p), khat)),
    }
    return evaluation(
        xr.Dataset(columns, {"particles": [1, num_particles]}), num_particles, **changes
    )


def exact(*log_p: float, **changes) -> Evaluation:
    return evaluation(xr.Dataset({"exact": ("datum", list(log_p))}), 0, **changes)


def evaluation(per_datum: xr.Dataset, num_particles: int, **changes) -> Evaluation:
    fields = {
        "model": "model",
        "spec": SPEC,
        "measure": "probability",
        "dimensions": 4,
        "fingerprint": "of X",
        "num_particles": num_particles,
        "proposal": "guide",
        "per_datum": per_datum,
        "per_unit": xr.Dataset(),
        "seconds": 0.0,
    }
    return Evaluation(**{**fields, **changes})


def test_models_are_ranked_with_paired_differences():
    low, high, middle = (-9.0, -20.0, -31.0), (-8.0, -18.0, -28.0), (-9.0, -18.0, -30.0)
    comparison = compare({"low": bound(*low), "high": bound(*high), "middle": bound(*middle)})
    table = comparison.table
    assert list(table.index) == ["high", "middle", "low"]
    assert table["log p(x)"].tolist() == [-18.0, -19.0, -20.0]
    assert table["se"].tolist() == pytest.approx(
        [10 / math.sqrt(3), math.sqrt((10**2 + 1**2 + 11**2) / 2 / 3), 11 / math.sqrt(3)]
    )
    assert table["difference"].tolist() == [0.0, -1.0, -2.0]
    # by datum -1, 0, -2 and -1, -2, -3: standard deviation 1, over the root of 3
    assert table["se of difference"].tolist() == pytest.approx(
        [0, 1 / math.sqrt(3), 1 / math.sqrt(3)]
    )
    assert comparison.num_data == 3
    assert comparison.space == "tensor, values as given, 3 dimensions"


def test_pairing_sees_what_the_spread_over_data_hides():
    generator = torch.Generator().manual_seed(0)
    hard = 30 * torch.randn(100, generator=generator)
    better = hard + 0.5 + 0.1 * torch.randn(100, generator=generator)
    table = compare({"A": exact(*hard.tolist()), "B": exact(*better.tolist())}).table
    assert list(table.index) == ["B", "A"]
    assert table.loc["A", "difference"] < -40 * table.loc["A", "se of difference"]
    assert abs(table.loc["A", "difference"]) < table.loc["A", "se"]


def test_exact_values_and_bounds_are_told_apart():
    mixed = compare({"A": bound(-1.0, -2.0), "B": exact(-1.5, -2.5)})
    assert mixed.table["what it is"].tolist() == ["lower bound L_500", "exact"]
    assert "a lower bound may be below its model's log p(x), an exact value is not" in mixed.caution
    assert repr(mixed).endswith(f"Note: {mixed.caution}.")
    assert compare({"A": exact(-1.0, -2.0), "B": exact(-1.5, -2.5)}).caution == ""
    assert "Note" not in repr(compare({"A": exact(-1.0, -2.0)}))


def test_a_failing_khat_is_noted_where_it_matters():
    failing = compare({"A": bound(-1.0, -2.0, khat=0.9), "B": bound(-1.5, -2.5)})
    assert failing.table["k-hat too high (%)"].tolist() == [100, 0]
    assert failing.caution == "where k-hat is too high, log p(x) may lie well above the bound"
    known = bound(-1.0, -2.0, khat=0.9)
    known.per_datum["exact"] = ("datum", [-1.0, -2.0])  # k-hat says nothing of an exact value
    assert compare({"A": known, "B": exact(-1.5, -2.5)}).caution == ""


def test_evaluations_of_models_compare():
    ppca, vae = TRUTH.declared(), pvae.models.gaussian_vae(5, 2, (4,)).double()
    results = {
        "poor VAE": pvae.evaluate(vae, X, num_particles=30),
        "truth": pvae.evaluate(ppca, X, num_particles=30),
        "its bound": pvae.evaluate(TRUTH.pair(spread=9.0), X, num_particles=2),
    }
    comparison = compare(results)
    table = comparison.table
    assert list(table.index) == ["truth", "its bound", "poor VAE"]
    assert table["what it is"].tolist() == ["exact", "lower bound L_2", "lower bound L_30"]
    by_hand = results["poor VAE"].per_datum["bound"][-1].values - TRUTH.log_prob(X).numpy()
    assert table.loc["poor VAE", "difference"] == pytest.approx(by_hand.mean())
    assert table.loc["poor VAE", "se of difference"] == pytest.approx(by_hand.std(ddof=1) / 30**0.5)
    assert table.loc["truth", "active units"] == "3 of z"
    for text in (repr(comparison), comparison._repr_html_()):
        assert "log p(x), nats per datum, 30 data of tensor, values as given, 5 dimensions" in text
        assert "poor VAE" in text
        assert comparison.caution in text


def test_one_result_is_a_table_of_one_row():
    table = compare({"only": exact(-1.0)}).table
    assert table.loc["only", "difference"] == 0
    assert math.isnan(table.loc["only", "se"])  # of a single datum


def test_how_a_datum_is_laid_out_does_not_matter():
    """Images and the same images flattened are the same observations."""
    flat, square = (load_data("digits", flatten=flatten).test for flatten in (True, False))
    vectors = pvae.evaluate(pvae.models.vae(64, 2, (4,)), flat, num_particles=2)
    deconv = pvae.nets.Deconv(4)
    conv = pvae.LatentModel(
        z=pvae.Latent(Normal, 2),
        x=pvae.Observed(Bernoulli, (1, 8, 8), given="z", net=deconv),
    )
    images = pvae.evaluate(conv, square, num_particles=2)
    assert len(compare({"vectors": vectors, "images": images}).table) == 2


# ------------------------------------------------------------------------------ refusals


def space(**changes) -> DataSpec:
    fields = load_data("digits").test.spec.to_json() | {"event_shape": [3], "image_shape": None}
    return DataSpec.from_json(fields | changes)


def test_bits_and_densities_are_refused():
    binary = exact(-90.0, -80.0, spec=space())
    continuous = exact(30.0, 40.0, spec=space(binarisation="none", dequantisation="uniform"))
    match = (
        r"'VAE' and 'MoG' cannot be compared: .* different observation spaces, digits, binary "
        r"\(.*\), 3 dimensions against digits, continuous in \[0, 1\] \(.*\), 3 dimensions\. "
        r"Probabilities of bits and densities of grey levels are different quantities"
    )
    with pytest.raises(ValueError, match=match):
        compare({"VAE": binary, "MoG": continuous})


@pytest.mark.parametrize(
    "changes",
    [{"binarisation": "threshold"}, {"seed": 1}, {"event_shape": [4]}, {"name": "mnist"}],
)
def test_any_other_space_is_refused(changes):
    one = exact(-1.0, spec=space())
    with pytest.raises(ValueError, match=r"'A' and 'C' cannot be compared: .*observation spaces"):
        compare({"A": one, "B": one, "C": exact(-1.0, spec=space(**changes))})


def test_other_data_of_the_same_space_are_refused():
    test, valid = exact(-1.0, -2.0), exact(-1.0, -2.0, -3.0, fingerprint="of Y")
    match = r"'A' and 'B' .* on different data \(2 of split 'all' against 3 of 'all'\)"
    with pytest.raises(ValueError, match=match):
        compare({"A": test, "B": valid})
    one, other = (pvae.evaluate(TRUTH.declared(), x, num_particles=2) for x in (X, X.flip(0)))
    with pytest.raises(ValueError, match=r"different data \(30 of split 'all' against 30"):
        compare({"A": one, "B": other})


def test_what_is_no_evaluation_is_refused():
    with pytest.raises(ValueError, match="at least one evaluation, by name"):
        compare({})
    with pytest.raises(TypeError, match="takes what `evaluate` returns; 'A' is float"):
        compare({"A": -90.0})


def test_a_probability_and_a_density_of_the_same_bits_are_refused():
    """A Normal around bits has a density as large as its scale is small."""
    bits = torch.rand(30, 6).round()
    kinds = {
        "a": pvae.models.mixture_of_bernoullis(6, 2),
        "b": pvae.models.mixture_of_gaussians(6, 2),
    }
    results = {name: pvae.evaluate(model, bits) for name, model in kinds.items()}
    match = r"p\(x\) is a probability under the one and a density under the other"
    with pytest.raises(ValueError, match=match):
        compare(results)


def test_results_without_names_are_refused():
    with pytest.raises(TypeError, match=r"takes evaluations by name, .* got list"):
        compare([exact(1.0, 2.0)])
