"""Which of two sets of pictures is better, picture i of both made from the same noise, looked at while they grow.

What the same noise does to both FIDs cancels in their difference: its standard error comes from the differences of the
pictures' influences (see `fid.influence`), and is a fraction of either FID's own.

Whoever looks often, and stops when he likes what he sees, is deceived often. So of the 5 % of false alarms that a
comparison may raise, look k may raise 5 % / (k (k + 1)): over endlessly many looks that adds up to 5 %, whatever one
look says of the next (a union bound), so a comparison may also be continued with more pictures than were planned. Even
shares for a planned number of looks would gain a little at the last ones and lose that; the looks are few, because each
is of twice as many pictures as the one before.

FID is biased upwards by about c / n. c is nearly the same for two that are alike, and then leaves the difference alone;
but pictures that vary less have a smaller one, and would win at small n by it. It is measured: the mean FID of the two
halves lies c / n above that of all, and to first order without noise, because both weigh each picture alike. The
interval holds the difference with and without it, so nobody wins by what would vanish with more pictures. KID has no
such bias. Assumed is that n is large enough for a normal mean, that c / n is the whole bias (it is not yet for fewer
pictures than features), and that neither FID is 0. The reference counts as given.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

from mage_ds.evaluation import fid
from mage_ds.evaluation.moments import Collected, Few, Gaussian, frechet, root_of
from mage_ds.evaluation.scores import kernel

METRICS = ("fid", "kid")
ALPHA = 0.05  # of the comparisons of two that are equally good, those that say otherwise
FIRST = 500  # pictures of the first look
_POWER = 0.8  # how often a difference that "would have been seen" is seen
_ROWS = 1024  # of a block of kernel values


class Figure(NamedTuple):
    """value: of n pictures; influence: float64 (n,), n times what each adds to it, mean 0; few: how much of it is due
    to their number being small."""

    value: float
    influence: np.ndarray
    few: float


def fid_of(
    chunks: Callable[[], Iterable[np.ndarray]], n: int, reference: Gaussian | Few, root: torch.Tensor | None = None
) -> Figure:
    """chunks(): float (B, D) each, pictures 0 to n - 1 in order, n > 3; it is called twice; root:
    `moments.root_of(reference)`, if known.

    Memory: a chunk and 90 D^2 bytes (380 MB at D = 2048).
    """
    root, width = root_of(reference) if root is None else root, len(reference.mean)
    halves, at = (Collected(width), Collected(width)), 0
    for rows in chunks():
        cut = min(max(n // 2 - at, 0), len(rows))
        for half, part in zip(halves, (rows[:cut], rows[cut:]), strict=True):
            if len(part):
                half.add(torch.from_numpy(np.asarray(part)))
        at += len(rows)
    if at != n:
        raise ValueError(f"{at} pictures, not {n}")
    whole = Collected(width)
    for half in halves:
        whole.merge(half)
    sample = whole.gaussian()
    value, *parts = (frechet(each, reference, root) for each in (sample, *(half.gaussian() for half in halves)))
    return Figure(value, fid.influence(chunks(), sample, reference, root), sum(parts) / 2 - value)


def kid_of(rows: np.ndarray, reference: np.ndarray, within: float) -> Figure:
    """KID of all pictures at once: unbiased, kernel (x y / D + 1)^3, the value that torch-fidelity's random subsets
    scatter around. rows (n, D), reference (m, D); within: `kernel_within(reference)`.

    Memory: blocks of kernel values, 8 MB each, and of rows. Time: n (n + m) products of D numbers.
    """
    n = len(rows)
    mine = (_sums(rows, rows) - _kernel_itself(rows)) / (n - 1)
    theirs = _sums(rows, reference) / len(reference)
    each = 2 * (mine - theirs)
    return Figure(float(mine.mean() + within - 2 * theirs.mean()), each - each.mean(), 0.0)


def kernel_within(rows: np.ndarray) -> float:
    """Mean of KID's kernel over all pairs of different rows (m, D)."""
    return float((_sums(rows, rows) - _kernel_itself(rows)).sum() / (len(rows) * (len(rows) - 1)))


