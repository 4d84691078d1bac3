"""mage-ds evaluate CLASSIFIER --reference DATA --metrics top1: how often is it right, and what does it take for what?

held-out pictures -> tokens (or pixels) -> classifier -> predictions.csv, confusion.png, results.json, a table
"""

from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from mage_ds import files, recipes
from mage_ds.engine import ds_config, inference, process, retention, stored
from mage_ds.engine.stored import Stored
from mage_ds.errors import UserError
from mage_ds.evaluation import classified
from mage_ds.evaluation.classified import Answers
from mage_ds.inputs import dali
from mage_ds.inputs.catalog import Catalog, open_catalog
from mage_ds.inputs.quarantine import Quarantine
from mage_ds.interop.safe import printable
from mage_ds.models import Classifier
from mage_ds.recipes.sections import Inputs
from mage_ds.report import confusion, passport
from mage_ds.report.progress import counter
from mage_ds.report.tables import aligned

_PAPER = "finetune_vit_base"  # whose way of showing held-out pictures is taken for a file without a recipe
_BATCH, _TOLD, _LISTED = 64, 10, 50  # mistakes of the table; unreadable files and mistakes of results.json
_RAW = "logistic regression on raw pixels"


def evaluate_classifier(
    source,
    *,
    reference,
    tokenizer=None,
    checkpoint: int | None = None,
    weights: str | None = None,
    precision: str = "float32",
    batch: int = _BATCH,
    threads: int = 1,
    out=None,
) -> dict | None:
    """Top-1, top-5 and the confusion matrix of a classifier on labelled pictures; each picture counts once, by any
    number of ranks. Prints a table; writes results.json, predictions.csv and confusion.png.

    Args: source: a probe's, fine-tuned or scratch run, an export of one, a fine-tuned file; reference: a data set: its
    val/ where it has one, whose class folders are named as the classifier's classes; tokenizer, checkpoint, weights: as
    of `stored.open_model`; batch: pictures computed together, and threads of a CPU: float results depend on both; out:
    by default `evaluated/DATA` in the run's folder, or beside a file.
    Returns: what results.json holds, on the first rank; None on the others. Raises: UserError.
    """
    me, source = process.start(threads), Path(source)
    opened = stored.open_model(source, tokenizer and Path(tokenizer), checkpoint, weights)
    if opened.classifier is None:
        raise UserError(
            f"{source}: is a {opened.kind}, which names no pictures; --metrics top1 is for a probe's, fine-tuned or "
            "scratch run (see `mage-ds train digits_probe --help`)"
        )
    catalog = open_catalog(reference, "val") or open_catalog(reference, "train")
    numbers, names = _numbers(opened, catalog, reference)
    dtype = ds_config.dtype_of(ds_config.choose_precision(precision, me.device))
    if opened.tokenizer is None and isinstance(opened.classifier, Classifier):
        raise UserError(f"{source}: comes without a tokenizer; name it with --tokenizer")
    inputs = _inputs(opened)
    found = _answered(opened, catalog, inputs, dtype, batch)
    if not me.first:
        return None
    index, readable, top, score = found
    if not readable.any():
        raise UserError(f"--reference {reference}: none of its {catalog.n:,} pictures can be read")
    answers = Answers(numbers[catalog.labels[index[readable]]], top[readable], score[readable])
    matrix = answers.confusion(len(names))
    results = {
        "source": str(source.resolve()),
        "origin": opened.origin,
        "reference": str(Path(reference).resolve()),
        "split": catalog.split,
        "fingerprint": catalog.fingerprint,
        "n": len(answers.label),
        "unreadable": [catalog.name(int(i)) for i in index[~readable][:_LISTED]],
        "figures": answers.figures(),
        "published": _published(opened),
        "baselines": _baseline(reference, catalog, inputs, numbers, names),
        "classes": [
            {"name": name, "n": int(row.sum()), "top1": float(share)}
            for name, row, share in zip(names, matrix, classified.of_classes(matrix), strict=True)
        ],
        "mistakes": [(names[a], names[b], count) for a, b, count in classified.mistakes(matrix, _LISTED)],
        "options": {"weights": opened.weights, "precision": precision, "batch": batch, "threads": threads},
        "inputs": inputs.model_dump(include={"image_size", "interpolation", "evaluation_resize"}),
        "machine": {"device": process.device_name(), "ranks": me.world},
        **passport.circumstances(),
    }
    out = Path(out) if out else (source if source.is_dir() else Path("evaluated") / source.stem)
    out = out if out != source else source / "evaluated" / Path(reference).resolve().name
    _write(out, results, matrix, names, classified.table([catalog.name(i) for i in index], answers, readable, names))
    print(_told(results), f"written to {out}: results.json, predictions.csv, confusion.png", sep="\n", flush=True)
    if (step := opened.facts.get("step")) is not None and (source / "recipe.yaml").is_file():
        retention.pin(retention.folder_of(source, step), f"evaluated in {out}")
    return results


