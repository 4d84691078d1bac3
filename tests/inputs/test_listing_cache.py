"""listing_cache.py: the second opening reads one file; whatever changed or broke is noticed."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from made_tars import write

from mage_ds.inputs import listing, listing_cache
from mage_ds.inputs.catalog import open_catalog

NAME = listing_cache.NAME
EVER = -(10**12)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(listing_cache, "WORTH", 1)
    monkeypatch.setattr(listing_cache, "SETTLED", EVER)  # folders as young as a test's
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users_cache"))


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    for k in range(12):
        path = root / f"class{k % 3}" / "deep" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * k)
    (root / "loose.jpg").write_bytes(b"loose")
    return root


@pytest.fixture
def walks(monkeypatch):
    """How often something was listed instead of read from the cache."""
    calls, real = [], listing.walk

    def counted(*arguments):
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(listing, "walk", counted)
    return calls


def everything(catalog):
    rows = [(catalog.name(i), catalog.label(i), int(catalog.sizes[i]), catalog.read(i)) for i in range(catalog.n)]
    return rows, catalog.classes, catalog.fingerprint, catalog.split


def plain_fingerprint(root):
    """What the fingerprint is defined as, written out."""
    paths = sorted((os.fsencode(path.relative_to(root)), path) for path in root.rglob("*.jpg"))
    return hashlib.sha256(b"".join(b"%s\0%d\n" % (name, path.stat().st_size) for name, path in paths)).hexdigest()


def test_the_same_with_and_without(data, walks):
    first, second = open_catalog(data), open_catalog(data)
    assert len(walks) == 1 and (data / NAME).exists()
    assert everything(first) == everything(second)
    assert second.fingerprint == plain_fingerprint(data)
    assert sorted(os.listdir(data)) == [NAME, "class0", "class1", "class2", "loose.jpg"]


def test_arrays_are_pages_of_the_file(data):
    open_catalog(data)
    catalog = open_catalog(data)
    for array in (catalog.sizes, catalog.offsets, catalog.labels, np.frombuffer(catalog.names, dtype=np.uint8)):
        assert not array.flags.writeable and not array.flags.owndata
    assert str(data / NAME) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", ["folders", "tars"])
def test_splits_have_their_own(tmp_path, walks, kind):
    root = tmp_path / "data"
    for split in ("train", "val"):
        if kind == "tars":
            write(root / f"x-{split}-0.tar", (f"a/{split}.jpg", b"x"), (f"{split}/b.jpg", b"y"))
        else:
            for name in (f"a/{split}.jpg", f"{split}/b.jpg"):
                (root / split / name).parent.mkdir(parents=True, exist_ok=True)
                (root / split / name).write_bytes(b"x")
    before = [everything(open_catalog(root, split)) for split in ("train", "val")]
    count = len(walks)
    assert [everything(open_catalog(root, split)) for split in ("train", "val")] == before
    assert len(walks) == count == 2
    assert before[0][1] == before[1][1] == ["a", "train", "val"]


def add(data):
    (data / "class1/deep/new.jpg").write_bytes(b"new")


def add_at_the_top(data):
    (data / "z.jpg").write_bytes(b"new")


def add_a_folder(data):
    (data / "class9").mkdir()
    (data / "class9/new.jpg").write_bytes(b"new")


def remove(data):
    (data / "class2/deep/2.jpg").unlink()


def rename(data):
    (data / "class0/deep/0.jpg").rename(data / "class0/deep/zero.jpg")


def rename_a_folder(data):
    (data / "class0").rename(data / "class7")


def swap_folders(data):
    (data / "class0").rename(data / "x")
    (data / "class1").rename(data / "class0")
    (data / "x").rename(data / "class1")


def replace_the_top_one(data):
    (data / "loose.jpg").rename(data / "other.jpg")


def add_and_hide_it(data):
    """As rsync and tar do: the folder's time of modification is set back."""
    before = os.stat(data / "class1/deep")
    add(data)
    os.utime(data / "class1/deep", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        add,
        add_at_the_top,
        add_a_folder,
        remove,
        rename,
        rename_a_folder,
        swap_folders,
        replace_the_top_one,
        add_and_hide_it,
    ],
)
def test_changes_are_noticed(data, walks, change):
    open_catalog(data)
    time.sleep(0.02)  # file systems keep times in ticks
    change(data)
    catalog = open_catalog(data)
    assert len(walks) == 2
    assert catalog.fingerprint == plain_fingerprint(data)
    assert everything(open_catalog(data)) == everything(catalog) and len(walks) == 2


