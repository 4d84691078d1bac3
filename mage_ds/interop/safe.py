"""Files of tensors that strangers made, read without executing anything in them.

A `.pth` is a zip archive around a pickle, and a pickle is a program. Before torch's restricted unpickler sees it, the
archive's sizes and the names that the pickle asks for are looked at; what is not on the short list here is refused.
"""

import argparse
import mmap
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mage_ds.errors import UserError

# All that files of tensors need: containers, tensors, their dtypes, and the one object of a training's settings.
_KNOWN = re.compile(
    r"argparse Namespace|collections (OrderedDict|Counter)|(builtins|__builtin__) set|_codecs encode"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)|torch(\.cuda)? \w+Storage|torch\.storage \w+Storage"
    r"|torch (Size|device|(u?int|float|bfloat)\d+)"
)
_MOST_TENSORS = 20_000
_PICKLE_BYTES = 2**28  # of the names and settings in a file: a real one has under 2**20
_REMEDY = "nothing in it was run; take the file from its source again, or have it saved as plain tensors"


def read(path: Path) -> dict[str, Any]:
    """What a .pth, .pt, .ckpt or .safetensors file holds: a dict, its tensors on the CPU, memory-mapped if it can be.

    Raises UserError, one line, for what cannot be read, is damaged, claims absurd sizes, or asks for any object but
    tensors, plain containers and argparse.Namespace. Nothing of the file is executed.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of a model") from None
    if head[:4] == b"PK\x03\x04":
        _examine(path)
        return _load(path, mapped=True)
    if head[:1] == b"\x80":  # before torch 1.6
        return _load(path, mapped=False)
    if head[8:] == b"{":
        return mapped_tensors(path)
    raise UserError(f"{path}: is no file of a model: neither torch.save's nor safetensors' ({_kind(head)})")


def tensors(found: Mapping, path: Path) -> dict[str, torch.Tensor]:
    """`found` as a table of names and ordinary dense CPU tensors. Raises UserError on the first entry that is none.

    A few bytes can claim a tensor of any size, as a view that repeats them: such ones are refused.
    """
    room = 2 * path.stat().st_size  # tied weights are there twice
    for name, value in found.items():
        if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise UserError(f"{path}: {printable(name)[:80]} is a {type(value).__name__}, not a tensor; {_REMEDY}")
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.nbytes > value.untyped_storage().nbytes() or value.nbytes > room:
            raise UserError(f"{path}: {printable(name)[:80]} {tuple(value.shape)} is no ordinary tensor; {_REMEDY}")
        room -= value.nbytes
    return {name: value.detach() for name, value in found.items()}


def mapped_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, memory-mapped. Raises UserError where it cannot be read or is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            if len(file.keys()) > _MOST_TENSORS:
                raise UserError(f"{path}: claims {len(file.keys()):,} tensors, as no model here has; {_REMEDY}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path}: damaged safetensors file ({first_line(error)}); copy it again") from None


def _kind(head: bytes) -> str:
    return "it is empty" if not head else f"it begins with {head!r}"


def _examine(path: Path) -> None:
    """The archive's directory and the pickle's names, read only. Raises UserError."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # torch.save compresses nothing, so all members together are smaller than the file.
            packed = any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members)
            if packed or sum(member.file_size for member in members) > size:
                claimed = sum(member.file_size for member in members)
                raise UserError(
                    f"{path}: claims {claimed:,} bytes in a file of {size:,}, as no torch.save does; {_REMEDY}"
                )
            pickles = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1 or pickles[0].file_size > _PICKLE_BYTES:
                raise UserError(f"{path}: is a zip archive, but not one of torch.save; {_REMEDY}")
            _examine_names(path, archive.read(pickles[0]))
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: damaged or cut off ({first_line(error)}); copy or download it again") from None


def _examine_names(path: Path, program: bytes) -> None:
    """Raises UserError where a pickle asks for an object that is not on the list; pickletools only reads it."""
    for operation, argument, _ in pickletools.genops(program):
        if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):  # torch.save never writes these
            raise UserError(f"{path}: its pickle has the operation {operation.name}; {_REMEDY}")
        if operation.name == "GLOBAL" and not _KNOWN.fullmatch(argument):
            name = printable(argument.replace(" ", "."))[:80]
            raise UserError(f"{path}: asks for {name}, which is not allowed in a file of a model; {_REMEDY}")


def _load(path: Path, mapped: bool) -> dict[str, Any]:
    try:
        if not mapped:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                _examine_legacy(path, whole)
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # torch's unpickler meets made-up input with whatever Python raises
        raise UserError(f"{path}: damaged, or no file of torch.save ({first_line(error)}); {_REMEDY}") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: holds a {type(found).__name__}, not a model's tensors by name; {_REMEDY}")
    return dict(found)


def _examine_legacy(path: Path, whole: mmap.mmap) -> None:
    """The old format is five pickles, then raw numbers."""
    for _ in range(5):
        start = whole.tell()
        for operation, _, _ in pickletools.genops(whole):
            if operation.name == "STOP":
                break
        end = whole.tell()
        _examine_names(path, whole[start:end])
        whole.seek(end)


def printable(text) -> str:
    """`text` as it may be shown: names in a stranger's file may hold line breaks and commands to the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def first_line(error: BaseException) -> str:
    """What an error says, short and printable: it may quote the file."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])[:160]
