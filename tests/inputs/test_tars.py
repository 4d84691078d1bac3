"""tars.py against Python's tarfile, and against tars made to do harm."""

import io
import os
import pickle
import random
import tarfile

import pytest
from made_tars import END, block, member, padded, write

from mage_ds.inputs.tars import Damaged, index

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def found(path):
    """{name: bytes}, read by the index's ranges alone."""
    shard, whole = index(path), path.read_bytes()
    places = zip(shard.names, shard.begins, shard.sizes, strict=True)
    return {os.fsdecode(name): whole[begin : begin + size] for name, begin, size in places}


def expected(path):
    with tarfile.open(path, "r:") as file:
        return {info.name: file.extractfile(info).read() for info in file if info.isreg()}


@pytest.mark.parametrize("kind", FORMATS)
def test_names_and_bytes_equal_tarfiles(tmp_path, kind):
    rng = random.Random(kind)
    names = ["a.jpg", "deep/er/b.png", "x" * 80 + "/" + "y" * 80 + ".jpeg", "ümlaut/é.webp", "p/" * 40 + "z.jpg"]
    if kind != "ustar":
        names += ["l" * 300 + ".jpg", "d" * 200 + "/" + "m" * 200 + ".tiff", "n" * 100 + ".jpg", "o" * 99 + ".jpgx.jpg"]
    members = [(name, rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000]))) for name in names]
    folders = [member("deep", type=tarfile.DIRTYPE), member("deep/er/", type=tarfile.DIRTYPE)]
    path = write(tmp_path / "a.tar", *folders, *members, format=FORMATS[kind])
    assert found(path) == expected(path) == dict(members)
    shard = index(path)
    assert shard.names == sorted(os.fsencode(name) for name in names)
    assert shard.numbers == [-1] * len(names) and not +shard.skipped


def test_headers_of_pax_describe_one_member_or_all(tmp_path):
    info, data = member("plain.jpg", b"12345", pax_headers={"path": "other/name.jpg", "comment": "1 a=b\n"})
    path = write(
        tmp_path / "a.tar",
        (info, data),
        ("next.jpg", b"6"),
        format=tarfile.PAX_FORMAT,
        pax_headers={"comment": "for all"},
    )
    assert found(path) == {"other/name.jpg": b"12345", "next.jpg": b"6"} == expected(path)


def test_size_beyond_the_octal_field(tmp_path):
    size = 9 * 2**30
    for k, header in enumerate(
        [
            block(b"big.jpg", at_124=b"\x80" + size.to_bytes(11, "big")),
            block(b"pax", 19, b"x") + padded(b"19 size=%d\n" % size + b"\0") + block(b"big.jpg"),
        ]
    ):
        path = tmp_path / f"{k}.tar"
        with open(path, "wb") as file:
            file.write(header)
            file.seek(size, os.SEEK_CUR)  # a hole: takes no room
            file.write(padded(b"") + block(b"after.jpg", 3) + padded(b"abc") + END)
        shard = index(path)
        assert shard.names == [b"after.jpg", b"big.jpg"] and shard.sizes == [3, size]
        with tarfile.open(path, "r:") as file:
            assert [info.offset_data for info in file] == [shard.begins[1], shard.begins[0]]


def test_labels_come_from_cls(tmp_path):
    path = write(
        tmp_path / "a.tar",
        ("a.jpg", b"A"),
        ("a.cls", b"7"),
        ("f/b.CLS", b" 12\n"),
        ("f/b.png", b"B"),
        ("c.jpg", b"C"),
        ("c.json", b'{"cls": 3}'),
        ("2020.01.02.jpg", b"D"),
        ("2020.01.02.cls", b"5"),
        ("article.cls", b"LaTeX's, of no picture"),
    )
    shard = index(path)
    numbers = dict(zip(shard.names, shard.numbers, strict=True))
    assert numbers == {b"a.jpg": 7, b"f/b.png": 12, b"c.jpg": -1, b"2020.01.02.jpg": 5}


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/mage_ds_unpickled",)


@pytest.mark.parametrize(
    "text", [b"", b"-1", b"cat", b"1_0", b"1.5", b"9" * 9, b"1" * 99, "٣".encode(), pickle.dumps(Bomb())]
)
def test_what_is_no_label_is_refused_and_never_run(tmp_path, text):
    path = write(tmp_path / "a.tar", ("x.jpg", b"X"), ("x.cls", text))
    with pytest.raises(Damaged, match=r"x\.cls: a label is a whole number"):
        index(path)
    assert not os.path.exists("/tmp/mage_ds_unpickled")


def test_one_picture_a_key(tmp_path):
    """WebDataset's samples: a key may have several parts; a mask is no training picture."""
    names = ["a.png", "a.jpg", "a.seg.png", "b.txt", "b.PNG", "c.1.jpg", "c.2.jpg", "d/a.webp", "e.jpg.txt"]
    path = write(tmp_path / "a.tar", *((name, name.encode()) for name in names))
    assert sorted(found(path)) == ["a.jpg", "b.PNG", "c.1.jpg", "c.2.jpg", "d/a.webp"]
    assert +index(path).skipped == {"second pictures of a key": 2}


def test_a_name_that_comes_twice_is_the_last(tmp_path):
    path = write(tmp_path / "a.tar", ("a.jpg", b"old"), ("b.jpg", b"B"), ("./a.jpg", b"new"))
    assert found(path) == {"a.jpg": b"new", "b.jpg": b"B"}


