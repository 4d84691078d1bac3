"""What is wrong about pictures that are to be compared, or is not as it seems: one line each.

Every function returns remarks, which stand below the figures and in results.json, or raises UserError where the figure
would mean nothing. They know facts only, and read no files.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mage_ds.errors import UserError

_UNEVEN = 1.5  # pictures of the most frequent class / of the rarest one, from which on it is said
_INCEPTION = 2048  # width of the features behind statistics that say nothing about their extractor
_LEAST = {"any": 2, "prc": 4, "is": 10, "fid_infinity": 20}  # pictures that a figure needs
_FIGURES = {"any": "a figure", "prc": "precision", "is": "IS in 10 splits", "fid_infinity": "FID-infinity"}
_LOSSY = (".jpg", ".jpeg", ".webp")

# --- of pictures -----------------------------------------------------------------------------------------------------


def sizes(what: str, found: Mapping[tuple[int, int], int], side: int) -> list[str]:
    """found: (height, width) in the files -> pictures of it, before they were resized to `side` pixels."""
    small = sum(count for shape, count in found.items() if min(shape) < side)
    remarks = [f"{what}: {small:,} pictures were enlarged to {side} px, which blurs them; use smaller samples"] * (
        small > 0
    )
    if len(found) < 2:
        return remarks
    most = sorted(found.items(), key=lambda item: -item[1])[:3]
    listed = ", ".join(f"{count:,} of {high}x{wide}" for (high, wide), count in most)
    listed += ", ..." if len(found) > 3 else ""
    return [*remarks, f"{what}: pictures of unlike sizes ({listed}), each resized to {side} px and cropped"]


def compressed(what: str, formats: Mapping[str, int]) -> list[str]:
    """formats: of the files of generated pictures: {".jpg": how many}."""
    lossy = sum(count for ending, count in formats.items() if ending.lower() in _LOSSY)
    if not lossy:
        return []
    return [
        f"{what}: {lossy / sum(formats.values()):.0%} of the pictures are compressed with loss (JPEG, WebP): its "
        "blocks and blur are measured as the model's, which moves FID by whole points; keep samples as PNG or npz"
    ]


def duplicates(what: str, sums: np.ndarray) -> list[str]:
    """sums: uint8 (n, 32), checksums of the pixels."""
    n = len(sums)
    again = n - len(np.unique(sums, axis=0)) if n else 0
    if not again:
        return []
    return [f"{what}: {again:,} of {n:,} pictures ({again / n:.1%}) are equal to an earlier one, pixel by pixel"]


def copies(what: str, sums: np.ndarray, real: np.ndarray) -> list[str]:
    """sums, real: uint8 (n, 32), checksums of the pixels of samples and of the reference."""
    known = {each.tobytes() for each in real}
    number = sum(each.tobytes() in known for each in sums)
    if not number:
        return []
    return [f"{what}: {number:,} of {len(sums):,} pictures ({number / len(sums):.1%}) are pictures of the reference"]


def balance(what: str, labels: np.ndarray, classes: int | None = None) -> list[str]:
    """labels: int (n,), -1: none; classes: how many there are, where that is known (one without pictures counts)."""
    known = np.asarray(labels)[np.asarray(labels) >= 0]
    if not len(known):
        return []
    counts = np.bincount(known, minlength=classes or 0)
    counts = counts if classes else counts[counts > 0]
    low, high = int(counts.min()), int(counts.max())
    if low and high / low < _UNEVEN:
        return []
    ratio = f"{high / low:.1f} times as many" if low else "and some have none"
    return [
        f"{what}: classes are uneven, {high:,} pictures of the most frequent one and {low:,} of the rarest ({ratio}): "
        "figures follow the frequent ones"
    ]


def number(what: str, n: int, asked: int | None, metrics: Sequence[str]) -> list[str]:
    """n: pictures that are there; asked: that were to be there, None: as many as there are."""
    for name, least in _LEAST.items():
        if n < least and (name in metrics or name == "any"):
            raise UserError(
                f"{what}: too few pictures ({n}), {_FIGURES[name]} needs {least} at least, and 50,000 are usual; raise "
                "their number"
            )
    return [f"{what}: {n:,} pictures, {asked:,} were asked for"] if asked is not None and n < asked else []


# --- of two sets -----------------------------------------------------------------------------------------------------


def same(source: Mapping, reference: Mapping) -> None:
    """Facts of both, "source", "fingerprint" and "files". UserError where they are the same pictures."""
    alike = [source.get(name) == reference.get(name) for name in ("fingerprint", "files")]
    if source.get("fingerprint") is not None and all(alike):
        raise UserError(
            f"--reference {reference.get('source')}: holds the pictures of SOURCE themselves (same fingerprint), of "
            "which every distance is 0; name real ones"
        )


def resolution(size: int | None, reference: int | None, origin: str) -> list[str]:
    """size, reference: pixels a side, None: not known; statistics cannot be resized any more."""
    if reference is None:
        return [f"{origin}: does not say which pictures its statistics are of; they should be of {size} px"]
    if size is None or size == reference:
        return []
    return [
        f"{origin}: its statistics are of pictures of {reference} px, these have {size}: what differs is sharpness "
        f"first; make others with --make-reference DATA --size {size}"
    ]


def extractors(mine: Mapping, theirs: Mapping | None, width: int, origin: str) -> list[str]:
    """mine, theirs: {"extractor": name, "weights": hash}, None: statistics that do not say; width: of theirs.

    UserError where features of one are compared with those of another.
    """
    if theirs is None:
        if mine["extractor"] != "inception" or width != _INCEPTION:
            raise UserError(
                f"--reference {origin}: statistics of width {width} that name no extractor are Inception's, of width "
                f"{_INCEPTION}, and {mine['extractor']} is asked for; make others with --make-reference"
            )
        return [f"{origin}: does not name its extractor; taken to be Inception's of torch-fidelity"]
    for key in ("extractor", "weights"):
        if mine[key] != theirs.get(key):
            then, now = (str(value)[:24] for value in (theirs.get(key), mine[key]))
            raise UserError(
                f"--reference {origin}: statistics of another extractor ({key} {then} there, {now} here), which are "
                "never compared; make others with --make-reference"
            )
    return []


# --- of what is asked for --------------------------------------------------------------------------------------------


def needs(metrics: Sequence[str], logits: int | None, extractor: str, features: bool, origin: str) -> None:
    """UserError for a metric that lacks what it is made of.

    Args: logits: of the extractor, how many; features: whether those of the reference are there, not only their mean.
    """
    if "is" in metrics and not logits:
        raise UserError(
            f"--metrics is: is made of Inception's class scores, and {extractor} has none; give --inception FILE, or "
            f"leave it out: --metrics {','.join(name for name in metrics if name != 'is') or 'fid'}"
        )
    lacking = [name for name in metrics if name in ("kid", "prc")]
    if lacking and not features:
        rest = ",".join(name for name in metrics if name not in lacking) or "fid"
        raise UserError(
            f"--metrics {','.join(lacking)}: compares single pictures, and {origin} holds only their mean and "
            f"covariance; give the pictures as --reference, make statistics with --make-reference, or --metrics {rest}"
        )


def subset(size: int, *numbers: int) -> tuple[int, list[str]]:
    """KID's subsets: their size, not larger than any of these numbers of pictures, and what is to be said of it."""
    least = min(numbers)
    if size <= least:
        return size, []
    return least, [f"KID: subsets of {least:,} pictures instead of {size:,}, there are not more"]
