"""`mage-ds bench metrics`: figures of `evaluate` beside torch-fidelity's on the same features, and the time of both."""

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from mage_ds.engine import extractors, process, sources
from mage_ds.errors import UserError
from mage_ds.evaluation import features, fid, scores
from mage_ds.evaluation.moments import frechet

_SIZES = (1001, 2049, 5003)  # features of each set: fewer than dimensions, about as many, more
_REFERENCE = 3001
_SUBSETS = 20  # of KID; torch-fidelity takes 100
_SIDE, _BATCH = 256, 32  # of made pictures; pictures of one call
_ROUNDS = 3


def metrics(
    *,
    pictures: str | None = None,
    inception: str | None = None,
    images: int = 64,
    sizes: tuple[int, ...] = _SIZES,
    reference: int = _REFERENCE,
    width: int = features.WIDTH,
) -> None:
    """Prints two Markdown tables and a line: five figures of each set of made features, ours and torch-fidelity's; the
    seconds of FID's trace term; images/s of Inception.

    Args: pictures: what `evaluate` reads; without it made ones of 256 px; inception: its weights; without them random
    ones in their layout; images: pictures of each round; sizes, reference, width: of the made features.
    """
    process.start()
    others = _made(reference, width, 0)
    times = []
    process.say(
        f"float32 features of {width} dimensions beside a reference of {reference:,}; KID of {_SUBSETS} subsets\n\n"
        "| n | figure | ours | torch-fidelity | difference |\n|---:|---|---:|---:|---:|"
    )
    for n in sizes:
        rows, seconds = _compared(_made(n, width, n), others)
        times.append(seconds)
        for name, ours, theirs, difference in rows:
            process.say(f"| {n:,} | {name} | {ours:.8g} | {theirs:.8g} | {difference} |")
    process.say("\n| n | FID, ours s | torch-fidelity s | ratio |\n|---:|---:|---:|---:|")
    for n, (ours, theirs) in zip(sizes, times, strict=True):
        process.say(f"| {n:,} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |")
    with _weights(inception) as path:
        process.say(f"\n{_speed(path, *_pictures(pictures, images))}")


