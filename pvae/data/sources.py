"""The known sets of images, each with a record (`DATASETS`) and a loader function.

    loader(root, seed)  ->  train, valid, test as (levels, labels): (N, H, W) uint8 and (N,) int64

Adding a set adds a loader and its record, and edits none. Loaders of grey images are here; those in
colours are in `colours.py`, and those of files that nobody serves are in `local.py`.
"""

import gzip
import io
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pvae.data.archives import Archive, fetch, parse_idx
from pvae.data.colours import COLOURS
from pvae.data.local import LOCAL
from pvae.data.record import HOLD_OUT, DatasetInfo, Grey, Parts, hold_out
from pvae.data.spec import local_generator

__all__ = ["DATASETS", "DatasetInfo", "Grey"]

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load_digits(root: Path, seed: int) -> Parts:
    """The 8 x 8 digits that scikit-learn embeds, ordered by writer there and so shuffled here."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(images), generator=local_generator(seed, "split"))
    train, valid, test = (Grey(images[i], labels[i]) for i in order.split([1257, 180, 360]))
    return train, valid, test


def load_mnist_like(torchvision_name: str, root: Path, seed: int) -> Parts:
    """MNIST and the sets made in its image, by the name of torchvision's class."""
    from torchvision import datasets

    published = getattr(datasets, torchvision_name)
    folder = f"{torchvision_name}/raw"
    unpacked = [root / folder / file for file in MNIST_FILES]
    if all(path.is_file() for path in unpacked):
        return _hold_out([parse_idx(path.read_bytes(), path) for path in unpacked])
    md5 = dict(published.resources)
    archives = [
        Archive(f"{folder}/{file}", tuple(mirror + file for mirror in published.mirrors), md5[file])
        for file in (f"{name}.gz" for name in MNIST_FILES)
    ]
    packed = fetch(root, archives)
    return _hold_out([parse_idx(gzip.decompress(path.read_bytes()), path) for path in packed])


def load_emnist_letters(root: Path, seed: int) -> Parts:
    """Letters of EMNIST, put upright (they are published transposed); labels 0 to 25, a to z."""
    from torchvision.datasets import EMNIST

    folder = "EMNIST/raw"
    files = [f"emnist-letters-{name.replace('t10k', 'test')}" for name in MNIST_FILES]
    paths = [root / folder / file for file in files]
    if all(path.is_file() for path in paths):
        contents = [path.read_bytes() for path in paths]
    else:
        paths = 4 * fetch(root, [Archive(f"{folder}/gzip.zip", (EMNIST.url,), EMNIST.md5)])
        with zipfile.ZipFile(paths[0]) as archive:
            contents = [gzip.decompress(archive.read(f"gzip/{file}.gz")) for file in files]
    images, labels, test_images, test_labels = map(parse_idx, contents, paths)
    return _hold_out([images.mT, labels - 1, test_images.mT, test_labels - 1])


def load_omniglot(root: Path, seed: int) -> Parts:
    """Drawn characters, 105 x 105 ink on paper, averaged down to 28 x 28 with ink high.

    Drawings 19 and 20 of each background character validate; the evaluation alphabets, never seen
    in training, test. Labels are the published numbers of the characters, from 0.
    """
    from torchvision.datasets import Omniglot

    folder, url = Omniglot.folder, Omniglot.download_url_prefix
    archives = [
        Archive(f"{folder}/{name}.zip", (f"{url}/{name}.zip",), Omniglot.zips_md5[name])
        for name in ("images_background", "images_evaluation")
    ]
    (drawings, characters, drawer), (*evaluation, _) = map(_read_drawings, fetch(root, archives))
    train, valid = (
        Grey(drawings[chosen], characters[chosen]) for chosen in (drawer <= 18, drawer > 18)
    )
    return train, valid, Grey(*evaluation)


def _hold_out(files: list[Tensor]) -> Parts:
    """Train and test as published; valid is the last of train, as large as test."""
    images, labels, test_images, test_labels = files
    train, test = Grey(images, labels.long()), Grey(test_images, test_labels.long())
    return hold_out(train, test, len(test_images))


def _read_drawings(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """All drawings of an archive, named ".../0709_01.png": character 709 by drawer 1."""
    from PIL import Image

    images = []
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        for name in names:
            paper = Image.open(io.BytesIO(archive.read(name))).convert("L")
            images.append(255 - np.asarray(paper.resize((28, 28), Image.Resampling.BOX)))
    numbers = torch.tensor([[int(n) for n in Path(name).stem.split("_")] for name in names])
    return torch.from_numpy(np.stack(images)), numbers[:, 0] - 1, numbers[:, 1]


def _mnist_like(title: str, torchvision_name: str, source: str) -> DatasetInfo:
    return DatasetInfo(
        title=title,
        splits=(50_000, 10_000, 10_000),
        image_shape=(28, 28),
        levels=256,
        split_rule=HOLD_OUT,
        source=source,
        files=tuple(f"{torchvision_name}/raw/{name}.gz" for name in MNIST_FILES),
        load=partial(load_mnist_like, torchvision_name),
    )


DATASETS: dict[str, DatasetInfo] = (
    {
        "digits": DatasetInfo(
            title="Handwritten digits, embedded in scikit-learn",
            splits=(1257, 180, 360),
            image_shape=(8, 8),
            levels=17,
            split_rule="a random permutation, drawn from the seed",
            source="Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits",
            files=(),
            load=load_digits,
        ),
        "mnist": _mnist_like(
            "Handwritten digits",
            "MNIST",
            "LeCun, Bottou, Bengio & Haffner 1998, Gradient-based learning applied to documents",
        ),
        "fashion-mnist": _mnist_like(
            "Articles of clothing",
            "FashionMNIST",
            "Xiao, Rasul & Vollgraf 2017, Fashion-MNIST: a novel image dataset",
        ),
        "kmnist": _mnist_like(
            "Cursive Japanese characters",
            "KMNIST",
            "Clanuwat et al. 2018, Deep learning for classical Japanese literature",
        ),
        "emnist-letters": DatasetInfo(
            title="Handwritten letters, cases merged",
            splits=(104_000, 20_800, 20_800),
            image_shape=(28, 28),
            levels=256,
            split_rule=HOLD_OUT,
            source="Cohen, Afshar, Tapson & van Schaik 2017, EMNIST: extending MNIST to letters",
            files=("EMNIST/raw/gzip.zip",),
            load=load_emnist_letters,
        ),
        "omniglot": DatasetInfo(
            title="Characters of 50 alphabets, 20 drawings each, averaged down to 28 x 28",
            splits=(17_352, 1_928, 13_180),
            image_shape=(28, 28),
            levels=256,
            split_rule=(
                "test is the evaluation alphabets; valid is drawings 19 and 20 of each background "
                "character. Not the split of the IWAE paper: figures are not comparable to its"
            ),
            source="Lake, Salakhutdinov & Tenenbaum 2015, Human-level concept learning",
            files=("omniglot-py/images_background.zip", "omniglot-py/images_evaluation.zip"),
            load=load_omniglot,
        ),
    }
    | LOCAL
    | COLOURS
)
