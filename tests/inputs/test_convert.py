"""Pictures of every kind against the one array that they were made of."""

import numpy as np
import pytest
import torch
from PIL import Image

from mage_ds.errors import UserError
from mage_ds.inputs import convert


def photos(count: int, high: int = 12, wide: int = 16) -> np.ndarray:
    """uint8 (count, high, wide, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, high, wide, 3), dtype=np.uint8)


class Capsule:
    """An array of another library: nothing but DLPack."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def converted(given) -> torch.Tensor:
    """float64 (B, 3, H, W) in 0..255."""
    count, stream = convert.pictures(given)
    found = torch.stack([x.double() if x.dtype == torch.uint8 else x.double() * 255 for x in stream])
    assert count in (None, len(found))
    return found


def test_all_kinds_of_pictures_are_one():
    rows = photos(3)
    images = torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()
    readonly = rows.copy()
    readonly.flags.writeable = False
    kinds = {
        "uint8 tensor": images,
        "float tensor": images / 255,
        "float64 tensor": images.double() / 255,
        "rows of colours": torch.from_numpy(rows),
        "list of tensors": list(images),
        "float array": rows.astype(np.float32) / 255,
        "uint8 array": rows,
        "first axis": images.numpy(),
        "list of arrays": list(rows),
        "turned twice": rows[:, ::-1, ::-1].copy()[:, ::-1, ::-1],  # negative strides
        "read-only": readonly,
        "PIL": [Image.fromarray(row) for row in rows],
        "tuple of all": (images[0], rows[1], Image.fromarray(rows[2])),
        "iterator": (row for row in rows),
        "DLPack": Capsule(images),
        "DLPack, rows": Capsule(rows),
        "list of DLPack": [Capsule(image) for image in images],
        "a hair outside": images / 255 * (1 + 2e-4),
    }
    for name, kind in kinds.items():
        exact = 1e-5 if name != "a hair outside" else 0.1
        torch.testing.assert_close(converted(kind), images.double(), atol=exact, rtol=0, msg=name)
    for single in (images[0], rows[0], Image.fromarray(rows[0]), Capsule(images[0])):
        assert (converted(single) == images[:1]).all()


def test_pil_modes_transparency_and_orientation():
    row = photos(1)[0]
    colour = Image.fromarray(row)
    grey, alpha = colour.convert("L"), np.arange(192, dtype=np.uint8).reshape(12, 16)
    transparent = Image.merge("RGBA", (*colour.split(), Image.fromarray(alpha)))
    share = alpha[..., None] / 255
    turned = colour.copy()
    turned.getexif()[0x0112] = 6  # shown turned by 90 degrees, clockwise
    palette = colour.quantize(16)
    for image, expected, levels in [
        (grey, np.stack([np.asarray(grey)] * 3, axis=-1), 0),
        (transparent, row * share + 255 * (1 - share), 1),
        (turned, np.rot90(row, -1), 0),
        (palette, np.asarray(palette.convert("RGB")), 0),
    ]:
        found = converted(image)[0].permute(1, 2, 0).numpy()
        assert found.shape == expected.shape and np.abs(found - expected).max() <= levels, image.mode


@pytest.mark.parametrize(
    "given, said",
    [
        (photos(1) * 1.0, "divide by 255"),
        (photos(1) / 127.5 - 1, "(x + 1) / 2"),
        (photos(1) / 255 - 0.2, "clamp"),
        (np.full((3, 16, 16), np.nan), "NaN"),
        (photos(1).astype(int), "int64"),
        (photos(1)[0, :, :, 0], "shape (12, 16)"),
        (photos(1)[..., :1], "three colours"),
        (photos(1)[None], "(1, 1, 12, 16, 3)"),
        ([photos(2)], "(2, 12, 16, 3)"),
        ([Image.new("I;16", (16, 16))], "mode I;16"),
        ("cat.jpg", "PIL.Image.open('cat.jpg')"),
        (["cat.jpg"], "picture 0: is a str"),
        (None, "NoneType"),
        ({"image": photos(1)}, "dict"),
        (np.array([["a"]] * 9).reshape(3, 3, 1), "picture 0"),
        (torch.zeros(1, 3, 16, 16).to_sparse(), "sparse"),
        ([torch.zeros(3, 16, 16).to_sparse()], "picture 0: is a sparse"),
    ],
)
def test_anything_else_is_refused_in_one_line(given, said):
    with pytest.raises(UserError) as error:
        converted(given)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_broken_file_is_named(tmp_path):
    Image.fromarray(photos(1, 64, 64)[0]).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    with pytest.raises(UserError, match="picture 1: cannot be read"):
        converted(Image.open(tmp_path / name) for name in ("whole.jpg", "cut.jpg"))


@pytest.mark.parametrize("given", [None, "abc", [[1, 2], [3]], [2**70], object(), torch.eye(3).to_sparse()])
def test_what_makes_no_tensor_is_refused_in_one_line(given):
    with pytest.raises(UserError, match=r"^tokens: [^\n]*$"):
        convert.tensor(given, "tokens")
