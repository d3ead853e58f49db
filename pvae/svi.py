"""Fit a model by stochastic variational inference.

    pair, data, objective  --fit-->  Fit: the trained model, its history, how it was made

The loop knows no model: it asks for particles, calls the objective, and steps a `torch.optim`
optimiser (Kingma & Ba 2015 by default) on mean nats per datum. After each epoch the state goes to
the run's folder, if there is one; the same call continues a run that was killed, to the same
numbers.
"""

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pyro.infer
import torch
from pyro.optim import PyroOptim
from torch.optim import Optimizer

from pvae import checkpoint
from pvae.batches import source_of
from pvae.data import DataSpec
from pvae.declare import LatentModel
from pvae.fence import fenced, resolve_device
from pvae.inference_data import fit_to_datatree
from pvae.objectives import ELBO, Objective
from pvae.pair import Pair
from pvae.particles import check_count
from pvae.refinement import FROM_THE_PRIOR, SemiAmortised
from pvae.step import Speed
from pvae.training import Run

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Fit", "fit", "load"]

LONG = 5000  # steps that save more than the ten seconds that compiling takes
SHORT = 200  # steps that save more than the half second that reading them out of Pyro takes


@dataclass(frozen=True)
class Fit:
    """A finished fit.

    Args:
        model: the trained model, the same object that was given to `fit`.
        history: one row an epoch: step, the objective on training and validation data and its
            parts by site (mean nats per datum), learning rate, seconds.
        settings: how it was made: objective, optimiser, batch size, seed, data.
        stopped: "epochs", "steps" or "patience"; "unfinished" of a run that was killed, and loaded.
        best_epoch: the epoch whose weights the model holds.
        specs: what the training data are, by column: `pvae.Data.of(new, like=fit.specs["x"])` are
            new ones with their noise and scale.
    """

    model: Pair
    history: "pd.DataFrame"
    settings: dict[str, Any]
    stopped: str
    best_epoch: int
    specs: dict[str, DataSpec] = field(default_factory=dict, repr=False)

    def summary(self) -> "pd.DataFrame":
        """How it was made and what came out, one row each."""
        import pandas as pd

        best: Any = self.history.loc[self.best_epoch] if len(self.history) else {}
        rows = {
            "model": self.model.name,
            "objective": self.settings["objective"],
            "data": self.settings["data"],
            "epochs": len(self.history),
            "stopped by": self.stopped,
            "weights of epoch": self.best_epoch,
            **{f"{key} (nats per datum)": best[key] for key in self._bounds()},
            "seconds": self.history["seconds"].sum() if len(self.history) else 0.0,
        }
        return pd.DataFrame({"value": pd.Series(rows, dtype=object)})

    def to_datatree(
        self,
        data: Any = None,
        num_samples: int = 200,
        *,
        num_prior: int | None = None,
        weights: Literal["resample"] | None = None,
        seed: int = 0,
    ) -> "xr.DataTree":
        """Draws of the trained model for ArviZ, with the history and settings of the fit.

        Args:
            data: rows to draw latents for; a fit keeps none of its own. Left out, the tree has
                prior draws alone.
            num_samples: as the other arguments, see `pvae.to_datatree`.
            num_prior: see there.
            weights: see there.
            seed: see there.

        Raises:
            ValueError: as there.
        """
        return fit_to_datatree(
            self, data, num_samples, num_prior=num_prior, weights=weights, seed=seed
        )

    def _bounds(self) -> list[str]:
        """Columns of the history that are bounds or the objective, and not parts of one."""
        if not len(self.history):
            return []
        columns = map(str, self.history)
        return [c for c in columns if c.startswith(("train", "valid")) and "[" not in c]

    def __repr__(self) -> str:
        return f"Fit of {self.model.name}\n{self.summary().to_string(header=False)}"

    def _repr_html_(self) -> str:
        return self.summary().to_html(header=False)


