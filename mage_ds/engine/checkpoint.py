"""Checkpoints: one layout for every world size, ZeRO stage and precision.

RUN/checkpoints/step_000500/ holds safetensors files with, for each engine, by parameter name, the float32 weight, the
optimizer's moments and the average of the weights where one is kept, and `meta.json`: counts, stream position, what the
run is, and each file's size and SHA-256. Buffers stand with the weights; those that are no part of the model's
state_dict, which only its training needs, in a file of their own. Nothing in it is a pickle. The ranks write files in
turn into a hidden folder, which is read again, verified and published by one rename; until then the checkpoint before
it is the newest.
"""

import hashlib
import json
import os
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mage_ds.engine import process, retention, state, watch
from mage_ds.engine.retention import find, folder_of, steps
from mage_ds.errors import UserError
from mage_ds.files import sha256

FORMAT = 1
_HEADER_BYTES = 2**10  # of a parameter in a checkpoint: more than its entries in the files' headers take
_FILE_BYTES = 2**30  # a file is closed when it holds this much: a rank keeps one in memory while saving


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


def verify(folder: Path, meta: dict, only: str = "", *, read: bool = True, advance=None) -> None:
    """Compare sizes and checksums of the files whose names start with `only`. Raises UserError on the first.

    read: False compares sizes only; advance(bytes) is called while files are read.
    """
    for name, expected in meta["files"].items():
        if not name.startswith(only):
            continue
        watch.beat()
        path = folder / Path(name).name
        try:
            if path.stat().st_size != expected["bytes"]:
                raise ValueError(f"{path.stat().st_size} bytes instead of {expected['bytes']}")
            if read and sha256(path, advance) != expected["sha256"]:
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
        watch.beat()
        path = folder / Path(name).name
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield key, file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {_damaged(folder, error)}") from None


def load_weights(
    run: Path, engine: str, step: int | None = None, advance=None, weights: str | None = None
) -> tuple[dict[str, torch.Tensor], dict]:
    """The verified float32 weights and buffers of one engine by name, and the checkpoint's meta.

    weights: "ema", their average over the training, "raw", what the last update left, or None, the average where one
    is kept. Needs no DeepSpeed and no process group; of the checkpoint's files only these are read. advance: see
    `verify`. Raises UserError for an average that is not kept.
    """
    folder = find(run, step)
    meta = read_meta(folder)
    if engine not in meta["engines"]:
        raise UserError(f"{folder}: holds {', '.join(meta['engines'])}, not {engine}: is this the right run?")
    averaged = any(name.startswith(f"{engine}.{state.EMA}.") for name in meta["files"])
    if weights == "ema" and not averaged:
        raise UserError(f"--weights ema: {folder} holds no average of the weights (optimizer.ema); leave it out")
    found = {}
    for kind in ("weight", state.EMA) if averaged and weights != "raw" else ("weight",):
        verify(folder, meta, f"{engine}.{kind}.", advance=advance)
        found |= dict(read_tensors(folder, meta, f"{engine}.{kind}."))
    return found, meta


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
        for key in state.kinds(engine):
            _load_kind(folder, meta, f"{name}.{key}.", engine, key)
        _, beside = _buffers(engine)
        for key, value in read_tensors(folder, meta, f"{name}.buffer."):
            if key in beside:
                beside[key].copy_(value)
        state.set_updates(engine, meta["engines"][name]["updates"])
    process.barrier()
    return meta


def verified(folder: Path) -> dict:
    """The checkpoint's meta, after all its files have been compared with it. Raises UserError on damage."""
    meta = read_meta(folder)
    verify(folder, meta)
    return meta


def newest_whole(run: Path) -> Path:
    """The newest checkpoint whose files are whole, as a run that is started again unseen needs it. What is damaged
    above it is said. Raises UserError where none is whole."""
    known = steps(run)
    for step in reversed(known):
        folder = folder_of(run, step)
        try:
            verified(folder)
            return folder
        except UserError as error:
            if step == known[0]:
                raise
            process.say(f"{str(error).partition(';')[0]}; looking at the one before")


def _load_kind(folder: Path, meta: dict, prefix: str, engine, key: str | None) -> None:
    missing = state.parameters(engine)
    buffers, _ = _buffers(engine) if key is None else ({}, {})
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


def _buffers(engine) -> tuple[dict, dict]:
    """The buffers of an engine's model by name: those of its state_dict, and the others."""
    buffers, names = dict(engine.module.named_buffers()), engine.module.state_dict().keys()
    beside = {name: buffers.pop(name) for name in buffers.keys() - names}
    return buffers, beside


# --- writing -------------------------------------------------------------------------------------------------


def size_of(engines: dict) -> int:
    """Bytes of a checkpoint: float32 weight and moments of each parameter, the buffers, and some for headers."""
    total = 0
    for engine in engines.values():
        shapes = [state.shape_of(parameter) for parameter in state.parameters(engine).values()]
        total += 4 * (1 + len(state.kinds(engine))) * sum(shape.numel() for shape in shapes) + _HEADER_BYTES * len(
            shapes
        )
        total += sum(buffer.nbytes for buffer in engine.module.buffers())
    return total


