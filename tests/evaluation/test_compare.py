"""Comparisons by hand, and what may not be compared."""

import math
from dataclasses import replace

import pytest
import torch
from pyro.distributions import Bernoulli, Normal

import pvae
from pvae import compare
from pvae.data import DataSpec, load_data
from tests.evaluation.by_hand import bound, exact
from tests.exact import LinearGaussian

TRUTH = LinearGaussian.drawn()
X = TRUTH.sample(30)


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
    assert compare({"A": bound(-1.0, -2.0), "B": bound(-1.5, -2.5, K=50)}).caution == ""


def test_a_failing_khat_is_noted_where_it_matters():
    failing = compare({"A": bound(-1.0, -2.0, khat=0.9), "B": bound(-1.5, -2.5)})
    assert failing.table["k-hat too high (%)"].tolist() == [100, 0]
    expected = ["lower bound L_500, doubted by k-hat", "lower bound L_500"]
    assert failing.table["what it is"].tolist() == expected
    assert failing.caution == "where k-hat is too high, log p(x) may lie well above the bound"
    known = bound(-1.0, -2.0, khat=0.9)
    known.per_datum["exact"] = ("datum", [-1.0, -2.0])  # k-hat says nothing of an exact value
    assert compare({"A": known, "B": exact(-1.5, -2.5)}).caution == ""


def test_a_bound_whose_khat_is_unknown_is_marked():
    unknown = bound(-1.0, -2.0, khat=math.nan, K=20)
    table = compare({"few": unknown, "exact": exact(-1.5, -2.5)}).table
    assert table.loc["few", "what it is"] == "lower bound L_20, k-hat unknown"
    assert table.loc["exact", "what it is"] == "exact"


def test_a_bound_must_lead_an_exact_value_by_twice_its_error():
    """By 0.1 in the mean, with a paired error of 0.1, and of 0.02 over draws for three data."""
    low, high = (-10.0, -20.0, -30.0), (-9.7, -20.0, -30.0)
    unsure = compare({"bound": bound(*high), "exact": exact(*low)})
    assert list(unsure.table.index) == ["exact", "bound"]
    assert unsure.table["difference"].tolist() == pytest.approx([0, 0.1])
    assert unsure.table.loc["bound", "se of difference"] == pytest.approx(0.1)
    sure = compare({"exact": exact(*low), "bound": bound(-9.7, -19.7, -29.8, se=0.1)})
    assert list(sure.table.index) == ["bound", "exact"]
    noisy = compare({"exact": exact(*low), "bound": bound(-9.7, -19.7, -29.8, se=0.3)})
    assert list(noisy.table.index) == ["exact", "bound"]  # 0.27 by draws with an error of 0.17


def test_an_exact_value_passes_every_bound_that_is_not_sure():
    exacts = {"E": exact(-10.0, -20.0), "F": exact(-10.1, -20.1)}
    bounds = {
        "best": bound(-5.0, -15.0),
        "A": bound(-9.9, -19.9, se=0.2),
        "B": bound(-9.95, -19.95, se=0.2),
        "worst": bound(-11.0, -21.0),
    }
    assert list(compare(bounds | exacts).table.index) == ["best", "E", "F", "A", "B", "worst"]


def test_a_single_datum_has_the_error_of_its_draws():
    for se, order in ((0.1, ["bound", "exact"]), (0.3, ["exact", "bound"])):
        ranked = compare({"bound": bound(-4.5, se=se), "exact": exact(-5.0)}).table
        assert list(ranked.index) == order
    unknown = compare({"bound": bound(-4.5, se=math.nan), "exact": exact(-5.0)}).table
    assert list(unknown.index) == ["exact", "bound"]


def test_bits_per_dimension_are_nats_over_log_two_and_the_dimensions():
    results = {"A": bound(-8.0, -18.0, -28.0), "B": exact(-9.0, -20.0, -31.0)}
    nats, bits = compare(results), compare(results, bits=True)
    columns = ["log p(x)", "se", "difference", "se of difference"]
    factor = 3 * math.log(2)
    assert (bits.table[columns] * factor).to_numpy() == pytest.approx(
        nats.table[columns].to_numpy()
    )
    assert (nats.unit, bits.unit) == ("nats per datum", "bits per dimension")
    assert bits.table.index.tolist() == nats.table.index.tolist()
    for text in (repr(bits), bits._repr_html_()):
        assert "log p(x), bits per dimension, 3 data of tensor" in text
        assert "-8.6562" in text  # -18 nats


def test_evaluations_of_one_model_that_disagree_are_told():
    guide, ais = bound(-5.0, -6.0, -7.0), bound(-4.0, -5.0, -7.0, proposal="prior, annealed")
    told = (
        "if they are of one model, disagree beyond error: the latter puts log p(x) lower for 2 of "
        "3 data (by 1.00 nats), and of the two bounds the lower is loose"
    )
    assert compare({"guide": guide, "AIS": ais}).caution == f"'AIS' and 'guide', {told}"
    assert compare({"checked": guide.checked_by(ais)}).caution == (
        "'checked' and its check disagree beyond error: the latter puts log p(x) higher for 2 of 3 "
        "data (by 1.00 nats), and of the two bounds the lower is loose"
    )
    agreeing = bound(-5.1, -6.0, -7.1, proposal="prior, annealed")
    assert compare({"guide": guide, "AIS": agreeing}).caution == ""
    assert compare({"checked": guide.checked_by(agreeing)}).caution == ""


