"""prepare on tars, and what it says where a split or a place is not as asked for."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.inputs.catalog import open_catalog
from mage_ds.tasks.prepare import prepare

SIDE = 20


def jpeg(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE + seed, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def tars(tmp_path):
    """Two shards of 10 samples with labels 0, 2, ..., 10; one picture and one shard are broken, one member a link."""
    made = tmp_path / "made"
    for k in range(20):
        jpeg(made / f"{k:03d}.jpg", k)
        (made / f"{k:03d}.cls").write_text(str(2 * (k % 6)))
    (made / "007.jpg").write_bytes((made / "007.jpg").read_bytes()[:-20])
    os.symlink("/etc/passwd", made / "link.jpg")
    src = tmp_path / "src"
    src.mkdir()
    for shard, numbers in (("a-0.tar", range(10)), ("a-1.tar", range(10, 20))):
        with tarfile.open(src / shard, "w:") as file:
            for k in numbers:
                for ending in ("jpg", "cls"):
                    file.add(made / f"{k:03d}.{ending}", f"{k:03d}.{ending}")
            file.add(made / "link.jpg", "link.jpg")
    (src / "a-2.tar").write_bytes((src / "a-1.tar").read_bytes()[:3000])
    return src


def test_looks_at_tars(tars, capsys):
    prepare(tars)
    text = capsys.readouterr().out
    for part in (
        "20 pictures in 2 tars",
        "11 classes (0 4, 10 3, 2 4, 4 3, 6 3, 8 3)",
        "20 x 20 smallest",
        "broken   1 ",
        "007.jpg: truncated",
        "tars     1 damaged",
        "a-2.tar: truncated",
        "skipped  2 links in tars",
    ):
        assert part in text, text


def test_tars_become_class_folders(tars, tmp_path):
    out = tmp_path / "out"
    prepare(tars, out=out, val_fraction=0.3)
    train, val = open_catalog(out, "train"), open_catalog(out, "val")
    assert train.classes == val.classes == [f"{k:02d}" for k in range(11)]  # 1, 3, ... have no picture, yet a place
    source = open_catalog(tars, check=True)
    want = {source.name(i): (source.label(i), source.read(i)) for i in range(source.n)}
    del want["007.jpg"]
    made = {Path(c.name(i)).name: (c.label(i), c.read(i)) for c in (train, val) for i in range(c.n)}
    assert made == want and val.n > 0


def test_names_out_of_tars_stay_within(tmp_path):
    picture = jpeg(tmp_path / "1.jpg", 1)
    (tmp_path / "src").mkdir()
    with tarfile.open(tmp_path / "src/0.tar", "w:") as file:
        for name in ("../../evil.jpg", "/tmp/mage_ds_evil.jpg", "cat/./good.jpg", "good.jpg"):
            info = file.gettarinfo(picture)
            info.name = name
            with open(picture, "rb") as data:
                file.addfile(info, data)
    prepare(tmp_path / "src", out=tmp_path / "a/b/out", val_fraction=0)
    made = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "a").rglob("*.jpg"))
    assert made == ["a/b/out/train/cat/good.jpg", "a/b/out/train/good.jpg"]
    assert not list(tmp_path.rglob("evil.jpg")) and not os.path.exists("/tmp/mage_ds_evil.jpg")


def test_splits_of_tars_are_kept(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    for split in ("train", "val"):
        jpeg(tmp_path / "cat/1.jpg", 1)
        with tarfile.open(src / f"cats-{split}-00.tar", "w:") as file:
            file.add(tmp_path / "cat/1.jpg", "cat/1.jpg")
    prepare(src, out=tmp_path / "out")
    assert (tmp_path / "out/train/cat/1.jpg").exists() and (tmp_path / "out/val/cat/1.jpg").exists()


def test_a_share_of_a_lone_train_folder_is_held_out(tmp_path):
    src = tmp_path / "src"
    for k in range(40):
        jpeg(src / f"train/c{k % 2}/{k}.jpg", k)
    prepare(src, out=tmp_path / "asked", val_fraction=0.4)
    train, val = open_catalog(tmp_path / "asked", "train"), open_catalog(tmp_path / "asked", "val")
    assert train.n + val.n == 40 and 6 < val.n < 26 and val.classes == ["c0", "c1"]
    prepare(src / "train", out=tmp_path / "same", val_fraction=0.4)
    assert open_catalog(tmp_path / "same", "val").fingerprint == val.fingerprint
    prepare(src, out=tmp_path / "unasked")
    assert open_catalog(tmp_path / "unasked", "train").n == 40 and not (tmp_path / "unasked/val").exists()


def test_a_share_of_what_is_split_already_is_refused(tmp_path):
    for split in ("train", "val"):
        jpeg(tmp_path / f"src/{split}/1.jpg", 1)
    with pytest.raises(UserError, match=r"--val-fraction 0\.4: .*src has its own val/"):
        prepare(tmp_path / "src", out=tmp_path / "out", val_fraction=0.4)


def test_a_place_that_takes_no_folder(tmp_path):
    jpeg(tmp_path / "src/1.jpg", 1)
    with pytest.raises(UserError, match=r"^/proc/x: cannot be made: .*; choose an --out in a folder of yours$"):
        prepare(tmp_path / "src", out="/proc/x")


def test_a_file_is_answered_with_its_folder(tmp_path):
    picture = jpeg(tmp_path / "src/1.jpg", 1)
    for call in (prepare, open_catalog):
        with pytest.raises(UserError, match=rf"1\.jpg: is not a folder; .*: {tmp_path / 'src'}$"):
            call(picture)
