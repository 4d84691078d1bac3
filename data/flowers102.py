"""Flowers-102 -> class folders 001 to 102; train/ (its train and validation) 2,040, val/ (its test) 6,149.

The archives hold no names of the classes. train/ has 20 pictures of each.
"""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

_SPLITS = {"trnid": "train", "valid": "train", "tstid": "val"}


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    images, labels, splits = files
    classes = archives.matlab(labels, labels.read_bytes(), "labels")
    wanted = {}
    for name, split in _SPLITS.items():
        for number in archives.matlab(splits, splits.read_bytes(), name):
            wanted[f"jpg/image_{number:05d}.jpg"] = (split, f"{classes[number - 1]:03d}")
    return len(wanted), archives.picked(images, wanted)


FLOWERS102 = DataSet(
    "Flowers-102",
    {
        "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
        "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
        "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
    },
    pictures,
)

if __name__ == "__main__":
    archives.main(FLOWERS102, __doc__)
