"""What a data set is: name, split, shape, noise, scale, so that results can say so.

A log-probability means something only in its observation space: bits and pixels under a Bernoulli
give other numbers than grey levels under a density. `DataSpec.space` names that space in a phrase,
and `DataSpec.log_jacobian` leads from a density of values as they are stored, rescaled, to one of
values as they were measured:

    y = (x - location) / scale  ->  log p(x) = log p(y) + log |dy/dx| = log p(y) - Σ_d log scale_d
"""

import hashlib
import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

__all__ = [
    "BINARISATIONS",
    "DEQUANTISATIONS",
    "STANDARDISATIONS",
    "DataSpec",
    "check_noise",
    "local_generator",
]

BINARISATIONS = ("none", "threshold", "dynamic", "fixed")
DEQUANTISATIONS = ("none", "uniform")
STANDARDISATIONS = ("none", "columns")


@dataclass(frozen=True)
class DataSpec:
    """What a data set is, so that every number computed on it can say so.

    Attributes:
        name: "digits", "mnist", ...; a file's own name; "tensor" for plain arrays.
        split: "train", "valid", "test" or "all".
        event_shape: shape of one datum as stored.
        image_shape: (8, 8) or (3, 32, 32), for plots; None where data are no images.
        binarisation: "none", "threshold", "dynamic" or "fixed"; see `load_data`.
        dequantisation: "none" or "uniform".
        levels: number of grey levels of the source, 17 for digits, which are stored in [0, 1];
            None for values stored as given.
        seed: of the split, and of noise that is drawn once.
        location, scale: what was subtracted from each of the datum's dimensions, in order, and
            what it was divided by; empty where data are not standardised.
        missing: whether some entries were not seen, which are NaN.
    """

    name: str
    split: str
    event_shape: tuple[int, ...]
    image_shape: tuple[int, ...] | None
    binarisation: str
    dequantisation: str
    levels: int | None
    seed: int
    location: tuple[float, ...] = field(default=(), repr=False)  # as many as an image has pixels
    scale: tuple[float, ...] = field(default=(), repr=False)
    missing: bool = False

    def __post_init__(self) -> None:
        check_noise(self.binarisation, self.dequantisation, self.standardisation)
        if self.dequantisation == "uniform" and self.levels is None:
            raise ValueError(
                f"Uniform dequantisation of {self.name!r} needs the number of its grey levels, "
                "and `levels` is None."
            )
        sizes = {len(self.location), len(self.scale)}
        if (self.scale and sizes != {self.dimensions}) or len(sizes) > 1:
            raise ValueError(
                f"`location` and `scale` of {self.name!r} must have a number for each of its "
                f"{self.dimensions} dimensions, got {len(self.location)} and {len(self.scale)}."
            )
        if not all(0 < scale < math.inf for scale in self.scale):
            raise ValueError(f"`scale` of {self.name!r} must be positive and finite.")

    @property
    def dimensions(self) -> int:
        """How many numbers a datum has."""
        return math.prod(self.event_shape)

    @property
    def standardisation(self) -> str:
        """ "columns" where each dimension was shifted and scaled, else "none"."""
        return "columns" if self.scale else "none"

    @property
    def log_jacobian(self) -> float:
        """What to add to a log-density of values as stored for one of values as measured, in nats.

        Measured are a table's own numbers, and an image's levels 0, 1, ..., `levels` - 1, or level
        + U[0, 1) where dequantised. Zero for bits, and for what is stored as given. It is that of a
        datum without missing entries; `Data.log_jacobian` is of those that were seen.
        """
        return math.fsum(self.log_jacobians)

    @property
    def log_jacobians(self) -> list[float]:
        """The same for each of the datum's dimensions, in order."""
        unit = 1  # of the measured values, in which [0, 1] is stored
        if self.levels is not None and self.binarisation == "none":
            unit = self.levels if self.dequantisation == "uniform" else self.levels - 1
        scales = self.scale or [1.0] * self.dimensions
        return [0.0 - math.log(unit) - math.log(scale) for scale in scales]

    @property
    def is_scaled(self) -> bool:
        """Whether a density of values as stored is not one of values as measured."""
        return self.dequantisation != "none" or self.standardisation != "none"

    def affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`location` and `scale` in the shape of a datum, of the type and on the device of `like`.

        Zero and one where data are not standardised.
        """
        if not self.scale:
            return like.new_zeros(()), like.new_ones(())
        location, scale = (
            torch.tensor(numbers, dtype=like.dtype, device=like.device).reshape(self.event_shape)
            for numbers in (self.location, self.scale)
        )
        return location, scale

    def unstandardise(self, values: Tensor) -> Tensor:
        """Values (..., *event_shape) before they were standardised, for plots and for tables.

        Images come back in [0, 1]. Raises ValueError for another shape.
        """
        if not self.scale:
            return values
        rank = len(self.event_shape)
        if tuple(values.shape[values.ndim - rank :]) != self.event_shape:
            raise ValueError(
                f"Standardised values of {self.name!r} must have shape (..., *{self.event_shape}), "
                f"got {tuple(values.shape)}."
            )
        location, scale = self.affine(values)
        return values * scale + location

    def space(self) -> str:
        """Name the observation space, its noise drawn: "digits, binary (threshold 1/2), ...".

        Equal for dynamic and fixed binarisation of one seed: drawn once, they are the same bits.
        Standardised data have eight digits for the numbers that were subtracted and divided by.
        """
        scaled = ""
        if self.scale:
            numbers = json.dumps([self.location, self.scale]).encode()
            scaled = f", columns standardised ({hashlib.sha256(numbers).hexdigest()[:8]})"
        partly = ", some missing" if self.missing else ""
        dimensions = f"{self.dimensions} dimension{'s' * (self.dimensions != 1)}"
        return f"{self.name}, {self._values()}{scaled}, {dimensions}{partly}"

    def _values(self) -> str:
        if self.binarisation == "threshold":
            return "binary (threshold 1/2)"
        if self.binarisation != "none":
            return f"binary (Bernoulli draws of grey levels, seed {self.seed})"
        if self.dequantisation == "uniform":
            noise = f"uniform dequantisation of {self.levels} levels, seed {self.seed}"
            return f"continuous in [0, 1] ({noise})"
        if self.levels == 2:
            return "binary (as published)"
        return "values as given" if self.levels is None else f"{self.levels} grey levels in [0, 1]"

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `json` can write and `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Self:
        """Read what `to_json` gave, lists for tuples included, also before data had a scale.

        Raises:
            ValueError: if a field is missing or unknown.
        """
        needed = {each.name for each in fields(cls) if each.default is MISSING}
        known = {each.name for each in fields(cls)}
        if wrong := (needed - set(d)) | (set(d) - known):
            raise ValueError(
                "Not the specification of a data set: missing or unknown "
                f"{', '.join(sorted(wrong))}."
            )
        tuples = {key: tuple(value) for key, value in d.items() if isinstance(value, list)}
        return cls(**{**d, **tuples})


def check_noise(binarisation: str, dequantisation: str, standardisation: str = "none") -> None:
    """Raise ValueError unless each is known and they go together."""
    for argument, value, known in (
        ("binarisation", binarisation, BINARISATIONS),
        ("dequantisation", dequantisation, DEQUANTISATIONS),
        ("standardisation", standardisation, STANDARDISATIONS),
    ):
        if value not in known:
            raise ValueError(f"`{argument}` must be one of {', '.join(known)}; got {value!r}.")
    if binarisation != "none" and dequantisation != "none":
        raise ValueError(
            f"Data are binarised or dequantised, not both: got binarisation={binarisation!r} and "
            f"dequantisation={dequantisation!r}. Set one of them to 'none'."
        )
    if binarisation != "none" and standardisation != "none":
        raise ValueError(
            f"Bits are not standardised: got binarisation={binarisation!r} and "
            f"standardisation={standardisation!r}. Set one of them to 'none'."
        )


def local_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator on the CPU with its own stream for each seed and purpose.

    Streams of one seed are unrelated, so that train and test never share their noise.
    """
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
