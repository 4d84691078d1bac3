"""What an evaluation stands on: the extractor, the pictures, the reference, opened and checked before any work is done,
and the facts that results.json says of them."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mage_ds.engine import extracting, extractors, painting, process, retention, run_folder, sources
from mage_ds.engine.drawn import Kept, drawn, redrawn
from mage_ds.errors import UserError
from mage_ds.evaluation import references, suspicions
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.evaluation.figures import METRICS
from mage_ds.files import sha256
from mage_ds.recipes.sections import Sampling
from mage_ds.report import passport

_NUM, _BATCH = 50_000, 64
# What pictures that are there leave as it is.
_MODELS = {"per_class": None, "tokenizer": None, "class_label": None, "seed": 0, "precision": "float32"}
_MODELS |= {"checkpoint": None, "weights": None, "round": False, **dict.fromkeys(Sampling.model_fields)}
_DEFAULTS = {"metrics": None, "inception": None, "features": None, "definition": None, "kid_subset": 1000}
_DEFAULTS |= {"neighbours": "auto", "num": None, "batch": None, "threads": 1, "data": None, **_MODELS}
_MACHINE = ("device", "threads")  # of a choice's settings: the passport has them under `machine`


class Job(NamedTuple):
    """An evaluation that is ready to begin.

    out: where its results go; options: as `settled`, and what was found out; real: the reference's pictures, or
    statistics: the reference where it is a file of them; facts: the passport's identity sections; remarks: what is
    suspicious already; choice: of a model, what is drawn; classes: how many the pictures should show evenly; published:
    the recipe's figures; shared: a folder where evaluations beside the same reference have its features in common.
    """

    out: Path
    options: dict
    extractor: extractors.Extractor
    source: sources.Source
    kept: Kept | None
    real: sources.Source | None
    statistics: references.Statistics | None
    facts: dict
    remarks: list[str]
    choice: painting.Choice | None = None
    classes: int | None = None
    published: dict | None = None
    shared: Path | None = None

    def begin(self, name: str, source: sources.Source) -> FeatureSet:
        """The folder of features of `source`, called samples or reference."""
        batch, place = self.options["batch"], self.out / "features"
        folder = (self.shared if self.shared and name == "reference" else place) / name
        return FeatureSet.begin(folder, extracting.settings_of(source, self.extractor), source.n, batch)


def settled(options: dict) -> dict:
    """The options of `tasks.score.score` with what they stand for by default, and absolute paths."""
    given = {**_DEFAULTS, **options}
    given["metrics"] = list(given["metrics"] or ["fid", *(["is"] if given["inception"] else []), "kid", "prc"])
    if strange := [name for name in given["metrics"] if name not in METRICS]:
        raise UserError(
            f"--metrics {strange[0]}: is not made of features, as {', '.join(METRICS)} are; ask for it in a call of "
            "its own, without --inception and --features"
        )
    for name in ("num", "per_class", "batch", "threads", "kid_subset"):
        if given[name] is not None and not (isinstance(given[name], int) and 1 <= given[name] < 2**31):
            raise UserError(f"--{name.replace('_', '-')} {given[name]}: must be a whole number, at least 1")
    if given["num"] is not None and given["per_class"] is not None:
        raise UserError(f"--per-class {given['per_class']}: says how many pictures, and so does --num; leave one out")
    given["definition"] = given["definition"] or ("adm" if given["per_class"] else "torch-fidelity")
    for name in ("source", "reference", "inception", "tokenizer", "data"):
        given[name] = None if given.get(name) is None else str(Path(given[name]).resolve())
    if (given["features"] or "").startswith("run:"):
        given["features"] = f"run:{Path(given['features'][4:]).resolve()}"
    return given


def open_job(options: dict, out: Path | None, keep: Path | None) -> Job:
    """All ranks call it, after `process.start`. options: `settled`; out: None: a folder of its own in the run's, or
    beside other sources. Raises: UserError for all that can be known to be wrong before the first picture."""
    options = dict(options)
    extractor = extractors.open_extractor(options["inception"], options["features"])
    path, remarks, begun = Path(options["source"]), [], _begun(out)
    kept = choice = classes = published = None
    if is_model(path) and options["data"] is None:
        choice = _choose(options, begun)
        num = _number(options, choice)
        if options["num"] is None and options["per_class"] is None:
            process.say(f"{num:,} pictures, as is usual; beside a small reference fewer do: --num N")
        options["num"] = None if options["per_class"] else num
        options |= _settled_by(choice)
        kept = Kept(keep, choice, num) if keep else None
        source = drawn(choice, num, kept)
        classes, published = _shown(choice), _published(path)
    else:
        options["batch"] = options["batch"] or begun.get("batch", _BATCH)
        source = _given(path, options, keep, remarks)
    remarks += suspicions.number(str(path), source.n, options["num"], options["metrics"])
    real, statistics = _reference(options, source, extractor, remarks)
    facts = {
        "source": _told(source),
        "reference": _facts(options["reference"], real, statistics),
        "extractor": {name: getattr(extractor, name) for name in ("name", "hash", "width", "logits")},
        "options": options,
    }
    suspicions.same(facts["source"], facts["reference"])
    rows = statistics is None or statistics.features is not None
    if options["neighbours"] == "on" and not rows:
        raise UserError(f"--neighbours on: {options['reference']} holds no features; give pictures as --reference")
    suspicions.needs(options["metrics"], extractor.logits, extractor.name, rows, options["reference"])
    out = Path(out) if out else place(path, facts)
    return Job(out, options, extractor, source, kept, real, statistics, facts, remarks, choice, classes, published)


def otherwise(job: Job, sampling: dict, out: Path) -> Job:
    """The same evaluation of a MAGE that is sampled from with these fields of a recipe's `sampling` instead; nothing is
    opened anew. UserError for a value that cannot be."""
    choice = painting.otherwise(job.choice, sampling)
    source, options = drawn(choice, job.source.n), job.options | _settled_by(choice)
    facts = job.facts | {"source": _told(source), "options": options}
    return job._replace(out=out, options=options, source=source, facts=facts, choice=choice)


_PIN = "evaluated into "
_ENDED = ("results.json", "sweep.json")  # one of them is in the folder of an evaluation that has come to its end


def purpose(out: Path) -> str:
    """Why a checkpoint is pinned that is evaluated with results in `out`."""
    return f"{_PIN}{Path(out).resolve()}"


@contextmanager
def pinned(choice: painting.Choice | None, out: Path) -> Iterator[None]:
    """Has a training that goes on keep a run's checkpoint while it is evaluated into `out`; after an error or a kill
    too, since the same command goes on then, until another evaluation of the run finds `out` ended or removed."""
    folder = choice and painting.folder_of(choice)
    if folder is None:
        yield
        return
    process.on_first(lambda: _unpin_stale(Path(choice.settings["run"])))
    painting.pin(choice, purpose(out))
    yield
    if process.start().first:
        retention.unpin(folder, purpose(out))


def _unpin_stale(run: Path) -> None:
    for folder in (*(retention.folder_of(run, step) for step in retention.steps(run)), *retention.left(run)):
        for why in retention.pins(folder):
            out = Path(why.removeprefix(_PIN))
            ended = any((out / name).is_file() for name in _ENDED)
            # Where its parent is not here either, it may lie on another machine's disk.
            if why.startswith(_PIN) and out.is_absolute() and (ended or (out.parent.is_dir() and not out.exists())):
                retention.unpin(folder, why)


def split_of(data) -> str | None:
    """Real pictures are those of train/, where `DATA:val` does not say otherwise."""
    return None if str(data).endswith((":train", ":val")) else "train"


# --- the pictures ----------------------------------------------------------------------------------------------------


def is_model(path: Path) -> bool:
    """Whether it looks like what `stored.open_model` opens."""
    if path.is_dir():  # pictures may come with somebody's config.json
        exported = (path / "config.json").is_file() and any(path.glob("model*.safetensors"))
        return exported or (path / "recipe.yaml").is_file()
    return path.is_file() and path.suffix not in (".npz", ".tar")


def _begun(out: Path | None) -> dict:
    """What the samples in `out` were begun with: batch, and of a run the checkpoint and which of its weights."""
    folder = Path(out or "") / "features" / "samples"
    if out is None or not (folder / "features.json").is_file():
        return {}
    held = FeatureSet(folder)
    source = held.settings.get("source", {})
    return {"batch": held.batch, **{name: source.get(name) for name in ("checkpoint", "weights_of")}}


def _choose(options: dict, begun: dict) -> painting.Choice:
    wanted = options["num"] or (options["per_class"] or 1) * _BATCH
    return painting.choose(
        options["source"],
        **{name: options[name] for name in ("tokenizer", "class_label", "seed", "precision", "checkpoint", "weights")},
        given={name: options[name] for name in Sampling.model_fields if options[name] is not None},
        batch=options["batch"] or begun.get("batch") or min(_BATCH, wanted),
        rounded=options["round"],
        begun=begun,
    )


def _settled_by(choice: painting.Choice) -> dict:
    """The options that a choice has settled."""
    names = ("batch", "checkpoint", "class_label", *Sampling.model_fields)
    return {name: choice.settings[name] for name in names} | {"weights": choice.settings["weights_of"]}


def _told(source: sources.Source) -> dict:
    return {name: value for name, value in source.facts.items() if name not in _MACHINE} | {"n": source.n}


def _number(options: dict, choice: painting.Choice) -> int:
    if options["per_class"] is None:
        return options["num"] or _NUM
    if choice.labels is None:
        raise UserError(f"--per-class {options['per_class']}: {options['source']} knows no classes; give --num")
    return options["per_class"] * len(choice.labels)


def _shown(choice: painting.Choice) -> int | None:
    """The model's classes, where all are asked for."""
    classes = choice.opened.mage.classes
    return classes if classes and {*choice.labels} == {*range(classes)} else None


