"""Every model on the same data, for the same time: one table for each kind of data.

    model, way to fit it --rate--> CPU seconds a step --budget--> steps --work--> a record a seed
    records  --markdown-->  tables between marks of docs/models.md

`python -m benchmarks.zoo` runs what results/zoo.json does not have yet, and writes both files;
`--quick` is a trial that writes neither. Processes, seeds and records are those of
`benchmarks.estimators`. MNIST is read where the environment's PVAE_DATA points, and left out where
it is not there.
"""

import argparse
import inspect
import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import avg_pool2d

import pvae
from benchmarks import jobs, table
from benchmarks.estimators import objective
from pvae import baselines, exact, models
from pvae.baselines import Autoencoder
from pvae.data import Data, Splits
from pvae.evaluation.result import mean_and_error
from pvae.nets import MLP
from pvae.pair import Pair

__all__ = ["STUDIES", "Job", "Study", "compared", "in_a_process", "markdown", "work"]

RESULTS = jobs.ROOT / "benchmarks" / "results" / "zoo.json"
PAGE = jobs.ROOT / "docs" / "models.md"
LR = 3e-3
EPOCHS, BATCHES, UPDATES = 8, 25, 5  # that are timed, of steps and of EM
LABELLED = 10  # every so many data, for a model that learns from few labels

# By other means than gradient steps on an objective.
OTHERS: dict[str, Callable[..., Any]] = {
    "factor_analysis": baselines.fit_factor_analysis,
    "mixture_of_bernoullis": baselines.fit_mixture_of_bernoullis,
    "mixture_of_factor_analysers": baselines.fit_mixture_of_factor_analysers,
    "mixture_of_gaussians": baselines.fit_em,
    "pca": baselines.fit_pca,
    "ppca": baselines.fit_ppca,
}
ITERATED = ("EM", "fixed point")  # until it settles
AT_ONCE = ("closed form", "quadrature")  # and the same for every seed

Row = tuple[str, str]  # a model as it is called, and an objective or another way to fit it

BINARY: tuple[Row, ...] = (
    ("vae()", "ELBO()"),
    ("conv_vae()", "ELBO()"),
    ("hierarchical_vae()", "ELBO()"),
    ("ladder_vae()", "ELBO()"),
    ("ladder_vae()", "ELBO(beta=WarmUp(steps // 2))"),
    ("mixture_vae()", "ELBO()"),
    ("vampprior_vae(num_components=50)", "ELBO()"),
    ("vampprior_vae(num_components=50)", "ELBO(beta=WarmUp(steps // 2))"),
    ("flow_vae()", "ELBO()"),
    ("conditional_vae()", "ELBO()"),
    ("semi_supervised_vae()", "ELBO()"),
    ("categorical_vae()", "ELBO()"),
    ("categorical_vae(num_latents=8, guided=True)", "IWAE(5)"),
    ("sigmoid_belief_network()", "IWAE(5)"),
    ("mixture_of_bernoullis(num_components=50)", "ELBO()"),
    ("mixture_of_bernoullis(num_components=50)", "EM"),
)
CONTINUOUS: tuple[Row, ...] = (
    ("gaussian_vae()", "ELBO()"),
    ('gaussian_vae(sigma="predicted")', "ELBO()"),
    ('conv_vae(pixels="normal")', "ELBO()"),
    ("ppca()", "ELBO()"),
    ("ppca()", "closed form"),
    ("factor_analysis()", "ELBO()"),
    ("factor_analysis()", "fixed point"),
    ("mixture_of_gaussians(num_components=50)", "ELBO()"),
    ("mixture_of_gaussians(num_components=50)", "EM"),
    ("mixture_of_factor_analysers(num_components=10)", "ELBO()"),
    ("mixture_of_factor_analysers(num_components=10)", "EM"),
    ("pca()", "closed form"),
    ("autoencoder()", "squared error"),
)
COUNTS: tuple[Row, ...] = (
    ('count_vae(counts="poisson")', "ELBO()"),
    ('count_vae(counts="negative binomial")', "ELBO()"),
)
RING: tuple[Row, ...] = (("ring()", "ELBO()"), ("ring()", "IWAE(10)"), ("ring()", "quadrature"))


def images(name: str, **noise: str) -> Callable[[str], Splits]:
    """A set of images for a model, flat unless it is convolutional."""
    return lambda model: pvae.load_data(name, flatten=not model.startswith("conv_vae"), **noise)


