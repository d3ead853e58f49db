"""log p(x) by annealed importance sampling: chains instead of draws, the same bounds.

    pair, data  --AnnealedRun-->  weights (C, N)  --bounds-->  Evaluation

Sources: Neal 2001; Wu, Burda, Salakhutdinov & Grosse 2017.
"""

import math
import os
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pvae import exact
from pvae.evaluation.annealing import Schedule
from pvae.evaluation.annealing_run import AnnealedRun
from pvae.evaluation.kept import bounds_of, measure_of
from pvae.evaluation.latents import Start
from pvae.evaluation.quantity import quantity
from pvae.evaluation.result import Evaluation
from pvae.fence import evaluating, fenced, resolve_device
from pvae.pair import Columns, Pair, check_amortised, check_pair, placed
from pvae.particles import check_count
from pvae.step import Speed

__all__ = ["Plan", "ais"]

LONG = 20_000_000  # gradients that save more time than compiling takes


def ais(
    model: Pair,
    data: Any,
    num_chains: int = 16,
    *,
    num_temperatures: int = 1000,
    start: Start = "prior",
    schedule: Schedule = "sigmoid",
    leapfrog_steps: int = 10,
    seed: int = 0,
    device: str | torch.device = "auto",
    compile: bool | Literal["auto"] = "auto",
    progress: bool = False,
    folder: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Evaluate log p(x) by annealed importance sampling (Neal 2001; Wu et al. 2017).

    Each chain walks from a draw of the prior (or the guide) to the posterior by way of
    `num_temperatures` densities between them, one HMC proposal at each. Its weight is an unbiased
    estimate of p(x), so the bounds of C chains are lower bounds in expectation, as those of C
    particles are, and tighter by as much as the walk is slow. A first walk, a fifth as long, finds
    step sizes for an acceptance of 0.65, which then stay as they are.

    Args:
        model: `LatentModel` or `PyroPair` with continuous latents.
        data: (N, *event), or columns by name; noise of a training split is drawn once.
        num_chains: C, chains for each datum.
        num_temperatures: T.
        start: "prior", or "guide", whose path is shorter where the guide is good.
        schedule: "sigmoid", slow at both ends; "linear"; or "adaptive", equal shares of the
            thermodynamic length that the first walk has measured.
        leapfrog_steps: L of each proposal.
        seed: of the draws.
        device: where to run; "auto" is CUDA where there is one.
        compile: whether gradients are computed by a compiled graph; "auto" compiles where they
            are twenty million or more, and otherwise runs the graph that is read out of Pyro.
        progress: show a bar.
        folder: where to keep the state. The same call goes on where it was killed.

    Returns:
        Evaluation, in nats; `per_datum` has the mean acceptance as well.

    Raises:
        ValueError: for data that do not fit the model, latents that are not continuous, or a
            folder that holds another run.
        FloatingPointError: where log p(x) comes out as NaN, naming the datum.
    """
    began = time.perf_counter()
    check_pair(model)
    plan = Plan(
        num_chains, num_temperatures, start, schedule, leapfrog_steps, seed, compile, progress
    )
    columns = model.columns(data).realised()
    closed = exact.method(model) in ("enumeration", "linear-Gaussian")
    found, (measure, dimensions) = plan.anneal(model, columns, resolve_device(device), folder)
    more = columns.log_jacobian(model.given)
    if closed:
        more["exact"] = exact.log_prob(model, data)
    import xarray as xr

    return Evaluation(
        model=model.name,
        spec=columns.main.spec,
        measure=measure,
        **quantity(model, columns, dimensions),
        num_particles=num_chains,
        proposal=f"{start}, annealed over {num_temperatures} temperatures",
        per_datum=_per_datum(found, more),
        per_unit=xr.Dataset(),
        seconds=time.perf_counter() - began,
        sampler="chains",
        parameters=model.fingerprint(),
        seed=seed,
    )


@dataclass(frozen=True)
class Plan:
    """How to anneal; see `ais`."""

    num_chains: int
    num_temperatures: int
    start: Start
    schedule: Schedule
    leapfrog_steps: int
    seed: int
    compile: bool | Literal["auto"]
    progress: bool

    def __post_init__(self) -> None:
        for name in ("num_chains", "num_temperatures", "leapfrog_steps"):
            check_count(name, getattr(self, name))
        _check_choice("start", self.start, ("prior", "guide"))
        _check_choice("schedule", self.schedule, ("sigmoid", "linear", "adaptive"))
        _check_choice("compile", self.compile, (True, False, "auto"))

    def anneal(
        self,
        model: Pair,
        columns: Columns,
        device: torch.device,
        folder: str | os.PathLike[str] | None = None,
        posterior: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], tuple[str, int]]:
        """What `AnnealedRun` finds; whether p(x) is a probability, and how many numbers x has."""
        settings = asdict(self) | {
            "model": model.name,
            "parameters": model.fingerprint(guide=True),
            "data": columns.fingerprint(),
        }
        settings = {k: v for k, v in settings.items() if k not in ("compile", "progress")}
        if self.start == "guide":
            check_amortised(model, "Annealing from the guide")
        with placed(model, columns, device) as on_device:
            speed = self._speed(len(columns))
            with evaluating(model), fenced(self.seed, device):
                measure = measure_of(model.draw(on_device.rows(slice(0, 1))))
                run = AnnealedRun(model, on_device, settings, speed, folder, posterior)
                found = run.all_blocks(self.progress)
        _check_finite(model, found["log_w"])
        return found, measure

    def _speed(self, num_data: int) -> Speed:
        """What pays, by a rule of numbers."""
        if self.compile != "auto":
            return "compiled" if self.compile else "eager"
        chains = num_data * self.num_chains
        gradients = chains * self.num_temperatures * self.leapfrog_steps
        return "compiled" if gradients >= LONG else "traced"


def _check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")


def _check_finite(model: Pair, log_w: Tensor) -> None:
    bad = (~(log_w < math.inf).all(0)).nonzero()
    if len(bad):
        raise FloatingPointError(
            f"Weights of {model.name!r} are NaN or infinite for {len(bad)} of {log_w.shape[1]} "
            f"data, the first is datum {int(bad[0])}. Look at that datum, and whether the model's "
            "parameters are finite."
        )


def _per_datum(found: dict[str, Tensor], more: dict[str, Tensor]) -> Any:
    import xarray as xr

    sizes = sorted({1, len(found["log_w"])})
    columns = {
        name: (("particles", "datum")[-value.dim() :], value.numpy())
        for name, value in bounds_of(found["log_w"], sizes).items()
    }
    for name, value in ({"acceptance": found["acceptance"]} | more).items():
        columns[name] = (("datum",), value.double().cpu().numpy())
    return xr.Dataset(columns, {"particles": sizes})
