"""dali.py: pixels against PIL, order against a plain list, and each pit of DALI that concerns us."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_pictures import encode, picture, recipe, take
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms import functional as tv

from mage_ds.inputs import augment, dali
from mage_ds.inputs.catalog import open_catalog
from mage_ds.inputs.order import sample_at
from mage_ds.inputs.quarantine import Quarantine

PIL_KIND = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}


def evaluate(catalog, indices=None, *, batch=8, inputs=None):
    indices = range(catalog.n) if indices is None else indices
    quarantine = Quarantine(None, 0.0, catalog.n)
    return list(
        dali.evaluation(catalog, indices, batch=batch, inputs=inputs or recipe(), device="cpu", quarantine=quarantine)
    )


def opened(catalog, i):
    return ImageOps.exif_transpose(Image.open(catalog.path(i))).convert("RGB")


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def difference(a, b):
    return (a.int() - b.int()).abs().max().item()


# --- pixels


def test_whole_picture_is_bit_equal_to_pil(tmp_path):
    """No GPU is asked for either: without one a pipeline needs device_id=None and CPU decoders."""
    for i, subsampling in enumerate((0, 1, 2)):
        picture(i, 64, 64).save(tmp_path / f"{i}.jpg", subsampling=subsampling, quality=90)
    catalog = open_catalog(tmp_path)
    (evaluated,) = evaluate(catalog, batch=3, inputs=recipe(64))
    (trained,) = take(catalog, 1, batch=3, inputs=recipe(64, scale=None, flip=False))
    want = torch.stack([as_tensor(opened(catalog, i)) for i in range(3)])
    assert evaluated.images.dtype == torch.uint8 and evaluated.images.shape == (3, 1, 3, 64, 64)
    assert torch.equal(evaluated.images[:, 0], want)
    assert torch.equal(trained.images[:, 0], want[trained.index])


@pytest.mark.parametrize(("interpolation", "levels"), [("linear", 10), ("cubic", 10)])
def test_evaluation_is_resize_and_centre_crop(folder, interpolation, levels):
    catalog = open_catalog(folder)
    inputs = recipe(16, resize=20, interpolation=interpolation)
    kind = {"linear": tv.InterpolationMode.BILINEAR, "cubic": tv.InterpolationMode.BICUBIC}[interpolation]
    for batch in evaluate(catalog, inputs=inputs):
        for i, images in zip(batch.index, batch.images, strict=True):
            if i >= 0:
                want = tv.center_crop(tv.resize(opened(catalog, i), [20], interpolation=kind), [16, 16])
                assert difference(images[0], as_tensor(want)) <= levels


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_training_crops_equal_pils(folder, interpolation):
    catalog, inputs = open_catalog(folder), recipe(16, interpolation=interpolation)
    for batch in take(catalog, 4, inputs=inputs, views=2):
        for view, row in itertools.product(range(2), range(8)):
            i, epoch = batch.index[row], batch.epoch[row]
            image = opened(catalog, i)
            ((left, top),), ((wide, tall),), (flip,) = augment.boxes(
                [image.size], epoch=[epoch], index=[i], view=view, seed=4, augmentation=inputs.augmentation
            )
            want = image.crop((left, top, left + wide, top + tall)).resize((16, 16), PIL_KIND[interpolation])
            want = ImageOps.mirror(want) if flip else want
            assert difference(batch.images[row, view], as_tensor(want)) <= 10


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_boxes_refer_to_the_upright_picture(tmp_path, kind):
    """DALI turns pictures by EXIF; a box drawn for the lying one would be another part, or outside."""
    for orientation in (1, 6, 8, 3):
        block = Image.Exif()
        block[0x0112] = orientation
        picture(7, 90, 40).save(tmp_path / f"{orientation}.{kind}", exif=block)
    catalog, inputs = open_catalog(tmp_path), recipe(16, flip=False)
    (batch,) = take(catalog, 1, batch=4, inputs=inputs)
    assert batch.valid.tolist() == [1, 1, 1, 1]
    for i, images in zip(batch.index, batch.images, strict=True):
        upright = opened(catalog, i)
        ((left, top),), ((wide, tall),), _ = augment.boxes(
            [upright.size], epoch=[0], index=[i], view=0, seed=4, augmentation=inputs.augmentation
        )
        want = upright.crop((left, top, left + wide, top + tall)).resize((16, 16), PIL_KIND["linear"])
        assert difference(images[0], as_tensor(want)) <= 10


def test_pil_decodes_nothing(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("decoded by PIL")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr(Image.Image, "load", refuse)
    catalog = open_catalog(folder)
    assert all(batch.valid.all() for batch in take(catalog, 3))
    assert len(evaluate(catalog)) == 3


# --- randomness and order


def pixels(batches):
    return {
        (int(epoch), int(i)): images
        for batch in batches
        for epoch, i, images in zip(batch.epoch, batch.index, batch.images, strict=True)
    }


def test_pixels_do_not_depend_on_place_world_or_start(folder):
    """DALI's own random numbers follow the place in the batch, and its readers restart on one world size only."""
    catalog = open_catalog(folder)
    whole = pixels(take(catalog, 2, batch=32))
    assert len(whole) == 64
    halves = [take(catalog, 2, batch=32, micro=16, rank=rank, world=2) for rank in (0, 1)]
    later = [take(catalog, 1, position=40, batch=24, micro=8, rank=rank, world=3) for rank in range(3)]
    parts = [pixels(batches) for batches in halves]
    assert parts[0].keys().isdisjoint(parts[1])
    assert parts[0].keys() | parts[1].keys() == whole.keys()
    for part in (*parts, *map(pixels, later)):
        assert all(torch.equal(images, whole[key]) for key, images in part.items())


