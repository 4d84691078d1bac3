"""The house: who may import whom, read from the source; nothing is run."""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "mage_ds"

# A room imports its own modules and those of rooms with a lower number.
LAYERS = {
    "errors": 0,
    "keyed": 0,
    "files": 1,
    "recipes": 1,
    "models": 2,
    "inputs": 2,
    "sampling": 3,
    "evaluation": 3,
    "report": 3,
    "interop": 3,
    "engine": 4,
    "pretrained": 5,
    "tasks": 6,
    "arguments": 5,
    "bench_arguments": 6,
    "cli": 7,
    "__main__": 8,
}


class Import(NamedTuple):
    importer: str  # "mage_ds.engine.loop"
    imported: str  # a module where it can be told from a name in one
    inside: bool  # in a function: happens at call time


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def _targets(node: ast.AST, importer: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = importer.split(".") if MODULES[importer].name == "__init__.py" else importer.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            return [node.args[0].value]
    return []


def _walk(node: ast.AST, importer: str, inside: bool):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        for target in _targets(child, importer):
            yield Import(importer, target, inside)
        yield from _walk(child, importer, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def imports() -> list[Import]:
    found = []
    for name, path in MODULES.items():
        found += _walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), name, False)
    return found


IMPORTS = imports()


def module_of(target: str) -> str:
    """mage_ds.engine.loop.train -> mage_ds.engine.loop"""
    while target not in MODULES and "." in target:
        target = target.rpartition(".")[0]
    return target


def room(module: str) -> str | None:
    """mage_ds.engine.loop -> engine; None for mage_ds itself, which anyone may import."""
    return module.split(".")[1] if "." in module else None


OURS = [found for found in IMPORTS if found.imported.split(".")[0] == "mage_ds"]


def named(found: list[Import]) -> list[str]:
    return [f"{each.importer} imports {each.imported}" for each in found]


def test_the_reader_sees_imports():
    seen = {(each.importer, module_of(each.imported)) for each in IMPORTS}
    assert ("mage_ds.recipes.load", "mage_ds.recipes.schema") in seen
    assert ("mage_ds.cli", "mage_ds.errors") in seen
    assert any(each.inside for each in IMPORTS) and not all(each.inside for each in IMPORTS)


def test_every_room_has_a_layer():
    assert {room(module) for module in MODULES if room(module)} <= set(LAYERS)


def test_order_of_the_layers():
    wrong = []
    for each in OURS:
        here, there = room(each.importer), room(module_of(each.imported))
        if here and there and here != there and LAYERS[there] >= LAYERS[here]:
            wrong.append(each)
    assert not named(wrong)


def test_models_import_models_only():
    assert not named(
        [x for x in OURS if room(x.importer) == "models" and room(module_of(x.imported)) not in ("models", None)]
    )


def test_only_the_cli_imports_tasks_and_no_task_another():
    wrong = [
        each
        for each in OURS
        if room(module_of(each.imported)) == "tasks" and room(each.importer) not in ("cli", None)
        if module_of(each.imported) != "mage_ds.tasks"
    ]
    assert not named(wrong)


@pytest.mark.parametrize(
    "library, home", [("deepspeed", "mage_ds.engine."), ("nvidia", "mage_ds.inputs.dali")], ids=["deepspeed", "dali"]
)
def test_heavy_libraries_stay_at_home_and_are_imported_at_call_time(library, home):
    found = [each for each in IMPORTS if each.imported.split(".")[0] == library]
    assert not named([each for each in found if not each.importer.startswith(home)])
    assert not named([each for each in found if not each.inside])


def test_light_modules_import_no_torch():
    light = ("errors", "keyed", "recipes", "cli", "__main__", None)
    heavy = ("torch", "torchvision", "timm", "sklearn", "skimage", "matplotlib", "scipy")
    assert not named([x for x in IMPORTS if room(x.importer) in light and x.imported.split(".")[0] in heavy])


def test_no_cycles():
    """Between modules, imports at call time included: a cycle is two rooms that are one."""
    graph = {name: set() for name in MODULES}
    for each in OURS:
        target = module_of(each.imported)
        # A package's __init__ gathers its modules, which may name the package's other modules.
        if target != each.importer and not each.importer.startswith(f"{target}."):
            graph[each.importer].add(target)
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_size_of_files():
    long = {name: n for name, path in MODULES.items() if (n := len(path.read_text().splitlines())) > 450}
    assert not long