def dots(name: str, model: str) -> Splits:
    """Of blocks of 4 x 4 black or white dots, how many are ink, 0 to 16.

    A pixel of digits is such a count (Alpaydin & Kaynak 1998); of MNIST they are made here.
    """
    if name == "digits":
        grey = pvae.load_data(name, binarisation="none")
        counts = [16 * part.values for part in grey]
    else:
        bits = pvae.load_data(name, binarisation="threshold", flatten=False)
        counts = [16 * avg_pool2d(part.values, 4).flatten(1) for part in bits]
    return Splits(*(Data.of(part.round(), f"{name}, dots of ink in 4 x 4") for part in counts))


@dataclass(frozen=True)
class Study:
    """Data of one observation space, and the models of it.

    Args:
        data: the data for a model.
        rows: the models, and how each is fitted.
        sizes: of the models, by the name of the argument; the models' own where left out.
        seconds: of CPU time for a fit.
        num_test: data that are evaluated.
        batch: data a step.
        compile: steps, in training.
        num_particles: of the bound.
    """

    data: Callable[[str], Splits]
    rows: tuple[Row, ...]
    sizes: dict[str, Any]
    seconds: float
    num_test: int
    batch: int = 50
    compile: bool | str = "auto"
    num_particles: int = 5000


DIGITS: dict[str, Any] = {
    "data_size": 64,
    "image_shape": (1, 8, 8),
    "latent_size": 8,
    "latent_sizes": (32, 16),
    "hidden": (100, 100),
    "hidden_top": (50, 50),
    "hidden_flow": (50,),
    "channels": (16, 32),
}
MNIST: dict[str, Any] = {"latent_size": 50, "hidden": (200, 200)}
UNIFORM = {"dequantisation": "uniform"}

STUDIES = {
    "digits, binary": Study(images("digits"), BINARY, DIGITS, 3, 360),
    "digits, continuous": Study(images("digits", **UNIFORM), CONTINUOUS, DIGITS, 3, 360),
    "digits, counts": Study(partial(dots, "digits"), COUNTS, DIGITS, 3, 360),
    "ring": Study(lambda model: pvae.load_data("ring"), RING, {}, 3, 100),
    "MNIST, binary": Study(images("mnist"), BINARY, MNIST, 60, 200, 100, True),
    "MNIST, continuous": Study(
        images("mnist", **UNIFORM), CONTINUOUS, MNIST | {"data_size": 784}, 60, 200, 100, True
    ),
    "MNIST, counts": Study(
        partial(dots, "mnist"), COUNTS, MNIST | {"data_size": 49}, 60, 200, 100, True
    ),
}


@dataclass(frozen=True)
class Job:
    """What one process does: time steps (`steps` = 0), or fit and judge."""

    study: str
    model: str
    by: str
    seed: int = 0
    steps: int = 0
    num_test: int = 360
    num_particles: int = 5000
    compile: bool | str = "auto"


# ------------------------------------------------------------------------------------ one job


def work(job: Job) -> dict[str, Any]:
    """CPU seconds of a step or an update; or of a fit, what can be said of its p(x)."""
    train, valid, test = STUDIES[job.study].data(job.model)
    if not job.steps:
        return {"rate": rate(job, train, valid)}
    clock = jobs.Clock()
    clock.step()
    model, updates = fitted(job, train, valid)
    clock.step()
    found = judged(model, test.subset(slice(job.num_test)), job)
    clock.step()
    begun, trained, done = clock.times
    times = {"seconds": trained - begun, "seconds of judging": done - trained}
    return found | {"updates": updates} | times


