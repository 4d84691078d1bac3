"""mage-ds evaluate RUN --reference REF --watch: figures of a training's checkpoints while it goes on, by a job of its
own.

a checkpoint is published -> pinned -> pictures, features, figures -> a row, TensorBoard, metrics.jsonl -> pin taken off
"""

import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

from mage_ds.engine import extractors, process, retention, run_folder, scored, scoring, stored, watched
from mage_ds.errors import Stopped, UserError
from mage_ds.report.progress import duration

_LOOK_S = 2  # seconds between two looks at the run
_BACK_S = 600  # so long a stopped or failed training may take to be started again
_PATIENCE_H = 24.0


def watch(source, *, reference, every: int = 1, patience: float = _PATIENCE_H, threads: int = 1, out=None, **options):
    """Evaluates the newest checkpoint of a run whenever there is a new one, until the training has ended.

    Those that a newer one has overtaken meanwhile are passed over; when the training has finished, all that are still
    kept are made up for. Any number of ranks of one launch; what is cut off goes on. Prints a row for each.

    Args: source: a run's folder, which need not be there yet; reference, threads, options: as of `tasks.score.score`;
    every: looks at steps that are multiples of it, and at the last; patience: hours without a sign of life after which
    it ends; out: by default RUN/evaluated/watch: a folder for each checkpoint, with its results.json and sheet.png,
    features of the reference, and metrics.jsonl.
    Raises: UserError; Stopped after a signal.
    """
    process.start(threads)
    given = {"source": source, "reference": reference, "threads": threads, **options}
    settings, run = scoring.settled(given), Path(source)
    out = (Path(out) if out else run / "evaluated" / "watch").resolve()
    with _ending():
        _check(settings, run)
        watcher, number = _Watcher(run, out, settings, every, patience * 3600), 0
        while (step := process.on_first(watcher.look)) != "ended":
            if step is None:
                time.sleep(_LOOK_S)
            else:
                number += 1
                watcher.evaluate(step, number)


@contextmanager
def _ending():
    """A signal ends it at once, with one line: what is written is the progress."""
    asked = []

    def stop(number, frame) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one is not to wait for anything
        asked.append(signal.Signals(number).name)
        raise Stopped(asked[0])

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    try:
        yield
    except Exception:
        if not asked:
            raise
        process.say(f"{asked[0]}: stopped watching; the same command goes on")
        raise Stopped(asked[0]) from None  # whatever another rank's end has led to here


def _check(settings: dict, run: Path) -> None:
    """What can be known to be wrong while there is no run yet."""
    if run.exists() and not run.is_dir():
        raise UserError(f"--watch: {run} is a file; give the folder of a training, which may be still to come")
    if (settings["features"] or "").removeprefix("run:") == settings["source"]:
        raise UserError(
            f"--features {settings['features']}: learns while it is watched, and figures of unlike features are never "
            "compared; give another run, or an export"
        )
    real, colon, split = settings["reference"].rpartition(":")
    if not Path(real if colon and split in ("train", "val") else settings["reference"]).exists():
        raise UserError(f"--reference {settings['reference']}: no such data set or file")
    extractors.open_extractor(settings["inception"], settings["features"])


