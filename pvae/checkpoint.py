"""One folder a run: weights in safetensors, everything else in JSON.

    run/
      run.json                         declaration, settings, history, and the names of these:
      weights.<epoch>.safetensors      parameters and buffers of the model
      training.<epoch>.safetensors     optimiser, random state, best weights: what resuming needs

Files are written beside and renamed into place, `run.json` last; it names the files that belong to
it, so a run killed at any moment leaves a whole checkpoint. Reading runs no code from the folder.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

__all__ = ["has_checkpoint", "pack", "read", "replace", "unpack", "write"]

FORMAT = 1


def has_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a run."""
    return (Path(folder) / "run.json").exists()


def write(
    folder: str | os.PathLike[str],
    meta: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    stamp: int,
) -> None:
    """Write a checkpoint, then remove the one before it.

    Args:
        folder: made where it does not exist.
        meta: plain data.
        weights: the model's tensors.
        training: tensors that resuming needs.
        stamp: number of this checkpoint, larger than that of the one before.

    Raises:
        OSError: if the disk is full or not writable; the checkpoint before stays whole.
    """
    path = Path(folder)
    files = {"weights": f"weights.{stamp}.safetensors", "training": f"training.{stamp}.safetensors"}
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, tensors in (("weights", weights), ("training", training)):
            replace(path / files[name], save({k: _plain(v) for k, v in tensors.items()}))
        text = json.dumps({"format": FORMAT, **meta, "files": files}, indent=1, allow_nan=True)
        replace(path / "run.json", text.encode())
    except OSError as error:
        raise OSError(
            f"The checkpoint could not be written to {path} ({error}). What was saved before is "
            "untouched; make room or choose another `folder`."
        ) from error
    for old in path.glob("*.safetensors"):
        if old.name not in files.values():
            old.unlink()


def _plain(value: Tensor) -> Tensor:
    # A copy: safetensors refuses tensors that share memory.
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def replace(path: Path, content: bytes) -> None:
    """Write a file beside, then rename it into place, so that it is whole at any moment."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Meta data, weights and training tensors of a run's folder.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if a file is damaged or of another format.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run: {path} is missing.")
    try:
        meta = json.loads(path.read_text())
        if meta.get("format") != FORMAT:
            raise ValueError(f"format {meta.get('format')!r}, expected {FORMAT}")
        files = {name: path.parent / Path(file).name for name, file in meta["files"].items()}
        return meta, load_file(files["weights"]), load_file(files["training"])
    except (ValueError, KeyError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"The run in {folder} is damaged: {error}.") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"The weights of the run in {folder} are damaged: {error}.") from error


def pack(prefix: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested state as plain data, its tensors put into `tensors` under names of their own.

    Args:
        prefix: what the tensors' names start with.
        value: dictionaries, lists, numbers and tensors, such as an optimiser's `state_dict()`.
        tensors: filled in place.
    """
    if isinstance(value, Tensor):
        tensors[prefix] = value
        return {"tensor": prefix}
    if isinstance(value, Mapping):
        items = [[key, pack(f"{prefix}.{key}", item, tensors)] for key, item in value.items()]
        return {"items": items}
    if isinstance(value, list | tuple):
        return [pack(f"{prefix}.{i}", item, tensors) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{prefix} holds a {type(value).__name__}, which a checkpoint cannot keep.")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].clone()
    if "float" in value:
        return float(value["float"])
    return {_hashable(key): unpack(item, tensors) for key, item in value["items"]}


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def module_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each shared tensor once (safetensors keeps no aliases)."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            named[name] = value.detach()
    return named
