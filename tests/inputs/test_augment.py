"""augment.py against a plain loop with the same numbers, and against torchvision."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from mage_ds import keyed
from mage_ds.inputs import augment

STRONG = SimpleNamespace(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=True)


def plain_crop(width, height, numbers, scale, ratio):
    """torchvision's loop, one picture: (left, top, width, height)."""
    area = width * height
    for k in range(10):
        target = area * (scale[0] + numbers[k] * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + numbers[10 + k] * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(numbers[20] * (width - w + 1)), math.floor(numbers[21] * (height - h + 1)), w, h
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.8, 1.0)])
def test_crops_equal_a_plain_loop(scale):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 600, (400, 2))
    sizes[:4] = [[1, 1], [1, 500], [500, 1], [640, 480]]
    index, epoch = rng.integers(0, 10**6, 400), rng.integers(0, 300, 400)
    augmentation = SimpleNamespace(scale=scale, ratio=(3 / 4, 4 / 3), flip=False)
    anchors, shapes, flips = augment.boxes(sizes, epoch=epoch, index=index, view=1, seed=9, augmentation=augmentation)
    for k, (width, height) in enumerate(sizes.tolist()):
        numbers = keyed.uniform(9, "crop/1", [index[k]], [epoch[k]], 22)[0]
        assert (*anchors[k], *shapes[k]) == plain_crop(width, height, numbers, scale, augmentation.ratio)
    assert (anchors >= 0).all() and (shapes >= 1).all() and (anchors + shapes <= sizes).all()
    assert not flips.any()


def test_clamped_crops_equal_a_plain_loop():
    """The authors' probe: one draw, cut to the picture."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 600, (400, 2))
    sizes[:4] = [[1, 1], [1, 500], [500, 1], [640, 480]]
    index, epoch = rng.integers(0, 10**6, 400), rng.integers(0, 300, 400)
    key = {"epoch": epoch, "index": index, "view": 1, "seed": 9, "augmentation": STRONG}
    anchors, shapes, flips = augment.boxes(sizes, crop="clamped", **key)
    cut = 0
    for k, (width, height) in enumerate(sizes.tolist()):
        numbers = keyed.uniform(9, "crop/1", [index[k]], [epoch[k]], 22)[0].tolist()
        target = width * height * (0.2 + 0.8 * numbers[0])
        aspect = math.exp(math.log(3 / 4) + numbers[10] * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        cut += w > width or h > height
        w, h = max(1, min(w, width)), max(1, min(h, height))
        left, top = math.floor(numbers[20] * (width - w + 1)), math.floor(numbers[21] * (height - h + 1))
        assert (*anchors[k], *shapes[k]) == (left, top, w, h)
    assert cut > 50 and (anchors >= 0).all() and (anchors + shapes <= sizes).all()

    tried = augment.boxes(sizes, **key)
    fitted = (tried[1] == shapes).all(axis=1)  # the first try is the same: who compares recipes sees one change only
    assert 100 < fitted.sum() < 400 and (tried[0][fitted] == anchors[fitted]).all() and (tried[2] == flips).all()


def test_crops_are_distributed_as_torchvisions():
    width, height, n = 500, 375, 4000
    index = np.arange(n)
    anchors, shapes, _ = augment.boxes(
        np.tile([width, height], (n, 1)), epoch=0, index=index, view=0, seed=0, augmentation=STRONG
    )
    ours = np.concatenate([anchors, shapes], axis=1)
    torch.manual_seed(0)
    blank = torch.zeros(1, height, width)
    drawn = [RandomResizedCrop.get_params(blank, list(STRONG.scale), list(STRONG.ratio)) for _ in range(n)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in drawn])
    for quantity in (lambda b: b, lambda b: b[:, 2] * b[:, 3], lambda b: np.log(b[:, 2] / b[:, 3])):
        a, b = quantity(ours), quantity(theirs)
        error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / n)
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) < 4.5 * error).all()
        np.testing.assert_allclose(a.std(axis=0), b.std(axis=0), rtol=0.06)


def test_numbers_belong_to_sample_epoch_and_view_not_to_the_batch():
    sizes = np.random.default_rng(1).integers(50, 300, (64, 2))
    index, epoch = np.arange(64) * 7, np.arange(64) % 3

    def ask(rows, view=0, seed=0, shift=0):
        return augment.boxes(
            sizes[rows], epoch=epoch[rows] + shift, index=index[rows], view=view, seed=seed, augmentation=STRONG
        )

    whole = ask(np.arange(64))
    backwards = ask(np.arange(64)[::-1])
    for a, b in zip(whole, backwards, strict=True):
        assert (a == b[::-1]).all()
    alone = ask(np.array([5]))
    assert all((a[5] == b[0]).all() for a, b in zip(whole, alone, strict=True))
    for other in (ask(np.arange(64), view=1), ask(np.arange(64), seed=1), ask(np.arange(64), shift=1)):
        assert (other[0] != whole[0]).any() and 10 < (other[2] != whole[2]).sum() < 54
    assert 15 < whole[2].sum() < 49


def test_no_augmentation_is_the_whole_picture():
    none = SimpleNamespace(scale=None, ratio=None, flip=False)
    sizes = np.array([[40, 30], [8, 8], [7, 1000]])
    anchors, shapes, flips = augment.boxes(sizes, epoch=[0] * 3, index=[0, 1, 2], view=0, seed=0, augmentation=none)
    assert anchors.tolist() == [[0, 0], [0, 0], [0, 472]]  # a strip is cut to 8:1: it would fill the memory
    assert shapes.tolist() == [[40, 30], [8, 8], [7, 56]]
    assert not flips.any()


@pytest.mark.parametrize(("resize", "size"), [(16, 16), (37, 32), (292, 256)])
def test_centre_is_torchvisions_resize_and_centre_crop(resize, size):
    shapes = np.random.default_rng(2).integers(20, 700, (60, 2))
    resized, start = augment.centre(shapes, resize, size)
    for k, (width, height) in enumerate(shapes.tolist()):
        ramp_x = torch.arange(width).expand(1, height, width).float()
        small = tv.resize(ramp_x, [resize], interpolation=tv.InterpolationMode.NEAREST)
        assert small.shape[1:] == (resized[k, 1], resized[k, 0])
        mark = torch.stack(torch.meshgrid(torch.arange(resized[k, 1]), torch.arange(resized[k, 0]), indexing="ij"))
        corner = tv.center_crop(mark, [size, size])[:, 0, 0]
        assert corner.tolist() == start[k, ::-1].tolist()
