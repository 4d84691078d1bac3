"""mage-ds export and convert: a trained model as a folder that others read, or in the authors' layout."""

import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mage_ds.engine import retention, stored
from mage_ds.errors import UserError
from mage_ds.interop import exported, official
from mage_ds.interop.parts import Parts

_OFFICIAL = {"mage": "mage.pth", "classifier": "classifier.pth", "tokenizer": "tokenizer.ckpt"}


def export(
    source,
    out,
    *,
    dtype: str = "float32",
    layout: str = "ours",
    checkpoint: int | None = None,
    weights: str | None = None,
    licence: str | None = None,
) -> None:
    """Writes the model of a run, of an export or of a file of the authors' as a new folder `out`.

    One process, no process group: weights of any checkpoint are memory-mapped and written tensor by tensor.
    Args: dtype: float32 or bf16 (a tokenizer beside the model and a codebook stay float32); layout: "ours",
    safetensors with config.json and a model card, or "official", one file of the authors' layout and the card;
    checkpoint: a run's step, by default the newest; it is pinned; weights: of a run that keeps an average of them,
    "ema", the default, or "raw"; licence: for the card.
    Raises: UserError for a source that cannot be opened, or not be said in the layout, an `out` that exists, or a
    disk without room.
    """
    source, out = Path(source), Path(out)
    if layout == "official" and dtype != "float32":
        raise UserError(
            f"--dtype {dtype}: files of the authors' layout are float32; leave it out, or take --layout ours"
        )
    if licence is not None and not licence.isprintable():
        raise UserError(f"--licence {licence!r}: must be one line of printable characters")
    _refuse_existing(out)
    if (source / "recipe.yaml").is_file():
        folder = retention.find(source, checkpoint)
        checkpoint = retention.step_of(folder)
        if not retention.pin(folder, f"exported into {out}"):
            print(f"{folder}: cannot be pinned (read-only?); a training that goes on there may remove it")
        total = sum(file.stat().st_size for file in folder.glob("*.weight.*.safetensors"))
        with _progress("verifying", total) as advance:
            parts = stored.open_parts(source, checkpoint, advance, weights)
    else:
        parts = stored.open_parts(source, checkpoint, weights=weights)
    _refuse(parts, source, layout)
    if licence is not None:
        parts = replace(parts, facts=parts.facts | {"licence": licence})
    _write(parts, out, dtype, layout)
    print(f"{parts.origin}\n-> {out} ({dtype}, {_sizes(out)})", flush=True)


def convert(source, out) -> None:
    """Writes a file of the authors' layout (pre-training, fine-tuned, tokenizer alone) as an export of ours, `out`.

    Raises: UserError as `export`, and for a folder.
    """
    if Path(source).is_dir():
        raise UserError(
            f"{source}: is a folder; `convert` takes a file of the authors' layout, `export` a run or export"
        )
    export(source, out)


def _refuse(parts: Parts, source: Path, layout: str) -> None:
    if parts.kind == "encoder":
        raise UserError(
            f"{source}: is an encoder alone (of a contrast, or part of a run), which has no export; copy the folder"
        )
    if layout == "official" and parts.kind not in _OFFICIAL:
        raise UserError(f"--layout official: {source} sees pixels, which the authors' layout is not for; leave it out")
    if layout == "official" and parts.kind == "mage" and parts.model.get("classes"):
        raise UserError(
            f"--layout official: {source} takes labels of {parts.model['classes']} classes, which the authors' layout "
            "has no place for; leave it out"
        )


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: exists already; choose another folder, or remove it first")


def _write(parts: Parts, out: Path, dtype: str, layout: str) -> None:
    """Writes aside, then gives the folder its name: there is a whole export under it, or none."""
    aside = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
        needed, free = exported.size(parts, dtype), shutil.disk_usage(out.parent).free
        if free < needed:
            raise UserError(
                f"--out {out}: {needed / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB free; choose another disk"
            )
        aside.mkdir()
        with _progress("writing", needed) as advance:
            if layout == "official":
                file = _OFFICIAL[parts.kind]
                official.write(aside / file, parts, advance)
                use, opened = f"`{file}`, the authors' layout", out / file
            else:
                exported.write(aside, parts, dtype, advance)
                use, opened = _files(aside), out
            exported.write_card(
                aside, parts, use, f'model = mage_ds.from_pretrained("{opened.relative_to(out.parent)}")'
            )
        _refuse_existing(out)
        os.rename(aside, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error}); make room, or choose another folder") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _files(folder: Path) -> str:
    return ", ".join(f"`{path.name}{'/' if path.is_dir() else ''}`" for path in sorted(folder.iterdir()))


def _sizes(out: Path) -> str:
    tensors = (path for path in sorted(out.rglob("*")) if path.suffix in (".safetensors", ".pth", ".ckpt"))
    return ", ".join(f"{path.relative_to(out)} {path.stat().st_size / 1e6:,.1f} MB" for path in tensors)


@contextmanager
def _progress(what: str, total: int):
    """advance(bytes): a bar on stderr where it is a terminal and there is something to wait for."""
    from tqdm import tqdm

    quiet = total < 10**8 or not sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=quiet) as bar:
        yield bar.update
