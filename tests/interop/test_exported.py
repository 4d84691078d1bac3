"""Exports: what is written is read back bit for bit, by the package and by the safetensors library."""

import json
from dataclasses import replace

import plain_official as plain
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from mage_ds.errors import UserError
from mage_ds.interop import exported, official


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A pre-training file with some extra keys, read."""
    path = tmp_path_factory.mktemp("official") / "a.pth"
    extra = {"projector.scale": torch.ones(()), "projector.steps": torch.tensor([3])}
    plain.make_file(path, plain.pretrain_values(**plain.TINY) | extra)
    return official.read(path)


def write(folder, *args, **kwargs):
    folder.mkdir()
    exported.write(folder, *args, **kwargs)
    return folder


def equal(ours, theirs):
    assert list(ours) == list(theirs)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))


def test_round_trip(tmp_path, parts):
    seen = []
    folder = write(tmp_path / "out", parts, advance=seen.append)
    assert sum(seen) == exported.size(parts, "float32") - sum(value.nbytes for value in parts.unused.values())
    back = exported.read(folder)
    for name in ("kind", "model", "image_size", "sampling", "foreign", "facts", "origin"):
        assert getattr(back, name) == getattr(parts, name)
    equal(dict(sorted(back.weights.items())), dict(sorted(parts.weights.items())))
    equal(dict(sorted(back.unused.items())), dict(sorted(parts.unused.items())))
    assert back.tokenizer.model == parts.tokenizer.model and back.tokenizer.image_size == 16
    equal(dict(sorted(back.tokenizer.weights.items())), dict(sorted(parts.tokenizer.weights.items())))
    theirs = load_file(folder / "model.safetensors")  # the library's own reader
    equal(dict(sorted(theirs.items())), dict(sorted(parts.weights.items())))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_back_to_the_authors_layout(tmp_path, parts):
    folder = write(tmp_path / "out", parts)
    official.write(tmp_path / "b.pth", exported.read(folder), lambda _: None)
    before = plain.pretrain_values(**plain.TINY) | {k: v for k, v in parts.unused.items() if k.startswith("projector")}
    after = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    equal(dict(sorted(after.items())), dict(sorted(before.items())))


@pytest.mark.parametrize("kind", ["classifier", "tokenizer"])
def test_the_other_kinds(tmp_path, kind):
    if kind == "classifier":
        values, key = plain.make_file(tmp_path / "a.pth", plain.finetuned_values(**plain.TINY)), "model"
    else:
        values, key = plain.make_tokenizer(tmp_path / "a.pth", "vqgan."), "state_dict"
    back = exported.read(write(tmp_path / "out", official.read(tmp_path / "a.pth")))
    assert back.kind == kind
    official.write(tmp_path / "b.pth", back, lambda _: None)
    equal(dict(sorted(torch.load(tmp_path / "b.pth", weights_only=True)[key].items())), dict(sorted(values.items())))


def test_bf16(tmp_path, parts):
    folder = write(tmp_path / "out", parts, "bf16")
    back = exported.read(folder)
    equal(dict(sorted(back.weights.items())), {name: value.bfloat16() for name, value in sorted(parts.weights.items())})
    equal(dict(sorted(back.tokenizer.weights.items())), dict(sorted(parts.tokenizer.weights.items())))
    alone = exported.read(write(tmp_path / "tokenizer", parts.tokenizer, "bf16")).weights
    assert {name for name, value in alone.items() if value.dtype == torch.float32} == {"quantize.embedding.weight"}


def test_bf16_to_the_authors_layout(tmp_path, parts):
    back = exported.read(write(tmp_path / "out", parts, "bf16"))
    back.unused["projector.half"] = torch.ones(2, dtype=torch.float16)
    official.write(tmp_path / "b.pth", back, lambda _: None)
    found = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    equal({name: found[name] for name in parts.weights}, {n: v.bfloat16().float() for n, v in parts.weights.items()})
    assert found["projector.half"].dtype == torch.float16
    alone = exported.read(write(tmp_path / "tokenizer", parts.tokenizer, "bf16"))
    assert all(value.dtype == torch.float32 for value in official.table(alone).values())


def test_shards(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(exported, "SHARD_BYTES", 300_000)
    folder = write(tmp_path / "out", parts)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2 and not (folder / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in parts.weights.values())
    for name in files:  # only a tensor that is larger alone may pass the limit
        held = load_file(folder / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(held)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 300_000
    equal(dict(sorted(exported.read(folder).weights.items())), dict(sorted(parts.weights.items())))

    (folder / files[1]).unlink()
    with pytest.raises(UserError, match="damaged safetensors file"):
        exported.read(folder)
    index["weight_map"] = dict.fromkeys(index["weight_map"], f"../../{files[0]}")  # only beside the index is looked
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="are in no shard"):
        exported.read(folder)
    for text in ("[]", "[" * 200_000, '{"weight_map": {"a": "b\\u001b\\n"}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index.json: damaged") as error:
            exported.read(folder)
        assert str(error.value).isprintable()


def change(**changes):
    return lambda config: config.update(changes)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (change(format=2), "format 2, this version reads 1"),
        (change(kind="llama"), "damaged export"),
        (change(model=[]), "damaged export"),
        (change(model={}), "do not build a mage"),
        (lambda c: c.pop("model"), "model missing or not as exported"),
        (lambda c: c.pop("kind"), "kind missing or not as exported"),
        (lambda c: c.pop("sampling"), "damaged export"),
        (change(kind="mage\x1b[2J\n"), "damaged export"),
        (change(format="\x1b[2J\n"), "format ?[2J?, this"),
        (change(origin=["a"]), "origin missing or not as exported"),
        (change(facts={"description": 1}), "facts.description missing or not as exported"),
        (change(facts=[]), "damaged export"),
        (change(image_size=18), "pictures of 18 px are not 16 tokens of 4 px"),
        (change(image_size=32), "pictures of 32 px are not 16 tokens of 4 px"),
        (lambda c: c["model"].update({"a\x1b\nb": 1}), "do not build a mage"),
        (change(image_size="16"), "damaged export"),
        (change(sampling={"steps": "20", "temperature": 1.0}), "damaged export"),
        (change(facts={"figures": [1]}), "damaged export"),
        (lambda c: c["model"].update(codes=512, vocabulary=514), "wrong: "),
        (lambda c: c["model"].update(codes="many"), "do not build a mage"),
        (lambda c: c["model"]["encoder"].update(depth=3), "missing: blocks.2.norm1.weight"),
        (lambda c: c["model"]["encoder"].update(depth=1), "unexpected: blocks.1.attn.proj.bias"),
        (lambda c: c["model"]["encoder"].update(depth=10**9), "do not fit its config.json"),
        (lambda c: c["model"]["encoder"].update(heads=7), "do not build a mage"),
        (lambda c: c["model"].update(padding="mask"), "missing: mask_token"),
    ],
)
def test_damaged_configs(tmp_path, parts, spoil, said):
    folder = write(tmp_path / "out", parts)
    config = json.loads((folder / "config.json").read_text())
    spoil(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        exported.read(folder)
    assert said in str(error.value) and str(folder) in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "spoil, said",
    [
        (change(image_size=17), "its tokens do not divide pictures of 17 px"),
        (change(image_size=10**12), "image_size missing or not as exported"),
        (lambda c: c["model"].update(multipliers=[1] * 10**5), "do not fit its config.json"),
    ],
)
def test_damaged_configs_of_tokenizers(tmp_path, parts, spoil, said):
    test_damaged_configs(tmp_path, parts.tokenizer, spoil, said)


def test_size_without_a_tokenizer(tmp_path, parts):
    folder = write(tmp_path / "out", replace(parts, tokenizer=None))  # 4 pixels a token: nothing says so any more
    with pytest.raises(UserError, match="pictures of 16 px are not 16 tokens of 16 px"):
        exported.read(folder)


@pytest.mark.parametrize("content", [b"", b"{", (2**50).to_bytes(8, "little") + b"{}"])
def test_damaged_weights(tmp_path, parts, content):
    folder = write(tmp_path / "out", parts)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged safetensors file"):
        exported.read(folder)
    (folder / "config.json").write_text("{" * 10**5)
    with pytest.raises(UserError, match="damaged export"):
        exported.read(folder)


def test_card(tmp_path, parts):
    facts = {"licence": "cc-by: 4.0\n# not a comment", "description": "A model", "step": 7, "data": "abc"}
    facts |= {"figures": {"val_loss": 5.25, "val | x": 1}, "recipe": {"task": "pretrain", "model": {"tokens": 4}}}
    exported.write_card(tmp_path, replace(parts, facts=facts), "`a`", "model = 1")
    text = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header == {"license": "cc-by: 4.0\n# not a comment", "library_name": "mage_ds", "tags": ["mage"]}
    for line in ("# A model", "| val_loss | 5.25 |", "| data (fingerprint) | abc |", "task: pretrain", "model = 1"):
        assert line in text.splitlines()
    assert all(f"`{name}`" in text for name in parts.unused)
    names = {"a\n# Title\x1b[2J": torch.ones(1)}
    facts = {"description": "one\n# two\x1b", "figures": {"a\x1b\n": 1}}
    exported.write_card(tmp_path, replace(parts, unused=names, facts=facts, origin="x\n\x1b"), "`a`", "model = 1")
    text = (tmp_path / "README.md").read_text()
    assert "\x1b" not in text and [line for line in text.splitlines() if line[:1] == "#"] == ["# one # two?"]
    exported.write_card(tmp_path, parts, "`a`", "model = 1")
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["license"] == "unknown"
