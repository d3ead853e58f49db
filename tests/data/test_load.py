import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pvae.data import DATASETS, Data, load_data


def sorted_rows(*parts: torch.Tensor) -> np.ndarray:
    rows = torch.cat([part.flatten(1) for part in parts]).numpy()
    return rows[np.lexsort(rows.T)]


def test_digits_are_those_of_scikit_learn_each_once():
    splits = load_data("digits", binarisation="none")
    assert tuple(map(len, splits)) == DATASETS["digits"].splits
    grey = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    assert np.array_equal(sorted_rows(*(data.values for data in splits)), sorted_rows(grey))


def test_labels_stay_with_their_digits():
    rows, labels = load_digits(return_X_y=True)
    label_of = {row.tobytes(): label for row, label in zip(rows, labels, strict=True)}
    for data in load_data("digits", binarisation="none"):
        rows = (data.values * 16).round().double().numpy()
        assert [label_of[row.tobytes()] for row in rows] == data.labels.tolist()


def test_by_default_train_is_drawn_anew_and_the_rest_once():
    train, valid, test = load_data("digits")
    assert (train.resampled, valid.resampled, test.resampled) == (True, False, False)
    assert not torch.equal(train[:], train[:])
    assert torch.equal(train.values, load_data("digits", binarisation="none").train.values)
    for data in (valid, test):
        assert set(data.values.unique().tolist()) == {0.0, 1.0}


def test_dynamic_and_fixed_of_one_seed_are_the_same_once_drawn():
    for dynamic, fixed in zip(load_data(), load_data(binarisation="fixed"), strict=True):
        assert not fixed.resampled
        assert torch.equal(dynamic.realised().values, fixed.values)
        assert dynamic.spec.space() == fixed.spec.space()
        assert dynamic.fingerprint() == fixed.fingerprint()


def test_threshold_and_uniform_keep_to_the_same_digits():
    grey = load_data(binarisation="none")
    for data, levels in zip(load_data(binarisation="threshold"), grey, strict=True):
        assert torch.equal(data.values, (levels.values > 0.5).float())
    for data, levels in zip(load_data(dequantisation="uniform"), grey, strict=True):
        x = data.realised().values
        assert torch.equal((x * 17).floor(), (levels.values * 16).round())
        assert (data.spec.binarisation, data.resampled) == ("none", data.spec.split == "train")


def test_the_seed_decides_the_split_and_the_noise():
    first, again, other = (load_data(seed=seed).test for seed in (0, 0, 1))
    assert torch.equal(first.values, again.values)
    assert first.fingerprint() != other.fingerprint()
    assert not torch.equal(first.labels, other.labels)


def test_loading_leaves_the_random_state():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for binarisation in ("dynamic", "fixed"):
        load_data(binarisation=binarisation)
    load_data(dequantisation="uniform")
    load_data(torch.zeros(10, 2))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_images_keep_their_shape_on_demand_and_are_the_same_observations():
    flat, images = load_data().test, load_data(flatten=False).test
    assert images.values.shape == (360, 1, 8, 8)
    assert torch.equal(images.values.flatten(1), flat.values)
    assert images.spec.image_shape == flat.spec.image_shape == (8, 8)
    assert images.spec.space() == flat.spec.space()
    assert images.fingerprint() == flat.fingerprint()


@pytest.mark.parametrize("wrap", [np.asarray, torch.as_tensor, list])
def test_an_array_is_parted_at_random_and_stays_as_it_is(wrap):
    rows = np.random.default_rng(0).normal(size=(25, 3))
    splits = load_data(wrap(rows))
    assert tuple(map(len, splits)) == (21, 2, 2)
    assert np.array_equal(
        sorted_rows(*(data.values for data in splits)), sorted_rows(torch.tensor(rows))
    )
    assert not torch.equal(splits.train.values, torch.tensor(rows[:21]))
    assert {data.spec.space() for data in splits} == {"tensor, values as given, 3 dimensions"}
    assert [data.spec.split for data in splits] == ["train", "valid", "test"]


def test_an_array_of_images_is_flattened_or_not():
    images = torch.rand(10, 4, 5)
    assert load_data(images).train.values.shape == (8, 20)
    assert load_data(images).train.spec.image_shape == (4, 5)
    assert load_data(images, flatten=False).train.values.shape == (8, 4, 5)
    assert load_data(torch.rand(10)).train.values.shape == (8, 1)


def test_an_array_is_binarised_and_bytes_are_dequantised_on_demand():
    grey = torch.rand(30, 5)
    train, valid, _ = load_data(grey, binarisation="dynamic")
    assert train.resampled
    assert set(valid.values.unique().tolist()) == {0.0, 1.0}
    levels = torch.randint(0, 256, (30, 5), dtype=torch.uint8)
    train, _, test = load_data(levels, dequantisation="uniform", seed=2)
    once = [data.realised().values for data in (train, test)]
    as_given = load_data(levels, seed=2)
    assert torch.equal((once[0] * 256).floor(), as_given.train.values)
    assert torch.equal((once[1] * 256).floor(), as_given.test.values)


@pytest.mark.parametrize(
    ("source", "options", "error", "match"),
    [
        ("mnits", {}, ValueError, "'mnits'. Did you mean 'mnist'.* Known: digits, mnist"),
        ("Fashion_MNIST", {}, ValueError, "Did you mean 'fashion-mnist'"),
        ("zzz", {}, ValueError, "'zzz'. Known: .* pass the array instead"),
        ("digits", {"binarisation": "yes"}, ValueError, "`binarisation` must be one of"),
        ("digits", {"dequantisation": "yes"}, ValueError, "`dequantisation` must be one of"),
        (
            "digits",
            {"binarisation": "fixed", "dequantisation": "uniform"},
            ValueError,
            "not both: .* Set one of them to 'none'",
        ),
        (torch.zeros(2, 2), {}, ValueError, "three rows or more to be split, got 2"),
        (
            torch.tensor([[0.0], [255.0], [3.0]]),
            {"binarisation": "dynamic"},
            ValueError,
            r"needs values in \[0, 1\], the array's go from 0 to 255.* Divide",
        ),
        (
            torch.ones(5, 2),
            {"dequantisation": "uniform"},
            ValueError,
            "needs dtype uint8 .* got torch.float32",
        ),
        (torch.full((5, 2), torch.nan), {}, ValueError, "NaN or infinite values in 5 of 5 rows"),
        (Data.of(torch.ones(5, 2)), {}, TypeError, "splits arrays, got a Data"),
    ],
)
def test_bad_requests_are_refused(source, options, error, match):
    with pytest.raises(error, match=match):
        load_data(source, **options)