def _published(path: Path) -> dict | None:
    """What the paper gives for the recipe of a run, or of an export of one."""
    if (path / "recipe.yaml").is_file():
        return run_folder.load_recipe(path).published
    try:
        facts = json.loads((path / "config.json").read_text())["facts"]
        found = facts["recipe"]["published"]
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a foreign file has no recipe
        return None


def _given(path: Path, options: dict, keep, remarks: list[str]) -> sources.Source:
    """Pictures that no MAGE draws: files, or reconstructions."""
    given = [name for name, default in _MODELS.items() if options[name] != default] + (["keep"] if keep else [])
    if given:
        raise UserError(
            f"--{given[0].replace('_', '-')}: is for pictures that a MAGE draws, not for those of {path}; leave it out"
        )
    source = redrawn(path, options["data"]) if options["data"] else sources.open_source(path)
    if source.size is None:
        high, wide = source.facts["height"], source.facts["width"]
        raise UserError(f"{path}: its pictures are {wide} x {high}, and squares are needed; crop them to one")
    if (num := options["num"]) is not None and num < source.n:
        remarks.append(f"{path}: the first {num:,} of {source.n:,} pictures, in the order of their names")
        source = source._replace(n=num)
    remarks += suspicions.compressed(str(path), source.facts.get("formats", {}))
    return source


