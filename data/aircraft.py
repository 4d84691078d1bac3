"""FGVC-Aircraft, its 100 variants -> class folders; train/ (its trainval) 6,667, val/ (its test) 3,333.

The pictures keep the line of 20 pixels at their lower edge that names the photographer.
"""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

_FOLDER = "fgvc-aircraft-2013b/data"
_LISTS = {"trainval": "train", "test": "val"}  # lines such as 1025794 707-320: picture, variant


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    names = {f"{_FOLDER}/images_variant_{name}.txt": split for name, split in _LISTS.items()}
    found = archives.texts(files[0], names)
    wanted = {}
    for name, split in names.items():
        for line in archives.lines(found[name]):
            picture, _, variant = line.partition(" ")
            wanted[f"{_FOLDER}/images/{picture}.jpg"] = (split, variant)
    return len(wanted), archives.picked(files[0], wanted)


AIRCRAFT = DataSet("FGVC-Aircraft", {"fgvc-aircraft-2013b.tar.gz": "d4acdd33327262359767eeaa97a4f732"}, pictures)

if __name__ == "__main__":
    archives.main(AIRCRAFT, __doc__)
