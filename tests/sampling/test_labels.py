"""Which labels pictures are asked for, in words."""

import pytest

from mage_ds.errors import UserError
from mage_ds.sampling import labels

NAMES = ["cat", "dog", "snow, leopard"]


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("3", [3]),
        ("0..9", [*range(10)]),
        ("1,4,7", [1, 4, 7]),
        ("7,1", [7, 1]),
        ("2..4, 0", [2, 3, 4, 0]),
        ("dog", [1]),
        ("dog,5,cat", [1, 5, 0]),
        ("cat..3", [0, 1, 2, 3]),
        ("snow, leopard", [2]),
        ("4..4", [4]),
    ],
)
def test_labels_in_words(text, asked):
    assert labels.parse(text, 10, NAMES) == asked
    assert labels.parse(labels.written(asked), 10) == asked


def test_written_is_short():
    assert labels.written([*range(1000)]) == "0..999"
    assert labels.written([3]) == "3" and labels.written([3, 2]) == "3,2"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10", ["--class-label 10", "0..9"]),
        ("0..10", ["10", "0..9"]),
        ("dgo", ["dgo", "did you mean dog"]),
        ("-1", ["'-1'", "0..9"]),
        ("", ["''"]),
        ("1,,2", ["'1,,2': a label is missing beside a comma"]),
        ("5..2", ["--class-label 5..2: runs backwards; write 2..5"]),
        ("1, 9 .. 3", ["--class-label 9 .. 3: runs backwards; write 3..9"]),
        ("3,", ["--class-label '3,': a label is missing beside a comma; write 3, 0..9 or"]),
        ("3..", ["--class-label '3..': a label is missing behind the dots;"]),
        ("1,..3", ["--class-label '1,..3': a label is missing before the dots;"]),
        ("..", ["--class-label '..': a label is missing around the dots;"]),
    ],
)
def test_what_is_no_label_is_one_line(text, parts):
    with pytest.raises(UserError) as caught:
        labels.parse(text, 10, NAMES)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_names():
    assert [labels.named(k, NAMES) for k in (0, 1, 7, -1)] == ["cat", "dog", "7", "-1"]
