"""Pictures for people: grids, labelled rows, mask overlays, loss curves. Arrays are uint8 (high, wide, 3)."""

import json
import math
import os
from pathlib import Path

import numpy as np

_PAPER = 255  # white ground
_SMALLEST = 64  # a tile's shorter side in pixels: smaller pictures are enlarged so that they can be seen
_TEXT = 13  # font size in pixels


def enlarge(images: np.ndarray, smallest: int = _SMALLEST) -> np.ndarray:
    """(n, H, W, 3), each pixel repeated by a whole factor until the shorter side is at least `smallest`."""
    factor = max(1, math.ceil(smallest / min(images.shape[1:3])))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(images: np.ndarray, columns: int | None = None, pad: int = 2, captions=None) -> np.ndarray:
    """All images in reading order.

    Args: images: uint8 (n, H, W, 3), n >= 1; columns: by default about as many as rows; pad: white pixels
    between tiles; captions: n texts, one under each tile.
    """
    images = enlarge(images)
    count, high, wide = images.shape[:3]
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    lines = math.ceil(count / columns)
    under = _TEXT + 5 if captions else 0
    high_cell, wide_cell = high + under + pad, wide + pad
    sheet = np.full((lines * high_cell + pad, columns * wide_cell + pad, 3), _PAPER, np.uint8)
    places = [(pad + i // columns * high_cell, pad + i % columns * wide_cell) for i in range(count)]
    for (top, left), image in zip(places, images, strict=True):
        sheet[top : top + high, left : left + wide] = image
    if captions:
        spots = [(left + wide / 2, top + high + 2) for top, left in places]
        sheet = _write(sheet, list(zip(spots, map(str, captions), strict=True)), anchor="ma", limit=wide)
    return sheet


def rows(entries: list, pad: int = 2) -> np.ndarray:
    """Labelled rows, one below the other, all of one size and n.

    entries: (caption, images uint8 (n, H, W, 3)), and perhaps n texts, one under each picture.
    """
    return _labelled([(caption, images, *(under or [None])) for caption, images, *under in entries], pad)


def _labelled(entries: list, pad: int) -> np.ndarray:
    """entries: (caption of the row, images, captions of the images or None)."""
    strips = [grid(images, columns=len(images), pad=pad, captions=under) for _, images, under in entries]
    margin = max(_width(caption) for caption, *_ in entries) + 14
    tops = np.cumsum([0, *(len(strip) - pad for strip in strips)])
    sheet = np.full((tops[-1] + pad, margin + strips[0].shape[1], 3), _PAPER, np.uint8)
    for top, strip in zip(tops, strips, strict=False):
        sheet[top : top + len(strip), margin:] = strip
    spots = [(margin - 7, top + len(strip) / 2) for top, strip in zip(tops, strips, strict=False)]
    captions = [caption for caption, *_ in entries]
    return _write(sheet, list(zip(spots, captions, strict=True)), anchor="rm")


def pairs(blocks: list, columns: int) -> np.ndarray:
    """Originals above their reconstructions, captions beneath; one block below the other.

    blocks: (title, originals uint8 (n, H, W, 3), reconstructions likewise, n captions), all of one size,
    n <= columns; places that a block does not fill stay white.
    """
    entries = []
    for title, originals, drawn, captions in blocks:
        missing = ((0, columns - len(originals)), (0, 0), (0, 0), (0, 0))
        above, below = (np.pad(images, missing, constant_values=_PAPER) for images in (originals, drawn))
        entries.append((title, above, None))
        entries.append(("reconstructed", below, [*captions, *[""] * missing[0][1]]))
    return _labelled(entries, pad=2)


def mask_overlay(image: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """The picture with its masked tokens covered in grey, so that black and white pictures show them too.

    Args: image: uint8 (..., H, W, 3); masked: bool (..., N) or (..., h, w) with h = w; True = covered.
    """
    high, wide = image.shape[-3:-1]
    lead = image.shape[:-3]
    side = math.isqrt(int(np.prod(masked.shape[len(lead) :])))
    cells = np.asarray(masked, bool).reshape(*lead, side, side)
    covered = cells.repeat(high // side, axis=-2).repeat(wide // side, axis=-1)[..., None]
    y, x = np.mgrid[:high, :wide]
    # A pattern that no flat region of a picture is mistaken for.
    checks = np.where((y + x) % 2, 150, 110).astype(np.uint8)[..., None]
    return np.where(covered, checks, image)


def touched_tokens(image: np.ndarray, mask: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The picture with a pixel mask in red, the other pixels of the tokens that it touches in orange, and the grid.

    Args: image: uint8 (H, W, 3); mask: bool (H, W); tokens: bool (h, w).
    """
    factor = len(image) // len(tokens)
    inside = tokens.repeat(factor, axis=0).repeat(factor, axis=1)
    tint = np.where(mask[..., None], (230, 30, 30), (255, 165, 0))
    tinted = np.where((inside | mask)[..., None], 0.4 * image + 0.6 * tint, image).astype(np.uint8)
    shown = enlarge(tinted[None], 256)[0]
    side = factor * len(shown) // len(image)
    for lines in (shown[::side], shown[:, ::side]):
        lines[:] = 128
    return grid(shown[None], captions=[f"hidden: {tokens.sum()} of {tokens.size} tokens"])


def loss_curve(metrics: Path, out: Path) -> None:
    """Draws every loss in a metrics.jsonl (keys that end in `loss` or `l1`) against the step, as PNG."""
    curves: dict[str, list] = {}
    for text in Path(metrics).read_text().splitlines():
        record = json.loads(text)
        for key, value in record.items():
            if key.endswith(("loss", "l1")) and isinstance(value, int | float):
                curves.setdefault(key, []).append((record["step"], value))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no screen, no global state
    axes = figure.add_subplot(xlabel="step", ylabel="loss", title=Path(metrics).resolve().parent.name)
    for name, points in sorted(curves.items()):
        steps, values = np.array(points).T
        many = len(points) > 200
        label, alpha = (None, 0.3) if many else (name, 1)
        (drawn,) = axes.plot(steps, values, label=label, alpha=alpha, linewidth=1.4)
        if many:  # the noise stays visible behind a running mean
            axes.plot(*_running_mean(steps, values), color=drawn.get_color(), label=name, linewidth=1.6)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(frameon=False)
    part = Path(out).with_name(f".{Path(out).name}.part")
    figure.savefig(part, format="png")
    os.replace(part, out)


def _running_mean(steps: np.ndarray, values: np.ndarray):
    span = max(5, len(values) // 50)
    means = np.convolve(values, np.ones(span) / span, mode="valid")
    middle = (span - 1) // 2
    return steps[middle : middle + len(means)], means


def save(picture: np.ndarray, path: Path) -> None:
    """Writes a PNG beside its place and renames it, so that no half-written picture is ever seen."""
    from PIL import Image

    part = path.with_name(f".{path.name}.part")
    Image.fromarray(picture).save(part, format="PNG")
    os.replace(part, path)


def _font():
    from PIL import ImageFont

    return ImageFont.load_default(size=_TEXT)


def _width(text: str) -> int:
    return math.ceil(_font().getlength(text))


def _write(sheet: np.ndarray, labels: list, *, anchor: str, limit: int | None = None) -> np.ndarray:
    """The sheet with texts on it; labels: ((x, y), text); anchor as PIL's; limit: widest text in pixels."""
    from PIL import Image, ImageDraw

    image, font = Image.fromarray(sheet), _font()
    draw = ImageDraw.Draw(image)
    for spot, text in labels:
        while limit and len(text) > 1 and font.getlength(text) > limit:
            text = text[:-2] + "…" if text.endswith("…") else text[:-1] + "…"
        draw.text(spot, text, fill=(30, 30, 30), font=font, anchor=anchor)
    return np.asarray(image)
