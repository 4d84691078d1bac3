"""What strangers may put into a file: refused in one line, and nothing of it executed."""

import argparse
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mage_ds.errors import UserError
from mage_ds.interop import safe


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, mark: Path, how):
        self.mark, self.how = str(mark), how

    def __reduce__(self):
        return {"system": (os.system, (f"touch '{self.mark}'",)), "open": (open, (self.mark, "w"))}[self.how]


def archive(path: Path, program: bytes, packed: bool = False) -> None:
    """A zip as torch.save makes them, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/version", b"3\n")


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        safe.tensors(safe.read(path), path)
    line = str(error.value)
    assert str(path) in line and "\n" not in line and len(line) < 500
    return line


@pytest.mark.parametrize("how", ["system", "open"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickles(tmp_path, how, protocol):
    path, mark = tmp_path / "model.pth", tmp_path / "mark"
    program = pickle.dumps({"model": {"a": torch.ones(1).tolist()}, "args": Trap(mark, how)}, protocol=protocol)
    archive(path, program)
    assert "nothing in it was run" in refused(path)
    for old in (pickle.dumps(0x1950A86A20F9469CFC6C, 2), b""):  # the format before zips: with its number, and bare
        path.write_bytes(old + program)
        refused(path)
    assert not mark.exists()
    pickle.loads(program)  # it would have
    assert mark.exists()


def test_the_object_is_named(tmp_path):
    for value, name in ((np.float64(1.0), "numpy"), (Path("x"), "pathlib"), (torch.nn.Linear(1, 1), "Linear")):
        torch.save({"model": {"a": torch.ones(2)}, "epoch": value}, tmp_path / "model.pth")
        line = refused(tmp_path / "model.pth")
        assert "not allowed" in line and name in line


@pytest.mark.parametrize("legacy", [False, True])
def test_what_real_files_carry(tmp_path, legacy):
    path = tmp_path / "model.pth"
    model = OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.nn.Parameter(torch.ones(2)), c=torch.ones(3).half())
    model["tied"] = model["a"]
    args = argparse.Namespace(
        lr=1e-4, betas=(0.9, 0.95), device=torch.device("cuda"), nested=argparse.Namespace(x={1, 2})
    )
    rest = {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "epoch": 3, "scaler": {}, "dtype": torch.float16}
    torch.save({"model": model, "args": args, **rest}, path, _use_new_zipfile_serialization=not legacy)
    found = safe.read(path)
    assert found["args"] == args and found["epoch"] == 3
    table = safe.tensors(found["model"], path)
    assert list(table) == list(model) and all(torch.equal(table[name], model[name]) for name in model)


def test_tensors_are_mapped_not_read(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {"a": torch.zeros(2**22)}}, path)
    safe.read(path)
    before = _anonymous()
    held = safe.tensors(safe.read(path)["model"], path)
    assert _anonymous() - before < 2**22 and held["a"].nbytes == 2**24


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def test_damaged_files(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {"a": torch.ones(1000)}}, path)
    whole = path.read_bytes()
    for size in (4, 20, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "damaged" in refused(path)
    torch.save({"model": {"a": torch.ones(1000)}}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in (4, 20, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "damaged" in refused(path)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "no file of a model"),
        (b"plain text, in several\nlines", "no file of a model"),
        (b"\x1f\x8b\x08" + bytes(20), "no file of a model"),
        ((2**40).to_bytes(8, "little") + b"{}", "damaged safetensors"),
        ((2**63).to_bytes(8, "little") + b'{"a":', "damaged safetensors"),
        ((99 * 10**6).to_bytes(8, "little") + b"{" + bytes(1000), "damaged safetensors"),
        (pickle.dumps([1, 2]), "damaged"),
    ],
)
def test_no_models(tmp_path, content, said):
    (tmp_path / "model.pth").write_bytes(content)
    assert said in refused(tmp_path / "model.pth")


@pytest.mark.parametrize("end, shape", [(4 * 10**15, [10**15]), (400, [99]), (4, [10**15]), (-4, [1])])
def test_lying_safetensors_headers(tmp_path, end, shape):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(400))
    assert "damaged safetensors" in refused(path)


def test_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0)}, path)
    assert torch.equal(safe.read(path)["a"], torch.arange(4.0))


def test_a_header_of_too_many_tensors(tmp_path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({str(i): empty for i in range(20_001)}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "claims 20,001 tensors" in refused(tmp_path / "model.safetensors")


def test_zip_bombs(tmp_path):
    path = tmp_path / "model.pth"
    archive(path, pickle.dumps({"model": "0" * 10**8}, 2), packed=True)
    assert path.stat().st_size < 10**6
    assert "claims 100,0" in refused(path)
    # The same bytes claimed by many entries, of which only the directory grows.
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"0" * 10**6)
        entry = file.infolist()[0]
        for i in range(10):
            copy = zipfile.ZipInfo(f"archive/data/{i}")
            copy.header_offset, copy.CRC, copy.file_size, copy.compress_size = (
                entry.header_offset,
                entry.CRC,
                10**6,
                10**6,
            )
            file.filelist.append(copy)
        file._didModify = True
    assert "claims 11,000,000 bytes" in refused(path)


def test_tensors_that_claim_more_than_the_file(tmp_path):
    path = tmp_path / "model.pth"
    # A view that repeats one number.
    torch.save({"model": {"a": torch.ones(1).expand(10**9)}}, path)
    with pytest.raises(UserError, match="no ordinary tensor"):
        safe.tensors(safe.read(path)["model"], path)
    # Many names for the same numbers.
    whole = torch.ones(10**5)
    torch.save({"model": {f"a{i}": whole for i in range(100)}}, path)
    with pytest.raises(UserError, match="no ordinary tensor"):
        safe.tensors(safe.read(path)["model"], path)
    torch.save({"model": {"a": torch.eye(3).to_sparse()}}, path)
    assert "not allowed" in refused(path)


@pytest.mark.parametrize("numbers", [b"M\xff\xff", b"\x8a\x06" + (2**45).to_bytes(6, "little")], ids=["some", "2**45"])
def test_a_storage_that_claims_more_numbers_than_it_has(tmp_path, numbers):
    path = tmp_path / "model.pth"
    torch.save({"model": {"a": torch.ones(10)}}, path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    program = members[name].replace(b"K\nt", numbers + b"t").replace(b"K\n\x85", numbers + b"\x85")
    assert program.count(numbers) == 2
    with zipfile.ZipFile(path, "w") as file:
        for each, data in (members | {name: program}).items():
            file.writestr(each, data)
    assert "damaged" in refused(path)


def test_an_archive_of_something_else(tmp_path):
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "text")
    assert "not one of torch.save" in refused(path)
    torch.save(torch.ones(3), path)
    assert "holds a Tensor" in refused(path)
    with pytest.raises(UserError, match="is a str, not a tensor"):
        safe.tensors({"a": "text"}, path)
    assert "cannot be read" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / "nowhere.pth")
