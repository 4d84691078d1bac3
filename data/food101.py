"""Food-101 -> class folders; train/ 75,750, val/ (its test) 25,250."""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

_LISTS = {"food-101/meta/train.txt": "train", "food-101/meta/test.txt": "val"}


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    wanted = archives.by_lists(files[0], _LISTS, _place)
    return len(wanted), archives.picked(files[0], wanted)


def _place(line: str) -> tuple[str, str]:
    """apple_pie/1005649"""
    return f"food-101/images/{line}.jpg", line.partition("/")[0]


FOOD101 = DataSet("Food-101", {"food-101.tar.gz": "85eeb15f3717b99a5da872d97d918f87"}, pictures)

if __name__ == "__main__":
    archives.main(FOOD101, __doc__)
