"""Files that are whole or not there, that one process writes, and of which a checksum is known."""

import fcntl
import hashlib
import os
from contextlib import contextmanager, suppress
from pathlib import Path


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
