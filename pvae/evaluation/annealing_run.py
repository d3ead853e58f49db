"""Annealed walks over all data, block by block, with a state that outlives the process.

    columns  --blocks-->  first walk, walk that counts (and one back)  -->  log-weights (C, N)

The state of the block under way and the weights of those done lie in one file, renamed into place.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from pvae.checkpoint import replace
from pvae.evaluation.annealing import Path, Walk, first_walk, fixed_by
from pvae.fence import random_state, set_random_state
from pvae.pair import Columns, Pair
from pvae.passes import MAX_ROWS, MAX_ROWS_CUDA
from pvae.step import Speed

__all__ = ["AnnealedRun"]

SAVE_EVERY = 30.0  # seconds


class AnnealedRun:
    """Blocks of data, each walked along twice; its state is kept in a folder if there is one.

    Args:
        model: in evaluation mode.
        columns: its data, on the device.
        settings: num_chains, num_temperatures, leapfrog_steps, start, schedule; and what else
            tells one run from another.
        speed: how gradients are computed.
        folder: where the state is kept.
        posterior: an exact draw of each datum's posterior, by latent (1, N, *event): then walks go
            back from it as well.
    """

    def __init__(
        self,
        model: Pair,
        columns: Columns,
        settings: dict[str, Any],
        speed: Speed,
        folder: str | os.PathLike[str] | None = None,
        posterior: dict[str, Tensor] | None = None,
    ):
        self.model, self.columns, self.settings, self.speed = model, columns, settings, speed
        self.posterior = posterior
        self.device = columns.tensors()[0].device
        self.file = None if folder is None else FilePath(folder) / "annealing.safetensors"
        self.done: list[dict[str, Tensor]] = []
        self.walks: list[Walk] = []  # of the block under way
        self.saved = time.monotonic()
        usual = MAX_ROWS_CUDA if self.device.type == "cuda" else MAX_ROWS
        self.size = max(1, usual // model.categories // settings["num_chains"])

    def all_blocks(self, progress: bool) -> dict[str, Tensor]:
        """`log_w` (C, N), `acceptance` (N,), and of walks back `log_w_back`; on the CPU."""
        from tqdm.auto import tqdm

        resumed = self._read()
        with tqdm(
            total=len(self.columns),
            disable=not progress,
            desc=f"{self.model.name}, annealing",
            unit="datum",
        ) as bar:
            for i, start in enumerate(range(0, len(self.columns), self.size)):
                rows = slice(start, min(start + self.size, len(self.columns)))
                if i >= len(self.done):
                    for share in self._block(rows, resumed):
                        bar.update(share * (rows.stop - rows.start))
                    resumed = {}
                else:
                    bar.update(rows.stop - rows.start)
        return {name: torch.cat([b[name] for b in self.done], -1) for name in self.done[0]}

    def _block(self, rows: slice, resumed: dict[str, Tensor]) -> Iterator[float]:
        """All walks of a block; yields shares of the work as they are done."""
        s, self.walks = self.settings, []
        block = [values[rows] for values in self.columns.tensors()]
        self._resume_random(resumed)
        path = Path(self.model, self.columns, block, s["num_chains"], s["start"], self.speed)
        found = first_walk(path, s["num_temperatures"], s["leapfrog_steps"])
        yield from self._walk(found, 0.2, resumed)
        fixed = fixed_by(found, s["schedule"], s["num_temperatures"])
        walk = Walk(path, path.draw(), *fixed, s["leapfrog_steps"])
        yield from self._walk(walk, 0.8, resumed)
        done = {"log_w": walk.log_weights.cpu(), "acceptance": walk.acceptance.cpu()}
        if self.posterior is not None:
            exact = path.latents.flatten({k: v[:, rows] for k, v in self.posterior.items()})
            betas, sizes = (part.flip(0) for part in fixed)
            walk = Walk(path, exact.expand_as(walk.state["z"]), betas, sizes, s["leapfrog_steps"])
            yield from self._walk(walk, 0.0, resumed)
            done["log_w_back"] = walk.log_weights.cpu()
        self.done.append(done)
        self.walks = []
        self._save()

    def _walk(self, walk: Walk, share: float, resumed: dict[str, Tensor]) -> Iterator[float]:
        """To the path's end, from where it was left if it was."""
        number = len(self.walks)
        self.walks.append(walk)
        left = {k.partition(".")[2]: v for k, v in resumed.items() if k.startswith(f"{number}.")}
        walk.state |= {name: value.to(walk.state[name].device) for name, value in left.items()}
        if left and number == len(resumed["walks"]) - 1:
            self._resume_random(resumed)
        while not walk.is_done:
            walk.step()
            yield share / walk.length
            if time.monotonic() - self.saved > SAVE_EVERY:
                self._save()

    # ------------------------------------------------------------------ the folder

    def _resume_random(self, resumed: dict[str, Tensor]) -> None:
        if resumed:
            states = [resumed[name] for name in ("random", "random_cuda") if name in resumed]
            set_random_state(states, self.device)

    def _save(self) -> None:
        """Weights of blocks done, and the state of the one under way."""
        self.saved = time.monotonic()
        if self.file is None:
            return
        names = ("random", "random_cuda")
        tensors = dict(zip(names, random_state(self.device), strict=False))
        tensors["walks"] = torch.zeros(len(self.walks))
        for i, walk in enumerate(self.walks):
            tensors |= {f"{i}.{name}": value for name, value in walk.state.items()}
        for i, block in enumerate(self.done):
            tensors |= {f"done.{i}.{name}": value for name, value in block.items()}
        plain = {k: v.cpu().contiguous().clone() for k, v in tensors.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace(self.file, save(plain, {"settings": json.dumps(self.settings)}))

    def _read(self) -> dict[str, Tensor]:
        """The state of the block under way; weights of blocks done go to `done`.

        Raises:
            ValueError: if the file is damaged, or of another run.
        """
        if self.file is None or not self.file.exists():
            return {}
        try:
            with safetensors.safe_open(self.file, "pt") as file:
                settings = json.loads(file.metadata()["settings"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file} is damaged ({error}); remove it.") from error
        if settings != self.settings:
            different = [k for k in self.settings if settings.get(k) != self.settings[k]]
            raise ValueError(
                f"{self.file} holds another run (another {', '.join(different)}). Choose another "
                "`folder`, or remove it."
            )
        for name in [name for name in tensors if name.startswith("done.")]:
            _, i, key = name.split(".")
            self.done += [{} for _ in range(int(i) + 1 - len(self.done))]
            self.done[int(i)][key] = tensors.pop(name)
        return tensors
