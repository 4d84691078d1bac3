"""Oxford-IIIT Pets, 37 breeds -> class folders; train/ (its trainval) 3,680, val/ (its test) 3,669."""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

_LISTS = {"annotations/trainval.txt": "train", "annotations/test.txt": "val"}  # lines such as Abyssinian_100 1 1 1


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    images, annotations = files
    found = archives.texts(annotations, _LISTS)
    wanted = {}
    for name, split in _LISTS.items():
        for line in archives.lines(found[name]):
            picture = line.split()[0]
            wanted[f"images/{picture}.jpg"] = (split, picture.rpartition("_")[0])
    return len(wanted), archives.picked(images, wanted)


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