def rate(job: Job, train: Data, valid: Data) -> float:
    """CPU seconds of a step, with its share of validation; or of an update."""
    clock = jobs.Clock()
    if job.by in ITERATED:
        clock.step()
        fitted(replace(job, steps=UPDATES), train, valid)
        clock.step()
        return (clock.times[1] - clock.times[0]) / UPDATES
    some = min(len(train), BATCHES * STUDIES[job.study].batch)
    few = max(1, some * len(valid) // len(train))
    settings = {"lr": 0.0, "epochs": EPOCHS}  # what diverges can be timed all the same
    by_steps(job, train.subset(slice(some)), valid.subset(slice(few)), clock, **settings)
    batches = some // STUDIES[job.study].batch
    return min(b - a for a, b in itertools.pairwise(clock.times)) / batches


def fitted(job: Job, train: Data, valid: Data) -> tuple[Pair | Autoencoder, int]:
    """The fitted model, and by how many steps or updates."""
    sizes = STUDIES[job.study].sizes
    if job.by == "quadrature":
        return called(job.model, vars(models), sizes), 0
    if job.by not in (*ITERATED, *AT_ONCE):
        settings = {"lr": LR, "steps": job.steps}
        return by_steps(job, train, valid, jobs.Clock(), **settings), job.steps
    how = {"data": train, "max_iter": job.steps, "seed": job.seed, "device": "cpu"}
    found = called(job.model, OTHERS, sizes | how)
    model = found if isinstance(found, Autoencoder) else found.to_model()
    return model, len(getattr(found, "log_likelihood", ()))


def by_steps(
    job: Job, train: Data, valid: Data, clock: jobs.Clock, **settings: Any
) -> Pair | Autoencoder:
    """The model after gradient steps, with the weights of its best epoch on `valid`."""
    study = STUDIES[job.study]
    train = train.subset(slice(len(train) // study.batch * study.batch))  # of batches alike
    settings |= {
        "batch_size": study.batch,
        "scheduler": lambda optimizer: clock,
        "device": "cpu",
        "compile": job.compile,
        "seed": job.seed,
        "progress": False,
    }
    if job.by == "squared error":
        size, net = study.sizes["latent_size"], MLP(*study.sizes["hidden"])
        return baselines.fit_autoencoder(train, size, net, validation=valid, **settings)
    torch.manual_seed(job.seed)
    model = called(job.model, vars(models), study.sizes)
    validation, what = columns(model, valid), objective(job.by, job.steps or 1000)
    data = columns(model, train, every=LABELLED)
    return pvae.fit(model, data, what, validation=validation, **settings).model


def called(call: str, functions: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """What a call comes to, with arguments that it leaves out filled in where they are known."""
    name = call.partition("(")[0]
    takes = inspect.signature(functions[name]).parameters
    filled = {key: value for key, value in known.items() if key in takes}
    return eval(call, {name: partial(functions[name], **filled)})


def columns(model: Pair, data: Data, every: int | None = None) -> Any:
    """The data as the model takes them: with their labels, where it is conditioned on these.

    Where it observes them, of every so many data; or of none, so that log p(x) is bounded.
    """
    if model.given:
        return {"x": data, "y": data.labels}
    if "y" not in getattr(model, "observed", []):
        return data
    assert data.labels is not None
    seen = torch.zeros(len(data), dtype=torch.bool)
    if every:
        seen[::every] = True
    return {"x": data, "y": torch.where(seen, data.labels.float(), math.nan)}


def judged(model: Pair | Autoencoder, test: Data, job: Job) -> dict[str, Any]:
    """log p(x) as well as it is known, active units and failing k-hats; and reconstructions."""
    x = test.realised().values
    if isinstance(model, Autoencoder):
        known: dict[str, Any] = {"kind": model.why_no_log_p}
        seen = model.reconstruct(test)["x"]
    else:
        data = columns(model, test)
        known = integrated(model, data) if job.by == "quadrature" else evaluated(model, data, job)
        seen = model.reconstruct(data, 16)["x"]
    return known | {"squared error": float((seen - x).square().flatten(1).sum(1).mean())}


def integrated(model: Pair, data: Any) -> dict[str, Any]:
    log_p = exact.log_prob(model, data)
    error = float(log_p.std()) / math.sqrt(len(log_p))
    return {"kind": "exact", "log p": float(log_p.mean()), "error over data": error}


def evaluated(model: Pair, data: Any, job: Job) -> dict[str, Any]:
    result = pvae.evaluate(model, data, job.num_particles, grid=[1], device="cpu")
    of = "" if result.of == "x" else f" of log p({result.of.replace('|', 'given')})"
    units = {
        name: [active, result.per_unit[f"activity[{name}]"].size]
        for name, active in result.active_units.items()
    }
    mean, error = mean_and_error(result.log_p)
    found = {"kind": result.kind + of, "log p": mean, "error over data": error, "units": units}
    if "bound" in result.per_datum:
        found["L_1"] = float(result.per_datum["bound"][0].mean())
        found["k-hat fails"] = result.failing
    return found


# ------------------------------------------------------------------------------------ tables


def markdown(records: list[dict[str, Any]]) -> str:
    """One row for each model and way to fit it, means over seeds."""
    groups: dict[Row, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["model"], record["by"]), []).append(record)
    head = ["model", "fitted by", "log p(x)", "s.e. (seeds)", "s.e. (data)", "what it is"]
    head += ["above ELBO", "active units", "k-hat fails", "steps", "seconds"]
    shows_errors = any("no p(x)" in record.get("kind", "") for record in records)
    if shows_errors:
        head.append("squared error")
    rows = [
        (f"`{model}`", by.replace("//", "/"), *cells(own)) for (model, by), own in groups.items()
    ]
    return table.lines(tuple(head), [row[: len(head)] for row in rows])


def cells(records: list[dict[str, Any]]) -> tuple[str, ...]:
    """Of a row, after how it was fitted; empty where there is no such number."""
    if failed := sum("failed" in record for record in records):
        return ("", "", "", f"failed for {failed} of {len(records)} seeds", *[""] * 6)
    log_p, of_data, above = "", "", ""
    if "log p" in records[0]:
        log_p = f"{mean(records, 'log p'):.2f}"
        of_data = f"{mean(records, 'error over data'):.2f}"
    if "L_1" in records[0]:
        gap = round(mean(records, "log p") - mean(records, "L_1"), 2)
        above = f"{gap + 0.0:.2f}"  # no minus before a zero
    fails = f"{mean(records, 'k-hat fails'):.0%}" if "k-hat fails" in records[0] else ""
    steps = f"{mean(records, 'updates'):,.0f}" if records[0]["updates"] else ""
    numbers = f"{mean(records, 'seconds'):.1f}", f"{mean(records, 'squared error'):.3f}"
    kind = records[0]["kind"].replace("L_", "L")
    errors = error(records), of_data
    return log_p, *errors, kind, above, active(records), fails, steps, *numbers


def mean(records: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(record[name] for record in records)


def error(records: list[dict[str, Any]]) -> str:
    """The standard error of log p over seeds."""
    values = [record["log p"] for record in records if "log p" in record]
    return f"{statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""


def active(records: list[dict[str, Any]]) -> str:
    """Means over seeds, latent by latent where there are several: "7.5 of 8"."""
    found = {}
    for name, (_, total) in records[0].get("units", {}).items():
        number = statistics.fmean(record["units"][name][0] for record in records)
        found[name] = f"{number:.1f} of {total}"
    if len(found) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{name} {words}" for name, words in sorted(found.items()))


# ------------------------------------------------------------------------------------ all


def in_a_process(job: Job) -> dict[str, Any]:
    """The same in a process of its own; a fit that fails is recorded."""
    try:
        return jobs.in_a_process(work, job)
    except RuntimeError as error:
        if job.steps:
            return {"failed": str(error)}
        raise RuntimeError(f"{job.model} by {job.by} could not be timed: {error}") from None


def compared(
    name: str,
    seeds: int,
    file: Path,
    do: Callable[[Job], dict[str, Any]] = in_a_process,
    **changes: Any,
) -> str:
    """Run what one study, or a changed one, lacks; its table."""
    study = replace(STUDIES[name], **changes)
    how = {field: getattr(study, field) for field in ("num_test", "num_particles", "compile")}
    timed = [row for row in study.rows if row[1] not in AT_ONCE]
    found = jobs.run([Job(name, *row, **how) for row in timed], file, do)
    steps = dict.fromkeys(study.rows, 1)
    for row, record in zip(timed, found, strict=True):
        steps[row] = max(1, round(study.seconds / record["rate"]))
    fits = [
        Job(name, *row, seed=seed, steps=steps[row], **how)
        for seed in range(seeds)
        for row in (study.rows if seed == 0 else timed)
    ]
    return markdown(jobs.run(fits, file, do))


def main() -> None:
    """Read the arguments, run, and write the table of each study when it is done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--only", choices=STUDIES, help="one study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a trial: prints, writes nothing")
    options = parser.parse_args()
    jobs.alone()
    has_mnist = (Path(os.environ.get("PVAE_DATA", "")) / "MNIST").is_dir()
    for name in [options.only] if options.only else STUDIES:
        if name.startswith("MNIST") and not has_mnist:
            continue
        if options.quick:
            print(tried(name))
            continue
        new = compared(name, options.seeds, RESULTS)
        PAGE.write_text(table.between_marks(PAGE.read_text(), name, new))


def tried(name: str) -> str:
    """A table of fits of a moment, of which nothing is kept."""
    brief = {"seconds": 0.2, "num_test": 10, "compile": False, "num_particles": 100}
    with tempfile.TemporaryDirectory() as folder:
        return compared(name, 1, Path(folder, "zoo.json"), **brief)


if __name__ == "__main__":
    main()