# --- what fits what


def _numbers(opened: Stored, catalog: Catalog, reference) -> tuple[np.ndarray, list[str]]:
    """The classifier's number of each of the data's classes, int64 (classes of the data,), and the names of all of the
    classifier's. UserError where the data has other classes."""
    classes, theirs = opened.classifier.head.out_features, catalog.classes
    if not theirs or (catalog.labels < 0).any():
        raise UserError(f"--reference {reference}: has pictures without a class; sort them into class folders")
    known = opened.classes
    if not known and len(theirs) != classes:
        raise UserError(
            f"--reference {reference}: has {len(theirs)} classes, and {opened.origin} {classes}, which it does not "
            "name; give the data set that it was trained on"
        )
    if not known:
        process.say(f"the classifier does not name its {classes} classes: taken for those of {reference}, in its order")
        return np.arange(classes), [printable(name) for name in theirs]
    names = known + [f"label {i}" for i in range(len(known), classes)]
    strange = [printable(name) for name in theirs if printable(name) not in known]
    if strange:
        some = ", ".join(strange[:4]) + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")
        raise UserError(
            f"--reference {reference}: its classes {some} are none of the classifier's ({', '.join(known[:4])}"
            f"{', ...' if len(known) > 4 else ''}); name its class folders as those that it was trained on"
        )
    return np.array([known.index(printable(name)) for name in theirs]), names


def _inputs(opened: Stored) -> Inputs:
    """How held-out pictures are shown: as the classifier's recipe says; as the paper's where it has none."""
    recipe, size = opened.facts.get("recipe"), opened.image_size
    try:
        found = Inputs.model_validate(recipe["inputs"])
        if found.image_size == size:
            return found
    except (ValidationError, KeyError, TypeError):  # an export may be a stranger's
        pass
    paper = recipes.load_recipe(_PAPER, ["inputs.policy=null"]).inputs
    resize = round(paper.evaluation_resize * size / paper.image_size)
    return paper.model_copy(update={"image_size": size, "evaluation_resize": resize})


def _published(opened: Stored) -> dict[str, float]:
    try:
        return {"top1": float(opened.facts["recipe"]["published"]["top1"]) / 100}
    except (KeyError, TypeError, ValueError):
        return {}


# --- answers


