import dataclasses
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from pvae import models, plots
from pvae.baselines import fit_ppca
from pvae.data import Data, load_data
from pvae.evaluation import Evaluation, evaluate
from pvae.svi import Fit, fit


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return load_data("digits").test[:20]


@pytest.fixture(scope="module")
def results(x: torch.Tensor) -> dict[str, Evaluation]:
    declared = {"vae": models.vae(64, 2, (8,)), "mixture": models.mixture_of_bernoullis(64, 3)}
    return {name: evaluate(model, x, 60) for name, model in declared.items()}


def a_fit(history: dict[str, list[float]], data: str = "digits, train", best: int = 1) -> Fit:
    table = pd.DataFrame(history)
    table.index = pd.RangeIndex(1, len(table) + 1, name="epoch")
    settings = {"data": data, "objective": "ELBO(num_particles=1)"}
    return Fit(models.vae(64, 2, (8,)), table, settings, "epochs", best)


HISTORY = {
    "train": [-5.0, -4.0, -3.0],
    "train KL[z]": [1.0, 2.0, 3.0],
    "valid": [-5.5, -4.5, -4.6],
    "valid reconstruction[x]": [-4.0, -3.0, -3.0],
    "valid KL[z1]": [1.0, 1.0, 1.0],
    "valid KL[z2]": [0.5, 0.5, 0.6],
}


def lines(axes) -> list[list[float]]:
    return [list(np.asarray(line.get_ydata(), dtype=float)) for line in axes.lines]


def images(figure: Figure) -> list[np.ma.MaskedArray]:
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


# ---------------------------------------------------------------------------------- curves


def test_training_curves_show_validation_training_and_the_best_epoch():
    figure = plots.training_curves({"a": a_fit(HISTORY, best=2)})
    objective, reconstruction, kl = figure.axes
    assert lines(objective) == [HISTORY["valid"], [-4.5], HISTORY["train"]]
    assert lines(reconstruction) == [HISTORY["valid reconstruction[x]"]]
    assert lines(kl) == [[1.5, 1.5, 1.6]]  # the terms of all latents together
    assert objective.get_title(loc="left") == "ELBO(num_particles=1)"
    assert [text.get_text() for text in objective.get_legend().get_texts()] == ["a"]
    assert {axes.get_ylabel() for axes in figure.axes} == {"nats per datum"}
    assert "digits, train" in [text.get_text() for text in figure.texts]


def test_training_curves_without_validation_or_parts():
    figure = plots.training_curves(a_fit({"train": [-2.0, -1.0]}, best=2))
    objective, reconstruction, kl = figure.axes
    assert lines(objective) == [[-2.0, -1.0], [-1.0]]
    assert all(np.isnan(line).all() for axes in (reconstruction, kl) for line in lines(axes))


def test_training_curves_leave_out_the_steep_start():
    steep = {"train": [-1e6, *np.linspace(-100.0, -90.0, 29)]}
    low, high = plots.training_curves(a_fit(steep, best=30)).axes[0].get_ylim()
    assert -101 < low < -99
    assert -90 < high < -89


def test_training_curves_of_a_real_fit(x):
    result = fit(models.vae(64, 2, (8,)), x, epochs=2, validation=x, progress=False)
    objective, reconstruction, kl = plots.training_curves(result).axes
    assert lines(objective)[0] == result.history["valid"].to_list()
    assert lines(reconstruction)[0] == result.history["valid reconstruction[x]"].to_list()
    assert lines(kl)[0] == result.history["valid KL[z]"].to_list()


def test_training_curves_refuse_fits_on_different_data():
    fits = {"a": a_fit(HISTORY), "b": a_fit(HISTORY, data="mnist, train")}
    with pytest.raises(ValueError, match=r"same data.*got digits, train; mnist, train"):
        plots.training_curves(fits)
    with pytest.raises(ValueError, match="got no fit"):
        plots.training_curves({})


def test_bounds_draw_each_bound_with_its_error_over_draws(results):
    vae = results["vae"]
    left, right = plots.bounds(results).axes
    (bars,) = left.containers
    line, _, (segments,) = bars.lines
    bound, error = vae.per_datum["bound"].values, vae.per_datum["bound_se"].values
    np.testing.assert_allclose(line.get_ydata(), bound.mean(1))
    heights = [abs(np.ptp(segment[:, 1])) for segment in segments.get_segments()]
    np.testing.assert_allclose(heights, 4 * np.sqrt((error**2).sum(1)) / len(bound[0]), rtol=1e-3)
    assert [text.get_text() for text in left.get_xticklabels()] == ["1\n(ELBO)", "5", "50", "60"]
    assert left.get_xscale() == "log"
    assert [text.get_text() for text in right.get_yticklabels()] == ["mixture", "vae"]


