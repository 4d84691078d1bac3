"""A training's run folder while it is trained in: what it logs, saves, goes back to, and how it ends."""

import json
import math
import os
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from mage_ds import recipes
from mage_ds.engine import checkpoint, process, retention, run_folder, state
from mage_ds.engine.spikes import MOST_REWINDS, Rule
from mage_ds.errors import UserError
from mage_ds.recipes.schema import Recipe
from mage_ds.report import bands, grids
from mage_ds.report.progress import Progress
from mage_ds.report.tensorboard import Board


class Run:
    """A training's folder. `step` completed steps, `position` samples of the stream they saw or left out, `saved` the
    newest checkpoint's step, `skipped` steps without a finite gradient, `spikes` the rule, None where it is off."""

    def __init__(self, path: Path, recipe: Recipe, facts: dict, *, steps: int, dataset: int):
        self.path, self.recipe, self.facts, self.steps = path, recipe, facts | {"dataset": dataset}, steps
        self.seed, self.step, self.saved, self.skipped = recipe.seed, 0, 0, 0
        self.spikes = None if recipe.report.spike.action == "none" else Rule(recipe.report.spike)
        self._left_out = 0  # samples that a rewind passed over
        self._due: list[str] = []  # of `evaluate` and `pictures`, what is still to be done at this step
        self._broken: str | None = None  # why rank 0 cannot log
        self._first = process.start().first
        self._every = {
            what: recipes.resolve(getattr(recipe.report, f"{what}_every"), samples=dataset, batch=recipe.batch)
            for what in ("evaluate", "pictures", "checkpoint")
        }
        self._progress = self._metrics = self._board = self._band = None

    @property
    def position(self) -> int:
        return self.step * self.recipe.batch + self._left_out

    # --- starting --------------------------------------------------------------------------------------------

    def resume(self, engines: dict, folder: Path | None, meta: dict | None = None) -> None:
        """Set the engines to a checkpoint (None: start at step 0) and drop what was logged after it.

        meta: the checkpoint's, where its files have been verified already. Raises UserError where the disk has no
        room for a checkpoint: a training that cannot be saved is not begun.
        """
        if folder is not None:
            self._go_to(engines, folder, meta)
            process.say(f"resumed {self.path} at step {self.step} from {folder.name}")
        process.on_first(partial(self._prepare, engines))

    def _prepare(self, engines: dict) -> None:
        with _written(self.path):
            checkpoint.check_room(self.path, engines)
            self._rewind()

    def _go_to(self, engines: dict, folder: Path, meta: dict | None) -> None:
        meta = checkpoint.load(folder, engines, meta)
        self.step = self.saved = meta["step"]
        self.skipped = meta["skipped"]
        self._left_out = meta["position"] - self.step * self.recipe.batch
        self._due = process.on_first(partial(owed, self.path, meta))
        if self.spikes:
            self.spikes.restore(meta.get("spikes"))

    def _rewind(self) -> None:
        retention.leave_behind(self.path, self.step)
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= self.step]
            run_folder.write_aside(path, "".join(f"{line}\n" for line in kept))

    def begin(self, *, flops_per_image: float | None, peak_flops: float | None) -> None:
        """Open the logs; from here on the run is `running`."""
        self._peak = {"flops_per_image": flops_per_image, "peak_flops": peak_flops}
        self._progress = Progress(
            self.steps, self.step, images_per_step=self.recipe.batch, console=self._first, **self._peak
        )
        process.on_first(self._open)

    def _open(self) -> None:
        with _written(self.path):
            self._metrics = open(self.path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            self._board = Board(self.path / "tensorboard", purge_step=self.step + 1)
            self._band = bands.of(self.recipe, self.facts)
            if self._band:
                self._progress.say(self._band.about())
            self._status("running")

    # --- while it runs ---------------------------------------------------------------------------------------

    def log_due(self, step: int) -> bool:
        return step % self.recipe.report.log_every == 0 or step in (1, self.steps)

    def due(self, what: str, step: int) -> bool:
        every = self._every[what]
        return step == self.steps or (every > 0 and step % every == 0)

    def end_of_step(self, step: int, engines: dict, figures: dict, evaluate, pictures) -> None:
        """After `step` completed steps: log, save, evaluate, draw, each when it is due. All ranks call it.

        Saved first: what then is cut off by a stop or a kill is done by the start that continues from there.
        """
        self.step = step
        self._progress.advance(step)
        if figures:
            with self._logging():
                self._log(self._progress.record(step, figures))
        callbacks = {"evaluate": evaluate, "pictures": pictures}
        self._due = [what for what, callback in callbacks.items() if callback and self.due(what, step)]
        if self.due("checkpoint", step):
            self.save(engines)
        self.catch_up(engines, evaluate, pictures)

    def catch_up(self, engines: dict, evaluate, pictures) -> None:
        """Evaluate and draw what is due at this step and not done, with the weights that the run is opened with: their
        average, where one is kept. All ranks call it.

        Raises process.StopAsked where a stop is due; what was not done stays due.
        """
        if evaluate and "evaluate" in self._due:
            with self._averaged(engines):
                figures = evaluate(engines, self.step)
            with self._logging():
                self._log_evaluation(self.step, figures)
            self._due.remove("evaluate")
        if pictures and "pictures" in self._due:
            with self._averaged(engines):
                picture = pictures(engines, self.step)
            with self._logging():
                self._draw(self.step, picture)
            self._due.remove("pictures")

    @contextmanager
    def _averaged(self, engines: dict):
        with ExitStack() as stack:
            for engine in engines.values() if self.recipe.optimizer.ema is not None else ():
                stack.enter_context(state.averaged(engine))
            yield

    @contextmanager
    def _logging(self):
        """Around what rank 0 writes beside the checkpoints. If that fails all ranks stop, as after a signal: alone it
        would leave the others in the middle of a collective."""
        try:
            yield
        except OSError as error:
            path = os.fsdecode(error.filename or self.path)  # TensorBoard names it in bytes
            self._broken = self._broken or f"{path}: cannot be written ({error.strerror})"
            process.ask_to_stop(self._broken)

    def _log(self, record: dict) -> None:
        if self._first:
            self._metrics.write(json.dumps(record) + "\n")
            self._board.scalars(record["step"], {f"train/{key}": value for key, value in record.items()})
            self._progress.show(record)
            self._compare(record["step"], record)

    def _compare(self, step: int, figures: dict) -> None:
        """Says where the run leaves the band of finished runs of its recipe, and where it is back."""
        for line in self._band.look(step, figures) if self._band else ():
            self._progress.say(line)

    def _log_evaluation(self, step: int, figures: dict) -> None:
        if self._first:
            plain = {key: value if math.isfinite(value) else None for key, value in figures.items()}
            self._metrics.write(json.dumps({"step": step, **plain}) + "\n")
            self._board.scalars(step, figures)
            shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items()) or "nothing could be measured"
            self._progress.say(f"step {step:{len(str(self.steps))}d}/{self.steps}  {shown}")
            self._compare(step, figures)

    def _draw(self, step: int, picture) -> None:
        if self._first and picture is not None:
            _sheet(self.path, step).parent.mkdir(exist_ok=True)
            grids.save(picture, _sheet(self.path, step))
            self._board.picture(step, "pictures", picture)

    def save(self, engines: dict) -> None:
        """Publish a checkpoint of the last completed step, unless it is there already."""
        if self.saved == self.step:
            return
        facts = {"position": self.position, "skipped": self.skipped, "due": self._due, **self.facts}
        if self.spikes:
            self.spikes.saved(self.step)
            facts["spikes"] = self.spikes.facts()
        report = self.recipe.report
        for_good = report.keep_every * self._every["checkpoint"]
        checkpoint.save(self.path, self.step, engines, facts, keep=report.keep, keep_every=for_good)
        self.saved = self.step
        with self._logging():
            self._status("running")

    def spiked(self, step: int, loss: float, median: float, engines: dict) -> None:
        """The loss of step `step` is a spike: go back to a checkpoint and leave out the samples seen since, or end.

        A second spike before a checkpoint is saved beyond the first goes back one checkpoint further, where there is
        one. All ranks call it. Raises UserError where the run ends.
        """
        rule, seen = self.spikes, step * self.recipe.batch + self._left_out
        what = f"step {step}: loss {loss:.4g} is above {rule.factor:g} x {median:.4g}, the median of the steps before"
        known = process.on_first(lambda: [each for each in checkpoint.steps(self.path) if each < step])
        if end := _why_not(rule, known):
            raise UserError(f"{self.path}: {what}; {end}; the checkpoint of step {self.saved} is kept (0: none yet)")
        rewinds, last = rule.rewinds + 1, max(rule.last, step)
        self._close_logs()
        self._go_to(engines, checkpoint.folder_of(self.path, known[-1 - min(rule.rewinds, len(known) - 1)]), None)
        rule.rewinds, rule.last = rewinds, last
        first, self._left_out = self.position, seen - self.step * self.recipe.batch
        process.on_first(partial(self._prepare, engines))
        self.begin(**self._peak)
        with self._logging():
            self._note_spike(step, loss, median, first, seen)
        process.say(
            f"{what}: back to step {self.step}; samples {first:,} to {seen - 1:,} of the stream, those of steps "
            f"{self.step + 1} to {step}, are left out (rewind {rewinds}, at most {MOST_REWINDS} without progress)"
        )

    def _note_spike(self, step: int, loss: float, median: float, first: int, seen: int) -> None:
        if self._first:
            record = {"spike": step, "loss": loss, "median": median, "back_to": self.step, "left_out": [first, seen]}
            with open(self.path / "spikes.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    # --- ending ----------------------------------------------------------------------------------------------

    def stop(self, reason: str, engines: dict) -> None:
        """Save the last completed step because of `reason`; the open accumulation is left behind.

        Raises UserError where the reason is that the logs cannot be written.
        """
        process.say(f"{reason}: stopping; saving step {self.step}")
        if self.step:
            self.save(engines)
        self._close_logs()
        self._end_if_broken()

    def finish(self) -> None:
        """Close the logs of a run that reached its last step, and draw its loss curve."""
        process.say(self._progress.summary())
        self._close_logs()
        self._end_if_broken()
        process.on_first(self._close_books)

    def _close_books(self) -> None:
        with _written(self.path):
            run_folder.close_books(self.path, step=self.step, steps=self.steps)

    def _close_logs(self) -> None:
        for log in (self._board, self._metrics) if self._first else ():
            with self._logging():
                log.close()

    def _end_if_broken(self) -> None:
        if broken := process.broadcast_object(self._broken):
            raise UserError(f"{broken}; step {self.saved} is saved; make room or mend the disk, then start again")

    def _status(self, state: str, reason: str = "") -> None:
        if self._first:
            run_folder.write_status(self.path, state, reason, step=self.step, steps=self.steps)


def owed(path: Path, meta: dict) -> list[str]:
    """What was due at a checkpoint's step and is not done: a kill or a stop came between."""
    done = []
    if _sheet(path, meta["step"]).exists():
        done.append("pictures")
    with suppress(OSError):
        records = (_record(line) for line in (path / "metrics.jsonl").read_text().splitlines())
        if any(record.get("step") == meta["step"] and "seconds" not in record for record in records):
            done.append("evaluate")
    return [what for what in meta.get("due", []) if what not in done]


def _why_not(rule: Rule, known: list[int]) -> str | None:
    """Why a run ends at a spike, and the remedy; None where it goes back."""
    if rule.action == "stop":
        return "continue with report.spike.action=rewind to leave out its samples, or none to train on them"
    if not known:
        return "there is no checkpoint to go back to; start again with report.spike.action=none, or save earlier"
    if rule.rewinds >= MOST_REWINDS:
        return (
            f"{rule.rewinds} times the run went back and came no further; continue with a larger report.spike.factor, "
            "or from an older checkpoint by --resume"
        )
    return None


@contextmanager
def _written(path: Path):
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise UserError(
            f"{where}: cannot be written ({error.strerror}); make room or mend the disk, then start again"
        ) from None


def _sheet(path: Path, step: int) -> Path:
    return path / "pictures" / f"step_{step:06d}.png"


def _record(line: str) -> dict:
    """A line of metrics.jsonl; an empty one where a kill cut it off."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _step_of(line: str) -> float:
    step = _record(line).get("step")
    return step if isinstance(step, int) else math.inf
