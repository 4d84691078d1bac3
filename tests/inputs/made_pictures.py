"""Pictures made up by the tests, and the part of a recipe that inputs read."""

import io
from types import SimpleNamespace

import numpy as np
from PIL import Image


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A colourful picture with soft and hard structure, so that a wrong box or flip shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def recipe(size=16, resize=None, scale=(0.2, 1.0), flip=True, interpolation="linear"):
    return SimpleNamespace(
        image_size=size,
        evaluation_resize=resize or size,
        interpolation=interpolation,
        augmentation=SimpleNamespace(scale=scale, ratio=(3 / 4, 4 / 3), flip=flip),
    )
