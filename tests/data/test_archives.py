"""The image sets, from tiny archives in torchvision's layout, with no network."""

import gzip
import hashlib
import io
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets import utils

from pvae.data import DATASETS, load_data
from pvae.data.archives import data_root
from pvae.data.sources import MNIST_FILES

RNG = np.random.default_rng(0)
TRAIN_IMAGES = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
TRAIN_LABELS = RNG.integers(1, 10, 7, dtype=np.uint8)
TEST_IMAGES = RNG.integers(0, 256, (2, 28, 28), dtype=np.uint8)
TEST_LABELS = RNG.integers(1, 10, 2, dtype=np.uint8)
ARRAYS = dict(zip(MNIST_FILES, (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS), strict=True))


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(url, *args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(utils, "download_url", refuse)


@pytest.fixture(params=["mnist", "fashion-mnist", "kmnist"])
def name(request):
    return request.param


@pytest.fixture
def published(name, monkeypatch) -> dict[str, bytes]:
    """Tiny archives by their place below the root, with torchvision told of their checksums."""
    contents = {f"{file}.gz": gzip.compress(idx(array), mtime=0) for file, array in ARRAYS.items()}
    source = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}[name]
    resources = [(file, md5(content)) for file, content in contents.items()]
    monkeypatch.setattr(getattr(datasets, source), "resources", resources)
    return {f"{source}/raw/{file}": content for file, content in contents.items()}


def put(root: Path, contents: dict[str, bytes]) -> Path:
    for place, content in contents.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def tree(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def assert_is_published(splits, train=TRAIN_IMAGES, test=TEST_IMAGES, first_label=0):
    """Valid is the last of train, as large as test; order, levels and labels as published."""
    images = [data.values * 255 for data in splits]
    expected = [train[:5], train[5:], test]
    for got, wanted in zip(images, expected, strict=True):
        np.testing.assert_allclose(got, wanted.reshape(len(wanted), -1), atol=1e-4)
    labels = np.concatenate([TRAIN_LABELS, TEST_LABELS]) - first_label
    assert torch.cat([data.labels for data in splits]).tolist() == labels.tolist()


def test_archives_are_read_as_they_lie(name, published, tmp_path):
    root = put(tmp_path, published)
    before = tree(root)
    assert_is_published(load_data(name, binarisation="none", root=root))
    assert tree(root) == before  # so that a read-only folder will do
    assert set(published) == set(DATASETS[name].files)


def test_the_default_is_binary_and_says_so(name, published, tmp_path):
    splits = load_data(name, root=str(put(tmp_path, published)))
    assert splits.train.resampled
    assert set(splits.test.values.unique().tolist()) == {0.0, 1.0}
    space = f"{name}, binary (Bernoulli draws of grey levels, seed 0), 784 dimensions"
    assert {data.spec.space() for data in splits} == {space}
    assert splits.test.spec.image_shape == (28, 28)


def test_dequantised_images_keep_their_levels(name, published, tmp_path):
    test = load_data(name, dequantisation="uniform", root=put(tmp_path, published)).test
    assert torch.equal((test.values * 256).floor(), torch.tensor(TEST_IMAGES).flatten(1).float())


def test_files_that_torchvision_unpacked_are_read_too(name, published, tmp_path):
    folder = Path(next(iter(published))).parent
    put(tmp_path, {str(folder / file): idx(array) for file, array in ARRAYS.items()})
    assert_is_published(load_data(name, binarisation="none", root=tmp_path))


def test_a_file_cut_short_is_named(name, published, tmp_path):
    folder = Path(next(iter(published))).parent
    put(tmp_path, {str(folder / file): idx(array) for file, array in ARRAYS.items()})
    file = tmp_path / folder / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged: it holds 5487 val"):
        load_data(name, root=tmp_path)
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="damaged: it is no idx file of bytes"):
        load_data(name, root=tmp_path)


def test_a_damaged_archive_is_named_and_kept(name, published, tmp_path):
    last = list(published)[-1]
    damaged = published | {last: b"\x1f\x8b not the archive"}
    before = tree(put(tmp_path, damaged))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz is damaged: its md5 is not"):
        load_data(name, root=tmp_path)
    assert tree(tmp_path) == before