def test_harmful_members_are_skipped_and_counted(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    path = write(
        tmp_path / "t" / "a.tar",
        ("good.jpg", b"good"),
        ("../secret.jpg", b"1"),
        ("a/../../secret.jpg", b"2"),
        (str(secret), b"3"),
        ("a/..", b""),
        member("soft.jpg", type=tarfile.SYMTYPE, linkname=str(secret)),
        member("hard.jpg", type=tarfile.LNKTYPE, linkname=str(secret)),
        member("pipe.jpg", type=tarfile.FIFOTYPE),
        member("disk.jpg", type=tarfile.BLKTYPE, devmajor=8),
        member("null.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        (".hidden.jpg", b"4"),
        ("a/._appledouble.jpg", b"5"),
        ("./last.jpg", b"last"),
    )
    before = sorted(tmp_path.rglob("*"))
    assert found(path) == {"good.jpg": b"good", "last.jpg": b"last"}
    assert +index(path).skipped == {"unsafe names": 4, "links": 2, "devices": 3}
    assert sorted(tmp_path.rglob("*")) == before


def test_sparse_members_are_stepped_over(tmp_path):
    """Old GNU (its map goes on in a second block) and pax; a picture with holes is none."""
    old = block(b"s.jpg", 512, b"S", at_482=b"\1") + bytes(504) + b"\1" + bytes(7) + bytes(512) + padded(b"x")
    records = b"22 GNU.sparse.major=1\n"
    pax = block(b"p", len(records), b"x") + padded(records) + block(b"q.jpg", 5) + padded(b"12345")
    foreign = block(b"v.jpg", 3, b"V") + padded(b"abc")
    path = tmp_path / "a.tar"
    path.write_bytes(old + pax + foreign + block(b"after.jpg", 2) + padded(b"ok") + END)
    assert found(path) == {"after.jpg": b"ok"}
    assert +index(path).skipped == {"sparse or foreign members": 3}


def test_a_name_with_a_zero_byte(tmp_path):
    """Only pax can write one; no file system takes it."""
    header = block(b"p", 17, b"x") + padded(b"17 path=a\0.jpg.jpg"[:16] + b"\n")
    (tmp_path / "a.tar").write_bytes(
        header + block(b"x.jpg", 1) + padded(b"x") + block(b"y.jpg", 1) + padded(b"y") + END
    )
    assert found(tmp_path / "a.tar") == {"y.jpg": b"y"} and +index(tmp_path / "a.tar").skipped == {"unsafe names": 1}


def test_names_are_shown_on_one_line(tmp_path):
    path = write(tmp_path / "a.tar", ("a\n\x1b[2Jb.jpg", b"x"), ("a\n\x1b[2Jb.cls", b"?"))
    with pytest.raises(Damaged, match=r"^a\\n\\x1b\[2Jb\.cls: a label"):
        index(path)


def tar_of(*names):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:") as file:
        for name in names:
            info, data = member(name, name.encode() * 300)
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "truncated"),
        (b"no tar at all", "truncated"),
        (b"x" * 2000, "no tar"),
        (b"\x1f\x8b\x08" + b"x" * 2000, r"compressed \(gzip\)"),
        (b"\xfd7zXZ\0", r"compressed \(xz\)"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 2000, r"compressed \(zstd\)"),
        (tar_of("a.jpg", "b.jpg")[:700], r"truncated: a\.jpg ends behind"),
        (tar_of("a.jpg", "b.jpg")[:4096], "truncated: no end mark"),
        (tar_of("a.jpg", "b.jpg")[:4070], "truncated: no end mark"),
        (tar_of("a.jpg")[:2048] + b"y" * 512 + END, "damaged at byte 2,048"),
        (block(b"a.jpg", at_124=b"-0000000001\0") + END, "is no number"),
        (block(b"a.jpg", at_124=b"\xff" * 12) + END, "is no number"),
        (block(b"a.jpg", at_124=b"\x80" + b"\xff" * 11) + END, "truncated: a.jpg ends"),
        (block(b"n", 1 << 40, b"L", at_124=b"\x80" + (1 << 40).to_bytes(11, "big")) + END, "a name of 1,099"),
        (block(b"n", 9999, b"x") + END, "ends within a header"),
        (block(b"n", 10, b"x") + padded(b"99 a=b\n") + END, "broken pax"),
        (block(b"n", 10, b"x") + padded(b"0 a=b\n") + END, "broken pax"),
        (block(b"n", 10, b"x") + padded(b"-5 a=b\n") + END, "is no size"),
        (block(b"n", 12, b"x") + padded(b"12 size=-99\n") + block(b"a.jpg") + END, "is no size"),
        (block(b"s.jpg", 0, b"S", at_482=b"\1") + b"\1" * 512, "ends within a header"),
    ],
)
def test_broken_tars_are_named_for_what_they_are(tmp_path, data, says):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(Damaged, match=says) as error:
        index(tmp_path / "a.tar")
    assert "\n" not in str(error.value)


def test_any_damage_ends_in_one_kind_of_error(tmp_path):
    good = write(tmp_path / "a.tar", *((f"{'n' * (60 * k)}.jpg", b"x" * 99) for k in range(1, 6)), format=2)
    whole, rng, path = good.read_bytes(), random.Random(0), tmp_path / "b.tar"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data) // 2)] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            shard = index(path)
        except Damaged:
            continue
        assert all(begin + size <= len(data) for begin, size in zip(shard.begins, shard.sizes, strict=True))


def test_what_is_no_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(Damaged, match="not a file"):
        index(tmp_path / "pipe.tar")
    with pytest.raises(OSError):
        index(tmp_path)
