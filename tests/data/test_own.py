"""One's own data in memory: frames, data sets and loaders, by `Data.of` and by `load_data`."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import pvae
from pvae.data import Data, load_data

X = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
Y = np.arange(30) % 4


class Listed(Dataset):
    """A data set of the items given."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Endless(IterableDataset):
    """A data set that never ends."""

    def __iter__(self):
        while True:
            yield torch.zeros(2)


def frame(**columns) -> pd.DataFrame:
    return pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [4, 5, 6]} | columns)


TENSORS = TensorDataset(torch.tensor(X), torch.tensor(Y))
SOURCES = {
    "frame": (pd.DataFrame(X).assign(label=Y), "frame"),
    "pairs": (TENSORS, "TensorDataset"),
    "arrays": (Listed(list(zip(X, Y.tolist(), strict=True))), "Listed"),
    "loader": (DataLoader(TENSORS, batch_size=7), "TensorDataset"),
    "unbatched loader": (DataLoader(TENSORS, batch_size=None), "TensorDataset"),
    "subset": (Subset(TENSORS, range(30)), "TensorDataset"),
}


@pytest.mark.parametrize(("source", "name"), SOURCES.values(), ids=SOURCES)
def test_values_and_labels_are_read_in_order(source, name):
    data = Data.of(source)
    assert torch.equal(data.values, torch.tensor(X))
    assert data.labels.tolist() == Y.tolist()
    assert (data.spec.name, data.spec.split) == (name, "all")
    assert Data.of(source, name="mine").spec.name == "mine"


@pytest.mark.parametrize(("source", "name"), SOURCES.values(), ids=SOURCES)
def test_splits_are_those_of_the_array_with_their_labels(source, name):
    for got, wanted in zip(load_data(source, seed=3), load_data(X, seed=3), strict=True):
        assert torch.equal(got.values, wanted.values)
        rows = [int((X == row.numpy()).all(1).argmax()) for row in got.values]
        assert got.labels.tolist() == Y[rows].tolist()
        assert got.spec.split == wanted.spec.split


def test_a_loader_that_shuffles_is_split_by_the_seed_and_leaves_the_random_state():
    loader = DataLoader(TENSORS, batch_size=7, shuffle=True)
    found = []
    for seed in (0, 0, 1):
        torch.rand(1)  # what else was drawn before does not matter
        before = torch.get_rng_state()
        found.append(load_data(loader, seed=seed).test)
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = found
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.values, other.values)


def test_items_without_labels_and_with_channels():
    data = Data.of(Listed([torch.full((1, 2, 2), float(i)) for i in range(4)]))
    assert data.labels is None
    assert data.values.shape == (4, 1, 2, 2)
    assert data.values[3].unique().tolist() == [3.0]
    assert Data.of(DataLoader(torch.tensor(X), batch_size=8)).labels is None
    assert Data.of(TensorDataset(torch.tensor(X))).labels is None


def test_pictures_of_a_torchvision_data_set_have_their_channels_first():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    pictures = Listed([(Image.fromarray(image), i) for i, image in enumerate(pixels)])
    data = Data.of(pictures)
    assert np.array_equal(data.values, pixels.transpose(0, 3, 1, 2))
    assert data.spec.image_shape == (3, 4, 6)
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    train = load_data(pictures, dequantisation="uniform").train  # its pixels are bytes
    assert train.spec.levels == 256
    grey = Listed([Image.fromarray(image[..., 0]) for image in pixels])
    assert np.array_equal(Data.of(grey).values, pixels[..., 0])


def test_columns_of_a_frame_keep_their_precision():
    assert Data.of(frame()).values.tolist() == [[1, 4], [2, 5], [3, 6]]
    assert Data.of(frame()).values.dtype == torch.float64
    assert Data.of(frame().astype("float32")).values.dtype == torch.float32
    assert Data.of(frame().astype("Int64")).values.dtype == torch.float32
    assert Data.of(frame(c=[True, False, True])).values[:, 2].tolist() == [1, 0, 1]


def test_labels_that_are_words_are_numbered_in_their_order():
    assert Data.of(frame(label=["oak", "ash", "oak"])).labels.tolist() == [1, 0, 1]
    assert Data.of(frame(label=[2, 7, 5])).labels.tolist() == [2, 7, 5]


def test_a_frame_and_a_loader_are_taken_at_the_door_of_evaluate():
    model = pvae.models.ppca(3, 1)
    pvae.fit(model, pd.DataFrame(X), epochs=1, progress=False)
    results = [pvae.evaluate(model, data, 2) for data in (X, SOURCES["loader"][0])]
    assert (
        results[0].fingerprint == results[1].fingerprint == Data.of(pd.DataFrame(X)).fingerprint()
    )
    assert results[1].spec.name == "TensorDataset"


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (frame(c=["x", "y", "z"]), TypeError, r"'frame' must be real .* not: 'c' \(.*\)\. Drop or"),
        (frame(b=[1, np.nan, np.inf]), ValueError, "in 2 of 3 rows, .* row 1, column 'b': nan"),
        (frame(b=pd.array([1, 2, None], "Int64")), ValueError, "in 1 of 3 rows, .* 2, column 'b'"),
        (frame(label=["a", None, "b"]), ValueError, "'frame' has no label in row 1"),
        (frame()[:0], ValueError, r"'frame' must have shape .* N >= 1, got \(0, 2\)"),
        (Listed([]), ValueError, "'Listed' must have a datum or more"),
        (Listed([{"x": torch.zeros(2)}]), TypeError, r"item 0 of 'Listed' is \(dict\)"),
        (Listed(["word"]), TypeError, r"item 0 of 'Listed' is \(str\)"),
        (Listed([(torch.zeros(2),) * 3]), TypeError, r"\(Tensor, Tensor, Tensor\)"),
        (
            Listed([torch.zeros(2), torch.zeros(2), torch.zeros(3)]),
            ValueError,
            r"of the first, \(2,\); item 2 \(from 0\) has \(3,\)",
        ),
        (Listed([(torch.zeros(2), 0), torch.zeros(2)]), ValueError, "for all items or for none"),
        (Listed([(torch.zeros(2), 0.5)] * 2), ValueError, "whole number for each datum, got torch"),
        (Listed([(torch.zeros(2), torch.zeros(2))] * 2), ValueError, "Labels of 'Listed' must be"),
        (Listed([torch.zeros(2), torch.full((2,), torch.nan)]), ValueError, r"row 1, place \(0\)"),
        (Endless(), TypeError, "'Endless' has no length.* `pvae.fit` streams it"),
        (DataLoader(Endless(), batch_size=2), TypeError, "'Endless' has no length"),
    ],
)
@pytest.mark.parametrize("load", [Data.of, load_data])
def test_what_is_no_data_is_refused(load, source, error, match):
    with pytest.raises(error, match=match):
        load(source)


def test_a_bad_pixel_is_named():
    images = torch.zeros(4, 1, 5, 6)
    images[2, 0, 3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"in 1 of 4 rows, .* row 2, place \(0, 3, 4\): inf"):
        Data.of(images, name="faces")
    assert Data.of(images[:2]).values.shape == (2, 1, 5, 6)
