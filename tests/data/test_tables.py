"""Embedded tables are those of scikit-learn, parted at random."""

import numpy as np
import pytest
import torch
from sklearn import datasets

from pvae.data import DATASETS, TABLES, load_data

EMBEDDED = {"breast-cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}


@pytest.mark.parametrize("name", EMBEDDED)
def test_each_row_is_there_once_with_its_label(name):
    rows, labels = EMBEDDED[name](return_X_y=True)
    label_of = {
        row.astype(np.float32).tobytes(): label for row, label in zip(rows, labels, strict=True)
    }
    splits = load_data(name)
    found = [row.tobytes() for data in splits for row in data.values.numpy()]
    assert sorted(found) == sorted(row.astype(np.float32).tobytes() for row in rows)
    assert [label_of[row] for row in found] == torch.cat([d.labels for d in splits]).tolist()
    assert set(splits.test.labels.tolist()) == set(labels)  # rows are ordered by class there
    assert not torch.equal(load_data(name, seed=1).test.values, splits.test.values)


@pytest.mark.parametrize("name", TABLES)
def test_the_record_tells_the_sizes(name):
    splits = load_data(name)
    assert tuple(map(len, splits)) == TABLES[name].splits
    assert splits.train.values.shape[1:] == (TABLES[name].dimensions,)
    assert splits.train.values.dtype == torch.float32
    space = f"{name}, values as given, {TABLES[name].dimensions} dimensions"
    assert {data.spec.space() for data in splits} == {space}
    assert [data.spec.split for data in splits] == ["train", "valid", "test"]
    assert name not in DATASETS


def test_loading_leaves_the_random_state():
    before = torch.get_rng_state()
    for name in TABLES:
        load_data(name, standardisation="columns")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dequantisation": "uniform"}, "needs grey levels, and 'wine' has none"),
        (
            {"binarisation": "dynamic"},
            r"needs values in \[0, 1\], the array's go from 0\.13 to 1680",
        ),
    ],
)
def test_tables_have_no_grey_levels(options, match):
    with pytest.raises(ValueError, match=match):
        load_data("wine", **options)


def test_a_misspelt_table_is_recognised():
    with pytest.raises(ValueError, match=r"'two_moons'. Did you mean 'two-moons'\?.*breast-cancer"):
        load_data("two_moons")
