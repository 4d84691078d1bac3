"""A data set as tokens: `mage-ds tokenize` writes it, trainings map it into memory.

    TOKENS/tokens.json              what it was made of, and how; `complete` once all of it is there
    TOKENS/tokenizer/               a copy of the tokenizer
    TOKENS/train/tokens.npy         uint16 (n, views, N), in the order of the data set's catalog; val/ has one view
    TOKENS/train/{valid,labels}.npy bool (n, views): False for an unreadable picture; int32 (n,): -1 = no class
    TOKENS/train/parts/             while it is made: some pictures in one view each

A part, and a split joined from its parts, is written aside, synced and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mage_ds import errors, files, recipes
from mage_ds.errors import UserError, refuse_differences
from mage_ds.files import lock, saved, sha256
from mage_ds.inputs import order
from mage_ds.inputs.batch import Batch
from mage_ds.inputs.dali import PADDING, Ahead, once

FACTS = "tokens.json"
SPLITS = ("train", "val")
MOST_CODES = 2**16  # of a uint16
_FORMAT = 1
_ANEW = "copy the whole folder again, or make it anew with `mage-ds tokenize ... --out NEW`"
_AGAIN = "copy it again, or remove it and run the same `mage-ds tokenize` again"
_FILES = ("labels.npy", "valid.npy", "tokens.npy")


@dataclass(frozen=True)
class TokenCache:
    """One split of a token cache. settings: of `tokens.json`; classes: names of the labels; fingerprint: of the
    settings, the data set's own among them. tokens, valid, labels: see above; tokens are read when they are used."""

    root: Path
    split: str
    settings: dict
    classes: list[str]
    fingerprint: str
    tokens: np.ndarray
    valid: np.ndarray
    labels: np.ndarray

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def views(self) -> int:
        return self.tokens.shape[1]

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def rows(self, epoch: np.ndarray, index: np.ndarray, views: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples index (B,), -1 = padding, as epoch (B,) sees them: view `epoch` modulo the number of views; where it
        sees a second one, the view that comes 1 after it, in the next round of epochs 2, and so on: all pairs in turn.

        Returns tokens int64 (B, views, N), labels int64 (B,), valid float32 (B,), 0 where any view is unreadable.
        UserError for a token that is no code.
        """
        after = (0, 1 + epoch // self.views % max(1, self.views - 1))[:views]
        view, real = np.stack([(epoch + step) % self.views for step in after], axis=1), index != PADDING
        place = np.where(real, index, 0)
        tokens = np.asarray(self.tokens[place[:, None], view])
        if tokens.max(initial=0) >= self.settings["codes"]:
            raise UserError(_damaged(self.root / self.split / "tokens.npy", "it holds a token that is no code"))
        valid = (self.valid[place[:, None], view].all(axis=1) & real).astype(np.float32)
        labels = np.where(real, self.labels[place], -1).astype(np.int64)
        return tokens.astype(np.int64), labels, valid


# --- reading


def is_cache(root: Path) -> bool:
    """Whether a folder is a token cache, whole or not."""
    return (root / FACTS).exists() or any((root / split / _FILES[-1]).exists() for split in SPLITS)


def open_cache(root: Path, split: str) -> TokenCache | None:
    """A split of a finished token cache; None where the data set has no "val". UserError: unfinished or damaged."""
    facts = read_facts(root)
    if facts is None:
        raise UserError(f"{root / FACTS}: is missing, so nobody knows what these tokens are; {_ANEW}")
    if not facts["complete"]:
        raise UserError(f"{root}: `mage-ds tokenize` has not finished it; run the same command again: it goes on")
    if split not in facts["splits"]:
        return None
    n, settings = facts["splits"][split]["n"], facts["settings"]
    views = settings["views"] if split == "train" else 1
    shapes = {
        "tokens": ((n, views, settings["tokens"]), np.uint16),
        "valid": ((n, views), np.bool_),
        "labels": ((n,), np.int32),
    }
    arrays = {name: _array(root / split / f"{name}.npy", *shape) for name, shape in shapes.items()}
    return TokenCache(root, split, settings, facts["classes"], facts["fingerprint"], **arrays)


def read_facts(root: Path) -> dict | None:
    """`tokens.json` of a folder, None where there is none. UserError where it cannot be read or was changed."""
    path = root / FACTS
    try:
        facts = json.loads(path.read_text())
        if facts["format"] != _FORMAT:
            raise UserError(f"{path}: is of format {facts['format']}, this version reads {_FORMAT}; make it anew")
        if facts["fingerprint"] != fingerprint(facts["settings"]):
            raise UserError(_damaged(path, "its settings are not those that its fingerprint was taken of", _ANEW))
        {key: facts[key] for key in ("complete", "classes", "splits")}
        if not _tells(facts):
            raise UserError(_damaged(path, "it does not tell how many pictures `train` has", _ANEW))
        return facts
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(_damaged(path, f"not readable: {error!r}", _ANEW)) from None


def _tells(facts: dict) -> bool:
    """Whether the splits of a complete cache say how many pictures they hold, `train` among them."""
    splits = facts["splits"]
    if not isinstance(splits, dict) or (facts["complete"] and "train" not in splits):
        return False
    return all(isinstance(one, dict) and type(one.get("n")) is int for one in splits.values())


def fingerprint(settings: dict) -> str:
    """SHA-256 of what tells one cache from another."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _array(path: Path, shape: tuple, dtype) -> np.ndarray:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(_damaged(path, "it is missing")) from None
    except Exception as error:  # numpy reads a header as Python and meets a damaged one with whatever that raises
        why = str(error).partition("\n")[0]
        raise UserError(_damaged(path, f"cut off or foreign: {why}")) from None
    if (found.shape, found.dtype) != (shape, dtype):
        raise UserError(_damaged(path, f"{found.dtype} {found.shape} instead of {np.dtype(dtype)} {shape}"))
    return found


def _damaged(path: Path, why: str, remedy: str = _AGAIN) -> str:
    return f"{path}: damaged ({why}); {remedy}"


def _joined(folder: Path) -> bool:
    return all((folder / name).exists() for name in _FILES)


def stream(cache: TokenCache, *, seed, position, batch, micro_batch, rank, world, device, views=1) -> Ahead:
    """Endless training stream of this rank, in the order of `order.plans`, as dali.stream would show the pictures.

    Returns an iterator of Batch with tokens (micro_batch, views, N). Raises while iterating: UserError.
    """
    share = {"batch": batch, "micro_batch": micro_batch, "rank": rank, "world": world}
    return Ahead(_batches(cache, order.plans(cache.n, seed=seed, position=position, **share), device, views))


def evaluation(cache: TokenCache, indices, *, batch: int, device) -> Ahead:
    """Every sample of `indices` once, in order; the last batch is filled up with padding, as dali.evaluation does.

    Of a training split it is view 0, crop and flip included: a cache holds no evaluation crop of those.
    """
    return Ahead(_batches(cache, once(indices, batch), device))


def _batches(cache: TokenCache, plans, device, views: int = 1):
    import torch

    device = torch.device(device)
    # Copies leave on a stream of their own, so as not to queue behind the training step.
    aside = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
    for epoch, index in plans:
        rows = cache.rows(epoch, index, views)
        with aside:
            tokens, labels, valid = (torch.from_numpy(row).to(device) for row in rows)
        yield Batch(labels=labels, index=index, epoch=epoch, valid=valid, tokens=tokens)


# --- writing


def begin(out: Path, settings: dict, classes: list[str], held: ExitStack) -> dict:
    """Opens a folder for these settings; its facts, which say `complete` where nothing is left to do.

    held: takes the lock that keeps other starts out. Raises UserError where `out` holds something else, tokens of
    other settings, is being written, or cannot be written.
    """
    _known(out, settings)  # first of all, so that a foreign folder is left as it is
    held.enter_context(_alone(out))
    before = _known(out, settings)
    if before and before["complete"] and all(_joined(out / split) for split in before["splits"]):
        return before
    facts = {"format": _FORMAT, "complete": False, "fingerprint": fingerprint(settings), "settings": settings}
    facts |= {"classes": classes, "splits": {}}
    with files.writing(out):
        for stale in out.glob(f".{FACTS}.*.part"):
            stale.unlink()
        _write_facts(out, facts)
    return facts


def finish(out: Path, facts: dict) -> None:
    """The last word of a cache: its facts, `splits` among them, and that it is complete."""
    with files.writing(out):
        _write_facts(out, facts | {"complete": True})


def _write_facts(out: Path, facts: dict) -> None:
    with saved(out / FACTS) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())


