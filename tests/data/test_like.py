"""New values with the noise and on the scale of what a model was trained on."""

import numpy as np
import pytest
import torch

import pvae
from pvae import Data, load_data

RAW = torch.randn(50, 3, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 5.0, 0.1])


def test_new_rows_are_scaled_by_the_numbers_of_train():
    train = load_data(RAW + 7, standardisation="columns").train
    new = Data.of((1000 * RAW).numpy(), like=train)
    location, scale = map(torch.tensor, (train.spec.location, train.spec.scale))
    torch.testing.assert_close(new.values, (1000 * RAW - location) / scale)
    assert (new.spec.location, new.spec.scale) == (train.spec.location, train.spec.scale)
    assert (new.spec.name, new.spec.split) == ("tensor", "all")
    torch.testing.assert_close(new.spec.unstandardise(new.values), 1000 * RAW)
    assert new.spec.space() == train.spec.space()
    assert torch.equal(Data.of(1000 * RAW, like=train.spec).values, new.values)


def test_what_is_missing_stays_so_where_train_has_some():
    rows = RAW.clone()
    rows[3, 1] = torch.nan
    train = load_data(rows, standardisation="columns", missing=True).train
    new = RAW.masked_fill(RAW > 1, torch.nan)
    assert torch.equal(Data.of(new, like=train).values.isnan(), new.isnan())
    whole = load_data(RAW, standardisation="columns").train
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        Data.of(new, like=whole)
    assert Data.of(new, like=whole, missing=True).spec.missing


@pytest.mark.parametrize(
    "options",
    [
        {"binarisation": "dynamic"},
        {"binarisation": "threshold"},
        {"dequantisation": "uniform"},
        {"dequantisation": "uniform", "standardisation": "columns", "flatten": False},
    ],
)
def test_grey_levels_get_the_same_noise(options):
    splits, grey = load_data("digits", **options), load_data("digits", binarisation="none")
    found = Data.of(grey.test, like=splits.train)
    torch.testing.assert_close(found.values, splits.test.values)
    assert found.spec == splits.test.spec
    assert torch.equal(found.labels, grey.test.labels)
    assert not found.resampled


@pytest.mark.parametrize(
    ("source", "options", "error", "match"),
    [
        (RAW[:, :2], {}, ValueError, r"'tensor' must have the shape of 'tensor', \(3,\) .* \(2,\)"),
        (load_data(RAW, standardisation="columns").train, {}, TypeError, "has its own already"),
        (
            RAW,
            {"binarisation": "threshold"},
            ValueError,
            r"in \[0, 1\], the array's go from",
        ),
    ],
)
def test_what_cannot_be_alike_says_why(source, options, error, match):
    rows = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(error, match=match):
        Data.of(source, like=load_data(rows, **options).train)


def test_a_run_keeps_the_specification_of_its_data(tmp_path):
    splits = load_data(RAW.numpy(), standardisation="columns")
    model = pvae.models.ppca(3, latent_size=1)
    fit = pvae.fit(model, splits.train, epochs=2, folder=tmp_path, progress=False)
    read = pvae.load(tmp_path)
    assert fit.specs == read.specs == {"x": splits.train.spec}
    new = Data.of(np.asarray(RAW), like=read.specs["x"])
    scaled = (RAW - torch.tensor(splits.train.spec.location)) / torch.tensor(
        splits.train.spec.scale
    )
    torch.testing.assert_close(new.values, scaled)


def test_a_run_keeps_the_specification_of_each_column(tmp_path):
    digits = load_data("digits").train.subset(slice(40))
    model = pvae.models.conditional_vae(64, latent_size=2, hidden=(4,))
    data = {"x": digits, "y": digits.labels}
    pvae.fit(model, data, epochs=1, folder=tmp_path, progress=False)
    specs = pvae.load(tmp_path).specs
    assert specs["x"] == digits.spec
    assert list(specs) == ["x", "y"]


def test_bytes_become_levels_as_those_of_train_did():
    levels = torch.randint(256, (40, 6), dtype=torch.uint8).numpy()
    train = load_data(levels, dequantisation="uniform").train
    found = Data.of(levels, like=train).values
    assert bool(((256 * found).floor() == torch.from_numpy(levels)).all())


def test_images_are_not_read_in_another_order():
    images = torch.rand(30, 3, 4, 5)
    train = load_data(images, flatten=False, standardisation="columns").train
    assert torch.equal(
        Data.of(images.flatten(1), like=train).values, Data.of(images, like=train).values
    )
    with pytest.raises(ValueError, match=r"shape of 'tensor', \(3, 4, 5\) .* got \(4, 5, 3\)"):
        Data.of(images.permute(0, 2, 3, 1), like=train)
