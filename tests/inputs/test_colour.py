"""SimCLR's changes of colour against torchvision's operations with the same numbers, and whose the numbers are."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_pictures import picture, recipe, take
from torchvision.transforms import functional as tv

from mage_ds.inputs import augment
from mage_ds.inputs.catalog import open_catalog

SIZE = 48
COLOUR = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "jitter": 0.8, "grey": 0.2, "blur": 0.5}
COLOUR = SimpleNamespace(**COLOUR, sigma=(0.1, 2.0))
DIGITS = SimpleNamespace(**{**vars(COLOUR), "saturation": 0.0, "hue": 0.0, "grey": 0.0, "blur": 0.0})


def torchvisions(image, numbers, window):
    """float (3, H, W) of 0..255, from uint8: in this order, each operation clamped as torchvision does, not rounded."""
    brightness, contrast, saturation, turn, keep, sigma, blurred = numbers.tolist()
    image = image.float() / 255
    image = tv.adjust_brightness(image, brightness)
    image = tv.adjust_contrast(image, contrast)
    image = tv.adjust_saturation(image, saturation)
    image = tv.adjust_hue(image, turn)
    if not keep:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if blurred > 1:
        image = tv.gaussian_blur(image, [window, window], [sigma, sigma])
    return image * 255


@pytest.mark.parametrize("colour", [COLOUR, DIGITS], ids=["all", "digits"])
def test_operations_are_torchvisions(folder, colour):
    """Within half a level, which rounding costs, and 0.05 for what a window of 4 sigma lacks and float32."""
    catalog = open_catalog(folder)
    plain = take(catalog, 5, inputs=recipe(SIZE), views=2)
    done = take(catalog, 5, inputs=recipe(SIZE, colour=colour), views=2)
    kinds = set()
    for before, after in zip(plain, done, strict=True):
        for view in range(2):
            numbers = augment.colours(colour, SIZE, epoch=before.epoch, index=before.index, view=view, seed=4)
            for row, mine in enumerate(numbers):
                want = torchvisions(before.images[row, view], mine, window=5)  # a tenth of 48, odd
                assert (after.images[row, view].float() - want).abs().max() <= 0.55
                kinds.add((mine[0] != 1, mine[4] == 0, mine[6] > 1))
                if not any((mine[0] != 1, mine[4] == 0, mine[6] > 1)):
                    assert torch.equal(after.images[row, view], before.images[row, view])
    assert len(kinds) >= (6 if colour.grey else 2)  # of the 8 ways to choose among the three


def test_numbers_are_as_the_recipe_says():
    index = np.arange(20_000)
    rows = augment.colours(COLOUR, 224, epoch=np.zeros_like(index), index=index, view=0, seed=0)
    jittered, grey, blurred = rows[:, 0] != 1, rows[:, 4] == 0, rows[:, 6] > 1
    for chosen, share in (
        (jittered, 0.8),
        (grey, 0.2),
        (blurred, 0.5),
        (jittered & blurred, 0.4),
        (grey & blurred, 0.1),
    ):
        assert abs(chosen.mean() - share) < 0.015
    ranges = ((rows[jittered, k], 0.2, 1.8) for k in range(3))
    for drawn, low, high in (*ranges, (rows[jittered, 3], -0.2, 0.2), (rows[blurred, 5], 0.1, 2.0)):
        assert low <= drawn.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.02 * (high - low)
        assert abs(drawn.std() - (high - low) / 12**0.5) < 0.02 * (high - low)
    assert np.abs(np.corrcoef(rows[jittered & blurred][:, [0, 1, 2, 3, 5]].T) - np.eye(5)).max() < 0.05
    assert (rows[~jittered, :4] == [1, 1, 1, 0]).all() and (rows[~blurred, 6] == 1).all()
    # SimCLR's window at 224 is 23; what is cut off has no weight: 4 sigma and more.
    windows = rows[blurred, 6]
    assert (windows % 2 == 1).all() and ((windows == 23) | (windows // 2 >= 4 * rows[blurred, 5])).all()


def test_numbers_belong_to_sample_epoch_and_view():
    index, epoch = np.arange(64) * 7, np.arange(64) % 3

    def ask(rows, view=0, seed=0, shift=0):
        return augment.colours(COLOUR, 32, epoch=epoch[rows] + shift, index=index[rows], view=view, seed=seed)

    whole = ask(np.arange(64))
    assert (ask(np.arange(64)[::-1])[::-1] == whole).all() and (ask(np.array([5])) == whole[5]).all()
    for other in (ask(np.arange(64), view=1), ask(np.arange(64), seed=1), ask(np.arange(64), shift=1)):
        assert (other != whole).any(axis=1).mean() > 0.9


def test_pictures_do_not_depend_on_world_or_start(folder):
    catalog, inputs = open_catalog(folder), recipe(16, colour=COLOUR, crop="clamped")

    def pixels(batches):
        every = (zip(b.epoch.tolist(), b.index.tolist(), b.images, strict=True) for b in batches)
        return {(epoch, i): images for epoch, i, images in itertools.chain(*every)}

    whole = pixels(take(catalog, 2, batch=32, inputs=inputs, views=2))
    parts = [pixels(take(catalog, 2, batch=32, rank=r, world=2, inputs=inputs, views=2)) for r in (0, 1)]
    later = pixels(take(catalog, 1, position=40, batch=24, inputs=inputs, views=2))
    assert len(whole) == 64 and parts[0].keys() | parts[1].keys() == whole.keys()
    for part in (*parts, later):
        assert all(torch.equal(images, whole[key]) for key, images in part.items())


def test_an_unreadable_picture_changes_no_other(tmp_path):
    for i in range(6):
        picture(i, 40, 40).save(tmp_path / f"{i}.jpg")
    catalog, inputs = open_catalog(tmp_path), recipe(16, colour=COLOUR)
    (good,) = take(catalog, 1, batch=6, inputs=inputs)
    path = catalog.path(2)
    path.write_bytes(path.read_bytes()[:-300] + bytes(298) + b"\xff\xd9")  # DALI or the check before it refuses it
    (bad,) = take(catalog, 1, batch=6, inputs=inputs, limit=1.0)
    for row, i in enumerate(bad.index):
        assert torch.equal(good.images[row], bad.images[row]) or i == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu(tmp_path):
    """Pictures that nothing decodes or resizes otherwise: PNG of the model's size."""
    for i in range(16):
        picture(i, SIZE, SIZE).save(tmp_path / f"{i}.png")
    catalog, inputs = open_catalog(tmp_path), recipe(SIZE, scale=None, colour=COLOUR)
    cpu, gpu = (take(catalog, 4, batch=16, inputs=inputs, views=2, device=device) for device in ("cpu", "cuda"))
    for a, b in zip(cpu, gpu, strict=True):
        assert b.images.is_cuda and (a.images.int() - b.images.cpu().int()).abs().max() <= 1
