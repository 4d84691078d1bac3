"""mage-ds evaluate TOKENIZER --data D [--against DATA2]: does a tokenizer fit pictures?"""

import json
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from mage_ds import keyed
from mage_ds.engine import inference, process, stored
from mage_ds.engine.tally import SHOWN, Tally, block
from mage_ds.errors import UserError
from mage_ds.evaluation import features, fitness
from mage_ds.files import saved
from mage_ds.inputs import dali
from mage_ds.inputs.catalog import Catalog, open_catalog
from mage_ds.inputs.quarantine import Quarantine
from mage_ds.interop.lpips import load_lpips
from mage_ds.recipes.sections import Augmentation, Inputs
from mage_ds.report import grids, tables
from mage_ds.report.progress import counter
from mage_ds.sampling.tiles import mine, tiles

_TILE = (2**20, 64)  # most pixels and most pictures that are computed together, whatever the number of ranks
_LEAST = 16  # pixels a side that LPIPS needs: VGG-16 halves them four times
_ROWS = {  # figure -> its name on the screen, its form
    "n": ("pictures", ",d"),
    "l1": ("l1", ".4f"),
    "psnr": ("PSNR (dB)", ".2f"),
    "psnr_flat": ("PSNR of flat pictures (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "rfid": ("rFID", ".2f"),
    "codes_used": ("codes used", ".1%"),
    "perplexity": ("perplexity of the codes", ".1f"),
}


def evaluate_tokenizer(tokenizer, *, data, against=None, inception=None, lpips_weights=None, out=None) -> dict:
    """Tokenizes and draws again every picture of `data` once, prints a table, writes results.json, pictures.png and
    worst.png into `out`. Runs on any number of ranks; all get the same figures.

    Pictures are taken as published figures take them: short side resized to the tokenizer's size (bilinear, with
    antialiasing), centre crop. l1, PSNR, SSIM and LPIPS are of the reconstruction clamped to [0, 1], not rounded;
    rFID is of its nearest 8-bit values. All in float32.

    Args: tokenizer: whatever `stored.load_tokenizer` opens; data: its val/ where it has one, else all its
    pictures; against: pictures that the tokenizer is known to fit: adds their figures, and a verdict on `data` (see
    `evaluation.fitness`); inception, lpips_weights: files of weights, the latter by default torchvision's cached one;
    out: by default `evaluated/DATA` in the tokenizer's folder, beside it where it is a file; where that holds the
    figures of other pictures, a folder whose name tells them apart.
    Returns: what results.json holds. Raises: UserError.
    """
    me = process.start()
    source, asked = Path(tokenizer), {"data": data} | ({} if against is None else {"against": against})
    sets = {name: _Set(Path(path)) for name, path in asked.items()}
    if len({each.catalog.fingerprint for each in sets.values()}) < len(sets):
        raise UserError(f"--against {against}: are the pictures of --data too; name others, which the tokenizer fits")
    ruler = _Ruler(source, inception, lpips_weights)
    out = Path(out) if out else process.on_first(lambda: _place(source, sets))
    process.on_first(lambda: _make(out))

    for each in sets.values():
        ruler.measure(each)
    results = {
        "tokenizer": str(source.resolve()),
        **ruler.facts,
        **{name: each.described() for name, each in sets.items()},
        "not_computed": ruler.missing,
        "ranks": me.world,
        "device": me.device.type,
        "versions": {name: metadata.version(name) for name in ("torch", "deepspeed", "numpy")},
    }
    process.say(_table([*sets.values()], ruler))
    if against is not None:
        verdict = fitness.judge(*(each.figures for each in sets.values()))
        results |= {"verdict": verdict.word, "reasons": verdict.reasons, "rule": fitness.RULE}
        process.say(str(verdict))
    process.on_first(lambda: _write(out, results, [*sets.values()]))
    return results


def _place(source: Path, sets: dict) -> Path:
    """The folder of the data sets' names, with their fingerprints' digits where other ones of these names have it."""
    folder = (source if source.is_dir() else source.parent) / "evaluated"
    names = {name: each.path.resolve().name for name, each in sets.items()}
    plain = folder / "_against_".join(names.values())
    try:
        held = json.loads((plain / "results.json").read_text())
        same = all(held[name]["fingerprint"] == each.catalog.fingerprint for name, each in sets.items())
    except (OSError, ValueError, KeyError, TypeError):  # nothing that was to be kept
        return plain
    digits = (f"{names[name]}-{each.catalog.fingerprint[:8]}" for name, each in sets.items())
    return plain if same else folder / "_against_".join(digits)


# --- what is measured


@dataclass
class _Set:
    """Pictures, and what was found on them. shown, worst: see `tally.block`."""

    path: Path
    figures: dict = field(default_factory=dict)
    unreadable: int = 0
    shown: list = field(default_factory=list)
    worst: list = field(default_factory=list)

    def __post_init__(self):
        held_out = open_catalog(self.path, "val")
        self.split = "its val/" if held_out else "all of it, it has no val/"
        self.catalog: Catalog = held_out or open_catalog(self.path, "train")

    def described(self) -> dict:
        return {
            "path": str(self.path.resolve()),
            "split": self.catalog.split,
            "fingerprint": self.catalog.fingerprint,
            "unreadable": self.unreadable,
            "figures": self.figures,
            "worst": [{"name": self.catalog.name(kept.index), "psnr": -kept.error} for kept in self.worst],
        }


class _Ruler:
    """A tokenizer, and what judges its reconstructions. missing: figure -> why it is not computed."""

    def __init__(self, source: Path, inception, lpips_weights):
        torch.backends.cudnn.allow_tf32 = False
        model, info = _open(source)
        size, self.device = info["image_size"], process.start().device
        self.missing, self.codes, self.tile = {}, model.quantize.codes, max(1, min(_TILE[0] // size**2, _TILE[1]))
        self.lpips, self.inception = self._lpips(size, lpips_weights), self._inception(inception)
        self.model = inference.frozen(model)
        self.inputs = Inputs(
            image_size=size,
            augmentation=Augmentation(scale=None, ratio=None, flip=False),
            interpolation="linear",
            evaluation_resize=size,
            broken_limit=1.0,
        )
        self.facts = {"hash": info["hash"], "codes": self.codes, "image_size": size, "tile": self.tile}

    def _lpips(self, size: int, weights):
        try:
            if size < _LEAST:
                raise UserError(f"LPIPS needs pictures of {_LEAST} pixels a side, this tokenizer's have {size}")
            return inference.frozen(load_lpips(weights))
        except UserError as error:
            if weights is not None:
                raise
            self.missing["lpips"] = str(error)
            return None

    def _inception(self, weights):
        if weights is None:
            self.missing["rfid"] = f"give Inception's weights: --inception {features.FILE}"
            return None
        return inference.frozen(features.load_inception(weights))

    def measure(self, pictures: _Set) -> None:
        """Every picture once, in fixed tiles that the ranks share; each rank gets all that was found."""
        me, catalog = process.start(), pictures.catalog
        place = np.argsort(keyed.permutation(0, "shown", 0, catalog.n))
        tally = Tally(self.codes, self.device, self.lpips, self.inception, place)
        quarantine = Quarantine(None, 1.0, catalog.n)
        with (
            torch.no_grad(),
            counter(catalog.n, "picture", f"{pictures.path}: drew", first=me.first, say=process.say) as advance,
        ):
            for batch in self._batches(catalog, quarantine):
                drawn, tokens, *_ = self.model(batch.images[:, 0].float() / 255)
                tally.add(batch, drawn, tokens)
                advance(me.world * self.tile)
        pictures.unreadable = sum(process.gather_objects(quarantine.count))
        pictures.figures = tally.finish()
        pictures.shown, pictures.worst = tally.shown.kept, tally.worst.kept
        if not pictures.figures["n"]:
            raise UserError(
                f"{pictures.path}: no picture of it can be read; `mage-ds prepare {pictures.path}` says why"
            )

    def _batches(self, catalog: Catalog, quarantine):
        me = process.start()
        share = np.array(mine(tiles(catalog.n, self.tile), me.rank, me.world), dtype=np.int64).ravel()
        share[share >= catalog.n] = dali.PADDING
        return dali.evaluation(
            catalog, share, batch=self.tile, inputs=self.inputs, device=self.device, quarantine=quarantine
        )


def _open(source: Path):
    if not source.exists():
        raise UserError(f"{source}: no such tokenizer; name a tokenizer's run folder, its export or a published file")
    return stored.load_tokenizer(source)


# --- what is shown


def _table(sets: list[_Set], ruler: _Ruler) -> str:
    lines = [["", *(str(each.path) for each in sets)]]
    for name, (label, form) in _ROWS.items():
        cells = [format(each.figures[name], form) if name in each.figures else "not computed" for each in sets]
        lines.append([label, *cells])
    remarks = [f"{each.path}: {each.split}" for each in sets]
    remarks += [
        f"{each.path}: {each.unreadable:,} unreadable pictures left out; `mage-ds prepare {each.path}` lists them"
        for each in sets
        if each.unreadable
    ]
    remarks += [f"{_ROWS[name][0]} is not computed: {why}" for name, why in ruler.missing.items()]
    if ruler.inception:
        remarks.append("rFID falls as the number of pictures grows: compare it with figures of as many only")
    return "\n".join([tables.aligned(lines), f"({ruler.codes} codes)", *remarks])


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        part = out / ".results.json.part"
        part.touch()
        part.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder with --out") from None


def _write(out: Path, results: dict, sets: list[_Set]) -> None:
    try:
        for name in ("shown", "worst"):
            blocks = [(each.path.name, *block(getattr(each, name))) for each in sets]
            grids.save(grids.pairs(blocks, SHOWN), out / {"shown": "pictures.png", "worst": "worst.png"}[name])
        with saved(out / "results.json") as file:
            file.write((json.dumps(results, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder with --out") from None
    print(f"written to {out}: results.json, pictures.png, worst.png (originals above reconstructions)", flush=True)
