"""The quickstart as a user runs it, and the goal that it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(folder: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "launch" / "quickstart.sh"), "--classes", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)


@pytest.mark.full
@pytest.mark.processes
def test_goal(tmp_path):
    first = start(tmp_path / "q")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    results = json.loads((tmp_path / "q" / "samples" / "results.json").read_text())
    samples = results["readable"]["rows"]["samples"]
    assert samples["pictures"] == 256
    assert samples["readable"] >= 0.80
    assert min(samples["classes"]) >= 0.04
    assert len(samples["classes"]) == 10
    assert len(list((tmp_path / "q" / "samples").glob("[0-9]*.png"))) == 256
    results = json.loads((tmp_path / "q" / "samples_by_class" / "results.json").read_text())
    assert results["readable"]["rows"]["samples"]["right"] >= 0.85  # read as the digit that was asked for
    # Every file that the closing screen names is there.
    words = [word for word in first.stdout.split() if word.startswith(str(tmp_path))]
    named = [word for word in words if word.endswith((".png", ".json"))]
    assert len(named) >= 5
    assert all(Path(name).is_file() for name in named)

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "q").rglob("*") if path.is_file()}
    again = start(tmp_path / "q")
    assert again.returncode == 0
    assert "all is done already" in again.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "q").rglob("*") if path.is_file()}
