"""`load_data`: a known name, or data of one's own -> train, valid and test, each a `Data`.

source  --reader-->  values  --binarisation | dequantisation-->  --standardisation-->  Splits
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pvae.data.archives import data_root
from pvae.data.dataset import Data
from pvae.data.files import SUFFIXES
from pvae.data.record import DatasetInfo, TableInfo
from pvae.data.rows import Rows, read_rows
from pvae.data.sources import DATASETS
from pvae.data.spec import DataSpec, check_noise, local_generator
from pvae.data.standardise import scaled, standardised
from pvae.data.tables import TABLES

__all__ = ["Splits", "load_data", "load_like"]


class Splits(NamedTuple):
    """A data set, parted."""

    train: Data
    valid: Data
    test: Data


def load_data(
    source: Any = "digits",
    *,
    binarisation: str | None = None,
    dequantisation: str = "none",
    standardisation: str = "none",
    root: str | Path | None = None,
    flatten: bool = True,
    missing: bool = False,
    seed: int = 0,
) -> Splits:
    """Load a data set by name, or split one's own, into train, valid and test.

    Known sets and their splits are in `pvae.data.DATASETS`, images: digits (embedded), mnist,
    fashion-mnist, kmnist, emnist-letters, omniglot, binarised-mnist, frey-faces, cifar10, svhn,
    celeba; and in `pvae.data.TABLES`, offline: breast-cancer, wine, and, generated with known
    density (`pvae.data.TOYS`), ring, two-moons, pinwheel, linear-gaussian.

    One's own are a tensor, an array, a pandas frame, a `Dataset`, a `DataLoader`, or the path of an
    .npy, .npz, .csv or .parquet file or of a folder of images; see `Data.of`. Rows are permuted and
    parted in 80, 10 and 10 %, and gathered in memory; but arrays `train`, `valid` and `test` of an
    .npz, and folders so named, are the splits.

    Binarisation, of values in [0, 1]:
        "dynamic": 1 with probability the grey level. Train is drawn anew for each batch, and so for
            each epoch, in which a datum is in one batch; valid and test once. The default for sets
            of grey images but faces, and the custom since Salakhutdinov & Murray 2008 and Burda,
            Grosse & Salakhutdinov 2016.
        "fixed": train too is drawn once. Valid and test are those of "dynamic".
        "threshold": 1 where the grey level is above 1/2.
        "none": grey levels, level / (levels - 1). The default for arrays, which stay as they are,
            for faces and colours, and where dequantisation or standardisation is asked for.

    Dequantisation:
        "uniform": (level + U[0, 1)) / levels, in [0, 1) (Theis, van den Oord & Bethge 2016).
            Train is drawn anew for each batch, valid and test once. Densities are then in nats in
            this unit-scaled space; in the space of 0 to `levels` they are lower by
            dimensions * log(levels). Of arrays, those of dtype uint8 (256 levels) can be.

    Standardisation:
        "columns": each dimension minus its mean in train, divided by its deviation there, after
            dequantisation; one that is constant in train is only centred.

    What scaling does to a density is in `spec.log_jacobian`.

    Args:
        source: a known name, or data of one's own whose first dimension counts them.
        binarisation: see above.
        dequantisation: see above.
        standardisation: see above.
        root: folder of the files; by default the environment's PVAE_DATA, else ~/.cache/pvae/data.
            Missing files are downloaded there; with all in place it is only read.
        flatten: make each datum a vector, as `MLP` takes it. Otherwise images are
            (colours, height, width), as `Conv` takes them, and arrays keep their shape.
        missing: whether NaN in data of one's own is allowed, and marks what was not seen (a blank
            label is then -1): for sites declared `Observed(..., missing=True)`. Of a known set see
            `Data.masked`.
        seed: of splits that are made here, of generated data, and of all noise that is drawn once.
            The caller's random state is not touched.

    Raises:
        ValueError: if the name is unknown; if binarisation, dequantisation and standardisation do
            not fit each other or the values; if data have NaN, infinity, or less than three rows;
            if a file is damaged.
        TypeError: if data are not real numbers.
        FileNotFoundError: if a file is missing and its download fails.
    """
    info = _known(source)
    if binarisation is None:
        bits = isinstance(info, DatasetInfo) and info.binarised
        plain = dequantisation == standardisation == "none"
        binarisation = "dynamic" if bits and plain else "none"
    check_noise(binarisation, dequantisation, standardisation)
    if isinstance(info, DatasetInfo):
        splits = _image_splits(str(source), info, data_root(root), seed)
    elif isinstance(info, TableInfo):
        splits = _table_splits(str(source), info, seed)
    else:
        splits = _own_splits(source, dequantisation, seed, missing)
    _check_range(splits, binarisation, dequantisation)
    parts = [
        _with_noise(_flat(data) if flatten else data, binarisation, dequantisation)
        for data in splits
    ]
    return Splits(*(standardised(parts) if standardisation == "columns" else parts))


def load_like(source: Any, spec: DataSpec, name: str | None = None, missing: bool = False) -> Data:
    """New values, as measured, in the shape, with the noise and on the scale of a specification.

    Args:
        source: as of `Data.of`; columns are taken in their order.
        spec: of what a model was trained on.
        name: whose, for errors and results; found from the source where left out.
        missing: whether NaN is allowed; it is too where the specification has some.

    Raises:
        TypeError: for splits, or a `Data` that has noise or scale of its own.
        ValueError: for data of another size, or outside what the noise takes.
    """
    if isinstance(source, Data):
        data = source
    else:
        rows = read_rows(source, name, missing=missing or spec.missing)
        if not isinstance(rows, Rows):
            raise TypeError(f"{str(source)!r} holds splits: pass one of them.")
        grey = rows.dtype in ("uint8", "torch.uint8") and spec.dequantisation != "none"
        data = Data.from_rows(_grey(rows, spec.dequantisation) if grey else rows)
    if data.spec.is_scaled or data.spec.binarisation != "none":
        raise TypeError(
            f"`like` gives noise and scale to values as measured, and {data.spec.name!r} has "
            f"its own already ({data.spec.space()})."
        )
    shapes = [tuple(n for n in s.event_shape if n > 1) for s in (data.spec, spec)]
    flat = min(map(len, shapes)) < 2
    if data.spec.dimensions != spec.dimensions or not (flat or shapes[0] == shapes[1]):
        raise ValueError(
            f"Data {data.spec.name!r} must have the shape of {spec.name!r}, {spec.event_shape} a "
            f"datum or as many numbers in a row, got {data.spec.event_shape}."
        )
    own = replace(
        data.spec,
        event_shape=spec.event_shape,
        image_shape=spec.image_shape,
        levels=data.spec.levels or spec.levels,
        seed=spec.seed,
    )
    data = replace(data, values=data.values.reshape(len(data), *spec.event_shape), spec=own)
    _check_range([data], spec.binarisation, spec.dequantisation)
    data = _with_noise(data, spec.binarisation, spec.dequantisation)
    return scaled(data, spec.location, spec.scale) if spec.scale else data


def _known(source: Any) -> DatasetInfo | TableInfo | None:
    """The record of a name; None for data of one's own."""
    if not isinstance(source, str):
        return None
    if source in DATASETS:
        return DATASETS[source]
    if source in TABLES:
        return TABLES[source]
    if os.sep in source or source.lower().endswith(SUFFIXES) or Path(source).exists():
        return None
    known = [*DATASETS, *TABLES]
    near = get_close_matches(source.lower(), known, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"Unknown data set {source!r}.{hint} Known: {', '.join(known)}. "
        "For data of your own, pass the array instead of a name, or the path of a file."
    )


