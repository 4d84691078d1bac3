"""mage-ds fewshot RUN... --data D... --shots 1,5,10,25 --trials 5 --out DIR: how good with a few labelled pictures?

every source's features of every data set, once -> draws, the same for all sources -> a classifier each, shared among
the ranks -> a table, fewshot.json, fewshot.png
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mage_ds.engine import extracting, process
from mage_ds.engine.extractors import Extractor, open_extractor
from mage_ds.engine.sources import Source, open_source
from mage_ds.errors import UserError
from mage_ds.evaluation import few_shot
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.evaluation.few_shot import Answer
from mage_ds.report import fewshot_plot, passport
from mage_ds.report.progress import counter
from mage_ds.report.tables import aligned

_SPLITS = ("train", "val")
_SIDE, _LOOKED = 256, 64  # pixels; pictures that are looked at to see whether they are smaller
_KINDS = ("run:", "timm:", "mae:")


class _Set(NamedTuple):
    """A data set. labels: of both splits, int64, 0 to classes - 1; shots: those that every class has pictures for;
    draws: of each trial (classes, most shots), indices into train."""

    name: str
    train: Source
    val: Source
    labels: tuple[np.ndarray, np.ndarray]
    classes: int
    shots: list[int]
    draws: list[np.ndarray]
    remark: str | None

    @property
    def facts(self) -> dict:
        drawn = hashlib.sha256(np.stack(self.draws).tobytes()).hexdigest()
        return {
            "name": self.name,
            "classes": self.classes,
            "shots": self.shots,
            "drawn": drawn,
            "train": {"n": self.train.n, **self.train.facts},
            "val": {"n": self.val.n, **self.val.facts},
        }


class _Case(NamedTuple):
    """A classifier to be fitted; source, data: their numbers."""

    source: int
    data: int
    trial: int
    shots: int


def fewshot(
    sources: Sequence[str],
    data: Sequence[str],
    *,
    out,
    shots: Sequence[int] = (1, 5, 10, 25),
    trials: int = 5,
    seed: int = 0,
    size: int | None = None,
    batch: int = 64,
    threads: int = 1,
) -> dict | None:
    """Accuracy of classifiers of features that saw `shots` pictures a class; prints tables, writes fewshot.json and
    fewshot.png. By any number of ranks; features are kept in `out`/features, so a second call begins with fitting.

    Args: sources: of features: whatever `extractors.open_extractor` opens, RUN meaning run:RUN; data: folders with
    train/ and val/ of labelled pictures; trials: draws of the shots, of which mean and standard deviation are told;
    seed: of the draws; size: short side and centre square of the pictures that the sources are given, who bring them to
    their own size (256, or less where they are smaller); batch: pictures computed together; threads: CPU threads of a
    process, on which results depend.
    Returns: what fewshot.json holds, on the first rank; None on the others. Raises: UserError.
    """
    shots, out = sorted({*shots}), Path(out)
    process.start(threads)
    names = _unlike([Path(path).resolve().name for path in data], [*map(str, data)], "--data")
    sets = [_open(name, path, shots, trials, seed, size) for name, path in zip(names, data, strict=True)]
    texts = [text if text.startswith(_KINDS) else f"run:{text}" for text in map(str, sources)]
    found = [open_extractor(features=text) for text in texts]
    names = _unlike([each.name.removeprefix("run:") for each in found], [*map(str, sources)], "fewshot")
    held = {}
    for number, extractor in enumerate(found):
        for k, each in enumerate(sets):
            process.say(f"{names[number]}: {each.train.n:,} + {each.val.n:,} pictures of {each.name}")
            held[number, k] = [_extracted(out, extractor, each, split, batch) for split in _SPLITS]
    cases = [_Case(number, k, trial, few) for number, k in held for trial in range(trials) for few in sets[k].shots]
    answers = _fitted(cases, sets, held)
    if not process.start().first:
        return None
    options = {"shots": shots, "trials": trials, "seed": seed, "size": size, "batch": batch, "threads": threads}
    results = {
        "results": _results(cases, answers, sets, names),
        "remarks": [each.remark for each in sets if each.remark],
        "protocol": few_shot.PROTOCOL,
        "sources": [
            {"name": name, "given": str(given), "hash": each.hash, "width": each.width}
            for name, given, each in zip(names, sources, found, strict=True)
        ],
        "data": [each.facts for each in sets],
        "options": options,
        "machine": {"device": process.device_name(), "ranks": process.start().world},
        **passport.circumstances(),
    }
    _tell(results, sets, out)
    return results


# --- what is asked for -----------------------------------------------------------------------------------------------


def _unlike(names: list[str], given: list[str], where: str) -> list[str]:
    """The names, or what was given where two of them are the same."""
    if len({*given}) < len(given):
        twice = next(each for each in given if given.count(each) > 1)
        raise UserError(f"{where} {twice}: is given twice; leave one out")
    return [name if names.count(name) == 1 else text for name, text in zip(names, given, strict=True)]


def _open(name: str, path: str, shots: list[int], trials: int, seed: int, size: int | None) -> _Set:
    """UserError for what is no labelled data set of two splits, or has too few pictures for any of the shots."""
    size = size or _side(Path(path))
    train, val = (open_source(Path(path), size, split) for split in _SPLITS)
    if (train.facts["split"], val.facts["split"]) != _SPLITS:
        raise UserError(f"--data {path}: is no data set with train/ and val/, which few-shot needs; name its folder")
    for split, each in zip(_SPLITS, (train, val), strict=True):
        if each.labels is None or (each.labels < 0).any():
            raise UserError(f"--data {path}: {split}/ has pictures without a class; put each in a folder of its class")
    present = np.unique(np.concatenate([train.labels, val.labels]))  # numbers of tars may have gaps
    labels = tuple(np.searchsorted(present, each.labels) for each in (train, val))
    if len(present) < 2:
        raise UserError(f"--data {path}: has one class only; few-shot tells two or more apart")
    counts = np.bincount(labels[0], minlength=len(present))
    fewest = int(counts.argmin())
    enough = [few for few in shots if few <= counts[fewest]]
    lacking = ", ".join(str(few) for few in shots if few not in enough)
    called = train.facts["classes"][present[fewest]]
    remark = f"{name}: class {called} has {counts[fewest]} pictures in train/, too few for {lacking} shots"
    if not enough:
        raise UserError(f"--data {path}: {remark.partition(': ')[2]}; give smaller --shots")
    draws = [few_shot.draw(labels[0], len(present), enough[-1], trial, seed) for trial in range(trials)]
    return _Set(name, train, val, labels, len(present), enough, draws, f"{remark}: left out" if lacking else None)


def _side(path: Path) -> int:
    """_SIDE, or less where the pictures that are looked at are all smaller: enlarging them is left to the sources."""
    looked = open_source(path, _SIDE, "train")
    index = np.unique(np.linspace(0, looked.n - 1, _LOOKED).astype(np.int64))
    looked.read(index)  # says which one is broken
    return min(_SIDE, int(looked.sizes(index).min(1).max()))


# --- at work ---------------------------------------------------------------------------------------------------------


def _extracted(out: Path, extractor: Extractor, data: _Set, split: str, batch: int) -> FeatureSet:
    """A folder for each source and data set: by their content, so that one of another content has another folder."""
    told = [{key: value for key, value in each.facts.items() if key != "source"} for each in (data.train, data.val)]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    first = f"{extractor.name.replace(':', '-')}-{extractor.hash[:8]}"
    second = f"{Path(data.name).name}-{digest[:8]}"
    source = data.train if split == "train" else data.val
    settings = extracting.settings_of(source, extractor)
    held = FeatureSet.begin(out / "features" / first / second / split, settings, source.n, batch)
    extracting.extract(held, source, extractor)
    return held


def _fitted(cases: list[_Case], sets: list[_Set], held: dict) -> list[Answer]:
    """The answer of each case, on every rank: each rank fits its share."""
    me = process.start()
    mine, answers, loaded = range(me.rank, len(cases), me.world), {}, None
    with counter(len(mine), "classifier", "fitted", first=me.first, say=process.say) as advance:
        for number in mine:
            case = cases[number]
            data = sets[case.data]
            if loaded != (case.source, case.data):
                loaded = case.source, case.data
                shown, place = _of_draws(held[loaded][0], data)
                rows = np.concatenate([each for (each,) in held[loaded][1].chunks("features")])
                pictures, labels = (torch.from_numpy(each).to(me.device) for each in (rows, data.labels[1]))
            picked = torch.from_numpy(place[data.draws[case.trial][:, : case.shots]])
            answers[number] = few_shot.answer(shown[picked].to(me.device), pictures, labels)
            advance(1)
    everybody = {number: each for some in process.gather_objects(answers) for number, each in some.items()}
    return [everybody[number] for number in range(len(cases))]


def _of_draws(held: FeatureSet, data: _Set) -> tuple[torch.Tensor, np.ndarray]:
    """Features of all pictures that are drawn (K, D), and the row of each picture of train (n,), -1 of the others."""
    drawn = np.unique(np.stack(data.draws))
    rows = [features[np.isin(index, drawn)] for index, features in held.chunks("index", "features")]
    place = np.full(data.train.n, -1)
    place[drawn] = np.arange(len(drawn))
    return torch.from_numpy(np.concatenate(rows)), place


# --- what is told ----------------------------------------------------------------------------------------------------


def _results(cases: list[_Case], answers: list[Answer], sets: list[_Set], names: list[str]) -> list[dict]:
    """A row for each data set, source and number of shots; std: of the trials as a sample, None of one."""
    found: dict[tuple, list[Answer]] = {}
    for case, answer in zip(cases, answers, strict=True):
        found.setdefault((case.data, case.source, case.shots), []).append(answer)
    rows = []
    for (k, number, few), trials in sorted(found.items()):
        top1 = np.array([each.top1 for each in trials])
        figures = {"top1": top1.mean(), "std": top1.std(ddof=1) if len(top1) > 1 else None}
        told = [each._asdict() for each in trials]
        rows.append({"data": sets[k].name, "source": names[number], "shots": few, **figures, "trials": told})
    return rows


def _tell(results: dict, sets: list[_Set], out: Path) -> None:
    rows, trials = results["results"], results["options"]["trials"]
    spread = f", mean ± standard deviation of {trials} draws" if trials > 1 else ", one draw"
    for each in sets:
        process.say(
            f"{each.name}: {each.classes:,} classes, {each.train.n:,} pictures in train/; top-1 in % on the "
            f"{each.val.n:,} of val/{spread}"
        )
        process.say(_table([row for row in rows if row["data"] == each.name], results["options"]["shots"]))
    for line in [*results["remarks"], results["protocol"]]:
        process.say(f"- {line}")
    passport.write(out, results, "fewshot.json")
    fewshot_plot.save(out / "fewshot.png", rows, f"few-shot classification{spread}")
    process.say(f"written to {out}: fewshot.json, fewshot.png")


def _table(rows: list[dict], shots: list[int]) -> str:
    lines = [["", *(f"{few} shot{'s' * (few > 1)}" for few in shots)]]
    for source in dict.fromkeys(row["source"] for row in rows):
        cells = {row["shots"]: _cell(row) for row in rows if row["source"] == source}
        lines.append([source, *(cells.get(few, "-") for few in shots)])
    return aligned(lines)


def _cell(row: dict) -> str:
    spread = "" if row["std"] is None else f" ± {100 * row['std']:.1f}"
    return f"{100 * row['top1']:.1f}{spread}"
