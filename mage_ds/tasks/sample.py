"""mage-ds sample: pictures out of a trained MAGE, in a folder that any number of processes work on at once.

tiles of indices -> decode -> detokenizer -> writer -> shards, tokens.npz, manifest
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np

from mage_ds.engine import ds_config, inference, process, retention, stored
from mage_ds.errors import UserError
from mage_ds.recipes.schema import Sampling
from mage_ds.report import joined, pictures
from mage_ds.report import movie as films
from mage_ds.report.progress import counter, duration
from mage_ds.sampling import decode, labels
from mage_ds.sampling.claims import Claims
from mage_ds.sampling.tiles import tiles

_BATCH = 64
_FILMED = 16  # pictures of a film: each is drawn once a step
_MOST = 2**31 - 1
_PRECISIONS = ("auto", "bf16", "float32")
_AHEAD = 2  # tiles that wait for the writer at most
_PNG_THREADS = 4  # PNG takes about 20 ms a picture of 256 px
_LOOK_S = 0.5  # seconds between two looks at what others do
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
    checkpoint: of a run, by default the one that `out` was begun with, else the newest; threads: CPU threads of a
    process: results depend on the number, so it is fixed; round: nearest 8-bit values instead of the published
    truncation; movie: adds movie.mp4, .gif and .webp, the first pictures as they fill.
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
    opened, step = _open(Path(run), tokenizer, checkpoint, before, out)
    asked = _asked(opened, class_label, run)
    if precision not in _PRECISIONS:
        raise UserError(f"--precision {precision}: must be one of {', '.join(_PRECISIONS)}")
    form = format or before.get("format") or ("tar" if num >= pictures.MANY else "png")
    if form not in pictures.FORMATS:
        raise UserError(f"--format {form}: must be one of {', '.join(pictures.FORMATS)}")
    settings = {
        "run": str(Path(run).resolve()),
        "checkpoint": step,
        "weights": stored.weights_hash(opened.mage.state_dict()),
        "tokenizer": stored.weights_hash(opened.tokenizer.state_dict()),
        "seed": seed,
        **_sampling(opened, given),
        "class_label": None if asked is None else labels.written(asked),
        "classes": opened.classes,
        "precision": ds_config.choose_precision(precision, me.device),
        "rounding": "nearest" if round else "truncated",
        "device": me.device.type,
        "versions": {name: metadata.version(name) for name in ("torch", "deepspeed", "numpy")},
        "batch": batch or before.get("batch") or min(_BATCH, num),
        "threads": threads,
        "format": form,
        "checksums": f"SHA-256 of the {_SUMS[form]}",
    }
    book = pictures.Pictures(out, form, settings["batch"], seed, asked)
    num = process.on_first(lambda: pictures.open_folder(book, settings, num))
    names = [labels.named(label, opened.classes) for label in asked or []]
    worker = _Worker(book, num, names, lambda: _painter(opened, settings, book))
    worker.run(opened.image_size)
    if movie and me.first:  # the other ranks may have ended, or died
        _film(opened, settings, book, worker, num)
        process.say(f"{out / 'movie.mp4'}, .gif and .webp show how they fill")


# --- what is made --------------------------------------------------------------------------------------------


def _open(run: Path, tokenizer, checkpoint, before: dict, out: Path) -> tuple[stored.Stored, int | None]:
    """The model, and of a run the step of its checkpoint, which is pinned."""
    step = checkpoint
    if (run / "recipe.yaml").is_file():
        begun = before.get("checkpoint")
        if step is None and begun is not None and retention.folder_of(run, begun).is_dir():
            step = begun
        folder = process.on_first(lambda: retention.find(run, step))
        step = retention.step_of(folder)
    opened = stored.open_model(run, tokenizer, step)
    if opened.kind != "mage":
        raise UserError(f"{run}: is a {opened.kind}, which makes no pictures; give a MAGE's run, export or file")
    if opened.tokenizer is None:
        raise UserError(f"{run}: comes without a tokenizer; give the one that it was trained with: --tokenizer PATH")
    if step is not None and not process.on_first(lambda: retention.pin(folder, f"sampled into {out}")):
        process.say(f"{folder}: cannot be pinned (read-only?); a training that goes on there may remove it")
    return opened, step


def _asked(opened: stored.Stored, class_label: str | None, run) -> list[int] | None:
    """The labels that pictures are asked for in turn, None for a model without classes."""
    classes = opened.mage.classes
    if classes is None:
        if class_label is not None:
            raise UserError(f"--class-label {class_label}: {run} knows no classes; leave it out")
        return None
    return [*range(classes)] if class_label is None else labels.parse(str(class_label), classes, opened.classes)


def _sampling(opened: stored.Stored, given: dict) -> dict:
    """All fields of `Sampling`: those given, the others the model's own."""
    if given.get("guidance") and opened.mage.classes is None:
        raise UserError(f"--guidance {given['guidance']}: needs a model with classes, this one has none; leave it out")
    try:
        return Sampling.model_validate({**opened.sampling, **given}).model_dump()
    except ValueError as error:  # pydantic's
        first = error.errors()[0]
        name = "-".join(map(str, first["loc"])).replace("_", "-")
        raise UserError(f"--{name} {first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _painter(opened: stored.Stored, settings: dict, book: pictures.Pictures) -> Callable:
    """paint: index (B,) -> tokens (B, N), pictures uint8 (B, H, W, 3)."""
    import torch

    device = process.start().device
    torch.backends.cudnn.allow_tf32 = False  # float32 as published; matrix products have it off by default
    engine = inference.engine(opened.mage, ds_config.dtype_of(settings["precision"]))
    tokenizer = inference.frozen(opened.tokenizer)
    how = {name: settings[name] for name in Sampling.model_fields}
    empty = torch.zeros(book.batch, opened.mage.tokens, dtype=torch.int64, device=device)
    masked = torch.ones_like(empty, dtype=torch.bool)

    def paint(index: np.ndarray, on_step: Callable | None = None) -> tuple[np.ndarray, np.ndarray]:
        noise = decode.keyed_noise(settings["seed"], index, empty.shape[1])
        asked = None if book.labels is None else torch.from_numpy(book.labels_of(index)).to(device)
        tokens = decode.decode(engine, empty, masked, noise=noise, labels=asked, on_step=on_step, **how)
        return tokens.cpu().numpy(), inference.draw(tokenizer, tokens, settings["rounding"] == "nearest")

    return paint


def _film(opened: stored.Stored, settings: dict, book: pictures.Pictures, worker: "_Worker", num: int) -> None:
    """The first tile again, as it is decoded: a frame for each step, and one before them."""
    paint, shown = worker.paint or worker.make_painter(), min(num, book.batch, _FILMED)
    states = []
    paint(np.arange(book.batch), lambda _, tokens, masked: states.append((tokens[:shown], masked[:shown])))
    tokens, masked = states[0]
    states.insert(0, (tokens, masked | True))
    with pictures.writing(book.out):
        films.film(
            book.out,
            states,
            lambda tokens: inference.draw(opened.tokenizer, tokens, settings["rounding"] == "nearest"),
        )


# --- who makes it --------------------------------------------------------------------------------------------


class _Worker:
    """One process at work on a folder, beside others that it knows by their files only.

    It goes through the tiles that are missing, passes by those that others have claimed, and looks again, until the
    set is complete. It never waits for another that is gone: a claim is a hint (sampling/claims.py), a tile that two
    make comes out the same, and so does every file that tiles are joined into. A file that is not where it was has
    been moved on by another process: what was to be done with it is left, and the next look says what there is to do.
    """

    def __init__(self, book: pictures.Pictures, num: int, names: list[str], make_painter: Callable[[], Callable]):
        self.book, self.num, self.names, self.make_painter = book, num, names, make_painter
        self.claims = Claims(book.work)
        self.paint: Callable | None = None
        self.said_waiting = False
        self.made = self.left = 0

    def run(self, side: int) -> None:
        """Until the set of pictures, `side` pixels high and wide, is complete."""
        me, out, began = process.start(), self.book.out, time.perf_counter()
        todo = self._missing()
        if todo and self._complete():
            self.book.reopen()
        elif self._complete():
            self._tidy()
            process.say(f"{out}: its {self.num} pictures of these settings are complete; nothing to do")
            return
        self.left = self._pictures(todo)
        self.book.check_room(self.left, self.num, side * side)
        self.claims.patience = max(self.claims.patience, self.num / 50)  # joining takes its time too
        with (
            counter(self.left, "picture", "sampled", first=me.first, say=process.say) as self.advance,
            _Writer(self._write) as writer,
        ):
            while not self._complete():
                todo = self._missing()
                self._count(todo)
                if todo:
                    self._pass_through(todo, writer)
                else:
                    self._finish()
                    if not self._complete():
                        time.sleep(_LOOK_S)
        self._tidy()
        who = f"rank {me.rank}: " if me.world > 1 else ""
        print(f"{who}{writer.summary(self.made, time.perf_counter() - began)}", flush=True)
        process.say(f"{self.num} pictures in {out}; look at {out / 'grid.png'} first")

    def _tidy(self) -> None:
        """Of a complete set: removes what workers that died, or were late, have left."""
        self.claims.clear()
        joined.tidy(self.book, self.num)

    def _missing(self) -> list:
        manifest = pictures.read_manifest(self.book.out)
        self.num = max(self.num, manifest["num"] if manifest else 0)  # another process may have been asked for more
        return self.book.missing(self.num, tiles(self.num, self.book.batch))

    def _complete(self) -> bool:
        manifest = pictures.read_manifest(self.book.out)
        return manifest is not None and manifest["complete"] and manifest["num"] >= self.num

    def _pictures(self, todo: list) -> int:
        return sum(int((tile < self.num).sum()) for tile in todo)

    def _count(self, todo: list) -> None:
        left = self._pictures(todo)
        if left < self.left:
            self.advance(self.left - left)
        self.left = left

    def _wait(self, why: str) -> None:
        if not self.said_waiting:
            process.say(f"{self.book.out}: {why}; waiting for them")
            self.said_waiting = True
        time.sleep(_LOOK_S)

    # --- tiles

    def _pass_through(self, todo: list, writer: "_Writer") -> None:
        """Makes those that nobody is at work on."""
        before, counted = self.made, time.perf_counter()
        for tile in todo:
            name = f"{tile[0]:06d}"
            if self.book.done(tile, self.num) or not self.claims.take(name):
                continue
            if self.book.done(tile, self.num):  # between the two looks
                self.claims.release(name)
                continue
            self.paint = self.paint or self.make_painter()
            began = time.perf_counter()
            writer.put(tile, *self.paint(tile))
            now = time.perf_counter()
            self.claims.patience = max(self.claims.patience, 20 * (now - began))
            self.made += int((tile < self.num).sum())
            if now - counted > _COUNT_S:
                counted = now
                self._count(self._missing())
        writer.flush()
        if self.made == before:
            self._wait(f"{len(todo)} tiles that are left are being made by other processes")

    def _write(self, tile: np.ndarray, tokens: np.ndarray, images: np.ndarray, apply) -> None:
        start = int(tile[0])
        with self._another_may_be_first():
            self.book.write(tile, self.num, tokens, images, apply)
        self.claims.release(f"{start:06d}")
        at = start // self.book.shard * self.book.shard
        if self.book.form == "tar" and at + self.book.shard <= self.num:
            self._join(at)

    # --- what tiles are joined into

    def _join(self, at: int) -> None:
        """A shard whose tiles are there, so that the pictures lie about twice for a short while only."""
        inside = tiles(self.book.shard, self.book.batch)
        if not all(self.book.done(tile + at, self.num) for tile in reversed(inside)):  # the latest is missing longest
            return
        name = self.book.file(at)
        if self.book.count(at) < self.book.shard and self.claims.take(name):
            with self._another_may_be_first():
                joined.join(self.book, at, self.num)
            self.claims.release(name)

    def _finish(self) -> None:
        """All tiles are there: writes what is made of them, unless another process is about to."""
        if not self.claims.take(_END):
            self._wait("its pictures are being joined by another process")
            return
        with self._another_may_be_first():
            for at in self.book.due(self.num):
                joined.join(self.book, at, self.num)
            joined.finish(self.book, self.num, self.names)
            self.book.seal(self.num)
        self.claims.release(_END)

    @contextmanager
    def _another_may_be_first(self) -> Iterator[None]:
        try:
            with pictures.writing(self.book.out):
                yield
        except FileNotFoundError:
            pass
        except joined.Damaged as error:
            process.say(f"{error}; made again")
            self.book.discard(error.path, error.start)


class _Writer:
    """Calls write(*what is put, apply) in a thread, one after the other: the device goes on meanwhile.

    An error there is raised by the next `put` or `flush`.
    """

    def __init__(self, write: Callable):
        self._write, self._pending = write, deque()
        self._thread = ThreadPoolExecutor(1, "writer")
        self._helpers = ThreadPoolExecutor(_PNG_THREADS, "png")  # PNG is compressed outside of Python's lock
        self._stood = self._busy = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pool in (self._thread, self._helpers):
            pool.shutdown(cancel_futures=True)

    def put(self, *what) -> None:
        self._pending.append(self._thread.submit(self._timed, what))
        self._settle(_AHEAD)

    def flush(self) -> None:
        """Until everything is written."""
        self._settle(0)

    def summary(self, made: int, seconds: float) -> str:
        """The closing line of a worker that made so many pictures."""
        return (
            f"{made} pictures in {duration(seconds)}, {made / seconds:.3g} pictures/s; of this time the device waited "
            f"{self._stood / seconds:.1%} for writing, writing {1 - self._busy / seconds:.1%} for the device"
        )

    def _settle(self, most: int) -> None:
        began = time.perf_counter()
        while len(self._pending) > most:
            self._pending.popleft().result()
        self._stood += time.perf_counter() - began

    def _timed(self, what: tuple) -> None:
        began = time.perf_counter()
        self._write(*what, self._helpers.map)
        self._busy += time.perf_counter() - began
