"""A run's folder: opened, refused or resumed; what it logs, saves and says about how it ended."""

import fcntl
import json
import math
import os
import platform
import shutil
import socket
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from mage_ds import recipes
from mage_ds.engine import checkpoint, process
from mage_ds.errors import EXIT_BUG, EXIT_USER, Stopped, UserError
from mage_ds.recipes.schema import Recipe
from mage_ds.report import grids
from mage_ds.report.progress import Progress
from mage_ds.report.tensorboard import Board

_locked = None  # the open lock file of the run folder that this process trains in
_start = None  # what tells this start's status.json from another's
_VERSIONS = ("torch", "deepspeed", "timm", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


class Run:
    """A training's folder. `step` completed steps, `position` samples of the stream they saw, `saved` the newest
    checkpoint's step, `skipped` steps without a finite gradient."""

    def __init__(self, path: Path, recipe: Recipe, facts: dict, *, steps: int, dataset: int):
        self.path, self.recipe, self.facts, self.steps = path, recipe, facts, steps
        self.seed, self.step, self.saved, self.skipped = recipe.seed, 0, 0, 0
        self._first = process.start().first
        self._every = {
            what: recipes.resolve(getattr(recipe.report, f"{what}_every"), samples=dataset, batch=recipe.batch)
            for what in ("evaluate", "pictures", "checkpoint")
        }
        self._progress = self._metrics = self._board = None

    @property
    def position(self) -> int:
        return self.step * self.recipe.batch

    # --- starting --------------------------------------------------------------------------------------------

    def resume(self, engines: dict, folder: Path | None, meta: dict | None = None) -> None:
        """Set the engines to a checkpoint (None: start at step 0) and drop what was logged after it.

        meta: the checkpoint's, where its files have been verified already.
        """
        if folder is not None:
            meta = checkpoint.load(folder, engines, meta)
            self.step = self.saved = meta["step"]
            self.skipped = meta["skipped"]
            process.say(f"resumed {self.path} at step {self.step} from {folder.name}")
        process.on_first(self._rewind)

    def _rewind(self) -> None:
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= self.step]
            _write_aside(path, "".join(f"{line}\n" for line in kept))

    def begin(self, *, flops_per_image: float | None, peak_flops: float | None) -> None:
        """Open the logs; from here on the run is `running`."""
        self._progress = Progress(
            self.steps,
            self.step,
            images_per_step=self.recipe.batch,
            flops_per_image=flops_per_image,
            peak_flops=peak_flops,
            console=self._first,
        )
        if self._first:
            self._metrics = open(self.path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
            self._board = Board(self.path / "tensorboard", purge_step=self.step + 1)
        self._status("running")

    # --- while it runs ---------------------------------------------------------------------------------------

    def log_due(self, step: int) -> bool:
        return step % self.recipe.report.log_every == 0 or step in (1, self.steps)

    def due(self, what: str, step: int) -> bool:
        every = self._every[what]
        return step == self.steps or (every > 0 and step % every == 0)

    def end_of_step(self, step: int, engines: dict, figures: dict, evaluate, pictures) -> None:
        """After `step` completed steps: log, evaluate, draw, save, each when it is due. All ranks call it."""
        self.step = step
        self._progress.advance(step)
        if figures:
            self._log(self._progress.record(step, figures))
        if evaluate and self.due("evaluate", step):
            self._log_evaluation(step, evaluate(engines, step))
        if pictures and self.due("pictures", step):
            self._draw(step, pictures(engines, step))
        if self.due("checkpoint", step):
            self.save(engines)

    def _log(self, record: dict) -> None:
        if self._first:
            self._metrics.write(json.dumps(record) + "\n")
            self._board.scalars(record["step"], {f"train/{key}": value for key, value in record.items()})
            self._progress.show(record)

    def _log_evaluation(self, step: int, figures: dict) -> None:
        if self._first and figures:
            plain = {key: value if math.isfinite(value) else None for key, value in figures.items()}
            self._metrics.write(json.dumps({"step": step, **plain}) + "\n")
            self._board.scalars(step, figures)
            shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
            self._progress.say(f"step {step:{len(str(self.steps))}d}/{self.steps}  {shown}")

    def _draw(self, step: int, picture) -> None:
        if self._first and picture is not None:
            (self.path / "pictures").mkdir(exist_ok=True)
            grids.save(picture, self.path / "pictures" / f"step_{step:06d}.png")
            self._board.picture(step, "pictures", picture)

    def save(self, engines: dict) -> None:
        """Publish a checkpoint of the last completed step, unless it is there already."""
        if self.saved == self.step:
            return
        facts = {"position": self.position, "skipped": self.skipped, **self.facts}
        checkpoint.save(self.path, self.step, engines, facts, keep=self.recipe.report.keep)
        self.saved = self.step
        self._status("running")

    # --- ending ----------------------------------------------------------------------------------------------

    def stop(self, reason: str, engines: dict) -> None:
        """Save the last completed step because of `reason`; the open accumulation is left behind."""
        process.say(f"{reason}: stopping; saving step {self.step}")
        if self.step:
            self.save(engines)
        if self._first:
            self._board.close()

    def finish(self) -> None:
        """Close the logs of a run that reached its last step, and draw its loss curve."""
        process.say(self._progress.summary())
        if self._first:
            self._board.close()
            self._metrics.close()
            close_books(self.path, step=self.step, steps=self.steps)
        process.barrier()

    def _status(self, state: str, reason: str = "") -> None:
        if self._first:
            write_status(self.path, state, reason, step=self.step, steps=self.steps)


def close_books(path: Path, **facts) -> None:
    """The last acts of a run: its loss curve, and the word `finished`. Also for one that was killed before them."""
    (path / "pictures").mkdir(exist_ok=True)
    grids.loss_curve(path / "metrics.jsonl", path / "pictures" / "loss.png")
    write_status(path, "finished", **facts)


@contextmanager
def ending(path: Path):
    """Writes down how a run ended where it did not finish: stopped, or failed and why."""
    try:
        yield
    except Stopped as stopped:
        if process.start().first:
            write_status(path, "stopped", str(stopped))
        raise
    except BaseException as error:
        before = read_status(path)
        mine = _start is not None and before.get("start") == _start
        first = "exit_code" not in before or not mine  # of several ranks the one that failed first says why
        if first and before and (mine or not _busy(path)):
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            # A start that was refused leaves a finished or stopped run what it is.
            state = "failed" if mine or before.get("state") == "running" else before["state"]
            write_status(path, state, reason, exit_code=EXIT_USER if isinstance(error, UserError) else EXIT_BUG)
        raise


def write_status(path: Path, state: str, reason: str = "", **facts) -> None:
    """`status.json`: running, finished, stopped or failed, with the step and the reason."""
    status = read_status(path) | facts | {"state": state, "reason": reason, "time": round(time.time(), 3)}
    status |= {"host": socket.gethostname(), "pid": os.getpid()}
    if "exit_code" not in facts:
        status.pop("exit_code", None)
    try:
        _write_aside(path / "status.json", json.dumps(status, indent=1) + "\n")
    except OSError:
        if state == "running":
            raise


def read_status(path: Path) -> dict:
    try:
        return json.loads((path / "status.json").read_text())
    except (OSError, ValueError):
        return {}


# --- opening a folder for training ---------------------------------------------------------------------------


def choose_start(out: Path, recipe: Recipe, facts: dict, resume: str, extend: bool) -> Path | None:
    """The checkpoint folder that a start in `out` continues from, None for a new run. Creates nothing.

    resume: auto, never, or the path of a checkpoint folder of this run.
    Raises UserError where `out` holds another run: the line says what differs.
    """
    if not (out / "recipe.yaml").exists():
        strange = out.exists() and not (out / "facts.json").exists() and any(out.glob("[!.]*"))
        if strange or (out.exists() and not out.is_dir()):
            raise UserError(f"--out {out}: exists and is no run folder; choose an empty or new folder")
        if resume not in ("auto", "never"):
            raise UserError(f"--resume {resume}: {out} is no run folder yet; leave --resume out")
        return None
    if resume == "never":
        raise UserError(f"--out {out}: already holds a run; choose another folder, or --resume auto")
    _refuse_differences(out, recipe, facts, extend)
    if resume != "auto":
        folder = Path(resume)
        if folder.resolve().parent != (out / "checkpoints").resolve() or not (folder / "meta.json").exists():
            raise UserError(f"--resume {resume}: must be auto, never or a checkpoint folder in {out}/checkpoints")
        return folder
    return checkpoint.find(out) if checkpoint.steps(out) else None


def _refuse_differences(out: Path, recipe: Recipe, facts: dict, extend: bool) -> None:
    before = load_recipe(out)
    then, now = before.identity(), recipe.identity()
    for key in sorted(set(then) | set(now)):
        if then.get(key) == now.get(key):
            continue
        if key == "duration" and extend:
            continue
        hint = "add --extend to train longer, or " if key == "duration" else ""
        raise UserError(
            f"--out {out}: its recipe has {key} = {_brief(then.get(key))}, this one {_brief(now.get(key))}; "
            f"{hint}choose another folder"
        )
    stored = json.loads((out / "facts.json").read_text())
    for key, what in (("data", "--data"), ("tokenizer", "--tokenizer")):
        if stored.get(key) != facts.get(key):
            raise UserError(
                f"{what}: differs from the one that {out} was started with "
                f"({_brief(stored.get(key))} there, {_brief(facts.get(key))} here); choose another --out"
            )


def _brief(value) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def own(start: str) -> None:
    """Every rank's share in a start: from here on an error of its is the run's."""
    global _start
    _start = start


def create(out: Path, recipe: Recipe, facts: dict, config: dict, save_tokenizer) -> str:
    """Write what a run stands on: recipe, configuration, environment, facts and its copy of the tokenizer.

    Called at every start by rank 0: machine fields may have changed. Returns what every rank passes to `own`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
        new = not (out / "recipe.yaml").exists()
        if new:
            _write_aside(out / "facts.json", json.dumps(facts, indent=1) + "\n")
        _write_aside(out / "ds_config.json", json.dumps(config, indent=1) + "\n")
        _write_aside(out / "environment.json", json.dumps(environment(), indent=1) + "\n")
        if save_tokenizer is not None and new:
            aside = out / ".tokenizer.part"
            for stale in (aside, out / "tokenizer"):
                shutil.rmtree(stale, ignore_errors=True)
            save_tokenizer(aside)
            os.rename(aside, out / "tokenizer")
        _write_aside(out / "recipe.yaml", recipes.dump(recipe))  # last: with it the folder is a run folder
        start = f"{socket.gethostname()} {os.getpid()} {time.time():.3f}"
        write_status(out, "running", start=start)
        return start
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}); choose another folder") from None


def _lock(out: Path) -> None:
    """Keep other starts out of the folder while this process lives; the lock dies with it, however it dies."""
    global _locked
    if _busy(out):
        raise UserError(f"--out {out}: another process is training in it; wait for it or stop it")
    if not _is_mine(out):
        _locked = open(out / ".lock", "w")  # noqa: SIM115 (open for as long as the process lives)
        try:
            fcntl.flock(_locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another process has just begun to train in it; stop it or wait") from None
        except OSError:
            pass  # a file system without locks


def _is_mine(out: Path) -> bool:
    return _locked is not None and not _locked.closed and Path(_locked.name) == out / ".lock"


def _busy(out: Path) -> bool:
    """Whether another living process holds the run folder."""
    if _is_mine(out):
        return False
    try:
        with open(out / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file yet, or no locks
        pass
    return False


def environment() -> dict:
    """Versions and machine, for the record."""
    versions = {}
    for name in ("mage_ds", *_VERSIONS):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    me = process.start()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "host": socket.gethostname(),
        "machine": platform.platform(),
        "device": str(me.device),
        "world_size": me.world,
    }


def load_recipe(run: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    return recipes.load_recipe(str(run / "recipe.yaml"))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut off


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
