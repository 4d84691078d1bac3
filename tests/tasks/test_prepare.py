"""prepare: what lands on the disk, what is printed, what is refused, and that nothing is half written."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mage_ds.errors import UserError
from mage_ds.inputs.catalog import open_catalog
from mage_ds.tasks.prepare import prepare


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def pictures(root: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (20, 30 + k, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "digits"
    prepare(sample="digits", out=out)
    return out


def test_digits(digits):
    train, val = open_catalog(digits, "train"), open_catalog(digits, "val")
    assert train.classes == val.classes == [str(k) for k in range(10)]
    assert train.n + val.n == 1797 and 0.17 < val.n / 1797 < 0.23
    source = load_digits()
    seen = Counter()
    for catalog in (train, val):
        seen.update(catalog.classes[label] for label in catalog.labels)
        for i in range(0, catalog.n, 40):
            name = Path(catalog.name(i))
            image = Image.open(digits / name)
            assert (image.format, image.size) == ("JPEG", (32, 32))
            k = int(name.stem)
            assert name.parent.name == str(source.target[k])
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
            assert np.corrcoef(small.ravel(), source.images[k].ravel())[0, 1] > 0.97
    assert seen == Counter(str(label) for label in source.target)


def test_again_says_done_and_touches_nothing(digits, capsys):
    before = {name: os.stat(digits / name).st_mtime_ns for name in tree(digits)}
    prepare(sample="digits", out=digits)
    assert "already prepared" in capsys.readouterr().out
    assert before == {name: os.stat(digits / name).st_mtime_ns for name in tree(digits)}
    with pytest.raises(UserError, match="holds something else"):
        prepare(sample="digits", out=digits, val_fraction=0.3)
    with pytest.raises(UserError, match="holds something else"):
        prepare(sample="photos", out=digits)


def test_photos(tmp_path, capsys):
    out = tmp_path / "photos"
    prepare(sample="photos", out=out)
    train, val = open_catalog(out, "train"), open_catalog(out, "val")
    assert 300 <= train.n + val.n <= 999 and val.n > 30
    assert len(train.classes) == 16 and {"astronaut", "china", "flower"} <= set(train.classes)
    for i in range(0, train.n, 25):
        assert all(256 <= side <= 320 for side in Image.open(train.path(i)).size)
    assert "overlap" in capsys.readouterr().out
    again = tmp_path / "again"
    prepare(sample="photos", out=again)
    assert tree(out) == tree(again)
    assert open_catalog(again).fingerprint == open_catalog(out).fingerprint


@pytest.fixture
def mixed(tmp_path):
    src = pictures(tmp_path / "src", *(f"{kind}/{k}.jpg" for kind in ("cat", "dog") for k in range(30)))
    (src / "cat/empty.jpg").touch()
    (src / "dog/text.jpg").write_text("text")
    return src


def test_looks_in_place(mixed, capsys):
    before = tree(mixed)
    prepare(mixed)
    text = capsys.readouterr().out
    for part in (
        "62 pictures",
        "cat 31, dog 31",
        "30 x 20 smallest",
        "broken   2",
        "empty.jpg: empty file",
        "text.jpg",
    ):
        assert part in text
    assert tree(mixed) == before


def test_full_verification_decodes(tmp_path, capsys):
    src = pictures(tmp_path / "src", "a.bmp", "b.jpg")
    (src / "a.bmp").write_bytes((src / "a.bmp").read_bytes()[:-99])
    prepare(src)
    assert "broken   0" in capsys.readouterr().out
    prepare(src, verify="full")
    assert "a.bmp: cannot be decoded" in capsys.readouterr().out


def test_out_links_the_good_ones(mixed, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(mixed, out=out, val_fraction=0.4)
    made = [name for name in tree(out) if name.endswith(".jpg")]
    assert sorted(name.split("/", 1)[1] for name in made) == [
        name for name in tree(mixed) if "empty" not in name and "text" not in name
    ]
    assert 10 < sum(name.startswith("val/") for name in made) < 40
    for name in made:
        assert os.path.samefile(out / name, mixed / name.split("/", 1)[1])
    prepare(mixed, out=out, val_fraction=0.4)
    assert "already prepared" in capsys.readouterr().out
    (mixed / "cat/new.jpg").write_bytes((mixed / "cat/1.jpg").read_bytes())
    with pytest.raises(UserError, match="holds something else"):
        prepare(mixed, out=out, val_fraction=0.4)
    grown = tmp_path / "grown"
    prepare(mixed, out=grown, val_fraction=0.4)
    assert set(tree(out)) <= set(tree(grown))  # others keep their side


def test_split_of_the_source_is_kept(tmp_path):
    src = pictures(tmp_path / "src", "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg")
    (src / "train/a/4.jpg").symlink_to(src / "train/a/1.jpg")
    prepare(src, out=tmp_path / "out")
    assert tree(tmp_path / "out") == ["prepared.json", *tree(src)]
    assert not (tmp_path / "out/train/a/4.jpg").is_symlink()


def test_copies_where_links_are_impossible(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    src = pictures(tmp_path / "src", "1.jpg", "2.jpg", "3.jpg")
    prepare(src, out=tmp_path / "out", val_fraction=0)
    assert (tmp_path / "out/train/2.jpg").read_bytes() == (src / "2.jpg").read_bytes()
    assert not (tmp_path / "out/val").exists()


def test_other_ranks_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    prepare(sample="digits", out=tmp_path / "out")
    prepare(tmp_path / "nowhere")
    assert tree(tmp_path) == []


def test_stopped_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    (tmp_path / ".out.partial/train").mkdir(parents=True)  # left by a process that was killed
    (tmp_path / ".out.partial/train/old.jpg").touch()
    src = pictures(tmp_path / "src", "1.jpg", "2.jpg", "3.jpg")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "link", interrupt)
        prepare(src, out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["src"]
    (tmp_path / ".out.partial/train").mkdir(parents=True)
    (tmp_path / ".out.partial/train/old.jpg").touch()
    prepare(src, out=tmp_path / "out", val_fraction=0)
    assert tree(tmp_path / "out") == ["prepared.json", "train/1.jpg", "train/2.jpg", "train/3.jpg"]


@pytest.mark.parametrize("failure", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_output_that_cannot_be_written(tmp_path, monkeypatch, failure):
    def refuse(self, *args, **kwargs):
        raise failure

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=rf"out: cannot be made: {failure.strerror}; choose an --out"):
        prepare(sample="digits", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "name a folder SRC or --sample"),
        ({"src": "src", "sample": "digits"}, "name a folder SRC or --sample"),
        ({"sample": "digit", "out": "out"}, "no such sample; choose one of digits, photos, emoji"),
        ({"sample": "digits"}, "needs --out"),
        ({"src": "nowhere"}, "no such data folder"),
        ({"src": "texts"}, "no pictures"),
        ({"src": "broken", "out": "out"}, "no readable picture"),
        ({"src": "src", "val_fraction": 0.5}, "needs --out"),
        ({"src": "src", "out": "out", "val_fraction": 1.0}, "0 <= F < 1"),
        ({"src": "src", "out": "out", "val_fraction": 0.999999}, "nothing is left to train on"),
        ({"src": "src", "out": "src/out"}, "lies within"),
        ({"src": "src", "out": "src"}, "lies within"),
        ({"src": "src", "out": "texts"}, "holds something else"),
        ({"src": "src", "out": "src/1.jpg/out"}, "lies within"),
        ({"src": "src", "out": "texts/a.txt"}, "holds something else"),
        ({"src": "src", "out": "texts/a.txt/out"}, "choose an --out"),
        ({"src": "src", "verify": "some"}, "quick or full"),
    ],
)
def test_refusals(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    pictures(Path("src"), "1.jpg", "2.jpg")
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("text")
    Path("broken").mkdir()
    Path("broken/1.jpg").touch()
    before = tree(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        prepare(**arguments)
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before and not Path("out").exists()