def _image_splits(name: str, info: DatasetInfo, root: Path, seed: int) -> Splits:
    """The named set in grey levels, (N, 1, H, W) or (N, 3, H, W) in [0, 1]."""
    parts = {}
    for split, part in zip(Splits._fields, info.load(root, seed), strict=True):
        levels = part.levels if part.levels.ndim == 4 else part.levels.unsqueeze(1)
        grey = (levels / (info.levels - 1)).contiguous()
        rows = Rows(grey, part.labels, name, "uint8", info.levels)
        parts[split] = Data.from_rows(rows, split, seed)
    return Splits(**parts)


def _table_splits(name: str, info: TableInfo, seed: int) -> Splits:
    values, labels = info.load(seed)
    data = Data.from_rows(Rows(values, labels, name, str(values.dtype)), seed=seed)
    return _parted(data, torch.arange(len(data)).split(info.splits))


def _own_splits(source: Any, dequantisation: str, seed: int, missing: bool) -> Splits:
    """A user's rows, permuted and parted in 80, 10 and 10 % unless they come in parts."""
    if isinstance(source, Data):
        raise TypeError("`load_data` splits arrays, got a Data. Pass its `values` to split those.")
    rows = read_rows(source, seed=seed, missing=missing)
    if not isinstance(rows, Rows):
        return Splits(
            **{
                split: Data.from_rows(_grey(part, dequantisation), split, seed)
                for split, part in rows.items()
            }
        )
    count = len(rows.values)
    if count < 3:
        raise ValueError(
            f"An array needs three rows or more to be split, got {count}. "
            "For a data set without splits use `Data.of(array)`."
        )
    order = torch.randperm(count, generator=local_generator(seed, "split"))
    part = max(1, round(0.1 * count))
    data = Data.from_rows(_grey(rows, dequantisation), seed=seed)
    return _parted(data, order.split([count - 2 * part, part, part]))


