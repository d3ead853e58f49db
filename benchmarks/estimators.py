"""Objectives beside each other: the same CPU time of training each, then L_5000 on the test set.

    objective --rate--> CPU seconds a step --budget--> steps --fit, evaluate--> one record a seed
    records   --markdown-->  tables between marks of docs/objectives.md

`python -m benchmarks.estimators` runs what results/estimators.json does not have yet, two hours
in all, and writes both files. Each fit has a process and a thread of its own, two at a time;
seeds are the outer loop, so that a busy machine disturbs all objectives alike. MNIST is read where
the environment's PVAE_DATA points, and left out where it is not there.
"""

import argparse
import itertools
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import Bernoulli

import pvae
from benchmarks import jobs, table
from pvae import objectives
from pvae.nets import MLP, Linear
from pvae.objectives import Objective

__all__ = ["STUDIES", "Job", "Study", "compared", "markdown", "objective", "work"]

RESULTS = jobs.ROOT / "benchmarks" / "results" / "estimators.json"
PAGE = jobs.ROOT / "docs" / "objectives.md"
BATCH, LR = 20, 1e-3  # as in Burda et al. 2016
EPOCHS, BATCHES = 8, 50  # in a round of timing; the fastest epoch of all rounds counts
HEAD = ("objective", "particles", "steps", "L5000", "s.e.", "L5000 - L1", "active", "k-hat fails")

# As they are called; `steps` is the number of steps of the fit.
REPARAMETERISED = (
    "ELBO(1)",
    'ELBO(1, kl="analytic")',
    'ELBO(1, gradient="stl")',
    "ELBO(1, beta=WarmUp(steps // 5))",
    "IWAE(5)",
    "IWAE(50)",
    'IWAE(50, "stl")',
    'IWAE(50, "dreg")',
    "MIWAE(8, 8)",
    "PIWAE(8, 8)",
    "CIWAE(64, 0.5)",
    "Renyi(50, 0.5)",
    "Renyi(50, -inf)",
    "CUBO(50)",
    "TVO(50)",
    "ReweightedWakeSleep(50)",
    'ReweightedWakeSleep(50, "both")',
    'ForwardKL(50, "dreg")',
)
SCORED = [f'ELBO(5, baseline="{b}")' for b in ("none", "average", "learned", "leave-one-out")]
DISCRETE = (*SCORED, 'IWAE(5, baseline="vimco")', "TVO(5)", "ReweightedWakeSleep(5)")


def objective(call: str, steps: int) -> Objective:
    """What a call of `pvae.objectives` makes for a fit of so many steps."""
    return eval(call, {**vars(objectives), "inf": math.inf, "steps": steps})


@dataclass(frozen=True)
class Study:
    """A model and data on which objectives are compared.

    Steps are timed `rounds` times; fits get `seconds` of CPU time; `num_test` data are evaluated.
    """

    data: str
    declare: Callable[[], pvae.LatentModel]
    calls: tuple[str, ...]
    rounds: int
    seconds: float
    num_test: int


def belief_network() -> pvae.LatentModel:
    """A sigmoid belief network of one layer (Neal 1992), its bits drawn by the guide."""
    return pvae.LatentModel(
        z=pvae.Latent(Bernoulli, 32),
        x=pvae.Observed(Bernoulli, 64, given="z", net=Linear()),
        guide={"z": pvae.Latent(Bernoulli, 32, given="x", net=MLP(200))},
        name="belief network",
    )


STUDIES = {
    "digits": Study("digits", lambda: pvae.models.vae(64, 8), REPARAMETERISED, 3, 6, 360),
    "digits, Bernoulli latents": Study("digits", belief_network, DISCRETE, 3, 6, 360),
    "MNIST": Study("mnist", pvae.models.vae, REPARAMETERISED, 3, 60, 500),
}


@dataclass(frozen=True)
class Job:
    """What one process does: time steps (`steps` = 0), or fit and evaluate."""

    study: str
    objective: str
    seed: int = 0
    steps: int = 0
    num_particles: int = 5000
    compile: bool = True


