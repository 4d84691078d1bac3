"""mage-ds evaluate: figures of a folder of pictures, beside those of real pictures and their reconstructions."""

import copy
import difflib
import json
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import numpy as np

from mage_ds import files
from mage_ds.engine import inference, process, stored
from mage_ds.errors import UserError
from mage_ds.evaluation import readable as judge
from mage_ds.inputs.catalog import Catalog, open_catalog
from mage_ds.report import passport, pictures, tables
from mage_ds.sampling import labels

METRICS = ("readable",)
_BATCH = 64
_COLUMNS = 20  # classes that a table has room for
_ASKED = "asked for "


def evaluate(source, *, reference, metrics=("readable",), run=None, out=None) -> dict:
    """Judges the pictures of `source`, prints a table, writes results.json into `out` (default: `source`).

    Beside them stand the same figures of the reference's validation split and, where the run is known, of its
    tokenizer's reconstructions, and how many sampled token grids equal that of a training picture (copies). Of pictures
    that were asked for by class: how many are judged to be of it, in all and of each class.

    Args: source: a folder that `sample` made, or any folder of pictures; reference: a data set with labels; run: the
    MAGE run whose tokenizer is used, by default the one that `source`'s manifest names.
    Returns: what results.json holds. Raises: UserError for folders that do not fit and unknown metrics.
    """
    process.start()
    source, reference = Path(source), Path(reference)
    for name in metrics:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, 1, 0)
            raise UserError(f"--metrics {name}: no such metric; did you mean {close[0]}? known: {', '.join(METRICS)}")
    return process.on_first(lambda: _evaluate(source, reference, run, Path(out) if out else source))


def _evaluate(source: Path, reference: Path, run, out: Path) -> dict:
    manifest = pictures.read_manifest(source)
    made, tokens = _samples(source, manifest)
    train, validation = _labelled(reference)
    classifier = judge.fit(_decoded(train), train.labels)
    rows = _of_samples(judge.readable(classifier, made), manifest or {}, train.classes)
    if validation is not None:
        rows["validation pictures"] = _row(classifier, _decoded(validation), train, validation.labels)
    run, why = _run(run, manifest)
    copies = {}
    if run is not None:
        tokenizer = _Tokenizer(run)
        known, _ = tokenizer.tokenize(train)
        if tokens is not None:
            if tokenizer.hash != manifest["tokenizer"]:
                raise UserError(f"--run {run}: {source} was made with another tokenizer; name its own run, or none")
            copies["samples"] = judge.share_copied(tokens, known)
        if validation is not None:
            held_out, rebuilt = tokenizer.tokenize(validation)
            rows["reconstructions"] = _row(classifier, rebuilt, train, validation.labels)
            copies["validation pictures"] = judge.share_copied(held_out, known)
    results = {
        "source": str(source.resolve()),
        "reference": str(reference.resolve()),
        "reference_fingerprint": train.fingerprint,
        "run": str(run.resolve()) if run else None,
        "readable": {"threshold": judge.THRESHOLD, "C": judge.PENALTY, "class_names": train.classes, "rows": rows},
        "copies": copies,
        "sampling": manifest,
        "versions": {name: metadata.version(name) for name in ("scikit-learn", "numpy", "pillow", "torch")},
    }
    print(_table(rows, train.classes, copies, why), flush=True)
    _write(out, results)
    return results


def _row(classifier, images, train: Catalog, labels=None) -> dict:
    return judge.readable(classifier, images).summary(len(train.classes), labels)


def _of_samples(said: judge.Judgement, manifest: dict, classes: list[str]) -> dict:
    """The rows of the samples: all of them and, where they were asked for by class, those of each class."""
    if not manifest.get("class_label"):
        return {"samples": said.summary(len(classes))}
    asked = labels.parse(manifest["class_label"], 2**31)
    names = [labels.named(label, manifest.get("classes", [])) for label in asked]
    wanted = judge.wanted(names, classes, len(said.label))
    rows = {"samples": said.summary(len(classes), wanted)}
    turn = np.arange(len(said.label)) % len(asked)
    for name in dict.fromkeys(names):
        chosen = np.isin(turn, [k for k, each in enumerate(names) if each == name])
        if chosen.any():
            rows[f"{_ASKED}{name}"] = said.chosen(chosen).summary(len(classes), wanted[chosen])
    return rows


# --- what is read


