"""Any number of workers on one folder, killed at any place: its files equal a single worker's, byte by byte."""

import hashlib
import json
import os
import random
import time
from types import SimpleNamespace

import forked
import made_export
import numpy as np
import pytest
import torch
from extract_workers import Extracting
from PIL import Image

import mage_ds
from mage_ds.engine import extracting, process
from mage_ds.engine.extractors import Extractor
from mage_ds.engine.sources import Source
from mage_ds.errors import UserError
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.sampling import claims

N, BATCH, SIDE = 70, 4, made_export.SIDE  # the last tile has padding


def same(made, other):
    forked.same(made, other)
    assert not (made / ".work").exists()


@pytest.fixture(scope="module")
def workers():
    with Extracting() as them:
        yield them


@pytest.fixture(scope="module")
def place(tmp_path_factory, workers):
    """Pictures, a network, `alone`: what one worker made of them, and how many changes of files that took."""
    root = tmp_path_factory.mktemp("extract")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
    for i in range(N):
        (root / "set" / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(root / "set" / f"class{i % 3}" / f"{i:03d}.png")
    network, log = made_export.make_export(root / "model"), root / "log"
    assert workers.run(root / "alone", root / "set", network, N, BATCH, log) == 0, log.read_text()
    order = np.argsort(np.arange(N) % 3, kind="stable")
    changes = int(log.read_text().split("changes: ")[1])
    return SimpleNamespace(root=root, source=root / "set", network=network, pixels=pixels[order], changes=changes)


def line(place, folder, log, n=N):
    return folder, place.source, place.network, n, BATCH, log


@pytest.mark.processes
def test_what_is_extracted(place):
    features = FeatureSet(place.root / "alone")
    names = ("index", "features", "labels", "sums", "sizes")
    found = dict(zip(names, map(np.concatenate, zip(*features.chunks(*names), strict=True)), strict=True))
    model = mage_ds.from_pretrained(place.network, device="cpu")
    expected = model.features(place.pixels, batch=BATCH).numpy()
    assert np.abs(found["features"] - expected).max() < 1e-5 < np.abs(expected[1:] - expected[:-1]).max()
    assert (found["index"] == np.arange(N)).all() and (found["labels"] == np.sort(np.arange(N) % 3)).all()
    assert [bytes(row) for row in found["sums"]] == [hashlib.sha256(each.tobytes()).digest() for each in place.pixels]
    assert (found["sizes"] == SIDE).all()


@pytest.mark.processes
def test_three_workers_of_which_one_is_killed(place, workers, tmp_path):
    out, log = tmp_path / "set", tmp_path / "log"
    others = [workers.start(*line(place, out, log)) for _ in range(2)]
    for _ in range(2):
        victim = workers.start(*line(place, out, log))
        time.sleep(random.uniform(0.1, 0.5))
        workers.kill(victim)
    others.append(workers.start(*line(place, out, log)))
    assert [workers.wait(pid) for pid in others] == [0, 0, 0], log.read_text()
    same(out, place.root / "alone")


@pytest.mark.processes
@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.full)])
def test_killed_anywhere(place, workers, tmp_path, rounds):
    """At a random change of a file in each of as many equal parts of the work as there are rounds."""
    for number in range(rounds):
        out, log = tmp_path / f"{number}", tmp_path / f"{number}.log"
        at = 1 + int(place.changes * random.uniform(number, number + 1) / rounds)
        assert workers.run(*line(place, out, log), kill_at=min(at, place.changes)) == -9, log.read_text()
        assert workers.run(*line(place, out, log)) == 0, (at, log.read_text())
        same(out, place.root / "alone")


@pytest.mark.processes
def test_a_larger_number_and_a_damaged_tile(place, workers, tmp_path):
    out, log = tmp_path / "set", tmp_path / "log"
    assert workers.run(*line(place, out, log, n=21)) == 0
    assert len(list((out / "tiles").iterdir())) == 6
    with open(out / "tiles" / "000008.npz", "r+b") as file:
        file.truncate(500)
    (out / "tiles" / "000012.npz").write_bytes(b"")  # what a machine that lost power leaves
    two = [workers.start(*line(place, out, log)), workers.start(*line(place, out, log, n=21))]
    assert [workers.wait(pid) for pid in two] == [0, 0], log.read_text()
    assert "000008.npz: damaged" in log.read_text()
    same(out, place.root / "alone")


