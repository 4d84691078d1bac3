"""Weights that a new run begins with (--init): needed until its first checkpoint is saved, and not kept in it."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from mage_ds.engine import checkpoint, process, run_folder
from mage_ds.errors import UserError


def given(
    init: str | None, out: Path, load: Callable[[str], tuple[nn.Module, dict]]
) -> tuple[nn.Module | None, dict, dict]:
    """The model whose weights a run begins with (None: it continues, or begins with initial values), what `load` says
    of it, and the fact that is recorded: {"init": its path and hash}. A run that exists knows its own; all ranks call
    it.

    load(path): opens and checks it, and says of it {"hash": of its weights, ...}. Raises UserError where it is not the
    one that the run began with.
    """
    known, saved = process.on_first(lambda: (_facts(out), bool(checkpoint.steps(out))))
    path = init and _absolute(init)
    before = known.get("init") if known else None
    if known and path and path != (before or {}).get("path"):
        began = f"began with {before['path']}" if before else "began without --init"
        raise UserError(f"--init {init}: the run {out} {began}; leave --init out, or choose another --out")
    path = path or (before or {}).get("path")
    if saved or path is None:
        return None, {}, {"init": before} if before else {}
    model, info = load(init or path)
    if before and before["hash"] != info["hash"]:
        raise UserError(f"--init {path}: its weights changed since {out} began with them; choose another --out")
    return model, info, {"init": {"path": path, "hash": info["hash"]}}


def _facts(out: Path) -> dict | None:
    """What a run folder was started with; None where there is no run."""
    return run_folder.read_facts(out) if (out / "recipe.yaml").is_file() else None


def _absolute(init: str) -> str:
    """Of a path; `mae:FILE` and `timm:NAME` stay what they are."""
    return init if init.startswith(("mae:", "timm:")) else str(Path(init).resolve())
