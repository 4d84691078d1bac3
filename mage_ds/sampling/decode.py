"""Iterative parallel decoding over any predictor of token logits (paper.md 5).

Shapes: B pictures, N tokens each, C codes.
"""

import math

import numpy as np
import torch

from mage_ds import keyed
from mage_ds.sampling import schedule


def decode(
    predict,
    tokens,
    masked,
    *,
    noise,
    steps: int,
    temperature: float,
    token_temperature: float = 1.0,
    order: str = "confidence",
    drop: float = 0.0,
    labels=None,
    guidance: float = 0.0,
    guidance_schedule: str = "constant",
    on_step=None,
):
    """Fills the masked tokens in `steps` rounds; the others never change.

    Nothing in the loop waits for the device: each picture's counts follow from its number of masked tokens,
    which is read once at the start. Logits of any dtype are worked on in float64, so that a choice does not
    hang on the last digits of a sum.

    Args: predict: (tokens, masked, keep) -> logits (B, N, C), dropout off; with labels (tokens, masked, keep, labels,
    guidance), as `Mage.forward`; tokens: int64 (B, N), anything where masked; masked: bool (B, N), True = to fill, a
    number of its own in each picture; noise: (t, purpose) -> uniform in (0, 1), (B, N), t = 1..steps (0: before them),
    purpose "token", "confidence", "drop" or "order"; labels: int64 (B,), negative: none; on_step: called with (t,
    tokens, masked after the step). The others are fields of a recipe's `sampling` (recipes/schema.py): temperature,
    tau of the confidences, is scaled by 1 - t/T in step t; keep is None (all tokens) but while `drop` leaves out some.
    Returns: int64 (B, N), complete.
    """
    device, initial = tokens.device, masked.sum(dim=1).cpu().numpy()
    left = schedule.counts(initial, steps)
    counts = torch.from_numpy(left).to(device)
    dropped, fewest = math.ceil(drop * tokens.shape[1]), [*np.vstack([initial, left]).min(axis=1)]

    def uniform(step: int, purpose: str):
        return noise(step, purpose).to(device, non_blocking=True).double()

    late = halton_order(tokens.shape[1], uniform(0, "order")) if order == "halton" else None
    with torch.no_grad():
        for step in range(1, steps + 1):
            keep = None
            if dropped and fewest[step - 1] >= dropped:
                keep = kept(masked, uniform(step, "drop"), dropped)
            scale = guidance * rising(guidance_schedule, step / steps)
            condition = () if labels is None else (labels, torch.full((), scale, device=device) if scale else None)
            logits = predict(tokens, masked, keep, *condition)
            sampled, logp = draw(logits, uniform(step, "token"), token_temperature)
            tokens = torch.where(masked, sampled, tokens)
            if late is None:
                confidence = logp + temperature * (1 - step / steps) * gumbel(uniform(step, "confidence"))
            else:
                confidence = -late
            masked = lowest(torch.where(masked, confidence, torch.inf), counts[step - 1])
            if on_step is not None:
                on_step(step, tokens, masked)
    return tokens


def draw(logits, u, temperature: float = 1.0):
    """One token per position by the inverse distribution function of softmax(logits / temperature), in float64.

    The smallest code whose cumulated probability exceeds u: a function of u and the logits alone; at temperature 0
    the likeliest code.
    Args: logits (..., C); u float64 (...) in (0, 1).
    Returns: tokens int64 (...), their log-probabilities at temperature 1, float64 (...).
    """
    logp = torch.log_softmax(logits.double(), dim=-1)
    if temperature == 0:
        best = logp.max(dim=-1)
        return best.indices, best.values
    shape = logp if temperature == 1 else torch.log_softmax(logp / temperature, dim=-1)
    cumulated = shape.exp().cumsum(dim=-1)
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


def kept(masked, u, dropped: int):
    """int64 (B, N - dropped), ascending: all but the `dropped` masked positions of smallest u float64 (B, N)."""
    order = torch.where(masked, u, 2.0).argsort(dim=1, stable=True)
    return order[:, dropped:].sort(dim=1).values


def halton_order(tokens: int, u):
    """float64 (B, N): the turn of each position. Every picture's sequence is shifted around the grid by a pair of its
    own, so that not all of them begin at the same places.

    Args: u: float64 (B, N), of which the first two numbers choose the shift.
    """
    side = math.isqrt(tokens)
    turns = torch.from_numpy(halton(side)).to(u.device, u.dtype)
    down, right = (torch.floor(u[:, i] * side).long()[:, None, None] for i in (0, 1))
    place = torch.arange(side, device=u.device)
    return turns[(place[:, None] + down) % side, (place[None, :] + right) % side].flatten(1)


def halton(side: int) -> np.ndarray:
    """int64 (side, side): when the Halton sequence of bases 2 and 3 first visits each cell of a square grid: places
    close to each other come far apart in time, so that tokens that are drawn together depend less on each other."""
    turn, point, found = np.full((side, side), -1), 0, 0
    while found < side * side:
        point += 1
        row, column = (int(_radical_inverse(point, base) * side) for base in (2, 3))
        if turn[row, column] < 0:
            turn[row, column] = found
            found += 1
    return turn


def _radical_inverse(number: int, base: int) -> float:
    """The digits of `number` mirrored at the point: in [0, 1)."""
    value, place = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        place /= base
        value += digit * place
    return value


def rising(schedule: str, share: float, power: float = 4.0) -> float:
    """Factor of classifier-free guidance after a share t/T of the steps: 1 (constant), t/T (linear), or
    (1 - cos(pi (t/T)^power)) / 2 (power-cosine), which stays low longer and spares the variety of the first tokens."""
    return {"constant": 1.0, "linear": share, "power-cosine": (1 - math.cos(math.pi * share**power)) / 2}[schedule]


def keyed_noise(seed: int, index, tokens: int):
    """The noise of pictures `index` (B,): a pure function of (seed, picture, step, purpose), for `decode`."""

    def noise(step: int, purpose: str):
        return torch.from_numpy(keyed.uniform(seed, f"sample.{purpose}", index, step, tokens))

    return noise


def pixels(images, rounded: bool = False):
    """Pictures for people: float (B, 3, H, W) in about [0, 1] -> uint8 numpy (B, H, W, 3).

    Truncated, as the published pictures are; `rounded` takes the nearest value instead.
    """
    scaled = images.float().clamp(0, 1) * 255
    return (scaled.round() if rounded else scaled).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