def fit(
    model: Pair,
    data: Any,
    objective: pyro.infer.ELBO | None = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: Callable[..., Optimizer] = torch.optim.Adam,
    scheduler: Callable[[Optimizer], Any] | None = None,
    clip_norm: float | None = None,
    validation: Any = None,
    patience: int | None = None,
    device: str | torch.device = "auto",
    compile: bool | Literal["auto"] = "auto",
    seed: int = 0,
    progress: bool = True,
    folder: str | os.PathLike[str] | None = None,
) -> Fit:
    """Train a model and its guide, in place.

    Args:
        model: `LatentModel` or `PyroPair`.
        data: `Data`, tensor or array (N, *event), or a mapping from site names to these; what does
            not fit in memory, as a `torch.utils.data.DataLoader`, `Dataset` or `IterableDataset`
            of such rows, whose batches are then those of the fit.
        objective: what to maximise: `ELBO()` (default), `IWAE(50)`, or one of Pyro's own.
        epochs: passes over the data; 100 if `steps` is not given either.
        steps: most optimiser steps, whichever comes first.
        batch_size: data a step; the last batch of an epoch may be smaller.
        lr: learning rate, given to the optimiser.
        optimizer: a `torch.optim` class, or a function of (parameters, lr=).
        scheduler: a function from the optimiser to a `torch.optim.lr_scheduler`, stepped each
            epoch (with the validation bound, or without it the training one, negated, for
            `ReduceLROnPlateau`).
        clip_norm: largest norm of the gradient.
        validation: data on which the bound is computed after each epoch; the weights of its best
            epoch are restored at the end.
        patience: epochs without a better validation bound after which to stop.
        device: where to train; "auto" is CUDA where there is one.
        compile: whether steps run as a compiled graph, read once out of Pyro (`lowering`). That
            takes about ten seconds on a CPU, and changes the last bits of results. "auto" compiles
            fits of 5,000 steps or more; those of 200 or more it runs as the graph that is read,
            whose results are Pyro's own to the last bit.
        seed: of batches, noise and particles. The initial weights are the model's own.
        progress: show a bar.
        folder: where to keep the run. The same call continues it if it was killed.

    Returns:
        Fit, whose `model` is the one given.

    Raises:
        ValueError: for data that do not fit the model, or settings without meaning; and where the
            folder holds a run made with other settings.
        FloatingPointError: after an epoch with a NaN or infinity in loss or gradient, naming the
            step, datum and site where it was first. The model keeps its last good weights.
    """
    _check_kinds(model, objective, optimizer)
    objective = ELBO() if objective is None else objective
    if model.per_datum and not isinstance(objective, SemiAmortised):
        objective = SemiAmortised(_ours(objective), FROM_THE_PRIOR)
    if epochs is None and steps is None:
        epochs = 100
    if patience is not None and validation is None:
        raise ValueError(
            "`patience` counts epochs without a better validation bound: give data by "
            "`validation=` as well."
        )
    if compile not in (True, False, "auto"):
        raise ValueError(f"`compile` must be True, False or 'auto', got {compile!r}.")
    counts = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "patience": patience}
    for name, value in counts.items():
        if value is not None:
            check_count(name, value)
    place = resolve_device(device)
    source = source_of(model, data, batch_size, seed, place)
    run = Run(model, objective, source, optimizer, lr, clip_norm, seed)
    _check_objective(model, objective)
    _check_optimizer(run.optimizer)
    run.scheduler = None if scheduler is None else scheduler(run.optimizer)
    if validation is not None:
        run.validation = model.columns(validation).realised().to(place)
    speed = _speed(run, epochs, steps, compile)
    settings = run.settings(lr, optimizer, scheduler, patience, speed == "compiled")
    with fenced(seed, place):
        if folder is not None:
            run.open(folder, settings, steps, compiled_as_before=compile == "auto")
        if settings["compiled"] != (speed == "compiled"):  # a run goes on as it began
            speed = "compiled" if settings["compiled"] else "traced"
        run.train(epochs, steps, patience, progress, speed, settings)
    history = history_table(run.history)
    return Fit(model, history, settings, run.stopped, run.best_epoch, run.specs)


def _speed(
    run: Run, epochs: int | None, steps: int | None, compile: bool | Literal["auto"]
) -> Speed:
    """What pays. A rule of numbers, not of times, so that a fit can be repeated."""
    if compile != "auto":
        return "compiled" if compile else "eager"
    if not isinstance(run.objective, Objective):
        return "eager"
    if run.source.num_batches is None:  # of a stream, whose length nobody knows
        return "traced"
    planned = math.inf if epochs is None else epochs * run.source.num_batches
    planned = min(planned, math.inf if steps is None else steps)
    return "compiled" if planned >= LONG else "traced" if planned >= SHORT else "eager"


