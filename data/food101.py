"""Food-101 -> class folders; train/ 75,750, val/ (its test) 25,250."""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

_LISTS = {"food-101/meta/train.txt": "train", "food-101/meta/test.txt": "val"}  # lines such as apple_pie/1005649


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    found = archives.texts(files[0], _LISTS)
    wanted = {}
    for name, split in _LISTS.items():
        for line in archives.lines(found[name]):
            wanted[f"food-101/images/{line}.jpg"] = (split, line.partition("/")[0])
    return len(wanted), archives.picked(files[0], wanted)


FOOD101 = DataSet("Food-101", {"food-101.tar.gz": "85eeb15f3717b99a5da872d97d918f87"}, pictures)

if __name__ == "__main__":
    archives.main(FOOD101, __doc__)