def check_room(run: Path, engines: dict) -> None:
    """Raises UserError where the disk has no room for one more checkpoint: better now than in its middle."""
    needed, free = size_of(engines), shutil.disk_usage(run).free
    if free < needed:
        raise UserError(
            f"{run}: a checkpoint needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free on its disk; "
            f"{_kept(run)}; make room, then start again"
        )


def _kept(run: Path) -> str:
    known = steps(run)
    return f"the checkpoint of step {known[-1]} is kept" if known else "there is no checkpoint yet"


def save(run: Path, step: int, engines: dict, facts: dict, *, keep: int, keep_every: int = 0) -> Path:
    """Write, verify and publish a checkpoint after `step` completed steps. All ranks call it.

    facts: what else meta.json says (position, recipe, fingerprints). keep: newest checkpoints that stay; keep_every:
    so do those whose step is a multiple of it (0: none). meta.json also says how many seconds rank 0 took to gather,
    to write and to verify. Raises UserError where a file cannot be written; the checkpoints before are untouched.
    """
    final = folder_of(run, step)
    aside = final.with_name(f".{final.name}.part")
    process.on_first(lambda: _fresh(run, aside, engines))
    meta = {"format": FORMAT, "step": step, **facts, "engines": {}, "files": {}}
    written, failed, seconds = {}, None, dict.fromkeys(("gather", "write", "verify"), 0.0)
    for name, engine in engines.items():
        state.ensure_moments(engine)
        parameters = state.parameters(engine)
        meta["engines"][name] = {"updates": state.updates(engine), "parameters": len(parameters)}
        buffers, beside = _buffers(engine)
        kinds = [("weight", None, parameters, buffers), *((key, key, parameters, {}) for key in state.kinds(engine))]
        for kind, key, *tensors in (*kinds, ("buffer", None, {}, beside)):
            error = _write_kind(aside, f"{name}.{kind}", engine, *tensors, key, written, seconds)
            failed = failed or error
    outcomes = process.gather_objects((written, failed))
    problems = [error for _, error in outcomes if error]
    if problems:
        process.on_first(lambda: shutil.rmtree(aside, ignore_errors=True))
        raise UserError(
            f"{final}: cannot be saved ({problems[0]}); {_kept(run)}; make room or mend the disk, then start again"
        )
    for files, _ in outcomes:
        meta["files"].update(files)
    meta["seconds"] = {what: round(value, 3) for what, value in seconds.items()}
    process.on_first(lambda: _publish(aside, final, meta))
    process.on_first(lambda: retention.prune(run, step, keep, keep_every))
    return final


def _fresh(run: Path, aside: Path, engines: dict) -> None:
    try:
        for other in aside.parent.glob(".step_*"):  # by a start that was killed while it wrote or pruned
            shutil.rmtree(other, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        check_room(run, engines)
        aside.mkdir()
    except OSError as error:
        raise UserError(f"{aside.parent}: cannot be written ({error.strerror}); {_kept(run)}") from None


def _write_kind(
    aside: Path, stem: str, engine, parameters: dict, buffers: dict, key: str | None, written: dict, seconds: dict
) -> str | None:
    """Write one kind of tensor of one engine, then `buffers`; file j is collected and written by rank j mod world.

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
                written[path.name] = _write(path, held, seconds)
            except (OSError, SafetensorError) as error:
                failed = str(error)
        watch.beat()
        number, held, size = number + 1, {}, 0

    for name, parameter in parameters.items():
        with _timed(seconds, "gather"):
            value = state.get_full(engine, parameter, key)
            if number % me.world == me.rank and failed is None:
                held[name] = value.float().cpu().contiguous().clone()
        size += value.numel() * 4
        if size >= _FILE_BYTES:
            close()
    if number % me.world == me.rank:
        held.update({name: value.cpu().clone() for name, value in buffers.items()})
    close()
    return failed


@contextmanager
def _timed(seconds: dict, what: str):
    began = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - began


def _write(path: Path, tensors: dict[str, torch.Tensor], seconds: dict) -> dict:
    watch.beat()
    with _timed(seconds, "write"):
        save_file(tensors, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    with _timed(seconds, "verify"):
        with safe_open(path, framework="pt") as file:  # what was written must open and be complete
            if set(file.keys()) != set(tensors):
                raise OSError(f"{path}: read back other tensors than written")
        return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _publish(aside: Path, final: Path, meta: dict) -> None:
    """Sync the folder, then give it its name: from this moment it is the newest checkpoint."""
    try:
        with open(aside / "meta.json", "w") as file:
            json.dump({**meta, "digest": _digest(meta)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(aside)
        if final.exists():  # a run that goes back leaves its step behind first, so this is no run's only copy
            retention.remove(final)
        os.rename(aside, final)
        _sync(final.parent)
        with suppress(OSError):  # for people, where links exist; `find` lists the folder instead
            link = final.parent / ".latest.part"
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            os.replace(link, final.parent / "latest")
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{final}: cannot be published ({error}); {_kept(final.parent.parent)}; mend the disk, then start again"
        ) from None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
