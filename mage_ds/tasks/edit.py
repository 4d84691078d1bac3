"""mage-ds edit: regions of pictures filled anew by a trained MAGE (paper section 5, Figures 1 and 5 to 7)."""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from mage_ds import files
from mage_ds.engine import ds_config, stored
from mage_ds.errors import UserError, refuse_differences
from mage_ds.inputs import convert
from mage_ds.pretrained import Pretrained, from_pretrained
from mage_ds.report import grids
from mage_ds.report.pictures import writing
from mage_ds.report.progress import counter
from mage_ds.sampling import decode, labels, regions
from mage_ds.sampling import settings as decoding

_PER_ROW = 10  # pictures of a panel's row
_FREE = ("run", "model", "device", "versions", "variants")  # of edits.json: may differ when a folder is continued
_EXACT = ("PNG", "BMP", "DIB", "GIF", "PPM", "TGA")  # PIL's formats that keep every pixel of a mask; see `_lossy`


@dataclass(frozen=True)
class _Edit:
    """One picture to edit. name: of its files; pixels uint8 (H, W, 3), mask bool (H, W), both as the model takes
    them; facts: what edits.json says of it."""

    name: str
    pixels: np.ndarray
    mask: np.ndarray
    facts: dict


def edit(
    run,
    pictures: list,
    region: list,
    out,
    *,
    tokenizer=None,
    variants: int = 4,
    seed: int = 0,
    steps: int | None = None,
    temperature: float | None = None,
    token_temperature: float | None = None,
    order: str | None = None,
    guidance: float | None = None,
    guidance_schedule: str | None = None,
    class_label: str | None = None,
    composite: bool = False,
    feather: int = 0,
    show_mask: bool = False,
    batch: int | None = None,
    precision: str = "float32",
    checkpoint: int | None = None,
) -> None:
    """Fills a region of each picture anew, several times: NAME_1.png ..., NAME.panel.png and edits.json in `out`.

    A picture's short side is resized to the model's size (bicubic, antialiased), then its centre square is taken;
    masks go the same way. Variant v of picture i is a function of (weights, picture, mask, seed, i, v) and the
    settings in edits.json. What `out` holds of the same settings stays, if it is what edits.json has the checksum of;
    more variants may be added.

    Args: run, tokenizer: whatever `from_pretrained` opens; region: one for all pictures or one for each: words of
    `sampling.regions`, the file of a mask, or "alpha", the picture's own transparency; steps to guidance_schedule: by
    default the model's own; class_label: what `labels.parse` reads, one for all or one for each; composite,
    feather: as `Pretrained.edit`; show_mask: adds NAME.mask.png, the tokens that a mask touches; batch: pictures
    computed together; precision: of the model, "float32", "bf16" or "auto"; checkpoint: a run's step, by default the
    newest.
    Raises: UserError, one line, for a picture, region or setting that cannot be, and for an `out` of other settings or
    with files of other origin.
    """
    given = decoding.given(locals())
    if feather and not composite:
        raise UserError(f"--feather {feather}: blends into the original, so it goes with --composite")
    if feather and "alpha" in region:
        raise UserError(f"--feather {feather}: --region alpha has no original to blend into; leave one of them out")
    if guidance and class_label is None:
        raise UserError(f"--guidance {guidance}: moves towards a label; give --class-label too")
    _refuse_count("--region", region, pictures)
    out, device = Path(out), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = ds_config.choose_precision(precision, device)
    model = from_pretrained(run, tokenizer, device=device, dtype=ds_config.dtype_of(precision), step=checkpoint)
    model.require("mage", "edit", "tokenizer")
    asked = _labels(class_label, model, pictures)
    _refuse_unlearned(model, given, asked)
    before, edits = _begun(out), _read(pictures, region, model, feather)
    settings = {
        "run": str(Path(run).resolve()),
        "model": model.origin,
        "weights": stored.weights_hash(model.mage.state_dict()),
        "tokenizer": stored.weights_hash(model.tokenizer.state_dict()),
        "seed": seed,
        "sampling": model.sampling | given | {"drop": 0.0},  # as `Pretrained.edit`: nothing is left out
        "class_label": asked,
        "composite": composite,
        "feather": feather,
        "precision": precision,
        "batch": batch or before.get("batch", model.tile),
        "device": model.device.type,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
        "pictures": [each.facts for each in edits],
    }
    variants, made = _open(out, edits, settings, variants, before)
    every = [(i, v) for i in range(len(edits)) for v in range(1, variants + 1)]
    todo = [(i, v) for i, v in every if _file(out, edits[i], v).name not in made]
    how = given | {"seed": seed, "composite": composite, "feather": feather, "batch": settings["batch"]}
    with counter(len(todo), "picture", "edited", first=True, say=print) as advance:
        for start in range(0, len(todo), settings["batch"]):
            some = todo[start : start + settings["batch"]]
            places = [i for i, _ in some]
            images = [edits[i].pixels for i in places]
            index = [(v - 1 << 32) + i for i, v in some]  # variant 1 has the noise of `Pretrained.edit`'s pictures
            condition = None if asked is None else [asked[i] for i in places]
            masks = np.stack([edits[i].mask for i in places])
            drawn = model.edit(images, masks, class_label=condition, index=index, **how)
            with writing(out):
                for (i, v), picture in zip(some, decode.pixels(drawn), strict=True):
                    path = _file(out, edits[i], v)
                    grids.save(picture, path)
                    made[path.name] = files.sha256(path)
                _write(out, settings, variants, made, complete=False)
            advance(len(some))
    with writing(out):
        _draw_panels(out, edits, variants, composite, model.factor, show_mask)
        _write(out, settings, variants, made, complete=True)
    print(f"{len(edits)} panel(s) in {out}; look at {out / edits[0].name}.panel.png first")


