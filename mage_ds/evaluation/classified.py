"""How good a classifier is: top-1, top-5, each class, and what is taken for what; and raw pixels as a baseline."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mage_ds.evaluation import few_shot

TOP = 5
RAW_MOST = 10_000_000  # values of all training pictures: more take longer than a baseline may
_PENALTY = 1.0  # scikit-learn's C of the baseline


@dataclass
class Answers:
    """Of n pictures: label int64 (n,); top int64 (n, k), the likeliest classes, the first one first; score float32
    (n,), the probability of the first."""

    label: np.ndarray
    top: np.ndarray
    score: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """bool (n,)."""
        return self.top[:, 0] == self.label

    def figures(self) -> dict[str, float]:
        """top1 and top5, shares of the pictures; top5 where there are more classes than that."""
        found = {"top1": float(self.right.mean())}
        if self.top.shape[1] == TOP:
            found["top5"] = float((self.top == self.label[:, None]).any(axis=1).mean())
        return found

    def confusion(self, classes: int) -> np.ndarray:
        """int64 (classes, classes): pictures of each class (row) by what they are taken for (column)."""
        flat = np.bincount(self.label * classes + self.top[:, 0], minlength=classes * classes)
        return flat.reshape(classes, classes)


def of_classes(confusion: np.ndarray) -> np.ndarray:
    """Share of each class's pictures that are named right, float64 (classes,); NaN of a class without pictures."""
    counts = confusion.sum(axis=1)
    return np.divide(confusion.diagonal(), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def worst(confusion: np.ndarray) -> np.ndarray:
    """The classes that have pictures, that with the smallest share of right answers first."""
    shares = of_classes(confusion)
    return np.argsort(shares, kind="stable")[: int(np.isfinite(shares).sum())]


def mistakes(confusion: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """(class, taken for, pictures) of the most frequent mistakes."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(int(a), int(b), int(wrong[a, b])) for a, b in pairs if wrong[a, b]]


def table(names: Sequence[str], answers: Answers | None, readable: np.ndarray, classes: Sequence[str]) -> str:
    """predictions.csv: a line for each picture `names`, in order. answers: of the readable ones, bool (n,); the others
    have a name only. top5: the likeliest classes with | between."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("name", "label", "predicted", "top5", "score"))
    at = np.cumsum(readable) - 1
    for name, there, row in zip(names, readable, at, strict=True):
        if not there:
            lines.writerow((name, "", "", "", ""))
            continue
        top = [classes[each] for each in answers.top[row]]
        lines.writerow((name, classes[answers.label[row]], top[0], "|".join(top), f"{answers.score[row]:.6f}"))
    return text.getvalue()


def raw_pixels(shown: np.ndarray, labels: np.ndarray, pictures: np.ndarray, classes: int) -> np.ndarray:
    """What logistic regression on raw pixels (C = 1, pixels in [0, 1]) takes pictures for: the least that a classifier
    should beat.

    Args: shown: training pictures uint8 (n, H, W, 3) with labels int64 (n,); pictures: uint8 (m, H, W, 3).
    Returns: int64 (m,).
    """
    x, seen = (torch.from_numpy(each.reshape(len(each), -1)).double() / 255 for each in (shown, pictures))
    weight, bias = few_shot.fit(x, torch.from_numpy(labels), classes, _PENALTY)
    return (seen @ weight + bias).argmax(1).numpy()
