"""The picture of a confusion matrix: of a few classes all of them, of many the worst and what they are taken for."""

import numpy as np
from PIL import Image

from mage_ds.report import confusion


def test_of_a_few_classes_all_are_shown(tmp_path):
    matrix = np.array([[5, 2, 0], [7, 1, 1], [0, 0, 0]])
    assert confusion.shown(matrix, np.array([1, 0])).tolist() == [0, 1, 2]
    confusion.save(tmp_path / "c.png", matrix, ["a", "b" * 60, "$x_1$"], np.array([1, 0]), "title")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > 800 and len(set(picture.convert("L").tobytes())) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


def test_of_many_classes_the_worst_are_shown_with_what_they_are_taken_for(tmp_path):
    many = 200
    matrix = 10 * np.eye(many, dtype=np.int64)
    matrix[150, 150], matrix[150, 7] = 1, 9
    matrix[90, 90], matrix[90, 150] = 4, 6
    worst = np.array([150, 90, *(i for i in range(many) if i not in (90, 150))])
    chosen = confusion.shown(matrix, worst)
    assert len(chosen) <= 30 and {7, 90, 150} <= {*chosen.tolist()} and np.all(np.diff(chosen) > 0)
    confusion.save(tmp_path / "c.png", matrix, [f"class {i}" for i in range(many)], worst, "title")
    with Image.open(tmp_path / "c.png") as picture:
        assert max(picture.size) < 3000
