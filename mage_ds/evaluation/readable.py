"""Readable: can a classifier of small grey pictures tell what a picture shows? For data sets such as digits.

The judge is scikit-learn's support vector machine (rbf kernel) with probabilities: each pair of classes gets a sigmoid
over its margin, and the pairs' answers are coupled. That coupling matters: a calibration of each class against the
rest (scikit-learn's successor of `probability=True`) is sure of most pictures of plain noise, this one of none.
"""

import warnings
from dataclasses import dataclass

import numpy as np

from mage_ds.errors import UserError

MOST = 20_000  # labelled pictures: the judge's fitting time grows with their square
THRESHOLD = 0.8  # a picture is readable where the judge is surer than this
PENALTY = 10  # the support vector machine's C
SIDE = 8  # pixels: what the judge sees of a picture
_LUMA = np.array([0.299, 0.587, 0.114])  # grey as television has it (ITU-R 601)


@dataclass
class Judgement:
    """What the judge says of n pictures: confidence float64 (n,), its own in its answer; label int64 (n,)."""

    confidence: np.ndarray
    label: np.ndarray

    @property
    def readable(self) -> np.ndarray:
        """bool (n,)."""
        return self.confidence > THRESHOLD

    def chosen(self, which: np.ndarray) -> "Judgement":
        """Of some of the pictures: bool (n,)."""
        return Judgement(self.confidence[which], self.label[which])

    def summary(self, classes: int, labels: np.ndarray | None = None) -> dict:
        """Shares of all pictures: readable, each class by the judge's answer, and right where labels are known."""
        share = np.bincount(self.label, minlength=classes) / len(self.label)
        right = {} if labels is None else {"right": float((self.label == labels).mean())}
        return {
            "pictures": len(self.label),
            "readable": float(self.readable.mean()),
            **right,
            "classes": share.tolist(),
        }


def refuse_unfit(labels: np.ndarray, classes: list[str], reference) -> None:
    """UserError where labels int (n,), -1 = none, of these classes are not what the judge can be fitted on."""
    if len(classes) < 2 or (labels < 0).any():
        raise UserError(
            f"--reference {reference}: has no labels; `readable` needs pictures in two class folders or more"
        )
    few = np.flatnonzero(np.bincount(labels, minlength=len(classes)) < 2)
    if len(few):
        raise UserError(f"--reference {reference}: class {classes[few[0]]} has fewer than 2 training pictures")
    if len(labels) > MOST:
        raise UserError(
            f"--reference {reference}: {len(labels):,} training pictures; `readable` is for {MOST:,} at most"
        )


def wanted(names: list[str], classes: list[str], count: int) -> np.ndarray:
    """int64 (count,): the labels of pictures that were asked for by the names of classes, in turn; -1: none of these.

    A model whose classes have names may know them in another order than a reference does.
    """
    return np.resize([classes.index(name) if name in classes else -1 for name in names], count)


def fit(pictures, labels):
    """The judge, fitted on labelled pictures: uint8 (H, W, 3) each, of any sizes; labels int (n,)."""
    from sklearn.svm import SVC

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scikit-learn < 1.11 has it; see above why it is kept
        return SVC(C=PENALTY, kernel="rbf", gamma="scale", probability=True, random_state=0).fit(seen(pictures), labels)


def readable(classifier, pictures) -> Judgement:
    """The judge's answers on pictures, uint8 (H, W, 3) each."""
    chances = classifier.predict_proba(seen(pictures))
    return Judgement(chances.max(axis=1), classifier.classes_[chances.argmax(axis=1)])


def seen(pictures) -> np.ndarray:
    """What the judge sees: float64 (n, 64) in [0, 1], grey, averaged over the area of each of 8 x 8 pixels."""
    return np.stack([_shrink(np.asarray(picture)) for picture in pictures])


def _shrink(picture: np.ndarray) -> np.ndarray:
    grey = picture @ _LUMA / 255
    down, across = (_areas(size) for size in grey.shape)
    return (down @ grey @ across.T).ravel()


def _areas(size: int) -> np.ndarray:
    """(8, size): the share of each pixel in each of 8 equal stretches; the rows sum to 1."""
    edges = np.linspace(0, size, SIDE + 1)
    low, high = edges[:-1, None], edges[1:, None]
    start = np.arange(size)[None]
    return np.clip(np.minimum(high, start + 1) - np.maximum(low, start), 0, None) / (size / SIDE)


def share_copied(tokens: np.ndarray, known: np.ndarray) -> float:
    """Share of token grids (n, N) that equal one of `known` (m, N)."""
    seen_before = {row.tobytes() for row in np.ascontiguousarray(known, dtype=np.int64)}
    return float(np.mean([row.tobytes() in seen_before for row in np.ascontiguousarray(tokens, dtype=np.int64)]))