def _labels(text: str | None, model: Pretrained, pictures: list) -> list[int] | None:
    """The label of each picture."""
    if text is None:
        return None
    if model.mage.classes is None:
        raise UserError(f"--class-label {text}: this model was trained without classes; leave it out")
    asked = labels.parse(text, model.mage.classes, model.classes)
    _refuse_count("--class-label", asked, pictures)
    return asked * (len(pictures) if len(asked) == 1 else 1)


def _refuse_unlearned(model: Pretrained, given: dict, asked: list[int] | None) -> None:
    """What `sampling.settings` refuses too, but in the words of the command line and before anything is begun."""
    if model.label_dropout != 0:
        return
    never = f"{model.path} was trained with label_dropout = 0 and cannot do without a label"
    if asked is None:
        raise UserError(f"--class-label is missing: {never}; give one of 0..{model.mage.classes - 1}")
    if guidance := (model.sampling | given)["guidance"]:
        raise UserError(f"--guidance {guidance:g}: {never}, which guidance leads away from; give --guidance 0")


def _refuse_count(what: str, given: list, pictures: list) -> None:
    if len(given) not in (1, len(pictures)):
        raise UserError(f"{what}: {len(given)} given for {len(pictures)} pictures; give one, or one for each")


# --- pictures and masks -------------------------------------------------------------------------------------------


def _read(paths: list, texts: list, model: Pretrained, feather: int) -> list[_Edit]:
    side, edits, taken = model.image_size, [], set()
    print(f"pictures: short side resized to {side} px, centre square", flush=True)
    for path, text in zip(map(Path, paths), texts * (len(paths) if len(texts) == 1 else 1), strict=True):
        name = _distinct(path.stem, taken)
        pixels, alpha, digest = _open_picture(path)
        mask, source = _mask(text, alpha, pixels.shape[:2], side, path)
        tokens = regions.token_mask(mask, model.factor)
        hidden = int(tokens.sum())
        said = f"{path}: {pixels.shape[1]} x {pixels.shape[0]} px, {text}: {hidden} of {tokens.size} tokens hidden"
        if hidden == tokens.size:
            said += "; nothing of the picture stays known"
        if feather and regions.shares(mask, feather).max() < 1:
            said += "; the region is thinner than --feather: nothing becomes wholly new"
        print(said, flush=True)
        facts = {"name": name, "source": path.name, "sha256": digest, "region": source, "hidden_tokens": hidden}
        edits.append(_Edit(name, _square(pixels, side), mask, facts))
    return edits


