"""What a data set is: name, split, shape, binarisation, dequantisation, so that results can say so.

A log-probability means something only in its observation space: bits and pixels under a Bernoulli
give other numbers than grey levels under a density. `DataSpec.space` names that space in a phrase.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

__all__ = ["BINARISATIONS", "DEQUANTISATIONS", "DataSpec", "check_noise", "local_generator"]

BINARISATIONS = ("none", "threshold", "dynamic", "fixed")
DEQUANTISATIONS = ("none", "uniform")


@dataclass(frozen=True)
class DataSpec:
    """What a data set is, so that every number computed on it can say so.

    Attributes:
        name: "digits", "mnist", ...; "tensor" for plain arrays.
        split: "train", "valid", "test" or "all".
        event_shape: shape of one datum as stored.
        image_shape: (8, 8) or (3, 32, 32), for plots; None where data are no images.
        binarisation: "none", "threshold", "dynamic" or "fixed"; see `load_data`.
        dequantisation: "none" or "uniform".
        levels: number of grey levels of the source, 17 for digits; None if unknown.
        seed: of the split, and of noise that is drawn once.
    """

    name: str
    split: str
    event_shape: tuple[int, ...]
    image_shape: tuple[int, ...] | None
    binarisation: str
    dequantisation: str
    levels: int | None
    seed: int

    def __post_init__(self) -> None:
        check_noise(self.binarisation, self.dequantisation)
        if self.dequantisation == "uniform" and self.levels is None:
            raise ValueError(
                f"Uniform dequantisation of {self.name!r} needs the number of its grey levels, "
                "and `levels` is None."
            )

    def space(self) -> str:
        """Name the observation space, its noise drawn: "digits, binary (threshold 1/2), ...".

        Equal for dynamic and fixed binarisation of one seed: drawn once, they are the same bits.
        """
        return f"{self.name}, {self._values()}, {math.prod(self.event_shape)} dimensions"

    def _values(self) -> str:
        if self.binarisation == "threshold":
            return "binary (threshold 1/2)"
        if self.binarisation != "none":
            return f"binary (Bernoulli draws of grey levels, seed {self.seed})"
        if self.dequantisation == "uniform":
            noise = f"uniform dequantisation of {self.levels} levels, seed {self.seed}"
            return f"continuous in [0, 1] ({noise})"
        return "values as given" if self.levels is None else f"{self.levels} grey levels in [0, 1]"

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `json` can write and `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Self:
        """Read what `to_json` gave, lists for tuples included.

        Raises:
            ValueError: if a field is missing or unknown.
        """
        fields = set(cls.__dataclass_fields__)
        if set(d) != fields:
            wrong = ", ".join(sorted(set(d) ^ fields))
            raise ValueError(f"Not the specification of a data set: missing or unknown {wrong}.")
        shapes = {
            key: None if d[key] is None else tuple(d[key]) for key in ("event_shape", "image_shape")
        }
        return cls(**{**d, **shapes})


def check_noise(binarisation: str, dequantisation: str) -> None:
    """Raise ValueError unless both are known and at most one is asked for."""
    for argument, value, known in (
        ("binarisation", binarisation, BINARISATIONS),
        ("dequantisation", dequantisation, DEQUANTISATIONS),
    ):
        if value not in known:
            raise ValueError(f"`{argument}` must be one of {', '.join(known)}; got {value!r}.")
    if binarisation != "none" and dequantisation != "none":
        raise ValueError(
            f"Data are binarised or dequantised, not both: got binarisation={binarisation!r} and "
            f"dequantisation={dequantisation!r}. Set one of them to 'none'."
        )


def local_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator on the CPU with its own stream for each seed and purpose.

    Streams of one seed are unrelated, so that train and test never share their noise.
    """
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
