"""mage-ds evaluate TOKENIZER --data D [--against DATA2]: does a tokenizer fit pictures?"""

import json
import os
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from mage_ds import keyed
from mage_ds.engine import inference, process, stored
from mage_ds.errors import UserError
from mage_ds.evaluation import fitness
from mage_ds.inputs.catalog import Catalog, open_catalog
from mage_ds.recipes.schema import Augmentation, Inputs
from mage_ds.report import grids, tables
from mage_ds.report.progress import counter
from mage_ds.sampling.tiles import mine, tiles

_SHOWN = 8  # pictures of a row
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
    out: by default `evaluated/DATA` in the tokenizer's folder, beside it where it is a file.
    Returns: what results.json holds. Raises: UserError.
    """
    me = process.start()
    source, asked = Path(tokenizer), {"data": data} | ({} if against is None else {"against": against})
    sets = {name: _Set(Path(path)) for name, path in asked.items()}
    if len({each.catalog.fingerprint for each in sets.values()}) < len(sets):
        raise UserError(f"--against {against}: are the pictures of --data too; name others, which the tokenizer fits")
    ruler = _Ruler(source, inception, lpips_weights)
    out = Path(out) if out else _place(source, sets)
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
    folder = source if source.is_dir() else source.parent
    return folder / "evaluated" / "_against_".join(each.path.resolve().name for each in sets.values())


# --- what is measured


@dataclass
class _Set:
    """Pictures, and what was found on them. shown, worst: (originals, reconstructions, PSNR), see `_Ruler.measure`."""

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
        import torch

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
        from mage_ds.interop.lpips import load_lpips

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
        from mage_ds.evaluation import features

        if weights is None:
            self.missing["rfid"] = f"give Inception's weights: --inception {features.FILE}"
            return None
        return inference.frozen(features.load_inception(weights))

    def measure(self, pictures: _Set) -> None:
        """Every picture once, in fixed tiles that the ranks share; each rank gets all that was found."""
        import torch

        from mage_ds.inputs.quarantine import Quarantine

        me, catalog = process.start(), pictures.catalog
        tally, quarantine = _Tally(self, catalog.n), Quarantine(None, 1.0, catalog.n)
        with (
            torch.no_grad(),
            counter(catalog.n, "picture", f"{pictures.path}: drew", first=me.first, say=process.say) as advance,
        ):
            for batch in self._batches(catalog, quarantine):
                images = batch.images[:, 0]
                drawn, tokens, *_ = self.model(images.float() / 255)
                tally.add(batch, images, drawn.clamp(0, 1), tokens)
                advance(me.world * self.tile)
        pictures.unreadable = sum(process.gather_objects(quarantine.count))
        pictures.shown, pictures.worst = _joined(tally.shown), _joined(tally.worst)
        pictures.figures = tally.figures()
        if not pictures.figures["n"]:
            raise UserError(
                f"{pictures.path}: no picture of it can be read; `mage-ds prepare {pictures.path}` says why"
            )

    def _batches(self, catalog: Catalog, quarantine):
        from mage_ds.inputs import dali

        me = process.start()
        share = np.array(mine(tiles(catalog.n, self.tile), me.rank, me.world), dtype=np.int64).ravel()
        share[share >= catalog.n] = dali.PADDING
        return dali.evaluation(
            catalog, share, batch=self.tile, inputs=self.inputs, device=self.device, quarantine=quarantine
        )


class _Tally:
    """What this rank's pictures give; `figures` is of all ranks' pictures."""

    def __init__(self, ruler: _Ruler, n: int):
        import torch

        from mage_ds.evaluation.features import WIDTH
        from mage_ds.evaluation.moments import Moments
        from mage_ds.evaluation.reconstruction import Sums, Worst

        self.ruler, self.sums = ruler, Sums(ruler.codes, ruler.device)
        self.flat = torch.zeros((), dtype=torch.float64, device=ruler.device)
        self.moments = [Moments(WIDTH, ruler.device) for _ in range(2)] if ruler.inception else []
        self.shown, self.worst = Worst(_SHOWN), Worst(_SHOWN)
        self.place = np.argsort(keyed.permutation(0, "shown", 0, n))  # the first ones are shown

    def add(self, batch, images, drawn, tokens) -> None:
        """images uint8, drawn float in [0, 1], (B, 3, H, W) each; tokens (B, N)."""
        import torch

        from mage_ds.evaluation.reconstruction import psnr

        real, counts = images.float() / 255, batch.valid > 0
        lpips = self.ruler.lpips(real, drawn) if self.ruler.lpips else None
        decibels = self.sums.add(real, drawn, tokens, counts, lpips)["psnr"].cpu()
        flat = real.mean(dim=(2, 3), keepdim=True).expand_as(real)
        self.flat += torch.where(counts, psnr(real, flat), 0.0).sum()
        pair = images, (255 * drawn).round().to(torch.uint8)
        for moments, some in zip(self.moments, pair, strict=False):
            moments.add(self.ruler.inception(some)[0][counts])
        index = np.where(counts.cpu(), batch.index, -1)
        seen = [some.permute(0, 2, 3, 1).cpu().numpy() for some in pair]
        self.shown.add(index, -self.place[index].astype(float), *seen, decibels)
        self.worst.add(index, -decibels, *seen, decibels)

    def figures(self) -> dict:
        from mage_ds.evaluation.moments import frechet

        for total in (self.sums.total, self.flat, *(moments.total for moments in self.moments)):
            process.sum_over_ranks(total)
        found = self.sums.figures()
        if found["n"]:
            found["psnr_flat"] = float(self.flat) / found["n"]
        if self.moments and found["n"] > 1:
            gaussians = [moments.gaussian() for moments in self.moments]
            found["rfid"] = process.on_first(lambda: frechet(*gaussians))  # many seconds of work on a CPU
        return found


def _open(source: Path):
    if not source.exists():
        raise UserError(f"{source}: no such tokenizer; name a tokenizer's run folder, its export or a published file")
    return stored.load_tokenizer(source)


def _joined(worst) -> list:
    """What all ranks have kept, the same on each."""
    for rank, kept in enumerate(process.gather_objects(worst.kept)):
        if rank != process.start().rank:
            worst.merge(kept)
    return worst.kept


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
            blocks = []
            for each in sets:
                originals, drawn, psnr = zip(*(kept.things for kept in getattr(each, name)), strict=True)
                blocks.append((each.path.name, np.stack(originals), np.stack(drawn), [f"{x:.1f} dB" for x in psnr]))
            grids.save(grids.pairs(blocks, _SHOWN), out / {"shown": "pictures.png", "worst": "worst.png"}[name])
        part = out / ".results.json.part"
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, out / "results.json")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder with --out") from None
    print(f"written to {out}: results.json, pictures.png, worst.png (originals above reconstructions)", flush=True)
