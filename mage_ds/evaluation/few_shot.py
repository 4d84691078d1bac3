"""Few-shot classification on features: what a few labelled pictures a class are enough for (paper, Figure 2).

Neither the data sets nor the classifier of that figure are in any given source. Ours: logistic regression with an L2
penalty, as scikit-learn's LogisticRegression of many classes, its penalty chosen on a held part of the shots.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mage_ds import keyed

STRENGTHS = tuple(10.0**power for power in range(-1, 5))  # scikit-learn's C: the weight of the sum of the losses
ALONE = 10.0  # C of one shot a class, of which nothing can be held out
HELD = 5  # one of so many shots a class is held out, at least one
_STEPS, _HISTORY = 2000, 20  # of L-BFGS
_FLAT = 1e-6  # largest slope where it ends: of a loss that is a mean over the pictures
_SMALL = 1e-6  # added to variances, as by the probe's BatchNorm
PROTOCOL = (
    "logistic regression (L-BFGS, float64, intercept without penalty) on features brought to mean 0 and variance 1 "
    f"over the shots, divided by the root of their number; C of {STRENGTHS[0]:g} to {STRENGTHS[-1]:g} in steps of 10: "
    f"most answers right on the last 1/{HELD} of each class's shots (at least one), of equal ones the least log loss "
    f"there; then fitted on all shots; of one shot a class C = {ALONE:g}"
)


class Answer(NamedTuple):
    """top1: share of the held-out pictures that are named right; strength: the C in use; held: the same share of the
    held part of the shots with each of STRENGTHS, () where nothing was held out."""

    top1: float
    strength: float
    held: tuple[float, ...]


def draw(labels: np.ndarray, classes: int, shots: int, trial: int, seed: int) -> np.ndarray:
    """Pictures of a trial, the same for every source of features: int64 (classes, shots), indices into labels (n,).

    A trial's first 5 shots a class are its 5-shot draw: more shots only add pictures. ValueError where a class has
    fewer.
    """
    chosen = np.empty((classes, shots), dtype=np.int64)
    for label in range(classes):
        there = np.flatnonzero(labels == label)
        if len(there) < shots:
            raise ValueError(f"class {label} has {len(there)} pictures, {shots} are drawn")
        chosen[label] = there[keyed.permutation(seed, f"few-shot/{trial}", label, len(there))[:shots]]
    return chosen


def answer(shown: Tensor, pictures: Tensor, labels: Tensor) -> Answer:
    """Args: shown: features of the shots (classes, shots, D), in the order of the draw; pictures: of the held-out set
    (n, D); labels: int64 (n,). Everything is computed in float64 on their device."""
    classes, shots, width = shown.shape
    x = shown.double().reshape(-1, width)
    y = torch.arange(classes, device=x.device).repeat_interleave(shots)
    variance, middle = torch.var_mean(x, 0, correction=0)
    scale = ((variance + _SMALL) * width).sqrt()
    x, seen = (x - middle) / scale, (pictures.double() - middle) / scale
    if len(x) < width:  # the penalised solution lies in the span of the shots
        basis = torch.linalg.qr(x.T)[0]
        x, seen = x @ basis, seen @ basis
    strength, held = (ALONE, ()) if shots == 1 else _chosen(x, y, classes, shots)
    weight, bias = fit(x, y, classes, strength)
    right = (seen @ weight + bias).argmax(1) == labels
    return Answer(right.double().mean().item(), strength, held)


def _chosen(x: Tensor, y: Tensor, classes: int, shots: int) -> tuple[float, tuple[float, ...]]:
    """The C that PROTOCOL says, and the share of right answers with each."""
    held = torch.arange(len(y), device=y.device) % shots >= shots - max(1, shots // HELD)
    right, losses, start = [], [], None
    for strength in STRENGTHS:
        start = fit(x[~held], y[~held], classes, strength, start)
        said = x[held] @ start[0] + start[1]
        right.append((said.argmax(1) == y[held]).double().mean().item())
        losses.append(F.cross_entropy(said, y[held]).item())
    best = min(range(len(STRENGTHS)), key=lambda k: (-right[k], losses[k]))
    return STRENGTHS[best], tuple(right)


def fit(
    x: Tensor, y: Tensor, classes: int, strength: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The minimum of strength x sum of cross-entropies + |weight|^2 / 2: weight (D, classes), bias (classes,), float64.

    Args: x: float64 (n, D); y: int64 (n,); start: where the search begins (0), for its speed only.
    """
    weight, bias = (x.new_zeros(x.shape[1], classes), x.new_zeros(classes)) if start is None else start
    weight, bias = (each.clone().requires_grad_() for each in (weight, bias))
    options = {"max_iter": _STEPS, "max_eval": 2 * _STEPS, "tolerance_grad": _FLAT, "tolerance_change": 0}
    search = torch.optim.LBFGS([weight, bias], history_size=_HISTORY, line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        search.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + weight.square().sum() / (2 * strength * len(y))
        loss.backward()
        return loss

    search.step(closure)
    return weight.detach(), bias.detach()
