"""Pictures, one function each: results and values in, a `matplotlib.figure.Figure` out.

    {name: Fit}          --training_curves-->    objective, reconstruction and KL against epochs
    {name: Evaluation}   --bounds-->             L_K against K, exact values, paired differences
    values (N, *event)   --samples, reconstructions, interpolations-->   images

No figure is shown or kept: a notebook displays what a cell returns, `figure.savefig` writes it.
Colours are those of Okabe & Ito 2008, which the colour-blind can tell apart.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import cycle
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvae.data import Data
from pvae.evaluation import Evaluation, compare
from pvae.svi import Fit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bounds", "interpolations", "reconstructions", "samples", "training_curves"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#595959"
SMALLEST = 0.1  # range of nats worth a picture
PAPER = 0.85  # grey level behind images
IMAGE = 0.3  # width of an image, in inches
WIDEST = 12.0  # of all images side by side, in inches
GAP = 0.12  # between images, in widths of one

Images = Tensor | Data | Mapping[str, Tensor | Data]


# ---------------------------------------------------------------------------------- curves


def training_curves(fits: Fit | Mapping[str, Fit]) -> "Figure":
    """The objective after each epoch, on training and validation data, and its two parts.

    The vertical axes leave out the steep first tenth of training. A dot marks the epoch whose
    weights the model holds.

    Args:
        fits: one fit, or several by name.

    Returns:
        A figure of three panels, in nats per datum: the objective, and the reconstruction and KL
        terms of the ELBO, over validation data where there are any.

    Raises:
        ValueError: for fits on different data, whose bounds mean different things.
    """
    named = {fits.model.name: fits} if isinstance(fits, Fit) else fits
    data = {fit.settings["data"] for fit in named.values()}
    if len(data) != 1:
        raise ValueError(
            "`training_curves` takes fits on the same data, whose bounds can be compared; got "
            f"{'; '.join(sorted(data)) or 'no fit'}. Draw a figure for each."
        )
    figure = _figure(9.6, 4.6, "Training", data.pop())
    panels = figure.subplot_mosaic([["", "reconstruction"], ["", "KL"]], width_ratios=(3, 2))
    objectives = dict.fromkeys(fit.settings["objective"] for fit in named.values())
    titles = (", ".join(objectives), "Reconstruction, E[log p(x | z)]", "KL[q(z | x) || p(z)]")
    for axes, title in zip(panels.values(), titles, strict=True):
        _clean(axes, title, "epoch", "nats per datum")
    for (name, fit), colour in zip(named.items(), cycle(COLOURS), strict=False):
        for part, axes in panels.items():
            _draw_history(axes, fit, part, name, colour)
    for axes in panels.values():
        _leave_out_the_start(axes)
    panels[""].set_xlabel("epoch (thick: validation, where there is any; thin: training)")
    panels[""].legend(frameon=False, fontsize=8)
    return figure


def _draw_history(axes: "Axes", fit: Fit, part: str, name: str, colour: str) -> None:
    """The objective (part ""), or the terms of one kind together, where the history has any."""
    split = "valid" if "valid" in fit.history else "train"
    pattern = rf"^{split} {part}\[" if part else f"^{split}$"
    curve = fit.history.filter(regex=pattern).sum(axis=1, min_count=1)
    if part:
        axes.plot(curve, color=colour)
        return
    axes.plot(curve, color=colour, label=name)
    axes.plot(fit.best_epoch, curve[fit.best_epoch], "o", color=colour, markersize=5)
    if split == "valid":
        axes.plot(fit.history["train"], color=colour, linewidth=0.8, alpha=0.5)


def _leave_out_the_start(axes: "Axes") -> None:
    curves = [np.asarray(line.get_ydata()) for line in axes.lines]
    values = np.concatenate([[], *(curve[len(curve) // 10 :] for curve in curves)])
    values = values[np.isfinite(values)]
    if values.size:
        margin = 0.05 * np.ptp(values) or 1.0
        axes.set_ylim(values.min() - margin, values.max() + margin)


def bounds(results: Evaluation | Mapping[str, Evaluation]) -> "Figure":
    """L_K against K, with exact values of log p(x) as lines, and differences to the best model.

    Bars on the left are two standard errors over draws: how far L_K itself is uncertain. Those on
    the right are two standard errors over data of differences paired by datum: how far the ranking
    is. The spread of log p(x) over data, which all models share, is in neither.

    Args:
        results: one evaluation, or several by name.

    Returns:
        A figure of one panel for one model and two for several, in nats per datum.

    Raises:
        ValueError: for results that `compare` refuses.
    """
    named = {results.model: results} if isinstance(results, Evaluation) else results
    comparison = compare(named)
    colours = dict(zip(named, cycle(COLOURS), strict=False))
    panels = 1 if len(named) == 1 else 2
    width, ratios = ((6.4, (1,)), (10.0, (3, 2)))[panels - 1]
    data = f"{comparison.num_data} data of {comparison.space}"
    figure = _figure(width, 4.4, "How well log p(x) is known", data)
    left, *right = figure.subplots(1, panels, squeeze=False, width_ratios=ratios)[0]
    for name in comparison.table.index:
        _draw_bounds(left, named[name], name, colours[name])
    _finish_bounds(left, named)
    for axes in right:
        _draw_differences(axes, comparison.table, colours)
    return figure


def _draw_bounds(axes: "Axes", result: Evaluation, name: str, colour: str) -> None:
    if "bound" in result.per_datum:
        bound, error = result.per_datum["bound"], result.per_datum["bound_se"]
        axes.errorbar(
            bound["particles"].values,
            bound.mean("datum").values,
            2 * (error**2).sum("datum").values ** 0.5 / bound["datum"].size,
            color=colour,
            marker=".",
            capsize=3,
            label=name,
        )
    if result.is_exact:
        value = float(result.log_p.mean())
        axes.axhline(value, color=colour, linestyle="--", label=f"{name}, exact log p(x)")


def _finish_bounds(axes: "Axes", results: Mapping[str, Evaluation]) -> None:
    _clean(axes, "Lower bounds L_K, ± 2 s.e. over draws", "particles K", "nats per datum")
    low, high = axes.get_ylim()
    if high - low < SMALLEST:  # an exact guide leaves nothing to see but rounding
        axes.set_ylim((low + high - SMALLEST) / 2, (low + high + SMALLEST) / 2)
    grids = [r.per_datum["particles"].values for r in results.values() if "bound" in r.per_datum]
    sizes = sorted({int(size) for grid in grids for size in grid})
    axes.set_xscale("log")
    is_elbo = all(result.label(1) == "ELBO" for result in results.values())
    axes.set_xticks(sizes, [f"{k}\n(ELBO)" if k == 1 and is_elbo else f"{k}" for k in sizes])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)


def _draw_differences(axes: "Axes", table: "pd.DataFrame", colours: Mapping[str, str]) -> None:
    axes.axvline(0, color=GREY, linewidth=0.8)
    for row, name in enumerate(table.index):
        difference, error = table[["difference", "se of difference"]].loc[name]
        axes.errorbar(difference, row, xerr=2 * error, fmt="o", color=colours[name], capsize=3)
    axes.set_yticks(range(len(table)), table.index)
    axes.set_ylim(len(table) - 0.5, -0.5)  # the best on top
    _clean(axes, "Log p(x) less that of the best, ± 2 s.e.", "nats per datum, paired by datum", "")


# ---------------------------------------------------------------------------------- images


def samples(
    values: Images, image_shape: tuple[int, ...] | None = None, subtitle: str = ""
) -> "Figure":
    """Images in squares, such as draws from p(x); data beside them show what to expect.

    Args:
        values: (N, *event), or several by name; a `Data` is drawn as a model sees it.
        image_shape: (height, width) or (channels, height, width); may be left out where a `Data`
            among the values knows it.
        subtitle: what the values are, such as `data.spec.space()`.

    Raises:
        ValueError: for values that are no such images.
    """
    named = _by_name(values, "values")
    shape = image_shape or _known_shape(named)
    blocks = {
        name: _rows(value, shape, name, math.isqrt(len(value) - 1) + 1)
        for name, value in named.items()
    }
    return _gallery("Samples", subtitle, blocks)


def reconstructions(
    data: Tensor | Data,
    means: Images,
    image_shape: tuple[int, ...] | None = None,
    subtitle: str = "",
) -> "Figure":
    """A row of data, and below it a row of each model's means of p(x | z), z from q(z | x).

    Args:
        data: (N, *event); a `Data` is drawn as a model sees it.
        means: (N, *event), or several by name; what `model.reconstruct(data)` gives for a site.
        image_shape: (height, width) or (channels, height, width); may be left out where a `Data`
            knows it.
        subtitle: what the data are, such as `data.spec.space()`.

    Raises:
        ValueError: for values that are no such images, or a number of them other than of data.
    """
    named = {"data": data, **_by_name(means, "model")}
    for name, value in named.items():
        if len(value) != len(data):
            raise ValueError(
                f"Each datum needs its reconstruction: got {len(data)} data, and {len(value)} "
                f"images of {name!r}."
            )
    shape = image_shape or _known_shape(named)
    images = torch.cat([_rows(v, shape, name, len(data)) for name, v in named.items()])
    return _gallery("Reconstructions", subtitle, {"images": images}, list(named))


def interpolations(
    means: Tensor | Mapping[str, Tensor], image_shape: tuple[int, ...], subtitle: str = ""
) -> "Figure":
    """Each row decodes points on the line between the codes of two data.

    Args:
        means: (steps, N, *event), or several by name; what `model.interpolate` gives for a site.
        image_shape: (height, width) or (channels, height, width).
        subtitle: what the data are, such as `data.spec.space()`.

    Raises:
        ValueError: for values that are no such images.
    """
    blocks = {
        name: _rows(value.transpose(0, 1).flatten(0, 1), image_shape, name, len(value))
        for name, value in _by_name(means, "model").items()
    }
    return _gallery("Interpolations between the codes of two data", subtitle, blocks)


def _by_name(values: Any, name: str) -> dict[str, Any]:
    return dict(values) if isinstance(values, Mapping) else {name: values}


def _known_shape(named: Mapping[str, Tensor | Data]) -> tuple[int, ...]:
    """The images' shape, from the first data that know it."""
    for value in named.values():
        if isinstance(value, Data) and value.spec.image_shape:
            return value.spec.image_shape
    raise ValueError(
        "`image_shape` is needed, (height, width) or (channels, height, width): no `Data` of "
        f"images among {', '.join(map(repr, named))} tells it."
    )


