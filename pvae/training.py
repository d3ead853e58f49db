"""The loop behind `fit`: epochs of steps, validation after each, and a checkpoint.

    Run: model, objective, data, optimiser, history  --train-->  the same, further on

Everything that resuming needs is here, and is saved after each epoch: weights, optimiser, random
state, history. So a run killed within an epoch repeats that epoch with the same numbers.
"""

import copy
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.infer
import torch
from torch import Tensor
from torch.optim import Optimizer

from pvae import checkpoint
from pvae.batches import Source
from pvae.data import DataSpec
from pvae.declare import LatentModel
from pvae.failure import bad_datum_of_gradient, bad_parameters, bad_site, is_bad
from pvae.fence import evaluating, fenced, random_state, set_random_state
from pvae.lowering import PACKAGE, CannotLower
from pvae.objectives import ELBO, Objective
from pvae.pair import Batch, Columns, Pair
from pvae.passes import blocks
from pvae.step import PyroStep, Speed, Step, make_optimizer

__all__ = ["Run", "declaration_of"]

MAX_ROWS = 8192  # particle-datum pairs in one pass of validation


class Run:
    """The state of a fit, between its epochs."""

    scheduler: Any = None
    validation: Columns | None = None
    folder: str | os.PathLike[str] | None = None

    def __init__(
        self,
        model: Pair,
        objective: pyro.infer.ELBO,
        source: Source,
        optimizer: Callable[..., Optimizer],
        lr: float,
        clip_norm: float | None,
        seed: int,
    ):
        self.model, self.source, self.device = model, source, source.device
        self.objective: Any = objective
        if isinstance(objective, Objective):  # it may count steps, and learn baselines
            self.objective = objective.fresh()
        self.clip_norm, self.seed = clip_norm, seed
        model.to(self.device)
        with torch.random.fork_rng():
            batch = source.first(source.batch_size)
            model.prepare(batch)
            self.example = source.first(13)
        # For the parts of the bound, also where one of Pyro's own objectives is maximised:
        is_ours = isinstance(objective, Objective)
        self._ours: Any = self.objective if is_ours else ELBO(objective.num_particles)
        self._ours.to(self.device)
        with evaluating(model), pyro.validation_enabled(False):
            self._ours.prepare(model.programs(batch))
        parameters = [*model.parameters(), *self._ours.parameters()]
        self.optimizer = make_optimizer(optimizer, parameters, lr, self.device)
        self.step = Step(model, self._ours, source, self.optimizer, clip_norm)
        if not is_ours:
            self.step = PyroStep(
                model, self._ours, source, self.optimizer, clip_norm, self.objective
            )
        self.history: list[dict[str, Any]] = []
        self.steps = 0
        self.best: tuple[float, int, dict[str, Tensor]] = (-math.inf, 0, {})
        self.stopped = ""

    def settings(
        self,
        lr: float,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], Any] | None,
        patience: int | None,
        compiled: bool,
    ) -> dict[str, Any]:
        """What makes two runs the same, as plain data."""
        valid = self.validation
        return {
            "objective": title_of(self.objective),
            "optimizer": _name_of(optimizer),
            "lr": lr,
            "scheduler": None if scheduler is None else _name_of(scheduler),
            "batch_size": self.source.batch_size,
            "clip_norm": self.clip_norm,
            "patience": patience,
            "seed": self.seed,
            "compiled": compiled,
            "data": self.source.title,
            "num_data": self.source.num_data,
            "num_validation": None if valid is None else len(valid),
        }

    @property
    def specs(self) -> dict[str, DataSpec]:
        """What the data are, by column; the only one of a model is called as its site."""
        main = next(iter(getattr(self.model, "observed", ())), "x")
        columns = self.source.columns.columns
        return {name or main: column.spec for name, column in columns.items()}

    # ------------------------------------------------------------------ training

    def train(
        self,
        epochs: int | None,
        steps: int | None,
        patience: int | None,
        progress: bool,
        speed: Speed,
        settings: dict[str, Any],
    ) -> None:
        """Run epochs until one of the limits is reached, then restore the best weights."""
        from tqdm.auto import tqdm

        self.model.train()
        self._speed = speed
        if speed != "eager":
            self._lower()
        first = len(self.history)
        bar = tqdm(
            total=epochs,
            initial=first,
            disable=not progress,
            desc=f"{self.model.name}, {settings['objective']}",
            unit="epoch",
        )
        with bar:
            self.stopped = self._limit(epochs, steps, patience)
            while not self.stopped:
                row = self._epoch(steps)
                self.stopped = self._limit(epochs, steps, patience)
                bar.update()
                bar.set_postfix(
                    {k: f"{row[k]:.2f}" for k in ("train", "valid") if k in row}, refresh=False
                )
                self._save(settings)
        if self.best[2]:
            self.model.load_state_dict(self.best[2], strict=False)

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights the model has after training."""
        return self.best[1] or len(self.history)

    def _limit(self, epochs: int | None, steps: int | None, patience: int | None) -> str:
        """Which limit is reached, if any."""
        done = len(self.history)
        if epochs is not None and done >= epochs:
            return "epochs"
        if steps is not None and self.steps >= steps:
            return "steps"
        if patience is not None and done - self.best[1] >= patience:
            return "patience"
        return ""

    def _lower(self) -> None:
        """Have whole batches run as a graph, or say why not."""
        try:
            self.step.lower(self._speed == "compiled")
        except CannotLower as error:
            what = f"The fit runs without being compiled: {error}."
            warnings.warn(what, skip_file_prefixes=PACKAGE)

    def _epoch(self, steps: int | None) -> dict[str, Any]:
        start = time.perf_counter()
        before = _Before(self)
        try:
            seen = self._steps(steps)
        except (ValueError, RuntimeError):  # torch refuses to draw from NaN
            if self._is_finite(before):
                raise
            self._explain(before, steps)
        if seen == 0:
            raise ValueError(
                f"The data yielded no batch in epoch {len(self.history) + 1}: an iterable must "
                "begin anew each time that it is asked for."
            )
        if not self._is_finite(before):
            self._explain(before, steps)
        means = self.step.means(seen)
        row: dict[str, Any] = {"epoch": len(self.history) + 1, "step": self.steps}
        row |= dict(zip(self.step.names, means, strict=True))
        row |= self._validate()
        row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        row["seconds"] = time.perf_counter() - start
        self.history.append(row)
        self._step_scheduler(row)
        if "valid" in row and row["valid"] > self.best[0]:
            self.best = (row["valid"], row["epoch"], self.weights())
        return row

    def _steps(self, steps: int | None) -> int:
        """Take the steps of an epoch; the number of data they were on."""
        self.step.restart()
        if not self.step.follows():  # a number has changed that is no tensor
            self._lower()
        seen = 0
        for tensors, index in self.source.epoch(len(self.history) + 1):
            if steps is not None and self.steps >= steps:
                break
            self._ours.at(self.steps)
            self.step(len(index), *tensors)
            self.steps += 1
            seen += len(index)
        return seen

    def _is_finite(self, before: "_Before") -> bool:
        """Whether no sum, parameter or buffer has become bad: a mask of -inf may stay one."""
        now = checkpoint.module_tensors(self.model)
        spoilt = (is_bad(now[name]) and not is_bad(before.weights[name]) for name in now)
        return not (is_bad(self.step.totals) or any(spoilt))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the model's tensors."""
        return {k: v.clone() for k, v in checkpoint.module_tensors(self.model).items()}

    def _step_scheduler(self, row: dict[str, Any]) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(-row.get("valid", row["train"]))
        elif self.scheduler is not None:
            self.scheduler.step()

    def _validate(self) -> dict[str, float]:
        """The objective and its parts on validation data, always with the same draws."""
        if self.validation is None:
            return {}
        totals: dict[str, float] = {}
        particles = self._ours.draws
        with evaluating(self.model), fenced(self.seed, self.device):
            for rows, _ in blocks(len(self.validation), particles, MAX_ROWS, MAX_ROWS):
                batch = self.validation.rows(rows)
                drawn = self._ours.draw(self.model.programs(batch))
                sums = {"valid": self._ours.bound(drawn).sum()}
                if self._ours is not self.objective:
                    loss = self.objective.loss(self.model.model, self.model.guide, batch)
                    sums["valid"] = -torch.as_tensor(loss, dtype=torch.float64)
                if is_bad(sums["valid"]):
                    where = bad_site(drawn, range(rows.start, rows.stop))
                    raise FloatingPointError(
                        f"The objective is {float(sums['valid'])} on validation data after epoch "
                        f"{len(self.history) + 1}: first in {where} of these. The model keeps that "
                        "epoch's weights. Lower `lr`, or look at that datum."
                    )
                sums |= {f"valid {k}": v.mean(0).sum() for k, v in drawn.terms().items()}
                for name, total in sums.items():
                    totals[name] = totals.get(name, 0.0) + float(total)
        return {name: total / len(self.validation) for name, total in totals.items()}

    # ------------------------------------------------------------------ what goes wrong

    def _explain(self, before: "_Before", steps: int | None) -> None:
        """Repeat an epoch that failed, in Pyro, up to the step that fails.

        Raises:
            FloatingPointError: naming step, site and datum. The model has the weights before it.
        """
        before.restore(self)
        for tensors, index in self.source.epoch(len(self.history) + 1):
            if steps is not None and self.steps >= steps:
                break
            state = random_state(self.device)
            self._ours.at(self.steps)
            try:
                found = self.step.eager(*tensors)
                what, where = self._what_failed(found, tensors, index, state)
            except (ValueError, RuntimeError) as error:
                what, where = f"A draw failed ({error})", "no site that could be told"
            if what:
                if any(is_bad(v) for v in checkpoint.module_tensors(self.model).values()):
                    self.model.load_state_dict(before.weights, strict=False)
                raise FloatingPointError(
                    f"{what} at step {self.steps + 1}, epoch {len(self.history) + 1}: first in "
                    f"{where}. The model keeps its last good weights. Lower `lr`, set `clip_norm`, "
                    "or look at that datum."
                )
            self.step.finish(len(index), found)
            self.steps += 1
        self.model.load_state_dict(before.weights, strict=False)
        raise FloatingPointError(
            f"The model or its objective is not finite after epoch {len(self.history) + 1}, and no "
            "step of it failed when they were repeated. The model keeps the weights from before it."
            " Lower `lr`, or set `clip_norm`."
        )

    def _what_failed(
        self, found: list[Any], tensors: tuple[Tensor, ...], index: Tensor, state: list[Tensor]
    ) -> tuple[str, str]:
        """What is not finite in the results of a step, if anything, and where it was so first."""
        values, *gradients = found
        bad_gradient = any(is_bad(gradient) for gradient in gradients)
        if bool(values[0].isfinite()) and not bad_gradient:
            return "", ""
        set_random_state(state, self.device)
        batch = self.source.fetch(*self.source.fixed, *tensors)
        if not bool(values[0].isfinite()):
            with torch.no_grad():
                where = bad_site(self.model.draw(batch, self._ours.draws), index)
            return f"The objective is {float(values[0])}", where
        what = bad_parameters(self.model, gradients)
        norm = float(torch.nn.utils.get_total_norm([g for g in gradients if g is not None]))

        def loss(one: Batch) -> Tensor:
            return -self._ours.estimate(self.model.programs(one))[1]

        where = bad_datum_of_gradient(loss, batch, self.model, index)
        return f"The gradient of {what} is {norm}", where

    # ------------------------------------------------------------------ the run's folder

    def open(
        self,
        folder: str | os.PathLike[str],
        settings: dict[str, Any],
        steps: int | None,
        compiled_as_before: bool,
    ) -> None:
        """Continue the run in the folder, or start one there."""
        self.folder = folder
        settings["data_fingerprint"] = self.source.fingerprint()
        if self.validation is not None:
            settings["validation_fingerprint"] = self.validation.fingerprint()
        if not checkpoint.has_checkpoint(folder):
            self._save(settings)
            return
        meta, weights, training = checkpoint.read(folder)
        if compiled_as_before:
            settings["compiled"] = meta["settings"].get("compiled")
        declared = json.loads(json.dumps(declaration_of(self.model)))
        different = {
            key: (meta["settings"].get(key), value)
            for key, value in settings.items()
            if meta["settings"].get(key) != value
        }
        if meta["declaration"] != declared:
            different["declaration"] = ("its own", "this model's")
        if different:
            found = "; ".join(
                f"{k}: {was!r} there, {now!r} here" for k, (was, now) in different.items()
            )
            raise ValueError(
                f"{folder} holds another run ({found}). Choose another `folder`, or remove it."
            )
        state = checkpoint.unpack(meta["state"], training)
        self._check_whole_epochs(folder, meta["stopped"], state["step"], steps)
        self.model.load_state_dict(weights, strict=False)
        _restore_optimizer(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.history, self.steps = state["history"], state["step"]
        best = {key: value.to(self.device) for key, value in state["best"].items()}
        self.best = (state["best_valid"], state["best_epoch"], best)
        self._ours.load_state_dict(state.get("objective", {}), strict=False)
        set_random_state(state["random"], self.device)

    def _check_whole_epochs(
        self, folder: str | os.PathLike[str], stopped: str, step: int, steps: int | None
    ) -> None:
        """A run stopped within an epoch has no state to go on from to the same numbers."""
        an_epoch = self.source.num_batches
        goes_on = steps is None or steps > step
        if stopped == "steps" and (an_epoch is None or step % an_epoch) and goes_on:
            raise ValueError(
                f"{folder} holds a run that ended within an epoch, after {step} steps of {an_epoch}"
                " an epoch, and cannot go on to the same numbers. Choose another `folder`."
            )

    def _save(self, settings: dict[str, Any]) -> None:
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": _scheduler_state(self.scheduler),
            "history": self.history,
            "step": self.steps,
            "best": self.best[2],
            "best_valid": self.best[0],
            "best_epoch": self.best[1],
            "random": random_state(self.device),
            "objective": dict(self._ours.state_dict()),
            "example": self.example,  # from which `load` prepares a PyroPair
        }
        meta = {
            "declaration": declaration_of(self.model),
            "settings": settings,
            "specs": {name: spec.to_json() for name, spec in self.specs.items()},
            "stopped": self.stopped,
            "state": checkpoint.pack("state", state, tensors),
        }
        weights = checkpoint.module_tensors(self.model)
        checkpoint.write(self.folder, meta, weights, tensors, stamp=len(self.history))