def _known(out: Path, settings: dict) -> dict | None:
    """The facts of a folder of these settings, None for a new one. UserError for anything else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose a new folder")
    before = read_facts(out)
    if before is None:
        if out.is_dir() and any(entry.name[0] != "." for entry in out.iterdir()):
            raise UserError(f"--out {out}: holds files but no {FACTS} of a token cache; choose a new folder")
        return None
    refuse_differences(out, "tokens", before["settings"], settings, brief)
    return before


@contextmanager
def _alone(out: Path):
    """Keeps other starts out of the folder meanwhile; the lock dies with the process, however it dies."""
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")  # noqa: SIM115 (open for as long as the lock is held)
    with file:
        if not lock(file):
            raise UserError(f"--out {out}: another process is writing it; wait for it or stop it")
        yield


def brief(value) -> str:
    """A setting as people say it: an augmentation by its name, a digest by its beginning."""
    for name, numbers in recipes.augmentations().items():
        if value == numbers:
            return name
    return errors.brief(value)


@dataclass(frozen=True)
class Parts:
    """The parts of one split: pictures [first, first + size) in one view each. width: tokens of a picture."""

    folder: Path
    n: int
    views: int
    width: int
    size: int

    def missing(self) -> list[tuple[int, int]]:
        """(view, first) of every part that is not there; none where the split is joined."""
        if _joined(self.folder):
            return []
        every = [(view, first) for view in range(self.views) for first in range(0, self.n, self.size)]
        return [part for part in every if not self._path(*part).exists()]

    def bytes_missing(self) -> int:
        """Room that the parts still to be made and the joined file take."""
        if _joined(self.folder):
            return 0
        row = 2 * self.width + 1
        return row * (self.n * self.views + sum(self.length(first) for _, first in self.missing()))

    def length(self, first: int) -> int:
        return min(self.size, self.n - first)

    def _path(self, view: int, first: int) -> Path:
        return self.folder / "parts" / f"{view:03d}_{first:09d}.npz"

    def write(self, view: int, first: int, tokens: np.ndarray, valid: np.ndarray) -> None:
        """tokens int (length(first), width), valid bool (length(first),)."""
        with files.writing(self.folder.parent):
            path = self._path(view, first)
            path.parent.mkdir(parents=True, exist_ok=True)
            with saved(path) as file:
                np.savez(file, tokens=tokens.astype(np.uint16), valid=valid)

    def _read(self, view: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        path = self._path(view, first)
        try:
            with np.load(path, allow_pickle=False) as part:
                tokens, valid = part["tokens"], part["valid"]
            if tokens.shape != (self.length(first), self.width) or valid.shape != tokens.shape[:1]:
                raise ValueError(f"shape {tokens.shape}")
            return tokens, valid
        except Exception as error:  # a zip file that is damaged raises anything
            raise UserError(_damaged(path, f"{type(error).__name__}: {error}")) from None

    def join(self, labels: np.ndarray) -> dict:
        """Makes the split's files of its parts, unless they are there, and removes the parts. labels: int (n,).

        Returns {"n", "unreadable", "sha256": {file: digest}} for `tokens.json`.
        """
        with files.writing(self.folder.parent):
            if not _joined(self.folder):
                for stale in self.folder.glob(".*.part"):
                    stale.unlink()
                self._join(labels)
            shutil.rmtree(self.folder / "parts", ignore_errors=True)
        bad = int((~np.load(self.folder / "valid.npy").all(axis=1)).sum())
        return {"n": self.n, "unreadable": bad, "sha256": {name: sha256(self.folder / name) for name in _FILES}}

    def _join(self, labels: np.ndarray) -> None:
        valid = np.zeros((self.n, self.views), dtype=bool)
        head = {"descr": "<u2", "fortran_order": False, "shape": (self.n, self.views, self.width)}
        with saved(self.folder / "tokens.npy") as file:  # not through a map: on a full disk that kills the process
            np.lib.format.write_array_header_1_0(file, head)
            for first in range(0, self.n, self.size):
                parts = [self._read(view, first) for view in range(self.views)]
                file.write(np.stack([tokens for tokens, _ in parts], axis=1).astype("<u2").tobytes())
                valid[first : first + self.size] = np.stack([good for _, good in parts], axis=1)
        for name, array in (("valid.npy", valid), ("labels.npy", np.asarray(labels, dtype=np.int32))):
            with saved(self.folder / name) as file:
                np.save(file, array)


def check(out: Path, facts: dict) -> None:
    """Reads all of a finished cache. UserError names the file that is not what was written."""
    for split, known in facts["splits"].items():
        open_cache(out, split)
        for name, expected in known["sha256"].items():
            if sha256(out / split / name) != expected:
                raise UserError(_damaged(out / split / name, "its checksum is another"))
