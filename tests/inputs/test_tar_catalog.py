"""A folder of tars as a data set: the same contract as a folder of pictures, and the same stream."""

import hashlib
import itertools
import os
import tarfile

import numpy as np
import pytest
import torch
from made_pictures import recipe
from made_tars import END, block, member, padded, write

from mage_ds.errors import UserError
from mage_ds.inputs import dali
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.quarantine import Quarantine


def names(catalog):
    return [catalog.name(i) for i in range(catalog.n)]


def labels(catalog):
    return [catalog.label(i) for i in range(catalog.n)]


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The pictures of `folder` in four shards, dealt out in turn, so that no shard holds a range of names."""
    root = tmp_path_factory.mktemp("packed")
    paths = sorted(folder.rglob("*.jpg"), reverse=True)
    for k in range(4):
        write(root / f"pictures-{k:06d}.tar", *((str(p.relative_to(folder)), p.read_bytes()) for p in paths[k::4]))
    return root


def test_the_same_data_set_packed_or_not(folder, packed):
    loose, tarred = open_catalog(folder), open_catalog(packed)
    assert names(tarred) == names(loose) and labels(tarred) == labels(loose)
    assert tarred.classes == loose.classes and tarred.fingerprint == loose.fingerprint
    assert (tarred.sizes == loose.sizes).all()
    for i in range(loose.n):
        assert tarred.read(i) == loose.read(i)


def stream(catalog, batches, rank=0, world=1, position=0):
    ahead = dali.stream(
        catalog,
        seed=4,
        position=position,
        batch=8,
        micro_batch=8 // world,
        rank=rank,
        world=world,
        inputs=recipe(),
        device="cpu",
        quarantine=Quarantine(None, 0.0, catalog.n),
        views=2,
    )
    taken = list(itertools.islice(ahead, batches))
    ahead.close()
    return taken


def test_streams_are_equal_sample_by_sample(folder, packed):
    """Order, labels, crops and pixels over an epoch's end, and for two ranks of two the halves of one."""
    one = stream(open_catalog(folder), 5)
    for loose, tarred in zip(one, stream(open_catalog(packed), 5), strict=True):
        assert (loose.index == tarred.index).all() and (loose.epoch == tarred.epoch).all()
        assert torch.equal(loose.images, tarred.images) and torch.equal(loose.labels, tarred.labels)
        assert tarred.valid.all()
    both = [stream(open_catalog(packed), 5, rank, 2) for rank in range(2)]
    for whole, first, second in zip(one, *both, strict=True):
        assert (whole.index == np.concatenate([first.index, second.index])).all()
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))
    assert (stream(open_catalog(packed), 1, position=32)[0].index == one[4].index).all()


def test_labels_from_cls_and_their_fingerprint(tmp_path):
    def make(name, *labels):
        members = [part for k, text in enumerate(labels) for part in ((f"{k}.jpg", b"x"), (f"{k}.cls", text))]
        write(tmp_path / name / "train" / "0.tar", *members)
        write(tmp_path / name / "val" / "0.tar", ("0.jpg", b"v"), ("0.cls", b"6"), ("1.jpg", b"none"))
        return open_catalog(tmp_path / name, "train"), open_catalog(tmp_path / name, "val")

    train, val = make("a", b"2", b"0", b"2")
    assert train.classes == val.classes == [str(k) for k in range(7)]
    assert labels(train) == [2, 0, 2] and labels(val) == [6, -1]
    plain = hashlib.sha256(b"".join(b"%d.jpg\0001\n" % k for k in range(3)) + b"2\n0\n2\n").hexdigest()
    assert train.fingerprint == plain
    assert make("b", b"2", b"1", b"2")[0].fingerprint != plain


def test_classes_from_folders_inside_and_around(tmp_path):
    write(tmp_path / "train/cat/0.tar", ("1.jpg", b"x"))
    write(tmp_path / "train/rest.tar", ("dog/2.jpg", b"xx"), ("3.jpg", b"xxx"))
    write(tmp_path / "val/a.tar", ("ant/4.jpg", b"x"), ("dog/5.jpg", b"x"))
    train, val = open_catalog(tmp_path, "train"), open_catalog(tmp_path, "val")
    assert names(train) == ["train/3.jpg", "train/cat/1.jpg", "train/dog/2.jpg"]
    assert train.classes == val.classes == ["ant", "cat", "dog"]
    assert labels(train) == [-1, 1, 2] and labels(val) == [0, 2]
    assert [train.read(i) for i in range(3)] == [b"xxx", b"x", b"xx"]


