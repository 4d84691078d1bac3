"""How many tokens stay masked: known before the first prediction, so computed on the host, in float64."""

import math

import numpy as np


def remaining(initial, step: int, steps: int) -> np.ndarray:
    """Masked tokens after step t of T, not clamped: floor(N_0 cos(pi/2 (t/T))) in this order (paper.md 5).

    Args: initial: N_0, int (B,), tokens masked at the start; step: t in 1..steps; steps: T >= 1.
    Returns: int64 (B,).
    """
    ratio = step / steps
    share = np.cos(math.pi / 2 * ratio)
    return np.floor(np.asarray(initial, dtype=np.int64) * share).astype(np.int64)


def counts(initial, steps: int) -> np.ndarray:
    """Tokens to mask again after each step, int64 (steps, B).

    N is clamped to max(1, min(masked - 1, N)): at least one token becomes final in a step, and the lower
    bound wins, so a picture with few tokens to fill keeps one masked, which is sampled again until the last
    step. After that step nothing is masked; N_0 = 0 stays 0.
    """
    masked = np.asarray(initial, dtype=np.int64)
    table = np.zeros((steps, len(masked)), dtype=np.int64)
    for step in range(1, steps):
        clamped = np.maximum(1, np.minimum(masked - 1, remaining(initial, step, steps)))
        masked = table[step - 1] = np.where(masked > 0, clamped, 0)
    return table
