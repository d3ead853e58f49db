"""The loop behind `fit`: epochs of steps, validation after each, and a checkpoint.

    Run: model, objective, data, optimiser, history  --train-->  the same, further on

Everything that resuming needs is here, and is saved after each epoch: weights, optimiser, random
state, history. So a run killed within an epoch repeats that epoch with the same numbers.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro.infer
import torch
from torch import Tensor
from torch.optim import Optimizer

from pvae import checkpoint
from pvae.declare import LatentModel
from pvae.failure import bad_datum_of_gradient, bad_parameters, bad_site, is_bad
from pvae.fence import evaluating, fenced
from pvae.lowering import CannotLower, Lowered
from pvae.objectives import ELBO, Objective
from pvae.pair import Batch, Columns, Pair
from pvae.particles import blocks

__all__ = ["Run", "declaration_of"]

MAX_ROWS = 8192  # particle-datum pairs in one pass of validation


class Run:
    """The state of a fit, between its epochs."""

    optimizer: Optimizer
    scheduler: Any
    validation: Columns | None = None
    folder: str | os.PathLike[str] | None = None
    lowered: Lowered | None = None

    def __init__(
        self,
        model: Pair,
        objective: pyro.infer.ELBO,
        data: Columns,
        device: torch.device,
        batch_size: int,
        clip_norm: float | None,
        seed: int,
    ):
        self.model, self.data, self.device = model, data, device
        self.objective: Any = objective
        # For the parts of the bound, and where one of Pyro's own objectives fails:
        ours = isinstance(objective, Objective)
        self._ours: Any = objective if ours else ELBO(objective.num_particles)
        self.batch_size = min(batch_size, len(data))
        self.clip_norm, self.seed = clip_norm, seed
        model.to(device)
        with torch.random.fork_rng():
            model.prepare(data.rows(slice(0, batch_size)))
            self.example = data.rows(slice(0, 13))
        self.history: list[dict[str, Any]] = []
        self.step = 0
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
            "batch_size": self.batch_size,
            "clip_norm": self.clip_norm,
            "patience": patience,
            "seed": self.seed,
            "compiled": compiled,
            "data": f"{self.data.main.spec.space()}, {self.data.main.spec.split}",
            "num_data": len(self.data),
            "num_validation": None if valid is None else len(valid),
        }

    # ------------------------------------------------------------------ training

    def train(
        self,
        epochs: int | None,
        steps: int | None,
        patience: int | None,
        progress: bool,
        settings: dict[str, Any],
    ) -> None:
        """Run epochs until one of the limits is reached, then restore the best weights."""
        from tqdm.auto import tqdm

        self.model.train()
        if settings["compiled"]:
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
        if steps is not None and self.step >= steps:
            return "steps"
        if patience is not None and done - self.best[1] >= patience:
            return "patience"
        return ""

    def _epoch(self, steps: int | None) -> dict[str, Any]:
        start = time.perf_counter()
        totals: dict[str, Tensor] = {}
        seen = 0
        order = torch.randperm(len(self.data), device=self.device)
        with self._keeping_good_weights():
            for index in order.split(self.batch_size):
                if steps is not None and self.step >= steps:
                    break
                parts = self._step(index)
                seen += len(index)
                for name, mean in parts.items():
                    totals[name] = totals.get(name, 0.0) + mean * len(index)
        row: dict[str, Any] = {"epoch": len(self.history) + 1, "step": self.step}
        row |= {name: float(total) / seen for name, total in totals.items()}
        row |= self._validate()
        row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        row["seconds"] = time.perf_counter() - start
        self.history.append(row)
        self._step_scheduler(row)
        if "valid" in row and row["valid"] > self.best[0]:
            self.best = (row["valid"], row["epoch"], self._weights())
        return row

    def _weights(self) -> dict[str, Tensor]:
        """A copy of the model's tensors."""
        return {k: v.clone() for k, v in checkpoint.module_tensors(self.model).items()}

    @contextmanager
    def _keeping_good_weights(self) -> Iterator[None]:
        """Go back to the epoch's first weights if a step itself made them overflow."""
        weights = self._weights()
        try:
            yield
        except FloatingPointError:
            if any(is_bad(value) for value in checkpoint.module_tensors(self.model).values()):
                self.model.load_state_dict(weights, strict=False)
            raise

    def _step(self, index: Tensor) -> dict[str, Tensor]:
        """One optimiser step; returns the objective and its parts, means over the batch."""
        batch = self.data.batch(index)
        random_state = _random_state(self.device)
        self.optimizer.zero_grad()
        if self.lowered is not None and len(index) == self.batch_size:
            parts = self.lowered(batch)
            del parts["loss"]
        elif isinstance(self.objective, Objective):
            parts = self._parts(self.model, batch)
            loss = parts.pop("loss")
            if loss.requires_grad:
                loss.backward()
        else:
            loss = self.objective.loss_and_grads(self.model.model, self.model.guide, batch)
            # Pyro's objectives do not tell their parts.
            with torch.random.fork_rng(), evaluating(self.model):
                parts = self._parts(self.model, batch)
            del parts["loss"]
            parts["train"] = torch.as_tensor(-loss / len(index), dtype=torch.float64)
        self._check_finite(parts["train"], index, batch, random_state)
        scale = 1.0 if isinstance(self.objective, Objective) else 1 / len(index)
        self._step_optimizer(scale, index, batch, random_state)
        self.step += 1
        return parts

    def _parts(self, model: Pair, batch: Batch) -> dict[str, Tensor]:
        """The loss to differentiate, the objective and its parts: means over the batch."""
        particles = model.draw(batch, self._ours.num_particles)
        bound = self._ours.per_datum(particles).mean()
        with torch.no_grad():
            terms = {f"train {k}": v.detach().mean() for k, v in particles.terms().items()}
        return {"loss": -bound, "train": bound.detach(), **terms}

    def _lower(self) -> None:
        """Have whole batches run as a compiled graph, or say why not."""
        try:
            if not isinstance(self.objective, Objective):
                raise CannotLower(f"{title_of(self.objective)} is Pyro's own and returns numbers")
            with torch.random.fork_rng():
                batch = self.data.batch(torch.arange(self.batch_size, device=self.device))
            lowered = Lowered(self.model, self._parts, batch)
            lowered.compile(batch)
            self.lowered = lowered
        except CannotLower as error:
            warnings.warn(f"The fit runs without being compiled: {error}.", stacklevel=4)

    def _step_optimizer(
        self, scale: float, index: Tensor, batch: Batch, random_state: list[Tensor]
    ) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            what = bad_parameters(self.model)
            _set_random_state(random_state, self.device)
            where = bad_datum_of_gradient(
                lambda one: self._parts(self.model, one)["loss"], batch, self.model, index
            )
            raise FloatingPointError(
                f"The gradient of {what} is {float(norm)} at step {self.step + 1}, epoch "
                f"{len(self.history) + 1}: first in {where}. The model keeps its last good "
                "weights. Lower `lr`, set `clip_norm`, or look at that datum."
            )
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self.optimizer.step()

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
        particles = self._ours.num_particles
        with evaluating(self.model), fenced(self.seed, self.device):
            for rows, _ in blocks(len(self.validation), particles, MAX_ROWS, MAX_ROWS):
                batch = self.validation.rows(rows)
                drawn = self.model.draw(batch, particles)
                sums = {"valid": self._ours.per_datum(drawn).sum()}
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

    def _check_finite(
        self, bound: Tensor, index: Tensor, batch: Batch, random_state: list[Tensor]
    ) -> None:
        if bool(bound.isfinite()):
            return
        _set_random_state(random_state, self.device)
        with torch.no_grad():
            where = bad_site(self.model.draw(batch, self.objective.num_particles), index)
        raise FloatingPointError(
            f"The objective is {float(bound)} at step {self.step + 1}, epoch "
            f"{len(self.history) + 1}: first in {where}. The model keeps its last good weights. "
            "Lower `lr`, set `clip_norm`, or look at that datum."
        )

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
        settings["data_fingerprint"] = self.data.fingerprint()
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
        self.history, self.step = state["history"], state["step"]
        best = {key: value.to(self.device) for key, value in state["best"].items()}
        self.best = (state["best_valid"], state["best_epoch"], best)
        _set_random_state(state["random"], self.device)

    def _check_whole_epochs(
        self, folder: str | os.PathLike[str], stopped: str, step: int, steps: int | None
    ) -> None:
        """A run stopped within an epoch has no state to go on from to the same numbers."""
        an_epoch = math.ceil(len(self.data) / self.batch_size)
        goes_on = steps is None or steps > step
        if stopped == "steps" and step % an_epoch and goes_on:
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
            "step": self.step,
            "best": self.best[2],
            "best_valid": self.best[0],
            "best_epoch": self.best[1],
            "random": _random_state(self.device),
            "example": self.example,  # from which `load` prepares a PyroPair
        }
        meta = {
            "declaration": declaration_of(self.model),
            "settings": settings,
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


def _random_state(device: torch.device) -> list[Tensor]:
    """States of the generators that a step draws from."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[-1], device)


def _restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
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
