"""manifest.json of a folder of pictures (report/pictures.py): what they were made with, how many there are to be, and
whether all are there. Any number of processes read and replace it at once."""

import json
from contextlib import contextmanager
from pathlib import Path

from mage_ds import files
from mage_ds.errors import UserError, refuse_differences

# May differ when a folder is continued: the first ones change no picture, the last two only its rounding.
_FREE = ("num", "run", "complete", "classes", "also", "device", "versions")


def read_manifest(out: Path) -> dict | None:
    """manifest.json of a folder of pictures, None where there is none. UserError where it is damaged."""
    path = Path(out) / "manifest.json"
    try:
        manifest = json.loads(files.begun(path))
        return manifest | {"num": int(manifest["num"]), "complete": bool(manifest["complete"])}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable as a manifest ({error!r}); choose another folder") from None


def begin(book, manifest: dict) -> dict:
    """Writes the first manifest, and returns the one that is there: of two processes the first has its own way."""
    first = files.begin(book.out / "manifest.json", _bytes(manifest), book.work)
    return manifest if first else read_manifest(book.out)


def write(book, manifest: dict) -> None:
    """Puts it in the place of the one that is there."""
    book.publish(book.out / "manifest.json", _bytes(manifest), lasting=True)


def differs(before: dict, settings: dict) -> bool:
    """Whether pictures of these settings do not belong beside those of the manifest `before`."""
    return any(before.get(key) != value for key, value in settings.items() if key not in _FREE)


def refuse(out: Path, before: dict, settings: dict) -> None:
    """UserError that says in what the settings differ, where they do."""
    begun = f"--num {before['num']} pictures"
    refuse_differences(out, begun, before, settings, free=_FREE, how="was begun with")


def note_unlike(book, settings: dict) -> str | None:
    """A line, where this process's device or versions are not those that the set was begun with. The manifest lists
    under "also" who took part besides; of two that write at once one note may be lost."""
    before = read_manifest(book.out)
    here, there = _where(settings), _where(before or settings)
    if here == there:
        return None
    if here not in before.get("also", []):
        write(book, before | {"also": sorted([*before.get("also", []), here])})
    return f"{book.out}: begun on {there}, continued on {here}: pictures may differ in rounding"


def _where(settings: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in sorted((settings.get("versions") or {}).items()))
    return f"{settings.get('device')} ({versions})"


@contextmanager
def writing(out: Path):
    """What the system refuses becomes one line. A file that is gone is another matter: another process may have been
    first, and whoever works on the folder looks again."""
    try:
        yield
    except FileNotFoundError:
        if Path(out).is_dir():
            raise
        raise UserError(f"--out {out}: is gone; start again") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out}: cannot be written ({reason}); choose another folder or make room") from None


def _bytes(manifest: dict) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()
