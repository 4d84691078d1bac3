"""Caltech-101 without its background class -> class folders; train/ 30 of each of 101 classes, val/ the other 5,647.

It has no official split. The usual 30 pictures of a class that are trained on are here those whose names
(`accordion/image_0001.jpg`) have the smallest SHA-256.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

TRAIN = 30
_WITHIN, _FOLDER, _BACKGROUND = "caltech-101/101_ObjectCategories.tar.gz", "101_ObjectCategories/", "BACKGROUND_Google"


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    by_class = defaultdict(list)
    for member in archives.listed(files[0], _WITHIN):
        name = member.removeprefix(_FOLDER)
        label = name.partition("/")[0]
        if name != member and name.endswith(".jpg") and label != _BACKGROUND:
            by_class[label].append(name)
    wanted = {}
    for label, names in by_class.items():
        for place, name in enumerate(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())):
            wanted[_FOLDER + name] = ("train" if place < TRAIN else "val", label)
    return len(wanted), archives.picked(files[0], wanted, _WITHIN)


CALTECH101 = DataSet("Caltech-101", {"caltech-101.zip": "3138e1922a9193bfa496528edbbc45d0"}, pictures)

if __name__ == "__main__":
    archives.main(CALTECH101, __doc__)
