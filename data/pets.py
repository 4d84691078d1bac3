"""Oxford-IIIT Pets, 37 breeds -> class folders; train/ (its trainval) 3,680, val/ (its test) 3,669."""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

_LISTS = {"annotations/trainval.txt": "train", "annotations/test.txt": "val"}


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    images, annotations = files
    wanted = archives.by_lists(annotations, _LISTS, _place)
    return len(wanted), archives.picked(images, wanted)


def _place(line: str) -> tuple[str, str]:
    """Abyssinian_100 1 1 1"""
    picture = line.split()[0]
    return f"images/{picture}.jpg", picture.rpartition("_")[0]


PETS = DataSet(
    "Oxford-IIIT Pets",
    {
        "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
        "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
    },
    pictures,
)

if __name__ == "__main__":
    archives.main(PETS, __doc__)