def test_a_failed_download_says_which_file_to_put_where(name, published, tmp_path):
    missing, *present = published
    root = put(tmp_path / "data", {place: published[place] for place in present})
    before = tree(root)
    with pytest.raises(FileNotFoundError) as error:
        load_data(name, root=root)
    message = str(error.value)
    assert f"put them here:\n  {root / missing}  (from http" in message
    assert "no network in tests" in message
    assert "`root=` or the environment variable PVAE_DATA" in message
    assert not any(str(root / place) in message for place in present)
    assert tree(root) == before


def test_missing_archives_are_downloaded_into_place(name, published, tmp_path, monkeypatch):
    by_file = {Path(place).name: content for place, content in published.items()}
    asked = []

    def download(url, folder, filename, checksum):
        asked.append(url)
        if len(asked) == 1 and name == "mnist":  # the second address is tried
            raise URLError("first mirror is down")
        assert checksum == md5(by_file[filename])
        Path(folder, filename).write_bytes(by_file[filename])

    monkeypatch.setattr(utils, "download_url", download)
    assert_is_published(load_data(name, binarisation="none", root=tmp_path / "new"))
    files = {str(p.relative_to(tmp_path / "new")) for p in tree(tmp_path / "new") if p.is_file()}
    assert files == set(published)
    asked.clear()
    load_data(name, root=tmp_path / "new")
    assert asked == []


def test_the_root_is_given_or_in_the_environment_or_a_cache(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PVAE_DATA", raising=False)
    assert data_root(None) == Path("/home/ada/.cache/pvae/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data_root(None) == Path("/cache/pvae/data")
    monkeypatch.setenv("PVAE_DATA", "~/sets")
    assert data_root(None) == Path("/home/ada/sets")
    assert data_root("here") == Path("here")


@pytest.mark.parametrize("packed", [True, False])
def test_emnist_letters_are_upright_and_count_from_zero(packed, tmp_path, monkeypatch):
    files = {
        f"emnist-letters-{file.replace('t10k', 'test')}": idx(array)
        for file, array in ARRAYS.items()
    }
    if packed:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for file, content in files.items():
                archive.writestr(f"gzip/{file}.gz", gzip.compress(content))
        monkeypatch.setattr(datasets.EMNIST, "md5", md5(buffer.getvalue()))
        put(tmp_path, {"EMNIST/raw/gzip.zip": buffer.getvalue()})
    else:
        put(tmp_path, {f"EMNIST/raw/{file}": content for file, content in files.items()})
    splits = load_data("emnist-letters", binarisation="none", root=tmp_path)
    train, test = TRAIN_IMAGES.transpose(0, 2, 1), TEST_IMAGES.transpose(0, 2, 1)
    assert_is_published(splits, train, test, first_label=1)


def drawings(characters: range) -> bytes:
    """An Omniglot archive: a band of ink on white paper, lower for each next character."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for character in characters:
            for drawer in range(20, 0, -1):
                paper = np.ones((105, 105), bool)
                paper[15 * character : 15 * (character + 1)] = False  # 4 rows of 28
                png = io.BytesIO()
                Image.fromarray(paper).save(png, "png")
                place = f"images/Alphabet/character{character:02}/{character:04}_{drawer:02}.png"
                archive.writestr(place, png.getvalue())
    return buffer.getvalue()


def test_omniglot_is_averaged_down_with_ink_high(tmp_path, monkeypatch):
    background, evaluation = drawings(range(1, 4)), drawings(range(4, 6))
    checksums = {"images_background": md5(background), "images_evaluation": md5(evaluation)}
    monkeypatch.setattr(datasets.Omniglot, "zips_md5", checksums)
    place = "omniglot-py/images_{}.zip"
    contents = {place.format("background"): background, place.format("evaluation"): evaluation}
    assert set(contents) == set(DATASETS["omniglot"].files)
    train, valid, test = load_data(
        "omniglot", binarisation="none", flatten=False, root=put(tmp_path, contents)
    )
    assert train.labels.tolist() == [label for label in (0, 1, 2) for _ in range(18)]
    assert valid.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test.labels.tolist() == [3] * 20 + [4] * 20
    image = torch.zeros(1, 28, 28)
    image[:, 16:20] = 1
    assert torch.equal(test.values[0], image)
