"""Pictures made up by the tests, the part of a recipe that inputs read, and micro-batches of them."""

import io
import itertools
from types import SimpleNamespace

import numpy as np
from PIL import Image

from mage_ds.inputs import dali
from mage_ds.inputs.quarantine import Quarantine


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A colourful picture with soft and hard structure, so that a wrong box or flip shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def recipe(size=16, resize=None, scale=(0.2, 1.0), flip=True, interpolation="linear", **more):
    return SimpleNamespace(
        image_size=size,
        evaluation_resize=resize or size,
        interpolation=interpolation,
        augmentation=SimpleNamespace(scale=scale, ratio=(3 / 4, 4 / 3), flip=flip),
        **({"crop": "tried", "colour": None, "policy": None} | more),
    )


def take(
    catalog,
    batches,
    *,
    position=0,
    batch=8,
    micro=None,
    rank=0,
    world=1,
    inputs=None,
    views=1,
    seed=4,
    device="cpu",
    limit=0.0,
):
    """Some micro-batches of a rank's stream. limit: the share of unreadable pictures that is borne."""
    stream = dali.stream(
        catalog,
        seed=seed,
        position=position,
        batch=batch,
        micro_batch=micro or batch // world,
        rank=rank,
        world=world,
        inputs=inputs or recipe(),
        device=device,
        quarantine=Quarantine(None, limit, catalog.n),
        views=views,
    )
    taken = list(itertools.islice(stream, batches))
    stream.close()
    return taken
