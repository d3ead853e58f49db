"""Image sets in files that no library serves: put in place by hand, checked, never downloaded.

root / "freyfaces/freyfaces.npz", ...  ->  train, valid, test as (levels, None)
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pvae.data.files import read_arrays
from pvae.data.record import DatasetInfo, Grey, Parts
from pvae.data.spec import local_generator

__all__ = ["LOCAL"]

AMAT = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
BITS = {"train": 50_000, "valid": 10_000, "test": 10_000}
FACES = (1565, 200, 200)


def load_binarised_mnist(root: Path, seed: int) -> Parts:
    """MNIST in bits drawn once for all: three .amat files of text, or the same bits packed.

    Packed is `binarized_mnist_packbits.npz`, which holds `numpy.packbits` of each split's rows.
    """
    folder = root / "binarized_mnist"
    texts = {split: folder / f"binarized_mnist_{split}.amat" for split in BITS}
    packed = folder / "binarized_mnist_packbits.npz"
    if all(path.is_file() for path in texts.values()):
        bits = {split: (path, _read_amat(path)) for split, path in texts.items()}
    elif packed.is_file():
        arrays = _read_npz(packed, tuple(BITS))
        bits = {split: (packed, _unpacked(arrays[split], packed)) for split in BITS}
    else:
        missing = [path for path in texts.values() if not path.is_file()]
        raise _missing(missing, f"from {AMAT}", f"or all three packed, as {packed}")
    for split, (path, rows) in bits.items():
        if len(rows) != BITS[split]:
            raise _damaged(path, f"it has {len(rows)} images to {split} where {BITS[split]} belong")
    train, valid, test = (Grey(rows.reshape(-1, 28, 28), None) for _, rows in bits.values())
    return train, valid, test


def load_frey_faces(root: Path, seed: int) -> Parts:
    """The frames of a film of one face, permuted: neighbours are much alike."""
    folder = root / "freyfaces"
    packed, matlab = folder / "freyfaces.npz", folder / "frey_rawface.mat"
    if packed.is_file():
        path, faces = packed, _read_npz(packed, ("images",))["images"]
    elif matlab.is_file():
        from scipy.io import loadmat

        try:
            path, faces = matlab, loadmat(matlab)["ff"].T.reshape(-1, 28, 20)
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise _damaged(matlab, f"no images `ff` can be read from it ({error})") from error
    else:
        raise _missing([matlab], "from https://cs.nyu.edu/~roweis/data.html", f"or {packed}")
    if faces.dtype != np.uint8 or faces.shape != (sum(FACES), 28, 20):
        expected = f"{sum(FACES)} images of 28 x 20 bytes"
        raise _damaged(path, f"it holds {faces.shape} of {faces.dtype} where {expected} belong")
    levels = torch.from_numpy(np.ascontiguousarray(faces))
    order = torch.randperm(len(levels), generator=local_generator(seed, "split"))
    train, valid, test = (Grey(levels[rows], None) for rows in order.split(FACES))
    return train, valid, test


def _read_amat(path: Path) -> Tensor:
    """Lines of 784 words 0 or 1, as (N, 784) uint8."""
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if len(words) != 784 or not set(words) <= {b"0", b"1"}:
                raise _damaged(path, f"line {number} is not 784 times 0 or 1 with spaces between")
            rows.append(b"".join(words))
    bits = np.frombuffer(b"".join(rows), np.uint8) - ord("0")
    return torch.from_numpy(bits.reshape(-1, 784))


def _unpacked(packed: np.ndarray, path: Path) -> Tensor:
    if packed.dtype != np.uint8 or packed.shape[1:] != (98,):
        raise _damaged(path, f"it holds {packed.shape} of {packed.dtype}, not (N, 98) bytes")
    return torch.from_numpy(np.unpackbits(packed, axis=1))


def _read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    if missing := set(keys) - set(arrays):
        raise _damaged(path, f"it holds no array {' and no '.join(sorted(missing))}")
    return arrays


def _missing(paths: list[Path], whence: str, instead: str) -> FileNotFoundError:
    files = "\n  ".join(map(str, paths))
    return FileNotFoundError(
        f"The data's files are not all in place, and none is downloaded. Put here, {whence}:\n  "
        f"{files}\n{instead}; or name a folder that holds them, by `root=` or the environment "
        "variable PVAE_DATA."
    )


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"The data file {path} is damaged: {why}. Put a good copy in its place.")


LOCAL: dict[str, DatasetInfo] = {
    "binarised-mnist": DatasetInfo(
        title="Handwritten digits in fixed bits; no labels",
        splits=(BITS["train"], BITS["valid"], BITS["test"]),
        image_shape=(28, 28),
        levels=2,
        split_rule="as published",
        source="Larochelle & Murray 2011, The neural autoregressive distribution estimator",
        files=tuple(f"binarized_mnist/binarized_mnist_{split}.amat" for split in BITS),
        load=load_binarised_mnist,
        binarised=False,
    ),
    "frey-faces": DatasetInfo(
        title="Frames of a film of one face",
        splits=FACES,
        image_shape=(28, 20),
        levels=256,
        split_rule="a random permutation, drawn from the seed; the custom since Tomczak & Welling "
        "2018, though frames that follow each other are much alike",
        source="Roweis & Saul 2000, Nonlinear dimensionality reduction by locally linear embedding",
        files=("freyfaces/frey_rawface.mat",),
        load=load_frey_faces,
        binarised=False,
    ),
}
