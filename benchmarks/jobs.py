"""Jobs: each in a process and a thread of its own, and on record, so that none is done twice.

    jobs  --run-->  what each found, kept in a file: {"machine": ..., "records": [job | found, ...]}

A job is a frozen dataclass of plain fields, and what it found is plain data.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine

__all__ = ["ROOT", "Clock", "alone", "in_a_process", "run"]

ROOT = Path(__file__).parents[1]
TOGETHER = 2  # processes
IMPORTED = ["pvae.models", "pvae.evaluation", "pandas", "xarray", "arviz_stats.base"]
IMPORTED += ["sklearn.cluster", "sklearn.datasets", "sklearn.decomposition"]


class Clock:
    """In a scheduler's place: the process's CPU time at the end of each epoch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def step(self) -> None:
        self.times.append(time.process_time())


def in_a_process[J](do: Callable[[J], Any], job: J) -> Any:
    """What `do` finds of a job, in a process of its own, forked from one that has all imported.

    Raises:
        RuntimeError: with its last words, if it fails.
    """
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            return process.submit(do, job).result()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def alone() -> None:
    """Let processes that are started from now on have one thread, and all that is slow imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    multiprocessing.set_forkserver_preload(IMPORTED)


def run[J](jobs: list[J], file: Path, do: Callable[[J], dict[str, Any]]) -> list[dict[str, Any]]:
    """Each job's fields and what it found; what the file does not have yet is done and added."""
    start = {"machine": machine.describe("cpu"), "records": []}
    report = json.loads(file.read_text()) if file.exists() else start
    kind: Any = type(jobs[0])
    known = {kind(**{f: r[f] for f in kind.__dataclass_fields__}): r for r in report["records"]}
    missing = [job for job in jobs if job not in known]
    with ThreadPoolExecutor(TOGETHER) as pool:
        for job, found in zip(missing, pool.map(do, missing), strict=True):
            fields: Any = job
            known[job] = asdict(fields) | found
            report["records"] = list(known.values())
            file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
            print(f"{job}: {found}", flush=True)
    return [known[job] for job in jobs]