def declaration_of(model: Pair) -> dict[str, Any]:
    """The model as data, or where it is code, its name."""
    if type(model) is LatentModel:
        try:
            return model.to_json()
        except TypeError:
            pass
    return {"code": repr(model)}


class _Before:
    """What an epoch changes, as it was before."""

    def __init__(self, run: Run):
        self.weights = run.weights()
        self.optimizer = copy.deepcopy(run.optimizer.state_dict())
        self.objective = copy.deepcopy(run._ours.state_dict())
        self.random = random_state(run.device)
        self.steps = run.steps

    def restore(self, run: Run) -> None:
        """Put it back, for the epoch to be repeated in Pyro."""
        run.model.load_state_dict(self.weights, strict=False)
        run._ours.load_state_dict(self.objective)
        _restore_optimizer(run.optimizer, self.optimizer)
        run.step.forget()
        set_random_state(self.random, run.device)
        run.steps = self.steps


def _restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):  # which graphs may hold
            group["lr"] = rate.fill_(float(group["lr"]))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, saved in state["state"].items():
        own = optimizer.state[parameters[i]]
        for key, value in saved.items():
            if isinstance(value, Tensor):  # torch has cast it to the parameter's type
                own[key] = own[key].to(value.dtype)


def _scheduler_state(scheduler: Any) -> dict[str, Any]:
    """A scheduler's numbers; its functions come from the call that resumes."""
    if scheduler is None:
        return {}
    kept = (bool, int, float, str, list, type(None))
    return {k: v for k, v in scheduler.state_dict().items() if isinstance(v, kept)}


def title_of(objective: pyro.infer.ELBO) -> str:
    if isinstance(objective, Objective):
        return repr(objective)
    return f"{type(objective).__name__}(num_particles={objective.num_particles})"


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or repr(function)