def _answered(opened: Stored, catalog: Catalog, inputs: Inputs, dtype, batch: int):
    """Of every picture, in order: index int64 (n,), readable bool (n,), top int64 (n, k), score float32 (n,).

    Tiles of `batch` pictures in order, whole ones: who computes a tile does not change what comes out.
    """
    me = process.start()
    classifier = opened.classifier.to(me.device, dtype)
    tokenizer = opened.tokenizer and inference.frozen(opened.tokenizer)
    tiles = [np.arange(at, min(at + batch, catalog.n)) for at in range(0, catalog.n, batch)][me.rank :: me.world]
    mine = np.concatenate(tiles) if tiles else np.empty(0, dtype=np.int64)
    k, found = min(classified.TOP, classifier.head.out_features), []
    with torch.no_grad(), counter(catalog.n, "picture", "named", first=me.first, say=process.say) as advance:
        for shown in _pictures(catalog, mine, inputs, batch):
            pictures = shown.images[:, 0].float() / 255
            seen = pictures.to(dtype) if tokenizer is None else inference.tokens_of(tokenizer, pictures)
            score, top = classifier(seen).double().softmax(1).topk(k)
            columns = (shown.index, shown.valid.cpu().numpy() > 0, top.cpu().numpy(), score[:, 0].float().cpu().numpy())
            found.append([column[shown.index >= 0] for column in columns])
            advance(len(found[-1][0]) * me.world)
    shares = [share for each in process.gather_objects(found) for share in each]
    joined = [np.concatenate(column) for column in zip(*shares, strict=True)]
    order = np.argsort(joined[0])
    return [column[order] for column in joined]


def _pictures(catalog: Catalog, indices: np.ndarray, inputs: Inputs, batch: int) -> dali.Ahead:
    look_over = Quarantine(None, 1.0, catalog.n)
    device = process.start().device
    return dali.evaluation(catalog, indices, batch=batch, inputs=inputs, device=device, quarantine=look_over)


def _baseline(reference, catalog: Catalog, inputs: Inputs, numbers: np.ndarray, names: list[str]) -> dict[str, float]:
    """Top-1 of logistic regression on the raw pixels of train/, where that is small."""
    if catalog.split != "val":
        return {}
    train = open_catalog(reference, "train")
    if train.n * 3 * inputs.image_size**2 > classified.RAW_MOST or (train.labels < 0).any():
        return {}
    (shown, labels), (pictures, truth) = (_decoded(each, inputs, numbers) for each in (train, catalog))
    return {_RAW: float((classified.raw_pixels(shown, labels, pictures, len(names)) == truth).mean())}


def _decoded(catalog: Catalog, inputs: Inputs, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for batch in _pictures(catalog, np.arange(catalog.n), inputs, _BATCH):
        real = batch.valid.cpu() > 0
        images.append(batch.images[:, 0].cpu()[real].numpy())
        labels.append(batch.labels.cpu()[real].numpy())
    return np.concatenate(images), numbers[np.concatenate(labels)]


# --- what is shown


def _told(results: dict) -> str:
    figures, columns = results["figures"], [name for name in ("top1", "top5") if name in results["figures"]]
    lines = [["", *columns], [Path(results["source"]).name, *(f"{figures[name]:.2%}" for name in columns)]]
    if results["published"]:
        lines.append(["published", f"{results['published']['top1']:.1%}", *[""] * (len(columns) - 1)])
    lines += [[name, f"{value:.2%}", *[""] * (len(columns) - 1)] for name, value in results["baselines"].items()]
    split = f"of {results['split']}/" if results["split"] else "of the whole folder"
    text = [aligned(lines), f"({results['n']:,} pictures {split}; {results['origin']})"]
    if results["unreadable"]:
        text.append(f"not counted, because unreadable: {', '.join(results['unreadable'][:_TOLD])}")
    if results["mistakes"]:
        some = (f"{is_} taken for {said}: {count}" for is_, said, count in results["mistakes"][:_TOLD])
        text.append(f"most frequent mistakes: {', '.join(some)}")
    return "\n".join(text)


def _write(out: Path, results: dict, matrix: np.ndarray, names: list[str], predictions: str) -> None:
    passport.write(out, results)
    try:
        with files.saved(out / "predictions.csv") as file:
            file.write(predictions.encode(errors="surrogateescape"))
        what, where = (Path(results[key]).name for key in ("source", "reference"))
        title = f"{what} on {where}: top-1 {results['figures']['top1']:.2%}"
        confusion.save(out / "confusion.png", matrix, names, classified.worst(matrix), title)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder with --out") from None
