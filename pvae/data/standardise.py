"""Standardisation by columns: each dimension minus train's mean, divided by train's deviation.

train, valid, test  --standardised-->  the same, with (x - location) / scale, and both in the spec

Of entries that are missing (NaN) nothing is known: mean and deviation are of those that were seen.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from pvae.data.dataset import Data

__all__ = ["scaled", "standardised"]


def standardised(splits: Sequence[Data]) -> list[Data]:
    """Standardise splits, the first of which is train; where noise is drawn, after it is.

    The deviation divides by N. A dimension that is constant in train is only centred.
    """
    location, scale = _moments(splits[0])
    return [scaled(data, location, scale) for data in splits]


def _moments(train: Data) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each dimension of what is observed, dequantisation's noise included."""
    values, spec = train.values.reshape(len(train), -1), train.spec
    blocks = values.split(4096)  # float64 by parts: the whole would double the memory
    seen = torch.stack([(~rows.isnan()).sum(0) for rows in blocks]).sum(0)
    if not seen.all():
        raise ValueError(
            f"Dimension {int((seen == 0).nonzero()[0])} of {spec.name!r} (from 0) is missing in "
            "every datum of train, and cannot be standardised. Leave it out."
        )
    sums = [rows.nan_to_num(0.0).sum(0, dtype=torch.float64) for rows in blocks]
    mean = torch.stack(sums).sum(0) / seen
    squares = [(rows.double() - mean).square().nan_to_num(0.0, math.inf).sum(0) for rows in blocks]
    variance = torch.stack(squares).sum(0) / seen
    lowest, highest = values.nan_to_num(math.inf).amin(0), values.nan_to_num(-math.inf).amax(0)
    variance[lowest == highest] = 0  # but for the rounding of the mean
    if train.resampled and spec.levels is not None:
        # (level + U) / levels, U ~ U[0, 1) of mean 1/2 and variance 1/12; level = grey (levels - 1)
        mean = (mean * (spec.levels - 1) + 0.5) / spec.levels
        variance = (variance * (spec.levels - 1) ** 2 + 1 / 12) / spec.levels**2
    deviation = torch.where(variance > 0, variance.sqrt(), 1.0)
    if not (mean.isfinite() & deviation.isfinite()).all():
        raise ValueError(
            f"Data {spec.name!r} are too large to be standardised: mean or deviation overflows."
        )
    return tuple(mean.tolist()), tuple(deviation.tolist())


def scaled(data: Data, location: tuple[float, ...], scale: tuple[float, ...]) -> Data:
    """The data minus `location`, divided by `scale`; where noise is drawn, after it is."""
    spec = replace(data.spec, location=location, scale=scale)
    if data.resampled:
        return replace(data, spec=spec)
    shift, unit = spec.affine(data.values)
    return replace(data, spec=spec, values=(data.values - shift) / unit)
