"""Tars as other programs write them: by Python's tarfile, and byte by byte where tarfile refuses."""

import io
import tarfile


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write(path, *members, format=tarfile.USTAR_FORMAT, **options):
    """Members: (TarInfo, bytes), or (name, bytes) for plain files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:", format=format, **options) as file:
        for info, data in members:
            info = info if isinstance(info, tarfile.TarInfo) else member(info, data)[0]
            file.addfile(info, io.BytesIO(data))
    return path


def block(name: bytes, size: int = 0, kind: bytes = b"0", **fields: bytes) -> bytes:
    """One header with a right sum; fields by offset: at_124=b"..."."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108], header[124:136], header[156:157] = b"0000644\0", b"%011o\0" % size, kind
    header[257:265] = b"ustar\x0000"
    for key, value in fields.items():
        at = int(key.removeprefix("at_"))
        header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)
