"""Rows of one's own, of whatever kind, as tensors: the door through which all data enter.

    tensor, array, frame, file, Dataset, DataLoader  --read_rows-->  Rows: values, labels

Values become float32; or float64, where they are so already or are whole numbers that float32 would
round. Each entry along the first dimension is a datum. That values are finite is checked in one
place, `check_finite`; NaN, and what a NumPy array masks, is missing where that is allowed.
"""

import reprlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pvae.data.spec import local_generator

__all__ = ["Parted", "Rows", "check_finite", "from_frame", "from_values", "read_rows"]

EXACT = 2**24  # up to which float32 holds every whole number


class Rows(NamedTuple):
    """What was read.

    Attributes:
        values: (N, *event), finite or NaN, float32 or float64.
        labels: (N,) int64, -1 where there is none; or None for all.
        name: of the file, else "tensor", "frame" or the class of the `Dataset`.
        dtype: of the source, such as "uint8" or "torch.uint8".
        levels: number of grey levels where `values` are these in [0, 1]; None for values as given.
        missing: whether some values are NaN, which were not seen.
    """

    values: Tensor
    labels: Tensor | None
    name: str
    dtype: str
    levels: int | None = None
    missing: bool = False


Parted = dict[str, Rows]  # train, valid and test as a source has them


def read_rows(
    source: Any, name: str | None = None, seed: int = 0, missing: bool = False
) -> Rows | Parted:
    """Read all rows of a source.

    Args:
        source: a tensor, a NumPy array or anything `numpy.asarray` reads; a pandas frame; the path
            of a file or folder; a `Dataset` with a length, or a `DataLoader`.
        name: whose, for errors and results; found from the source where left out.
        seed: of what a `Dataset` or a `DataLoader` draws from torch's generator, which is put back.
        missing: whether NaN is allowed, and marks what was not seen; a label that is NaN is -1.

    Raises:
        TypeError: if the values are no real numbers, or sparse.
        ValueError: if there is no datum, a value is NaN or infinite, rows differ in shape, a label
            is no whole number, or a file is damaged.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(source, str | Path):
        from pvae.data.files import read_file

        return read_file(Path(source).expanduser(), name, missing)
    if isinstance(source, DataLoader | Dataset):
        return _from_dataset(
            source, name or type(getattr(source, "dataset", source)).__name__, seed, missing
        )
    pandas = sys.modules.get("pandas")  # whoever has a frame has imported it
    if pandas is not None and isinstance(source, pandas.DataFrame):
        return from_frame(source, name or "frame", missing)
    return from_values(source, name or "tensor", missing=missing)


def from_values(
    data: Any,
    name: str,
    labels: Any = None,
    columns: Sequence[str] | None = None,
    missing: bool = False,
) -> Rows:
    """A tensor or what `numpy.asarray` reads, checked; `columns` are the names of a table's."""
    values = data.detach() if isinstance(data, Tensor) else _numpy_tensor(data, name)
    if values.layout != torch.strided or values.is_nested:
        raise TypeError(
            f"Data {name!r} must be a dense tensor, got a sparse or nested one "
            f"({values.layout}). Pass `.to_dense()` of a sparse one; pad a nested one."
        )
    if values.is_complex():
        raise TypeError(f"Data {name!r} must be real numbers, got {values.dtype}.")
    if values.ndim == 0 or values.numel() == 0:
        raise ValueError(
            f"Data {name!r} must have shape (N, *event) with N >= 1, got {tuple(values.shape)}."
        )
    dtype = str(getattr(data, "dtype", values.dtype))
    if values.dtype != torch.float64:
        exact = values.is_floating_point() or _is_exact_in_float32(values)
        values = values.to(torch.float32 if exact else torch.float64)
    found = check_finite(values, name, columns, missing)
    own = None if labels is None else _labels(labels, name, missing)
    return Rows(values, own, name, dtype, missing=found)


def check_finite(
    values: Tensor, name: str, columns: Sequence[str] | None = None, missing: bool = False
) -> bool:
    """Raise ValueError for NaN or infinity, naming the row and the column or pixel.

    The only place where this is decided, for data from every source.

    Returns:
        Whether there is a NaN, where it is allowed.
    """
    bad, first, found = 0, None, False
    for start, rows in _blocks(values):
        wrong = ~rows.reshape(len(rows), -1).isfinite()
        if missing and wrong.any():
            absent = rows.reshape(len(rows), -1).isnan()
            found, wrong = found or bool(absent.any()), wrong & ~absent
        if first is None and wrong.any():
            row, place = divmod(int(wrong.flatten().nonzero()[0]), wrong.shape[1])
            first = start + row, place, float(rows.reshape(len(rows), -1)[row, place])
        bad += int(wrong.any(dim=1).sum())
    if first is None:
        return found
    row, place, value = first
    if columns is not None:
        where = f", column {columns[place]!r}"
    elif values.ndim > 1:
        index = ", ".join(str(i) for i in np.unravel_index(place, tuple(values.shape[1:])))
        where = f", place ({index})"
    else:
        where = ""
    raise ValueError(
        f"Data {name!r} has NaN or infinite values in {bad} of {len(values)} rows, the first is "
        f"row {row}{where}: {value} (rows and places count from 0). Drop or fill them in before "
        "loading."
        + ("" if missing else " Where NaN marks what was not seen, say so by `missing=True`.")
    )


