"""One's own data in files: each kind written by another library, read, split, and damaged."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import pvae
from pvae.data import Data, load_data

X = np.random.default_rng(0).normal(size=(20, 3))
Y = np.arange(20) % 3
PIXELS = np.random.default_rng(1).integers(0, 256, (12, 4, 5), dtype=np.uint8)


def write_images(folder: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03}{suffix}")
    return folder


# ----------------------------------------------------------------------------------- arrays


def test_floats_of_an_npy_file_stay_in_the_file(tmp_path):
    """As the file changes, so do the values: they are mapped, and what is written stays away."""
    path = tmp_path / "mine.npy"
    np.save(path, X.astype(np.float32))
    data = Data.of(path)
    some = data.subset(slice(5, 10))
    assert data.spec.name == "mine"
    assert np.array_equal(data.values, X.astype(np.float32))
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(7).tobytes())
        file.seek(-4 * 3 * 15, 2)  # row 5
        file.write(np.float32(8).tobytes())
    assert data.values[-1, -1] == 7
    assert some.values[0, 0] == 8
    data.values[0, 0] = 9
    assert np.load(path)[0, 0] == np.float32(X[0, 0])


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", ">f4", "float16", "int32", "uint8", "bool"]
)
@pytest.mark.parametrize("as_path", [str, Path])
def test_an_npy_file_is_split_as_its_array_is(tmp_path, dtype, as_path):
    array = (10 * abs(X)).astype(dtype)
    np.save(tmp_path / "mine.npy", array)
    read = load_data(as_path(tmp_path / "mine.npy"), seed=2)
    for got, wanted in zip(read, load_data(array, seed=2), strict=True):
        assert torch.equal(got.values, wanted.values)
        assert got.values.dtype == wanted.values.dtype
    assert read.test.spec.space() == "mine, values as given, 3 dimensions"


def test_bytes_of_a_file_are_dequantised(tmp_path):
    np.save(tmp_path / "mine.npy", PIXELS)
    np.savez(tmp_path / "mine.npz", PIXELS)
    for file in ("mine.npy", "mine.npz"):
        train = load_data(tmp_path / file, dequantisation="uniform").train
        assert (train.spec.levels, train.spec.image_shape) == (256, (4, 5))


def test_an_npz_file_holds_one_array_and_perhaps_labels(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, x=X, labels=Y)
    data = Data.of(path)
    assert np.array_equal(data.values, X)
    assert data.labels.tolist() == Y.tolist()
    np.savez(path, X)
    assert Data.of(str(path)).labels is None
    np.savez(path, x=X, labels=Y.astype(">f4"))
    assert Data.of(path).labels.tolist() == Y.tolist()
    np.savez(path, x=X, labels=np.where(Y == 1, np.nan, Y))
    assert Data.of(path, missing=True).labels.tolist() == np.where(Y == 1, -1, Y).tolist()


def test_an_npz_file_of_splits_is_split_as_it_is(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, train=X[:10], valid=X[10:14], test=X[14:], test_labels=Y[14:])
    train, valid, test = load_data(path, standardisation="columns")
    np.testing.assert_allclose(train.spec.location, X[:10].mean(0))
    assert (len(train), len(valid), len(test)) == (10, 4, 6)
    assert train.labels is None
    assert test.labels.tolist() == Y[14:].tolist()
    np.testing.assert_allclose(test.spec.unstandardise(test.values), X[14:])
    with pytest.raises(TypeError, match=r"mine.npz' holds splits: load it by `load_data`"):
        Data.of(path)


def test_the_splits_of_an_npz_file_are_of_one_type(tmp_path):
    """Else a model in the type of train could not be held against test."""
    few = np.arange(6).reshape(3, 2)
    np.savez(tmp_path / "mine.npz", train=few, valid=few, test=few + 2**24)
    splits = load_data(tmp_path / "mine.npz")
    assert [data.values.dtype for data in splits] == [torch.float64] * 3
    assert splits.test.values.tolist() == (few + 2**24).tolist()


def test_evaluate_takes_a_path(tmp_path):
    np.save(tmp_path / "mine.npy", X.astype(np.float32))
    model = pvae.models.ppca(3, 1)
    pvae.fit(model, tmp_path / "mine.npy", epochs=1, progress=False)
    assert pvae.evaluate(model, str(tmp_path / "mine.npy"), 2).spec.name == "mine"


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": X, "z": X}, r"one array, .* It holds x \(20, 3\), z \(20, 3\). Pass the array"),
        ({"x": X, "valid_labels": Y}, r"It holds x \(20, 3\), valid_labels \(20,\)"),
        ({"labels": Y}, r"It holds labels \(20,\)"),
        ({}, "It holds nothing"),
        ({"train": X, "valid": X, "test": X[:, :2]}, r"of one shape, got .*'test': \(2,\)"),
        (
            {"train": X, "valid": X, "test": X * np.inf},
            r"mine.npz: test' has NaN or .* 20 of 20 rows",
        ),
        ({"x": X, "labels": Y + 0.5}, r"Labels of '.*mine.npz' must be .* got 0.5 in row 0"),
        ({"x": X, "labels": np.where(Y == 1, np.nan, Y)}, r"mine.npz' has no label in row 1 .* -1"),
        ({"x": X, "labels": np.array(["oak"] * 20)}, r"got dtype <U3. Number them: `np.unique"),
        ({"x": X, "labels": Y[:9]}, r"a label for each of its 20 rows, got .* \(9,\)"),
        ({"x": np.array(["a", {}], object)}, r"mine.npz' cannot be read: Object arrays"),
    ],
)
def test_an_npz_file_of_something_else_is_refused(tmp_path, arrays, match):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        load_data(tmp_path / "mine.npz")


# ----------------------------------------------------------------------------------- tables


def test_a_csv_file_with_a_header_and_labels(tmp_path):
    path = tmp_path / "mine.csv"
    pd.DataFrame(X, columns=list("abc")).assign(label=Y).to_csv(path, index=False)
    data = Data.of(path)
    np.testing.assert_allclose(data.values, X, rtol=1e-14)
    assert data.labels.tolist() == Y.tolist()
    for got, wanted in zip(load_data(path), load_data(X), strict=True):
        np.testing.assert_allclose(got.values, wanted.values, rtol=1e-14)


def test_a_csv_file_without_a_header_keeps_its_first_row(tmp_path):
    np.savetxt(tmp_path / "mine.csv", X, delimiter=",")
    np.testing.assert_allclose(Data.of(tmp_path / "mine.csv").values, X, rtol=1e-14)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("a,b\n1,2\n3,\n", ValueError, "mine.csv' has NaN .* in 1 of 2 rows, .* row 1, column 'b'"),
        ("a,b\n1,2\n3\n", ValueError, "in 1 of 2 rows, .* row 1, column 'b'"),
        ("a,b\n1,inf\n3,4\n", ValueError, "row 0, column 'b': inf"),
        (
            "a,b\n1,2\n3,\n5,6\n7,?\n9,!\n",
            TypeError,
            r"must be real numbers, .* not: row 3, column 'b': '\?' .* leave that blank and say",
        ),
        ("a,b\nx,y\n", TypeError, "row 0, column 'a': 'x'; row 0, column 'b': 'y'"),
        ("a;b\n1;2\n", ValueError, "expected commas between values, got semicolons in its first"),
        ("1,5;2,5\n3,5;4,5\n", ValueError, "got semicolons in its first line"),
        ("a\tb\n1\t2\n", ValueError, r"got tabs .* Pass the frame: `pd.read_csv\(path, sep="),
        ("1 2\n3 4\n", ValueError, "got spaces in its first line"),
        ("a,label\n1,0\n2,1.5\n", ValueError, "got 1.5 in row 1"),
        ("a,b\n1,2\n1,2,3\n", ValueError, "mine.csv' cannot be read: .*line 3, saw 3"),
        (",a\n0,1\n1,2\n", ValueError, r"first column of '.*mine.csv' has no name.*index=False"),
        ("a,b\n1,2,3\n4,5,6\n", ValueError, "mine.csv' cannot be read: Length of header"),
        ("0,1,2\n4,5,6\n", ValueError, "first line of '.*mine.csv', 0, 1, 2, may be a row or the"),
        ("", ValueError, "mine.csv' cannot be read: No columns"),
        ("a,b\n", ValueError, r"mine.csv' must have shape .* N >= 1, got \(0, 2\)"),
        ("a,b\n1,\xff\n", ValueError, "mine.csv' cannot be read: .*utf-8"),
    ],
)
def test_a_bad_csv_file_is_refused_by_row_and_column(tmp_path, text, error, match):
    (tmp_path / "mine.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(error, match=match):
        load_data(tmp_path / "mine.csv")


def test_spaces_around_the_names_and_numbers_of_a_csv_file_are_left_out(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text('a, b , "label"\n1, , oak\n 3, 4 , ash\n')
    data = Data.of(path, missing=True)
    assert str(data.values.tolist()) == "[[1.0, nan], [3.0, 4.0]]"
    assert data.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="row 0, column 'b': nan"):
        Data.of(path)


@pytest.mark.parametrize("name", ["Label", "LABEL"])
def test_a_csv_files_column_of_labels_may_be_in_capitals(tmp_path, name):
    (tmp_path / "mine.csv").write_text(f"a,{name}\n1,7\n2,\n")
    data = Data.of(tmp_path / "mine.csv", missing=True)
    assert (data.values.tolist(), data.labels.tolist()) == ([[1], [2]], [7, -1])


@pytest.mark.parametrize("header", ["", "a\n", "\n a \n"])
def test_a_blank_line_of_a_single_column_is_a_row_that_was_not_seen(tmp_path, header):
    path = tmp_path / "mine.csv"
    path.write_text(f"{header}1\n\n3\n  \n")
    assert str(Data.of(path, missing=True).values.flatten().tolist()) == "[1.0, nan, 3.0, nan]"
    assert Data.of(path).values.flatten().tolist() == [1, 3]
    path.write_text("\n1,2\n\n3,4\n")
    assert Data.of(path, missing=True).values.tolist() == [[1, 2], [3, 4]]


def test_a_parquet_file_is_read_as_its_frame(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "mine.parquet"
    frame = pd.DataFrame(X, columns=list("abc")).assign(label=Y)
    frame.to_parquet(path)
    data = Data.of(path)
    assert np.array_equal(data.values, X)
    assert data.labels.tolist() == Y.tolist()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"mine.parquet' cannot be read"):
        load_data(path)


def test_what_parquet_needs_is_said(tmp_path, monkeypatch):
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    for engine in ("pyarrow", "fastparquet"):
        monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(ImportError, match=r"mine.parquet' needs .*: `pip install pyarrow`"):
        load_data(tmp_path / "mine.parquet")


def test_the_frame_that_pandas_reads_from_parquet_is_used(tmp_path, monkeypatch):
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    frame = pd.DataFrame({"a": [1.0, 2.0], "label": [4.0, None]})
    monkeypatch.setattr(pd, "read_parquet", lambda path: frame)
    data = Data.of(tmp_path / "mine.parquet", missing=True)
    assert (data.values.tolist(), data.labels.tolist()) == ([[1], [2]], [4, -1])
    assert data.spec.name == "mine"
    with pytest.raises(ValueError, match=r"mine.parquet' has no label in row 1"):
        Data.of(tmp_path / "mine.parquet")


# ----------------------------------------------------------------------------------- images


def test_a_folder_of_grey_images_has_levels_in_the_unit_interval(tmp_path):
    folder = write_images(tmp_path / "faces", PIXELS)
    data = Data.of(folder)
    np.testing.assert_allclose(data.values[:, 0] * 255, PIXELS, atol=1e-4)
    assert (data.spec.image_shape, data.labels) == ((4, 5), None)
    assert data.spec.space() == "faces, 256 grey levels in [0, 1], 20 dimensions"
    train = load_data(folder, dequantisation="uniform", flatten=False).train
    assert train.values.shape == (10, 1, 4, 5)
    assert set(load_data(folder, binarisation="dynamic").test.values.unique().tolist()) <= {0, 1}


def test_a_folder_of_classes_has_their_numbers_as_labels(tmp_path):
    write_images(tmp_path / "faces/cat", PIXELS[:5])
    write_images(tmp_path / "faces/ant", PIXELS[5:])
    data = Data.of(str(tmp_path / "faces"))
    assert data.labels.tolist() == [0] * 7 + [1] * 5  # ant, cat
    np.testing.assert_allclose(data.values[:7, 0] * 255, PIXELS[5:], atol=1e-4)


def test_folders_of_splits_are_split_as_they_are(tmp_path):
    for split, images in (("train", PIXELS[:6]), ("valid", PIXELS[6:8]), ("test", PIXELS[8:])):
        write_images(tmp_path / split / "a", images)
        write_images(tmp_path / split / "b", images[:1])
    splits = load_data(tmp_path)
    assert [len(data) for data in splits] == [7, 3, 5]
    assert splits.test.labels.tolist() == [0, 0, 0, 0, 1]
    (tmp_path / "test/b").rename(tmp_path / "test/c")
    with pytest.raises(ValueError, match=r"must have the same classes, got .*'b'.* and .*'c'"):
        load_data(tmp_path)


def test_images_in_colours_have_their_colours_first(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    data = Data.of(write_images(tmp_path / "faces", pixels, ".ppm"))
    np.testing.assert_allclose(data.values * 255, pixels.transpose(0, 3, 1, 2), atol=1e-4)
    assert data.spec.image_shape == (3, 5, 6)


def test_a_folder_with_a_bad_image_is_refused_by_its_name(tmp_path):
    folder = write_images(tmp_path / "faces", PIXELS)
    odd = folder / "020.png"
    Image.fromarray(PIXELS[0, :3]).save(odd)
    with pytest.raises(
        ValueError, match=r"\(1, 4, 5\) for '.*000.png'; '.*020.png' has \(1, 3, 5\)"
    ):
        load_data(folder)
    Image.fromarray(np.stack([PIXELS[0]] * 3, axis=-1)).save(odd)
    with pytest.raises(ValueError, match=r"'.*020.png' has \(3, 4, 5\)"):
        load_data(folder)
    Image.fromarray(PIXELS[0].astype(np.uint16)).save(odd)
    with pytest.raises(ValueError, match=r"020.png' has mode 'I;16'; expected 8 bits"):
        load_data(folder)
    odd.write_bytes((folder / "000.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"020.png' cannot be read"):
        load_data(folder)
    odd.write_text("no image")
    with pytest.raises(ValueError, match=r"020.png' cannot be read"):
        load_data(folder)


def test_an_image_of_several_pictures_is_refused(tmp_path):
    first, *others = (Image.fromarray(image) for image in PIXELS[:3])
    first.save(tmp_path / "film.tiff", save_all=True, append_images=others)
    with pytest.raises(ValueError, match=r"film.tiff' holds 3 pictures; expected one"):
        load_data(tmp_path)


def test_splits_are_not_taken_for_classes(tmp_path):
    for split in ("train", "val", "test"):
        write_images(tmp_path / split, PIXELS[:3])
    with pytest.raises(
        ValueError, match=r"train, valid and test, and nothing else, .* got test, train, val"
    ):
        load_data(tmp_path)


@pytest.mark.parametrize("there", [["test"], ["valid", "test"], ["train", "valid", "test", "cat"]])
def test_some_of_the_splits_are_not_taken_for_classes(tmp_path, there):
    for name in there:
        write_images(tmp_path / name, PIXELS[:3])
    with pytest.raises(ValueError, match="must hold the folders train, valid and test, and noth"):
        load_data(tmp_path)


def test_what_lies_beside_the_splits_is_refused(tmp_path):
    for split in ("train", "valid", "test"):
        write_images(tmp_path / split, PIXELS[:3])
    assert len(load_data(tmp_path).train) == 3
    write_images(tmp_path, PIXELS[:1])
    with pytest.raises(ValueError, match=r"and nothing else, .* got test, train, valid, 000.png"):
        load_data(tmp_path)


@pytest.mark.parametrize("name", ["more.gif", "more.jfif", "README.txt", "no_ending"])
@pytest.mark.parametrize("inside", ["cat", "."])
def test_a_file_that_is_no_image_is_refused_by_its_name(tmp_path, name, inside):
    write_images(tmp_path / "faces/cat", PIXELS)
    (tmp_path / "faces" / inside / name).write_text("of whom")
    with pytest.raises(ValueError, match=rf"{name}' is no image that can be read: expected .png,"):
        Data.of(tmp_path / "faces")
    if inside == "cat":
        with pytest.raises(ValueError, match=rf"{name}' is no image that can be read"):
            Data.of(tmp_path / "faces/cat")


def test_a_folder_inside_that_of_a_class_is_refused_by_its_name(tmp_path):
    write_images(tmp_path / "faces/cat", PIXELS)
    write_images(tmp_path / "faces/cat/more", PIXELS)
    with pytest.raises(ValueError, match=r"'.*faces/cat/more' is inside that of a class"):
        Data.of(tmp_path / "faces")


def test_an_image_is_turned_as_its_exif_says(tmp_path):
    """Orientation 6: row 0 is the right side of the picture, so it is to be turned clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[0]).save(tmp_path / "000.png", exif=exif)
    data = Data.of(tmp_path)
    np.testing.assert_allclose(data.values[0, 0] * 255, np.rot90(PIXELS[0], -1), atol=1e-4)


