"""How good a tokenizer's reconstructions are, over a stream of pictures that the ranks share."""

import numpy as np
import torch
from torch import Tensor

from mage_ds.engine import process
from mage_ds.evaluation.features import WIDTH
from mage_ds.evaluation.moments import Moments, frechet
from mage_ds.evaluation.reconstruction import Kept, Sums, Worst
from mage_ds.inputs.batch import Batch

SHOWN = 8  # pictures of a row


class Tally:
    """Sums over this rank's pictures and their reconstructions; after `finish`, what all ranks found.

    codes: size of the codebook; lpips, inception: networks on the device, each None where there is none; place: int
    (n,), the place of each picture in an order of which the first ones are shown.
    `worst` and `shown` keep SHOWN pictures at most, see `block`.
    """

    def __init__(self, codes: int, device, lpips=None, inception=None, place: np.ndarray | None = None):
        self._sums, self._lpips, self._inception, self._place = Sums(codes, device), lpips, inception, place
        self._moments = [Moments(WIDTH, device) for _ in range(2)] if inception else []
        self.worst, self.shown = Worst(SHOWN), Worst(SHOWN)

    @torch.no_grad()
    def add(self, batch: Batch, drawn: Tensor, tokens: Tensor) -> None:
        """drawn: reconstructions (B, 3, H, W) of the batch's first views, clamped to [0, 1] here, of any float dtype;
        tokens: int64 (B, N). Placeholders and padding do not count."""
        images, counts = batch.images[:, 0], batch.valid > 0
        real, drawn = images.float() / 255, drawn.float().clamp(0, 1)
        lpips = self._lpips(real, drawn) if self._lpips else None
        psnr = self._sums.add(real, drawn, tokens, counts, lpips)["psnr"].cpu()
        pair = images, (255 * drawn).round().to(torch.uint8)
        for moments, some in zip(self._moments, pair, strict=False):
            moments.add(self._inception(some)[0][counts])
        index, seen = np.where(counts.cpu(), batch.index, -1), (*map(_Rows, pair), psnr.tolist())
        self.worst.add(index, -psnr, *seen)
        if self._place is not None:
            self.shown.add(index, -self._place[index].astype(float), *seen)

    def finish(self) -> dict[str, float]:
        """The figures of `reconstruction.Sums`, and rFID where Inception is there and more than one picture; the same
        on all ranks, which call it once."""
        for total in (self._sums.total, *(moments.total for moments in self._moments)):
            process.sum_over_ranks(total)
        for mine in (self.worst, self.shown):
            of_all = process.gather_objects(mine.kept)
            mine.kept = []
            for kept in of_all:
                mine.merge(kept)
        found = self._sums.figures()
        if self._moments and found["n"] > 1:
            gaussians = [moments.gaussian() for moments in self._moments]
            found["rfid"] = process.on_first(lambda: frechet(*gaussians))  # many seconds of work on a CPU
        return found


def block(kept: list[Kept]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """What `grids.pairs` shows of pictures that a tally kept: originals, reconstructions, captions."""
    originals, drawn, psnr = zip(*(each.things for each in kept), strict=True)
    return np.stack(originals), np.stack(drawn), [f"{each:.1f} dB" for each in psnr]


class _Rows:
    """Pictures (B, 3, H, W) of which single ones are fetched from the device: uint8 (H, W, 3)."""

    def __init__(self, images: Tensor):
        self._images = images

    def __getitem__(self, row: int) -> np.ndarray:
        return self._images[row].permute(1, 2, 0).contiguous().cpu().numpy()