def test_parameters_tell_whether_evaluations_are_of_one_model():
    guide = bound(-5.0, -6.0, -7.0, parameters="these")
    ais = bound(-4.0, -5.0, -7.0, proposal="prior, annealed", parameters="these")
    assert compare({"guide": guide, "AIS": ais}).caution.startswith(
        "'AIS' and 'guide' disagree beyond error: the latter puts log p(x) lower for 2 of 3 data"
    )
    other = replace(ais, parameters="others")
    assert compare({"guide": guide, "AIS": other}).caution == ""
    unknown = compare({"guide": guide, "AIS": replace(ais, parameters="")}).caution
    assert unknown.startswith("'AIS' and 'guide', if they are of one model, disagree")


def test_evaluations_of_two_models_may_disagree():
    guide, better = bound(-5.0, -6.0), bound(-4.0, -5.0, proposal="prior")
    assert compare({"A": guide, "B": replace(better, model="another")}).caution == ""
    assert compare({"A": guide, "B": replace(better, proposal="guide")}).caution == ""
    known = [
        replace(result, per_datum=result.per_datum.assign(exact=("datum", value)))
        for result, value in ((guide, [-5.0, -6.0]), (better, [-4.0, -5.0]))
    ]
    assert compare({"A": known[0], "B": known[1]}).caution == ""


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
    expected = ["exact", "lower bound L_2, k-hat unknown", "lower bound L_30, doubted by k-hat"]
    assert table["what it is"].tolist() == expected
    by_hand = results["poor VAE"].per_datum["bound"][-1].values - TRUTH.log_prob(X).numpy()
    assert table.loc["poor VAE", "difference"] == pytest.approx(by_hand.mean())
    assert table.loc["poor VAE", "se of difference"] == pytest.approx(by_hand.std(ddof=1) / 30**0.5)
    assert table.loc["truth", "active units"] == "3 of z"
    for text in (repr(comparison), comparison._repr_html_()):
        assert "log p(x), nats per datum, 30 data of tensor, values as given, 5 dimensions" in text
        assert "poor VAE" in text
        assert comparison.caution in text


def test_one_datum_is_told_in_the_singular():
    assert ", 1 datum of tensor" in repr(compare({"only": exact(-1.0)}))


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


def test_slices_without_a_specification_are_told_of_subset():
    test = load_data("digits").test
    model = pvae.models.mixture_of_bernoullis(64, 2)
    whole, slice_ = (pvae.evaluate(model, x) for x in (test.subset(slice(20)), test[:20]))
    match = r"A slice such as `digits.test\[:100\]` is bare values, .*\.subset\(slice\(100\)\)`"
    for results in ({"A": whole, "B": slice_}, {"A": slice_, "B": whole}):
        with pytest.raises(ValueError, match=match):
            compare(results)
    other = space(binarisation="none", dequantisation="uniform")
    with pytest.raises(ValueError, match="Probabilities of bits and densities of grey levels"):
        compare({"A": exact(-1.0, spec=space()), "B": exact(-1.0, spec=other)})


@pytest.mark.parametrize(
    ("what", "changes"),
    [("bits", {}), ("noise", {"binarisation": "none", "dequantisation": "uniform"})],
)
def test_other_draws_of_the_same_data_are_told_as_that(what, changes):
    spec = space(**changes)
    match = rf"These are other draws of the {what}: evaluate both on the same\."
    with pytest.raises(ValueError, match=match):
        compare({"A": exact(-1.0, spec=spec), "B": exact(-1.0, spec=replace(spec, seed=1))})


def test_models_that_observe_different_columns_are_refused():
    x, y = torch.rand(20, 6).round(), torch.rand(20, 3).round()
    both = pvae.LatentModel(
        z=pvae.Latent(Normal, 2),
        x=pvae.Observed(Bernoulli, 6, given="z", net=pvae.nets.Linear()),
        y=pvae.Observed(Bernoulli, 3, given="z", net=pvae.nets.Linear()),
    )
    given = pvae.LatentModel(
        y=pvae.Given(3),
        z=pvae.Latent(Normal, 2),
        x=pvae.Observed(Bernoulli, 6, given=("z", "y"), net=pvae.nets.Linear()),
    )
    results = {
        name: pvae.evaluate(model, {"x": x, "y": y}, num_particles=2)
        for name, model in {"p(x, y)": both, "p(x | y)": given}.items()
    }
    with pytest.raises(ValueError, match=r"log p\(x, y\) and log p\(x \| y\) are different quan"):
        compare(results)


def test_densities_of_more_and_of_fewer_numbers_are_refused():
    wide, narrow = exact(-1.0, -2.0, dimensions=9), exact(-1.0, -2.0, dimensions=6)
    with pytest.raises(ValueError, match=r"p\(x\) is of 9 numbers a datum under the one and of 6"):
        compare({"wide": wide, "narrow": narrow})


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
