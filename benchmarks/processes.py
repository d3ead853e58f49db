"""Works that need a fresh process for each value: import, memory, first steps, the demo.

They are given as `Result`s, like works that are timed in blocks.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.driver import ROOT, Missing, Result, Workers, alternate

__all__ = ["demos", "first_steps", "imports", "memory", "tf32_difference"]

COMPILED = ("pvae", "PyTorch + torch.compile", "NumPyro")
STEP = {"batch": 128, "particles": 1, "steps": 1}


def run(name: str, argument: str, env: dict[str, str] | None = None) -> float:
    """The number that a function of `fresh` comes to.

    Raises:
        RuntimeError: with its last words, if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fresh", name, argument],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or ["no message"])[-1])
    return float(done.stdout.splitlines()[-1])


def imports(rounds: int) -> Result:
    """`import pvae` beside `import pyro`."""
    result = Result("import pvae", "import", {"import pyro": 1.1})
    contenders: dict[str, Callable[[], float]] = {
        "pvae": lambda: run("imported", "pvae"),
        "import pyro": lambda: run("imported", "pyro"),
    }
    result.values, result.failed = alternate(contenders, rounds)
    return result


def memory(most: int) -> Result:
    """Peak memory of `evaluate` with many particles, beside K = 500."""
    result = Result(f"peak memory of evaluate, K = {most:,}", "MB", {"evaluate, K = 500": 1.1})
    contenders: dict[str, Callable[[], float]] = {
        "pvae": lambda: run("peak", str(most)),
        "evaluate, K = 500": lambda: run("peak", "500"),
    }
    result.values, result.failed = alternate(contenders, 1)
    return result


def first_steps(workers: Workers) -> Iterator[Result]:
    """From imported libraries to the first step done, with empty caches of compiled code, and full.

    NumPyro is compiled anew in each process: what it keeps on disk is its own choice, which is off.
    """
    with tempfile.TemporaryDirectory() as cache:
        env = {"TORCHINDUCTOR_CACHE_DIR": cache}
        for state in ("cold", "warm"):
            targets: dict[str, float | None] = dict.fromkeys(COMPILED[1:])
            result = Result(f"first step, batch 128, {state} cache", "first step", targets)
            for peer in COMPILED:
                try:
                    with workers.fresh(peer, env) as worker:
                        worker.start("first step", STEP)
                        result.values[peer] = [worker.time()]
                except Missing as error:
                    result.failed[peer] = f"not installed ({error})"
                except RuntimeError as error:
                    result.failed[peer] = str(error)
            yield result


def demos() -> Iterator[Result]:
    """The default demo with cold and warm caches, beside one whose fits are eager."""
    with tempfile.TemporaryDirectory() as cache:
        env = {"TORCHINDUCTOR_CACHE_DIR": cache}
        runs: dict[str, Callable[[], float]] = {
            "cold": lambda: run("demo", "default", env),
            "warm": lambda: run("demo", "default", env),
            "compile=False": lambda: run("demo", "False"),
        }
        values, failed = alternate(runs, 1)
    for state in ("cold", "warm"):
        result = Result(f"default demo, {state} cache", "demo", {"compile=False": 1.0})
        named = {"pvae": state, "compile=False": "compile=False"}
        result.values = {name: values[key] for name, key in named.items() if key in values}
        result.failed = {name: failed[key] for name, key in named.items() if key in failed}
        yield result


def tf32_difference(folder: Path) -> float:
    """See `fresh.tf32`."""
    return run("tf32", str(folder))
