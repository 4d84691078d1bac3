"""A wheel of the checkout holds all that an installed mage_ds needs, and setup.py says what it depends on."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mage_ds"

# Where a module has another name than the distribution that brings it.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "ffmpeg": "ffmpeg-python",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
}
# Declared though never imported by name: timm and torch.utils.tensorboard need the first two, the photographs of the
# third and the linear layers of the last are read as files.
INDIRECT = {"torchvision", "tensorboard", "scikit-image", "lpips"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the unpacked wheel, as pip would lay it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"  # building writes into the tree it builds
    for name in ("mage_ds", "ds_configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, copy],
        check=True,
        capture_output=True,
    )
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_package(installed):
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), path
    packed = {path.relative_to(installed).parts[0] for path in installed.rglob("*") if path.is_file()}
    assert {"mage_ds"} == {name for name in packed if not name.endswith(".dist-info")}  # no tests, no setup.py
    [info] = installed.glob("*.dist-info")
    assert "mage-ds = mage_ds.cli:entry" in (info / "entry_points.txt").read_text()
    assert "License: MIT" in (info / "METADATA").read_text()


def test_the_wheel_holds_the_deepspeed_configs(installed):
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    assert files
    for path in files:
        copy = installed / "mage_ds" / "ds_configs" / path.name
        assert json.loads(copy.read_text()) == json.loads(path.read_text())
    assert not (PACKAGE / "ds_configs").exists()  # in a checkout there is one place for them


def test_the_wheel_runs_from_anywhere(installed, tmp_path):
    code = (
        "import mage_ds, sys; from mage_ds.cli import main\n"
        f"assert mage_ds.__file__.startswith({str(installed)!r})\n"
        "sys.exit(main(['recipes', 'pretrain_vit_base']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(installed), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "1600 epochs" in done.stdout


def _literal(name: str):
    tree = ast.parse((ROOT / "setup.py").read_text())
    [value] = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == name]
    return ast.literal_eval(value)


def _imported() -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"mage_ds", "nvidia"}


def test_dependencies_are_those_that_the_code_imports():
    declared = {re.match(r"[\w-]+", line)[0] for line in _literal("REQUIRES")}
    assert {DISTRIBUTIONS.get(name, name) for name in _imported()} == declared - INDIRECT
    assert declared >= INDIRECT


def test_dali_stands_in_exactly_one_extra_each():
    extras = _literal("EXTRAS")
    dali = {name: [line for line in lines if "dali" in line] for name, lines in extras.items()}
    assert [line.split(">=")[0] for line in dali["cuda13"]] == ["nvidia-dali-cuda130"]
    assert [line.split(">=")[0] for line in dali["cuda12"]] == ["nvidia-dali-cuda120"]
    assert not any("dali" in line for line in _literal("REQUIRES")) and not dali["test"]


def test_the_package_is_lazy():
    code = (
        "import sys, mage_ds\n"
        "assert not {'torch', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert mage_ds.__version__\n"
        "try: mage_ds.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
