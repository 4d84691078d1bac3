"""Which labels are asked for: picture i gets the i-th of a list, in turn."""

import difflib
from collections.abc import Sequence

from mage_ds.errors import UserError


def parse(text: str, classes: int, names: Sequence[str] = ()) -> list[int]:
    """`3`, `0..9`, `1,4,7` or names, in any mixture with commas -> labels, in the order that they are named in.

    Args: classes: how many the model has; names: of the first of them, where they are known. A number is a label,
    also where it is the name of another one.
    Raises: UserError, one line, for what is no label of the model.
    """
    labels = []
    for part in [text] if text in names else text.split(","):
        low, dots, high = (part, "", "") if part in names else map(str.strip, part.partition(".."))
        if not low or (dots and not high):
            side = "behind" if low else "before" if high else "around"
            where = f" {side} the dots" if dots else " beside a comma" if "," in text else ""
            raise UserError(f"--class-label {text!r}: a label is missing{where}; write 3, 0..9 or 1,4,7")
        first = _label(low, classes, names)
        last = _label(high, classes, names) if dots else first
        if last < first:
            raise UserError(f"--class-label {part.strip()}: runs backwards; write {high}..{low}")
        labels += range(first, last + 1)
    return labels


def written(labels: Sequence[int]) -> str:
    """Labels as text that `parse` reads: `0..9`, `1,4,7`."""
    if len(labels) > 1 and list(labels) == [*range(labels[0], labels[0] + len(labels))]:
        return f"{labels[0]}..{labels[-1]}"
    return ",".join(map(str, labels))


def named(label: int, names: Sequence[str]) -> str:
    """The name of a label, or its number where none is known."""
    return names[label] if 0 <= label < len(names) else str(label)


def _label(word: str, classes: int, names: Sequence[str]) -> int:
    word = word.strip()
    if word.isdecimal() and len(word) < 20:
        label = int(word)
        if label >= classes:
            raise UserError(f"--class-label {word}: this model has the classes 0..{classes - 1}; choose one of them")
        return label
    if word in names:
        return list(names).index(word)
    close = difflib.get_close_matches(word, names, 1)
    hint = f"; did you mean {close[0]}?" if close else f"; numbers 0..{classes - 1} name the model's classes"
    raise UserError(f"--class-label {word!r}: no such class{hint}")