def _check_kinds(model: Any, objective: Any, optimizer: Any) -> None:
    if not isinstance(model, Pair):
        raise TypeError(
            f"`model` must be a LatentModel or a PyroPair, got {type(model).__name__}. Wrap Pyro "
            "programs: pvae.PyroPair(vae.model, vae.guide)."
        )
    if objective is not None and not isinstance(objective, pyro.infer.ELBO):
        raise TypeError(
            f"`objective` must be an objective such as pvae.ELBO() or pyro.infer.Trace_ELBO(), got "
            f"{objective!r}."
        )
    if not callable(optimizer) or isinstance(optimizer, PyroOptim):
        raise TypeError(
            "`optimizer` must be a torch.optim class, or a function of (parameters, lr=), such as "
            f"torch.optim.Adam; got {optimizer!r}."
        )


def _ours(objective: pyro.infer.ELBO) -> Objective:
    if not isinstance(objective, Objective):
        raise ValueError(
            f"{type(objective).__name__} cannot refine the guide of each datum, which is "
            "'per-datum'. Use one of pvae's objectives, such as pvae.ELBO()."
        )
    return objective


def _check_objective(model: Pair, objective: pyro.infer.ELBO) -> None:
    sums = isinstance(objective, Objective | pyro.infer.TraceEnum_ELBO)
    if model.summed and not sums:
        raise ValueError(
            f"{type(objective).__name__} cannot sum out {', '.join(model.summed)}, which the guide "
            "does not draw. Use pvae.ELBO(), pvae.IWAE() or pyro.infer.TraceEnum_ELBO(), or add a "
            "guide entry."
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters["closure"]
    if closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} computes the loss several times in a step, and here each "
            "time has its own noise. Use a first-order optimiser, such as torch.optim.Adam."
        )


def load(folder: str | os.PathLike[str], model: Pair | None = None) -> Fit:
    """Read a run's folder: the declared model with its best weights, and the run's history.

    Args:
        folder: what `fit(..., folder=)` wrote.
        model: the model to load the weights into; needed where the declaration is code (a
            `PyroPair`, a subclass, a net of your own).

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it is damaged, or needs `model`, or the weights do not fit it.
    """
    meta, weights, training = checkpoint.read(folder)
    if model is None:
        if "sites" not in meta["declaration"]:
            code = meta["declaration"]["code"].splitlines()[0]
            raise ValueError(
                f"The run in {folder} is of {code}, which is code: build it, and pass it by "
                "`model=`."
            )
        model = LatentModel.from_json(meta["declaration"])
        floats = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
        model.to(floats[0] if floats else torch.get_default_dtype())
    state = checkpoint.unpack(meta["state"], training)
    model.prepare(state["example"])
    weights = state["best"] or weights
    _check_weights(folder, model, weights)
    model.load_state_dict(weights, strict=False)
    best_epoch = state["best_epoch"] or len(state["history"])
    return Fit(
        model=model,
        history=history_table(state["history"]),
        settings=meta["settings"],
        stopped=meta["stopped"] or "unfinished",
        best_epoch=best_epoch,
        specs={k: DataSpec.from_json(v) for k, v in meta.get("specs", {}).items()},
    )


def _check_weights(
    folder: str | os.PathLike[str], model: Pair, weights: dict[str, torch.Tensor]
) -> None:
    own = {name: tuple(t.shape) for name, t in checkpoint.module_tensors(model).items()}
    read = {name: tuple(t.shape) for name, t in weights.items()}
    if own == read:
        return
    both = own.keys() & read.keys()
    raise ValueError(
        f"The weights in {folder} do not fit {model.name!r}: missing {sorted(own.keys() - both)}, "
        f"unknown {sorted(read.keys() - both)}, of another shape "
        f"{sorted(name for name in both if own[name] != read[name])}. Build the model as it was "
        "when it was fitted."
    )


def history_table(rows: list[dict[str, Any]]) -> "pd.DataFrame":
    """One row an epoch, indexed by epoch."""
    import pandas as pd

    columns = ["epoch", "step", "train", "lr", "seconds"]
    return pd.DataFrame(rows or None, columns=None if rows else columns).set_index("epoch")
