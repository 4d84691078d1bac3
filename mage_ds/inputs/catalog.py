"""What a data set is: a folder of pictures or of tars, with or without classes, or their tokens.

Names, labels, bytes, a fingerprint.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mage_ds.errors import UserError
from mage_ds.inputs import listing_cache, token_cache
from mage_ds.inputs.listing import NOT_A_FILE, Listing, look, part_of
from mage_ds.inputs.tars import ENDINGS
from mage_ds.inputs.token_cache import TokenCache

_SPLITS = ("train", "val")
_LARGEST = 1 << 30  # bytes of one picture: a broken header must not ask for all memory


@dataclass(frozen=True)
class Catalog:
    """Pictures of one folder in a fixed order (bytes of their relative names; as if tars were unpacked).

    names, offsets: all names in one buffer; sizes: int64 (n,) bytes; labels: int32 (n,), -1 = none; classes: names of
    the labels, the same for every split of a data set; shards: tars relative to root, shard and begin say where in
    them a picture's bytes lie; numbered: the labels come from `.cls`; damaged, skipped: see Listing.
    """

    root: Path
    split: str | None
    classes: list[str]
    names: bytes | memoryview
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    fingerprint: str
    shards: list[str]
    shard: np.ndarray
    begin: np.ndarray
    numbered: bool
    damaged: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.sizes)

    def _relative(self, i: int) -> str:
        return os.fsdecode(bytes(self.names[self.offsets[i] : self.offsets[i + 1]]))

    def name(self, i: int) -> str:
        """Path relative to the data folder, the split's folder included (`train/cat/1.jpg`)."""
        return f"{self.split}/{self._relative(i)}" if self.split else self._relative(i)

    def path(self, i: int) -> Path:
        """Where the picture lies; within a tar something to show, not to open."""
        folder = self.root / self.shards[self.shard[i]] if self.shards else self.root
        return folder / self._relative(i)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def read(self, i: int) -> bytes:
        """The picture's bytes, from any thread. OSError if they cannot be read or it is not a file."""
        size = int(self.sizes[i])
        if size == NOT_A_FILE:
            raise OSError("not a file")  # never opened: reading a pipe would wait forever
        if size > _LARGEST:
            raise OSError(f"{size:,} bytes, more than a picture has")
        if not self.shards:
            return self.path(i).read_bytes()
        with open(self.root / self.shards[self.shard[i]], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(self.begin[i]))
        if len(data) < size:
            raise OSError("the tar has become shorter")
        return data


def open_catalog(
    path, split: str | None = None, check: bool = False, tokens: bool = False
) -> Catalog | TokenCache | None:
    """The pictures below a folder; class = first folder of the relative path, or what tars say in `.cls`.

    Args: split: "train" or "val": the sub folder of that name if there is one, else the tars directly in the folder
    that are named after it; "train" without either is the folder itself, "val" without one is None.
    check: list anew, whatever the cache says, and leave damaged tars out instead of refusing them; tokens: a token
    cache will do as well, and is returned as such.
    Raises: UserError if the folder is missing, cannot be listed or holds no picture, or a tar is damaged.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root}: {_no_folder(root)}")
    if token_cache.is_cache(root):
        if tokens:
            return token_cache.open_cache(root, split or "train")
        raise UserError(f"{root}: holds tokens, and pictures are needed here; name the folder that it was made of")
    folder, part = _place(root, split)
    if folder is None:
        return None
    found = listing_cache.listing(folder, part, fresh=check)
    if found.damaged and not (check and found.n):
        shard, reason = sorted(found.damaged.items())[0]
        more = f" (and {len(found.damaged) - 1:,} more)" if len(found.damaged) > 1 else ""
        advice = "copy it again, or remove it" if check else "`mage-ds prepare` lists all such tars; copy them again"
        raise UserError(f"{folder / shard}: {reason}{more}; {advice}")
    if not found.n:
        raise UserError(_nothing(folder, found))
    split = split if part or folder != root else None
    return _build(folder, split, found, *_classes(root, folder, part, found))


def _no_folder(root: Path) -> str:
    if root.exists():
        return f"is not a folder; name the folder that holds the pictures or tars: {root.parent}"
    return f"no such data folder; `mage-ds prepare --sample digits --out {root}` makes a sample data set there"


def _nothing(folder: Path, found: Listing) -> str:
    what = "no pictures" if any(folder.iterdir()) else "empty folder"
    if found.shards:
        what = f"no pictures in {len(found.shards):,} tars"
    return (
        f"{folder}: {what} ({' '.join(ENDINGS)}); put pictures, class folders of them or tars there and check them "
        "with `mage-ds prepare SRC`, or make a sample data set with `mage-ds prepare --sample digits --out DATA`"
    )


def _place(root: Path, split: str | None) -> tuple[Path | None, str | None]:
    """Folder to list and the part of its tars; (None, None) where there is no such split."""
    if split and (root / split).is_dir():
        return root / split, None
    if split == "train" and (root / "val").is_dir():
        raise UserError(f"{root}: has val/ but no train/; name the folder of training pictures {root / 'train'}")
    if not split:
        return root, None
    has_val = any(part_of(shard) == "val" for shard in look(root).tars)
    if split == "val" and not has_val:
        return None, None
    return root, split if has_val else None


def _build(folder: Path, split: str | None, found: Listing, classes: list[str], labels: np.ndarray) -> Catalog:
    shared = ["names", "offsets", "sizes", "fingerprint", "shards", "shard", "begin", "damaged", "skipped"]
    values = {name: getattr(found, name) for name in shared}
    numbered = labels is found.numbers
    return Catalog(root=folder, split=split, classes=classes, labels=labels, numbered=numbered, **values)


def _classes(root: Path, folder: Path, part: str | None, found: Listing) -> tuple[list[str], np.ndarray]:
    """Class names over all splits (a class without held-out pictures must not shift the others' numbers), labels."""
    splits = [root / name for name in _SPLITS if folder != root and (root / name).is_dir()]
    if found.shards:
        several = [found, *(listing_cache.listing(other, None) for other in splits if other != folder)]
        several += [listing_cache.listing(root, other) for other in _SPLITS if part and other != part]
        most = max((int(one.numbers.max()) for one in several if len(one.numbers)), default=-1)
        if most >= 0:
            return [str(number) for number in range(most + 1)], found.numbers
        names = {name for one in several for name in one.firsts}
    else:
        names = {name for one in splits or [folder] for name in look(one).folders}.union(found.firsts)
    classes = sorted(names, key=os.fsencode)
    if classes == found.firsts:
        return classes, found.first  # as it is: pages of the cache that ranks share
    number = {name: k for k, name in enumerate(classes)}
    return classes, np.array([*(number[name] for name in found.firsts), -1], dtype=np.int32)[found.first]
