"""Which checkpoints a run has, and which of them stay: the newest, every so many, and whatever somebody has used."""

import os
import re
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

from mage_ds.errors import UserError

_NAME = re.compile(r"step_(\d{6,})")
_LEFT = re.compile(r"step_(\d{6,})\.left\d+")
_PIN = "pinned"  # a text file in the checkpoint's folder: who used it, a line each; removing it takes the pin off


# --- finding -------------------------------------------------------------------------------------------------


def steps(run: Path) -> list[int]:
    """The published checkpoints' steps, rising. Half-written ones have another name, and so have those left behind."""
    return sorted(int(_NAME.fullmatch(name)[1]) for name in _names(run, _NAME))


def left(run: Path) -> list[Path]:
    """Folders of checkpoints that the run went back behind: no start continues from them."""
    return [Path(run) / "checkpoints" / name for name in sorted(_names(run, _LEFT))]


def _names(run: Path, form: re.Pattern) -> list[str]:
    folder = Path(run) / "checkpoints"
    entries = folder.iterdir() if folder.is_dir() else ()
    return [entry.name for entry in entries if form.fullmatch(entry.name) and entry.is_dir()]


def folder_of(run: Path, step: int) -> Path:
    return Path(run) / "checkpoints" / f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder, also of one that was left behind."""
    return int(folder.name.partition(".")[0].removeprefix("step_"))


def find(run: Path, step: int | None = None) -> Path:
    """The folder of one checkpoint, the newest without `step`. Raises UserError where there is none."""
    known = steps(run)
    if not known:
        raise UserError(f"{run}: has no checkpoint yet; train it first")
    if step is None:
        step = known[-1]
    if step not in known:
        raise UserError(f"--checkpoint {step}: not in {run}; there are {', '.join(map(str, known))}")
    return folder_of(run, step)


# --- keeping -------------------------------------------------------------------------------------------------


def pin(folder: Path, why: str) -> bool:
    """Keep this checkpoint whatever the rule says, because of `why`, one line. False where it cannot be written."""
    try:
        if why not in pins(folder):
            with open(folder / _PIN, "a") as file:
                file.write(f"{why}\n")
        return True
    except OSError:
        return False


def unpin(folder: Path, why: str) -> None:
    """Take back a pin of ours. Its line becomes a blank one where it stands, so that a pin that somebody else adds at
    the same time is not lost."""
    with suppress(OSError), open(folder / _PIN, "r+b") as file:
        at = 0
        for line in file.read().splitlines(keepends=True):
            if line == f"{why}\n".encode():
                file.seek(at)
                file.write(b" " * (len(line) - 1))
            at += len(line)


def pins(folder: Path) -> list[str]:
    """Why a checkpoint is pinned; empty where it is not."""
    try:
        return [line for line in (folder / _PIN).read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        return []


def prune(run: Path, saved: int, keep: int, keep_every: int) -> None:
    """Keep the `keep` newest, those whose step is a multiple of `keep_every` (0: none), and the pinned ones.

    saved: the step that was saved just now. What lies beyond was left behind by a resume from an older checkpoint:
    the next start must not take it for this run's.
    """
    with suppress(OSError):  # one too many does no harm
        leave_behind(run, saved)
        for step in steps(run)[:-keep]:
            if not (keep_every and step % keep_every == 0) and not pins(folder_of(run, step)):
                remove(folder_of(run, step))
        for folder in left(run):
            if not pins(folder):
                remove(folder)


def leave_behind(run: Path, step: int) -> None:
    """Take checkpoints beyond `step` out of the run, under another name; the next save removes the unpinned ones."""
    for beyond in steps(run):
        if beyond > step:
            folder = folder_of(run, beyond)
            names = (folder.with_name(f"{folder.name}.left{n}") for n in count(1))
            os.rename(folder, next(name for name in names if not name.exists()))


def remove(folder: Path) -> None:
    """Remove a checkpoint; never half of one stays under a good name."""
    gone = folder.with_name(f".{folder.name}.gone")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)
