"""The Python API: a trained model as an object that turns pictures into tokens, vectors, and other pictures.

    model = mage_ds.from_pretrained("RUN")

Shapes: B pictures, images (B, 3, H, W), tokens int64 (B, N) in raster order. Whatever takes many pictures computes
them in tiles of `batch`, the last one padded: float results depend on a batch's shape, and so a picture's result does
not depend on how many others were given. Another `batch`, device or number of CPU threads gives the same up to
rounding. Results lie on the model's device, without gradients. What takes more than a few seconds
shows a bar on stderr; TQDM_DISABLE=1 in the environment hides it.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mage_ds.engine import inference, stored
from mage_ds.errors import UserError
from mage_ds.inputs import convert
from mage_ds.models import PixelViT
from mage_ds.sampling import decode, regions, settings
from mage_ds.sampling.tiles import tiles

# A tile by default, (pixels, most pictures): a single picture is computed as a whole tile too, so on a CPU, where more
# than one of 256 px at once are no faster, it holds one of these; on a GPU 16.
_TILE = {"cpu": (2**16, 16), "cuda": (2**20, 256)}
_DRAWN = 16  # generated pictures whose pixels are made at once: at 256 px each activation takes 34 MB a picture
_BAR_AFTER_S = 4


def from_pretrained(
    path, tokenizer=None, *, device=None, dtype=None, step: int | None = None, weights: str | None = None
) -> "Pretrained":
    """Opens a trained model for use: frozen, in eval mode.

    Args: path: a run folder, an export, a file of the authors' layouts (pre-trained, fine-tuned, tokenizer alone), or
    one of MAE's; tokenizer: another tokenizer than the one that belongs to it, or one where it has none; device: by
    default the GPU where there is one; dtype: of the networks, a torch.dtype or its name, by default float32 (the
    nearest code is always found in float64, results are float32 or float64); step: a run's checkpoint (the newest);
    weights: of a run that keeps an average of them, "ema" (the default) or "raw".
    Raises: UserError, one line, for what cannot be opened, and for a device or dtype that is not there.

        model = mage_ds.from_pretrained("RUN", device="cuda", dtype="bfloat16")
    """
    for name, given in (("path", path), ("tokenizer", "" if tokenizer is None else tokenizer)):
        if not isinstance(given, str | os.PathLike):
            raise UserError(f"{name} {convert.brief(given)}: must be a str or a Path")
    step = None if step is None else convert.whole("step", step, 0)
    device, dtype = _device(device), _dtype(dtype)
    return Pretrained(stored.open_model(path, tokenizer, step, weights), str(path), device, dtype)


class Pretrained:
    """What `from_pretrained` opened. Every method raises UserError, one line, for what this model cannot do.

    kind: "mage", "tokenizer", "classifier" or "encoder"; path, origin: what was opened, and what it is; image_size:
    pixels of a side of the pictures that it was trained on; factor: pixels of a side of one token; device, dtype: where
    and in what it computes; sampling: its own of a recipe's `sampling`; classes: names of its labels, label_dropout:
    share of the pictures that it learned without one, both where known; tile: pictures of this size computed together
    by default; mage, tokenizer, classifier, encoder: torch modules, None where missing.
    """

    def __init__(self, opened: stored.Stored, path: str, device: torch.device, dtype: torch.dtype):
        """`opened` gives its modules away: they are moved and converted in place."""
        self.kind, self.path, self.origin, self.image_size = opened.kind, path, opened.origin, opened.image_size
        self.device, self.dtype, self.sampling, self.classes = device, dtype, opened.sampling, opened.classes
        self.label_dropout = opened.label_dropout
        self.mage, self.classifier, self.encoder = opened.mage, opened.classifier, opened.encoder
        self.tokenizer = opened.tokenizer
        seen = self.classifier or self.encoder
        self._pixels = isinstance(seen, PixelViT)  # instead of tokens
        if self._pixels:
            self.factor = seen.patch_embed.patch_size[0]
        self._exact = torch.promote_types(dtype, torch.float32)
        self.tile = self._batch(None, self.image_size**2)
        for module in (self.mage, self.classifier, self.encoder):
            if module is not None:
                module.to(device, dtype)
        if self.tokenizer is not None:
            for part in (self.tokenizer.encoder, self.tokenizer.decoder):
                part.to(device=device, dtype=dtype, memory_format=inference.layout(device))
            # A codebook in bf16 would be another codebook.
            self.tokenizer.quantize.to(device, self._exact)
            self.factor = self.tokenizer.factor

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Pretrained({self.kind}, {self.image_size} px, {dtype} on {self.device}, {self.origin})"

    # --- pictures and tokens -------------------------------------------------------------------------------------

    @torch.no_grad()
    def tokenize(self, images, *, batch: int | None = None) -> Tensor:
        """Pictures -> tokens int64 (B, N), N = H / factor x W / factor (paper section 1).

        Args: images: of one size that `factor` divides, not only image_size: tensors (B, 3, H, W) or (3, H, W), numpy
        arrays (B, H, W, 3) or (H, W, 3), uint8 or floating in [0, 1]; PIL images; DLPack objects; or an iterable of
        such pictures, read as it is used. One picture gives B = 1. batch: pictures computed at once.

            tokens = model.tokenize(PIL.Image.open(path) for path in paths)
        """
        self.require("tokenizer", "tokenize")
        count, stream = convert.pictures(images)
        with _bar(count, "picture") as bar:
            return torch.cat([self._encode(tile)[:n] for tile, n in self._tiles(stream, batch, bar)])

    @torch.no_grad()
    def detokenize(self, tokens, grid: tuple[int, int] | None = None, *, batch: int | None = None) -> Tensor:
        """tokens int (B, N) -> pictures float (B, 3, H, W), clamped to [0, 1].

        Args: grid: rows and columns of tokens where they are no square.
        """
        self.require("tokenizer", "detokenize")
        tokens = self._tokens(tokens, self.tokenizer.quantize.codes)
        side = math.isqrt(tokens.shape[1])
        try:
            high, wide = (side, side) if grid is None else grid
        except (TypeError, ValueError):
            raise UserError(f"grid {convert.brief(grid)}: must be two numbers, rows and columns of tokens") from None
        grid = high, wide = convert.whole("grid", high, 1), convert.whole("grid", wide, 1)
        if high * wide != tokens.shape[1]:
            raise UserError(f"{tokens.shape[1]} tokens are not {high} x {wide}; say detokenize(..., grid=(h, w))")
        batch = self._batch(batch, tokens.shape[1] * self.factor**2)
        return self._in_tiles(lambda some: self._decode(some, grid), batch, tokens)

    # --- what the model knows ------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, tokens, masked, *, batch: int | None = None) -> Tensor:
        """Prediction for every position: float (B, N, codes), softmax over codes (paper section 2).

        Args: tokens: int (B, N), read where not masked; masked: bool (B, N), True = hidden from the model. Nothing
        is dropped from the encoder's input.
        """
        mage = self.require("mage", "logits")
        masked = self._mask(masked, "masked")
        masked = masked[None] if masked.ndim == 1 else masked
        tokens = self._tokens(tokens, mage.codes, masked)
        if tokens.shape[1] != mage.tokens:
            raise UserError(f"{tokens.shape[1]} tokens: this model has places for {mage.tokens}")
        batch = self._batch(batch, self.image_size**2)
        return self._in_tiles(lambda t, m: mage(t, m).to(self._exact), batch, tokens, masked)

    @torch.no_grad()
    def features(self, images, *, batch: int | None = None) -> Tensor:
        """Representation of whole pictures: float (B, width) (paper section 4).

        Of a MAGE: the mean of the encoder's last block over the tokens, then a LayerNorm without affine; of a
        fine-tuned classifier or a ViT over pixels: its own `fc_norm` in that LayerNorm's place.
        Args: images: as `tokenize`, of image_size x image_size pixels.

            vectors = model.features(images).cpu().numpy()
        """
        model = self.classifier or self.encoder or self.require("mage", "features")
        return self._of_pictures(model.features, images, batch, "features")

    @torch.no_grad()
    def classify(self, images, *, batch: int | None = None) -> Tensor:
        """Scores of a fine-tuned classifier, before the softmax: float (B, classes); images: as `features`."""
        return self._of_pictures(self.require("classifier", "classify"), images, batch, "classify")

    # --- new pictures --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        num: int = 16,
        steps: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        class_label=None,
        *,
        guidance: float | None = None,
        guidance_schedule: str | None = None,
        order: str | None = None,
        token_temperature: float | None = None,
        batch: int | None = None,
    ) -> Tensor:
        """New pictures by iterative decoding (paper section 5): float (num, 3, H, W) in [0, 1].

        Picture i is a function of (model, seed, i): those of `mage-ds sample --seed --batch` where float32, batch and
        CPU threads are the same. All are kept in memory; `mage-ds sample` writes many to disk.
        Args: steps to temperature and guidance to token_temperature: fields of a recipe's `sampling`, by default the
        model's own, as is the rest; class_label: of a model that takes one, for all pictures or for each (-1, None:
        none).
        """
        given, mage = settings.given(locals()), self.require("mage", "generate", "tokenizer")
        num = convert.whole("num", num, 1)
        labels = self._labels(class_label, num)
        how, seed = self._how(given, labels), convert.whole("seed", seed, 0)
        batch, made = self._batch(batch, self.image_size**2), []
        empty = torch.zeros(batch, mage.tokens, dtype=torch.int64, device=self.device)
        every = torch.ones_like(empty, dtype=torch.bool)
        with _bar(num * how["steps"], "step") as bar:
            for index in tiles(num, batch):
                shown = int((index < num).sum())
                condition = _part(labels, index[0], batch)
                made.append(self._fill(empty, every, index, seed, condition, how, lambda n=shown: bar.update(n)))
        return self.detokenize(torch.cat(made)[:num], batch=min(batch, _DRAWN))

    @torch.no_grad()
    def edit(
        self,
        images,
        mask,
        steps: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        class_label=None,
        *,
        guidance: float | None = None,
        guidance_schedule: str | None = None,
        order: str | None = None,
        token_temperature: float | None = None,
        composite: bool = False,
        feather: int = 0,
        index=None,
        batch: int | None = None,
    ) -> Tensor:
        """Fills a region of each picture anew (paper section 5): float (B, 3, H, W) in [0, 1].

        A token is hidden when any of its pixels is masked; the others stay fixed. A picture whose mask is empty comes
        back unchanged, pixel by pixel.
        Args: images: as `features`; mask: bool (B, H, W), or (H, W) for all of them, True = to fill; composite: take
        the pixels outside of the mask from the original instead of the detokenizer; feather: pixels inside of the
        mask's border over which a composite goes from the original to the new; index: int (B,), whose noise a picture
        gets, by default 0, 1, ...: other numbers are other variants; others: as `generate`.

            mask = numpy.zeros((256, 256), bool); mask[64:192, 64:192] = True
            images = model.edit(images, mask, seed=1, composite=True, feather=8)
            variants = model.edit([image] * 4, mask)
        """
        given = settings.given(locals())
        self.require("mage", "edit", "tokenizer")
        count, stream = convert.pictures(images)
        stream = stream if count is not None else list(stream)
        count = len(stream) if count is None else count
        mask, labels = self._pixel_mask(mask, count), self._labels(class_label, count)
        how, seed = self._how(given, labels), convert.whole("seed", seed, 0)
        how |= {"drop": 0.0}  # it would go by the smallest mask of a tile: a picture would depend on its company
        feather = convert.whole("feather", feather, 0)
        if feather and not composite:
            raise UserError(f"feather {feather}: blends into the original, so it needs composite=True")
        index = torch.arange(count) if index is None else convert.numbers("index", index, count)
        edited = []
        with _bar(count * how["steps"], "step") as bar:
            for tile, n in self._tiles(iter(stream), batch, None, "edit"):
                hidden, own, condition = (_part(each, len(edited), len(tile)) for each in (mask, index, labels))
                masked = regions.token_mask(hidden, self.factor)
                tokens, given = self._encode(tile), (own.numpy(), seed, condition, how)
                tokens = self._fill(tokens, masked.flatten(1), *given, lambda n=n: bar.update(n))
                share = self._share(hidden, composite, feather)
                edited += torch.lerp(tile, self._decode(tokens, masked.shape[1:]), share[:, None])[:n]
        return torch.stack(edited)

    # --- inside --------------------------------------------------------------------------------------------------

    def _encode(self, images: Tensor) -> Tensor:
        with _float32_convolutions():
            z = self.tokenizer.encoder(images.to(self.dtype, memory_format=inference.layout(self.device)))
        return self.tokenizer.quantize.nearest(z)

    def _decode(self, tokens: Tensor, grid) -> Tensor:
        codes = self.tokenizer.quantize.codes_at(tokens, grid).to(self.dtype)
        with _float32_convolutions():
            return self.tokenizer.decoder(codes).to(self._exact).clamp(0, 1)

    def _fill(self, tokens, masked, index, seed: int, labels, how: dict, advance) -> Tensor:
        noise = decode.keyed_noise(seed, index, tokens.shape[1])
        how = how | {"noise": noise, "labels": labels, "on_step": lambda *_: advance()}
        return decode.decode(self.mage, tokens, masked, **how)

    def _share(self, hidden: Tensor, composite: bool, feather: int) -> Tensor:
        """How much of the new picture each pixel takes: hidden bool (B, H, W) -> (B, H, W), 0 to 1."""
        if not composite:  # all of it, where there was anything to fill
            return hidden.any(dim=(1, 2))[:, None, None].expand_as(hidden).to(self._exact)
        shares = [regions.shares(each, feather) for each in hidden.cpu().numpy()]
        return torch.from_numpy(np.stack(shares)).to(self.device, self._exact)

    def _of_pictures(self, model, images, batch, what: str) -> Tensor:
        if not self._pixels:
            self.require("tokenizer", what)
        see = (lambda tile: tile.to(self.device, self.dtype)) if self._pixels else self._encode
        count, stream = convert.pictures(images)
        with _bar(count, "picture") as bar:
            vectors = [model(see(tile))[:n] for tile, n in self._tiles(stream, batch, bar, what)]
        return torch.cat(vectors).to(self._exact)

    def _tiles(self, stream: Iterator[Tensor], batch, bar, what: str | None = None) -> Iterator[tuple[Tensor, int]]:
        """(pictures float (batch, 3, H, W), how many are real); what: the method, if it needs the trained size."""
        first = next(stream, None)
        if first is None:
            raise UserError("no pictures were given")
        size = high, wide = tuple(first.shape[1:])
        if what is not None and size != (self.image_size, self.image_size):
            raise UserError(
                f"pictures are {high} x {wide}: {what} needs {self.image_size} x {self.image_size}, on which this "
                "model was trained; resize them first"
            )
        if high % self.factor or wide % self.factor:
            raise UserError(f"pictures are {high} x {wide}: {self.factor} must divide both; resize or crop them first")
        batch = self._batch(batch, high * wide)
        stream = chain([first], stream)
        done = 0
        while some := list(islice(stream, batch)):
            tile = torch.zeros(batch, 3, high, wide, dtype=self._exact, device=self.device)
            white = tile.new_tensor(255)  # a number would be divided by as its reciprocal on a GPU: not the same bits
            for i, picture in enumerate(some):
                if tuple(picture.shape[1:]) != size:
                    other = " x ".join(map(str, picture.shape[1:]))
                    raise UserError(f"picture {done + i} is {other}, the first {high} x {wide}: one size at a time")
                picture = picture.to(self.device)
                exact = picture.to(self._exact)
                tile[i] = exact / white if picture.dtype == torch.uint8 else exact.clamp(0, 1)
            yield tile, len(some)
            done += len(some)
            if bar is not None:
                bar.update(len(some))

    def _in_tiles(self, function, batch: int, *tensors: Tensor) -> Tensor:
        """function over tiles of `batch` rows of tensors (B, N), the last one padded by zeros."""
        count = len(tensors[0])
        padded = [F.pad(each, (0, 0, 0, -count % batch)).split(batch) for each in tensors]
        results = []
        with _bar(count, "picture") as bar:
            for part in zip(*padded, strict=True):
                results.append(function(*part))
                bar.update(min(batch, count - bar.n))
        return torch.cat(results)[:count]

    def _batch(self, batch: int | None, pixels: int) -> int:
        if batch is None:
            budget, most = _TILE[self.device.type]
            return max(1, min(most, budget // pixels))
        return convert.whole("batch", batch, 1)

    def _how(self, given: dict, labels: Tensor | None) -> dict:
        return settings.chosen(self.sampling, given, labels, self.mage.classes, self.label_dropout)

    def _labels(self, given, count: int) -> Tensor | None:
        """int64 (count,); None where no label is given."""
        if given is None:
            return None
        classes, said = self.mage.classes, convert.brief(given)
        if classes is None:
            raise UserError(f"class_label {said}: this model was trained without classes; leave it out")
        labels = convert.numbers("class_label", given, count)
        if len(labels) and not -1 <= labels.min() <= labels.max() < classes:
            raise UserError(f"class_label {said}: must be from 0 to {classes - 1}, or -1 for none")
        return labels.to(self.device)

    def require(self, part: str, method: str, *more: str):
        """The module ("mage", "tokenizer", "classifier") that a method needs; UserError where this model has none."""
        module = getattr(self, part)
        if module is None and part == "tokenizer":
            raise UserError(f"{self.path}: comes without a tokenizer, which {method} needs: "
                            "from_pretrained(path, tokenizer=...)")  # fmt: skip
        if module is None:
            needed = {"mage": "a pre-trained MAGE", "classifier": "a fine-tuned classifier"}[part]
            raise UserError(f"{self.path}: is a {self.kind}; {method} needs {needed}")
        for other in more:
            self.require(other, method)
        return module

    def _tokens(self, tokens, codes: int, masked: Tensor | None = None) -> Tensor:
        tokens = convert.tensor(tokens, "tokens")
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        other = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
        if other or tokens.ndim != 2 or not tokens.numel():
            raise UserError(f"tokens: {tokens.dtype} {tuple(tokens.shape)} given, must be integers (B, N)")
        tokens = tokens.to(self.device, torch.int64)
        if masked is not None:
            if masked.shape != tokens.shape:
                raise UserError(f"masked {tuple(masked.shape)}: must have the tokens' shape {tuple(tokens.shape)}")
            tokens = tokens.masked_fill(masked, 0)
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high >= codes:
            raise UserError(f"tokens from {low} to {high}: this model has codes 0 to {codes - 1}")
        return tokens

    def _mask(self, mask, name: str) -> Tensor:
        mask = convert.tensor(mask, name)
        if mask.dtype != torch.bool:
            raise UserError(f"{name} is {str(mask.dtype).removeprefix('torch.')}: must be bool, True = to fill")
        return mask.to(self.device)

    def _pixel_mask(self, mask, count: int) -> Tensor:
        mask = self._mask(mask, "mask")
        side = self.image_size
        if tuple(mask.shape) not in ((side, side), (count, side, side)):
            raise UserError(f"mask {tuple(mask.shape)}: must be ({count}, {side}, {side}) for {count} picture(s)")
        return mask.expand(count, side, side)


@contextmanager
def _float32_convolutions():
    """float32 means float32 on GPUs too, as published; matrix products have TF32 off by default."""
    convolutions = torch.backends.cudnn.conv  # this switch reads whatever else the caller has set; allow_tf32 does not
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def _bar(total: int | None, unit: str) -> tqdm:
    interval = 0.1 if sys.stderr.isatty() else 10
    # leave=None: a bar below another one vanishes when it is done
    return tqdm(total=total, unit=unit, delay=_BAR_AFTER_S, mininterval=interval, dynamic_ncols=True, leave=None)


def _part(values: Tensor | None, begin: int, count: int) -> Tensor | None:
    """Rows begin ... begin + count - 1, padded by zeros where there are no more."""
    if values is None:
        return None
    some = values[begin : begin + count]
    return F.pad(some, (0, 0) * (some.ndim - 1) + (0, count - len(some)))


def _device(device) -> torch.device:
    there = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if there else "cpu") if device is None else device)
    except (RuntimeError, TypeError):
        raise UserError(f"device {device!r}: must be cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {device}: must be cpu, cuda or cuda:N")
    if device.type == "cuda" and (not there or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device {device}: torch sees {torch.cuda.device_count()} GPU(s) here; give device='cpu'")
    return device


def _dtype(dtype) -> torch.dtype:
    found = torch.float32 if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(f"dtype {dtype!r}: must be float32, bfloat16, float16 or float64")
    return found