@pytest.mark.processes
def test_a_worker_waits_for_the_living_only(place, workers, tmp_path):
    out, log = tmp_path / "set", tmp_path / "log"
    (out / ".work").mkdir(parents=True)
    mine, dead = out / ".work" / "000004", out / ".work" / "000008"
    owner = {"host": claims._host(), "pid": os.getpid(), "start": claims._started(os.getpid())}
    mine.write_text(json.dumps(owner))
    dead.write_text(json.dumps(owner | {"start": "1"}))  # another process had this number
    pid = workers.start(*line(place, out, log))
    end = time.monotonic() + 60
    while not log.exists() or "1 tiles are being made by other processes" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    assert not (out / "tiles" / "000004.npz").exists() and (out / "tiles" / "000008.npz").exists()
    mine.unlink()
    assert workers.wait(pid) == 0
    same(out, place.root / "alone")


@pytest.mark.processes
def test_what_is_wrong_is_one_line(place, workers, tmp_path):
    out, log = tmp_path / "set", tmp_path / "log"
    assert workers.run(*line(place, out, log, n=N + 1)) == 2
    assert f"has {N} pictures, {N + 1} are wanted" in log.read_text()
    other = made_export.make_export(tmp_path / "other", classes=2)
    assert workers.run(place.root / "alone", place.source, other, N, BATCH, log) == 2
    assert "holds features of other settings (extractor run:model there, run:other here; weights" in log.read_text()
    assert workers.run(place.root / "alone", place.source, place.network, N, 8, log) == 2
    assert "batch 4 there, 8 here" in log.read_text()


# --- in this process -------------------------------------------------------------------------------------------------


def mean_colour(seen):
    """An extractor whose features are each picture's mean colour; notes the batches that it saw."""

    def call(images):
        seen.append(len(images))
        return images.float().mean((2, 3)), images.float().amax((2, 3))[:, :2]

    return Extractor("mean", "0" * 64, 3, 2, call)


def painted(n, read=None, **more):
    read = read or (lambda index: np.repeat(index, 12).reshape(-1, 2, 2, 3).astype(np.uint8))
    facts = {"source": "painter", "height": 2, "width": 2}
    return Source(n, 2, np.arange(n) % 2, facts, read, **more)


@pytest.mark.parametrize("ahead", [True, False])
def test_padding_and_logits(tmp_path, ahead):
    process.start()
    seen, source = [], painted(10, ahead=ahead)
    extractor = mean_colour(seen)
    for n, batches in ((6, 2), (10, 2), (10, 0)):  # the tile [4, 8) is whole in the source
        features = FeatureSet.begin(tmp_path / "set", extracting.settings_of(source, extractor), n, 4)
        seen.clear()
        extracting.extract(features, source, extractor)
        assert seen == [4] * (batches - (n == 10 and batches > 0))
        columns = zip(*features.chunks("features", "logits", "labels"), strict=True)
        vectors, logits, labels = (np.concatenate(parts) for parts in columns)
        assert (
            (vectors == np.arange(n)[:, None]).all() and logits.shape == (n, 2) and (labels == np.arange(n) % 2).all()
        )
    assert len(features.read(np.arange(8, 12))["features"]) == 2


def test_a_painter_that_is_asked_for_more(tmp_path):
    """Its last tile had pictures beyond the end, whose labels nobody knew."""
    process.start()
    for n in (6, 10):
        source, extractor = painted(n), mean_colour([])
        features = FeatureSet.begin(tmp_path / "set", extracting.settings_of(source, extractor), n, 4)
        extracting.extract(features, source, extractor)
        (labels,) = (np.concatenate(parts) for parts in zip(*features.chunks("labels"), strict=True))
        assert (labels == np.arange(n) % 2).all()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_broken_picture_leaves_no_claims(tmp_path, ahead):
    process.start()

    def read(index):
        if 9 in index:
            raise UserError("9.png: is no readable picture")
        return np.zeros((len(index), 2, 2, 3), np.uint8)

    source, extractor = painted(40, read, ahead=ahead), mean_colour([])
    features = FeatureSet.begin(tmp_path / "set", extracting.settings_of(source, extractor), 40, 4)
    with pytest.raises(UserError, match=r"9\.png"):
        extracting.extract(features, source, extractor)
    assert not list(features.work.iterdir()) and features.done(np.arange(4))
    extracting.extract(features, painted(40), extractor)
    assert not features.missing()


def test_what_features_depend_on():
    process.start()
    settings = extracting.settings_of(painted(4), mean_colour([]))
    assert {key: settings[key] for key in ("extractor", "weights", "width", "logits", "device")} == {
        "extractor": "mean",
        "weights": "0" * 64,
        "width": 3,
        "logits": 2,
        "device": "cpu",
    }
    assert settings["source"]["source"] == "painter" and settings["threads"] == torch.get_num_threads()
    json.dumps(settings)
