"""Stanford Cars, 196 classes -> class folders; train/ 8,144, val/ (its test) 8,041."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import archives
from archives import DataSet, Picture


def pictures(files: list[Path]) -> tuple[int, Iterator[Picture]]:
    train, test, devkit, labelled = files
    meta, annotated = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat"
    found = archives.texts(devkit, [meta, annotated])
    classes = archives.matlab(devkit, found[meta], "class_names")
    of_train = _wanted(archives.matlab(devkit, found[annotated], "annotations"), classes, "train")
    of_test = _wanted(archives.matlab(labelled, labelled.read_bytes(), "annotations"), classes, "val")
    both = itertools.chain(archives.picked(train, of_train), archives.picked(test, of_test))
    return len(of_train) + len(of_test), both


def _wanted(annotations, classes, split: str) -> dict[str, tuple[str, str]]:
    """annotations: records with fname and class, counted from 1."""
    folder = {"train": "cars_train", "val": "cars_test"}[split]
    pairs = zip(annotations["fname"], annotations["class"], strict=True)
    return {f"{folder}/{name}": (split, str(classes[int(label) - 1])) for name, label in pairs}


CARS = DataSet(
    "Stanford Cars",
    {
        "cars_train.tgz": "065e5b463ae28d29e77c1b4b166cfe61",
        "cars_test.tgz": "4ce7ebf6a94d07f1952d94dd34c4d501",
        "car_devkit.tgz": "c3b158d763b6e2245038c8ad08e45376",
        "cars_test_annos_withlabels.mat": "b0a2b23655a3edd16d84508592a98d10",
    },
    pictures,
)

if __name__ == "__main__":
    archives.main(CARS, __doc__)