def test_bounds_draw_exact_values_as_lines_and_paired_differences(results):
    left, right = plots.bounds(results).axes
    exact = float(results["mixture"].log_p.mean())
    dashed = [line for line in left.lines if line.get_linestyle() == "--"]
    assert [set(line.get_ydata()) for line in dashed] == [{exact}]
    assert dashed[0].get_label() == "mixture, exact log p(x)"
    difference = (results["vae"].log_p - results["mixture"].log_p).values
    line, _, (segments,) = right.containers[1].lines
    assert float(line.get_xdata()[0]) == pytest.approx(difference.mean(), abs=1e-5)
    width = np.ptp(segments.get_segments()[0][:, 0])
    expected = 4 * difference.std(ddof=1) / math.sqrt(len(difference))
    np.testing.assert_allclose(width, expected, rtol=1e-4)


def test_a_model_keeps_its_colour_in_every_picture(results):
    def colours(axes):
        return {line.get_color() for line in axes.lines if line.get_color() != plots.GREY}

    training = plots.training_curves({name: a_fit(HISTORY) for name in results})
    left, right = plots.bounds(results).axes
    assert colours(training.axes[0]) == colours(left) == colours(right) == {*plots.COLOURS[:2]}
    assert training.axes[0].get_legend().get_lines()[0].get_color() == plots.COLOURS[0]
    assert left.containers[0].lines[0].get_color() == plots.COLOURS[0]


def test_bounds_of_one_model_have_one_panel(results):
    (axes,) = plots.bounds(results["vae"]).axes
    assert axes.get_ylabel() == "nats per datum"
    (axes,) = plots.bounds(results["mixture"]).axes  # exact, and so without bounds
    assert len(axes.lines) == 1


def test_bounds_of_an_exact_guide_do_not_magnify_rounding():
    x = torch.randn(30, 4)
    exact = evaluate(fit_ppca(x, 2).to_model(), x, 60)
    (axes,) = plots.bounds(exact).axes
    assert np.ptp(axes.get_ylim()) == pytest.approx(0.1)
    assert axes.get_ylim()[0] < float(exact.log_p.mean()) < axes.get_ylim()[1]


def test_bounds_refuse_what_cannot_be_compared(results):
    other = dataclasses.replace(results["vae"], fingerprint="of other data")
    with pytest.raises(ValueError, match="different data"):
        plots.bounds({"vae": results["vae"], "other": other})


# ---------------------------------------------------------------------------------- images


def test_samples_are_laid_out_row_by_row():
    values = torch.arange(4.0).reshape(4, 1, 1).expand(4, 8, 8).reshape(4, 64) / 4
    (canvas,) = images(plots.samples(values, (8, 8)))
    assert canvas.shape == (17, 17)  # two images of 8 and a gap of 1
    np.testing.assert_array_equal(canvas[:8, :8], 0.0)
    np.testing.assert_array_equal(canvas[:8, 9:], 0.25)
    np.testing.assert_array_equal(canvas[9:, :8], 0.5)
    np.testing.assert_array_equal(canvas[9:, 9:], 0.75)
    assert canvas.mask[8].all()
    assert canvas.mask[:, 8].all()


def test_samples_by_name_have_a_panel_each_and_room_for_a_rest(x):
    figure = plots.samples({"data": x[:9], "model": x[:5]}, (8, 8), "digits, binary")
    assert [axes.get_title() for axes in figure.axes] == ["data", "model"]
    assert "digits, binary" in [text.get_text() for text in figure.texts]
    assert images(figure)[1].mask[:8, -8:].sum() == 0
    assert images(figure)[1].mask[-8:, -8:].all()  # five images leave one of six places empty


def test_colour_images():
    values = torch.tensor([1.0, 0.0, 0.5]).reshape(3, 1, 1).expand(3, 4, 4).reshape(1, -1)
    (canvas,) = images(plots.samples(values, (3, 4, 4)))
    assert canvas.shape == (4, 4, 3)
    np.testing.assert_array_equal(canvas[0, 0], [1.0, 0.0, 0.5])