def _made(n: int, width: int, seed: int) -> np.ndarray:
    """Features float32 (n, width) like Inception's: 0 or more, correlated, of unlike variances."""
    draw, mixing = np.random.default_rng(seed), np.random.default_rng(99)
    scales = np.exp(mixing.normal(size=width))
    common = draw.normal(size=(n, width // 8)) @ mixing.normal(size=(width // 8, width)) / np.sqrt(width // 8)
    shift = 0.0 if seed == 0 else 0.1 * mixing.normal(size=width)
    return np.maximum(0, (common + 0.5 * draw.normal(size=(n, width)) + shift + 0.5) * scales * 0.3).astype(np.float32)


def _compared(a: np.ndarray, b: np.ndarray) -> tuple[list[tuple[str, float, float, str]], tuple[float, float]]:
    """(name, ours, theirs, difference) of five figures; seconds of a distance from both sides' statistics."""
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    width = a.shape[1]
    mine, theirs = (fid.collected([each], width) for each in (a, b))
    # Their mean of float32 features is a sum in float32; the definition is the same, so it is given float64.
    known = [metric_fid.fid_features_to_statistics(torch.from_numpy(x).double()) for x in (a, b)]
    calls = {"ours": lambda: frechet(mine, theirs)}
    calls["theirs"] = lambda: metric_fid.fid_statistics_to_metric(*known, False)
    seconds, answers = _in_turn(calls)
    ours, found = answers["ours"], answers["theirs"]
    rows = [_relative("FID", ours, found[metric_fid.KEY_METRIC_FID])]

    logits = (a - a.mean(0)) @ np.random.default_rng(1).normal(size=(width, 1008)).astype(np.float32) / np.sqrt(width)
    found = metric_isc.isc_features_to_metric(torch.from_numpy(logits))[metric_isc.KEY_METRIC_ISC_MEAN]
    rows.append(_relative("IS", scores.inception_score([logits], len(logits))[0], found))

    size = min(scores.SUBSET, len(a), len(b))
    settings = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    settings |= {"kid_subsets": _SUBSETS, "kid_subset_size": size, "rng_seed": scores.SEED, "verbose": False}
    pair = [torch.from_numpy(x) for x in (a, b)]
    found = metric_kid.kid_features_to_metric(*pair, kid_kernel_poly_coef0=1.0, **settings)
    kid, found = scores.kid(a, b, _SUBSETS, size).mean, found[metric_kid.KEY_METRIC_KID_MEAN]
    rows.append(("KID", kid, found, f"{kid - found:+.1e}"))

    found = metric_prc.prc_features_to_metric(
        *pair, prc_neighborhood=scores.K, prc_batch_size=10_000, save_cpu_ram=True, verbose=False
    )
    for name, ours, n in zip(("precision", "recall"), scores.precision_recall(a, b), (len(a), len(b)), strict=True):
        apart = abs(round(ours * n) - round(found[name] * n))
        rows.append((name, ours, found[name], f"{apart} of {n:,} pictures"))
    return rows, (seconds["ours"], seconds["theirs"])


def _relative(name: str, ours: float, theirs: float) -> tuple[str, float, float, str]:
    return name, ours, theirs, f"{(ours - theirs) / theirs:+.1e} relative"


def _in_turn(calls: dict[str, Callable]) -> tuple[dict[str, float], dict]:
    """The fewest seconds of each call in three rounds, which what else runs lengthens least; and what they return."""
    seconds, found = dict.fromkeys(calls, float("inf")), {}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            found[name] = call()
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds, found


# --- Inception


@contextmanager
def _weights(path: str | None):
    """The given file, or a temporary one of random weights in the same layout."""
    if path is not None:
        yield Path(path)
        return
    process.say("\nno --inception FILE: random weights in its layout, which take as long")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / features.FILE
        torch.save(_random(), path)
        yield path


def _random() -> dict[str, torch.Tensor]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            """Nothing is loaded: it keeps the values that it was created with."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Unloaded("random", [str(features.WIDTH)], feature_extractor_weights_path=empty).state_dict()


def _pictures(path: str | None, images: int) -> tuple[torch.Tensor, str]:
    """uint8 (N, 3, H, W), and what they are."""
    if path is None:
        made = np.random.default_rng(0).integers(0, 256, (images, 3, _SIDE, _SIDE), dtype=np.uint8)
        return torch.from_numpy(made), "made pictures"
    source = sources.open_source(Path(path))
    if source.n < 1:
        raise UserError(f"--pictures {path}: holds no pictures; name another folder")
    read = source.read(np.arange(min(images, source.n)))
    return torch.from_numpy(read).permute(0, 3, 1, 2).contiguous(), f"pictures of {path}"


def _speed(path: Path, images: torch.Tensor, what: str) -> str:
    """Images/s of our extractor and of torch-fidelity's, in turn, the best of three rounds each."""
    device = process.start().device
    ours = extractors.open_extractor(inception=path).call
    theirs = features.load_inception(path).to(device)
    parts = [part.to(device) for part in images.split(_BATCH)]

    def features_of(call):
        with torch.no_grad():
            return torch.cat([call(part)[0].cpu() for part in parts])

    mine, known = features_of(ours), features_of(theirs)  # also warms up
    apart = float((mine - known).abs().max() / known.abs().max())
    seconds, _ = _in_turn({"ours": lambda: features_of(ours), "theirs": lambda: features_of(theirs)})
    rates = {name: len(images) / each for name, each in seconds.items()}
    return (
        f"Inception on {len(images)} {what}, {device.type}, {torch.get_num_threads()} threads: ours "
        f"{rates['ours']:.3g} images/s, torch-fidelity {rates['theirs']:.3g}, ratio "
        f"{rates['ours'] / rates['theirs']:.2f}; features differ by {apart:.1e} of the largest"
    )