def test_overwritten_in_place_is_read_as_it_is_now(data, walks):
    before = open_catalog(data).fingerprint
    (data / "class0/deep/3.jpg").write_bytes(b"longer than before")
    catalog = open_catalog(data)
    k = [catalog.name(i) for i in range(catalog.n)].index("class0/deep/3.jpg")
    assert catalog.read(k) == b"longer than before" and catalog.fingerprint == before and len(walks) == 1
    assert open_catalog(data, check=True).fingerprint == plain_fingerprint(data) != before  # `prepare` lists anew


def test_tars_are_known_by_size_and_times(tmp_path, walks):
    root = tmp_path / "data"
    write(root / "0.tar", ("a.jpg", b"1"), ("a.cls", b"1"))
    write(root / "sub" / "1.tar", ("b.jpg", b"22"), ("b.cls", b"0"))
    first = everything(open_catalog(root))
    assert everything(open_catalog(root)) == first and len(walks) == 1
    time.sleep(0.02)
    write(root / "sub" / "1.tar", ("c.jpg", b"22"), ("c.cls", b"0"))  # in place, of the same size
    catalog = open_catalog(root)
    assert [catalog.name(i) for i in range(2)] == ["a.jpg", "sub/c.jpg"] and len(walks) == 2


def test_damage_anywhere_is_noticed(data, walks):
    want = everything(open_catalog(data))
    whole = (data / NAME).read_bytes()
    rng = np.random.default_rng(0)
    for k in range(60):
        broken = bytearray(whole)
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        if k % 3 == 0:
            broken = broken[: rng.integers(len(broken))]
        (data / NAME).write_bytes(broken)
        assert everything(open_catalog(data)) == want
        assert len(walks) == 2 + k
        assert (data / NAME).read_bytes() == whole  # mended


@pytest.mark.parametrize("content", [b"", b"x" * 500, b"\x80\x04cos\nsystem\n"])
def test_another_file_of_that_name(data, walks, content):
    (data / NAME).write_bytes(content)
    open_catalog(data)
    open_catalog(data)
    assert len(walks) == 1


def test_rules_of_another_version(data, walks, monkeypatch):
    open_catalog(data)
    monkeypatch.setattr(listing_cache, "RULES", [0])
    open_catalog(data)
    assert len(walks) == 2


def test_too_early_to_vouch_for_it(data, walks, monkeypatch):
    """A file added within the same tick of the clock as the listing would never be noticed."""
    monkeypatch.setattr(listing_cache, "SETTLED", 10**9)
    open_catalog(data)
    assert sorted(os.listdir(data)) == ["class0", "class1", "class2", "loose.jpg"]
    time.sleep(1.1)
    open_catalog(data)
    open_catalog(data)
    assert len(walks) == 2 and (data / NAME).exists()


def test_few_pictures_leave_no_trace(data, tmp_path, monkeypatch):
    monkeypatch.setattr(listing_cache, "WORTH", 14)
    open_catalog(data)
    assert NAME not in os.listdir(data) and not (tmp_path / "users_cache").exists()