# --- the reference ---------------------------------------------------------------------------------------------------


def _reference(options: dict, source, extractor, remarks: list[str]) -> tuple:
    """Its pictures, resized to the size of the samples, or its statistics."""
    path = Path(options["reference"])
    if not path.is_file() or references.holds_pictures(path):
        if options["per_class"]:
            remarks.append(f"{path}: a data set; figures by ADM's protocol are beside the mu and sigma of ADM's npz")
        real = sources.open_source(path, source.size, split_of(path))
        remarks += suspicions.number(str(path), real.n, None, [name for name in options["metrics"] if name == "prc"])
        return real, None
    statistics = references.read_statistics(path)
    mine = {"extractor": extractor.name, "weights": extractor.hash}
    remarks += suspicions.extractors(mine, statistics.extractor, len(statistics.mean), str(path))
    remarks += suspicions.resolution(source.size, statistics.size, str(path))
    return None, statistics


def _facts(path: str, real: sources.Source | None, statistics: references.Statistics | None) -> dict:
    if real is not None:
        return {**real.facts, "n": real.n}
    more = {"n": statistics.n, "size": statistics.size, "fingerprint": statistics.fingerprint}
    return {"source": path, "kind": "statistics", "hash": process.on_first(lambda: sha256(Path(path))), **more}


def place(path: Path, facts: dict) -> Path:
    """A run has its results in it; those of pictures lie here, not beside them, where they would count as pictures."""
    told = {name: {key: value for key, value in facts[name].items() if key != "n"} for name in passport.IDENTITY[:3]}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:8]
    names = (Path(facts["reference"]["source"]).stem, facts["reference"].get("split"), digest)
    inside = facts["source"]["kind"] == "mage" and path.is_dir()
    return (path / "evaluated" if inside else Path("evaluated") / path.stem) / "-".join(filter(None, names))