@pytest.mark.parametrize(("high", "shown"), [(1.2, (0.0, 1.0)), (255.0, (0.0, 255.0))])
def test_grey_levels_are_shown_over_their_own_range(high, shown):
    values = torch.tensor([0.0, high]).repeat(128).reshape(4, 64)
    image = plots.samples(values, (8, 8)).axes[0].images[0]
    assert image.get_clim() == pytest.approx(shown)


def test_reconstructions_have_a_named_row_each(x):
    means = {"vae": 0.5 * x[:3], "other": 0.0 * x[:3]}
    figure = plots.reconstructions(x[:3], means, (8, 8))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["data", "vae", "other"]
    (canvas,) = images(figure)
    assert canvas.shape == (26, 26)
    for row, scale in enumerate((1.0, 0.5, 0.0)):
        np.testing.assert_array_equal(canvas[9 * row :][:8, :8], scale * x[0].reshape(8, 8))
    assert len(plots.reconstructions(x[:3], x[:3], (8, 8)).axes) == 1


def test_reconstructions_refuse_another_number_of_images(x):
    with pytest.raises(ValueError, match="got 3 data, and 2 images of 'vae'"):
        plots.reconstructions(x[:3], {"vae": x[:2]}, (8, 8))


def test_interpolations_run_along_rows():
    means = torch.arange(6.0).reshape(3, 2, 1).expand(3, 2, 64) / 6  # (steps, N, D)
    (canvas,) = images(plots.interpolations(means, (8, 8)))
    assert canvas.shape == (17, 26)
    corners = canvas[::9, ::9]
    np.testing.assert_allclose(corners, np.array([[0, 2, 4], [1, 3, 5]]) / 6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 9), (2, 4, 8), (3, 8, 8)])
def test_values_that_are_no_images_are_refused(x, shape):
    with pytest.raises(ValueError, match=r"'values' cannot be drawn as images of shape.*\(64,\)"):
        plots.samples(x, shape)


# ---------------------------------------------------------------------------------- figures


def test_figures_are_kept_nowhere_and_display_themselves(x, tmp_path):
    from matplotlib import _pylab_helpers

    figure = plots.samples(x, (8, 8), "a long subtitle, " * 9)
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "samples.pdf")
    assert pickle.loads(pickle.dumps(figure)).axes[0].images


def picture(figure: Figure) -> list[np.ndarray]:
    return [canvas.filled(np.nan) for canvas in images(figure)]


def test_data_are_drawn_in_place_of_a_tensor_in_the_shape_that_they_know():
    data = load_data("digits").test.subset(slice(9)).realised()
    x = data.values
    named = plots.samples({"model": x[:4], "data": data})
    rows = plots.reconstructions(data, {"vae": 0.5 * x}, subtitle="digits")
    other_way = plots.reconstructions(x, {"vae": data})
    for found, expected in (
        (plots.samples(data), plots.samples(x, (8, 8))),
        (plots.samples(data, (4, 16)), plots.samples(x, (4, 16))),
        (named, plots.samples({"model": x[:4], "data": x}, (8, 8))),
        (rows, plots.reconstructions(x, {"vae": 0.5 * x}, (8, 8))),
        (other_way, plots.reconstructions(x, {"vae": x}, (8, 8))),
    ):
        for one, other in zip(picture(found), picture(expected), strict=True):
            np.testing.assert_array_equal(one, other)


def test_data_whose_noise_is_drawn_anew_are_drawn_as_a_model_sees_them():
    data = load_data("digits", binarisation="dynamic").train.subset(slice(4))
    assert not set(data.values.unique().tolist()) <= {0.0, 1.0}
    before = torch.get_rng_state()
    (canvas,) = images(plots.samples(data))
    assert set(canvas.compressed()) == {0.0, 1.0}
    assert torch.equal(torch.get_rng_state(), before)


def test_colour_images_that_are_data_know_their_shape():
    (canvas,) = images(plots.samples(Data.of(torch.rand(1, 3, 4, 5))))
    assert canvas.shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("draw", "names"),
    [
        (lambda x: plots.samples(x), "'values'"),
        (lambda x: plots.samples({"data": Data.of(x), "vae": x}), "'data', 'vae'"),
        (lambda x: plots.reconstructions(x, x), "'data', 'model'"),
    ],
    ids=["a tensor", "a table", "tensors"],
)
def test_an_image_shape_is_asked_for_where_no_data_know_it(x, draw, names):
    expected = rf"`image_shape` is needed, .*: no `Data` of images among {names} tells it\."
    with pytest.raises(ValueError, match=expected):
        draw(x)
