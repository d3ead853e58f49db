"""Where a fit's batches come from: memory, gathered within the step, or a loader, batch by batch.

    Resident: data on the device, an index a step;   Streamed: what a DataLoader yields

Both give a step its tensors, and `fetch` turns these into a batch inside the step, noise included,
so that the gather and the noise are part of one graph. The order of data has random numbers of its
own: particles and noise do not depend on how data are loaded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pvae.data import Data
from pvae.data.spec import local_generator
from pvae.pair import Batch, Columns, Pair

__all__ = ["Resident", "Source", "Streamed", "source_of"]

Rows = tuple[tuple[Tensor, ...], Tensor]  # a step's own tensors, and the numbers of its data


class Resident:
    """Columns on the device, in a fresh order each epoch.

    Args:
        columns: checked, on the device.
        batch_size: data a step; the last batch may be smaller.
        seed: of the order.
        device: where the columns are.
    """

    def __init__(self, columns: Columns, batch_size: int, seed: int, device: torch.device):
        self.columns, self.seed, self.device = columns, seed, device
        self.num_data: int | None = len(columns)
        self.batch_size = min(batch_size, len(columns))
        self.num_batches: int | None = -(-len(columns) // self.batch_size)
        self.fixed = columns.tensors()
        self.title = f"{columns.main.spec.space()}, {columns.main.spec.split}"

    def fetch(self, *tensors: Tensor) -> Batch:
        """The batch of an index, noise drawn afresh."""
        *values, index = tensors
        return self.columns.observed([value[index] for value in values])

    def epoch(self, number: int) -> Iterator[Rows]:
        """Index tensors of the batches of an epoch (1, 2, ...)."""
        generator = local_generator(self.seed, f"order of epoch {number}")
        order = torch.randperm(len(self.columns), generator=generator).to(self.device)
        for index in order.split(self.batch_size):
            yield (index,), index

    def first(self, rows: int) -> Batch:
        """The first data, for reading a model's shapes."""
        return self.columns.rows(slice(0, rows))

    def example(self) -> tuple[Tensor, ...]:
        """A step's own tensors, as those of any whole batch."""
        return (torch.arange(self.batch_size, device=self.device),)

    def fingerprint(self) -> str | None:
        """Of all values."""
        return self.columns.fingerprint()


class Streamed:
    """Batches that a loader yields, checked as they come and moved to the device one ahead.

    Args:
        loader: of tensors (B, *event), mappings from names to these, or sequences whose first item
            is one of these (labels that torchvision puts beside images are left alone).
        check: what a model demands of data; see `Pair.columns`.
        seed: of the loader's own order.
        device: where batches go.
    """

    fixed: tuple[Tensor, ...] = ()

    def __init__(
        self,
        loader: DataLoader[Any],
        check: Callable[[Any], Columns],
        seed: int,
        device: torch.device,
    ):
        self.loader, self.check, self.seed, self.device = loader, check, seed, device
        self.num_data = None if loader.batch_size is None else _length(loader.dataset)
        self.num_batches = _length(loader)
        first = next(self._batches(1), None)
        if first is None:
            raise ValueError("The loader yields no batch: expected at least one.")
        self.columns = first  # whose specification and shapes stand for all
        self.batch_size = len(first)
        self.title = f"streamed by {type(loader.dataset).__name__}"

    def fetch(self, *tensors: Tensor) -> Batch:
        """The batch as it came."""
        return self.columns.observed(list(tensors))

    def epoch(self, number: int) -> Iterator[Rows]:
        """Batches of an epoch, the next one on its way while one is used."""
        seen, ahead = 0, None
        for columns in self._batches(number):
            values = [columns.columns[name].values for name in self.columns.columns]
            rows = tuple(value.to(self.device, non_blocking=True) for value in values)
            if ahead is not None:
                yield ahead
            ahead = rows, torch.arange(seen, seen + len(columns))
            seen += len(columns)
        if ahead is not None:
            yield ahead

    def _batches(self, number: int) -> Iterator[Columns]:
        """Checked batches; what the loader draws leaves the noise of training alone."""
        state = local_generator(self.seed, f"order of epoch {number}").get_state()
        batches = None
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                batches = iter(self.loader) if batches is None else batches
                batch = next(batches, None)
                state = torch.get_rng_state()
            if batch is None:
                return
            yield self.check(_data_of(batch)).realised()

    def first(self, rows: int) -> Batch:
        """The first data, for reading a model's shapes."""
        return self.columns.to(self.device).rows(slice(0, rows))

    def example(self) -> tuple[Tensor, ...]:
        """A step's own tensors, as those of any whole batch."""
        return tuple(self.columns.to(self.device).tensors())

    def fingerprint(self) -> str | None:
        """None: data that stream by are not all seen at once."""
        return None


Source = Resident | Streamed


def source_of(model: Pair, data: Any, batch_size: int, seed: int, device: torch.device) -> Source:
    """Data as a source of batches.

    Args:
        model: what the data are for.
        data: what `Pair.columns` takes; a `DataLoader`; or a `Dataset` or `IterableDataset`, which
            is loaded in this process.

    Raises:
        ValueError: for data that do not fit the model.
    """
    if isinstance(data, Dataset) and not isinstance(data, Data):
        shuffle = not isinstance(data, IterableDataset)
        pin = device.type == "cuda"
        data = DataLoader(data, batch_size, shuffle=shuffle or None, pin_memory=pin)
    if isinstance(data, DataLoader):
        return Streamed(data, model.columns, seed, device)
    return Resident(model.columns(data).to(device), batch_size, seed, device)


def _data_of(batch: Any) -> Any:
    if isinstance(batch, Tensor | Mapping):
        return batch
    if isinstance(batch, Sequence) and batch and isinstance(batch[0], Tensor | Mapping):
        return batch[0]
    raise TypeError(
        "A loader must yield tensors (B, *event), mappings from names to these, or sequences that "
        f"begin with one; got {type(batch).__name__}."
    )


def _length(loaded: Any) -> int | None:
    """How many there are, where that is known."""
    try:
        return len(loaded)
    except TypeError:
        return None
