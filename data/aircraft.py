"""FGVC-Aircraft, its 100 variants -> class folders; train/ (its trainval) 6,667, val/ (its test) 3,333.

The pictures keep the line of 20 pixels at their lower edge that names the photographer.
"""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

_FOLDER = "fgvc-aircraft-2013b/data"
_LISTS = {f"{_FOLDER}/images_variant_{name}.txt": split for name, split in (("trainval", "train"), ("test", "val"))}


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    wanted = archives.by_lists(files[0], _LISTS, _place)
    return len(wanted), archives.picked(files[0], wanted)


def _place(line: str) -> tuple[str, str]:
    """1025794 707-320: picture, variant"""
    picture, _, variant = line.partition(" ")
    return f"{_FOLDER}/images/{picture}.jpg", variant


AIRCRAFT = DataSet("FGVC-Aircraft", {"fgvc-aircraft-2013b.tar.gz": "d4acdd33327262359767eeaa97a4f732"}, pictures)

if __name__ == "__main__":
    archives.main(AIRCRAFT, __doc__)
