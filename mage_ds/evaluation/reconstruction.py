"""How close reconstructions are to their originals, and how evenly the codebook is used: sums over a stream.

Pictures x, y are (B, 3, H, W) in [0, 1]; drawn ones may lie outside and are clamped. Everything is computed in float64,
so that the order of the sums, and with it the number of ranks, does not show.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LEAST_ERROR = 1e-10  # mean square: a picture without any error has a PSNR of 100 dB
_SIGMA, _RADIUS = 1.5, 5  # of SSIM's Gaussian window, pixels (Wang et al. 2004: 11 x 11)
_C1, _C2 = 0.01**2, 0.03**2  # its constants for pictures in [0, 1]
_MEANS = ("l1", "psnr", "psnr_flat", "ssim")
_HEAD = ("n", *_MEANS, "n_lpips", "lpips")


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of each picture, float64 (B,)."""
    return (_clamped(x) - _clamped(y)).abs().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, float64 (B,); 100 at most, where there is no error."""
    error = (_clamped(x) - _clamped(y)).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=_LEAST_ERROR))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each picture, float64 (B,): the mean over the three channels and all whole windows.

    The usual setting: Gaussian window of sigma 1.5, population covariance, data range 1. NaN below 11 pixels a side.
    """
    x, y = _clamped(x), _clamped(y)
    high, wide = x.shape[2:]
    if min(high, wide) <= 2 * _RADIUS:
        return x.new_full(x.shape[:1], torch.nan)
    down, across = _window(high, x), _window(wide, x).T
    mean_x, mean_y, square_x, square_y, product = (
        down @ image @ across for image in (x, y, x.square(), y.square(), x * y)
    )
    var_x, var_y, covariance = square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y
    above = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    below = (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    return (above / below).flatten(1).mean(1)


def _window(size: int, like: Tensor) -> Tensor:
    """(size - 10, size): the Gaussian at every place where it lies within the picture; two such make it 2-D."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, device=like.device)
    weights = torch.exp(-0.5 * (offsets.to(like.dtype) / _SIGMA) ** 2)
    places = torch.arange(size - 2 * _RADIUS, device=like.device)[:, None]
    band = like.new_zeros(len(places), size)
    band.scatter_(1, places + offsets + _RADIUS, weights.expand(len(places), -1))
    return band / weights.sum()


def _clamped(x: Tensor) -> Tensor:
    return x.double().clamp(0, 1)


class Sums:
    """Sums over pictures and their codes, in one float64 tensor: `total`, which adds up over batches and over ranks.

    Args: codes: size of the codebook; device: where the pictures are. Adding does not wait for the device.
    """

    def __init__(self, codes: int, device="cpu"):
        self.total = torch.zeros(len(_HEAD) + codes, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self, originals: Tensor, drawn: Tensor, tokens: Tensor, counts: Tensor, lpips: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Adds a batch. originals, drawn: (B, 3, H, W); tokens: int64 (B, N); counts: bool (B,), False leaves a
        picture (padding, placeholder) out; lpips: (B,).

        Returns the figures of each picture, name -> float64 (B,), of those left out too.
        """
        counts = counts.to(self.total.device, non_blocking=True)
        flat = originals.mean(dim=(2, 3), keepdim=True).expand_as(originals)
        each = {"l1": l1(originals, drawn), "psnr": psnr(originals, drawn), "psnr_flat": psnr(originals, flat)}
        each["ssim"] = ssim(originals, drawn)
        if lpips is not None:
            each["lpips"] = lpips.double()
        ones = torch.ones_like(each["l1"])
        columns = {"n": ones, **each, **({} if lpips is None else {"n_lpips": ones})}
        for name, column in columns.items():
            # Not a product: what is not finite in a picture that is left out must not enter.
            self.total[_HEAD.index(name)] += torch.where(counts, column, 0.0).sum()
        weights = counts[:, None].expand_as(tokens).double()
        self.histogram.scatter_add_(0, tokens.flatten(), weights.flatten())
        return each

    @property
    def histogram(self) -> Tensor:
        """How often each code was used, float64 (codes,): a view of `total`."""
        return self.total[len(_HEAD) :]

    def figures(self) -> dict[str, float]:
        """Means over the pictures: l1, psnr (dB), psnr_flat (that of each picture's mean colour in its place), ssim and
        lpips where there are any; codes_used: share of the codebook; perplexity of the codes' frequencies (1 to the
        number of codes); n: pictures. {"n": 0} for none.
        """
        values = dict(zip(_HEAD, self.total[: len(_HEAD)].tolist(), strict=True))
        n = round(values["n"])
        if not n:
            return {"n": 0}
        found = {"n": n, **{name: values[name] / n for name in _MEANS}}
        if found["ssim"] != found["ssim"]:  # NaN: pictures smaller than the window
            del found["ssim"]
        if values["n_lpips"]:
            found["lpips"] = values["lpips"] / values["n_lpips"]
        used = float((self.histogram > 0).double().mean())
        return {**found, "codes_used": used, "perplexity": perplexity(self.histogram)}


def perplexity(histogram: Tensor) -> float:
    """exp of the entropy of how often each code (codes,) was used: how many are used evenly."""
    p = histogram.double() / histogram.sum()
    return float(torch.exp(torch.special.entr(p).sum()))


class Kept(NamedTuple):
    error: float
    index: int
    things: tuple[Any, ...]


class Worst:
    """The k samples of largest error in a stream, worst first (`kept`); of equal ones the lower index. NaN counts as
    the largest."""

    def __init__(self, k: int):
        self.k, self.kept = k, []

    def add(self, index: Sequence[int], error: Sequence[float] | Tensor, *things) -> None:
        """index, error: of B samples; an index below 0 is padding; things: sequences of B, of which a kept sample's
        entries are kept with it (its pictures)."""
        error = error.tolist() if isinstance(error, Tensor) else list(map(float, error))
        error = [math.inf if math.isnan(value) else value for value in error]
        rows = [(value, int(i), row) for row, (i, value) in enumerate(zip(index, error, strict=True)) if i >= 0]
        rows = sorted(rows, key=lambda entry: (-entry[0], entry[1]))[: self.k]
        self.merge([Kept(value, i, tuple(thing[row] for thing in things)) for value, i, row in rows])

    def merge(self, kept: list[Kept]) -> None:
        """Takes in what another one (another rank's) has kept."""
        self.kept = sorted([*self.kept, *kept], key=lambda entry: (-entry.error, entry.index))[: self.k]