def _rows(values: Tensor | Data, image_shape: tuple[int, ...], name: str, columns: int) -> Tensor:
    """Values (N, *event) as rows of images, (rows, columns, channels, height, width)."""
    if isinstance(values, Data):
        values = values.realised().values
    channels, height, width = (1, *image_shape) if len(image_shape) == 2 else image_shape
    if channels not in (1, 3) or values[0].numel() != channels * height * width:
        raise ValueError(
            f"{name!r} cannot be drawn as images of shape {tuple(image_shape)}: give (height, "
            "width) or (1 or 3, height, width), with as many elements as a datum has; its data "
            f"have shape {tuple(values.shape[1:])}."
        )
    images = values.detach().cpu().float().reshape(-1, channels, height, width)
    blank = images.new_full((-len(images) % columns, channels, height, width), math.nan)
    return torch.cat([images, blank]).unflatten(0, (-1, columns))


def _gallery(
    title: str, subtitle: str, blocks: Mapping[str, Tensor], row_names: Sequence[str] = ()
) -> "Figure":
    """Blocks of images (rows, columns, channels, height, width), side by side while they fit."""
    rows, columns, _, height, width = next(iter(blocks.values())).shape
    across = max(1, min(len(blocks), int(WIDEST / (columns * IMAGE))))
    down = math.ceil(len(blocks) / across)
    figure = _figure(
        across * (columns * IMAGE + 0.15) + 0.1 * max(map(len, row_names), default=0),
        down * (rows * IMAGE * height / width + 0.3) + 0.4,
        title,
        subtitle,
    )
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (name, images) in zip(panels, blocks.items(), strict=False):
        axes.set_title(name if len(blocks) > 1 else "", fontsize=9)
        _draw_images(axes, images, row_names)
    for axes in panels[len(blocks) :]:
        axes.set_axis_off()
    return figure


