"""What an evaluation beside a training knows and writes: the figures of each checkpoint that it has looked at.

OUT/watch.json              what they depend on
OUT/metrics.jsonl           a line for each checkpoint, of this writer only
RUN/tensorboard/NAME_OF_OUT the same; TensorBoard follows one file of a folder, so another's in the training's own
                            would end its curves
RUN/metrics.jsonl           the same lines, where that can do no harm (see `Book.share`)
"""

import hashlib
import json
import shutil
import socket
from pathlib import Path

from mage_ds.engine import checkpoint, process, retention, run_folder
from mage_ds.errors import UserError, refuse_differences
from mage_ds.files import lock, saved
from mage_ds.report.tensorboard import Board


class Book:
    """The figures of `run` in `out`, in order of their steps in `records`: {"step", figures by name, "n", "seconds"
    that they took, "weights", "evaluated": where the passport lies}. Used by one process, which holds `out` by `open`.
    """

    def __init__(self, run: Path, out: Path):
        self.run, self.out, self.records = run, out, []
        self._weights: dict[tuple, str] = {}
        self._damaged: set[tuple[int, str]] = set()  # steps and weights, said
        self._purge: int | None = None  # the first step whose figures TensorBoard is to forget
        self._lock = None

    def open(self, settings: dict) -> None:
        """Reads what is there. Raises: UserError where another process watches, or figures of other settings are."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.out / ".lock", "w")  # noqa: SIM115 (open for as long as the process lives)
            if not lock(self._lock):
                raise UserError(
                    f"{self.run}: another process watches it into {self.out}; for more workers start that one by "
                    "deepspeed or srun, for other figures choose another --out"
                )
            path, settings = self.out / "watch.json", json.loads(json.dumps(settings))
            if path.exists():
                refuse_differences(self.out, "figures", _read(path), settings, str)
            run_folder.write_aside(path, json.dumps(settings, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({error.strerror}); choose another folder") from None
        self.records = _records(self._path)
        self.unpin()  # what a watch that was killed has left

    @property
    def _path(self) -> Path:
        return self.out / "metrics.jsonl"

    # --- checkpoints -----------------------------------------------------------------------------------------

    def new(self) -> list[int]:
        """Steps of the published checkpoints that have not been evaluated, rising. Forgets, beforehand, the figures of
        those that the run went back behind: the ones beyond its newest checkpoint, and from a step on at which it has
        other weights by now."""
        known = {step: self.weights(step) for step in retention.steps(self.run)}
        changed = [each["step"] for each in self.records if known.get(each["step"], each["weights"]) != each["weights"]]
        first = min(changed, default=max(known, default=0) + 1)
        if any(each["step"] >= first for each in self.records):
            self.records = [each for each in self.records if each["step"] < first]
            self._purge = first
            self._write()
            process.say(f"{self.run}: went back; figures from step {first} on are forgotten")
        done = {each["step"] for each in self.records}
        return [step for step, weights in known.items() if step not in done and (step, weights) not in self._damaged]

    def weights(self, step: int) -> str:
        """What tells a checkpoint's weights from others, from the checksums of its files; empty: it cannot be read."""
        folder = retention.folder_of(self.run, step)
        try:
            found = (folder / "meta.json").stat()
            key = (step, found.st_ino, found.st_mtime_ns)
            if key not in self._weights:
                files = checkpoint.read_meta(folder)["files"].items()
                sums = sorted((name, each["sha256"]) for name, each in files if ".weight." in name)
                self._weights[key] = hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:8]
            return self._weights[key]
        except (OSError, UserError):  # removed meanwhile, or damaged: whoever reads it finds out
            return ""

    def problem(self, step: int) -> str | None:
        """Why a checkpoint, pinned before, cannot be evaluated, after its weights have been read; None: all is well."""
        folder = retention.folder_of(self.run, step)
        try:
            meta = checkpoint.read_meta(folder)
            for engine in meta["engines"]:
                checkpoint.verify(folder, meta, f"{engine}.weight.")
        except UserError as error:
            if folder.is_dir():
                self._damaged.add((step, self.weights(step)))
                return str(error).partition(";")[0]
        return None if folder.is_dir() else "the training has removed it"

    def place(self, step: int) -> Path:
        """The folder for a checkpoint's results; one for each weights that a step has had."""
        return self.out / f"step_{step:06d}-{self.weights(step)}"

    def unpin(self) -> None:
        """Gives checkpoints that were read back to the training's rule."""
        known = [retention.folder_of(self.run, step) for step in retention.steps(self.run)]
        for folder in (*known, *retention.left(self.run)):
            for why in retention.pins(folder):
                if f" into {self.out}/step_" in why:
                    retention.unpin(folder, why)

    def sweep(self, but: Path) -> None:
        """Removes features of evaluations that were cut off, but those of one that goes on."""
        for folder in self.out.glob("step_*/features"):
            if folder.parent != but:
                shutil.rmtree(folder, ignore_errors=True)

    # --- figures ---------------------------------------------------------------------------------------------

    def add(self, record: dict, place: Path) -> bool:
        """Writes the figures of one more checkpoint, whose results are in `place`; False where the run went back behind
        it while it was looked at. Raises: UserError where OUT cannot be written any more."""
        step, weights = record["step"], place.name.rpartition("-")[2]
        if step > max(retention.steps(self.run), default=0) or self.weights(step) not in (weights, ""):
            return False
        run = self.run.resolve()
        inside = place.relative_to(run) if place.is_relative_to(run) else place
        record = record | {"weights": weights, "evaluated": str(inside)}
        figures = {name: record[name] for name in names(record)}
        try:
            board = Board(self.run / "tensorboard" / self.out.name, purge_step=self._purge)
            board.scalars(record["step"], {f"evaluated/{name}": value for name, value in figures.items()})
            board.close()
            self._purge = None
        except OSError as error:
            process.say(f"{self.run}/tensorboard: cannot be written ({error.strerror}); {self._path} has the figures")
        self.records = sorted([*self.records, record], key=lambda each: each["step"])
        self._write()
        self.share()
        return True

    def _write(self) -> None:
        try:
            with saved(self._path) as file:
                file.write(b"".join(_line(each) for each in self.records))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self._path}: cannot be written ({reason}); make room, then start again") from None

    def share(self) -> None:
        """Adds to RUN/metrics.jsonl the lines that it lacks, at once, where that can do no harm.

        The training appends to that file, and rewrites it when it goes back to a checkpoint, up to whose step it keeps
        all lines, ours too. Appends of one machine come one after the other, those of two may overwrite each other on
        a network file system: while the training is at work elsewhere nothing is added, that is made up for when it has
        ended. What is lost by a rewrite at the same moment is added at the next look.
        """
        status, path = run_folder.read_status(self.run), self.run / "metrics.jsonl"
        if status.get("state") == "running" and status.get("host") != socket.gethostname():
            return
        try:
            text = path.read_bytes()
            if text and not text.endswith(b"\n"):  # a line that a kill cut off; the training's next start drops it
                return
            there, newest = {*text.splitlines(keepends=True)}, max(retention.steps(self.run), default=0)
            lines = [_line(each) for each in self.records if each["step"] <= newest]
            if missing := b"".join(line for line in lines if line not in there):
                with open(path, "ab", buffering=0) as file:
                    file.write(missing)
        except OSError:  # OUT has them; the next look tries again
            return


def names(record: dict) -> list[str]:
    """Of the figures in a record."""
    return [name for name in record if name not in ("step", "n", "seconds", "weights", "evaluated")]


def _line(record: dict) -> bytes:
    """`seconds` in it tells it from a line about a held-out pass, which `run.owed` looks for."""
    return (json.dumps(record) + "\n").encode()


def _read(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); choose another --out") from None


def _records(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return sorted(records, key=lambda each: (int(each["step"]), str(each["weights"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); remove it, and all is evaluated anew") from None
