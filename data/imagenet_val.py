"""ImageNet's 50,000 validation pictures -> class folders named as those of train/: --out IMAGENET/val"""

from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture

from mage_ds.errors import UserError

_FOLDER = "ILSVRC2012_devkit_t12/data/"
_META, _TRUTH = _FOLDER + "meta.mat", _FOLDER + "ILSVRC2012_validation_ground_truth.txt"


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    images, devkit = files
    found = archives.texts(devkit, [_META, _TRUTH])
    synsets = archives.matlab(devkit, found[_META], "synsets")
    folders = dict(zip(map(int, synsets["ILSVRC2012_ID"]), synsets["WNID"], strict=True))
    wanted = {}
    for number, line in enumerate(archives.lines(found[_TRUTH]), 1):
        if not line.isdigit() or int(line) not in folders:
            raise UserError(f"{devkit}: {_TRUTH} has {line[:20]!r} in line {number}, which is no class of meta.mat")
        wanted[f"ILSVRC2012_val_{number:08d}.JPEG"] = ("", str(folders[int(line)]))
    return len(wanted), archives.picked(images, wanted)


IMAGENET_VAL = DataSet(
    "ImageNet's validation pictures",
    {
        "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
        "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    },
    pictures,
)

if __name__ == "__main__":
    archives.main(IMAGENET_VAL, __doc__)