@pytest.fixture
def sealed(data, monkeypatch):
    """A data folder that cannot be written; root can write anywhere, so opening for writing is refused instead."""
    real = open

    def refuse(path, mode="r", *arguments, **options):
        if "x" in mode and str(path).startswith(str(data)):
            raise OSError(30, "Read-only file system")
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr(listing_cache, "open", refuse, raising=False)
    return data


def test_a_read_only_data_set_is_cached_for_the_user(sealed, tmp_path, walks):
    first, second = open_catalog(sealed), open_catalog(sealed)
    assert len(walks) == 1 and everything(first) == everything(second)
    assert NAME not in os.listdir(sealed)
    (cached,) = (tmp_path / "users_cache/mage_ds").iterdir()
    moved = sealed.rename(sealed.with_name("moved"))  # known by its path
    open_catalog(moved)
    assert len(walks) == 2 and cached.exists()


def test_nowhere_to_write(sealed, tmp_path, walks):
    (tmp_path / "users_cache").write_text("a file")
    assert everything(open_catalog(sealed)) == everything(open_catalog(sealed))
    assert len(walks) == 2


def test_full_disk_leaves_nothing(data, monkeypatch, tmp_path, walks):
    def full(file, made):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(listing_cache, "_write", full)
    open_catalog(data)
    assert NAME not in os.listdir(data) and list((tmp_path / "users_cache/mage_ds").iterdir()) == []


def test_starting_together(data, walks):
    """Whoever reads sees a whole file, while others write and the data set changes."""
    with ThreadPoolExecutor(8) as pool:
        for round in range(6):
            time.sleep(0.02)
            (data / f"class0/deep/more{round}.jpg").write_bytes(b"m")
            want = plain_fingerprint(data)
            assert set(pool.map(lambda _: open_catalog(data).fingerprint, range(8))) == {want}
            assert listing_cache._load(data / NAME).fingerprint == want
    left = [name for name in os.listdir(data) if name.startswith(NAME)]
    assert sorted(left) == [NAME, f"{NAME}.old"]


@pytest.mark.processes
def test_processes_starting_together(data):
    script = (
        "import sys; from mage_ds.inputs import listing_cache as c; c.WORTH = 1; c.SETTLED = -(10**12)\n"
        "from mage_ds.inputs.catalog import open_catalog\n"
        "print({open_catalog(sys.argv[1]).fingerprint for _ in range(20)})"
    )
    command = [sys.executable, "-c", script, str(data)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    want = plain_fingerprint(data)
    assert {run.communicate(timeout=60)[0] for run in runs} == {f"{{'{want}'}}\n"}


def test_a_mapped_listing_outlives_its_file(data):
    open_catalog(data)
    catalog = open_catalog(data)
    before = everything(catalog)
    for k in range(3):
        time.sleep(0.02)
        (data / f"class0/deep/{k}more.jpg").write_bytes(b"m")
        open_catalog(data)
        assert everything(catalog) == before
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(data)
    assert catalog.name(0) == before[0][0][0]


@pytest.mark.parametrize("seed", range(3))
def test_order_is_the_bytes_of_the_whole_name(tmp_path, seed):
    """Names around the slash ("-", "." and " " sort before it) in nested folders, against a plain sort."""
    rng = np.random.default_rng(seed)
    for _ in range(150):
        parts = ["".join(rng.choice(list("a-.0 b"), rng.integers(1, 3))) for _ in range(rng.integers(1, 4))]
        path = tmp_path / "data" / "/".join(f"a{part}".rstrip() for part in parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(IsADirectoryError):
            path.with_name(path.name + ".jpg").write_bytes(b"x")
    catalog = open_catalog(tmp_path / "data")
    want = sorted(os.fsencode(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*.jpg"))
    assert [os.fsencode(catalog.name(i)) for i in range(catalog.n)] == want
    assert [catalog.classes[k] if k >= 0 else "" for k in catalog.labels] == [
        os.fsdecode(name.rpartition(b"/")[0].partition(b"/")[0]) for name in want
    ]