def _sums(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 (n,): of each row the kernel's values, added up over the others."""
    found = np.zeros(len(rows))
    for i in range(0, len(rows), _ROWS):
        mine = np.asarray(rows[i : i + _ROWS], dtype=np.float64)
        for j in range(0, len(others), _ROWS):
            theirs = np.asarray(others[j : j + _ROWS], dtype=np.float64)
            found[i : i + _ROWS] += kernel(mine, theirs).sum(axis=1)
    return found


def _kernel_itself(rows: np.ndarray) -> np.ndarray:
    blocks = (np.asarray(rows[i : i + _ROWS], dtype=np.float64) for i in range(0, len(rows), _ROWS))
    return np.concatenate([(np.square(block).sum(axis=1) / rows.shape[1] + 1) ** 3 for block in blocks])


# --- looks


def following(made: Sequence[int], most: int, batch: int = 1) -> int | None:
    """Pictures of the next look: 500, then twice as many as before, whole tiles of `batch`, `most` at the end; None:
    all have been looked at. made: pictures of the looks so far."""
    if made and made[-1] >= most:
        return None
    wanted = max(FIRST, 2 * made[-1]) if made else FIRST
    return min(most, -(-wanted // batch) * batch)


def sigmas(look: int) -> float:
    """Standard errors to both sides of the difference that the interval of the look-th look (from 1) covers."""
    return NormalDist().inv_cdf(1 - ALPHA / (look * (look + 1)) / 2)


def compared(a: Figure, b: Figure, look: int) -> dict:
    """JSON values: "a", "b" (the figures), "a_error", "b_error" (their standard errors), "difference" (b - a), "error"
    (its own, paired), "few" (what of it is due to few pictures), "interval" (95 %, at whichever look one stops)."""
    difference, few = b.value - a.value, b.few - a.few
    error = fid.standard_error(b.influence - a.influence)
    reach = sigmas(look) * error
    return {
        "a": a.value,
        "b": b.value,
        "a_error": fid.standard_error(a.influence),
        "b_error": fid.standard_error(b.influence),
        "difference": difference,
        "error": error,
        "few": few,
        "interval": [min(difference, difference - few) - reach, max(difference, difference - few) + reach],
    }


def better(found: dict) -> str | None:
    """Which one is, "a" or "b", by `compared`; None: the interval holds 0. Less is better."""
    low, high = found["interval"]
    return "b" if high < 0 else "a" if low > 0 else None


def over(found: dict) -> str | None:
    """Why more pictures are not needed, by `compared`: "difference", or "equal": no picture differs; None: they are."""
    return "difference" if better(found) else "equal" if found["difference"] == found["error"] == 0 else None


def verdict(metric: str, found: dict, look: int, n: int, names: Sequence[str]) -> dict:
    """What `compared` says at the last look, of n pictures of each. names: of a and b.

    JSON values: "over" (as `over`; None: the pictures were all that there should be), "better" ("a", "b", None),
    "visible" (the difference that this look would have told from none in four of five comparisons), "text" (a line).
    """
    said, which = metric.upper(), better(found)
    visible = (sigmas(look) + NormalDist().inv_cdf(_POWER)) * found["error"] + abs(found["few"])
    after = f"after {n:,} pictures of each, {look} look{'s' if look > 1 else ''}"
    if which:
        best, other = names if which == "a" else reversed(names)
        low, high = sorted(map(abs, found["interval"]))
        values = f"{found[which]:.5g} against {found['b' if which == 'a' else 'a']:.5g}"
        text = f"{best} is better than {other} {after}: {said} {values}, lower by {low:.3g} to {high:.3g}"
    elif over(found):
        text = f"{names[0]} and {names[1]} draw the same pictures: not one of {n:,} differs"
    else:
        seen = f"a difference in {said} of {visible:.3g} would have been seen in 4 of 5 comparisons"
        text = f"{names[0]} and {names[1]} cannot be told apart {after}: {seen}"
    return {"metric": metric, "n": n, "over": over(found), "better": which, "visible": visible, "text": text}
