"""Iterative parallel decoding over any predictor of token logits (paper.md 5).

Shapes: B pictures, N tokens each, C codes.
"""

import torch

from mage_ds import keyed
from mage_ds.sampling import schedule


def decode(predict, tokens, masked, *, steps: int, temperature: float, noise, on_step=None):
    """Fills the masked tokens in `steps` rounds; the others never change.

    Nothing in the loop waits for the device: each picture's counts follow from its number of masked tokens,
    which is read once at the start. Logits of any dtype are worked on in float64, so that a choice does not
    hang on the last digits of a sum.

    Args: predict: (tokens, masked) -> logits (B, N, C), dropout off; tokens: int64 (B, N), anything where
    masked; masked: bool (B, N), True = to fill, a number of its own in each picture; temperature: tau, scaled
    by 1 - t/T in step t; noise: t -> (for tokens, for confidences), uniform in (0, 1), (B, N) each,
    t = 1..steps; on_step: called with (t, tokens, masked after the step).
    Returns: int64 (B, N), complete.
    """
    counts = torch.from_numpy(schedule.counts(masked.sum(dim=1).cpu().numpy(), steps)).to(tokens.device)
    with torch.no_grad():
        for step in range(1, steps + 1):
            for_tokens, for_confidences = (u.to(tokens.device, non_blocking=True).double() for u in noise(step))
            logits = predict(tokens, masked)
            sampled, logp = draw(logits, for_tokens)
            tokens = torch.where(masked, sampled, tokens)
            scale = temperature * (1 - step / steps)
            confidence = logp + scale * gumbel(for_confidences)
            masked = lowest(torch.where(masked, confidence, torch.inf), counts[step - 1])
            if on_step is not None:
                on_step(step, tokens, masked)
    return tokens


def draw(logits, u):
    """One token per position by the inverse distribution function of softmax(logits), in float64.

    The smallest code whose cumulated probability exceeds u: a function of u and the logits alone.
    Args: logits (..., C); u float64 (...) in (0, 1).
    Returns: tokens int64 (...), their log-probabilities float64 (...).
    """
    logp = torch.log_softmax(logits.double(), dim=-1)
    cumulated = logp.exp().cumsum(dim=-1)
    target = u.unsqueeze(-1) * cumulated[..., -1:]  # the sum is 1 only up to rounding
    tokens = torch.searchsorted(cumulated, target, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens.squeeze(-1), logp.gather(-1, tokens).squeeze(-1)


def gumbel(u):
    """Standard Gumbel noise from uniform numbers in (0, 1)."""
    return -torch.log(-torch.log(u))


def lowest(confidence, count):
    """bool (B, N): the `count` (B,) lowest confidences of each row; of equal ones the earlier positions."""
    rank = confidence.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < count.unsqueeze(1)


def keyed_noise(seed: int, index, tokens: int):
    """The noise of pictures `index` (B,): a pure function of (seed, picture, step), for `decode`."""

    def noise(step: int):
        purposes = ("sample.token", "sample.confidence")
        return tuple(torch.from_numpy(keyed.uniform(seed, purpose, index, step, tokens)) for purpose in purposes)

    return noise


def pixels(images, rounded: bool = False):
    """Pictures for people: float (B, 3, H, W) in about [0, 1] -> uint8 numpy (B, H, W, 3).

    Truncated, as the published pictures are; `rounded` takes the nearest value instead.
    """
    scaled = images.float().clamp(0, 1) * 255
    return (scaled.round() if rounded else scaled).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
