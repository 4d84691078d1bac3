"""Models as sources of pictures for evaluation: drawn when they are looked at, then thrown away, or kept."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mage_ds.engine import inference, painting, process, stored
from mage_ds.engine.sources import Source, open_source
from mage_ds.errors import UserError
from mage_ds.report import joined, pictures
from mage_ds.report.progress import counter
from mage_ds.sampling import labels
from mage_ds.sampling.claims import Claims

_END = "end"  # the claim of who writes what stands beside kept pictures
_ELSEWHERE = ("run", "versions")  # of a choice's settings: where the model lies, and what the passport has anyway


def drawn(choice: painting.Choice, num: int, kept: "Kept | None" = None) -> Source:
    """Pictures 0..num-1 of a choice. `read` takes whole tiles of the choice's batch, or any index array of that length:
    in other company than its tile's a picture is the same up to rounding of the network.

    The network is built when the first picture is read: a finished evaluation needs none.
    """
    paint: Callable | None = None
    size = choice.opened.image_size

    def read(index: np.ndarray) -> np.ndarray:
        nonlocal paint
        paint = paint or painting.painter(choice)
        tokens, images = paint(index)
        if kept is not None:
            kept.write(index, tokens, images)
        return images

    facts = {name: value for name, value in choice.settings.items() if name not in _ELSEWHERE}
    facts |= {"source": choice.settings["run"], "kind": "mage", "height": size, "width": size}
    facts |= {"picture_format": "8-bit RGB, never encoded", "origin": choice.opened.origin}
    asked = None if choice.labels is None else np.resize(np.asarray(choice.labels, dtype=np.int64), num)
    return Source(num, size, asked, facts, read, ahead=False)


def redrawn(path: Path, data) -> Source:
    """Reconstructions of the pictures of a data set (what `sources.open_source` opens, at the tokenizer's size), by a
    tokenizer or by that of a MAGE; pixels rounded."""
    opened = stored.open_model(path)
    if opened.tokenizer is None:
        raise UserError(f"{path}: comes without a tokenizer, which would draw the pictures of {data} again")
    real, tokenizer = open_source(Path(data), opened.image_size), None

    def read(index: np.ndarray) -> np.ndarray:
        nonlocal tokenizer
        tokenizer = tokenizer or inference.frozen(opened.tokenizer)
        images = torch.from_numpy(real.read(index)).to(process.start().device).permute(0, 3, 1, 2).float().div(255)
        return inference.draw(tokenizer, inference.tokens_of(tokenizer, images), rounded=True)

    facts = {"source": str(path.resolve()), "kind": "reconstructions", "height": real.size, "width": real.size}
    facts |= {"weights": stored.weights_hash(opened.tokenizer.state_dict()), "of": real.facts}
    return Source(real.n, real.size, real.labels, facts, read, real.name, ahead=False)


class Kept:
    """The same pictures as PNG files, in a folder that `mage-ds sample` would have made, to the byte."""

    def __init__(self, out, choice: painting.Choice, num: int):
        self.choice = choice
        settings = choice.settings | {"format": "png", "checksums": "SHA-256 of the PNG file"}
        self.book = pictures.Pictures(Path(out), "png", settings["batch"], settings["seed"], choice.labels)
        self.num = process.on_first(lambda: pictures.open_folder(self.book, settings, num, choice.opened.image_size**2))

    def write(self, index: np.ndarray, tokens: np.ndarray, images: np.ndarray) -> None:
        """A whole tile; other index arrays are passed over."""
        if index[0] % self.book.batch == 0 and (np.diff(index) == 1).all() and index[0] < self.num:
            self.book.write(index, self.num, tokens, images)

    def complete(self, read: Callable[[np.ndarray], np.ndarray]) -> None:
        """Draws what is missing (its features were there already), and closes the folder; by several processes at once
        it comes out the same."""
        me, claims = process.start(), Claims(self.book.work)
        todo = self.book.missing(self.num)
        with counter(len(todo), "tile", "kept", first=me.first, say=process.say) as advance:
            for start in todo:
                if not self.book.done(start, self.num) and claims.take(f"{start:06d}"):
                    read(np.arange(start, start + self.book.batch))
                    claims.release(f"{start:06d}")
                advance(1)
        manifest = pictures.read_manifest(self.book.out)
        if self.book.missing(self.num) or not claims.take(_END):
            return  # another process is at work on the rest, and closes the folder
        if not manifest["complete"]:
            names = [labels.named(label, self.choice.opened.classes) for label in self.choice.labels or []]
            with pictures.writing(self.book.out):
                joined.finish(self.book, self.num, names)
                self.book.seal(self.num)
        claims.release(_END)
        claims.clear()