def _draw_images(axes: "Axes", images: Tensor, row_names: Sequence[str]) -> None:
    """Grey levels as ink on paper, from 0 to 1, or over their own range where that is another."""
    rows, _, channels, height, width = images.shape
    gap = max(1, round(GAP * width))
    padded = torch.nn.functional.pad(images, (0, gap, 0, gap), value=math.nan)
    canvas = padded.permute(0, 3, 1, 4, 2).reshape(rows * (height + gap), -1, channels)
    low, high = np.nanquantile(images.numpy(), [0.01, 0.99])
    if low >= -0.5 and high <= 1.5:  # draws from a Normal pass the ends of [0, 1] a little
        low, high = 0.0, 1.0
    if channels == 3:
        canvas = ((canvas - low) / (high - low)).clamp(0, 1).nan_to_num(PAPER)
    axes.imshow(canvas[:-gap, :-gap].squeeze(-1).numpy(), cmap="gray_r", vmin=low, vmax=high)
    axes.set_facecolor((PAPER,) * 3)
    axes.grid(False)  # whatever the caller's style says
    axes.set_xticks([])
    middles = [row * (height + gap) + (height - 1) / 2 for row in range(len(row_names))]
    axes.set_yticks(middles, row_names)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)


# ---------------------------------------------------------------------------------- style


def _figure(width: float, height: float, title: str, subtitle: str) -> "Figure":
    """A figure with its headings; a notebook displays it without pyplot."""
    from matplotlib.figure import Figure

    lines = wrap(subtitle, round(15 * width))
    figure = Figure((width, height + 0.15 * len(lines)), layout="constrained", dpi=150)
    # The layout keeps room for the title only: line ends below it make room for the subtitle.
    figure.suptitle(title + "\n" * len(lines), fontsize=12, fontweight="bold")
    below = 1 - 0.28 / figure.get_figheight()
    figure.text(0.5, below, "\n".join(lines), fontsize=9, color=GREY, ha="center", va="top")
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _clean(axes: "Axes", title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8, colors=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.grid(alpha=0.25, linewidth=0.6)
