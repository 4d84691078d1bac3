"""Pictures of every kind and every damage: decoded as PIL does, or replaced by a placeholder, never a lost batch."""

import itertools

import numpy as np
import pytest
import torch
from made_pictures import encode, picture, recipe
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.inputs import dali
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.quarantine import Quarantine

PLAIN = picture(3, 32, 32)
RGBA = Image.merge("RGBA", (*PLAIN.split(), PLAIN.split()[0]))
GREY16 = np.random.default_rng(0).integers(0, 65536, (32, 32), dtype=np.uint16)
JPEG = encode(picture(3, 300, 300), "JPEG")

GOOD = {
    "plain.jpg": encode(PLAIN, "JPEG"),
    "progressive.jpg": encode(PLAIN, "JPEG", progressive=True),
    "cmyk.jpg": encode(PLAIN.convert("CMYK"), "JPEG"),
    "grey.jpg": encode(PLAIN.convert("L"), "JPEG"),
    "trailing.jpg": encode(PLAIN, "JPEG") + b"bytes of a camera" * 9,
    "two.jpg": encode(PLAIN, "MPO", save_all=True, append_images=[picture(4, 32, 32)]),
    "rgba.png": encode(RGBA, "PNG"),
    "palette.png": encode(PLAIN.convert("P"), "PNG"),
    "grey_alpha.png": encode(PLAIN.convert("LA"), "PNG"),
    "bilevel.png": encode(PLAIN.convert("1"), "PNG"),
    "lossy.webp": encode(PLAIN, "WEBP"),
    "lossless.webp": encode(PLAIN, "WEBP", lossless=True),
    "plain.tiff": encode(PLAIN, "TIFF"),
    "lzw.tif": encode(PLAIN, "TIFF", compression="tiff_lzw"),
    "plain.bmp": encode(PLAIN, "BMP"),
    "a_png.jpg": encode(PLAIN, "PNG"),  # the ending is wrong, the picture is not
}
BAD = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"a text that somebody renamed\n" * 20, "starts with b'a text t'"),
    "gif.jpg": (encode(PLAIN, "GIF"), "starts with b'GIF8"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "header.jpg": (JPEG[:200], "broken header"),
    "cut.png": (encode(PLAIN, "PNG")[:-40], "truncated"),
    "cut.bmp": (encode(PLAIN, "BMP")[:-400], "cannot be decoded"),  # only decoding tells
    "cut.tiff": (encode(PLAIN, "TIFF", compression="tiff_lzw")[:-400], "starts with b'II"),
    "zeroed.jpg": (JPEG[: len(JPEG) // 2] + bytes(500), "truncated"),
    "zeroed.png": (encode(PLAIN, "PNG")[:300] + bytes(500) + b"IEND\xaeB`\x82", "cannot be decoded"),
}


pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")


@pytest.fixture
def mixed(tmp_path):
    for name, data in GOOD.items():
        (tmp_path / name).write_bytes(data)
    for name, (data, _) in BAD.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.jpg").mkdir()
    return open_catalog(tmp_path)


def run(catalog, *, batch=8, size=32, quarantine=None):
    quarantine = quarantine or Quarantine(None, 1.0, catalog.n)
    inputs = recipe(size)
    batches = dali.evaluation(
        catalog, range(catalog.n), batch=batch, inputs=inputs, device="cpu", quarantine=quarantine
    )
    return [
        (catalog.name(i), valid.item(), images[0])
        for b in batches
        for i, valid, images in zip(b.index, b.valid, b.images, strict=True)
        if i >= 0
    ]


def test_matrix(mixed, tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 1.0, mixed.n)
    rows = run(mixed, quarantine=quarantine)
    assert [name for name, _, _ in rows] == [mixed.name(i) for i in range(mixed.n)]
    for name, valid, images in rows:
        assert valid == (name in GOOD), name
        if name in GOOD:
            want = np.array(Image.open(tmp_path / name).convert("RGB"))
            assert np.array_equal(images.permute(1, 2, 0).numpy(), want), name
        else:
            assert (images == 128).all(), name
    listed = (tmp_path / "quarantine.jsonl").read_text()
    assert listed.count("\n") == quarantine.count == len(BAD) + 1
    assert '"folder.jpg", "reason": "cannot be read: not a file"' in listed


@pytest.mark.parametrize("name", BAD)
def test_reason(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name][0])
    with pytest.raises(UserError, match=BAD[name][1]):
        run(open_catalog(tmp_path), batch=1, quarantine=Quarantine(None, 0.5, 1))


def test_16_bit(tmp_path):
    for kind in ("png", "tiff"):
        Image.fromarray(GREY16).save(tmp_path / f"grey.{kind}")
    for _, valid, images in run(open_catalog(tmp_path)):
        assert valid == 1
        assert np.abs(images.numpy().astype(int) - np.round(GREY16 / 257).astype(int)).max() <= 1


def test_batch_of_a_decode_failure_is_made_again_with_the_same_pixels(tmp_path):
    """DALI loses the batch and the pipeline, and names no file."""
    for i in range(12):
        picture(i, 40, 30).save(tmp_path / f"{i:02d}.png")
    clean = {name: images for name, _, images in run(open_catalog(tmp_path), size=16)}
    for i in (2, 5, 9):
        (tmp_path / f"{i:02d}.png").write_bytes(BAD["zeroed.png"][0])
    catalog = open_catalog(tmp_path)
    rows = run(catalog, batch=6, size=16)
    assert [name for name, _, _ in rows] == sorted(clean)
    for name, valid, images in rows:
        assert valid == (name not in ("02.png", "05.png", "09.png"))
        assert torch.equal(images, clean[name] if valid else torch.full_like(images, 128))


def test_stream_keeps_its_order_and_repeats_its_placeholders(mixed):
    def take(views):
        stream = dali.stream(
            mixed,
            seed=0,
            position=0,
            batch=9,
            micro_batch=9,
            rank=0,
            world=1,
            inputs=recipe(16),
            device="cpu",
            quarantine=Quarantine(None, 1.0, mixed.n),
            views=views,
        )
        with_two_epochs = list(itertools.islice(stream, 6))
        stream.close()
        return with_two_epochs

    batches = take(2)
    index = np.concatenate([b.index for b in batches])
    valid = np.concatenate([b.valid.numpy() for b in batches])
    assert np.array_equal(np.sort(index[: mixed.n]), np.arange(mixed.n))
    assert mixed.n * 2 == 54 and np.array_equal(valid, [mixed.name(i) in GOOD for i in index])
    again = take(2)
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again, strict=True))


def test_file_that_vanishes(tmp_path):
    for i in range(3):
        picture(i, 20, 20).save(tmp_path / f"{i}.jpg")
    catalog = open_catalog(tmp_path)
    (tmp_path / "1.jpg").unlink()
    assert [valid for _, valid, _ in run(catalog)] == [1, 0, 1]


def test_too_many_stop_the_stream_after_the_batches_before(tmp_path):
    for i in range(16):
        picture(i, 20, 20).save(tmp_path / f"{i:02d}.jpg")
    for i in (9, 10):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"")
    catalog = open_catalog(tmp_path)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.1, catalog.n)
    batches = dali.evaluation(catalog, range(16), batch=4, inputs=recipe(), device="cpu", quarantine=quarantine)
    assert [next(batches).index[0], next(batches).index[0]] == [0, 4]
    with pytest.raises(UserError, match="2 of 16 pictures are unreadable"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_a_failure_that_is_no_pictures_fault_keeps_its_error(tmp_path, monkeypatch):
    picture(0, 20, 20).save(tmp_path / "0.jpg")

    def fail(*args):
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(dali.Decoder, "_run", fail)
    with pytest.raises(RuntimeError, match="the driver is gone"):
        run(open_catalog(tmp_path))