class _Watcher:
    """`look` is for the first rank, `evaluate` for all."""

    def __init__(self, run: Path, out: Path, settings: dict, every: int, patience: float):
        self.run, self.out, self.settings, self.every, self.patience = run, out, settings, every, patience
        self.book: watched.Book | None = None
        self.passed: set[int] = set()  # over, and said
        self.sign, self.since = None, time.monotonic()  # of life, and when it was first seen
        self.said: set[str] = set()

    def look(self) -> int | str | None:
        """The step to evaluate; "ended"; None: there is nothing new. Raises: UserError where patience is at its end."""
        if not (self.run / "recipe.yaml").is_file():
            self._wait("is no run yet", "no run")
            return None
        if self.book is None:
            stored.open_run(self.run, "pretrain")
            book = watched.Book(self.run, self.out)
            book.open({name: value for name, value in self.settings.items() if name not in ("source", "checkpoint")})
            self.book = book
            process.say(f"watching {self.run}: figures in {self.out}, {self.run}/tensorboard and metrics.jsonl")
        status = run_folder.read_status(self.run)  # before the checkpoints: the last is published before the word
        steps = self.book.new()
        if wanted := self._wanted(steps, status.get("state")):
            return wanted
        self.book.share()
        return self._nothing(status, retention.steps(self.run))

    def _wanted(self, steps: list[int], state: str | None) -> int | None:
        last = state in ("finished", "stopped", "failed") and max(retention.steps(self.run), default=None)
        steps = [step for step in steps if step % self.every == 0 or step == last]
        if state == "finished":
            return min(steps, default=None)
        newest = max((each["step"] for each in self.book.records), default=-1)
        steps = [step for step in steps if step > newest]
        if over := [str(step) for step in steps[:-1] if step not in self.passed]:
            process.say(f"step {', '.join(over)}: passed over, step {steps[-1]} is newer")
            self.passed |= {*steps[:-1]}
        return steps[-1] if steps else None

    def _nothing(self, status: dict, known: list[int]) -> str | None:
        state, metrics = status.get("state"), self.run / "metrics.jsonl"
        if state == "finished":
            process.say(f"{self.run}: has finished; {len(self.book.records)} of its checkpoints evaluated")
            return "ended"
        size = metrics.stat().st_size if metrics.exists() else 0
        sign = (state, status.get("time"), known, size)
        if state not in ("stopped", "failed"):
            self._wait("has no checkpoint yet" if not known else None, sign)
        elif self._still(sign) > min(_BACK_S, self.patience):
            process.say(f"{self.run}: has {state}, and was not started again; start the same command when it is")
            return "ended"
        return None

    def _still(self, sign) -> float:
        """Seconds since the run has looked like this."""
        if sign != self.sign:
            self.sign, self.since = sign, time.monotonic()
        return time.monotonic() - self.since

    def _wait(self, why: str | None, sign) -> None:
        if why and why not in self.said:
            self.said.add(why)
            process.say(f"{self.run}: {why}; waiting for it ({self.patience / 3600:.3g} hours at most)")
        if self._still(sign) > self.patience:
            raise UserError(
                f"{self.run}: {why or 'nothing new'} after {self.patience / 3600:.3g} hours; start the training, then "
                "this again (--patience HOURS waits longer)"
            )

    # --- one checkpoint --------------------------------------------------------------------------------------

    def evaluate(self, step: int, number: int) -> None:
        """The figures of a checkpoint, by all ranks; the first writes them down. number: of this evaluation."""
        me, began = process.start(), time.monotonic()
        place = process.on_first(lambda: self._begin(step))
        if place is None:
            return
        place = Path(place)
        try:
            process.say(f"step {step}:")
            job = scoring.open_job(self.settings | {"checkpoint": step}, place, None)._replace(shared=self.out)
            results = scored.known(job) if me.first else None
            if process.broadcast_object(results is None):
                results = scored.run(job, aloud=False)
            _together(f"{number}/looked")  # nobody reads the features any more
            if me.first:
                self._note(step, place, results, time.monotonic() - began)
            _together(f"{number}/noted")
        finally:
            if me.first:
                self.book.unpin()

    def _begin(self, step: int) -> str | None:
        """Pins a checkpoint; where its results go, None where it is gone."""
        place = self.book.place(step)
        retention.pin(retention.folder_of(self.run, step), scoring.purpose(place))  # where one can write
        if problem := self.book.problem(step):
            self.book.unpin()
            process.say(f"step {step}: passed over: {problem}")
            return None
        if self.book.place(step) != place:  # another by now: the next look finds it
            self.book.unpin()
            return None
        self.book.sweep(place)
        return str(place)

    def _note(self, step: int, place: Path, results: dict, seconds: float) -> None:
        figures = {name: figure["value"] for name, figure in results["figures"].items()}
        record = {"step": step, **figures, "n": results["source"]["n"], "seconds": round(seconds, 1)}
        if not self.book.add(record, place):
            process.say(f"step {step}: the run went back behind it meanwhile; its figures are in {place} only")
        shutil.rmtree(place / "features", ignore_errors=True)  # 8 KB a picture; the figures are there
        if not self.said & {"remarks"}:
            self.said.add("remarks")
            for remark in results["remarks"]:
                process.say(f"- {remark}")
        process.say(_row(step, results, seconds))


def _row(step: int, results: dict, seconds: float) -> str:
    cells = [f"step {step:6d}"]
    for name, figure in results["figures"].items():
        low_high = figure.get("interval")
        interval = f" ({low_high[0]:.5g} to {low_high[1]:.5g})" if low_high else ""
        value = "none" if figure["value"] is None else f"{figure['value']:.5g}"
        cells.append(f"{name} {value}{interval}")
    return "  ".join([*cells, f"n {results['source']['n']:,}", f"in {duration(seconds)}"])


def _together(point: str) -> None:
    """All ranks wait for all: for the first one's figures too, which may take longer than a collective may."""
    me, keys = process.start(), [f"watched/{point}/{rank}" for rank in range(process.start().world)]
    if me.world > 1:
        me.store.set(keys[me.rank], "1")
        while not me.store.check(keys):
            time.sleep(_LOOK_S)