def _distinct(name: str, taken: set) -> str:
    """`name`, or with a number behind where another picture has it, on disks too that do not tell A from a."""
    tried, number = name, 1
    while tried.casefold() in taken:
        number += 1
        tried = f"{name}-{number}"
    taken.add(tried.casefold())
    return tried


def _open_image(path: Path, what: str):
    """(PIL image, decoded and upright; digest of the file)."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if what == "mask" and _lossy(image, data):
                raise UserError(
                    f"{path}: is a {image.format} that may be lossy, in which black is not quite black; save the mask "
                    "as PNG, BMP, TIFF, GIF or lossless WebP"
                )
            return ImageOps.exif_transpose(image), hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}; see the spelling") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a {what} ({why}); leave it out") from None


def _lossy(image, data: bytes) -> bool:
    """Whether the file may hold other pixels than were saved: around a border those would be taken to be filled."""
    if image.format == "TIFF":
        return image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
    return image.format not in _EXACT and not (image.format == "WEBP" and _lossless_webp(data))


def _lossless_webp(data: bytes) -> bool:
    """Of the bytes of a WebP file: its first picture is in a chunk `VP8L`, a lossy one in `VP8 `."""
    at = 12  # behind RIFF, the size, WEBP
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name in (b"VP8L", b"VP8 "):
            return name == b"VP8L"
        at += 24 if name == b"ANMF" else 8 + size + size % 2  # an animation's frame: its chunks are inside
    return False


def _open_picture(path: Path) -> tuple[np.ndarray, np.ndarray | None, str]:
    """(uint8 (H, W, 3) on white; bool (H, W), where it is transparent, None if nowhere; digest)."""
    image, digest = _open_image(path, "picture")
    return convert.upright(image, str(path)), _transparent(image), digest


def _transparent(image) -> np.ndarray | None:
    """bool (H, W): pixels that are not wholly opaque, the soft edge of an eraser too. None if there are none."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    alpha = np.asarray(image.convert("RGBA"))[..., 3] < 255
    return alpha if alpha.any() else None


def _mask(text: str, alpha: np.ndarray | None, size: tuple, side: int, picture: Path) -> tuple[np.ndarray, str]:
    """(pixel mask (side, side), what edits.json calls it). size: the picture's (H, W)."""
    if text == "alpha":
        if alpha is None:
            raise UserError(f"{picture}: has no transparent pixel, which --region alpha would fill; give another")
        mask, source = _square_mask(alpha, side), text
    elif regions.is_region(text) or not _is_file_name(text):
        return regions.region(text, side, side), text
    else:
        mask, digest = _mask_of_file(Path(text))
        source = f"{Path(text).name} {digest}"
        if mask.shape != (side, side):
            if mask.shape != size:
                high, wide = mask.shape
                raise UserError(
                    f"{text}: is {wide} x {high} px; a mask must be as large as its picture ({picture}: {size[1]} x "
                    f"{size[0]}) or as those of the model ({side} x {side})"
                )
            mask = _square_mask(mask, side)
    if not mask.any():
        raise UserError(f"{text}: hides nothing of the centre square of {picture}; white, or transparent, is to fill")
    return mask, source


def _is_file_name(text: str) -> bool:
    return Path(text).suffix[1:].isalpha() or os.sep in text or (len(text) < 256 and Path(text).exists())


def _mask_of_file(path: Path) -> tuple[np.ndarray, str]:
    """(bool (H, W), digest): transparent pixels, or where all are opaque those that are not black."""
    image, digest = _open_image(path, "mask")
    mask = _transparent(image)
    if mask is None:
        plain = image if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16") else image.convert("RGB")
        mask = np.asarray(plain) != 0
        mask = mask.any(axis=2) if mask.ndim == 3 else mask
    return mask, digest