def test_views(folder):
    catalog = open_catalog(folder)
    (one,), (three,) = take(catalog, 1), take(catalog, 1, views=3)
    assert three.images.shape == (8, 3, 3, 16, 16)
    assert torch.equal(three.images[:, :1], one.images)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert difference(three.images[:, a], three.images[:, b]) > 50


def test_micro_batches_cover_a_step_in_order_of_accumulation_and_rank(folder):
    catalog, position = open_catalog(folder), 5
    ranks = [take(catalog, 6, position=position, batch=12, micro=2, rank=rank, world=2) for rank in (0, 1)]
    got = [int(i) for a in range(6) for rank in (0, 1) for i in ranks[rank][a].index]
    assert got == sample_at(np.arange(5, 5 + 24), catalog.n, 4)[1].tolist()
    with pytest.raises(ValueError, match="multiple"):
        take(catalog, 1, batch=12, micro=5, world=1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_exactly_once_an_epoch(folder, world):
    catalog = open_catalog(folder)
    epochs, batch = 6, 6  # 6 epochs of 23 are 23 batches of 6
    streams = [take(catalog, 23, batch=batch, rank=rank, world=world) for rank in range(world)]
    seen = Counter((int(e), int(i)) for s in streams for b in s for e, i in zip(b.epoch, b.index, strict=True))
    assert seen == Counter(itertools.product(range(epochs), range(catalog.n)))
    labels = {int(i): int(label) for b in streams[0] for i, label in zip(b.index, b.labels, strict=True)}
    assert all(label == catalog.label(i) for i, label in labels.items())


def test_held_out_pictures_are_never_changed(folder):
    """Nor cut: whatever the training does to its own."""
    catalog = open_catalog(folder)
    colour = SimpleNamespace(**dict.fromkeys(("brightness", "contrast", "saturation"), 0.8), hue=0.2, sigma=(1, 2))
    vars(colour).update(jitter=1.0, grey=1.0, blur=1.0)
    changed = recipe(resize=20, crop="clamped", colour=colour, policy="rand-m9-p1")
    for one, two in zip(evaluate(catalog, inputs=recipe(resize=20)), evaluate(catalog, inputs=changed), strict=True):
        assert torch.equal(one.images, two.images)


def test_evaluation_covers_its_indices_and_pads(folder):
    catalog = open_catalog(folder)
    for _ in range(2):  # DALI's reader loses or repeats samples in a second epoch
        batches = evaluate(catalog, [3, 1, 4, 15, 9], batch=2)
        assert [b.index.tolist() for b in batches] == [[3, 1], [4, 15], [9, -1]]
        assert [b.valid.tolist() for b in batches] == [[1, 1], [1, 1], [1, 0]]
        folders = [int(catalog.name(i)[len("class")]) for i in (3, 1, 4, 15, 9)]
        assert torch.cat([b.labels for b in batches]).tolist() == [*folders, -1]
        assert batches[0].labels.dtype == torch.int64 and batches[0].valid.dtype == torch.float32
    assert evaluate(catalog, [], batch=2) == []


def test_batches_are_not_overwritten_by_the_ones_made_ahead(folder):
    catalog = open_catalog(folder)
    stream = dali.stream(
        catalog,
        seed=0,
        position=0,
        batch=4,
        micro_batch=4,
        rank=0,
        world=1,
        inputs=recipe(),
        device="cpu",
        quarantine=Quarantine(None, 0.0, catalog.n),
    )
    kept = [(batch.images, batch.images.clone()) for batch in itertools.islice(stream, 12)]
    list(itertools.islice(stream, 6))
    stream.close()
    assert all(torch.equal(images, then) for images, then in kept)
    assert len({images.data_ptr() for images, _ in kept}) == len(kept)


def test_resizing_up_and_extreme_shapes(tmp_path):
    for width, height in ((1, 1), (3, 2), (2, 900), (900, 2)):
        (tmp_path / f"{width}x{height}.png").write_bytes(encode(picture(0, width, height), "PNG"))
    catalog = open_catalog(tmp_path)
    for inputs in (recipe(32), recipe(32, scale=None)):
        assert take(catalog, 2, batch=4, inputs=inputs)[1].valid.all()
    assert evaluate(catalog, inputs=recipe(32, resize=40))[0].valid.sum() == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu(folder):
    catalog, quarantine = open_catalog(folder), Quarantine(None, 0.0, 23)
    keys = {"seed": 0, "position": 0, "batch": 8, "micro_batch": 8, "rank": 0, "world": 1, "inputs": recipe(32)}
    streams = [dali.stream(catalog, **keys, device=device, quarantine=quarantine) for device in ("cpu", "cuda")]
    for cpu, gpu in itertools.islice(zip(*streams, strict=True), 10):
        assert gpu.images.is_cuda and gpu.labels.is_cuda and gpu.valid.is_cuda
        assert (gpu.images.cpu().float() - cpu.images.float()).abs().mean() < 2
        assert torch.equal(gpu.labels.cpu(), cpu.labels)
    for stream in streams:
        stream.close()
