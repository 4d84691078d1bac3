"""The folder of generated pictures: begun, continued, begun anew, refused; what crashes and late processes leave."""

import errno
import os
import shutil
import tarfile
import time
from types import SimpleNamespace

import pytest
from forked import files
from made_sets import SETTINGS, end, fill, settings, whole

from mage_ds.errors import UserError
from mage_ds.report import joined, manifest, pictures
from mage_ds.sampling.tiles import tiles

FORMATS = pictures.FORMATS


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pictures, "_SHARD", 9)  # of whole tiles: 8


def test_room_is_looked_for_first(tmp_path, monkeypatch):
    book = pictures.Pictures(tmp_path, "npz", 4)
    pictures.open_folder(book, settings("npz"), 50_000, 64)
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=12 * 2**30))
    with pytest.raises(UserError, match=r"needs about 13\.7 GiB, 12 GiB are free") as caught:
        book.check_room(50_000, 256 * 256)
    assert str(tmp_path) in str(caught.value)
    for start in range(0, 8000, 4):
        book.tile(start).touch()
    with pytest.raises(UserError, match=r"needs about 13 GiB"):  # for 8,000 fewer
        book.check_room(50_000, 256 * 256)
    with pytest.raises(UserError, match=r"needs about 18\.5 GiB"):
        pictures.open_folder(book, settings("npz"), 70_000, 256 * 256)
    assert pictures.read_manifest(tmp_path)["num"] == 50_000
    with pytest.raises(UserError, match="GiB are free"):
        pictures.open_folder(pictures.Pictures(tmp_path / "new" / "set", "png", 4), SETTINGS, 200_000, 256 * 256)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": 1}, "seed 5 there, 1 here"), ({"weights": "x" * 64}, "weights abc there"), ({"batch": 5}, "batch 4")],
)
def test_other_settings_are_refused(tmp_path, change, said):
    book, before = whole(tmp_path, 4), files(tmp_path)
    with pytest.raises(UserError, match=said) as caught:
        pictures.open_folder(book, SETTINGS | change, 8, 64)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert before == files(tmp_path)


