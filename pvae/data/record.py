"""What is known of a published set: `DatasetInfo` of images, `TableInfo` of tables and toys."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

__all__ = ["HOLD_OUT", "DatasetInfo", "Grey", "Parts", "TableInfo", "hold_out"]


class Grey(NamedTuple):
    """One split as published.

    Levels are (N, H, W) uint8, ink high, or (N, 3, H, W) in colours; labels are (N,) int64, or None
    where none were published.
    """

    levels: Tensor
    labels: Tensor | None


Parts = tuple[Grey, Grey, Grey]


@dataclass(frozen=True)
class DatasetInfo:
    """What `pvae data` says of a set of images.

    Attributes:
        title: its name in words.
        splits: numbers of images to train, validate and test.
        image_shape: (height, width) or (colours, height, width).
        levels: number of grey levels.
        split_rule: how the splits are made.
        source: who published it.
        files: what must lie below the root, in torchvision's layout; none if it is embedded.
        load: the root and a seed -> train, valid and test.
        binarised: whether `load_data` draws bits from it unless told otherwise.
    """

    title: str
    splits: tuple[int, int, int]
    image_shape: tuple[int, ...]
    levels: int
    split_rule: str
    source: str
    files: tuple[str, ...]
    load: Callable[[Path, int], Parts] = field(repr=False)
    binarised: bool = True

    @property
    def num_images(self) -> int:
        """Of all splits together."""
        return sum(self.splits)


@dataclass(frozen=True)
class TableInfo:
    """What is known of a table of real numbers, embedded or generated.

    Attributes:
        title: its name in words.
        splits: numbers of rows to train, validate and test.
        dimensions: number of columns.
        source: who published it, or where it is from.
        load: a seed -> all rows (N, dimensions) in random order, and their labels (N,) or None.
    """

    title: str
    splits: tuple[int, int, int]
    dimensions: int
    source: str
    load: Callable[[int], tuple[Tensor, Tensor | None]] = field(repr=False)


HOLD_OUT = "test as published; valid is the last of the published train, as large as test"


def hold_out(train: Grey, test: Grey, held: int) -> Parts:
    """Train and test as published; valid is the last `held` of train."""
    kept = len(train.levels) - held
    before, after = (
        Grey(train.levels[rows], None if train.labels is None else train.labels[rows])
        for rows in (slice(0, kept), slice(kept, None))
    )
    return before, after, test
