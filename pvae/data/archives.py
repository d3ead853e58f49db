"""Files of the image sets: found in place, checked, or downloaded, in torchvision's own layout.

    root / "MNIST/raw/train-images-idx3-ubyte.gz"  --fetch-->  its path, checksum verified

Archives are read as they lie, never unpacked, so `root` may be read-only; it is written to only to
download. Addresses and checksums are torchvision's.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

__all__ = ["Archive", "data_root", "fetch", "parse_idx"]


@dataclass(frozen=True)
class Archive:
    """A published file: its place below the root, where to get it, and its checksum."""

    path: str
    urls: tuple[str, ...]
    md5: str


def data_root(root: str | Path | None) -> Path:
    """The folder for files: `root`, else the environment's `PVAE_DATA`, else ~/.cache/pvae/data."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root or os.environ.get("PVAE_DATA") or Path(cache, "pvae", "data")).expanduser()


def fetch(root: Path, archives: Sequence[Archive]) -> list[Path]:
    """Paths of archives below `root`; those that are missing are downloaded first.

    Raises:
        FileNotFoundError: if a download fails; it says which files to put where.
        ValueError: if a file in place is damaged.
    """
    from torchvision.datasets.utils import check_md5

    for archive in archives:
        path = root / archive.path
        if not path.is_file():
            failures = _download(root, archive)
            if failures:
                raise FileNotFoundError(_missing(root, archives, failures))
        elif not check_md5(path, archive.md5):
            raise _damaged(path, f"its md5 is not the published {archive.md5}")
    return [root / archive.path for archive in archives]


def parse_idx(content: bytes, path: Path) -> Tensor:
    """Read an idx file of bytes, the format of MNIST: two zeros, type, rank, sizes, then values.

    Raises:
        ValueError: if the content is not one, or is cut short; `path` is named as its origin.
    """
    rank = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else None
    if rank is None or len(content) < 4 + 4 * rank:
        raise _damaged(path, "it is no idx file of bytes")
    shape = np.frombuffer(content, ">i4", rank, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != shape.prod():
        raise _damaged(path, f"it holds {values.size} values where {shape.prod()} are announced")
    return torch.from_numpy(values.reshape(shape).copy())


def _download(root: Path, archive: Archive) -> list[str]:
    """Try each address in turn; return why each failed, nothing where one succeeded."""
    from torchvision.datasets import utils

    path, failures = root / archive.path, []
    for url in archive.urls:
        try:
            root.mkdir(parents=True, exist_ok=True)
            # Beside, then renamed: a download that is cut off leaves nothing in place.
            with TemporaryDirectory(dir=root) as beside:
                utils.download_url(url, beside, path.name, archive.md5)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(beside, path.name), path)
            return []
        except Exception as error:  # HTTP's, the disk's, torchvision's, Google Drive's
            failures.append(f"{url}: {error}")
    return failures


def _missing(root: Path, archives: Sequence[Archive], failures: list[str]) -> str:
    missing = [archive for archive in archives if not (root / archive.path).is_file()]
    return "\n  ".join(
        [
            f"The data's files are not all in {root}, and the download failed:",
            *failures,
            "Get the missing ones by other means and put them here:",
            *(f"{root / archive.path}  (from {archive.urls[0]})" for archive in missing),
            "or name a folder that holds them, by `root=` or the environment variable PVAE_DATA.",
        ]
    )


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"The data file {path} is damaged: {why}. Delete it and load again, which downloads it, "
        "or put a good copy in its place."
    )
