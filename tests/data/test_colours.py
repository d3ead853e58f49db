"""Sets in colours, from tiny archives in torchvision's layout, with no network."""

import hashlib
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets
from torchvision.datasets import utils

from pvae.data import DATASETS, load_data

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(url, *args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(utils, "download_url", refuse)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def pixels(num: int) -> np.ndarray:
    return RNG.integers(0, 256, (num, 3, 32, 32), dtype=np.uint8)


def assert_levels(data, expected: np.ndarray) -> None:
    np.testing.assert_allclose(data.values * 255, expected, atol=1e-4)


def test_cifar10_is_read_from_its_archive(tmp_path, monkeypatch):
    train, test = pixels(20), pixels(3)
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, rows in (
            *((f"data_batch_{i + 1}", slice(4 * i, 4 * i + 4)) for i in range(5)),
            ("test_batch", None),
        ):
            images = test if rows is None else train[rows]
            labels = list(range(10))[: len(images)]
            content = pickle.dumps({"data": images.reshape(-1, 3072), "labels": labels})
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(path))
    splits = load_data("cifar10", root=tmp_path, flatten=False)
    for data, expected in zip(splits, (train[:18], train[18:], test), strict=True):
        assert_levels(data, expected)
    assert splits.valid.labels.tolist() == [2, 3]
    assert splits.test.spec.image_shape == (3, 32, 32)
    space = "cifar10, 256 grey levels in [0, 1], 3072 dimensions"
    assert splits.test.spec.space() == space
    flat = load_data("cifar10", root=tmp_path, dequantisation="uniform").test
    assert flat.values.shape == (3, 3072)
    assert flat.spec.image_shape == (3, 32, 32)


def test_an_archive_with_another_checksum_is_not_unpickled(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is damaged: its md5 is not"):
        load_data("cifar10", root=tmp_path)


def test_svhn_counts_nought_as_nought(tmp_path, monkeypatch):
    arrays = {"train": pixels(10), "test": pixels(3)}
    split_list = {}
    for split, images in arrays.items():
        path = tmp_path / f"{split}_32x32.mat"
        labels = np.arange(1, len(images) + 1, dtype=np.uint8)[:, None]
        scipy.io.savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels})
        split_list[split] = ["http://nowhere", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    train, valid, test = load_data("svhn", root=tmp_path, flatten=False)
    assert_levels(train, arrays["train"][:9])
    assert_levels(valid, arrays["train"][9:])
    assert_levels(test, arrays["test"])
    assert train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert valid.labels.tolist() == [0]


def celeba(folder: Path) -> dict[str, Path]:
    """Six faces, each grey in the middle 148 x 148 and white around it."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for number in range(6):
            face = np.full((218, 178, 3), 255, np.uint8)
            face[35:183, 15:163] = (10 * number, 100, 200)
            jpeg = io.BytesIO()
            Image.fromarray(face).save(jpeg, "jpeg", quality=100, subsampling=0)
            archive.writestr(f"img_align_celeba/{number}.jpg", jpeg.getvalue())
    lines = [f"{number}.jpg {part}\n" for number, part in enumerate([0, 2, 0, 1, 0, 2])]
    (folder / "list_eval_partition.txt").write_text("".join(lines))
    return {path.name: path for path in folder.iterdir()}


def test_celeba_is_cut_to_the_face_and_parted_as_published(tmp_path, monkeypatch):
    files = celeba(tmp_path / "celeba")
    known = [("key", md5(path), name) for name, path in files.items()]
    monkeypatch.setattr(datasets.CelebA, "file_list", known)
    splits = load_data("celeba", root=tmp_path, flatten=False)
    for data, numbers in zip(splits, ([0, 2, 4], [3], [1, 5]), strict=True):
        assert data.values.shape == (len(numbers), 3, 64, 64)
        assert data.labels is None
        inner = data.values[:, :, 4:-4, 4:-4] * 255  # JPEG blurs the edge
        expected = torch.tensor([[10.0 * number, 100, 200] for number in numbers])
        assert (inner - expected[..., None, None]).abs().max() < 4
        assert (data.values[:, 0] * 255).mean() < 60  # none of the white around


@pytest.mark.parametrize("name", ["cifar10", "svhn", "celeba"])
def test_missing_archives_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        load_data(name, root=tmp_path)
    for file in DATASETS[name].files:
        assert f"{tmp_path / file}  (from http" in str(error.value)
    assert "no network in tests" in str(error.value)
