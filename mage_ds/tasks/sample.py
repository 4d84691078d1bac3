"""mage-ds sample: pictures out of a trained MAGE, in a folder that any number of processes work on at once.

tiles of indices -> decode -> detokenizer -> writer -> shards, tokens.npz, manifest
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mage_ds.engine import inference, painting, process
from mage_ds.errors import UserError
from mage_ds.recipes.sections import Sampling
from mage_ds.report import joined, manifest, pictures
from mage_ds.report import movie as films
from mage_ds.report.progress import counter
from mage_ds.report.writer import Writer
from mage_ds.sampling import labels
from mage_ds.sampling.claims import Claims

_BATCH = 64
_FILMED = 16  # pictures of a film: each is drawn once a step
_MOST = 2**31 - 1
_LOOK_S, _LOOK_MOST_S = 0.5, 5  # seconds between two looks at what others do: the longer, the longer they take
_COUNT_S = 5  # seconds between two counts of what all have made
_END = "end"  # the claim of who writes what comes last
_SUMS = {"png": "PNG file", "tar": "PNG file", "npz": "raw pixels"}  # what manifest.csv has the checksum of


def sample(
    run,
    num: int,
    out,
    *,
    tokenizer=None,
    class_label: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    temperature: float | None = None,
    token_temperature: float | None = None,
    order: str | None = None,
    drop: float | None = None,
    guidance: float | None = None,
    guidance_schedule: str | None = None,
    batch: int | None = None,
    format: str | None = None,
    precision: str = "float32",
    checkpoint: int | None = None,
    weights: str | None = None,
    threads: int = 1,
    round: bool = False,
    movie: bool = False,
) -> None:
    """Makes pictures 0..num-1 of a model in `out`: PNGs, tar shards or samples.npz, tokens.npz, grid.png, manifests.

    A picture is a function of (weights, seed, index) and of the settings in the manifest, not of the number of
    processes: ranks of one launch, or independent ones, that share nothing but the folder. What `out` holds of the
    same settings stays, and what is missing is added.

    Args: run: whatever `stored.open_model` opens; tokenizer: where it comes without one; class_label: of a
    class-conditional model, what `labels.parse` reads, by default all classes in turn; steps to guidance_schedule:
    fields of a recipe's `sampling`, by default the model's; batch: pictures computed together, by default what `out`
    was begun with, else 64 or fewer; format: of pictures.FORMATS, by default what `out` was begun with, else png, tar
    from 10,000 pictures on; precision: of the model, "float32", "bf16" or "auto" (tokens are drawn in float64);
    checkpoint: of a run, by default the one that `out` was begun with, else the newest; weights: of a run that keeps an
    average of them, "ema" or "raw", by default as `out` was begun, else the average; threads: CPU threads of a process:
    results depend on the number, so it is fixed; round: nearest 8-bit values instead of the published truncation;
    movie: adds movie.mp4, .gif and .webp, the first pictures as they fill.
    Raises: UserError for a model that cannot be opened, a wrong number, or an `out` of other settings.
    """
    given = {name: value for name, value in locals().items() if name in Sampling.model_fields and value is not None}
    if movie:
        films.require()
    me, out = process.start(threads), Path(out)
    for name, value in {"num": num, "batch": batch, "threads": threads}.items():
        if value is not None and not 1 <= value <= _MOST:
            raise UserError(f"--{name} {value}: must be from 1 to {_MOST:,}")
    before = process.on_first(lambda: pictures.read_manifest(out)) or {}
    form = format or before.get("format") or ("tar" if num >= pictures.MANY else "png")
    if form not in pictures.FORMATS:
        raise UserError(f"--format {form}: must be one of {', '.join(pictures.FORMATS)}")
    choice = painting.choose(
        run,
        tokenizer=tokenizer,
        class_label=class_label,
        seed=seed,
        given=given,
        batch=batch or before.get("batch") or min(_BATCH, num),
        precision=precision,
        rounded=round,
        checkpoint=checkpoint,
        weights=weights,
        begun=before,
    )
    painting.pin(choice, f"sampled into {out}")
    settings = choice.settings | {"format": form, "checksums": f"SHA-256 of the {_SUMS[form]}"}
    book, pixels = pictures.Pictures(out, form, settings["batch"], seed, choice.labels), choice.opened.image_size**2
    num = process.on_first(lambda: pictures.open_folder(book, settings, num, pixels, Claims(book.work).busy))
    names = [labels.named(label, choice.opened.classes) for label in choice.labels or []]
    worker = _Worker(book, num, settings, names, lambda: painting.painter(choice))
    worker.run()
    if movie and me.first:  # the other ranks may have ended, or died
        _film(choice, book, worker, num)
        process.say(f"{out / 'movie.mp4'}, .gif and .webp show how they fill")


def _film(choice: painting.Choice, book: pictures.Pictures, worker: "_Worker", num: int) -> None:
    """The first tile again, as it is decoded: a frame for each step, and one before them."""
    paint, shown = worker.paint or worker.make_painter(), min(num, book.batch, _FILMED)
    states = []
    paint(np.arange(book.batch), lambda _, tokens, masked: states.append((tokens[:shown], masked[:shown])))
    tokens, masked = states[0]
    states.insert(0, (tokens, masked | True))
    rounded = choice.settings["rounding"] == "nearest"
    with pictures.writing(book.out):
        films.film(book.out, states, lambda tokens: inference.draw(choice.opened.tokenizer, tokens, rounded))


class _Worker:
    """One process at work on a folder, beside others that it knows by their files only.

    It goes through the tiles that are missing, passes by those that others have claimed, and looks again, until the
    set is complete. It never waits for another that is gone: a claim is a hint (sampling/claims.py), a tile that two
    make comes out the same, and so does every file that tiles are joined into. A file that is not where it was has
    been moved on by another process: what was to be done with it is left, and the next look says what there is to do.
    """

    def __init__(self, book: pictures.Pictures, num: int, settings: dict, names: list[str], make_painter: Callable):
        self.book, self.num, self.settings, self.names, self.make_painter = book, num, settings, names, make_painter
        self.claims = Claims(book.work)
        book.mark = self.claims.mark
        self.paint: Callable | None = None
        self.said_waiting = self.sure = False
        self.made = self.told = self.lost = 0

    def run(self) -> None:
        """Until the set of pictures is complete."""
        me, out, began = process.start(), self.book.out, time.perf_counter()
        complete = self._look()
        todo = self._missing()
        if complete and not todo:
            self._tidy()
            process.say(f"{out}: its {self.num} pictures of these settings are complete; nothing to do")
            return
        if complete:
            self.book.reopen()
        if line := manifest.note_unlike(self.book, self.settings):
            print(line, flush=True)
        self.claims.sweep()
        self.claims.patience = max(self.claims.patience, self.num / 50)  # joining takes its time too
        self.told = self._left()
        try:
            with (
                counter(self.told, "picture", "sampled", first=me.first, say=process.say) as self.advance,
                Writer(self._write) as writer,
            ):
                self._work(todo, writer)
        finally:
            self.claims.release_all()
        self._tidy()
        who = f"rank {me.rank}: " if me.world > 1 else ""
        print(f"{who}{writer.summary(self.made, time.perf_counter() - began)}", flush=True)
        process.say(f"{self.num} pictures in {out}; look at {out / 'grid.png'} first")

    def _work(self, todo: list[int], writer: Writer) -> None:
        pause = _LOOK_S
        while True:
            num = self.num
            if self._look():
                return
            todo = [start for start in todo if not self.book.done(start, self.num)] if num == self.num else []
            todo = todo or self._missing()  # the whole look, which costs more
            moved = self._pass_through(todo, writer) if todo else self._finish()
            self._count()
            if moved:
                pause = _LOOK_S
                continue
            self._say_waiting(len(todo))
            time.sleep(pause)
            pause = min(1.5 * pause, _LOOK_MOST_S)

    def _tidy(self) -> None:
        """Of a complete set: removes what workers that died, or were late, have left."""
        self.claims.clear()
        joined.tidy(self.book, self.num)

    def _look(self) -> bool:
        """Whether the set is complete. Raises: UserError where others have removed it, or begun it anew otherwise."""
        found = pictures.read_manifest(self.book.out)
        if found is None:
            raise UserError(f"--out {self.book.out}: its manifest.json is gone; start again")
        manifest.refuse(self.book.out, found, self.settings)
        self.num = max(self.num, found["num"])  # another process may have been asked for more
        return found["complete"] and found["num"] >= self.num

    def _missing(self) -> list[int]:
        counted = self.book.left(self.num)
        todo = self.book.missing(self.num)
        self.lost = max(0, sum(min(self.book.batch, self.num - start) for start in todo) - counted)
        return todo

    def _left(self) -> int:
        """Pictures that are missing: by a cheap count, and of tiles that were done and have lost something."""
        return self.book.left(self.num) + self.lost

    def _count(self) -> None:
        left = self._left()
        if left < self.told:
            self.advance(self.told - left)
        self.told = left

    def _say_waiting(self, tiles: int) -> None:
        if not self.said_waiting:
            what = f"{tiles} tiles that are left are being made" if tiles else "its pictures are being joined"
            process.say(f"{self.book.out}: {what} by other processes; waiting for them")
            self.said_waiting = True

    # --- tiles

    def _pass_through(self, todo: list[int], writer: Writer) -> bool:
        """Makes those that nobody is at work on; whether there were any."""
        drawing, counted = 0.0, time.perf_counter()  # when it began, and the last count
        for start in todo:
            name = f"{start:06d}"
            if self.book.done(start, self.num) or not self.claims.take(name):
                continue
            if self.book.done(start, self.num):  # between the two looks
                self.claims.release(name)
                continue
            self.paint = self.paint or self.make_painter()
            began = time.perf_counter()
            drawing = drawing or began
            tile = np.arange(start, start + self.book.batch)
            writer.put(tile, *self.paint(tile))
            now = time.perf_counter()
            self.claims.patience = max(self.claims.patience, 20 * (now - began))
            self.made += min(self.book.batch, self.num - start)
            if now - counted > _COUNT_S:
                counted = now
                self._count()
        writer.flush()
        writer.drawing += time.perf_counter() - drawing if drawing else 0
        return bool(drawing)

    def _write(self, tile: np.ndarray, tokens: np.ndarray, images: np.ndarray, apply) -> None:
        start = int(tile[0])
        with self._another_may_be_first():
            self.book.write(tile, self.num, tokens, images, apply)
        if not self.sure:
            self._make_sure(start)
        self.claims.release(f"{start:06d}")
        at = start // self.book.shard * self.book.shard
        if self.book.form == "tar" and at + self.book.shard <= self.num:
            self._join(at)

    def _make_sure(self, start: int) -> None:
        """The first tile belongs to the settings of the manifest: until there is one, others may replace them."""
        try:
            self._look()
        except UserError:
            self.book.discard(self.book.tile(start), start)
            raise
        self.sure = True

    # --- what tiles are joined into

    def _join(self, at: int) -> None:
        """A shard whose tiles are there, so that the pictures lie about twice for a short while only."""
        inside = range(at, at + self.book.shard, self.book.batch)
        if not all(self.book.done(start, self.num) for start in reversed(inside)):  # the latest is missing longest
            return
        name = self.book.file(at)
        if self.book.count(at) < self.book.shard and self.claims.take(name):
            with self._another_may_be_first():
                joined.join(self.book, at, self.num)
            self.claims.release(name)

    def _finish(self) -> bool:
        """All tiles are there: writes what is made of them, unless another process is about to: then False."""
        if not self.claims.take(_END):
            return False
        with self._another_may_be_first():
            for at in self.book.due(self.num):
                joined.join(self.book, at, self.num)
            joined.finish(self.book, self.num, self.names)
            self.book.seal(self.num)
        self.claims.release(_END)
        if not self._look():  # something was damaged, or another process has changed it meanwhile
            time.sleep(_LOOK_S)
        return True

    @contextmanager
    def _another_may_be_first(self) -> Iterator[None]:
        try:
            with pictures.writing(self.book.out):
                yield
        except (FileNotFoundError, pictures.Outgrown):
            pass
        except joined.Damaged as error:
            process.say(f"{error}; made again")
            self.book.discard(error.path, error.start)
