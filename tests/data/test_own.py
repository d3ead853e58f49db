"""One's own data in memory: frames, data sets and loaders, by `Data.of` and by `load_data`."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
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
    sizes = pd.Categorical(["small", "big", "small"], categories=["small", "big"])
    assert Data.of(frame(label=sizes)).labels.tolist() == [0, 1, 0]


NUMBERS = ([2, 7, 5], [2.0, 7.0, 5.0], pd.array([2, 7, 5], "Float32"), pd.Categorical([2, 7, 5]))


@pytest.mark.parametrize("label", [*NUMBERS, pd.Series([2, 7.0, 5], dtype=object)])
@pytest.mark.parametrize("name", ["label", "Label", "LABEL"])
def test_labels_that_are_whole_numbers_stay_what_they_are(label, name):
    data = Data.of(frame(**{name: label}))
    assert data.labels.tolist() == [2, 7, 5]
    assert data.labels.dtype == torch.int64
    assert data.values.tolist() == [[1, 4], [2, 5], [3, 6]]


@pytest.mark.parametrize("label", [torch.tensor(3.0), np.float64(3.0), 3.0])
def test_labels_of_floating_type_beside_data_are_taken(label):
    assert Data.of(Listed([(torch.zeros(2), label)] * 2)).labels.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ([2.0, np.nan, 5.0], [2, -1, 5]),
        (pd.array([2, None, 5], "Int64"), [2, -1, 5]),
        (["oak", None, "ash"], [1, -1, 0]),
        ([None] * 3, [-1] * 3),
        ([True, None, False], [1, -1, 0]),
    ],
)
def test_where_data_may_be_missing_a_blank_label_is_minus_one(label, expected):
    data = Data.of(frame(label=label), missing=True)
    assert data.labels.tolist() == expected
    assert not data.spec.missing  # values are all there
    pairs = [(torch.zeros(2), float("nan")), (torch.zeros(2), 4.0)]
    assert Data.of(Listed(pairs), missing=True).labels.tolist() == [-1, 4]


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
        (
            frame(c=["1", None, "z"]),
            TypeError,
            r"'frame' must be real .* not: row 2, column 'c': 'z' \(rows count from 0\)\. Drop or",
        ),
        (frame(c=pd.Series([1, None, 2], dtype=object)), TypeError, r"not: column 'c' \(object\)"),
        (frame(b=[1, np.nan, np.inf]), ValueError, "in 2 of 3 rows, .* row 1, column 'b': nan"),
        (frame(b=pd.array([1, 2, None], "Int64")), ValueError, "in 1 of 3 rows, .* 2, column 'b'"),
        (
            frame(label=["a", None, "b"]),
            ValueError,
            r"'frame' has no label in row 1 .* `missing=True`, which makes it -1",
        ),
        (frame(label=[2.0, np.nan, 5.0]), ValueError, "'frame' has no label in row 1"),
        (
            frame(label=[2.0, 1.5, 0.5]),
            ValueError,
            r"Labels of 'frame' must be .* got 1.5 in row 1 .* like the target of a regression",
        ),
        (frame(label=[2.0, 1.0, np.inf]), ValueError, "got inf in row 2"),
        (frame(label=[0, 1, 2], Label=[0, 1, 2]), ValueError, "labels, got 'label', 'Label'"),
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
        (Listed([(torch.zeros(2), 0.5)] * 2), ValueError, "each datum, got 0.5 in row 0"),
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


# ----------------------------------------------------------------------------------- arrays


def masked(dtype: str) -> np.ma.MaskedArray:
    """Three rows, of which row 1 is masked in column 0; what lies under the mask is no datum."""
    array = np.array([[1, 2], [99, 4], [5, 6]], dtype)
    return np.ma.array(array, mask=array == 99)


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "uint8"])
def test_what_an_array_masks_was_not_seen(dtype):
    array = masked(dtype)
    for source in (array, list(array), Listed(list(array))):
        data = Data.of(source, missing=True)
        expected = torch.tensor([[1, 2], [torch.nan, 4], [5, 6]], dtype=data.values.dtype)
        torch.testing.assert_close(data.values, expected, rtol=0, atol=0, equal_nan=True)
        assert data.spec.missing
        assert data.values.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        with pytest.raises(ValueError, match=r"1 of 3 rows, .* row 1, place \(0\): nan .* so by `"):
            Data.of(source)


def test_an_array_that_masks_nothing_is_as_without_a_mask():
    data = Data.of(masked("float32")[[0, 2]])
    assert data.values.tolist() == [[1, 2], [5, 6]]
    assert not Data.of(masked("float32")[[0, 2]], missing=True).spec.missing


WIDE = ["int32", "int64", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(
    "kind",
    [np.asarray, torch.tensor, pd.DataFrame, np.ma.asarray],
    ids=["array", "tensor", "frame", "masked"],
)
def test_whole_numbers_keep_their_digits(dtype, kind):
    """2^24 + 1 is the first whole number between two of float32."""
    for largest, wanted in ((2**24, torch.float32), (2**24 + 1, torch.float64)):
        for sign in (1,) if dtype.startswith("u") else (1, -1):
            array = np.array([[1], [sign * largest]], dtype)
            values = Data.of(kind(array)).values
            assert values.dtype == wanted
            assert values.tolist() == array.tolist()


def test_numbers_under_a_mask_or_blank_need_no_digits():
    array = np.ma.array([[1], [2**24 + 1]], mask=[[False], [True]])
    assert Data.of(array, missing=True).values.dtype == torch.float32
    blank = pd.DataFrame({"a": pd.array([None, None], "Int64"), "b": [True, False]})
    assert Data.of(blank, missing=True).values.dtype == torch.float32


def test_float64_of_another_byte_order_keeps_its_digits():
    values = Data.of(np.array([[0.1]], ">f8")).values
    assert values.dtype == torch.float64
    assert values.item() == 0.1


@pytest.mark.parametrize(
    "sparse", [torch.Tensor.to_sparse, lambda x: Listed(x.to_sparse())], ids=["whole", "items"]
)
def test_a_sparse_tensor_is_refused(sparse):
    with pytest.raises(TypeError, match=r"must be a dense tensor, got .* \(torch.sparse_\w+\)"):
        Data.of(sparse(torch.eye(3)))


def test_a_nested_tensor_is_refused():
    nested = torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match="must be a dense tensor, got a sparse or nested one"):
        Data.of(nested)


def test_a_sparse_matrix_of_scipys_is_refused():
    with pytest.raises(TypeError, match=r"array of real numbers, got .* Pass `.toarray\(\)`"):
        Data.of(scipy.sparse.eye_array(3))


@pytest.mark.parametrize("ragged", [[[1.0, 2.0], [3.0]], [torch.ones(2), torch.ones(3)]])
def test_rows_of_several_lengths_are_refused(ragged):
    with pytest.raises(ValueError, match=r"'tensor' must have rows of one shape, .* list have not"):
        Data.of(ragged)
