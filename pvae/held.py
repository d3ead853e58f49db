"""What a program holds beside its parameters and buffers, and a graph read out of it has frozen.

A graph takes parameters and buffers as inputs, and other tensors as constants that it shares. A
number, or a tensor that another one replaces, is what it was when the graph was read. So before a
graph is used again, what the program holds now is compared with what it held then.
"""

import inspect
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["held_by"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
OURS = ("pvae", "torch", "pyro", "builtins")  # libraries, whose functions hold nothing of a model's
LONGEST = 100  # a longer sequence is taken for data, and known by its identity


def held_by(root: Any) -> list[Any]:
    """Numbers and identities of tensors, reached from an object by its attributes and closures."""
    found: list[Any] = []
    seen: set[int] = set()
    left = [root]
    while left:
        value = left.pop()
        if isinstance(value, PLAIN):
            found.append(repr(value))  # in which NaN is equal to itself
        elif isinstance(value, np.ndarray):
            found.append(value.tobytes() if value.size <= LONGEST else _Same(value))
        elif isinstance(value, Tensor):
            found.append(_Same(value))
        elif id(value) not in seen:
            seen.add(id(value))
            left += _parts(value)
    return found


class _Same:
    """Equal to itself alone; holds the object, whose id another one could have later."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _parts(value: Any) -> list[Any]:
    """What an object is made of."""
    if isinstance(value, nn.Module):
        own = vars(value)
        return [own[key] for key in own if key not in ("_parameters", "_buffers")]
    if isinstance(value, dict):
        return list(value.values())[:LONGEST]
    if isinstance(value, list | tuple):
        return list(value) if len(value) <= LONGEST else [id(value)]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        if value.__module__.partition(".")[0] in OURS:
            return []
        names = inspect.getclosurevars(value)
        return [*names.nonlocals.values(), *names.globals.values()]
    if isinstance(value, type | ModuleType) or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).values())
