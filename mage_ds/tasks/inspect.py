"""Tasks that only show: the recipes and what each of their fields says, and the checkpoints of a run."""

import os
import shutil
import sys
import textwrap
import time
from pathlib import Path

from mage_ds.engine import retention
from mage_ds.errors import UserError
from mage_ds.recipes import load_recipe, recipe_file, recipe_names, resolve
from mage_ds.report.progress import duration


def recipes(*, name: str | None = None) -> None:
    """Prints the packaged recipes, or one (by name or path) with the value and meaning of every field."""
    lines = _list() if name is None else _fields(name)
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader (head, less) has seen enough; Python must not flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _list() -> list[str]:
    rows = [(each, load_recipe(each)) for each in recipe_names()]
    width = max(len(each) for each, _ in rows)
    lines = [f"{each:{width}}  {recipe.task:9}  {recipe.description}" for each, recipe in rows]
    return [*lines, "", f"Every field of one: mage-ds recipes {rows[0][0]}"]


def _fields(name: str) -> list[str]:
    recipe = load_recipe(name)
    lines = []
    for line in recipe_file(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    lines.append("")
    keys = max(len(leaf.key) for leaf in recipe.leaves())
    wide = max(40, shutil.get_terminal_size((160, 24)).columns)
    for leaf in recipe.leaves():
        start = f"{leaf.key:{keys}}  {_text(leaf.value):14}  {leaf.kind:8}  "
        lines.append(textwrap.fill(start + leaf.meaning, wide, subsequent_indent=" " * min(keys + 28, wide - 30)))
    lines += ["", f"Learning rate in force: {recipe.effective_lr():g}"]
    lines.append("identity: must stay as it is when a run is continued; machine: may change. Override: key=value")
    return lines


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{amount} {unit}" for unit, amount in value.items())
    if isinstance(value, list):
        return f"[{', '.join(f'{each:g}' for each in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- checkpoints ---------------------------------------------------------------------------------------------


def checkpoints(run, *, verify: bool = False) -> None:
    """Prints the checkpoints of a run folder: step, epoch, size, age, what keeps each, and whether it is whole.

    verify: read every file and compare its checksum; else its size only. Raises UserError, after the table, where one
    is damaged: the line names the file.
    """
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: is no run folder (it has no recipe.yaml)")
    folders = [retention.folder_of(run, step) for step in retention.steps(run)]
    left = retention.left(run)
    if not folders + left:
        print(f"{run}: no checkpoint yet")
        return
    recipe = load_recipe(str(run / "recipe.yaml"))
    report = recipe.report
    checked = _checked(folders + left, verify)
    rows = [["step", "epoch", "sample", "size", "saved", "checked", ""]]
    for i, folder in enumerate(folders + left):
        meta, problem = checked[folder]
        notes = ["left behind: the run went back"] if folder in left else []
        notes += (
            [f"newest {len(folders) - i} of {report.keep}"] if len(folders) - i in range(1, report.keep + 1) else []
        )
        notes += ["kept for good"] if _for_good(report, retention.step_of(folder), recipe.batch, meta) else []
        notes += [f"pinned: {', '.join(retention.pins(folder))}"] if retention.pins(folder) else []
        state = "DAMAGED" if problem else "checksums" if verify else "sizes"
        rows.append([*_facts(folder, meta), state, "; ".join(notes)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for *cells, last in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)) + f"  {last}".rstrip())
    damaged = [problem for _, problem in checked.values() if problem]
    if damaged:
        more = f" ({len(damaged)} are damaged)" if len(damaged) > 1 else ""
        raise UserError(f"{damaged[0]}{more}")


def _checked(folders: list[Path], verify: bool) -> dict[Path, tuple[dict | None, str | None]]:
    """folder -> (meta, problem): meta is None where it cannot be read, problem None where all is well."""
    from tqdm import tqdm

    from mage_ds.engine import checkpoint

    found = {}
    for folder in folders:
        try:
            found[folder] = (checkpoint.read_meta(folder), None)
        except UserError as error:
            found[folder] = (None, str(error))
    whole = sum(_size(meta) for meta, _ in found.values() if meta) if verify else 0
    bar = tqdm(total=whole, unit="B", unit_scale=True, desc="reading", disable=None if whole else True)
    with bar:
        for folder, (meta, _) in found.items():
            if meta is None:
                continue
            try:
                checkpoint.verify(folder, meta, advance=bar.update, read=verify)
            except UserError as error:
                found[folder] = (meta, str(error))
    return found


def _for_good(report, step: int, batch: int, meta: dict | None) -> bool:
    """Whether this is one of those that `report.keep_every` keeps."""
    if not meta or not meta.get("dataset") or not report.keep_every:
        return False
    every = report.keep_every * resolve(report.checkpoint_every, samples=meta["dataset"], batch=batch)
    return every > 0 and step % every == 0


def _size(meta: dict) -> int:
    return sum(file["bytes"] for file in meta["files"].values())


def _facts(folder: Path, meta: dict | None) -> list[str]:
    """Step, epoch, sample of the epoch, size and age of a checkpoint, as text."""
    step = str(retention.step_of(folder))
    if meta is None:
        return [step, "?", "?", "?", "?"]
    n, position = meta.get("dataset"), meta.get("position", 0)
    epoch, sample = (f"{position // n}", f"{position % n:,}") if n else ("?", f"{position:,} of all")
    age = duration(time.time() - (folder / "meta.json").stat().st_mtime)
    return [step, epoch, sample, f"{_size(meta) / 1e6:,.1f} MB", f"{age} ago"]
