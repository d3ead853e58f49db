"""Rows: data of any kind as one matrix, and that matrix in blocks.

    Data, tensor or array (N, *event)  --as_rows-->  (N, D)  --blocks-->  (B, D), (B, D), ...

The baselines calculate in float64 whatever the data's type, because their matrix products subtract
large numbers: with 50 diagonal components on dequantised MNIST, centred, float32 puts log p(x)
wrong by up to 4 nats a datum. EM takes float32 only where it has found a better centre.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pvae.data import Data

__all__ = ["BLOCK_ELEMENTS", "as_rows", "blocks", "mean", "on_device"]

# Elements in one block of rows: on a CPU it should stay near the cache, on a GPU fill the device.
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def as_rows(data: Any, size: int | None = None) -> Tensor:
    """Flatten a `Data`, tensor or array (N, *event) to (N, D), float32 or float64.

    Raises ValueError on NaN or infinity, or when D is not `size`.
    """
    found = Data.of(data).realised()
    if found.spec.missing:
        raise ValueError(
            f"Data {found.spec.name!r} have missing entries (NaN), and baselines take none: fill "
            "them in, or declare the model with `Observed(..., missing=True)` and fit it by "
            "pvae.fit."
        )
    values = found.values
    x = values.reshape(len(values), -1)
    if size is not None and x.shape[1] != size:
        raise ValueError(
            f"Each datum must have {size} elements, as when the model was fitted, "
            f"got {x.shape[1]}: data of shape {tuple(values.shape)}. One datum? Pass `x[None]`."
        )
    return x


def blocks(
    x: Tensor, centre: Tensor, columns: int = 0, *, squares: bool = False
) -> Iterator[Tensor]:
    """Yield x - centre in the type of `centre`, a block (B, D) at a time.

    With `squares` each row is followed by its squares, (B, 2 D). The caller may make D and
    `columns` more numbers of a row: B falls with both. Each block overwrites the one before: fresh
    memory would cost more in page faults than the sums.
    """
    size = x.shape[1]
    num_rows = max(1, BLOCK_ELEMENTS[x.device.type] // (2 * size + columns))
    buffer = centre.new_empty(min(num_rows, len(x)), 2 * size if squares else size)
    for rows in x.split(num_rows):
        block = buffer[: len(rows)]
        torch.sub(rows.to(centre.dtype), centre, out=block[:, :size])
        if squares:
            torch.square(block[:, :size], out=block[:, size:])
        yield block


def mean(x: Tensor) -> Tensor:
    """The mean of the rows, (D,), in float64."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for block in blocks(x, total.clone()):
        total += block.sum(dim=0)
    return total / len(x)


def on_device(x: Tensor, device: str | torch.device) -> Tensor:
    """The rows where the fit is to be: "auto" is CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return x.to(device)
