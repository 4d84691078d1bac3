"""Pictures -> features, by any number of processes on one folder, each picture exactly once.

source (read ahead, in a thread) -> extractor -> a tile of evaluation/feature_set.py, published by a rename
"""

import hashlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import NamedTuple

import numpy as np
import torch

from mage_ds.engine import process
from mage_ds.engine.extractors import Extractor
from mage_ds.engine.sources import Source
from mage_ds.errors import UserError
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.report.progress import counter
from mage_ds.sampling.claims import Claims

_VERSIONS = ("torch", "numpy", "pillow", "timm", "torch-fidelity")  # of what reads pictures, and of the networks
_AHEAD = 2  # tiles that are being read, or wait for the extractor
_LOOK_S = 0.5  # seconds between two looks at what other processes do
_COUNT_S = 2  # seconds between two counts of what all have done


def settings_of(source: Source, extractor: Extractor) -> dict:
    """What features depend on, for `FeatureSet.begin`: "extractor" (its name), "weights" (their hash), "width",
    "logits", "device", "threads" (of a CPU: float results depend on them), "versions", and "source", the facts."""
    device = process.start().device
    return {
        "extractor": extractor.name,
        "weights": extractor.hash,
        "width": extractor.width,
        "logits": extractor.logits,
        "device": process.device_name(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {name: metadata.version(name) for name in _VERSIONS},
        "source": source.facts,
    }


def extract(features: FeatureSet, source: Source, extractor: Extractor) -> None:
    """Adds the tiles that are missing, until all are there: those that other processes are at work on too, whether
    ranks of one launch or not. Says damaged tiles and makes them anew; shows progress.

    Raises: UserError for a picture that cannot be read, and where the source has fewer pictures than are wanted.
    """
    if source.n < features.n:
        where = source.facts.get("source", "the source")
        raise UserError(f"{where}: has {source.n:,} pictures, {features.n:,} are wanted; give --num {source.n}")
    if process.start().first:
        for line in features.discard_damaged():
            process.say(f"{line}; made anew")
    _Worker(features, source, extractor).run()


class _Read(NamedTuple):
    """images: of a whole tile, uint8 (B, H, W, 3); the others: of the R pictures that there are, as `FeatureSet.write`
    takes them."""

    images: np.ndarray
    labels: np.ndarray
    sums: np.ndarray
    sizes: np.ndarray


class _Worker:
    """One process at work on a folder, beside others that it knows by their files only (compare tasks/sample.py).

    It goes through the tiles that are missing, passes by those that others have claimed, and looks again. It never
    waits for another that is gone: a claim is a hint, and a tile that two make comes out the same.
    """

    def __init__(self, features: FeatureSet, source: Source, extractor: Extractor):
        self.features, self.source, self.extractor = features, source, extractor
        self.claims = Claims(features.work)
        self.device = process.start().device
        self.left, self.counted, self.said_waiting = 0, 0.0, False

    def run(self) -> None:
        me = process.start()
        todo = self.features.missing()
        self.left = self._pictures(todo)
        with (
            counter(self.left, "picture", "looked at", first=me.first, say=process.say) as self.advance,
            ThreadPoolExecutor(1, "ahead") as ahead,
        ):
            while todo:
                if not self._pass_through(todo, ahead):
                    self._wait(len(todo))
                todo = self.features.missing()
                self._count(todo)
        self._finish()

    def _pass_through(self, todo: list[np.ndarray], ahead: ThreadPoolExecutor) -> bool:
        """Makes the tiles that nobody is at work on; False where there was none."""
        waiting, made = deque(), False
        try:
            for tile in todo:
                if not self._take(tile):
                    continue
                waiting.append((tile, ahead.submit(self._read, tile).result if self.source.ahead else None))
                if len(waiting) > (_AHEAD if self.source.ahead else 0):
                    self._make(*waiting.popleft())
                made = True
            while waiting:
                self._make(*waiting.popleft())
        finally:  # after an error too: others may go on with what was claimed and not begun
            for tile, _ in waiting:
                self.claims.release(_name(tile))
        return made

    def _take(self, tile: np.ndarray) -> bool:
        if self.features.done(tile) or not self.claims.take(_name(tile)):
            return False
        if self.features.done(tile):  # between the two looks
            self.claims.release(_name(tile))
            return False
        return True

    def _make(self, tile: np.ndarray, result) -> None:
        began = time.perf_counter()
        try:
            read = result() if result else self._read(tile)
            images = torch.from_numpy(read.images).to(self.device).permute(0, 3, 1, 2)
            vectors, logits = self.extractor.call(images)
            real = len(read.labels)
            logits = None if logits is None else logits[:real].cpu().numpy()
            kept = {"labels": read.labels, "sums": read.sums, "sizes": read.sizes}
            self.features.write(tile, features=vectors[:real].cpu().numpy(), logits=logits, **kept)
        finally:
            self.claims.release(_name(tile))
        now = time.perf_counter()
        self.claims.patience = max(self.claims.patience, 20 * (now - began))
        if now - self.counted > _COUNT_S:
            self.counted = now
            self._count(self.features.missing())

    def _read(self, tile: np.ndarray) -> _Read:
        images = np.ascontiguousarray(self.source.read(tile))
        real = tile[tile < self.source.n]
        shown = images[: len(real)]
        sums = np.stack([np.frombuffer(hashlib.sha256(each).digest(), np.uint8) for each in shown])
        labels = np.full(len(real), -1) if self.source.labels is None else self.source.labels[real]
        sizes = np.tile(images.shape[1:3], (len(real), 1)) if self.source.sizes is None else self.source.sizes(real)
        return _Read(images, labels, sums, sizes)

    def _pictures(self, todo: list[np.ndarray]) -> int:
        return sum(int((tile < self.features.n).sum()) for tile in todo)

    def _count(self, todo: list[np.ndarray]) -> None:
        left = self._pictures(todo)
        if left < self.left:
            self.advance(self.left - left)
        self.left = left

    def _wait(self, tiles: int) -> None:
        if not self.said_waiting:
            process.say(f"{self.features.folder}: {tiles} tiles are being made by other processes; waiting for them")
            self.said_waiting = True
        time.sleep(_LOOK_S)

    def _finish(self) -> None:
        """All tiles are there: removes what workers that died, or were late, have left."""
        self.features.claim_size()
        if not FeatureSet(self.features.folder).missing():  # else another process is at work on more
            self.claims.clear()


def _name(tile: np.ndarray) -> str:
    """Of its claim."""
    return f"{tile[0]:06d}"