def from_frame(frame: Any, name: str, missing: bool = False) -> Rows:
    """A pandas frame: a column "label", "Label" or "LABEL" becomes labels, the others are numbers.

    Labels that are no numbers are numbered in their order. With `missing`, a blank one is -1.
    """
    from pandas.api.types import is_bool_dtype, is_complex_dtype, is_integer_dtype, is_numeric_dtype

    own = [place for place, column in enumerate(frame.columns) if str(column).lower() == "label"]
    if len(own) > 1:
        raise ValueError(
            f"Data {name!r} must have one column of labels, got "
            f"{', '.join(repr(frame.columns[place]) for place in own)}. Drop or rename the others."
        )
    table = frame.iloc[:, [place for place in range(frame.shape[1]) if place not in own]]
    columns = [str(column) for column in table.columns]
    wrong = [
        _first_word(table.iloc[:, place], columns[place])
        for place, dtype in enumerate(table.dtypes)
        if not is_numeric_dtype(dtype) or is_complex_dtype(dtype)
    ]
    if wrong and len(table):
        raise TypeError(
            f"The columns of {name!r} must be real numbers, and these are not: {'; '.join(wrong)} "
            '(rows count from 0). Drop or encode them; a column "label" becomes the labels. Where '
            "a word marks what was not seen, leave that blank and say so by `missing=True`."
        )
    labels = _label_numbers(frame.iloc[:, own[0]]) if own else None
    whole = all(is_integer_dtype(dtype) or is_bool_dtype(dtype) for dtype in table.dtypes)
    single = whole or all(str(dtype).lower() == "float32" for dtype in table.dtypes)
    if whole and ((table.max() > EXACT).any() or (table.min() < -EXACT).any()):
        single = False
    values = table.to_numpy(np.float32 if single else np.float64, na_value=np.nan)
    return from_values(values, name, labels, columns, missing)


def _first_word(column: Any, name: str) -> str:
    """Where a column first has no number: "row 3, column 'b': '?'"; its type if that is all."""
    for row, (value, absent) in enumerate(zip(column, column.isna(), strict=True)):
        try:
            float("nan" if absent else value)
        except (TypeError, ValueError):
            return f"row {row}, column {name!r}: {reprlib.repr(value)}"
    return f"column {name!r} ({column.dtype})"


def _label_numbers(column: Any) -> np.ndarray:
    """Numbers as they are, words as their places in their order; NaN for a blank."""
    from pandas import CategoricalDtype
    from pandas.api.types import is_float_dtype, is_numeric_dtype

    if isinstance(column.dtype, CategoricalDtype) and is_numeric_dtype(column.cat.categories):
        column = column.astype(object)
    column = column.convert_dtypes()  # numbers among objects, too
    if not is_numeric_dtype(column.dtype):
        codes = column.astype("category").cat.codes
        column = codes.where(codes >= 0)
    whole = not is_float_dtype(column.dtype) and not column.isna().any()
    return column.to_numpy(np.int64 if whole else np.float64, na_value=np.nan)


def _from_dataset(source: Any, name: str, seed: int, missing: bool) -> Rows:
    values: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(local_generator(seed, "reading").get_state())
        for number, item in enumerate(_items(source, name)):
            value, label = _parts(item, f"item {number} of {name!r}")
            if values and value.shape[1:] != values[0].shape[1:]:
                raise ValueError(
                    f"All data of {name!r} must have the shape of the first, "
                    f"{tuple(values[0].shape[1:])}; item {number} (from 0) has "
                    f"{tuple(value.shape[1:])}."
                )
            values.append(value)
            labels += [] if label is None else [label]
    if not values:
        raise ValueError(f"Data {name!r} must have a datum or more, got none.")
    if labels and len(labels) != len(values):
        raise ValueError(f"Data {name!r} must have labels for all items or for none.")
    known = torch.cat(labels) if labels else None
    return from_values(torch.cat(values), name, known, missing=missing)


