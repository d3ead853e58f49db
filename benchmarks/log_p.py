"""log p(x) of one VAE by every means: what each says, with which error, in which time.

    MNIST --fit--> the VAE of Burda et al. 2016 --evaluate, ais--> docs/log_p.md, results/log_p.json

`PVAE_DATA=... python -m benchmarks.log_p` takes about half an hour. It trains the model and
evaluates it on the first 100 test images, all on one thread: times are of the processor, which a
busy machine hardly changes. Importance sampling must come out below annealing, as Wu et al. 2017
found; the refined guide must reach L_5000 with a tenth of the draws. Both are checked and said.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pvae
from benchmarks import machine, table
from pvae import Evaluation, Refine
from pvae.pair import Pair

__all__ = ["RUNS", "claims", "markdown", "measure", "record"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "log_p.json"
PAGE = ROOT / "docs" / "log_p.md"
EPOCHS, BATCH = 60, 100
REFINE = Refine()
HEAD = ("log p(x) by", "draws", "nats", "s.e. (draws)", "k-hat fails", "CPU seconds")

Run = Callable[[Pair, Any], Evaluation]


def by_draws(num_particles: int, **settings: Any) -> Run:
    """Importance sampling."""
    return lambda model, test: pvae.evaluate(
        model, test, num_particles, grid=[num_particles], **settings
    )


def by_chains(num_temperatures: int) -> Run:
    """Annealing, from the prior, with Wu et al.'s numbers of chains and leapfrogs."""
    return lambda model, test: pvae.ais(model, test, 16, num_temperatures=num_temperatures)


RUNS: dict[str, tuple[str, Run]] = {
    "prior, L5000": ("5,000", by_draws(5000, proposal="prior")),
    "guide, L50": ("50", by_draws(50)),
    "guide, L500": ("500", by_draws(500)),
    "guide, L5000": ("5,000", by_draws(5000)),
    "guide, L50000": ("50,000", by_draws(50_000)),
    "guide at Sobol points, L4096": ("4,096", by_draws(4096, points="sobol")),
    "defensive, L5000": ("5,000", by_draws(5000, proposal="defensive")),
    "refined guide, L50": ("50 + 400", by_draws(50, proposal=REFINE)),
    "refined guide, L500": ("500 + 400", by_draws(500, proposal=REFINE)),
    "refined guide, L5000": ("5,000 + 400", by_draws(5000, proposal=REFINE)),
    "AIS, 500 temperatures": ("16 chains", by_chains(500)),
    "AIS, 2000 temperatures": ("16 chains", by_chains(2000)),
}


def record(result: Evaluation, seconds: float) -> dict[str, float]:
    """What goes into the table."""
    errors = result.per_datum["bound_se"][-1]
    return {
        "log p": float(result.log_p.mean()),
        "se": float((errors**2).sum() ** 0.5) / errors.size,
        "k-hat fails": result.failing,
        "seconds": seconds,
    }


def measure(model: Pair, test: Any, runs: dict[str, tuple[str, Run]]) -> dict[str, Any]:
    """Every run on the same data."""
    found = {}
    for name, (_, run) in runs.items():
        start = time.process_time()
        result = run(model, test)
        found[name] = record(result, time.process_time() - start)
        print(name, found[name], flush=True)
    return found


def claims(found: dict[str, Any]) -> list[str]:
    """What the table must show, met or missed."""
    guide = found["guide, L5000"]["log p"]
    said = []
    for what, name in (
        ("AIS over 2,000 temperatures above the guide's L5000", "AIS, 2000 temperatures"),
        ("AIS over 500 temperatures above it", "AIS, 500 temperatures"),
        ("The refined guide's L500 above it, from a tenth of the draws", "refined guide, L500"),
        ("Its L50 as well, from 450 draws with those that refine it", "refined guide, L50"),
    ):
        by = found[name]["log p"] - guide
        said.append(f"{what}: {'met' if by > 0 else 'missed'}, by {by:+.2f} nats.")
    return said


def markdown(report: dict[str, Any]) -> str:
    """The table, and what it shows."""
    rows = []
    for name, row in report["runs"].items():
        fails = "" if row["k-hat fails"] != row["k-hat fails"] else f"{row['k-hat fails']:.0%}"
        numbers = f"{row['log p']:.2f}", f"{row['se']:.2f}", fails, f"{row['seconds']:.0f}"
        rows.append((name, RUNS[name][0], *numbers))
    said = "\n".join(f"- {claim}" for claim in claims(report["runs"]))
    trained = (
        f"Trained for {report['epochs']} epochs in {report['training seconds']:.0f} CPU seconds."
    )
    where = report["machine"]
    on = f"{where['processor']}, one thread, torch {where['libraries']['torch']}"
    return f"{table.lines(HEAD, rows)}\n\n{said}\n\n{trained} {on}, {where['date']}."


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.log_p", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a trial: prints, writes nothing")
    options = parser.parse_args()
    data = pvae.load_data("mnist")
    torch.set_num_threads(1)
    epochs = 1 if options.quick else EPOCHS
    about = machine.describe("cpu")
    how = {"epochs": epochs, "batch_size": BATCH, "lr": 1e-3, "device": "cpu", "progress": False}
    start = time.process_time()
    fitted = pvae.fit(pvae.models.vae(), data.train, **how)
    seconds = time.process_time() - start
    test = data.test.subset(slice(4 if options.quick else 100))
    report = {
        "machine": about,
        "epochs": epochs,
        "training seconds": seconds,
        "runs": measure(fitted.model, test, RUNS),
    }
    if options.quick:
        print(markdown(report))
        return
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(table.between_marks(PAGE.read_text(), "MNIST", markdown(report)))


if __name__ == "__main__":
    main()
