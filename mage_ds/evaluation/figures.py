"""The figures of a set of features beside a reference's, each with an interval and the number of pictures it is of."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from mage_ds.evaluation import fid, scores, suspicions
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.evaluation.moments import Few, Gaussian, frechet, root_of
from mage_ds.evaluation.references import Statistics

Counted = Callable[[int, str, str], AbstractContextManager[Callable[[int], object] | None]]

METRICS = ("fid", "fid_infinity", "is", "kid", "prc")
_SIGMAS = 1.96  # standard errors of a 95 % interval
_JACKKNIFE = "95 %, infinitesimal jackknife over the pictures; the reference counts as given"


def figures(
    metrics: Sequence[str],
    samples: FeatureSet,
    reference: Statistics | FeatureSet,
    *,
    definition: str = "torch-fidelity",
    kid_subset: int = scores.SUBSET,
    counted: Counted = lambda *told: nullcontext(),
) -> tuple[dict[str, dict], list[str]]:
    """name -> {"value", "interval": [low, high] or None, "interval_is": what that is, "n", ...}, and remarks.

    Passes over tiles in order of index, in float64: the same whoever made them.
    Args: metrics: of METRICS, in any order; prc gives two figures, precision and recall; definition: whose IS,
    precision and recall, torch-fidelity or adm; kid_subset: pictures of KID's subsets, or all where there are fewer;
    counted: of (number of steps, their name, what is done), gives what is called with 1 after each step.
    Memory: what `fid` says, and with kid or prc both sets' features (0.4 GB for 50,000 of 2048).
    """
    found, remarks = {}, []
    if {"fid", "fid_infinity"} & {*metrics}:
        made, remarks = _frechet(metrics, samples, reference, counted)
        found |= made
    if "is" in metrics:
        found["is"] = _inception_score(samples, definition)
    if {"kid", "prc"} & {*metrics}:
        rows, others = rows_of(samples), rows_of(reference)
        about = {"n": len(rows), "reference_n": len(others)}
        if "kid" in metrics:
            size, said = suspicions.subset(kid_subset, *about.values())
            remarks += said
            found["kid"] = _kid(rows, others, size, counted) | about
        if "prc" in metrics:
            with counted(scores.steps(len(rows), len(others)), "block", "precision and recall of") as advance:
                pair = scores.precision_recall(rows, others, definition=definition, advance=advance)
            about |= {"interval": None, "k": scores.K, "definition": definition}
            found |= {name: {"value": each, **about} for name, each in zip(("precision", "recall"), pair, strict=True)}
    return found, remarks


def _frechet(metrics, samples: FeatureSet, reference, counted: Counted) -> tuple[dict, list[str]]:
    width, n = samples.settings["width"], samples.n
    made, real = fid.collected(_chunks(samples), width), gaussian_of(reference, width)
    root = None if isinstance(real, Few) else root_of(real)
    value, infinite = frechet(made, real, root), None
    error = fid.standard_error(fid.influence(_chunks(samples), made, real, root))
    found = {}
    if "fid" in metrics:
        found["fid"] = {"value": value, **_interval(value, error), "interval_is": _JACKKNIFE, "n": n}
    if "fid_infinity" in metrics:
        with counted(fid.SIZES, "FID", "FID-infinity of") as advance:
            infinite = fid.infinity(_chunks(samples), n, real, error, root=root, advance=advance)
        more = {"slope": infinite.slope, "sizes": infinite.sizes, "fids": infinite.fids}
        found["fid_infinity"] = {
            "value": infinite.value,
            **_interval(infinite.value, infinite.error),
            "interval_is": _JACKKNIFE,
            "n": n,
            **more,
        }
    return found, fid.remarks(n, width, value, infinite)


def gaussian_of(reference: Statistics | FeatureSet, width: int) -> Gaussian | Few:
    """width: of its features, D."""
    if isinstance(reference, FeatureSet):
        return fid.collected(_chunks(reference), width)
    return Gaussian(torch.from_numpy(reference.mean), torch.from_numpy(reference.covariance))


def _inception_score(samples: FeatureSet, definition: str) -> dict:
    value, std = scores.inception_score((logits for (logits,) in samples.chunks("logits")), samples.n, definition)
    what = f"{scores.SPLITS} splits" if definition != "adm" else f"splits of {scores.ADM_SPLIT:,} pictures"
    interval = [value - std, value + std]
    about = {"interval": interval, "interval_is": f"one standard deviation of the {what}", "definition": definition}
    return {"value": value, **about, "std": std, "n": samples.n}


def _kid(rows: np.ndarray, others: np.ndarray, size: int, counted: Counted) -> dict:
    with counted(scores.SUBSETS, "subset", "KID of") as advance:
        found = scores.kid(rows, others, size=size, advance=advance)
    about = {"interval_is": f"95 %, of {found.blocks} disjoint blocks", "std": found.std}
    return {"value": found.mean, **_interval(found.mean, found.error), **about, "subset": size}


def _interval(value: float, error: float) -> dict:
    half = _SIGMAS * error
    return {"interval": [value - half, value + half] if math.isfinite(half) else None, "error": error}


def _chunks(features: FeatureSet):
    return (rows for (rows,) in features.chunks("features"))


def rows_of(features: Statistics | FeatureSet) -> np.ndarray:
    """float32 (n, D)."""
    return np.concatenate([*_chunks(features)]) if isinstance(features, FeatureSet) else features.features
