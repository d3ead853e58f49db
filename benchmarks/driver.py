"""Times side by side: a process for each peer, asked in turn, so that one at a time is busy.

    work, workers  --measure-->  Result: values of every round by contender, and checks

A round asks each contender once, and every other round in the opposite order. The ratio of a peer
is the median over rounds of pvae's time to its own, so that what slows a whole round cancels.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import checks
from benchmarks.works import Work

__all__ = ["Missing", "Result", "Worker", "Workers", "alternate", "measure"]

ROOT = Path(__file__).parents[1]


class Missing(RuntimeError):
    """The peer is not installed."""


class Worker:
    """A peer's process.

    Raises:
        Missing: if the peer cannot be imported there.
    """

    def __init__(self, peer: str, folder: Path, device: str, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "benchmarks.worker", peer, str(folder), device]
        self.log = open(folder / f"{peer.replace('/', ' ')}.log", "a")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        ready = self._answer()
        if "missing" in ready:
            self.close()
            raise Missing(ready["missing"])

    def start(self, kind: str, sizes: dict[str, int]) -> dict[str, Any]:
        """Set up a work; return what it comes to."""
        return self._ask(do="start", kind=kind, sizes=sizes)["check"]

    def time(self) -> float:
        """Seconds for one unit of the work."""
        return float(self._ask(do="time")["seconds"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended: {self._last_words()}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = Path(self.log.name).read_text().splitlines()
        return lines[-1] if lines else "no message"

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.log.close()


class Workers:
    """The workers of a run, each started when it is first asked for."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.running: dict[str, Worker] = {}
        self.missing: dict[str, str] = {}

    def __getitem__(self, peer: str) -> Worker:
        if peer in self.missing:
            raise Missing(self.missing[peer])
        if peer not in self.running:
            try:
                self.running[peer] = Worker(peer, self.folder, self.device)
            except Missing as error:
                self.missing[peer] = str(error)
                raise
        return self.running[peer]

    @contextmanager
    def fresh(self, peer: str, env: dict[str, str]) -> Any:
        """A worker of its own environment, for one measurement."""
        worker = Worker(peer, self.folder, self.device, env)
        try:
            yield worker
        finally:
            worker.close()

    def drop(self, peer: str) -> None:
        """End a worker that failed; asked for again, it starts anew."""
        if worker := self.running.pop(peer, None):
            worker.close()

    def close(self) -> None:
        """End all."""
        for peer in list(self.running):
            self.drop(peer)


@dataclass
class Result:
    """What was measured of a work.

    Args:
        name: of the work.
        unit: what one value is of.
        targets: largest ratio wanted, by peer, or None.
        values: of each round, by contender, in seconds (or in what `unit` says).
        checks: by peer, whether its results equal pvae's, and in words.
        failed: by peer, why there are no values: not installed, or an error.
    """

    name: str
    unit: str
    targets: dict[str, float | None]
    values: dict[str, list[float]] = field(default_factory=dict)
    checks: dict[str, tuple[bool, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def alternate(
    contenders: dict[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Values of each round by contender, and the errors of those that failed and left."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for i in range(rounds):
        names = list(contenders)
        for name in names if i % 2 == 0 else reversed(names):
            if name in failed:
                continue
            try:
                values[name].append(contenders[name]())
            except RuntimeError as error:
                failed[name] = str(error)
    return {name: found for name, found in values.items() if name not in failed}, failed


def measure(work: Work, workers: Workers, rounds: int) -> Result:
    """Start the work at every contender, compare what it comes to, then time it in turn."""
    result = Result(work.name, work.unit, work.targets)
    found = dict(_started(work, workers, result.failed))
    if "pvae" in found:
        for peer in list(found)[1:]:
            result.checks[peer] = checks.compare(found["pvae"], found[peer])
    result.values, failed = alternate({peer: workers[peer].time for peer in found}, rounds)
    result.failed |= failed
    for peer in result.failed:
        workers.drop(peer)
    return result


def _started(
    work: Work, workers: Workers, failed: dict[str, str]
) -> Iterable[tuple[str, dict[str, Any]]]:
    for peer in ("pvae", *work.targets):
        try:
            yield peer, workers[peer].start(work.kind, work.sizes)
        except Missing as error:
            failed[peer] = f"not installed ({error})"
        except RuntimeError as error:
            failed[peer] = str(error)