def _samples(source: Path, manifest: dict | None) -> tuple[Iterable, np.ndarray | None]:
    """The pictures to be judged, unselected, and their tokens where `sample` made them."""
    if manifest is None:
        if (source / "recipe.yaml").is_file():
            raise UserError(
                f"{source}: is a run folder; of a MAGE give --inception FILE or --features run:RUN (--metrics readable "
                "is of pictures of `mage-ds sample`), of a classifier --metrics top1, of a tokenizer --data DATA in "
                "place of --reference"
            )
        return _decoded(open_catalog(source)), None
    if not manifest["complete"]:
        raise UserError(f"{source}: its pictures are not complete; start the same `mage-ds sample` again")
    try:
        with np.load(source / "tokens.npz", allow_pickle=False) as file:
            return pictures.read(source, manifest), file["tokens"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{source}/tokens.npz: damaged ({error}); remove it and start the same `mage-ds sample` again"
        ) from None


def _labelled(reference: Path) -> tuple[Catalog, Catalog | None]:
    """Training and validation split (None where there is no val/) of a data set that the judge can learn from."""
    train = open_catalog(reference, "train")
    judge.refuse_unfit(train.labels, train.classes, reference)
    validation = open_catalog(reference, "val")
    if validation is not None and (validation.labels < 0).any():
        raise UserError(f"--reference {reference}: pictures in val/ lie outside of the class folders; move them")
    return train, validation


def _decoded(catalog: Catalog) -> list[np.ndarray]:
    return [pictures.decoded(catalog.read(i), catalog.path(i)) for i in range(catalog.n)]


def _run(run, manifest: dict | None) -> tuple[Path | None, str]:
    """The run whose tokenizer is used, and a remark where there is none."""
    if run is not None:
        return Path(run), ""
    named = Path(manifest["run"]) if manifest and manifest.get("run") else None
    if named is None:
        return None, "no reconstructions and copies: name the run with --run"
    if not named.exists():
        return None, f"no reconstructions and copies: {named} is gone; name the run with --run"
    if not (named / "recipe.yaml").is_file():
        return None, f"no reconstructions and copies: {named} is no run; name the one it is from with --run"
    return named, ""


class _Tokenizer:
    """A run's frozen tokenizer on the whole pictures of a data set, as training saw them but without crops."""

    def __init__(self, run: Path):
        self.inputs = stored.open_run(run, "pretrain").inputs
        model, info = stored.load_tokenizer(run / "tokenizer")
        self.exact, self.hash = inference.frozen(model), info["hash"]
        # The tokens that the run was trained on: near ties fall otherwise in another number format.
        self.model = copy.deepcopy(model).to(process.start().device, stored.precision(run))

    def tokenize(self, catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 (n, N), reconstructions uint8 (n, H, W, 3)."""
        import torch

        from mage_ds.inputs import dali
        from mage_ds.inputs.quarantine import Quarantine
        from mage_ds.sampling.decode import pixels

        tokens, rebuilt = [], []
        quarantine = Quarantine(None, self.inputs.broken_limit, catalog.n)
        device = process.start().device
        batches = dali.evaluation(
            catalog, np.arange(catalog.n), batch=_BATCH, inputs=self.inputs, device=device, quarantine=quarantine
        )
        with torch.no_grad():
            for batch in batches:
                dtype = self.model.quantize.embedding.weight.dtype
                grid = self.model.tokenize((batch.images[:, 0].float() / 255).to(dtype))
                images = pixels(self.exact.detokenize(grid))
                real = batch.index >= 0
                tokens.append(grid.cpu().numpy()[real])
                rebuilt.append(images[real])
        return np.concatenate(tokens), np.concatenate(rebuilt)


# --- what is shown


def _table(rows: dict, classes: list[str], copies: dict, remark: str) -> str:
    shown = "then the share of each class" if len(classes) <= _COLUMNS else "each class's share: results.json"
    classes = classes if len(classes) <= _COLUMNS else []
    head = ["", "pictures", "readable", "right", *classes]
    lines = [head]
    many = sum(name.startswith(_ASKED) for name in rows) > _COLUMNS
    for name, row in rows.items():
        if name.startswith(_ASKED) and many:
            continue
        right = f"{row['right']:.1%}" if "right" in row else "-"
        shares = [f"{share:.1%}" for share in row["classes"][: len(classes)]]
        lines.append([name, str(row["pictures"]), f"{row['readable']:.1%}", right, *shares])
    text = [tables.aligned(lines)]
    text.append(
        f"(readable: judged with confidence > {judge.THRESHOLD}; right: judged as labelled or asked for; {shown})"
    )
    if copies:
        parts = ", ".join(f"{share:.1%} of the {name}" for name, share in copies.items())
        text.append(f"token grids that equal a training picture's: {parts}")
    return "\n".join([*text, *([remark] if remark else [])])


def _write(out: Path, results: dict) -> None:
    path = out / "results.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if line := passport.set_aside(out, results):
            print(line, flush=True)
        with files.saved(path) as file:
            file.write((json.dumps(results, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another folder with --out") from None
    print(f"written to {path}", flush=True)
