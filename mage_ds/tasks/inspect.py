"""Tasks that only show: the recipes, and what each of their fields says."""

import os
import shutil
import sys
import textwrap

from mage_ds.recipes import load_recipe, recipe_file, recipe_names


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
