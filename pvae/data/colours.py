"""Image sets in colours: CIFAR-10, SVHN and CelebA, from the files that torchvision uses.

    root / "cifar-10-python.tar.gz", ...  ->  train, valid, test as (levels (N, 3, H, W), labels)

Pictures are read from the archives as they lie. Labels are those published; CelebA has none here.
"""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.data.archives import Archive, fetch
from pvae.data.record import DatasetInfo, Grey, Parts, hold_out

__all__ = ["COLOURS"]


def load_cifar10(root: Path, seed: int) -> Parts:
    """Ten kinds of things, 32 x 32; valid is the last tenth of train."""
    from torchvision.datasets import CIFAR10

    (path,) = fetch(root, [Archive(CIFAR10.filename, (CIFAR10.url,), CIFAR10.tgz_md5)])
    with tarfile.open(path) as archive:
        train, test = (
            [_cifar_batch(archive, f"{CIFAR10.base_folder}/{name}") for name, _ in names]
            for names in (CIFAR10.train_list, CIFAR10.test_list)
        )
    return _tenth_held_out(_joined(train), _joined(test))


def load_svhn(root: Path, seed: int) -> Parts:
    """House numbers, 32 x 32, labels 0 to 9; valid is the last tenth of train."""
    from scipy.io import loadmat
    from torchvision.datasets import SVHN

    urls = [SVHN.split_list[split] for split in ("train", "test")]
    paths = fetch(root, [Archive(file, (url,), md5) for url, file, md5 in urls])
    train, test = (
        Grey(
            torch.from_numpy(np.ascontiguousarray(mat["X"].transpose(3, 2, 0, 1))),
            torch.from_numpy(mat["y"].reshape(-1).astype(np.int64) % 10),  # ten stands for nought
        )
        for mat in map(loadmat, paths)
    )
    return _tenth_held_out(train, test)


def load_celeba(root: Path, seed: int) -> Parts:
    """Faces, the middle 148 x 148 of 178 x 218 averaged down to 64 x 64; splits as published.

    As in Larsen et al. 2016 and most VAEs since. All images are held in memory: ten gigabytes.
    """
    from torchvision.datasets import CelebA

    folder, known = CelebA.base_folder, {file: (key, md5) for key, md5, file in CelebA.file_list}
    files = ("img_align_celeba.zip", "list_eval_partition.txt")
    pictures, partition = fetch(
        root,
        [
            Archive(
                f"{folder}/{file}",
                (f"https://drive.google.com/file/d/{known[file][0]}",),
                known[file][1],
            )
            for file in files
        ],
    )
    lines = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    with zipfile.ZipFile(pictures) as archive:
        train, valid, test = (
            [_face(archive, f"img_align_celeba/{name}") for name, part in lines if part == split]
            for split in "012"
        )
    return _faces(train), _faces(valid), _faces(test)


def _cifar_batch(archive: tarfile.TarFile, name: str) -> Grey:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"The archive {archive.name!r} holds no file {name!r}.")
    # The archive's checksum is verified: it is the published one.
    batch: dict[str, Any] = pickle.load(file, encoding="latin1")
    levels = torch.from_numpy(np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32))
    return Grey(levels, torch.tensor(batch["labels"], dtype=torch.int64))


def _joined(batches: list[Grey]) -> Grey:
    labels: list[Tensor] = [batch.labels for batch in batches if batch.labels is not None]
    return Grey(torch.cat([batch.levels for batch in batches]), torch.cat(labels))


def _tenth_held_out(train: Grey, test: Grey) -> Parts:
    return hold_out(train, test, round(len(train.levels) / 10))


def _face(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    from PIL import Image

    image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
    left, top = (image.width - 148) // 2, (image.height - 148) // 2
    box = (left, top, left + 148, top + 148)
    small = image.resize((64, 64), Image.Resampling.BOX, box)
    return np.asarray(small).transpose(2, 0, 1)


def _faces(images: list[np.ndarray]) -> Grey:
    return Grey(torch.from_numpy(np.stack(images)), None)


TENTH = "test as published; valid is the last tenth of the published train"

COLOURS: dict[str, DatasetInfo] = {
    "cifar10": DatasetInfo(
        title="Ten kinds of animals and vehicles, in colours",
        splits=(45_000, 5_000, 10_000),
        image_shape=(3, 32, 32),
        levels=256,
        split_rule=TENTH,
        source="Krizhevsky 2009, Learning multiple layers of features from tiny images",
        files=("cifar-10-python.tar.gz",),
        load=load_cifar10,
        binarised=False,
    ),
    "svhn": DatasetInfo(
        title="House numbers, in colours",
        splits=(65_931, 7_326, 26_032),
        image_shape=(3, 32, 32),
        levels=256,
        split_rule=TENTH,
        source="Netzer et al. 2011, Reading digits in natural images with unsupervised learning",
        files=("train_32x32.mat", "test_32x32.mat"),
        load=load_svhn,
        binarised=False,
    ),
    "celeba": DatasetInfo(
        title="Faces of celebrities, in colours, averaged down to 64 x 64",
        splits=(162_770, 19_867, 19_962),
        image_shape=(3, 64, 64),
        levels=256,
        split_rule="as published",
        source="Liu, Luo, Wang & Tang 2015, Deep learning face attributes in the wild",
        files=("celeba/img_align_celeba.zip", "celeba/list_eval_partition.txt"),
        load=load_celeba,
        binarised=False,
    ),
}