def _items(source: Any, name: str) -> Iterator[Any]:
    """What a loader yields, with a dimension of data in front; a data set's items with one of 1."""
    is_batched = isinstance(source, DataLoader) and source.batch_sampler is not None
    try:
        size = len(source)
    except TypeError:
        raise TypeError(
            f"{name!r} has no length, so that its end is not known: `pvae.fit` streams it, and "
            "only that."
        ) from None
    stream = source if isinstance(source, DataLoader) else (source[i] for i in range(size))
    for item in stream:
        yield item if is_batched else _batch_of_one(item)


def _batch_of_one(item: Any) -> Any:
    if isinstance(item, list | tuple):
        return [_batch_of_one(part) for part in item]
    return item[None] if isinstance(item, Tensor) else _item_tensor(item)


def _item_tensor(item: Any) -> Any:
    """One array, picture or number, with a dimension in front; anything else as it is."""
    array = np.asarray(item)
    if array.dtype.kind not in "biuf":
        return item
    if np.ma.isMaskedArray(item):
        return _numpy_tensor(item, "item")[None]
    if hasattr(item, "getbands") and array.ndim == 3:  # a picture of PIL's: channels come last
        array = array.transpose(2, 0, 1)
    return torch.from_numpy(array.copy())[None]


def _parts(item: Any, whose: str) -> tuple[Tensor, Tensor | None]:
    parts = list(item) if isinstance(item, list | tuple) else [item]
    if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) for part in parts):
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(
            f"Data must be tensors, arrays or images, or pairs of one and its label; {whose} is "
            f"({got})."
        )
    return parts[0], parts[1] if len(parts) == 2 else None


def _labels(labels: Any, name: str, missing: bool) -> Tensor:
    """(N,) int64: whole numbers, of floating type or not; NaN becomes -1 where it is allowed."""
    if not isinstance(labels, Tensor):
        array = np.asarray(labels)
        if array.dtype.kind not in "biuf":
            raise ValueError(
                f"Labels of {name!r} must be a whole number for each datum, got dtype "
                f"{array.dtype}. Number them: `np.unique(labels, return_inverse=True)[1]`."
            )
        labels = torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else np.int64))
    if labels.ndim != 1 or labels.is_complex():
        raise ValueError(
            f"Labels of {name!r} must be a whole number for each datum, got {labels.dtype} of "
            f"shape {tuple(labels.shape)}. Leave out what is no label."
        )
    if labels.is_floating_point():
        absent = labels.isnan()
        if not missing and absent.any():
            raise ValueError(
                f"Data {name!r} has no label in row {int(absent.nonzero()[0])} (counted from 0). "
                "Fill it in, or say `missing=True`, which makes it -1."
            )
        labels = labels.masked_fill(absent, -1)
        broken = ~labels.isfinite() | (labels != labels.round())
        if broken.any():
            row = int(broken.nonzero()[0])
            raise ValueError(
                f"Labels of {name!r} must be a whole number for each datum, got "
                f"{float(labels[row]):g} in row {row} (counted from 0), which looks like the "
                "target of a regression. Put that among the values, under another name, or leave "
                "it out."
            )
    return labels.to(torch.int64)


def _numpy_tensor(data: Any, name: str) -> Tensor:
    """float32 or float64; NaN where an array is masked."""
    if isinstance(data, list | tuple) and any(map(np.ma.isMaskedArray, data)):
        data = np.ma.stack(data)
    try:
        array = np.ma.asarray(data) if np.ma.isMaskedArray(data) else np.asarray(data)
    except ValueError as error:
        raise ValueError(
            f"Data {name!r} must have rows of one shape, and those of this {type(data).__name__} "
            f"have not: {error} Cut or pad them; of padding by NaN, say so by `missing=True`."
        ) from error
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"Data {name!r} must be a tensor or an array of real numbers, got "
            f"{type(data).__name__} of dtype {array.dtype}."
            + (" Pass `.toarray()` of what is sparse." if hasattr(data, "toarray") else "")
        )
    seen = np.ma.filled(array, 0)
    wide = array.dtype.itemsize >= 8 if array.dtype.kind == "f" else not _is_exact_in_float32(seen)
    numbers = array.astype(np.float64 if wide else np.float32)
    return torch.from_numpy(np.ma.filled(numbers, np.nan))


def _is_exact_in_float32(values: Any) -> bool:
    """Whether the whole numbers of an array or a tensor keep all digits: none is beyond 2^24."""
    if values.dtype.itemsize < 4 or not values.nbytes:
        return True
    if isinstance(values, Tensor) and not values.dtype.is_signed:
        values = values.double()  # torch has no least and largest of wide unsigned numbers
    return -EXACT <= int(values.min()) and int(values.max()) <= EXACT


def _blocks(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Parts of some million numbers, so that a file mapped into memory is read piece by piece."""
    rows = max(1, 4_000_000 * len(values) // max(1, values.numel()))
    for start in range(0, len(values), rows):
        yield start, values[start : start + rows]
