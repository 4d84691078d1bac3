"""A run's folder: opened, refused or resumed, and what it says about how the run ended."""

import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from mage_ds import recipes
from mage_ds.engine import checkpoint, launched, process
from mage_ds.errors import EXIT_BUG, EXIT_USER, Stopped, UserError, brief
from mage_ds.files import lock, saved
from mage_ds.recipes.schema import Recipe
from mage_ds.report import grids

_locked = None  # the open lock file of the run folder that this process trains in
_start = None  # what tells this start's status.json from another's
_VERSIONS = ("torch", "deepspeed", "timm", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


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
    text = json.dumps(status, indent=1) + "\n"
    try:
        write_aside(path / "status.json", text)
    except OSError:
        if state == "running":
            raise
        with suppress(OSError), open(path / "status.json", "r+") as file:  # a full disk has room for what is there
            file.write(text)
            file.truncate()


def read_status(path: Path) -> dict:
    try:
        return json.loads((path / "status.json").read_text())
    except (OSError, ValueError):
        return {}


# --- opening a folder for training ---------------------------------------------------------------------------


def choose_start(out: Path, recipe: Recipe, facts: dict, resume: str, extend: bool) -> Path | None:
    """The checkpoint folder that a start in `out` continues from, None for a new run. Creates nothing.

    resume: auto (the newest whole one), never, or the path of a checkpoint folder of this run.
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
    return checkpoint.newest_whole(out) if checkpoint.steps(out) else None


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
            f"--out {out}: its recipe has {key} = {brief(then.get(key))}, this one {brief(now.get(key))}; "
            f"{hint}choose another folder"
        )
    stored = read_facts(out)
    for key, what in (("data", "--data"), ("classes", "--data"), ("tokenizer", "--tokenizer"), ("encoder", "--init")):
        if stored.get(key) != facts.get(key):
            raise UserError(
                f"{what}: differs from the one that {out} was started with "
                f"({brief(stored.get(key))} there, {brief(facts.get(key))} here); choose another --out"
            )


def read_facts(out: Path) -> dict:
    """What a run was started with: fingerprint of the data, hashes of frozen models, ..."""
    try:
        return dict(json.loads((out / "facts.json").read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{out}/facts.json: cannot be read ({error}); copy the whole run folder again") from None


def own(start: str) -> None:
    """Every rank's share in a start: from here on an error of its is the run's."""
    global _start
    _start = start


def create(out: Path, recipe: Recipe, facts: dict, config: dict, copies: dict[str, Callable[[Path], None]]) -> str:
    """Write what a run stands on: recipe, configuration, environment, facts and its copies of frozen models.

    copies: the name of a folder -> what writes it, once in the life of a run. Called at every start by rank 0: machine
    fields may have changed. Returns what every rank passes to `own`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
        new = not (out / "recipe.yaml").exists()
        if new:
            write_aside(out / "facts.json", json.dumps(facts, indent=1) + "\n")
        write_aside(out / "ds_config.json", json.dumps(config, indent=1) + "\n")
        write_aside(out / "environment.json", json.dumps(environment(), indent=1) + "\n")
        for name, save in copies.items():
            if not new and (out / name).is_dir():
                continue
            aside = out / f".{name}.part"
            for stale in (aside, out / name):
                shutil.rmtree(stale, ignore_errors=True)
            save(aside)
            os.rename(aside, out / name)
        write_aside(out / "recipe.yaml", recipes.dump(recipe))  # last: with it the folder is a run folder
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
        file = open(out / ".lock", "w")  # noqa: SIM115 (open for as long as the process lives)
        if not lock(file):
            file.close()
            raise UserError(f"--out {out}: another process has just begun to train in it; stop it or wait")
        _locked = file


def _is_mine(out: Path) -> bool:
    return _locked is not None and not _locked.closed and Path(_locked.name) == out / ".lock"


def _busy(out: Path) -> bool:
    """Whether another living process holds the run folder."""
    if _is_mine(out):
        return False
    try:
        with open(out / ".lock", "r+") as file:  # NFS locks what may be written only
            return not lock(file)
    except OSError:  # no lock file yet
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
        "slurm": launched.slurm(),
    }


def load_recipe(run: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    return recipes.load_recipe(str(run / "recipe.yaml"))


def write_aside(path: Path, text: str) -> None:
    """Write a file so that it is the old or the new one, whole, at any moment."""
    with saved(path) as file:
        file.write(text.encode())
