"""Grids, rows, overlays and curves: checked pixel by pixel where pixels are given."""

import json

import numpy as np
import pytest
from PIL import Image

from mage_ds.report import grids


def pictures(count, high, wide, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, high, wide, 3), dtype=np.uint8)


def test_grid_places_each_picture():
    images = pictures(5, 70, 64)
    sheet = grids.grid(images, columns=2, pad=3)
    assert sheet.shape == (3 * 73 + 3, 2 * 67 + 3, 3) and sheet.dtype == np.uint8
    for i in range(5):
        top, left = 3 + (i // 2) * 73, 3 + (i % 2) * 67
        assert (sheet[top : top + 70, left : left + 64] == images[i]).all()
    assert (sheet[3 + 2 * 73 :, 3 + 67 :] == 255).all()  # the sixth place is empty
    assert (sheet[:3] == 255).all() and (sheet[:, :3] == 255).all()


@pytest.mark.parametrize(("size", "factor"), [(32, 2), (8, 8), (30, 3), (64, 1), (256, 1)])
def test_small_pictures_are_enlarged_by_whole_pixels(size, factor):
    images = pictures(1, size, size)
    sheet = grids.grid(images, pad=0)
    assert sheet.shape == (size * factor, size * factor, 3)
    for y in range(0, size * factor, 7):
        for x in range(0, size * factor, 5):
            assert (sheet[y, x] == images[0, y // factor, x // factor]).all()


def test_grid_is_about_square_and_takes_captions():
    assert grids.grid(pictures(256, 64, 64), pad=0).shape == (1024, 1024, 3)
    images = np.zeros((3, 64, 64, 3), np.uint8)
    sheet = grids.grid(images, columns=3, pad=2, captions=["one", "a caption much longer than its tile", 3])
    assert sheet.shape[1] == 3 * 66 + 2 and sheet.shape[0] > 68
    below = sheet[66:]
    assert (below < 128).any()  # text
    assert (below[:, 65:68] == 255).all()  # a long caption stays within its tile


def test_rows_have_captions_at_the_left():
    first, second = pictures(3, 64, 64), pictures(3, 64, 64, seed=1)
    sheet = grids.rows([("original", first), ("reconstruction", second)], pad=2)
    margin = sheet.shape[1] - (3 * 66 + 2)
    assert sheet.shape[0] == 2 * 66 + 2 and margin > 60
    for i in range(3):
        left = margin + 2 + i * 66
        assert (sheet[2:66, left : left + 64] == first[i]).all()
        assert (sheet[68:132, left : left + 64] == second[i]).all()
    assert (sheet[:66, :margin] < 128).any() and (sheet[66:, :margin] < 128).any()


def test_pairs_stand_one_above_the_other_and_leave_places_white():
    blocks = [
        ("own", pictures(3, 64, 64), pictures(3, 64, 64, seed=1), ["1 dB", "2 dB", "3 dB"]),
        ("known", pictures(1, 64, 64, seed=2), pictures(1, 64, 64, seed=3), ["9 dB"]),
    ]
    sheet = grids.pairs(blocks, 3)
    margin = sheet.shape[1] - (3 * 66 + 2)
    top = 2
    for _, originals, drawn, _ in blocks:
        for images, under in ((originals, 0), (drawn, 18)):
            for i in range(3):
                tile = sheet[top : top + 64, margin + 2 + i * 66 :][:, :64]
                assert (tile == (images[i] if i < len(images) else 255)).all()
            top += 64 + under + 2
        assert (sheet[top - 20 : top - 2, margin : margin + 66] < 128).any()  # captions beneath
    assert sheet.shape[0] == top


def test_overlay_covers_exactly_the_masked_tokens():
    images = pictures(2, 32, 32)
    masked = np.zeros((2, 16), bool)
    masked[0, 5] = masked[1, 15] = True  # row 1, column 1 and the last corner; a token is 8 pixels wide
    shown = grids.mask_overlay(images, masked)
    assert (shown[0, 8:16, 8:16] != images[0, 8:16, 8:16]).mean() > 0.9
    assert set(np.unique(shown[1, 24:, 24:])) == {110, 150}
    shown[0, 8:16, 8:16] = images[0, 8:16, 8:16]
    shown[1, 24:, 24:] = images[1, 24:, 24:]
    assert (shown == images).all()
    assert (grids.mask_overlay(images[0], masked[0].reshape(4, 4)) == grids.mask_overlay(images, masked)[0]).all()


@pytest.mark.parametrize("count", [0, 1, 50, 500])
def test_loss_curve_of_any_length(tmp_path, count):
    records = [{"step": i, "loss": 7 - i / 100, "lr": 0.1} for i in range(1, count + 1)]
    records += [{"step": count, "val_loss": 3.0}, {"step": count, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    grids.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        drawn = np.asarray(image.convert("RGB"))
    assert drawn.shape[0] > 300 and (drawn.min(axis=2) < 100).any()
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_save_leaves_no_half_written_file(tmp_path):
    picture = pictures(1, 5, 7)[0]
    grids.save(picture, tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == picture).all()
