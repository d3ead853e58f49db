"""`load_data`: a known name or an array of one's own -> train, valid and test, each a `Data`.

source  --loader-->  grey levels in [0, 1]  --binarisation | dequantisation-->  Splits
"""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.data.archives import data_root
from pvae.data.dataset import Data
from pvae.data.sources import DATASETS, DatasetInfo
from pvae.data.spec import DataSpec, check_noise, local_generator

__all__ = ["Splits", "load_data"]


class Splits(NamedTuple):
    """A data set, parted."""

    train: Data
    valid: Data
    test: Data


def load_data(
    source: str | Tensor | np.ndarray | Sequence[Any] = "digits",
    *,
    binarisation: str | None = None,
    dequantisation: str = "none",
    root: str | Path | None = None,
    flatten: bool = True,
    seed: int = 0,
) -> Splits:
    """Load a data set by name, or split an array of shape (N, *event), into train, valid and test.

    Known sets and their splits are in `pvae.data.DATASETS`: digits (embedded), mnist,
    fashion-mnist, kmnist, emnist-letters, omniglot. An array's rows are permuted and parted in
    80, 10 and 10 %.

    Binarisation, of values in [0, 1]:
        "dynamic": 1 with probability the grey level. Train is drawn anew for each batch, valid and
            test once. The default for image sets, and the custom since Salakhutdinov & Murray 2008
            and Burda, Grosse & Salakhutdinov 2016.
        "fixed": train too is drawn once. Valid and test are those of "dynamic".
        "threshold": 1 where the grey level is above 1/2.
        "none": grey levels, level / (levels - 1). The default for arrays, which stay as they are,
            and where dequantisation is asked for.

    Dequantisation:
        "uniform": (level + U[0, 1)) / levels, in [0, 1) (Theis, van den Oord & Bethge 2016).
            Train is drawn anew for each batch, valid and test once. Densities are then in nats in
            this unit-scaled space; in the space of 0 to `levels` they are lower by
            dimensions * log(levels). Of arrays, those of dtype uint8 (256 levels) can be.

    Args:
        source: a known name, or a tensor or array whose first dimension counts the data.
        binarisation: see above.
        dequantisation: see above.
        root: folder of the files; by default the environment's PVAE_DATA, else ~/.cache/pvae/data.
            Missing files are downloaded there; with all in place it is only read.
        flatten: make each datum a vector, as `MLP` takes it. Otherwise images are
            (1, height, width), as `Conv` takes them, and arrays keep their shape.
        seed: of the digits' and the arrays' split, and of all noise that is drawn once. The
            caller's random state is not touched.

    Raises:
        ValueError: if the name is unknown; if binarisation and dequantisation do not fit each
            other or the values; if an array has NaN, infinity, or less than three rows; if a file
            is damaged.
        TypeError: if an array does not hold real numbers.
        FileNotFoundError: if a file is missing and its download fails.
    """
    if binarisation is None:
        is_named = isinstance(source, str)
        binarisation = "dynamic" if is_named and dequantisation == "none" else "none"
    check_noise(binarisation, dequantisation)
    if isinstance(source, str):
        splits = _known_splits(source, data_root(root), seed)
    else:
        splits = _array_splits(source, binarisation, dequantisation, seed)
    train, valid, test = (
        _with_noise(_flat(data) if flatten else data, binarisation, dequantisation)
        for data in splits
    )
    return Splits(train, valid, test)


def _known_splits(name: str, root: Path, seed: int) -> Splits:
    """The named set in grey levels, (N, 1, H, W) in [0, 1]."""
    info = _known(name)
    train, valid, test = (
        Data(
            (part.levels.unsqueeze(1) / (info.levels - 1)).contiguous(),
            part.labels,
            DataSpec(
                name=name,
                split=split,
                event_shape=(1, *info.image_shape),
                image_shape=info.image_shape,
                binarisation="none",
                dequantisation="none",
                levels=info.levels,
                seed=seed,
            ),
        )
        for split, part in zip(Splits._fields, info.load(root, seed), strict=True)
    )
    return Splits(train, valid, test)


def _known(name: str) -> DatasetInfo:
    if name in DATASETS:
        return DATASETS[name]
    near = get_close_matches(name.lower(), DATASETS, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"Unknown data set {name!r}.{hint} Known: {', '.join(DATASETS)}. "
        "For data of your own, pass the array instead of a name."
    )


def _array_splits(source: Any, binarisation: str, dequantisation: str, seed: int) -> Splits:
    """A user's array, its rows permuted and parted in 80, 10 and 10 %."""
    if isinstance(source, Data):
        raise TypeError("`load_data` splits arrays, got a Data. Pass its `values` to split those.")
    data = Data.of(source)
    values, spec = data.values, replace(data.spec, seed=seed)
    if len(values) < 3:
        raise ValueError(
            f"An array needs three rows or more to be split, got {len(values)}. "
            "For a data set without splits use `Data.of(array)`."
        )
    if binarisation != "none" and (values.min() < 0 or values.max() > 1):
        raise ValueError(
            f"binarisation={binarisation!r} needs values in [0, 1], the array's go from "
            f"{values.min():g} to {values.max():g}. Grey levels? Divide by the highest level first."
        )
    if dequantisation == "uniform":
        values = _unit_scaled(values, getattr(source, "dtype", None))
        spec = replace(spec, levels=256)
    order = torch.randperm(len(values), generator=local_generator(seed, "split"))
    part = max(1, round(0.1 * len(values)))
    train, valid, test = (
        Data(values[rows.to(values.device)], None, replace(spec, split=split))
        for split, rows in zip(
            Splits._fields, order.split([len(order) - 2 * part, part, part]), strict=True
        )
    )
    return Splits(train, valid, test)


def _unit_scaled(values: Tensor, dtype: Any) -> Tensor:
    """Grey levels 0 to 255 as [0, 1]."""
    if str(dtype) not in ("uint8", "torch.uint8"):
        raise ValueError(
            f"Uniform dequantisation of an array needs dtype uint8 (256 levels), got {dtype}. With "
            "other levels, dequantise before loading: (level + uniform) / levels."
        )
    return values / 255


def _flat(data: Data) -> Data:
    values = data.values.reshape(len(data), -1)
    spec = replace(data.spec, event_shape=tuple(values.shape[1:]))
    return replace(data, values=values, spec=spec)


def _with_noise(data: Data, binarisation: str, dequantisation: str) -> Data:
    """Binarise or dequantise grey levels; all noise but that of a train split is drawn here."""
    spec = replace(data.spec, binarisation=binarisation, dequantisation=dequantisation)
    if binarisation == "threshold":
        return replace(data, values=(data.values > 0.5).to(data.values.dtype), spec=spec)
    if binarisation == dequantisation == "none":
        return replace(data, spec=spec)
    noisy = replace(data, spec=spec, resampled=True)
    stays_fresh = spec.split == "train" and binarisation != "fixed"
    return noisy if stays_fresh else noisy.realised()
