"""The folder of generated pictures: whole, continued, joined, read, refused."""

import csv
import hashlib
import io
import json
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from forked import files
from made_sets import SETTINGS, end, fill, made, picture, settings, whole
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.report import joined, pictures
from mage_ds.sampling.tiles import tiles

FORMATS = pictures.FORMATS


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pictures, "_SHARD", 9)  # of whole tiles: 8


def visible(out):
    return sorted(p.name for p in out.iterdir() if not p.name.startswith("."))


def test_a_whole_folder(tmp_path):
    out = tmp_path / "new" / "samples"
    book = whole(out, 10)
    names = [f"{i:06d}.png" for i in range(10)]
    assert visible(out) == [*names, "grid.png", "manifest.csv", "manifest.json", "tokens.npz"]
    for i, name in enumerate(names):
        with Image.open(out / name) as image:
            assert (np.asarray(image) == picture(i)).all()
    with np.load(out / "tokens.npz") as file:
        assert file["tokens"].dtype == np.uint16 and file["tokens"].shape == (10, 6)
        assert (file["tokens"] == 300 + np.arange(10)[:, None]).all()
        assert file["index"].dtype == np.int64 and file["index"].tolist() == list(range(10))
    assert json.loads((out / "manifest.json").read_text()) == {**SETTINGS, "num": 10, "complete": True}
    with Image.open(out / "grid.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape[:2] == (3 * 66 + 2, 4 * 66 + 2)
    assert (sheet[2:66:8, 2 + 66 : 66 + 66 : 8] == picture(1)).all()
    assert book.missing(10) == [] and book.absent(10) == []


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("labels", [None, [2, 0, 1]])
def test_joined_files_and_the_table_of_all_pictures(tmp_path, form, labels):
    out = tmp_path
    book = whole(out, 10, form, labels)
    asked = [-1] * 10 if labels is None else [labels[i % 3] for i in range(10)]
    assert [name for name in visible(out) if name[0] in "0s"] == {
        "png": [f"{i:06d}.png" for i in range(10)],
        "tar": ["00000.tar", "00001.tar"],
        "npz": ["samples.npz"],
    }[form]
    with open(out / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        assert (int(row["index"]), int(row["label"]), row["seed"]) == (i, asked[i], "5")
        place = out / row["file"]
        if form == "png":
            data = place.read_bytes()
        elif form == "tar":
            with tarfile.open(place) as tar:
                data = tar.extractfile(f"{i:06d}.png").read()
                label = [name for name in tar.getnames() if name == f"{i:06d}.cls"]
                assert bool(label) == (labels is not None)
                assert not label or tar.extractfile(label[0]).read() == str(asked[i]).encode()
        else:
            with np.load(place) as file:
                data = file["arr_0"][i].tobytes()
                assert ("arr_1" in file) == (labels is not None)
                assert labels is None or file["arr_1"].tolist() == asked
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        shown = np.frombuffer(data, np.uint8).reshape(8, 8, 3) if form == "npz" else Image.open(io.BytesIO(data))
        assert (np.asarray(shown) == picture(i)).all()
    assert len(rows) == 10
    read = list(pictures.read(out, pictures.read_manifest(out)))
    assert len(read) == 10 and all((one == picture(i)).all() for i, one in enumerate(read))
    assert not list((out / ".tiles").glob("*.png.npz")) and not list(book.work.iterdir())


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_bytes_in_any_order_and_when_made_in_parts(tmp_path, form):
    whole(tmp_path / "a", 14, form)
    book = pictures.Pictures(tmp_path / "b", form, 4, 5)
    pictures.open_folder(book, settings(form), 14, 64)
    fill(book, 14, tiles(14, 4)[::-1])
    end(book, 14)
    for num in (3, 9, 11, 14):
        whole(tmp_path / "c", num, form)
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


@pytest.mark.parametrize("form", FORMATS)
def test_two_join_at_once(tmp_path, form):
    whole(tmp_path / "one", 30, form)
    for number in range(5):
        out, book = tmp_path / str(number), pictures.Pictures(tmp_path / str(number), form, 4, 5)
        pictures.open_folder(book, settings(form), 30, 64)
        fill(book, 30, tiles(30, 4))

        def joiner(out=out):
            mine = pictures.Pictures(out, form, 4, 5)
            while not pictures.read_manifest(out)["complete"]:
                try:
                    end(mine, 30)
                except FileNotFoundError:  # the other was first: look again
                    assert mine.missing(30) == []

        threads = [threading.Thread(target=joiner) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        joined.tidy(book, 30)
        assert files(out) == files(tmp_path / "one")


def test_an_interrupted_folder_is_continued(tmp_path):
    book = pictures.Pictures(tmp_path, "png", 4, 5)
    pictures.open_folder(book, SETTINGS, 10, 64)
    fill(book, 10, [tiles(10, 4)[1]])
    assert pictures.read_manifest(tmp_path)["complete"] is False
    assert pictures.open_folder(book, SETTINGS | {"run": "/moved", "versions": {}}, 10, 64) == 10
    assert book.missing(10) == [0, 8]
    whole(tmp_path, 10)
    (tmp_path / "000006.png").unlink()
    assert book.missing(10) == [4]
    assert book.absent(10) == ["000006.png"]
    assert pictures.open_folder(book, SETTINGS, 10, 64) == 10 and not pictures.read_manifest(tmp_path)["complete"]


def test_more_pictures_are_added_and_fewer_change_nothing(tmp_path):
    book = whole(tmp_path, 6)
    assert pictures.open_folder(book, SETTINGS, 3, 64) == 6
    assert pictures.read_manifest(tmp_path)["complete"] is True
    assert pictures.open_folder(book, SETTINGS, 11, 64) == 11
    assert book.missing(11) == [4, 8]  # tile 4..7 had padding
    book.seal(6)  # by a worker that knows of 6 only
    whole(tmp_path, 11)
    with np.load(tmp_path / "tokens.npz") as file:
        assert (file["tokens"][:, 0] == 300 + np.arange(11)).all()


@pytest.mark.parametrize("form", ["tar", "npz"])
def test_what_is_damaged_is_made_again(tmp_path, form):
    book = pictures.Pictures(tmp_path, form, 4, 5)
    pictures.open_folder(book, settings(form), 10, 64)
    fill(book, 10, tiles(10, 4))
    for path in (book.waiting(4), book.tile(4)):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        for content in (bytes(data), b""):
            path.write_bytes(content)
            with pytest.raises(joined.Damaged, match="000004") as caught:
                end(book, 10)
            book.discard(caught.value.path, caught.value.start)
            assert book.missing(10) == [4]
            fill(book, 10, [tiles(10, 4)[1]])
    end(book, 10)
    joined.tidy(book, 10)  # the tile that was made again after it was joined
    assert book.missing(10) == []
    name = book.file(0)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:700])
    assert book.missing(10) == {"tar": [0, 4], "npz": [0, 4, 8]}[form]


def test_a_large_array_is_a_stream(tmp_path):
    """npy 1.0 inside a zip that may pass 4 GiB, nothing compressed."""
    whole(tmp_path, 10, "npz")
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        (member,) = archive.infolist()
        assert member.compress_type == zipfile.ZIP_STORED and member.date_time == (1980, 1, 1, 0, 0, 0)
        data = archive.read(member)
    assert data[:8] == b"\x93NUMPY\x01\x00" and len(data) == 128 + 10 * 8 * 8 * 3
    head = (tmp_path / "samples.npz").read_bytes()[:30]
    assert head[18:26] == b"\xff" * 8  # zip64: the sizes stand in an extra field


def test_grid_of_many_small_and_of_large_pictures(tmp_path):
    for size, shown in ((8, 256), (80, 64)):
        book = pictures.Pictures(tmp_path / str(size), "png", 4)
        pictures.open_folder(book, SETTINGS, 300, 64)
        for tile in tiles(300, 4):
            book.write(tile, 300, *made(tile, size))
        end(book, 300)
        cell = max(size, 64) + 2
        side = int(shown**0.5)
        with Image.open(book.out / "grid.png") as image:
            assert image.size == (side * cell + 2, side * cell + 2)


def test_a_row_for_each_of_a_few_classes(tmp_path):
    whole(tmp_path, 11, labels=[4, 2, 7])
    with Image.open(tmp_path / "grid.png") as image:
        sheet = np.asarray(image)
    margin = sheet.shape[1] - (3 * 66 + 2)  # 11 pictures: three of each class
    assert sheet.shape[0] == 3 * 66 + 2 and margin > 10
    for row in range(3):
        assert (sheet[2 + 66 * row : 66 + 66 * row, :margin] < 128).any()  # a name
        for column in range(3):
            top, left = 2 + 66 * row, margin + 2 + 66 * column
            assert (sheet[top : top + 64 : 8, left : left + 64 : 8] == picture(column * 3 + row)).all()


def test_a_set_that_is_not_whole_cannot_be_read(tmp_path):
    for form, name in (("png", "000003.png"), ("tar", "00001.tar"), ("npz", "samples.npz")):
        whole(tmp_path / form, 10, form)
        manifest = pictures.read_manifest(tmp_path / form)
        (tmp_path / form / name).write_bytes(b"no picture")
        with pytest.raises(UserError, match=name):
            list(pictures.read(tmp_path / form, manifest))
        (tmp_path / form / name).unlink()
        with pytest.raises(UserError, match=f"{name}.*from /a, which is not here; copy the folder again"):
            list(pictures.read(tmp_path / form, manifest))
        with pytest.raises(UserError, match=f"{name}.*start the same `mage-ds sample {tmp_path} --out"):
            list(pictures.read(tmp_path / form, manifest | {"run": str(tmp_path)}))
