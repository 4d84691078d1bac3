"""The passport of a score: what is written is read again, and what differs is named."""

import copy
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mage_ds.errors import UserError
from mage_ds.report import passport

RESULTS = {
    "source": {"kind": "mage", "weights": "a" * 64, "labels": [1, 2]},
    "reference": {"fingerprint": "f"},
    "extractor": {"name": "run:mage", "hash": "h"},
    "options": {"metrics": ["fid"], "num": 500},
    "machine": {"device": "cpu"},
    "versions": {"torch": "2"},
    "code": {},
    "figures": {"fid": {"value": 12.5, "interval": [12.0, 13.0], "n": 500}},
    "remarks": ["few"],
}


def changed(*path, to):
    other = copy.deepcopy(RESULTS)
    inner = other
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return other


def test_written_and_read(tmp_path):
    numbers = changed("figures", "fid", "value", to=np.float64(12.5)) | {"more": {"bad": math.nan, "path": Path("/a")}}
    path = passport.write(tmp_path / "new", numbers)
    assert path == tmp_path / "new" / "results.json" and [*path.parent.iterdir()] == [path]
    read = passport.read(path.parent)
    assert read == {"format": 1, **RESULTS, "more": {"bad": None, "path": "/a"}}
    assert passport.difference(read, numbers) is None and passport.different_figure(read, numbers) is None


@pytest.mark.parametrize(
    "path, to, key",
    [
        (("source", "weights"), "b" * 64, "source.weights: aaa"),
        (("source", "labels"), [1, 3], "source.labels.1: 2 then, 3 now"),
        (("reference", "fingerprint"), None, "reference.fingerprint: f then, none now"),
        (("extractor", "hash"), "i", "extractor.hash: h then, i now"),
        (("options", "new"), 1, "options.new: none then, 1 now"),
    ],
)
def test_the_first_field_that_differs(path, to, key):
    said = passport.difference(RESULTS, changed(*path, to=to))
    assert said.startswith(key)
    assert passport.changes(RESULTS, changed(*path, to=to)) == []


def test_circumstances_are_remarks():
    other = changed("versions", "torch", to="3")
    assert passport.difference(RESULTS, other) is None
    assert passport.changes(RESULTS, other) == ["versions.torch: 2 then, 3 now"]


def test_figures_are_the_same_to_a_millionth():
    assert passport.different_figure(RESULTS, changed("figures", "fid", "value", to=12.5 * (1 + 9e-7))) is None
    said = passport.different_figure(RESULTS, changed("figures", "fid", "value", to=12.5 * (1 + 2e-6)))
    assert said.startswith("figures.fid.value: 12.5 then, 12.50002")
    said = passport.different_figure(RESULTS, changed("figures", "fid", "interval", to=None))
    assert said.startswith("figures.fid.interval.0: 12.0 then, none now")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1}'])
def test_no_passport(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is no passport of a score") as caught:
        passport.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, what", [('{"rows": 3}', "a sweep of several"), ('{"looks": []}', "a comparison of two")]
)
def test_a_passport_of_several(tmp_path, text, what):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"results.json: is {what} .*; name the results.json of one evaluation"):
        passport.read(path)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        passport.read(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        passport.write(tmp_path / "file", RESULTS)


def test_the_commit_of_a_checkout_and_of_none(tmp_path, monkeypatch):
    found = passport.circumstances()
    assert {"torch", "numpy", "mage_ds"} <= set(found["versions"]) and found["command"]

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)

    (tmp_path / "mage_ds" / "report").mkdir(parents=True)
    (tmp_path / "mage_ds" / "report" / "passport.py").write_text("")
    monkeypatch.setattr(passport, "__file__", str(tmp_path / "mage_ds" / "report" / "passport.py"))
    assert passport.circumstances()["code"] == {}
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert passport.circumstances()["code"] == {"commit": head, "changed": False}
    (tmp_path / "mage_ds" / "report" / "passport.py").write_text("x = 1")
    assert passport.circumstances()["code"]["changed"]
    inside = tmp_path / "site-packages" / "mage_ds" / "report"  # an installed package in somebody's checkout
    inside.mkdir(parents=True)
    monkeypatch.setattr(passport, "__file__", str(inside / "passport.py"))
    assert passport.circumstances()["code"] == {}
    monkeypatch.setenv("PATH", "")
    assert passport.circumstances()["code"] == {}
