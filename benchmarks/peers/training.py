"""What training jobs share: the same data, batches and count of steps, whatever library steps."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import inputs

__all__ = ["CHECKED", "LR", "FirstStep", "Training"]

LR = 1e-3
CHECKED = 200  # steps from the first weights, whose losses are compared between peers


class Training:
    """Blocks of steps of Adam. A subclass gives `prepare` and `run`.

    Sizes: batch, particles, and where they differ from the usual, num_data, latent, steps of a
    block (an epoch where left out), and whether a time is of a step or of a block (`kind`).
    """

    source = "bits"

    def __init__(self, sizes: dict[str, int], folder: Path, device: str):
        self.batch, self.particles = sizes["batch"], sizes["particles"]
        self.data = inputs.load(folder, self.source, sizes.get("num_data"))
        self.num_data = len(self.data)
        self.latent = sizes.get("latent", 50)
        self.steps = sizes.get("steps", self.num_data // self.batch)
        self.units = self.steps if "steps" in sizes else 1
        self.device = device
        self.blocks = 0

    def prepare(self) -> None:
        """Build the model from the first weights, and compile it."""
        raise NotImplementedError

    def run(self, batches: np.ndarray) -> np.ndarray:
        """Step through batches (steps, batch); return the losses, mean nats per datum (steps,)."""
        raise NotImplementedError

    def block(self) -> np.ndarray:
        """The next block of steps."""
        self.blocks += 1
        return self.run(inputs.batches(self.num_data, self.batch, self.steps, self.blocks))

    def check(self) -> dict[str, Any]:
        """Losses of the first steps."""
        self.prepare()
        blocks = [self.block() for _ in range(-(-CHECKED // self.steps))]
        return {"losses": np.concatenate(blocks)[:CHECKED].tolist()}

    def time(self) -> float:
        """Seconds for a step, or for a block where that is the unit."""
        self.blocks += 1
        batches = inputs.batches(self.num_data, self.batch, self.steps, self.blocks)
        start = time.perf_counter()
        self.run(batches)
        return (time.perf_counter() - start) / self.units


class FirstStep:
    """The time from a built process to the first step done: building, tracing, compiling."""

    def __init__(self, training: Training):
        self.training = training

    def check(self) -> dict[str, Any]:
        """Nothing: it would warm up what is to be timed cold."""
        return {}

    def time(self) -> float:
        """Seconds; of meaning once in a process."""
        start = time.perf_counter()
        self.training.prepare()
        self.training.run(inputs.batches(self.training.num_data, self.training.batch, 1, 0))
        return time.perf_counter() - start
