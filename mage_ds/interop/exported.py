"""Exports: a model as a folder that others read: `model.safetensors` (large ones in shards, with an index, as is
usual), `config.json`, the model card `README.md`, and where they belong to it `tokenizer/` and `unused.safetensors`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from mage_ds.errors import UserError
from mage_ds.interop import safe
from mage_ds.interop.parts import MODELS, Parts, brief, check, check_size, expected
from mage_ds.recipes.sections import Sampling

FORMAT = 1
SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_WORDS = {"float32": "F32", "bf16": "BF16"}
_EXACT = "quantize."  # the nearest code is found exactly: a codebook in bf16 would be another codebook
# A tokenizer's folder says "vqgan", as those in run folders do.
_KIND_OUT = {kind: kind for kind in MODELS} | {"tokenizer": "vqgan"}
_LARGEST = 2**14  # pixels of a side
_STRINGS = ("description", "licence", "data", "tokenizer", "encoder", "weights")  # among the facts
_TITLE = {
    "mage": "MAGE",
    "classifier": "MAGE encoder, fine-tuned as a classifier",
    "tokenizer": "VQGAN tokenizer",
    "encoder": "encoder over tokens",
    "pixel_vit": "ViT over pixels",
}
_KIND_IN = {word: kind for kind, word in _KIND_OUT.items()}


# --- out -----------------------------------------------------------------------------------------------------


def size(parts: Parts, dtype: str) -> int:
    """Bytes of the tensors of an export."""
    total = sum(value.numel() * _dtype(name, dtype, parts).itemsize for name, value in parts.weights.items())
    total += sum(value.nbytes for value in parts.unused.values())
    return total + (size(parts.tokenizer, "float32") if parts.tokenizer else 0)


def write(
    folder: Path, parts: Parts, dtype: str = "float32", advance: Callable[[int], object] = lambda _: None
) -> None:
    """Writes `parts` into `folder`, an existing empty one, all but the model card. A tokenizer beside the model stays
    float32. Holds one tensor at a time beside what `parts` holds; advance(bytes) is called on the way."""
    shards, index = _shards(parts, dtype), {}
    for number, shard in enumerate(shards, 1):
        one = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(shard, one)
        _write_tensors(
            folder / one, {name: (value, _dtype(name, dtype, parts)) for name, value in shard.items()}, advance
        )
    if len(shards) > 1:
        total = sum(value.numel() * _dtype(name, dtype, parts).itemsize for name, value in parts.weights.items())
        facts = {"metadata": {"total_size": total}, "weight_map": index}
        _write_text(folder / "model.safetensors.index.json", json.dumps(facts, indent=1) + "\n")
    if parts.unused:
        save_file({n: v.contiguous().clone() for n, v in parts.unused.items()}, folder / "unused.safetensors")
    config = {"kind": _KIND_OUT[parts.kind], "model": parts.model, "image_size": parts.image_size}
    more = {"sampling": parts.sampling, "facts": parts.facts, "origin": parts.origin if parts.foreign else ""}
    config |= {name: value for name, value in more.items() if value}
    config |= {"foreign": True} if parts.foreign else {}
    _write_text(folder / "config.json", json.dumps({"format": FORMAT, "dtype": dtype, **config}, indent=1) + "\n")
    if parts.tokenizer:
        (folder / "tokenizer").mkdir()
        write(folder / "tokenizer", parts.tokenizer, advance=advance)


def _dtype(name: str, dtype: str, parts: Parts) -> torch.dtype:
    exact = parts.kind == "tokenizer" and name.startswith(_EXACT)
    return torch.float32 if exact else DTYPES[dtype]


def _shards(parts: Parts, dtype: str) -> list[dict[str, Tensor]]:
    shards, held = [{}], 0
    for name, value in parts.weights.items():
        nbytes = value.numel() * _dtype(name, dtype, parts).itemsize
        if shards[-1] and held + nbytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = value
        held += nbytes
    return shards


def _write_tensors(
    path: Path, tensors: dict[str, tuple[Tensor, torch.dtype]], advance: Callable[[int], object]
) -> None:
    """A .safetensors file, tensor by tensor, so that it takes no memory and shows progress: the length of the header
    as 8 bytes, the header as JSON, then the values."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    words = {DTYPES[name]: word for name, word in _WORDS.items()}
    for name, (value, dtype) in tensors.items():
        end = at + value.numel() * dtype.itemsize
        header[name] = {"dtype": words[dtype], "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value, dtype in tensors.values():
            plain = value.detach().to(dtype).contiguous().flatten()
            file.write(memoryview(plain.view(torch.uint8).numpy()))
            advance(plain.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_card(folder: Path, parts: Parts, files: str, use: str) -> None:
    """README.md: licence and name as a header that model hubs read, then where the model comes from.

    files: what lies beside it; use: a line of Python that opens it.
    """
    facts = parts.facts
    count = sum(value.numel() for value in parts.weights.values())
    header = {"license": facts.get("licence", "unknown"), "library_name": "mage_ds", "tags": ["mage"]}
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# {_plain(facts.get('description') or _TITLE[parts.kind])}", ""]
    side = parts.image_size
    lines += [f"{_TITLE[parts.kind]}: {count:,} parameters, for pictures of {side} x {side} pixels."]
    lines += ["", "```python", "import mage_ds", "", use, "```", "", f"Files: {files}.", "", "| | |", "|---|---|"]
    rows = {"origin": parts.origin, "steps of training": facts.get("step"), "weights": facts.get("weights")}
    rows |= {"data (fingerprint)": facts.get("data")}
    rows |= {"tokenizer (hash)": facts.get("tokenizer"), "frozen encoder (hash)": facts.get("encoder")}
    rows |= {"classes": parts.model.get("classes"), **facts.get("figures", {})}
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    if parts.unused:
        names = ", ".join(f"`{_plain(name)}`" for name in sorted(parts.unused))
        lines += ["", f"Carried along, without use here: {names}."]
    if "recipe" in facts:
        recipe = yaml.safe_dump(facts["recipe"], sort_keys=False, default_flow_style=None, width=110).rstrip()
        lines += ["", "## Recipe", "", "```yaml", recipe, "```"]
    _write_text(folder / "README.md", "\n".join(lines) + "\n")


def _cell(value) -> str:
    return _plain(f"{value:.6g}" if isinstance(value, float) else value).replace("|", "\\|")


def _plain(value) -> str:
    """On one line of the card."""
    return safe.printable(" ".join(str(value).split()))


# --- in ------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Parts:
    """The model in an export, or in a tokenizer's or encoder's folder; weights are memory-mapped.

    Raises UserError, one line.
    """
    folder = Path(folder)
    config = _config(folder)
    kind, model = _KIND_IN[config["kind"]], config["model"]
    weights = _weights(folder)
    # No model has more blocks than tensors: such numbers in a file of a stranger would take for ever to build.
    counts = [part.get("depth") for part in model.values() if isinstance(part, dict)] + [model.get("blocks")]
    counts += [len(part) for part in model.values() if isinstance(part, list)]  # levels of a tokenizer
    if any(isinstance(count, int) and count > len(weights) for count in counts):
        raise UserError(f"{folder}: damaged: its weights do not fit its config.json; copy it again")
    shapes = expected(kind, model, folder)
    check(weights, shapes, weights.keys() - shapes.keys(), folder)
    if kind != "tokenizer" and (folder / "tokenizer").is_dir():
        tokenizer = read(folder / "tokenizer")
        if tokenizer.kind != "tokenizer" or tokenizer.model["codes"] != model.get("codes", tokenizer.model["codes"]):
            raise UserError(f"{folder}/tokenizer: is not the tokenizer of this model; copy the whole folder")
    else:
        tokenizer = None
    beside = folder / "unused.safetensors"
    parts = Parts(
        kind,
        model,
        weights,
        config["image_size"],
        origin=safe.printable(config.get("origin", "")) or f"export {folder.resolve().name}",
        tokenizer=tokenizer,
        sampling=config.get("sampling", {}),
        unused=safe.mapped_tensors(beside) if beside.is_file() else {},
        foreign=config.get("foreign") is True,
        facts=config.get("facts", {}),
    )
    if kind in ("mage", "classifier") or tokenizer:  # an encoder alone may lie beside its tokenizer, in a run
        check_size(parts, folder)
    elif kind == "pixel_vit":
        patch = model["patch"]
        if model["image_size"] != parts.image_size or type(patch) is not int or parts.image_size % patch:
            raise UserError(f"{folder}: damaged: its patches do not fit {parts.image_size} px; copy it again")
    elif kind == "tokenizer" and parts.image_size % 2 ** (len(model["multipliers"]) - 1):
        raise UserError(f"{folder}: damaged: its tokens do not divide pictures of {parts.image_size} px; copy it again")
    return parts


def _config(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_text())
        if config.get("format", FORMAT) != FORMAT:
            raise UserError(f"{folder}: format {safe.printable(config['format'])[:40]}, this version reads {FORMAT}")
        facts, size = config.get("facts", {}), config.get("image_size")
        fits = {"kind": config.get("kind") in _KIND_IN, "model": isinstance(config.get("model"), dict)}
        fits |= {
            "image_size": type(size) is int and 1 <= size <= _LARGEST,
            "origin": isinstance(config.get("origin", ""), str),
        }
        fits |= {f"facts.{key}": isinstance(facts.get(key, ""), str) for key in _STRINGS}
        fits["facts.figures"] = isinstance(facts.get("figures", {}), dict)
        names = facts.get("classes", [])
        fits["facts.classes"] = isinstance(names, list) and all(isinstance(name, str) for name in names)
        wrong = [key for key, fit in fits.items() if not fit]
        if wrong:
            raise ValueError(f"config.json: {', '.join(wrong)} missing or not as exported")
        if config["kind"] == "mage" or "sampling" in config:
            config["sampling"] = Sampling.model_validate(config.get("sampling")).model_dump()
        return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}: damaged export ({safe.first_line(error)}); copy it again") from None


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return safe.mapped_tensors(folder / "model.safetensors")
    try:
        where = json.loads(index.read_text())["weight_map"]
        names = sorted({Path(name).name for name in where.values()})
        if not all(name.isprintable() for name in names):
            raise ValueError("a shard's name is not printable")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: damaged ({safe.first_line(error)}); copy it again") from None
    weights = {}
    for name in names:
        weights |= safe.mapped_tensors(folder / name)
    lost = where.keys() - weights.keys()
    if lost:
        raise UserError(f"{index}: {len(lost)} tensors are in no shard: {brief(sorted(lost))}; copy the folder again")
    return weights
