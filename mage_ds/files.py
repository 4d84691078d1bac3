"""Files that are whole or not there, that one process writes, or the first of several, and of which a checksum is
known."""

import fcntl
import hashlib
import os
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

from mage_ds.errors import UserError

_LOOKS, _LOOK_S = 20, 0.05  # at a file that is empty, because another process is about to write it


@contextmanager
def writing(out: Path):
    """What the system refuses becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error}); what is done is kept: make room or mend it "
            "and run the same command again, or choose another folder"
        ) from None


@contextmanager
def saved(path: Path):
    """A file opened for bytes that has its name when it is whole and on the disk, and not before."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        with suppress(OSError):
            aside.unlink()


def begin(path: Path, data: bytes, work: Path) -> bool:
    """Writes `path` where it is not there, in one piece; False where it is: of several processes the first has its own
    way. work: a folder for it meanwhile, made where it is missing, on the same file system. Read it with `begun`."""
    work.mkdir(exist_ok=True)
    part = work / f"{path.name}.{uuid.uuid4().hex[:12]}"
    part.write_bytes(data)
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: whoever creates the file may fill it
        try:
            with open(path, "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
    finally:
        part.unlink(missing_ok=True)
    return True


def begun(path: Path) -> str:
    """The text of a file that `begin` writes; waits a second for one that is still empty."""
    text = path.read_text()
    for _ in range(_LOOKS):
        if text:
            break
        time.sleep(_LOOK_S)
        text = path.read_text()
    return text


def lock(file) -> bool:
    """Takes the lock of an open file, which dies with the process; False where another process holds it. A file system
    without locks gives it to everybody."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def sha256(path: Path, advance=None) -> str:
    """Of a file's bytes, as hexadecimal digits; advance(bytes) is called while it is read."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        block = memoryview(bytearray(2**22))
        while size := file.readinto(block):
            digest.update(block[:size])
            if advance:
                advance(size)
    return digest.hexdigest()
