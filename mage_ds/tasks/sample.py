"""mage-ds sample: pictures out of a trained MAGE, in a folder that any number of processes can continue."""

from importlib import metadata
from pathlib import Path

import numpy as np

from mage_ds.engine import inference, process, retention, stored
from mage_ds.errors import UserError
from mage_ds.report import pictures
from mage_ds.report.progress import counter
from mage_ds.sampling import decode
from mage_ds.sampling.tiles import mine, tiles

_SOME = 16  # pictures that the detokenizer makes at once: at 256 px each of its activations takes 34 MB a picture
_BATCH = 64
_MOST = 2**31 - 1


def sample(
    run,
    num: int,
    out,
    *,
    steps: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    batch: int | None = None,
    checkpoint: int | None = None,
    threads: int = 1,
    round: bool = False,
) -> None:
    """Makes pictures 0..num-1 of a run in `out`: PNGs named by index, tokens.npz, grid.png, manifest.json.

    A picture is a function of (weights, seed, index) and of the settings in the manifest, not of the number of
    processes. What `out` holds of the same settings stays, and what is missing is added.

    Args: steps, temperature: T and tau (paper.md 5), by default the recipe's; batch: pictures computed together, by
    default what `out` was begun with, else 64 or fewer; checkpoint: a step, by default the newest; threads: CPU
    threads of a process: results depend on the number, so it is fixed; round: nearest 8-bit values instead of the
    published truncation.
    Raises: UserError for a folder that is no run, a wrong number, or an `out` of other settings.
    """
    me = process.start(threads)
    run, out = Path(run), Path(out)
    least = {"num": 1, "batch": 1, "threads": 1, "steps": 1, "temperature": 0}
    given = {"num": num, "batch": batch, "threads": threads, "steps": steps, "temperature": temperature}
    for name, value in given.items():
        if value is not None and not least[name] <= value <= _MOST:
            raise UserError(f"--{name} {value}: must be from {least[name]} to {_MOST:,}")
    stored.open_run(run, "pretrain")
    folder = process.on_first(lambda: retention.find(run, checkpoint))
    if not process.on_first(lambda: retention.pin(folder, f"sampled into {out}")):
        process.say(f"{folder}: cannot be pinned (read-only?); a training that goes on there may remove it")
    checkpoint = retention.step_of(folder)
    paint, settings = _load(run, checkpoint, steps, temperature, seed, round)
    if batch is None:
        before = process.on_first(lambda: pictures.read_manifest(out)) or {}
        batch = before.get("batch", min(_BATCH, num))
    settings |= {"batch": batch, "threads": threads}

    num = process.on_first(lambda: pictures.open_folder(out, settings, num))
    whole = tiles(num, batch)
    todo = process.on_first(lambda: pictures.missing(out, num, whole))
    left = sum(int((tile < num).sum()) for tile in todo)
    with counter(left, "picture", "sampled", first=me.first, say=process.say) as advance:
        for tile in mine(todo, me.rank, me.world):
            tokens, images = paint(tile)
            pictures.write_tile(out, num, tile, tokens, images)
            advance(me.world * batch)
    process.barrier()
    if todo or not process.on_first(lambda: pictures.read_manifest(out)["complete"]):
        process.on_first(lambda: pictures.finish(out, settings, num, whole))
        process.say(f"{num} pictures in {out}; look at {out / 'grid.png'} first")
    else:
        process.say(f"{out}: its {num} pictures of these settings are complete; nothing to do")


def _load(run: Path, checkpoint, steps, temperature, seed: int, rounded: bool):
    """(paint, what the manifest says of it); paint: index (B,) -> tokens (B, N), pictures uint8 (B, H, W, 3)."""
    import torch

    model, recipe, meta = stored.load_mage(run, checkpoint)
    tokenizer, info = stored.load_tokenizer(run / "tokenizer")
    steps = recipe.sampling.steps if steps is None else steps
    temperature = float(recipe.sampling.temperature if temperature is None else temperature)
    settings = {
        "run": str(run.resolve()),
        "checkpoint": meta["step"],
        "weights": stored.weights_hash(model.state_dict()),
        "tokenizer": info["hash"],
        "seed": seed,
        "steps": steps,
        "temperature": temperature,
        "precision": "float32",
        "rounding": "nearest" if rounded else "truncated",
        "device": process.start().device.type,
        "versions": {name: metadata.version(name) for name in ("torch", "deepspeed", "numpy")},
    }
    torch.backends.cudnn.allow_tf32 = False  # float32 as published; matrix products have it off by default
    engine, tokenizer = inference.engine(model, torch.float32), inference.frozen(tokenizer)
    empty = torch.zeros(1, recipe.model.tokens, dtype=torch.int64, device=process.start().device)

    def paint(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = empty.expand(len(index), -1)
        noise = decode.keyed_noise(seed, index, tokens.shape[1])
        masked = torch.ones_like(tokens, dtype=torch.bool)
        tokens = decode.decode(engine, tokens, masked, steps=steps, temperature=temperature, noise=noise)
        with torch.no_grad():
            images = [decode.pixels(tokenizer.detokenize(some), rounded) for some in tokens.split(_SOME)]
        return tokens.cpu().numpy(), np.concatenate(images)

    return paint, settings
