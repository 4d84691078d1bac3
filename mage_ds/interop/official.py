"""The authors' checkpoints, in and out: which key is what, and how large the model is.

Parameters of ours have the authors' names, so the key table is short: what is in a file beside the model, and the
prefix of its tokenizer. Sizes are inferred from shapes; two numbers of heads are in no shape, and follow the authors'
models: 64-wide heads in the encoder, 16 heads in the decoder. A file written here says under `mage_ds`, which the
authors' code does not read, what shapes cannot say.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mage_ds.errors import UserError
from mage_ds.interop import foreign, safe, vit
from mage_ds.interop.parts import CODES, PATCH, WORDS, Parts, brief, check_size
from mage_ds.recipes.sections import Sampling

_CLASS, _MASK = 1100, 2024
_HEAD_WIDTH, _DECODER_HEADS, _GRID = 64, 16, 16
_SAMPLING = Sampling(steps=20, temperature=6.0)
_TOKENIZER = "vqgan."
# Inside modules that the model has, but of no effect: the only such one.
_IDLE = ("token_emb.position_ids",)


# --- in ------------------------------------------------------------------------------------------------------


def read(path: Path) -> Parts:
    """The model in a file of the authors' layouts: pre-training, fine-tuned, or a tokenizer alone; or of MAE's (`vit`).

    Tensors that nothing here uses come along as `unused`. Raises UserError, one line, for a file that cannot be read
    safely, whose layout is none of these, or whose tensors do not fit: they are named.
    """
    path = Path(path)
    file = safe.read(path)
    table, settings = foreign.table(file, path), foreign.settings_of(file)
    inside = {name.removeprefix(_TOKENIZER): value for name, value in table.items() if name.startswith(_TOKENIZER)}
    body = {name: value for name, value in table.items() if not name.startswith(_TOKENIZER)}
    if foreign.has(body, "token_emb."):
        tokenizer = _tokenizer(inside, settings, path, _TOKENIZER) if foreign.has(inside, "encoder.") else None
        return (_mage if foreign.has(body, "mlm_layer.") else _classifier)(body, tokenizer, settings, path)
    for values, prefix in ((inside, _TOKENIZER), (body, "")):
        if foreign.has(values, "encoder.down.") or foreign.has(values, "quantize."):
            beside = body if prefix else {_TOKENIZER + name: value for name, value in inside.items()}
            return _tokenizer(values, settings, path, prefix, beside)
    if vit.is_one(table):
        return vit.of_table(table, settings, path)
    raise UserError(
        f"{path}: is in none of the authors' layouts; it holds {len(table)} tensors: {brief(table)}; "
        "a MAGE has token_emb.*, a tokenizer encoder.down.*, a plain ViT, as MAE's, patch_embed.proj.* and pos_embed"
    )


def _mage(body: dict, tokenizer: Parts | None, settings: Mapping, path: Path) -> Parts:
    model = _encoder(body, settings, path)
    width = foreign.shape(body, "decoder_embed.weight", 2, path)[0]
    heads = foreign.setting(settings, "decoder_heads", _DECODER_HEADS, path)
    model["decoder"] = {"depth": foreign.count(body, "decoder_blocks"), "width": width, "heads": heads}
    model["codes"] = foreign.setting(settings, "codes", CODES, path)
    model |= {"dropout": 0.1, "padding": "mask" if settings.get("padding") == "mask" else "cls"}
    if model["vocabulary"] != WORDS and "codes" not in settings:
        raise UserError(
            f"{path}: has {model['vocabulary']} words, the authors' files have {WORDS}: 1024 codes, 1000 classes, "
            "the mask; which of them are codes cannot be told"
        )
    if tokenizer and tokenizer.model["codes"] != model["codes"]:
        raise UserError(f"{path}: its tokenizer has {tokenizer.model['codes']} codes, its MAGE {model['codes']}")
    words = f"pre-training layout, encoder {foreign.say(model['encoder'])}, decoder {foreign.say(model['decoder'])}"
    return _finished("mage", model, body, tokenizer, settings, words, path)


def _classifier(body: dict, tokenizer: Parts | None, settings: Mapping, path: Path) -> Parts:
    model = _encoder(body, settings, path)
    model["class_id"] = foreign.setting(settings, "class_id", _CLASS, path)
    if model["class_id"] >= model["vocabulary"]:
        raise UserError(f"{path}: has {model['vocabulary']} words, the fake class is word {model['class_id']}")
    model |= {"classes": foreign.shape(body, "head.weight", 2, path)[0], "dropout": 0.1}
    words = f"fine-tuned layout, encoder {foreign.say(model['encoder'])}, {model['classes']} classes"
    return _finished("classifier", model, body, tokenizer, settings, words, path)


def _encoder(body: dict, settings: Mapping, path: Path) -> dict:
    vocabulary, width = foreign.shape(body, "token_emb.word_embeddings.weight", 2, path)
    tokens = foreign.shape(body, "token_emb.position_embeddings.weight", 2, path)[0] - 1
    if width % _HEAD_WIDTH and "encoder_heads" not in settings:
        raise UserError(f"{path}: its width of {width} is no whole number of {_HEAD_WIDTH}-wide heads")
    heads = foreign.setting(settings, "encoder_heads", width // _HEAD_WIDTH, path)
    encoder = {"depth": foreign.count(body, "blocks"), "width": width, "heads": heads}
    return {"encoder": encoder, "tokens": tokens, "vocabulary": vocabulary}


def _finished(kind: str, model: dict, body: dict, tokenizer: Parts | None, settings, words: str, path: Path) -> Parts:
    weights, unused = foreign.fit(kind, model, body, path, idle=_IDLE)
    side = math.isqrt(model["tokens"])
    if side * side != model["tokens"]:
        raise UserError(f"{path}: {model['tokens']} tokens are no square of positions")
    factor = 2 ** (len(tokenizer.model["multipliers"]) - 1) if tokenizer else PATCH
    size = foreign.setting(settings, "image_size", side * factor, path)
    if tokenizer:
        unused |= tokenizer.unused
        tokenizer = replace(tokenizer, unused={}, image_size=size)
    parts = Parts(
        kind,
        model,
        weights,
        image_size=size,
        origin=f"{path.name}: {words}; {foreign.say_unused(unused)}",
        tokenizer=tokenizer,
        sampling=_SAMPLING.model_dump() if kind == "mage" else {},
        unused=unused,
        foreign=True,
    )
    check_size(parts, path)
    return parts


def _tokenizer(values: dict, settings: Mapping, path: Path, prefix: str, beside: dict | None = None) -> Parts:
    channels = foreign.shape(values, "encoder.conv_in.weight", 4, path)[0]
    firsts = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(foreign.count(values, "encoder.down"))]
    widths = [foreign.shape(values, name, 4, path)[0] for name in firsts]
    codes, code_dim = foreign.shape(values, "quantize.embedding.weight", 2, path)
    if not channels or not widths or any(width % channels for width in widths):
        raise UserError(f"{path}: its tokenizer's levels are {widths} wide, no multiples of {channels}")
    model = {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": foreign.count(values, "encoder.down.0.block"),
        "code_dim": code_dim,
        "codes": codes,
    }
    weights, rest = foreign.fit("tokenizer", model, values, path, prefix)
    unused = {prefix + name: value for name, value in rest.items()} | (beside or {})
    size = foreign.setting(settings, "image_size", _GRID * 2 ** (len(widths) - 1), path)
    origin = f"{path.name}: tokenizer alone, {codes} codes; {foreign.say_unused(unused)}"
    return Parts("tokenizer", model, weights, size, origin, unused=unused, foreign=True)


# --- out -----------------------------------------------------------------------------------------------------


def table(parts: Parts) -> dict[str, Tensor]:
    """The tensors of `parts` by the authors' names: what `model` (of a tokenizer: `state_dict`) holds in their files.

    Weights become float32, whatever they were stored in; `unused` stays as it came. A vocabulary of 1024 codes and two
    words becomes theirs of 2025, and what their code wants to find though it does nothing with it (a file from them
    brought its own) is zeros.
    """
    values = _float32(parts.weights)
    if parts.kind == "tokenizer":
        return values | parts.unused
    if parts.kind == "mage" and not parts.foreign:
        if parts.model["codes"] == CODES and parts.model["vocabulary"] != WORDS:
            _widen(values)
        values = _idle(values, parts.model) | values
    if parts.tokenizer:
        values |= {_TOKENIZER + name: value for name, value in _float32(parts.tokenizer.weights).items()}
    return values | parts.unused


def _float32(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in weights.items()}


def write(path: Path, parts: Parts, advance: Callable[[int], object]) -> None:
    """Writes `parts` as a file of the authors' layout; advance(bytes) is called on the way.

    Needs no copy in memory of weights that are float32. Raises OSError where the file cannot be written.
    """
    model = parts.model
    settings = {"image_size": parts.image_size}
    if parts.kind != "tokenizer":
        settings["encoder_heads"] = model["encoder"]["heads"]
    if parts.kind == "mage":
        settings |= {"decoder_heads": model["decoder"]["heads"], "codes": model["codes"], "padding": model["padding"]}
    elif parts.kind == "classifier":
        settings["class_id"] = model["class_id"]
    key = "state_dict" if parts.kind == "tokenizer" else "model"
    content = {key: table(parts), "mage_ds": settings}
    with open(path, "wb") as file:
        try:
            torch.save(content, _Counted(file, advance))
        except RuntimeError as error:  # what torch makes of a full disk: of "No space left", "unexpected pos 64 vs 0"
            said = error.__context__
            raise said if isinstance(said, OSError) else OSError(safe.first_line(error)) from None


class _Counted:
    """A file for torch.save that says how much has been written."""

    def __init__(self, file, advance):
        self._file, self._advance, self.flush = file, advance, file.flush

    def write(self, data) -> int:
        written = self._file.write(data)
        self._advance(written)
        return written


def _widen(values: dict) -> None:
    """Fake class and mask token move from the last two words to the authors' places."""
    for name, axis in (("token_emb.word_embeddings.weight", 0), ("mlm_layer.bias", 2)):
        words = values[name].movedim(axis, 0)
        wide = torch.zeros(WORDS, *words.shape[1:], dtype=words.dtype)
        wide[:CODES], wide[_CLASS], wide[_MASK] = words[:CODES], words[-2], words[-1]
        values[name] = wide.movedim(0, axis).contiguous()


def _idle(values: dict, model: dict) -> dict[str, Tensor]:
    places, width, decoder = 1 + model["tokens"], model["encoder"]["width"], model["decoder"]["width"]
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, places, width),
        "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, places, decoder),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "decoder_pred.weight": (3 * PATCH * PATCH, decoder),
        "decoder_pred.bias": (3 * PATCH * PATCH,),
    }
    idle = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return idle | {"token_emb.position_ids": torch.arange(places)[None]}
