"""catalog.py: what is found, in which order, under which label; what is refused."""

import os

import pytest

from mage_ds.errors import UserError
from mage_ds.inputs.catalog import open_catalog


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def names(catalog):
    return [catalog.name(i) for i in range(catalog.n)]


def test_flat_folder_in_byte_order_without_labels(tmp_path):
    fill(tmp_path, "b.JPG", "a.png", "Z.webp", "c.Tiff", "d.bmp", "e.jpeg", "f.tif", "n.txt", "x.gif", ".h.jpg", "jpg")
    catalog = open_catalog(tmp_path)
    assert names(catalog) == ["Z.webp", "a.png", "b.JPG", "c.Tiff", "d.bmp", "e.jpeg", "f.tif"]
    assert catalog.n == 7 and catalog.classes == []
    assert [catalog.label(i) for i in range(7)] == [-1] * 7
    assert catalog.read(2) == b"b.JPG"


def test_class_is_the_first_folder(tmp_path):
    fill(tmp_path, "dog/1.jpg", "dog/deep/er/2.jpg", "cat/9.jpg", "loose.jpg", ".hidden/3.jpg")
    catalog = open_catalog(tmp_path)
    assert names(catalog) == ["cat/9.jpg", "dog/1.jpg", "dog/deep/er/2.jpg", "loose.jpg"]
    assert catalog.classes == ["cat", "dog"]
    assert [catalog.label(i) for i in range(4)] == [0, 1, 1, -1]


def test_splits(tmp_path):
    fill(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/b/4.jpg")
    train, val = open_catalog(tmp_path, "train"), open_catalog(tmp_path, "val")
    assert names(train) == ["train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg"]
    assert names(val) == ["val/b/4.jpg"] and val.read(0) == b"val/b/4.jpg"
    assert train.classes == val.classes == ["a", "b", "c"]  # a class without held-out pictures keeps its number
    assert val.label(0) == 1
    assert open_catalog(tmp_path / "train").fingerprint == train.fingerprint


def test_folder_without_splits(tmp_path):
    fill(tmp_path, "a/1.jpg")
    assert names(open_catalog(tmp_path, "train")) == ["a/1.jpg"]
    assert open_catalog(tmp_path, "val") is None


def test_fingerprint_sees_names_and_sizes(tmp_path):
    fill(tmp_path, "a/1.jpg", "a/2.jpg")
    before = open_catalog(tmp_path).fingerprint
    assert before == open_catalog(tmp_path).fingerprint and len(before) == 64
    (tmp_path / "a/2.jpg").write_bytes(b"longer than before")
    resized = open_catalog(tmp_path).fingerprint
    (tmp_path / "a/2.jpg").rename(tmp_path / "a/3.jpg")
    assert len({before, resized, open_catalog(tmp_path).fingerprint}) == 3


def test_what_is_no_file_is_listed_and_cannot_be_read(tmp_path):
    fill(tmp_path, "a.jpg", "folder.jpg/inside.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    catalog = open_catalog(tmp_path)
    assert names(catalog) == ["a.jpg", "broken.jpg", "folder.jpg", "pipe.jpg"]
    for i in (1, 2, 3):
        with pytest.raises(OSError, match="not a file"):
            catalog.read(i)


def test_links(tmp_path):
    fill(tmp_path / "store", "1.jpg")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jpg").symlink_to(tmp_path / "store/1.jpg")
    (data / "more").symlink_to(tmp_path / "store")
    (data / "round").symlink_to(data)
    (data / "self").symlink_to("self")
    catalog = open_catalog(data)
    assert names(catalog) == ["a.jpg", "more/1.jpg"]
    assert catalog.read(0) == catalog.read(1) == b"1.jpg"


def test_names_that_are_no_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(path, "wb") as file:
        file.write(b"x")
    catalog = open_catalog(tmp_path)
    assert catalog.read(0) == b"x" and catalog.name(0).encode("ascii", "backslashreplace")


@pytest.mark.parametrize(
    ("files", "split", "says"),
    [
        (None, None, "no such data folder"),
        ([], None, "empty folder"),
        (["a.txt", "b/c.txt"], None, "no pictures"),
        (["train/a.txt", "x.jpg"], "train", "train: no pictures"),
        (["val/a.jpg"], "train", "has val/ but no train/"),
    ],
)
def test_refusals_name_the_path_and_the_remedy(tmp_path, files, split, says):
    root = tmp_path / "data"
    if files is not None:
        root.mkdir()
        fill(root, *files)
    with pytest.raises(UserError, match=says) as error:
        open_catalog(root, split)
    message = str(error.value)
    assert str(root) in message and "\n" not in message
    assert "mage-ds prepare" in message or "train" in message


def test_a_file_is_no_data_folder(tmp_path):
    fill(tmp_path, "a.jpg")
    with pytest.raises(UserError, match="is not a folder"):
        open_catalog(tmp_path / "a.jpg")
