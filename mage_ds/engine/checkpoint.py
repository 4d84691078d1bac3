"""Checkpoints: one layout for every world size, ZeRO stage and precision.

RUN/checkpoints/step_000500/ holds safetensors files with, for each engine, by parameter name, the float32 weight
and the optimizer's moments, and `meta.json`: counts, stream position, what the run is, and each file's size and
SHA-256. Nothing in it is a pickle. The ranks write files in turn into a hidden folder, which is read again,
verified and published by one rename; until then the checkpoint before it is the newest.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mage_ds.engine import process, state
from mage_ds.errors import UserError

FORMAT = 1
_FILE_BYTES = 2**30  # a file is closed when it holds this much: a rank keeps one in memory while saving
_NAME = re.compile(r"step_(\d{6,})")


# --- finding -------------------------------------------------------------------------------------------------


def steps(run: Path) -> list[int]:
    """The published checkpoints' steps, rising. Half-written ones have another name."""
    folder = Path(run) / "checkpoints"
    names = (_NAME.fullmatch(entry.name) for entry in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in names if match)


def folder_of(run: Path, step: int) -> Path:
    return Path(run) / "checkpoints" / f"step_{step:06d}"


def find(run: Path, step: int | None = None) -> Path:
    """The folder of one checkpoint, the newest without `step`. Raises UserError where there is none."""
    known = steps(run)
    if not known:
        raise UserError(f"{run}: has no checkpoint yet; train it first")
    if step is None:
        step = known[-1]
    if step not in known:
        raise UserError(f"--checkpoint {step}: not in {run}; there are {', '.join(map(str, known))}")
    return folder_of(run, step)


# --- reading -------------------------------------------------------------------------------------------------


def read_meta(folder: Path) -> dict:
    """`meta.json` of a checkpoint folder. Raises UserError where it is missing, damaged or of another format."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise UserError(f"{folder}: checkpoint format {meta['format']}, this version reads {FORMAT}")
        if meta.get("digest") != _digest(meta):
            raise ValueError("checksum differs")
        if not {"step", "engines", "files"} <= meta.keys():
            raise ValueError("incomplete")
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/meta.json: {_damaged(folder, error)}") from None


def _digest(meta: dict) -> str:
    """SHA-256 of what `meta.json` says beside this value: a wrong digit in it would be a wrong step."""
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify(folder: Path, meta: dict, only: str = "") -> None:
    """Compare sizes and checksums of the files whose names start with `only`. Raises UserError on the first."""
    for name, expected in meta["files"].items():
        if not name.startswith(only):
            continue
        path = folder / Path(name).name
        try:
            if path.stat().st_size != expected["bytes"]:
                raise ValueError(f"{path.stat().st_size} bytes instead of {expected['bytes']}")
            if _sha256(path) != expected["sha256"]:
                raise ValueError("checksum differs")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {_damaged(folder, error)}") from None


def _damaged(folder: Path, error: Exception) -> str:
    older = [step for step in steps(folder.parent.parent) if folder_of(folder.parent.parent, step) < folder]
    remedy = f"continue from --resume {folder_of(folder.parent.parent, older[-1])}" if older else "train anew"
    return f"damaged checkpoint ({error}); {remedy}"


def read_tensors(folder: Path, meta: dict, prefix: str):
    """Yield (key, float32 tensor) of every file whose name starts with `prefix`, memory-mapped."""
    for name in meta["files"]:
        if not name.startswith(prefix):
            continue
        path = folder / Path(name).name
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {_damaged(folder, error)}") from None


def load_weights(run: Path, engine: str, step: int | None = None) -> tuple[dict[str, torch.Tensor], dict]:
    """The verified float32 weights and buffers of one engine by name, and the checkpoint's meta.

    Needs no DeepSpeed and no process group; of the checkpoint's files only the weights are read.
    """
    folder = find(run, step)
    meta = read_meta(folder)
    if engine not in meta["engines"]:
        raise UserError(f"{folder}: holds {', '.join(meta['engines'])}, not {engine}: is this the right run?")
    verify(folder, meta, f"{engine}.weight.")
    return dict(read_tensors(folder, meta, f"{engine}.weight.")), meta


def load(folder: Path, engines: dict, meta: dict | None = None) -> dict:
    """Set every engine to the checkpoint's state, on any world size and stage; returns meta. All ranks call it.

    meta: what `verified` returned, where it has been called already.

    Raises UserError where a file is damaged or the parameters' names or shapes differ.
    """
    meta = meta or process.on_first(lambda: verified(folder))
    for name, engine in engines.items():
        if name not in meta["engines"]:
            raise UserError(f"{folder}: holds no engine {name!r}, only {', '.join(meta['engines'])}")
        state.ensure_moments(engine)
        _load_kind(folder, meta, f"{name}.weight.", engine, None)
        for key in state.MOMENTS:
            _load_kind(folder, meta, f"{name}.{key}.", engine, key)
        state.set_updates(engine, meta["engines"][name]["updates"])
    process.barrier()
    return meta


def verified(folder: Path) -> dict:
    """The checkpoint's meta, after all its files have been compared with it. Raises UserError on damage."""
    meta = read_meta(folder)
    verify(folder, meta)
    return meta


