"""Tasks that only show: the recipes, and what each of their fields says."""

import shutil
import textwrap

from mage_ds.recipes import load_recipe, recipe_file, recipe_names


def recipes(*, name: str | None = None) -> None:
    """Prints the packaged recipes, or one (by name or path) with the value and meaning of every field."""
    if name is None:
        _list()
    else:
        _show(name)


def _list() -> None:
    rows = [(each, load_recipe(each)) for each in recipe_names()]
    width = max(len(each) for each, _ in rows)
    for each, recipe in rows:
        print(f"{each:{width}}  {recipe.task:9}  {recipe.description}")
    print(f"\nEvery field of one: mage-ds recipes {rows[0][0]}")


def _show(name: str) -> None:
    recipe, path = load_recipe(name), recipe_file(name)
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        print(line)
    print()
    keys = max(len(leaf.key) for leaf in recipe.leaves())
    wide = max(40, shutil.get_terminal_size((160, 24)).columns)
    for leaf in recipe.leaves():
        start = f"{leaf.key:{keys}}  {_text(leaf.value):14}  {leaf.kind:8}  "
        print(textwrap.fill(start + leaf.meaning, wide, subsequent_indent=" " * min(keys + 28, wide - 30)))
    print(f"\nLearning rate in force: {recipe.effective_lr():g}")
    print("identity: must stay as it is when a run is continued; machine: may change. Override: key=value")


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{amount} {unit}" for unit, amount in value.items())
    if isinstance(value, list):
        return f"[{', '.join(f'{each:g}' for each in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