def test_shards_directly_in_the_folder_are_split_by_their_names(tmp_path):
    for name in ("imagenet-train-000.tar", "imagenet-train-001.tar", "imagenet_validation_0.tar"):
        write(tmp_path / name, (f"{name[:-4]}.jpg", b"x"), (f"{name[:-4]}.cls", b"3"))
    train, val = open_catalog(tmp_path, "train"), open_catalog(tmp_path, "val")
    assert names(train) == ["train/imagenet-train-000.jpg", "train/imagenet-train-001.jpg"]
    assert names(val) == ["val/imagenet_validation_0.jpg"]
    assert open_catalog(tmp_path).n == 3
    (tmp_path / "imagenet_validation_0.tar").unlink()
    assert open_catalog(tmp_path, "val") is None and names(open_catalog(tmp_path, "train"))[0].startswith("imagenet-")


def test_the_same_names_in_two_shards(tmp_path):
    write(tmp_path / "d/0.tar", ("c/0.jpg", b"1"), ("1.jpg", b"2"))
    write(tmp_path / "1.tar", ("d/c/0.jpg", b"333"), ("e/1.jpg", b"4"))
    write(tmp_path / "2.tar", ("d/c/0.jpg", b"55"))
    catalog = open_catalog(tmp_path)
    assert names(catalog) == ["1.tar/d/c/0.jpg", "1.tar/e/1.jpg", "2.tar/d/c/0.jpg", "d/0.tar/1.jpg", "d/0.tar/c/0.jpg"]
    assert [catalog.read(i) for i in range(5)] == [b"333", b"4", b"55", b"2", b"1"]
    assert catalog.classes == ["d", "e"] and labels(catalog) == [0, 1, 0, 0, 0]


def test_pictures_and_tars_do_not_mix(tmp_path):
    """An archive left beside its pictures would double them."""
    write(tmp_path / "all.tar", ("a.jpg", b"x"))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"both pictures \(cat/a\.jpg\) and tars \(all\.tar\)"):
        open_catalog(tmp_path)


def test_a_damaged_shard_is_named_in_one_line(tmp_path):
    for k in range(3):
        write(tmp_path / f"{k}.tar", (f"{k}.jpg", b"x" * 5000))
    for k in (1, 2):
        with open(tmp_path / f"{k}.tar", "r+b") as file:
            file.truncate(3000)
    with pytest.raises(UserError, match=r"1\.tar: truncated.*\(and 1 more\); `mage-ds prepare`") as error:
        open_catalog(tmp_path)
    assert "\n" not in str(error.value)
    checked = open_catalog(tmp_path, check=True)
    assert names(checked) == ["0.jpg"] and sorted(checked.damaged) == ["1.tar", "2.tar"]
    (tmp_path / "0.tar").unlink()
    with pytest.raises(UserError, match=r"1\.tar: truncated.*copy it again"):
        open_catalog(tmp_path, check=True)


def test_tars_without_pictures(tmp_path):
    write(tmp_path / "a.tar", ("a.txt", b"x"))
    with pytest.raises(UserError, match="no pictures in 1 tars"):
        open_catalog(tmp_path)


def test_links_between_members_lead_nowhere(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    data = tmp_path / "data"
    write(
        data / "a.tar",
        ("ok.jpg", b"ok"),
        member("x", type=tarfile.SYMTYPE, linkname="/etc"),
        member("s.jpg", type=tarfile.SYMTYPE, linkname="../secret.jpg"),
        ("x/passwd.jpg", b"inside"),
    )
    catalog = open_catalog(data)
    assert [(catalog.name(i), catalog.read(i)) for i in range(catalog.n)] == [
        ("ok.jpg", b"ok"),
        ("x/passwd.jpg", b"inside"),
    ]
    assert catalog.skipped["links"] == 2


def test_a_shard_that_changes_under_a_run(tmp_path):
    path = write(tmp_path / "a.tar", ("a.jpg", b"x" * 9000))
    catalog = open_catalog(tmp_path)
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(OSError, match="shorter"):
        catalog.read(0)
    path.unlink()
    with pytest.raises(OSError):
        catalog.read(0)


def test_reading_needs_no_memory_for_the_shard(tmp_path):
    """A member of 2 GB in a hole: listed, refused when it is read, its neighbour read."""
    size = 2**31
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(block(b"big.jpg", size))
        file.seek(size, os.SEEK_CUR)
        file.write(block(b"small.jpg", 1) + padded(b"s") + END)
    catalog = open_catalog(tmp_path)
    with pytest.raises(OSError, match="more than a picture has"):
        catalog.read(0)
    assert catalog.read(1) == b"s"
