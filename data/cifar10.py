"""CIFAR-10: the "binary version" -> PNG in class folders; train/ 50,000, val/ (its test batch) 10,000.

The python version holds pickles, which run whatever they say; it is not read.
"""

from collections.abc import Iterator
from pathlib import Path

import archives
import numpy as np
from archives import DataSet, Picture

from mage_ds.errors import UserError

_SIDE = 32
_BATCHES = {f"data_batch_{k}.bin": "train" for k in range(1, 6)} | {"test_batch.bin": "val"}


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    return records(files[0], "cifar-10-batches-bin", "batches.meta.txt", _BATCHES, head=1)


def records(path: Path, folder: str, names: str, batches: dict[str, str], head: int) -> tuple[int, Iterator[Picture]]:
    """Args: names: the file with a class a line; batches: file -> split; head: bytes before the 3 x 32 x 32 of a
    picture, the last of which is its class."""
    found = archives.texts(path, [f"{folder}/{name}" for name in (names, *batches)])
    classes = found[f"{folder}/{names}"].decode("ascii", "replace").split()
    size = head + 3 * _SIDE**2
    tables = {name: np.frombuffer(found[f"{folder}/{name}"], np.uint8) for name in batches}
    for name, table in tables.items():
        labels = table[head - 1 :: size]
        if len(table) % size or not len(table) or labels.max() >= len(classes):
            raise UserError(f"{path}: {name} is no table of pictures in {len(classes)} classes")
    made = _pictures([(split, tables[name].reshape(-1, size)) for name, split in batches.items()], classes, head)
    return sum(len(table) // size for table in tables.values()), made


def _pictures(tables: list[tuple[str, np.ndarray]], classes: list[str], head: int) -> Iterator[Picture]:
    """Files are named by a picture's number in its split."""
    seen = dict.fromkeys(("train", "val"), 0)
    for split, rows in tables:
        for row in rows:
            pixels = row[head:].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
            yield Picture(split, classes[row[head - 1]], f"{seen[split]:05d}", archives.png(pixels))
            seen[split] += 1


CIFAR10 = DataSet("CIFAR-10", {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}, pictures)

if __name__ == "__main__":
    archives.main(CIFAR10, __doc__)