def test_folders_that_are_not_ours_are_refused(tmp_path):
    def opened(out):
        return pictures.open_folder(pictures.Pictures(out, "png", 4), SETTINGS, 4, 64)

    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        opened(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        opened(tmp_path / "photo.jpg")
    with pytest.raises(UserError, match="cannot be written"):
        opened(tmp_path / "photo.jpg" / "below")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        opened(tmp_path)


def test_what_differs_is_told_in_full(tmp_path):
    facts = {"checksums": "SHA-256 of the PNG file", "weights": "a" * 64}
    book = pictures.Pictures(tmp_path, "png", 4)
    pictures.open_folder(book, SETTINGS | facts, 50, 64)
    fill(book, 50, tiles(4, 4))
    with pytest.raises(UserError) as caught:
        pictures.open_folder(book, SETTINGS | {"checksums": "SHA-256 of the raw pixels", "weights": "b" * 64}, 50, 64)
    assert str(caught.value) == (
        f"--out {tmp_path}: was begun with --num 50 pictures of other settings (weights {'a' * 12} there, {'b' * 12} "
        "here; checksums SHA-256 of the PNG file there, SHA-256 of the raw pixels here); choose another folder"
    )


def test_settings_of_which_nothing_was_made_give_way(tmp_path):
    def opened(out, batch, busy=False):
        return pictures.open_folder(pictures.Pictures(out, "png", batch), change(batch), 4, 64, lambda: busy)

    def change(batch):
        return SETTINGS | {"batch": batch}

    assert opened(tmp_path, 400) == 4 and opened(tmp_path, 4) == 4
    assert pictures.read_manifest(tmp_path)["batch"] == 4
    with pytest.raises(UserError, match="batch 4 there, 2 here"):
        opened(tmp_path, 2, busy=True)
    book = whole(tmp_path, 4)
    with pytest.raises(UserError, match="batch 4 there, 2 here"):
        opened(tmp_path, 2)
    book.tile(0).unlink()
    (tmp_path / ".tiles").rmdir()  # somebody has tidied up: the pictures are still there
    with pytest.raises(UserError, match="batch 4 there, 2 here"):
        opened(tmp_path, 2)


def test_a_tile_of_settings_that_have_just_given_way_is_removed(tmp_path, monkeypatch):
    """It is published while the others' manifest is replaced."""
    book = pictures.Pictures(tmp_path, "png", 4, 5)
    pictures.open_folder(book, SETTINGS, 4, 64)
    write = manifest.write

    def late(other, facts):
        fill(book, 4, tiles(4, 4))
        write(other, facts)

    monkeypatch.setattr(manifest, "write", late)
    other = pictures.Pictures(tmp_path, "png", 4, 6)
    assert pictures.open_folder(other, SETTINGS | {"seed": 6}, 4, 64) == 4
    assert other.missing(4) == [0] and pictures.read_manifest(tmp_path)["seed"] == 6


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_begin_at_once_with_other_settings_one_is_refused(tmp_path, monkeypatch, links):
    """The second has looked before the first wrote, on a file system with hard links and on one without."""

    def no_link(*paths):
        raise OSError(errno.EPERM, "no hard links")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    first = whole(tmp_path, 4)
    blind = [None]
    monkeypatch.setattr(pictures, "read_manifest", lambda out: blind.pop() if blind else manifest.read_manifest(out))
    monkeypatch.setattr(pictures.os, "listdir", lambda out: [])
    with pytest.raises(UserError, match="seed 5 there, 6 here"):
        pictures.open_folder(first, SETTINGS | {"seed": 6}, 4, 64)
    assert manifest.read_manifest(tmp_path)["seed"] == 5


def test_a_manifest_that_is_about_to_be_written_is_waited_for(tmp_path, monkeypatch):
    path, looks = tmp_path / "manifest.json", []
    path.touch()

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            path.write_text('{"num": 4, "complete": false}')

    monkeypatch.setattr(time, "sleep", sleep)
    assert manifest.read_manifest(tmp_path)["num"] == 4
    path.write_text("")
    with pytest.raises(UserError, match="not readable"):
        manifest.read_manifest(tmp_path)
    assert sum(looks) < 5


def test_who_took_part_on_an_unlike_machine_is_said(tmp_path):
    here = SETTINGS | {"device": "cpu"}
    book = pictures.Pictures(tmp_path, "png", 4, 5)
    pictures.open_folder(book, here | {"device": "NVIDIA H100"}, 4, 64)
    assert pictures.open_folder(book, here, 8, 64) == 8
    line = f"{tmp_path}: begun on NVIDIA H100 (torch 1), continued on cpu (torch 1): pictures may differ in rounding"
    assert manifest.note_unlike(book, here) == manifest.note_unlike(book, here) == line
    assert manifest.note_unlike(book, here | {"device": "NVIDIA H100"}) is None
    assert manifest.note_unlike(book, here | {"versions": {"torch": "2"}}).count("cpu (torch 2)") == 1
    found = pictures.read_manifest(tmp_path)
    assert found["also"] == ["cpu (torch 1)", "cpu (torch 2)"] and found["device"] == "NVIDIA H100"


# --- what crashes and late processes leave ---------------------------------------------------------------------


def test_an_empty_picture_is_missing(tmp_path):
    """What a machine leaves that lost power before it wrote."""
    book = whole(tmp_path, 10)
    (tmp_path / "000005.png").write_bytes(b"")
    assert book.missing(10) == [4] and not book.done(4, 10) and book.absent(10) == ["000005.png"]
    assert pictures.open_folder(book, SETTINGS, 10, 64) == 10 and not pictures.read_manifest(tmp_path)["complete"]
    book.tile(8).write_bytes(b"")
    assert book.missing(10) == [4, 8]
    whole(tmp_path, 10)
    whole(tmp_path.with_name("at_once"), 10)
    assert files(tmp_path) == files(tmp_path.with_name("at_once"))


@pytest.mark.parametrize("form", FORMATS)
def test_what_others_are_removed_for_is_on_the_disk_first(tmp_path, monkeypatch, form):
    lasting = set()

    def fsync(number):
        lasting.add(os.path.basename(os.readlink(f"/proc/self/fd/{number}")).rsplit(".", 1)[0])

    monkeypatch.setattr(pictures.os, "fsync", fsync)
    whole(tmp_path, 10, form)
    joins = {"png": set(), "tar": {"00000.tar", "00001.tar"}, "npz": {"samples.npz"}}[form]
    assert lasting == joins | {"tokens.npz", "manifest.csv", "manifest.json", "grid.png"}


@pytest.mark.parametrize("form", FORMATS)
def test_joined_files_of_a_smaller_set_do_not_replace_those_of_a_larger_one(tmp_path, form):
    """A process that was stopped for long goes on."""
    small, out = tmp_path / "small", tmp_path / "set"
    whole(small, 6, form)
    shutil.copytree(small, out)
    book = whole(out, 14, form)
    before = files(out)
    late = pictures.Pictures(out, form, 4, 5)
    with pytest.raises(pictures.Outgrown):
        joined.finish(late, 6, [])
    if form != "png":
        with pytest.raises(pictures.Outgrown):
            joined.join(late, 0, 6)
    assert {name: data for name, data in files(out).items() if not name.startswith(".work")} == before

    names = ["tokens.npz", "manifest.csv", *([book.file(0)] if form != "png" else [])]
    for name in names:  # it had looked at the manifest just before the others wrote theirs
        shutil.copy(small / name, out / name)
    assert book.absent(14) == names
    whole(out, 14, form)
    joined.tidy(book, 14)
    assert files(out) == before


def test_a_count_of_names_says_how_much_is_left(tmp_path):
    book = pictures.Pictures(tmp_path, "tar", 4, 5)
    pictures.open_folder(book, settings("tar"), 10, 64)
    for which, left in ((1, 6), (2, 2), (0, 0)):
        fill(book, 10, [tiles(10, 4)[which]])
        assert book.left(10) == left
    end(book, 10)
    assert book.left(10) == 0 and book.left(13) == 1


def test_joined_files_that_may_not_be_read_are_one_line(tmp_path, monkeypatch):
    whole(tmp_path, 10, "tar")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(tarfile, "open", refuse)
    with pytest.raises(UserError, match=r"00000\.tar: cannot be read \(Permission denied\)"):
        pictures.Pictures(tmp_path, "tar", 4, 5).missing(10)


def test_places_where_no_folder_can_be_made():
    book = pictures.Pictures("/proc/no_such_place", "png", 4)
    with pytest.raises(UserError, match="--out /proc/no_such_place: no folder can be made there"):
        pictures.open_folder(book, SETTINGS, 4, 64)
