"""Sets in local files, from tiny ones of the same format."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from pvae.data import DATASETS, load_data, local

BITS = {
    split: np.random.default_rng(seed).integers(0, 2, (num, 784), dtype=np.uint8)
    for seed, (split, num) in enumerate({"train": 5, "valid": 2, "test": 3}.items())
}
FACES = np.random.default_rng(0).integers(0, 256, (8, 28, 20), dtype=np.uint8)


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    monkeypatch.setattr(local, "BITS", {split: len(rows) for split, rows in BITS.items()})
    monkeypatch.setattr(local, "FACES", (4, 2, 2))


def write_amat(root: Path) -> Path:
    folder = root / "binarized_mnist"
    folder.mkdir()
    for split, rows in BITS.items():
        lines = [" ".join(map(str, row)) for row in rows]
        (folder / f"binarized_mnist_{split}.amat").write_text("\n".join(lines) + "\n")
    return root


def write_packed(root: Path, **changes: np.ndarray) -> Path:
    (root / "binarized_mnist").mkdir()
    packed = {split: np.packbits(rows, axis=1) for split, rows in BITS.items()} | changes
    np.savez_compressed(root / "binarized_mnist/binarized_mnist_packbits.npz", **packed)
    return root


@pytest.mark.parametrize("write", [write_amat, write_packed])
def test_bits_are_those_of_the_files_in_their_order(tmp_path, write):
    splits = load_data("binarised-mnist", root=write(tmp_path))
    for data, rows in zip(splits, BITS.values(), strict=True):
        assert np.array_equal(data.values, rows)
        assert data.labels is None
        assert not data.resampled
        assert data.spec.space() == "binarised-mnist, binary (as published), 784 dimensions"
    assert splits.test.spec.image_shape == (28, 28)
    assert splits.test.spec.log_jacobian == 0


def test_bits_are_not_binarised_again(tmp_path):
    root = write_amat(tmp_path)
    for binarisation in ("dynamic", "fixed", "threshold"):
        with pytest.raises(ValueError, match="'binarised-mnist' is binary as published, got"):
            load_data("binarised-mnist", root=root, binarisation=binarisation)
    assert not load_data("binarised-mnist", root=root, binarisation="none").train.resampled


@pytest.mark.parametrize(
    "line", ["0 1", " ".join(["2"] * 784), " ".join(["10"] * 784), "x" * 784, ""]
)
def test_a_bad_line_is_named(tmp_path, line):
    path = write_amat(tmp_path) / "binarized_mnist/binarized_mnist_valid.amat"
    path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"valid.amat is damaged: line 2 is not 784 times 0 or 1"):
        load_data("binarised-mnist", root=tmp_path)


def test_a_file_cut_short_is_named(tmp_path):
    path = write_amat(tmp_path) / "binarized_mnist/binarized_mnist_train.amat"
    path.write_text("\n".join(path.read_text().splitlines()[:4]))
    with pytest.raises(
        ValueError, match=r"train.amat is damaged: .* 4 images to train where 5 bel"
    ):
        load_data("binarised-mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"test": np.zeros((3, 97), np.uint8)}, r"holds \(3, 97\) of uint8, not \(N, 98\) bytes"),
        ({"valid": np.zeros((9, 98), np.uint8)}, "9 images to valid where 2 belong"),
    ],
)
def test_bad_packed_bits_are_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=f"packbits.npz is damaged: .*{match}"):
        load_data("binarised-mnist", root=write_packed(tmp_path, **changes))


def test_missing_files_are_named_and_not_downloaded(tmp_path):
    (write_amat(tmp_path) / "binarized_mnist/binarized_mnist_test.amat").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_data("binarised-mnist", root=tmp_path)
    message = str(error.value)
    assert str(tmp_path / "binarized_mnist/binarized_mnist_test.amat") in message
    assert "binarized_mnist_train.amat" not in message
    assert "from http://www.cs.toronto.edu" in message
    with pytest.raises(FileNotFoundError, match=r"frey_rawface.mat\nor .*freyfaces.npz; or name"):
        load_data("frey-faces", root=tmp_path)


def write_faces(root: Path, kind: str, faces: np.ndarray = FACES) -> Path:
    (root / "freyfaces").mkdir(exist_ok=True)
    if kind == "npz":
        np.savez(root / "freyfaces/freyfaces.npz", images=faces)
    else:  # as published: a column a face, pixels row by row
        columns = faces.reshape(len(faces), -1).T
        scipy.io.savemat(root / "freyfaces/frey_rawface.mat", {"ff": columns})
    return root


@pytest.mark.parametrize("kind", ["npz", "mat"])
def test_faces_are_permuted_by_the_seed_and_grey(tmp_path, kind):
    root = write_faces(tmp_path, kind)
    splits = load_data("frey-faces", root=root)
    assert [len(data) for data in splits] == [4, 2, 2]
    faces = torch.cat([data.values for data in splits]).numpy() * 255
    rows = [int(np.abs(FACES.reshape(8, -1) - face).sum(1).argmin()) for face in faces]
    assert sorted(rows) == list(range(8)) != rows
    np.testing.assert_allclose(faces, FACES.reshape(8, -1)[rows], atol=1e-4)
    assert splits.test.spec.space() == "frey-faces, 256 grey levels in [0, 1], 560 dimensions"
    assert splits.test.spec.image_shape == (28, 20)
    assert not torch.equal(load_data("frey-faces", root=root, seed=1).test.values, splits[2].values)
    assert load_data("frey-faces", root=root, dequantisation="uniform").train.resampled


def test_other_faces_are_refused(tmp_path):
    for kind in ("mat", "npz"):
        write_faces(tmp_path, kind, FACES[:7])
        with pytest.raises(ValueError, match=r"holds \(7, 28, 20\) of uint8 where 8 images of 28"):
            load_data("frey-faces", root=tmp_path)
    np.savez(tmp_path / "freyfaces/freyfaces.npz", pictures=FACES)
    with pytest.raises(ValueError, match=r"freyfaces.npz is damaged: it holds no array images"):
        load_data("frey-faces", root=tmp_path)
    (tmp_path / "freyfaces/freyfaces.npz").unlink()
    (tmp_path / "freyfaces/frey_rawface.mat").write_bytes(b"MATLAB?" * 40)
    with pytest.raises(ValueError, match=r"frey_rawface.mat is damaged: no images `ff`"):
        load_data("frey-faces", root=tmp_path)


def test_the_records_are_of_the_published_sizes():
    assert DATASETS["binarised-mnist"].splits == (50_000, 10_000, 10_000)
    assert DATASETS["frey-faces"].num_images == 1965
