"""One peer in a process of its own, which does what the driver asks for, line by line.

    {"do": "start", "kind": ..., "sizes": {...}}  -->  {"check": {...}}
    {"do": "time"}                                -->  {"seconds": ...}

Run as `python -m benchmarks.worker PEER FOLDER DEVICE`. The first line that it writes is {"ready":
true}, or {"missing": what cannot be imported}. What goes wrong later is answered as {"error": ...}.
What libraries print goes to standard error, so that only answers are on standard output.
"""

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from benchmarks.peers import FILES, Job

__all__ = ["main", "serve"]

Jobs = dict[tuple[str, str], Callable[[dict[str, int], Path, str], Job]]


def serve(
    peer: str, jobs: Jobs, folder: Path, device: str, requests: Iterable[str], answers: IO[str]
) -> None:
    """Answer each request by a line, until there are no more."""
    job: Job | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if request["do"] == "start":
                job = None  # what the last one held is freed before the next one is made
                gc.collect()
                job = jobs[peer, request["kind"]](request["sizes"], folder, device)
                answer: dict[str, Any] = {"check": job.check()}
            elif job is None:
                raise RuntimeError("No work was started.")
            else:
                answer = {"seconds": job.time()}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        _say(answers, answer)


def _say(answers: IO[str], answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Import the peer, and serve it."""
    peer, folder, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        jobs = importlib.import_module(f"benchmarks.peers.{FILES[peer]}").JOBS
    except ImportError as error:
        _say(answers, {"missing": str(error)})
        return
    _say(answers, {"ready": True})
    serve(peer, jobs, Path(folder), device, sys.stdin, answers)


if __name__ == "__main__":
    main()
