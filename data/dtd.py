"""Describable Textures, split 1 of its ten -> class folders; train/ (its train, val) 3,760, val/ (its test) 1,880."""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

_LISTS = {f"dtd/labels/{name}1.txt": split for name, split in (("train", "train"), ("val", "train"), ("test", "val"))}


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    wanted = archives.by_lists(files[0], _LISTS, _place)
    return len(wanted), archives.picked(files[0], wanted)


def _place(line: str) -> tuple[str, str]:
    """banded/banded_0002.jpg"""
    return f"dtd/images/{line}", line.partition("/")[0]


DTD = DataSet("DTD", {"dtd-r1.0.1.tar.gz": "fff73e5086ae6bdbea199a49dfb8a4c1"}, pictures)

if __name__ == "__main__":
    archives.main(DTD, __doc__)
