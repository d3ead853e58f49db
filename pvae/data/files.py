"""A user's own files as rows: .npy, .npz, .csv, .parquet, and folders of images.

    path  --read_file-->  Rows, or {"train": Rows, "valid": Rows, "test": Rows} where it is parted

A whole file is read and checked before anything is handed on, and an error names the file, and in
it the row, the column or the picture. A table's column "label" (or "Label", "LABEL"), the array
"labels" of an .npz and the subfolders of a folder of images become labels; those that are blank or
NaN are -1 where data may be missing.
"""

import csv
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pvae.data.rows import Parted, Rows, from_frame, from_values

__all__ = ["SUFFIXES", "read_arrays", "read_file"]

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
NO_IMAGES = ("thumbs.db", "desktop.ini")  # what Windows leaves, where others leave hidden files
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
    wide = any(rows[part].values.dtype == torch.float64 for part in PARTS)
    dtype = torch.float64 if wide else torch.float32
    return {
        part: rows[part]._replace(name=title, values=rows[part].values.to(dtype)) for part in PARTS
    }


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
    """With a header of names, or without one where each word of the first line is a number.

    Spaces around names are no part of them. Lines that are blank are left out; but with `missing`,
    one in a file of a single column is a row that was not seen.
    """
    import pandas as pd

    try:
        number, first = _first_line(path)
        single = missing and len(first) == 1
        header = None if first and all(map(_is_number, first)) else number if single else 0
        if separator := _other_separator(first):
            raise ValueError(
                f"expected commas between values, got {separator} in its first line. Pass the "
                "frame: `pd.read_csv(path, sep=...)`."
            )
        with warnings.catch_warnings():  # of words that have no column, and would be left out
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path,
                header=header,
                index_col=False,
                skipinitialspace=True,
                skip_blank_lines=not single,
            )
    except (ValueError, OSError, csv.Error, pd.errors.ParserWarning) as error:
        raise _unreadable(path, error) from error
    frame.columns = [word.strip() if isinstance(word, str) else word for word in frame.columns]
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
    folders, loose = _contents(path)
    inside = [folder.name for folder in folders]
    if set(inside) & set(PARTS):
        if set(inside) != set(PARTS) or loose:
            raise ValueError(
                f"{str(path)!r} must hold the folders train, valid and test, and nothing else, if "
                f"it holds one of them, got {', '.join([*inside, *(file.name for file in loose)])}."
            )
        classes = {tuple(inner.name for inner in _contents(path / part)[0]) for part in PARTS}
        if len(classes) > 1:
            raise ValueError(
                f"The folders train, valid and test in {str(path)!r} must have the same classes, "
                f"got {' and '.join(sorted(map(str, classes)))}."
            )
        return {part: _read_images(path / part) for part in PARTS}
    return _read_images(path)


def _contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Its folders and its images, sorted; whatever else it holds is refused, unless hidden."""
    inside = sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and entry.name.lower() not in NO_IMAGES
    )
    folders = [entry for entry in inside if entry.is_dir()]
    files = [entry for entry in inside if not entry.is_dir()]
    for file in files:
        if file.suffix.lower() not in IMAGES:
            raise ValueError(
                f"The file {str(file)!r} is no image that can be read: expected "
                f"{', '.join(IMAGES)}. Convert it, or take it out of the folder."
            )
    return folders, files


def _read_images(folder: Path) -> Rows:
    """(N, 1, H, W) or (N, 3, H, W), grey levels in [0, 1]; labels number subfolders by name."""
    classes, loose = _contents(folder)
    if classes and loose:
        raise ValueError(
            f"{str(folder)!r} holds both images ({loose[0].name}) and folders ({classes[0].name}). "
            "Put all images into folders, one a class, or none."
        )
    parts = [_class_images(of_class) for of_class in classes] if classes else [loose]
    if not all(parts):
        empty = classes[[bool(part) for part in parts].index(False)] if classes else folder
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


def _class_images(folder: Path) -> list[Path]:
    folders, files = _contents(folder)
    if folders:
        raise ValueError(
            f"The folder {str(folders[0])!r} is inside that of a class; expected only images "
            "there. Move its images up, or take it out."
        )
    return files


def _read_image(path: Path) -> np.ndarray:
    """(1, H, W) for black and white or grey, (3, H, W) for colours, uint8, upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            mode = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}.get(image.mode)
            frames = getattr(image, "n_frames", 1)
            if mode is not None and frames == 1:
                pixels = np.asarray(ImageOps.exif_transpose(image).convert(mode))
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


def _first_line(path: Path) -> tuple[int, list[str]]:
    """The first line that is not blank: its number, from 0, and its words."""
    with path.open(newline="", encoding="utf-8-sig") as lines:
        for number, words in enumerate(csv.reader(lines, skipinitialspace=True)):
            if words not in ([], [""]):
                return number, [word.strip() for word in words]
    return 0, []


def _other_separator(first: list[str]) -> str | None:
    """What parts the values of a first line in place of commas, if anything does."""
    for separator, called in ((";", "semicolons"), ("\t", "tabs"), (" ", "spaces")):
        pieces = [piece for word in first for piece in word.split(separator)]
        names = len(first) == 1 and separator != " "  # a name may have spaces in it
        if len(pieces) > len(first) and (names or all(map(_is_number, pieces))):
            return called
    return None


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
