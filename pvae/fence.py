"""Global state, fenced: what pvae sets for speed or reproducibility it puts back.

`fenced` seeds torch, switches Pyro's and torch's argument checks off (data are checked where they
enter) and flushes denormal floats to zero: importance weights underflow into them, and arithmetic
on denormals is many times slower. All three are as they were when the block ends.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import torch
from torch import Tensor, nn

__all__ = [
    "evaluating",
    "fenced",
    "module_device",
    "random_state",
    "resolve_device",
    "set_random_state",
]


@contextmanager
def fenced(seed: int | None, device: torch.device) -> Iterator[None]:
    """Run a block with its own random state, without validation and without denormals."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        _without_validation(),
        _without_denormals(),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def _without_validation() -> Iterator[None]:
    """Pyro's own block puts back what Pyro set last, which is not always what torch has."""
    before = torch.distributions.Distribution._validate_args
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


_depth = 0  # of fences within fences, of which only the outermost sets the flag


@contextmanager
def _without_denormals() -> Iterator[None]:
    global _depth
    before = _flushes_denormals()
    if _depth == 0:
        _flush_denormals(True)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _flush_denormals(before)


def _flush_denormals(flush: bool) -> None:
    """Set the flag in this thread and in OpenMP's workers.

    `torch.set_flush_denormal` reaches its own thread only, and workers keep the flag that they
    were born with, so that a pool of two threads stays slow. A callback runs in each worker.
    """
    torch.set_flush_denormal(flush)
    if torch.get_num_threads() > 1 and (openmp := _openmp()) is not None:
        callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
            lambda _: torch.set_flush_denormal(flush) and None
        )
        openmp.GOMP_parallel(callback, None, torch.get_num_threads(), 0)


def _openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP library that torch has loaded, if it uses one."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        return ctypes.CDLL(str(path))
    return None


def _flushes_denormals() -> bool:
    """torch has no getter: a denormal double either survives a product by one or does not."""
    return not bool(torch.tensor([1e-310], dtype=torch.float64).mul(1.0).ne(0.0).item())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a block with the module in evaluation mode and without gradients."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes.items():
            child.training = training


def resolve_device(device: str | torch.device) -> torch.device:
    """`"auto"` is CUDA where there is one.

    Raises:
        ValueError: for a device that torch does not know or does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"No device {device!r} here ({error}). Try device='auto'.") from None
    return torch.device(device)


def module_device(module: nn.Module) -> torch.device:
    """Where a module's parameters are; the CPU if it has none."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def random_state(device: torch.device) -> list[Tensor]:
    """States of the generators that a step draws from."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    """Put them back."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[-1], device)
