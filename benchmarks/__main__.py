"""`python -m benchmarks`: run the works side by side, print the ratio table, write the results.

A whole run writes results/cpu.json (or cuda.json) and the tables of README.md. With --quick or
--only it prints them, and writes nothing.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import inputs, machine, processes, table
from benchmarks.driver import Result, Workers, measure
from benchmarks.works import SCALING, Series, works

HERE = Path(__file__).parent
ROUNDS = 7
BUSY = 0.5  # load of an idle machine is far below


def main() -> None:
    """Read the arguments, run, and write."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="pvae-benchmarks-") as name:
        folder = Path(name)
        report: dict[str, Any] = {"machine": machine.describe(options.device)}
        if (load := report["machine"]["load before"]) > BUSY:
            print(f"Other processes are running (load {load}): these times will mean little.")
        report["data"] = inputs.make(folder, 6000) if options.quick else inputs.make(folder)
        workers = Workers(folder, options.device)
        try:
            results = list(_told(_results(options, workers)))
            scaling = [_grown(series, workers) for series in _series(options)]
        finally:
            workers.close()
        if options.device == "cuda":
            report["TF32 minus float32, nats"] = processes.tf32_difference(folder)
    report["works"] = [table.summary(result) for result in results]
    report["scaling"] = scaling
    tables = "\n\n".join(
        make(found) for make, found in ((table.markdown, results), (table.growth, scaling)) if found
    )
    print("\n" + tables)
    if not (options.quick or options.only):
        _write(options.device, report, tables)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 rounds: a trial")
    parser.add_argument("--only", metavar="NAME", help="only works whose name has this in it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def _results(options: argparse.Namespace, workers: Workers) -> Iterator[Result]:
    """All works of the table, one after the other."""
    rounds = 3 if options.quick else ROUNDS

    def wanted(name: str) -> bool:
        return not options.only or options.only in name

    for work in works(options.quick, options.device):
        if wanted(work.name):
            yield measure(work, workers, rounds)
    if options.device == "cuda":
        return
    if wanted("import pvae"):
        yield processes.imports(rounds)
    if wanted("peak memory of evaluate"):
        yield processes.memory(5000 if options.quick else 50_000)
    if options.quick:
        return
    if wanted("first step"):
        yield from processes.first_steps(workers)
    if wanted("default demo"):
        workers.close()
        yield from processes.demos()


def _told(results: Iterator[Result]) -> Iterator[Result]:
    """Print each result as it comes."""
    for result in results:
        print(f"\n{result.name}", flush=True)
        for _, _, ours, peer, theirs, *rest in table.rows(result):
            print(f"  pvae {ours:>8}   {peer:28} {theirs:>8}   {'  '.join(rest)}", flush=True)
        for peer, (equal, words) in result.checks.items():
            print(f"    {'equal' if equal else 'DIFFERENT'}: {peer}, {words}", flush=True)
        yield result


def _series(options: argparse.Namespace) -> tuple[Series, ...]:
    whole = not (options.quick or options.only) or options.only == "scaling"
    return SCALING if whole and options.device == "cpu" else ()


def _grown(series: Series, workers: Workers) -> dict[str, Any]:
    """Medians at each size, and the exponents fitted to them."""
    medians: dict[str, list[float]] = {}
    for work in series.works():
        result = measure(work, workers, rounds=3)
        for name, (_, median, _) in table.summary(result)["quartiles"].items():
            medians.setdefault(name, []).append(median)
    found = {
        name: table.exponent(series.values, values)
        for name, values in medians.items()
        if len(values) == len(series.values)
    }
    print(f"{series.name}: " + ", ".join(f"{n} {e:.2f}" for n, e in found.items()), flush=True)
    return {"name": series.name, "sizes": series.values, "medians": medians, "exponents": found}


def _write(device: str, report: dict[str, Any], tables: str) -> None:
    (HERE / "results").mkdir(exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (HERE / "results" / f"{device}.json").write_text(text + "\n")
    readme = HERE / "README.md"
    readme.write_text(table.between_marks(readme.read_text(), device, tables))


if __name__ == "__main__":
    main()