def work(job: Job) -> dict[str, Any]:
    """CPU seconds a step; or of a fit, what `evaluate` says of it."""
    study = STUDIES[job.study]
    train, _, test = pvae.load_data(study.data)
    torch.manual_seed(job.seed)
    model, clock = study.declare(), jobs.Clock()
    batches = len(train) // BATCH if job.steps else BATCHES
    how = {"device": "cpu", "compile": job.compile, "seed": job.seed}
    fitted = pvae.fit(
        model,
        train.subset(slice(batches * BATCH)),  # whole batches: others are not compiled
        objective(job.objective, job.steps or 1000),
        batch_size=BATCH,
        lr=LR if job.steps else 0.0,  # what diverges can be timed all the same
        scheduler=lambda optimizer: clock,
        progress=False,
        **({"steps": job.steps} if job.steps else {"epochs": EPOCHS}),
        **how,
    )
    if not job.steps:
        return {"rate": min(b - a for a, b in itertools.pairwise(clock.times)) / batches}
    some = test.subset(slice(study.num_test))
    found = pvae.evaluate(model, some, job.num_particles, grid=[1], **how)
    return {
        "L_1": float(found.per_datum["bound"][0].mean()),
        "L_K": float(found.log_p.mean()),
        "active units": found.active_units.get("z", 0),
        "k-hat fails": found.failing,
        "train": float(fitted.history["train"].iloc[-1]),
        "seconds": float(fitted.history["seconds"].sum()),  # of wall time, without compiling
    }


def in_a_process(job: Job) -> dict[str, Any]:
    """The same in a process of its own; a fit that fails is recorded."""
    try:
        return jobs.in_a_process(work, job)
    except RuntimeError as error:
        if job.steps:
            return {"failed": str(error)}
        raise RuntimeError(f"{job.objective} could not be timed: {error}") from None


Work = Callable[[Job], dict[str, Any]]


def cells(records: list[dict[str, Any]]) -> tuple[str, ...]:
    """Of an objective's row, after its steps: means over seeds."""
    if failed := sum("failed" in record for record in records):
        return (f"failed for {failed} of {len(records)} seeds", *[""] * 4)
    columns = ("L_K", "L_1", "active units", "k-hat fails")
    bound, elbo, active, fails = (statistics.fmean(r[name] for r in records) for name in columns)
    bounds = [record["L_K"] for record in records]
    error = statistics.stdev(bounds) / math.sqrt(len(bounds)) if len(bounds) > 1 else math.nan
    return f"{bound:.2f}", f"{error:.2f}", f"{bound - elbo:.2f}", f"{active:.1f}", f"{fails:.0%}"


def markdown(records: list[dict[str, Any]]) -> str:
    """One row an objective."""
    rows = []
    for call, steps in dict.fromkeys((record["objective"], record["steps"]) for record in records):
        own = [record for record in records if record["objective"] == call]
        sizes = str(objective(call, steps).draws), f"{steps:,}"
        rows.append((f"`{call.replace('//', '/')}`", *sizes, *cells(own)))
    return table.lines(HEAD, rows)


def compared(name: str, seeds: int, file: Path, do: Work = in_a_process) -> str:
    """Run what one study lacks; its table."""
    study = STUDIES[name]
    rounds = [Job(name, call, i) for i in range(study.rounds) for call in study.calls]
    steps: dict[str, int] = {}
    for found in jobs.run(rounds, file, do):
        fitting = max(1, round(study.seconds / found["rate"]))
        steps[found["objective"]] = max(fitting, steps.get(found["objective"], 0))
    fits = [Job(name, call, seed, steps[call]) for seed in range(seeds) for call in study.calls]
    return markdown(jobs.run(fits, file, do))


def main() -> None:
    """Read the arguments, run, and write the table of each study when it is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimators", description=__doc__)
    parser.add_argument("--only", choices=STUDIES, help="one study")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    jobs.alone()
    has_mnist = (Path(os.environ.get("PVAE_DATA", "")) / "MNIST").is_dir()
    for name in [options.only] if options.only else STUDIES:
        if name != "MNIST" or has_mnist:
            new = compared(name, options.seeds, RESULTS)
            PAGE.write_text(table.between_marks(PAGE.read_text(), name, new))


if __name__ == "__main__":
    main()
