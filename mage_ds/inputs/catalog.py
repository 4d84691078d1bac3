"""What a data set is: a folder of pictures, with or without class folders. Names, labels, bytes, a fingerprint."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mage_ds.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_NOT_A_FILE = -1  # size of a folder, a broken link or a pipe that is named like a picture


@dataclass(frozen=True)
class Catalog:
    """Pictures of one folder in a fixed order (bytes of their relative names).

    names, offsets: all names in one buffer, since a million strings take 100 MB; sizes: int64 (n,) bytes;
    labels: int32 (n,), -1 = none; classes: names of the labels, the same for every split of a data set.
    """

    root: Path
    split: str | None
    classes: list[str]
    names: bytes
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    @property
    def n(self) -> int:
        return len(self.sizes)

    def _relative(self, i: int) -> bytes:
        return self.names[self.offsets[i] : self.offsets[i + 1]]

    def name(self, i: int) -> str:
        """Path relative to the data folder, the split's folder included (`train/cat/1.jpg`)."""
        name = os.fsdecode(self._relative(i))
        return f"{self.split}/{name}" if self.split else name

    def path(self, i: int) -> Path:
        return self.root / os.fsdecode(self._relative(i))

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def read(self, i: int) -> bytes:
        """The file's bytes. OSError if it cannot be read or is not a file."""
        if self.sizes[i] == _NOT_A_FILE:
            raise OSError("not a file")  # never opened: reading a pipe would wait forever
        return self.path(i).read_bytes()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over relative names and sizes: tells data sets apart, not pixels."""
        digest = hashlib.sha256()
        for i in range(self.n):
            digest.update(b"%s\0%d\n" % (self._relative(i), self.sizes[i]))
        return digest.hexdigest()


def open_catalog(path, split: str | None = None) -> Catalog | None:
    """The pictures below a folder; class = first folder of the relative path, none without sub folders.

    Args: split: "train" or "val": the sub folder of that name if there is one; "train" without one is the folder
    itself, "val" without one is None.
    Raises: UserError if the folder is missing, cannot be listed or holds no picture.
    """
    root = Path(path)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "no such data folder"
        raise UserError(f"{root}: {what}; `mage-ds prepare --sample digits --out {root}` makes a sample data set there")
    folder = root
    if split and (root / split).is_dir():
        folder = root / split
    elif split == "train":
        if (root / "val").is_dir():
            raise UserError(f"{root}: has val/ but no train/; name the folder of training pictures {root / 'train'}")
        split = None
    elif split:
        return None
    entries = sorted(_walk(folder, b"", ()))
    if not entries:
        empty = not any(folder.iterdir())
        raise UserError(
            f"{folder}: {'empty folder' if empty else 'no pictures'} ({' '.join(ENDINGS)}); put pictures or class "
            "folders of pictures there and check them with `mage-ds prepare SRC`, or make a sample data set with "
            "`mage-ds prepare --sample digits --out DATA`"
        )
    return _build(folder, split, _classes(root, split), entries)


def _build(folder: Path, split: str | None, classes: list[str], entries: list[tuple[bytes, int]]) -> Catalog:
    number = {os.fsencode(name): k for k, name in enumerate(classes)}
    firsts = (name.partition(b"/") for name, _ in entries)
    return Catalog(
        root=folder,
        split=split,
        classes=classes,
        names=b"".join(name for name, _ in entries),
        offsets=np.cumsum([0, *(len(name) for name, _ in entries)], dtype=np.int64),
        sizes=np.array([size for _, size in entries], dtype=np.int64),
        labels=np.array([number[first] if slash else -1 for first, slash, _ in firsts], dtype=np.int32),
    )


def _classes(root: Path, split: str | None) -> list[str]:
    """Class names over all splits: a class that lacks held-out pictures must not shift the others' numbers."""
    folders = [root / name for name in ("train", "val", split)] if split else [root]
    names = {entry.name for folder in folders if folder.is_dir() for entry in _visible(folder) if _is_class(entry)}
    return sorted(names, key=os.fsencode)


def _is_class(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) and not _is_picture(entry.name)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _visible(folder) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error


def _walk(folder, prefix: bytes, parents: tuple):
    """Yields (relative name, size) of everything below a folder that is named like a picture."""
    state = os.stat(folder)
    me = (state.st_dev, state.st_ino)
    if me in parents:  # a link to a folder above
        return
    for entry in _visible(folder):
        name = prefix + os.fsencode(entry.name)
        if _is_picture(entry.name):
            yield name, _size(entry)
        elif os.path.isdir(entry.path):  # False, not an error, for a link to itself
            yield from _walk(entry.path, name + b"/", (*parents, me))


def _size(entry: os.DirEntry) -> int:
    try:
        state = entry.stat()
    except OSError:
        return _NOT_A_FILE
    return state.st_size if stat.S_ISREG(state.st_mode) else _NOT_A_FILE
