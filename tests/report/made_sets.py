"""For tests: small sets of generated pictures, whose pixels are a function of their index."""

import numpy as np

from mage_ds.report import joined, pictures

SETTINGS = {"run": "/a", "weights": "abc", "seed": 5, "batch": 4, "versions": {"torch": "1"}, "format": "png"}


def picture(i, size=8):
    """Pixels that are a function of the index."""
    return np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)


def made(tile, size=8):
    """Tokens and pictures of a tile."""
    return np.stack([np.full(6, 300 + i) for i in tile]), np.stack([picture(i, size) for i in tile])


def fill(book, num, which):
    for tile in which:
        book.write(tile, num, *made(tile))


def settings(form):
    return SETTINGS | {"format": form}


def end(book, num):
    for at in book.due(num):
        joined.join(book, at, num)
    joined.finish(book, num, "abc"[: len(book.labels or [])])
    book.seal(num)


def whole(out, num, form="png", labels=None):
    book = pictures.Pictures(out, form, 4, 5, labels)
    assert pictures.open_folder(book, settings(form), num, 64) == num
    fill(book, num, [np.arange(start, start + 4) for start in book.missing(num)])
    end(book, num)
    return book