def _load_kind(folder: Path, meta: dict, prefix: str, engine, key: str | None) -> None:
    missing = state.parameters(engine)
    buffers = dict(engine.module.named_buffers()) if key is None else {}
    for name, value in read_tensors(folder, meta, prefix):
        if name in buffers:
            buffers.pop(name).copy_(value)
            continue
        parameter = missing.pop(name, None)
        if parameter is None or state.shape_of(parameter) != value.shape:
            raise UserError(f"{folder}: {name} {tuple(value.shape)} does not fit the recipe's model")
        state.set_full(engine, parameter, value, key)
    if missing:
        raise UserError(f"{folder}: lacks {next(iter(missing))}, which the recipe's model has")


# --- writing -------------------------------------------------------------------------------------------------


def save(run: Path, step: int, engines: dict, facts: dict, *, keep: int) -> Path:
    """Write, verify and publish a checkpoint after `step` completed steps. All ranks call it.

    facts: what else meta.json says (position, recipe, fingerprints). keep: newest checkpoints that stay.
    Raises UserError where a file cannot be written; the checkpoints before are untouched.
    """
    final = folder_of(run, step)
    aside = final.with_name(f".{final.name}.part")
    process.on_first(lambda: _fresh(aside))
    meta = {"format": FORMAT, "step": step, **facts, "engines": {}, "files": {}}
    written, failed = {}, None
    for name, engine in engines.items():
        state.ensure_moments(engine)
        parameters = state.parameters(engine)
        meta["engines"][name] = {"updates": state.updates(engine), "parameters": len(parameters)}
        for kind, key in (("weight", None), *((moment, moment) for moment in state.MOMENTS)):
            error = _write_kind(aside, f"{name}.{kind}", engine, parameters, key, written)
            failed = failed or error
    outcomes = process.gather_objects((written, failed))
    problems = [error for _, error in outcomes if error]
    if problems:
        process.on_first(lambda: shutil.rmtree(aside, ignore_errors=True))
        raise UserError(f"{final}: cannot be saved ({problems[0]}); make room or mend the disk, then start again")
    for files, _ in outcomes:
        meta["files"].update(files)
    process.on_first(lambda: _publish(aside, final, meta))
    process.on_first(lambda: _prune(run, step, keep))
    return final


def _fresh(aside: Path) -> None:
    try:
        for left in aside.parent.glob(".step_*"):  # by a start that was killed while it wrote or pruned
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{aside.parent}: cannot be written ({error.strerror})") from None


def _write_kind(aside: Path, stem: str, engine, parameters: dict, key: str | None, written: dict) -> str | None:
    """Write one kind of tensor of one engine; file j is collected and written by rank j mod world.

    Every rank takes part in joining each shard. An error is returned, not raised, so that no rank leaves the
    others alone in a collective.
    """
    me = process.start()
    number, held, size, failed = 0, {}, 0, None

    def close() -> None:
        nonlocal number, held, size, failed
        if held:
            path = aside / f"{stem}.{number:05d}.safetensors"
            try:
                written[path.name] = _write(path, held)
            except (OSError, SafetensorError) as error:
                failed = str(error)
        number, held, size = number + 1, {}, 0

    for name, parameter in parameters.items():
        value = state.get_full(engine, parameter, key)
        if number % me.world == me.rank and failed is None:
            held[name] = value.float().cpu().contiguous().clone()
        size += value.numel() * 4
        if size >= _FILE_BYTES:
            close()
    if key is None and number % me.world == me.rank:
        held.update({name: value.cpu().clone() for name, value in engine.module.named_buffers()})
    close()
    return failed


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    with safe_open(path, framework="pt") as file:  # what was written must open and be complete
        if set(file.keys()) != set(tensors):
            raise OSError(f"{path}: read back other tensors than written")
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _publish(aside: Path, final: Path, meta: dict) -> None:
    """Sync the folder, then give it its name: from this moment it is the newest checkpoint."""
    try:
        with open(aside / "meta.json", "w") as file:
            json.dump({**meta, "digest": _digest(meta)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(aside)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            _remove(final)
        os.rename(aside, final)
        _sync(final.parent)
        with suppress(OSError):  # for people, where links exist; `find` lists the folder instead
            link = final.parent / ".latest.part"
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            os.replace(link, final.parent / "latest")
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{final}: cannot be published ({error}); mend the disk, then start again") from None


def _prune(run: Path, saved: int, keep: int) -> None:
    """Keep the newest. What lies beyond `saved` was left behind by a resume from an older checkpoint: the next
    start must not take it for this run's."""
    known = steps(run)
    with suppress(OSError):  # one too many does no harm
        for step in [step for step in known if step > saved] + [step for step in known if step <= saved][:-keep]:
            _remove(folder_of(run, step))


def _remove(folder: Path) -> None:
    """Remove a checkpoint; never half of one stays under a good name."""
    gone = folder.with_name(f".{folder.name}.gone")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**22):
        digest.update(block)
    return digest.hexdigest()
