"""The folder of generated pictures: whole, continued, refused."""

import json

import numpy as np
import pytest
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.report import pictures

SETTINGS = {"run": "/a", "weights": "abc", "seed": 0, "batch": 4, "versions": {"torch": "1"}}


def tiles(num, batch=4):
    return [np.arange(start, start + batch) for start in range(0, num, batch)]


def made(tile, size=8):
    """Tokens and pictures that are a function of the index."""
    tokens = np.stack([np.full(6, 300 + i) for i in tile])
    return tokens, np.stack([np.full((size, size, 3), i, np.uint8) for i in tile])


def fill(out, num, which):
    for tile in which:
        pictures.write_tile(out, num, tile, *made(tile))


def visible(out):
    return sorted(p.name for p in out.iterdir() if not p.name.startswith("."))


def whole(out, num):
    assert pictures.open_folder(out, SETTINGS, num) == num
    fill(out, num, pictures.missing(out, num, tiles(num)))
    pictures.finish(out, SETTINGS, num, tiles(num))


def test_a_whole_folder(tmp_path):
    out = tmp_path / "new" / "samples"
    whole(out, 10)
    names = [f"{i:06d}.png" for i in range(10)]
    assert visible(out) == [*names, "grid.png", "manifest.json", "tokens.npz"]
    for i, path in enumerate(pictures.numbered(out, 10)):
        with Image.open(path) as image:
            assert (np.asarray(image) == i).all() and image.size == (8, 8)
    with np.load(out / "tokens.npz") as file:
        assert file["tokens"].dtype == np.uint16 and file["tokens"].shape == (10, 6)
        assert (file["tokens"] == 300 + np.arange(10)[:, None]).all()
        assert file["index"].tolist() == list(range(10))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == {**SETTINGS, "num": 10, "complete": True}
    with Image.open(out / "grid.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape[:2] == (3 * 66 + 2, 4 * 66 + 2)
    assert (sheet[2:66, 2 + 66 : 66 + 66] == 1).all() and (sheet[2 + 132 : 66 + 132, 2 + 66 : 66 + 66] == 9).all()
    assert pictures.missing(out, 10, tiles(10)) == []
    assert not list(out.rglob("*.part"))


def test_the_same_bytes_in_any_order(tmp_path):
    for name, order in (("a", 1), ("b", -1)):
        pictures.open_folder(tmp_path / name, SETTINGS, 10)
        fill(tmp_path / name, 10, tiles(10)[::order])
        pictures.finish(tmp_path / name, SETTINGS, 10, tiles(10))
    for path in (tmp_path / "a").iterdir():
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_an_interrupted_folder_is_continued(tmp_path):
    pictures.open_folder(tmp_path, SETTINGS, 10)
    fill(tmp_path, 10, [tiles(10)[1]])
    assert pictures.read_manifest(tmp_path)["complete"] is False
    assert pictures.open_folder(tmp_path, SETTINGS | {"run": "/moved", "versions": {}}, 10) == 10
    assert [t[0] for t in pictures.missing(tmp_path, 10, tiles(10))] == [0, 8]
    whole(tmp_path, 10)
    (tmp_path / "000006.png").unlink()
    assert [t[0] for t in pictures.missing(tmp_path, 10, tiles(10))] == [4]


def test_more_pictures_are_added_and_fewer_change_nothing(tmp_path):
    whole(tmp_path, 6)
    assert pictures.open_folder(tmp_path, SETTINGS, 3) == 6
    assert pictures.read_manifest(tmp_path)["complete"] is True
    assert pictures.open_folder(tmp_path, SETTINGS, 11) == 11
    assert [t[0] for t in pictures.missing(tmp_path, 11, tiles(11))] == [4, 8]  # tile 4..7 had padding
    whole(tmp_path, 11)
    with np.load(tmp_path / "tokens.npz") as file:
        assert (file["tokens"][:, 0] == 300 + np.arange(11)).all()


def test_grid_of_many_small_and_of_large_pictures(tmp_path):
    for size, shown in ((8, 256), (80, 64)):
        out = tmp_path / str(size)
        pictures.open_folder(out, SETTINGS, 300)
        for tile in tiles(300):
            pictures.write_tile(out, 300, tile, *made(tile % 256, size))
        pictures.finish(out, SETTINGS, 300, tiles(300))
        cell = max(size, 64) + 2
        side = int(shown**0.5)
        with Image.open(out / "grid.png") as image:
            assert image.size == (side * cell + 2, side * cell + 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": 1}, "seed 0 there, 1 here"), ({"weights": "x" * 64}, "weights abc there"), ({"batch": 5}, "batch 4")],
)
def test_other_settings_are_refused(tmp_path, change, said):
    whole(tmp_path, 4)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(UserError, match=said) as caught:
        pictures.open_folder(tmp_path, SETTINGS | change, 8)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_folders_that_are_not_ours_are_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        pictures.open_folder(tmp_path, SETTINGS, 4)
    with pytest.raises(UserError, match="is a file"):
        pictures.open_folder(tmp_path / "photo.jpg", SETTINGS, 4)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        pictures.open_folder(tmp_path, SETTINGS, 4)
    with pytest.raises(UserError, match="cannot be written"):
        pictures.open_folder(tmp_path / "photo.jpg" / "below", SETTINGS, 4)
