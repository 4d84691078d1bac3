"""CIFAR-100: the "binary version" -> PNG in folders of its 100 fine classes; train/ 50,000, val/ (its test) 10,000."""

from collections.abc import Iterator
from pathlib import Path

import archives
import cifar10
from archives import DataSet, Picture

_BATCHES = {"train.bin": "train", "test.bin": "val"}


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    return cifar10.records(files[0], "cifar-100-binary", "fine_label_names.txt", _BATCHES, head=2)


CIFAR100 = DataSet("CIFAR-100", {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}, pictures)

if __name__ == "__main__":
    archives.main(CIFAR100, __doc__)
