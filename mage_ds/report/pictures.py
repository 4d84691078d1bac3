"""A folder of generated pictures: 000000.png ..., tokens.npz, grid.png, manifest.json.

It grows tile by tile, by any number of processes, and can be continued. `.tiles/` holds the tokens of each finished
tile, and the pixels of those that the grid shows; a tile's file is written last, so it says that the tile is whole.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mage_ds.errors import UserError
from mage_ds.report import grids

_FREE = ("num", "run", "complete", "versions")  # of the manifest: what may differ when a folder is continued


def open_folder(out: Path, settings: dict, num: int) -> int:
    """Creates the folder, or checks that it holds pictures of the same settings; the number of pictures it will hold.

    Raises: UserError where `out` cannot be written or belongs to something else; the line says what differs.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; choose a new folder")
    before = read_manifest(out)
    if before is None and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: holds files but no manifest.json of pictures; choose a new folder")
    if before is not None:
        _refuse_differences(out, before, settings)
        if before["num"] >= num and before["complete"]:
            return before["num"]
        num = max(num, before["num"])
    with writing(out):
        (out / ".tiles").mkdir(parents=True, exist_ok=True)
        _write_manifest(out, {**settings, "num": num, "complete": False})
    return num


def missing(out: Path, num: int, tiles: list) -> list:
    """The tiles (index arrays) of pictures below `num` that are not whole yet."""
    return [tile for tile in tiles if not _tile(out, tile).is_file() or not _has_pictures(out, tile, num)]


def write_tile(out: Path, num: int, tile: np.ndarray, tokens: np.ndarray, pictures: np.ndarray) -> None:
    """One tile: index (B,), tokens int (B, N), pictures uint8 (B, H, W, 3); those from `num` on are its padding."""
    with writing(out):
        for i, picture in zip(tile, pictures, strict=True):
            if i < num:
                grids.save(picture, _picture(out, i))
        shown = pictures[: max(0, _in_grid(pictures) - int(tile[0]))]
        _save_arrays(_tile(out, tile), tokens=tokens.astype(np.uint16), pictures=shown)


def finish(out: Path, settings: dict, num: int, tiles: list) -> None:
    """Joins the tiles: tokens.npz (tokens uint16 (num, N), index int64 (num,)), grid.png, the manifest's last word."""
    tokens, shown = [], []
    for tile in tiles:
        with np.load(_tile(out, tile), allow_pickle=False) as part:
            tokens.append(part["tokens"])
            shown.append(part["pictures"])
    with writing(out):
        _save_arrays(out / "tokens.npz", tokens=np.concatenate(tokens)[:num], index=np.arange(num))
        grids.save(grids.grid(np.concatenate(shown)[:num]), out / "grid.png")
        _write_manifest(out, {**settings, "num": num, "complete": True})


def read_manifest(out: Path) -> dict | None:
    """manifest.json of a folder of pictures, None where there is none. UserError where it is damaged."""
    path = out / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        return manifest | {"num": int(manifest["num"]), "complete": bool(manifest["complete"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable as a manifest ({error!r}); choose another folder") from None


def numbered(out: Path, num: int) -> list[Path]:
    """The files of pictures 0..num-1."""
    return [_picture(out, i) for i in range(num)]


@contextmanager
def writing(out: Path):
    """What the system refuses becomes one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out}: cannot be written ({reason}); choose another folder or make room") from None


def _picture(out: Path, i: int) -> Path:
    return out / f"{i:06d}.png"


def _tile(out: Path, tile: np.ndarray) -> Path:
    return out / ".tiles" / f"{tile[0]:06d}.npz"


def _has_pictures(out: Path, tile: np.ndarray, num: int) -> bool:
    return all(_picture(out, i).is_file() for i in tile if i < num)


def _in_grid(pictures: np.ndarray) -> int:
    """16 x 16 small pictures, 8 x 8 large ones."""
    return 256 if max(pictures.shape[1:3]) <= 64 else 64


def _refuse_differences(out: Path, before: dict, settings: dict) -> None:
    """UserError that names every setting in which the pictures of the folder were made otherwise."""
    keys = [key for key in settings if key not in _FREE and before.get(key) != settings[key]]
    if keys:
        what = "; ".join(f"{key} {_brief(before.get(key))} there, {_brief(settings[key])} here" for key in keys)
        raise UserError(f"--out {out}: holds pictures of other settings ({what}); choose another folder")


def _brief(value) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _write_manifest(out: Path, manifest: dict) -> None:
    part = out / ".manifest.json.part"
    part.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(part, out / "manifest.json")


def _save_arrays(path: Path, **arrays) -> None:
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        np.savez(file, **arrays)
    os.replace(part, path)
