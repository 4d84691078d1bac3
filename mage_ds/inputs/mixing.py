"""Pairs of pictures joined by mixup or cutmix (paper section 4, Table 12), by timm's Mixup, keyed per micro-batch."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from mage_ds import keyed

if TYPE_CHECKING:
    import torch


def mixed(
    pictures: torch.Tensor, labels: torch.Tensor, *, mix, classes: int, smoothing: float, key: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of pictures in [0, 1] (B, 3, H, W), joined in place with itself turned round, and its soft targets
    (B, classes), in which `smoothing` of each label is spread over all of them.

    mix: the recipe's section, or None: nothing is joined, B may be odd; labels: int64 (B,); key: seed, and epoch and
    index of the first picture: the same micro-batch is joined alike on any rank and after any restart.
    """
    from timm.data.mixup import Mixup, mixup_target

    if mix is None:
        return pictures, mixup_target(labels, classes, 1.0, smoothing)
    join = Mixup(
        mixup_alpha=mix.mixup,
        cutmix_alpha=mix.cutmix,
        prob=mix.probability,
        switch_prob=mix.switch,
        label_smoothing=smoothing,
        num_classes=classes,
    )
    with _seeded(keyed.seed_of(key[0], "mix", *key[1:])):
        return join(pictures, labels)


@contextmanager
def _seeded(seed: int):
    """Within it numpy's global generator, which timm draws from, begins with `seed`; afterwards it is as it was."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
