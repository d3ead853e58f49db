"""Global state, fenced: what pvae sets for speed or reproducibility it puts back.

`fenced` seeds torch, switches Pyro's and torch's argument checks off (data are checked where they
enter) and flushes denormal floats to zero: importance weights underflow into them, and arithmetic
on denormals is many times slower. All three are as they were when the block ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import nn

__all__ = ["evaluating", "fenced", "module_device", "resolve_device"]


@contextmanager
def fenced(seed: int | None, device: torch.device) -> Iterator[None]:
    """Run a block with its own random state, without validation and without denormals."""
    devices = [device] if device.type == "cuda" else []
    flushed = _flushes_denormals()
    with torch.random.fork_rng(devices), pyro.validation_enabled(False):
        torch.set_flush_denormal(True)
        try:
            if seed is not None:
                torch.manual_seed(seed)
            yield
        finally:
            torch.set_flush_denormal(flushed)


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
