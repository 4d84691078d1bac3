"""Describable Textures, split 1 of its ten -> class folders; train/ (its train, val) 3,760, val/ (its test) 1,880."""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

_LISTS = {"train1": "train", "val1": "train", "test1": "val"}  # lines such as banded/banded_0002.jpg


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    names = {f"dtd/labels/{name}.txt": split for name, split in _LISTS.items()}
    found = archives.texts(files[0], names)
    wanted = {}
    for name, split in names.items():
        for line in archives.lines(found[name]):
            wanted[f"dtd/images/{line}"] = (split, line.partition("/")[0])
    return len(wanted), archives.picked(files[0], wanted)


DTD = DataSet("DTD", {"dtd-r1.0.1.tar.gz": "fff73e5086ae6bdbea199a49dfb8a4c1"}, pictures)

if __name__ == "__main__":
    archives.main(DTD, __doc__)