def _parted(data: Data, rows: Sequence[Tensor]) -> Splits:
    parts = {
        split: data.subset(index.to(data.values.device))
        for split, index in zip(Splits._fields, rows, strict=True)
    }
    return Splits(
        **{
            split: replace(part, spec=replace(part.spec, split=split))
            for split, part in parts.items()
        }
    )


def _grey(rows: Rows, dequantisation: str) -> Rows:
    """Bytes as grey levels in [0, 1], where they are to be dequantised."""
    if dequantisation == "none" or rows.levels is not None:
        return rows
    if rows.dtype not in ("uint8", "torch.uint8"):
        raise ValueError(
            f"Uniform dequantisation of an array needs dtype uint8 (256 levels), got {rows.dtype}. "
            "With other levels, dequantise before loading: (level + uniform) / levels."
        )
    return rows._replace(values=rows.values / 255, levels=256)


def _check_range(splits: Sequence[Data], binarisation: str, dequantisation: str) -> None:
    """Refuse to binarise bits or what is no probability, and to dequantise what has no levels."""
    spec = splits[0].spec
    if dequantisation != "none" and spec.levels is None:
        raise ValueError(
            f"dequantisation={dequantisation!r} needs grey levels, and {spec.name!r} has none: its "
            "values are real numbers."
        )
    if binarisation == dequantisation == "none":
        return
    if binarisation != "none" and spec.levels == 2:
        raise ValueError(
            f"{spec.name!r} is binary as published, got binarisation={binarisation!r}. Leave that "
            "out."
        )
    values = [d.values.nan_to_num(0.5) if d.spec.missing else d.values for d in splits]
    lowest = min(float(part.min()) for part in values)
    highest = max(float(part.max()) for part in values)
    if lowest < 0 or highest > 1:
        noise = f"binarisation={binarisation!r}"
        if binarisation == "none":
            noise = f"dequantisation={dequantisation!r}"
        raise ValueError(
            f"{noise} needs values in [0, 1], the array's go from {lowest:g} to {highest:g}. Grey "
            "levels? Divide by the highest level first."
        )


def _flat(data: Data) -> Data:
    values = data.values.reshape(len(data), -1)
    spec = replace(data.spec, event_shape=tuple(values.shape[1:]))
    return replace(data, values=values, spec=spec)


def _with_noise(data: Data, binarisation: str, dequantisation: str) -> Data:
    """Binarise or dequantise grey levels; all noise but that of a train split is drawn here."""
    spec = replace(data.spec, binarisation=binarisation, dequantisation=dequantisation)
    if binarisation == "threshold":
        bits = (data.values > 0.5).to(data.values.dtype)
        if spec.missing:
            bits = torch.where(data.values.isnan(), data.values, bits)
        return replace(data, values=bits, spec=spec)
    if binarisation == dequantisation == "none":
        return replace(data, spec=spec)
    noisy = replace(data, spec=spec, resampled=True)
    stays_fresh = spec.split == "train" and binarisation != "fixed"
    return noisy if stays_fresh else noisy.realised()