def test_hidden_files_and_folders_are_no_data(tmp_path):
    folder = write_images(tmp_path / "faces", PIXELS)
    write_images(folder / ".checkpoints", PIXELS[:2])
    for name in ("._000.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (folder / name).write_bytes(b"what another system keeps")
    assert len(Data.of(folder)) == 12


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no image in .*looked for .png"):
        load_data(tmp_path)
    write_images(tmp_path / "cat", PIXELS)
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"no image in '.*dog'"):
        load_data(tmp_path)
    write_images(tmp_path, PIXELS)
    with pytest.raises(ValueError, match=r"both images \(000.png\) and folders \(cat\)"):
        load_data(tmp_path)


# ----------------------------------------------------------------------------------- no file


@pytest.mark.parametrize("load", [Data.of, load_data])
def test_paths_that_lead_to_nothing_are_refused(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=r"no data file '.*mine.npy'"):
        load(tmp_path / "mine.npy")
    with pytest.raises(FileNotFoundError, match=r"'digts'. A known .* by its name, by `load_data`"):
        Data.of("digts")
    (tmp_path / "mine.txt").write_text("1 2")
    with pytest.raises(
        ValueError, match=r"mine.txt' is no data file .* .npy, .npz, .csv, .parquet"
    ):
        load(str(tmp_path / "mine.txt"))


