"""Figures of a classifier beside scikit-learn's."""

import csv
import io

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, top_k_accuracy_score

from mage_ds.evaluation import classified
from mage_ds.evaluation.classified import Answers

CLASSES = 9


@pytest.fixture(scope="module")
def said():
    """(scores, answers): of 300 pictures; class 4 has none."""
    rng = np.random.default_rng(0)
    label = rng.choice([c for c in range(CLASSES) if c != 4], 300)
    scores = rng.normal(size=(300, CLASSES)) + 1.5 * np.eye(CLASSES)[label]
    top = np.argsort(-scores, axis=1)[:, :5]
    return scores, Answers(label, top, np.linspace(0, 1, 300, dtype=np.float32))


def test_figures_are_scikit_learns(said):
    scores, answers = said
    figures, every = answers.figures(), np.arange(CLASSES)
    assert figures["top1"] == pytest.approx(accuracy_score(answers.label, scores.argmax(1)))
    assert figures["top5"] == pytest.approx(top_k_accuracy_score(answers.label, scores, k=5, labels=every))
    matrix = answers.confusion(CLASSES)
    assert np.array_equal(matrix, confusion_matrix(answers.label, scores.argmax(1), labels=every))
    shares = classified.of_classes(matrix)
    assert np.isnan(shares[4])
    present = [c for c in every if c != 4]
    assert shares[present] == pytest.approx(recall_score(answers.label, scores.argmax(1), labels=present, average=None))
    worst = classified.worst(matrix)
    assert sorted(worst) == present and np.all(np.diff(shares[worst]) >= 0)


def test_fewer_classes_than_five_have_no_top5():
    answers = Answers(np.array([0, 1]), np.array([[0, 1], [0, 1]]), np.ones(2, np.float32))
    assert answers.figures() == {"top1": 0.5}


def test_mistakes():
    matrix = np.array([[5, 2, 0], [7, 1, 1], [0, 0, 3]])
    assert classified.mistakes(matrix, 2) == [(1, 0, 7), (0, 1, 2)]
    assert classified.mistakes(matrix, 50) == [(1, 0, 7), (0, 1, 2), (1, 2, 1)]


def test_the_table_of_predictions():
    answers = Answers(np.array([0, 2]), np.array([[0, 1], [1, 2]]), np.array([0.25, 0.5], np.float32))
    readable = np.array([True, False, True])
    text = classified.table(['a,"1".png', "b.png", "c.png"], answers, readable, ["x", "y|", "z"])
    assert list(csv.reader(io.StringIO(text))) == [
        ["name", "label", "predicted", "top5", "score"],
        ['a,"1".png', "x", "x", "x|y|", "0.250000"],
        ["b.png", "", "", "", ""],
        ["c.png", "z", "y|", "y||z", "0.500000"],
    ]


def test_raw_pixels_is_scikit_learns_logistic_regression():
    rng = np.random.default_rng(1)
    labels = np.arange(90) % 3
    shown = rng.integers(0, 200, (90, 4, 4, 3))
    shown[:, 0] = shown[:, 0] // 4 + 80 * labels[:, None, None]
    shown = shown.astype(np.uint8)
    x = shown.reshape(90, -1) / 255
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(x[:60], labels[:60]).predict(x[60:])
    mine = classified.raw_pixels(shown[:60], labels[:60], shown[60:], 3)
    assert np.array_equal(mine, theirs)
    assert (mine == labels[60:]).mean() > 0.8
