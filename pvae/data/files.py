"""A user's own files as rows: .npy, .npz, .csv, .parquet, and folders of images.

    path  --read_file-->  Rows, or {"train": Rows, "valid": Rows, "test": Rows} where it is parted

A whole file is read and checked before anything is handed on, and an error names the file, and in
it the row, the column or the picture. A table's column "label", the array "labels" of an .npz and
the subfolders of a folder of images become labels.
"""

import csv
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pvae.data.rows import Parted, Rows, from_frame, from_values

__all__ = ["SUFFIXES", "read_arrays", "read_file"]

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
PARTS = ("train", "valid", "test")


def read_file(path: Path, name: str | None = None, missing: bool = False) -> Rows | Parted:
    """Read a file by its ending, or a folder of images.

    Errors name the path; results name `name`, or the file without its ending. NaN, and in tables
    nothing between commas, is allowed where it marks what is missing.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if the ending is unknown, or the content is damaged or no data.
        TypeError: if values are no real numbers.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"There is no data file {str(path)!r}. A known data set is loaded by its name, by "
            "`load_data`."
        )
    reader = _read_folder if path.is_dir() else READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{str(path)!r} is no data file that can be read: expected {', '.join(SUFFIXES)}, or a "
            "folder of images."
        )
    rows = reader(path, missing)
    title = name or (path.name if path.is_dir() else path.stem)
    if isinstance(rows, Rows):
        return rows._replace(name=title)
    shapes = {part: tuple(rows[part].values.shape[1:]) for part in PARTS}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"The parts of {str(path)!r} must have data of one shape, got {shapes}.")
    return {part: rows[part]._replace(name=title) for part in PARTS}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file by name; ValueError, naming it, where it is none or damaged."""
    if not zipfile.is_zipfile(path):
        raise _unreadable(path, "it is no whole .npz archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from error


def _read_npy(path: Path, missing: bool) -> Rows:
    """Floating numbers stay in the file, mapped into memory, and are never written to."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise _unreadable(path, "it is an archive of arrays; name it .npz")
    if array.dtype in (np.float32, np.float64) and array.size:  # of this machine's byte order
        return from_values(torch.from_numpy(array), str(path), missing=missing)
    return from_values(array, str(path), missing=missing)


def _read_npz(path: Path, missing: bool) -> Rows | Parted:
    """One array and perhaps "labels"; or "train", "valid", "test", perhaps "train_labels", ..."""
    arrays = read_arrays(path)
    named = {key for key in arrays if not key.endswith("labels")}
    labelled = {key + "_labels" for key in named} if len(named) > 1 else {"labels"}
    if named == set(PARTS) and set(arrays) <= named | labelled:
        return {
            part: from_values(
                arrays[part], f"{path}: {part}", arrays.get(f"{part}_labels"), missing=missing
            )
            for part in PARTS
        }
    if len(named) == 1 and set(arrays) <= named | labelled:
        (key,) = named
        return from_values(arrays[key], str(path), arrays.get("labels"), missing=missing)
    held = ", ".join(f"{key} {array.shape}" for key, array in arrays.items()) or "nothing"
    raise ValueError(
        f"{str(path)!r} must hold one array, with or without `labels`; or `train`, `valid` and "
        f"`test`, each with or without `train_labels` and so on. It holds {held}. Pass the array "
        "that you mean: `np.load(path)[key]`."
    )


def _read_csv(path: Path, missing: bool) -> Rows:
    """With a header of names, or without one where each word of the first line is a number."""
    import pandas as pd

    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            first = next(csv.reader(lines), [])
        header: Any = None if first and all(map(_is_number, first)) else "infer"
        with warnings.catch_warnings():  # of words that have no column, and would be left out
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, header=header, index_col=False)
    except (ValueError, OSError, csv.Error, pd.errors.ParserWarning) as error:
        raise _unreadable(path, error) from error
    if first == [str(number) for number in range(len(first))]:
        raise ValueError(
            f"The first line of {str(path)!r}, {', '.join(first[:4])}, may be a row or the names "
            "that pandas gives to columns without one. Name the columns, or pass the frame: "
            "`pd.read_csv(path)`, with `header=None` if it is a row."
        )
    if header is not None and first[:1] == [""]:
        raise ValueError(
            f"The first column of {str(path)!r} has no name, so it looks like the numbers of the "
            "rows that pandas writes. Write it by `to_csv(path, index=False)`, or name the column."
        )
    return from_frame(frame, str(path), missing)


def _read_parquet(path: Path, missing: bool) -> Rows:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except ImportError as error:
        raise ImportError(
            f"Reading {str(path)!r} needs a package for Parquet: `pip install pyarrow`."
        ) from error
    except (ValueError, OSError) as error:  # pyarrow's errors are these
        raise _unreadable(path, error) from error
    return from_frame(frame, str(path), missing)


def _read_folder(path: Path, missing: bool) -> Rows | Parted:
    """Pictures in it; or in subfolders, one a class; or both in train, valid and test."""
    inside = _classes(path)
    if "train" in inside:
        if set(inside) != set(PARTS):
            raise ValueError(
                f"{str(path)!r} must hold the folders train, valid and test if it holds train, got "
                f"{', '.join(inside)}."
            )
        classes = {_classes(path / part) for part in PARTS}
        if len(classes) > 1:
            raise ValueError(
                f"The folders train, valid and test in {str(path)!r} must have the same classes, "
                f"got {' and '.join(sorted(map(str, classes)))}."
            )
        return {part: _read_images(path / part) for part in PARTS}
    return _read_images(path)


def _classes(folder: Path) -> tuple[str, ...]:
    inside = (inside for inside in folder.iterdir() if inside.is_dir())
    return tuple(sorted(inside.name for inside in inside if not inside.name.startswith(".")))


def _read_images(folder: Path) -> Rows:
    """(N, 1, H, W) or (N, 3, H, W), grey levels in [0, 1]; labels number subfolders by name."""
    classes = _classes(folder)
    loose = _image_files(folder)
    if classes and loose:
        raise ValueError(
            f"{str(folder)!r} holds both images ({loose[0].name}) and folders ({classes[0]}). Put "
            "all images into folders, one a class, or none."
        )
    parts = [_image_files(folder / name) for name in classes] if classes else [loose]
    if not all(parts):
        empty = folder / classes[[bool(part) for part in parts].index(False)] if classes else folder
        raise ValueError(f"There is no image in {str(empty)!r}: looked for {', '.join(IMAGES)}.")
    labels = [label for label, part in enumerate(parts) for _ in part]
    images: list[np.ndarray] = []
    for file in (file for part in parts for file in part):
        image = _read_image(file)
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"All images must have the size and colours of the first, {images[0].shape} for "
                f"{str(parts[0][0])!r}; {str(file)!r} has {image.shape} (colours, height, width)."
            )
        images.append(image)
    rows = from_values(np.stack(images), str(folder), np.array(labels) if classes else None)
    return rows._replace(values=rows.values / 255, levels=256)


def _image_files(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in files if file.suffix.lower() in IMAGES)


def _read_image(path: Path) -> np.ndarray:
    """(1, H, W) for black and white or grey, (3, H, W) for colours, uint8."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}.get(image.mode)
            frames = getattr(image, "n_frames", 1)
            if mode is not None and frames == 1:
                pixels = np.asarray(image.convert(mode))
    except (OSError, SyntaxError, ValueError) as error:  # of a picture cut short, too
        raise _unreadable(path, error) from error
    if frames > 1:
        raise ValueError(
            f"The image {str(path)!r} holds {frames} pictures; expected one in a file."
        )
    if mode is None:
        raise ValueError(
            f"The image {str(path)!r} has mode {image.mode!r}; expected 8 bits of grey (L) or of "
            "red, green and blue (RGB). Convert it first: `Image.open(path).convert('RGB')`."
        )
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _unreadable(path: Path, error: Exception | str) -> ValueError:
    return ValueError(f"The data file {str(path)!r} cannot be read: {error}")


READERS: Mapping[str, Callable[[Path, bool], Rows | Parted]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(READERS)