def test_files_with_each_others_names_are_told_apart(tmp_path):
    np.savez(tmp_path / "mine.npz", X)
    np.save(tmp_path / "mine.npy", X)
    (tmp_path / "mine.npz").rename(tmp_path / "other.npy")
    (tmp_path / "mine.npy").rename(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"other.npy' cannot be read: it is an archive of arrays"):
        load_data(tmp_path / "other.npy")
    with pytest.raises(ValueError, match=r"other.npz' cannot be read: it is no whole .npz archive"):
        load_data(tmp_path / "other.npz")


def test_a_changed_bit_is_noticed_where_there_is_a_checksum(tmp_path):
    np.savez_compressed(tmp_path / "mine.npz", X)
    content = bytearray((tmp_path / "mine.npz").read_bytes())
    content[300] ^= 255
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"mine.npz' cannot be read"):
        load_data(tmp_path / "mine.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, X)
    whole = path.read_bytes()
    for content in (whole[:-40], whole[:20], b"", b"something else than arrays"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"mine{suffix}' cannot be read"):
            load_data(path)


def test_a_name_is_no_path_and_a_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "digits", PIXELS)
    assert load_data("digits").test.spec.name == "digits"
    assert load_data("digits").test.values.shape == (360, 64)
    assert load_data("./digits").test.values.shape == (1, 20)
    assert load_data(Path("digits")).test.values.shape == (1, 20)