def _centre(size: tuple) -> tuple[slice, slice]:
    """Where the centre square of (H, W) lies. Cut out first, so that no long picture is enlarged as a whole."""
    high, wide = size
    short = min(size)
    top, left = (high - short) // 2, (wide - short) // 2
    return slice(top, top + short), slice(left, left + short)


def _square(pixels: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels[_centre(pixels.shape[:2])]))
    return np.asarray(image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC))


def _square_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """A pixel of the smaller picture is to fill if any that it is made of is: a thin scratch is not lost."""
    image = Image.fromarray(mask[_centre(mask.shape)].astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BOX)) > 0


# --- the folder ---------------------------------------------------------------------------------------------------


def _file(out: Path, one: _Edit, variant: int) -> Path:
    return out / f"{one.name}_{variant}.png"


def _begun(out: Path) -> dict:
    """edits.json of the folder; empty where there is none."""
    path = out / "edits.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose a folder")
    try:
        before = {"precision": "float32", "files": {}, **json.loads(path.read_text())}
        numbers = {name: int(before[name]) for name in ("variants", "batch")}
        return before | numbers | {"files": dict(before["files"])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); choose another --out") from None


def _open(out: Path, edits: list[_Edit], settings: dict, variants: int, before: dict) -> tuple[int, dict[str, str]]:
    """Creates the folder, or checks that it holds edits of the same settings, and no files of other origin.

    Returns how many variants it will hold, and name -> checksum of those that are there. One that is there without a
    checksum, after a kill, is made again; a changed one is nobody's to write over.
    """
    if before:
        refuse_differences(out, "edits", before, settings, _brief, _FREE)
    variants, begun = max(variants, before.get("variants", 0)), before.get("variants", 0)
    new = [f"{each.name}{end}.png" for each in edits for end in (".panel", ".mask") if not before]
    new += [_file(out, each, v).name for each in edits for v in range(begun + 1, variants + 1)]
    for name in new:
        if (out / name).exists():
            raise UserError(f"{out / name}: exists and was not made by `edit`; choose another --out")
    made = {}
    for path in (_file(out, each, v) for each in edits for v in range(1, begun + 1)):
        if path.name in before["files"] and path.exists():
            with writing(out):
                made[path.name] = files.sha256(path)
            if made[path.name] != before["files"][path.name]:
                raise UserError(f"{path}: was changed since `edit` made it; remove it, or choose another --out")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        _write(out, settings, variants, made, complete=False)
    return variants, made


def _brief(value) -> str:
    """Of a setting, for a line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(f"{each['name']} ({each['region'].split()[0]}, {each['sha256'][:8]})" for each in value)[:200]
    return str(value)[:12] if isinstance(value, str) else str(value)[:200]


def _draw_panels(out: Path, edits: list[_Edit], variants: int, composite: bool, factor: int, show_mask: bool) -> None:
    """NAME.panel.png of each picture: original, masked, variants; and NAME.mask.png where it is asked for."""
    for each in edits:
        tokens = regions.token_mask(each.mask, factor)
        # Grey is what the result does not share with the original.
        covered = grids.mask_overlay(each.pixels, each.mask if composite else tokens)
        drawn = [_load(_file(out, each, v)) for v in range(1, variants + 1)]
        shown = np.stack([each.pixels, covered, *drawn])
        captions = ["original", "masked", *range(1, variants + 1)]
        panel = grids.grid(shown, min(len(shown), _PER_ROW), captions=captions)
        grids.save(panel, out / f"{each.name}.panel.png")
        if show_mask:
            grids.save(grids.touched_tokens(each.pixels, each.mask, tokens), out / f"{each.name}.mask.png")


def _load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _write(out: Path, settings: dict, variants: int, made: dict[str, str], *, complete: bool) -> None:
    """edits.json; made: name -> checksum of the variants that are there."""
    content = {**settings, "variants": variants, "files": made, "complete": complete}
    with files.saved(out / "edits.json") as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
