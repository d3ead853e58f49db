"""`Data`: one split of a data set, with its specification and its noise.

    values (N, *event)  --batch(index)-->  (B, *event), what a model sees

Where a split is resampled, `values` are the source's grey levels in [0, 1] and every batch draws
anew: a Bernoulli bit per grey level (dynamic binarisation, Salakhutdinov & Murray 2008; Burda,
Grosse & Salakhutdinov 2016), or uniform noise within each level (dequantisation, Uria, Murray &
Larochelle 2013; Theis, van den Oord & Bethge 2016), then standardised where the specification says
so. Otherwise `values` are what is observed; where the specification says so, NaN marks what is not.
"""

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pvae.data.rows import Rows, read_rows
from pvae.data.spec import DataSpec, local_generator

__all__ = ["Data", "image_shape_of", "observe"]


@dataclass(frozen=True, eq=False, repr=False)
class Data(Dataset[Tensor]):
    """One split, a map-style `torch.utils.data.Dataset`.

    Attributes:
        values: (N, *event_shape), float32, or float64 if the user's array is.
        labels: (N,) int64, -1 where there is none; or None.
        spec: what the data are.
        resampled: whether each batch draws its noise anew, with torch's global generator.
    """

    values: Tensor
    labels: Tensor | None
    spec: DataSpec
    resampled: bool = False
    # Made once, so that a step which draws noise finds them on its device.
    _affine: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        events, labels = tuple(self.values.shape[1:]), self.labels
        if len(self.values) == 0 or events != self.spec.event_shape:
            raise ValueError(
                f"Data {self.spec.name!r} must have shape (N, *{self.spec.event_shape}) with "
                f"N >= 1, got {tuple(self.values.shape)}."
            )
        if labels is not None and labels.shape != (len(self.values),):
            raise ValueError(
                f"Data {self.spec.name!r} must have a label for each of its {len(self.values)} "
                f"rows, got labels of shape {tuple(labels.shape)}."
            )
        if self.resampled and self.spec.scale:
            object.__setattr__(self, "_affine", self.spec.affine(self.values))

    @classmethod
    def of(
        cls,
        data: Any,
        name: str | None = None,
        *,
        missing: bool = False,
        mask: Any = None,
        like: "Data | DataSpec | None" = None,
    ) -> "Data":
        """Wrap what holds data, whole; a `Data` stays as it is.

        A tensor, a NumPy array, masked or not, or anything `numpy.asarray` reads; a pandas frame,
        whose column "label" (or "Label", "LABEL") becomes the labels; the path of an .npy, .npz,
        .csv or .parquet file or of a folder of images; a torch `Dataset` of a known length, or a
        `DataLoader`, of tensors or of pairs of one and its label. Values become float32, or stay
        float64, which whole numbers beyond 2^24 become too; those of an .npy file are mapped into
        memory, not read, where they are such numbers. Each entry along the first dimension is a
        datum.

        Args:
            data: see above.
            name: whose, for errors and results; found from the data where left out.
            missing: whether NaN is allowed, and marks what was not seen (see also `masked`); a
                blank label is then -1.
            mask: True where an entry was seen; see `masked`.
            like: what a model was trained on, or its specification (`fit.specs["x"]`): new values,
                as measured, are given the same shape, noise and scale.

        Raises:
            TypeError: if the values are no real numbers.
            ValueError: if there is no datum, a value is NaN or infinite, or a file is damaged.
            FileNotFoundError: if there is no such file.
        """
        if mask is not None:
            return cls.of(data, name, missing=missing, like=like).masked(mask)
        if like is not None:
            from pvae.data.load import load_like

            spec = like.spec if isinstance(like, Data) else like
            return load_like(data, spec, name, missing)
        if isinstance(data, Data):
            return data
        if getattr(data, "_fields", None) == ("train", "valid", "test"):
            raise TypeError(
                f"Data {name or 'tensor'!r} are splits: pass one of them, such as `.train`."
            )
        rows = read_rows(data, name, missing=missing)
        if not isinstance(rows, Rows):
            raise TypeError(
                f"{str(data)!r} holds splits: load it by `load_data`, and pass one of them, such "
                "as `.train`."
            )
        return cls.from_rows(rows)

    @classmethod
    def from_rows(cls, rows: Rows, split: str = "all", seed: int = 0) -> "Data":
        """What was read, as a split."""
        spec = DataSpec(
            name=rows.name,
            split=split,
            event_shape=tuple(rows.values.shape[1:]),
            image_shape=image_shape_of(rows.values.shape[1:]),
            binarisation="none",
            dequantisation="none",
            levels=rows.levels,
            seed=seed,
            missing=rows.missing,
        )
        return cls(rows.values, rows.labels, spec)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int | slice | list[int] | Tensor) -> Tensor:
        """Observed values at an index, a slice or an index tensor, drawn anew if `resampled`."""
        return self.observed(self.values[i])

    def batch(self, index: Tensor) -> Tensor:
        """Gather (B, *event) at an index tensor (B,); a fresh draw if `resampled`.

        The draw is the only use of torch's global generator here, on the device of the values.
        """
        return self.observed(self.values[index])

    def subset(self, index: slice | Tensor) -> "Data":
        """Some of the data, with their labels and specification: `digits.test.subset(slice(100))`.

        An index gives bare values (`digits.test[:100]`), which do not tell what they are.
        """
        labels = None if self.labels is None else self.labels[index]
        return replace(self, values=self.values[index], labels=labels)

    def masked(self, mask: Any) -> "Data":
        """The same data of which only some entries were seen, NaN in place of the others.

        Args:
            mask: True where an entry was seen, bool (N, *event_shape), or (*event_shape) for all.

        Raises:
            TypeError: for a mask that is not of bool.
            ValueError: for one of another shape.
        """
        seen = torch.as_tensor(np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask))
        shapes = tuple(self.values.shape), self.spec.event_shape
        if seen.dtype != torch.bool:
            raise TypeError(f"`mask` must be of bool, True where seen, got {seen.dtype}.")
        if tuple(seen.shape) not in shapes:
            raise ValueError(
                f"`mask` must have shape {shapes[0]} for data {self.spec.name!r}, or {shapes[1]} "
                f"for each datum alike, got {tuple(seen.shape)}."
            )
        values = self.values.masked_fill(~seen.to(self.values.device), math.nan)
        some = self.spec.missing or not bool(seen.all())
        return replace(self, values=values, spec=replace(self.spec, missing=some))

    def observed(self, values: Tensor) -> Tensor:
        """Rows of `values` as a model sees them; a fresh draw if `resampled`."""
        return self._noisy(values, torch.rand_like(values)) if self.resampled else values

    def _noisy(self, values: Tensor, uniform: Tensor) -> Tensor:
        noisy = observe(values, uniform, self.spec)
        if self.spec.missing:
            noisy = torch.where(values.isnan(), values, noisy)
        if self._affine is None:
            return noisy
        location, scale = self._affine
        return (noisy - location) / scale

    def realised(self) -> "Data":
        """The same split with its noise drawn once, by a local generator seeded by `spec.seed`.

        The same numbers on every device. The caller's random state is not touched.
        """
        if not self.resampled:
            return self
        generator = local_generator(self.spec.seed, self.spec.split)
        uniform = torch.rand(self.values.shape, generator=generator, dtype=self.values.dtype)
        values = self._noisy(self.values, uniform.to(self.values.device))
        return replace(self, values=values, resampled=False)

    def to(self, device: torch.device | str) -> "Data":
        """The same split with values and labels on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, values=self.values.to(device), labels=labels)

    def fingerprint(self) -> str:
        """Sixteen hex digits of SHA-256 over the realised values and their shape (N, dimensions).

        Results are paired, datum by datum, only where it is equal. How a datum is laid out does
        not matter: images and the same images flattened are the same observations.
        """
        values = self.realised().values
        digest = hashlib.sha256(f"{len(values)} {math.prod(self.spec.event_shape)}".encode())
        for rows in values.split(4096):  # float64 by parts: the whole would double the memory
            whole = rows.to("cpu", torch.float64)
            if self.spec.missing:  # of which there are several, with other bits
                whole = whole.masked_fill(whole.isnan(), math.nan)
            digest.update(whole.numpy().tobytes())
        return digest.hexdigest()[:16]

    def log_jacobian(self) -> Tensor:
        """What to add to a log-density of each datum for one of values as measured, (N,), in nats.

        See `DataSpec.log_jacobian`; entries that were not seen are in neither.
        """
        if not self.spec.missing:
            return torch.full((len(self),), self.spec.log_jacobian, dtype=torch.float64)
        each = torch.tensor(self.spec.log_jacobians, dtype=torch.float64)
        seen = ~self.values.isnan().reshape(len(self), -1).cpu()
        return seen.double() @ each

    def __repr__(self) -> str:
        noise = ", drawn anew for each batch" if self.resampled else ""
        shape = tuple(self.values.shape)
        return f"Data({self.spec.split}, {shape}: {self.spec.space()}{noise})"


def observe(grey: Tensor, uniform: Tensor, spec: DataSpec) -> Tensor:
    """Turn grey levels in [0, 1] into observations by noise from U[0, 1), both of one shape.

    Binarisation: 1 with probability `grey`. Dequantisation: (level + U) / levels, in [0, 1), not
    standardised yet.
    """
    if spec.dequantisation == "none" or spec.levels is None:
        return (uniform < grey).to(grey.dtype)
    level = (grey * (spec.levels - 1)).round()
    # The largest sums round up to `levels` itself, and 1 is outside the space.
    below_one = 1 - torch.finfo(grey.dtype).eps / 2
    return ((level + uniform) / spec.levels).clamp(max=below_one)


def image_shape_of(event_shape: torch.Size) -> tuple[int, ...] | None:
    """(H, W), (1, H, W) as (H, W) and (3, H, W) are taken for images."""
    if len(event_shape) == 3 and event_shape[0] == 1:
        return tuple(event_shape[1:])
    is_image = len(event_shape) == 2 or (len(event_shape) == 3 and event_shape[0] == 3)
    return tuple(event_shape) if is_image else None
