"""The authors' layouts, opened by the package, against the plain implementation beside this file."""

import math

import numpy as np
import plain_official as plain
import pytest
import torch

from mage_ds.engine import stored
from mage_ds.errors import UserError
from mage_ds.interop import official
from mage_ds.models import Mage
from mage_ds.sampling import decode, schedule


@pytest.fixture(autouse=True, scope="module")
def _no_gradients():
    with torch.no_grad():
        yield


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def pictures(size, batch=2):
    """Random patches: of one pixel, or 16 x 16 of them, because finer noise looks the same everywhere."""
    side = min(size, 16)
    patches = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(patches, (size, size))


def some_masked(tokens):
    noise = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5))
    return noise < torch.tensor([[0.3], [1.0]])


def compare_with_plain(opened, w, size):
    """Every tensor that an opened pre-training file computes, against the plain functions of its values `w`."""
    images = pictures(size)
    tokens = plain.tokenize(w, images)
    assert torch.equal(opened.tokenizer.tokenize(images), tokens)
    assert len(tokens.unique()) > tokens.shape[1] / 4  # not all the same
    masked = some_masked(tokens)
    close(opened.mage(tokens, masked), plain.logits(w, tokens, masked))
    close(opened.mage.features(tokens), plain.features(w, tokens))
    close(opened.tokenizer.detokenize(tokens), plain.detokenize(w, tokens))


# The published numbers, and of all that is not published the value that changes nothing.
FULL_SAMPLING = {"steps": 20, "temperature": 6.0, "token_temperature": 1, "order": "confidence", "drop": 0}
FULL_SAMPLING |= {"guidance": 0, "guidance_schedule": "constant"}


def test_pretraining_file(tmp_path):
    w = plain.make_file(tmp_path / "a.pth")
    opened = stored.open_model(tmp_path / "a.pth")
    assert (opened.kind, opened.image_size, opened.classifier) == ("mage", 16, None)
    assert opened.sampling == FULL_SAMPLING
    mage = opened.mage
    assert (mage.vocabulary, mage.class_id, mage.mask_id, mage.codes, mage.padding) == (2025, 1100, 2024, 1024, "cls")
    assert not mage.training and not any(p.requires_grad for p in mage.parameters())
    assert set(opened.unused) == {
        *("cls_token", "pos_embed", "decoder_pos_embed", "mask_token", "token_emb.position_ids"),
        *(f"{name}.{kind}" for name in ("patch_embed.proj", "decoder_pred") for kind in ("weight", "bias")),
    }
    assert all(torch.equal(value, w[name]) for name, value in opened.unused.items())
    assert "9 tensors are not used" in opened.origin
    compare_with_plain(opened, w, 16)


def test_other_sizes(tmp_path):
    tokenizer = {"channels": 32, "multipliers": (1, 2), "blocks": 2, "code_dim": 4}
    w = plain.make_file(
        tmp_path / "a.pth",
        width=192,
        depth=1,
        decoder_width=64,
        decoder_depth=2,
        grid=6,
        tokenizer=tokenizer,
        training=False,
    )
    opened = stored.open_model(tmp_path / "a.pth")
    assert [block.attn.num_heads for block in opened.mage.blocks] == [3]
    assert [block.attn.num_heads for block in opened.mage.decoder_blocks] == [16, 16]
    compare_with_plain(opened, w, 12)


def test_weights_that_are_no_numbers(tmp_path):
    w = plain.make_file(tmp_path / "a.pth")
    w["blocks.1.norm1.weight"][0] = torch.nan
    torch.save({"model": w}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"blocks\.1\.norm1\.weight: values that are no numbers"):
        stored.open_model(tmp_path / "a.pth")


def test_sampling_follows_the_plain_steps(tmp_path):
    w = plain.make_file(tmp_path / "a.pth")
    mage, steps, temperature = stored.open_model(tmp_path / "a.pth").mage, 5, 2.0
    generator = np.random.default_rng(0)
    noise = [[torch.from_numpy(generator.uniform(size=(2, 16))) for _ in range(2)] for _ in range(steps)]
    tokens, masked = torch.zeros(2, 16, dtype=torch.int64), torch.ones(2, 16, dtype=torch.bool)
    seen = []
    ours = decode.decode(
        mage,
        tokens,
        masked,
        steps=steps,
        temperature=temperature,
        noise=lambda t, purpose: noise[t - 1][purpose == "confidence"],
        on_step=lambda t, tokens, masked: seen.append((tokens, masked)),
    )
    for t in range(1, steps + 1):
        tokens, masked = plain.sampling_step(
            w,
            tokens,
            masked,
            t,
            steps=steps,
            temperature=temperature,
            for_tokens=noise[t - 1][0],
            for_confidences=noise[t - 1][1],
        )
        assert torch.equal(seen[t - 1][1], masked)
        assert torch.equal(seen[t - 1][0], tokens)
    assert torch.equal(ours, tokens)
    assert schedule.counts(np.array([16]), steps)[0, 0] == math.floor(16 * math.cos(math.pi / 10))


def test_finetuned_file(tmp_path):
    w = plain.make_file(tmp_path / "a.pth", plain.finetuned_values(**plain.TINY, classes=7))
    opened = stored.open_model(tmp_path / "a.pth")
    assert (opened.kind, opened.mage, opened.image_size, opened.sampling) == ("classifier", None, 16, {})
    assert opened.unused["pos_embed"].shape == (1, 197, 64)
    tokens = plain.tokenize(w, pictures(16))
    assert torch.equal(opened.tokenizer.tokenize(pictures(16)), tokens)
    features, classes = plain.classes(w, tokens)
    close(opened.classifier.features(tokens), features)
    close(opened.classifier(tokens), classes)


@pytest.mark.parametrize("layout", ["state_dict", "flat", "vqgan."])
def test_tokenizer_alone(tmp_path, layout):
    w = plain.make_tokenizer(tmp_path / "a.ckpt", layout)
    opened = stored.open_model(tmp_path / "a.ckpt")
    assert (opened.kind, opened.image_size, opened.unused) == ("tokenizer", 64, {})
    images = pictures(32)
    tokens = plain.tokenize(w, images)
    assert torch.equal(opened.tokenizer.tokenize(images), tokens)
    close(opened.tokenizer.detokenize(tokens), plain.detokenize(w, tokens))
    model, info = stored.load_tokenizer(tmp_path / "a.ckpt")
    assert info["model"] == {"channels": 32, "multipliers": [1, 2, 2], "blocks": 1, "code_dim": 8, "codes": 1024}
    assert info["image_size"] == 64 and torch.equal(model.tokenize(images), tokens)


def test_tokenizer_out_of_every_file(tmp_path):
    for values in (plain.pretrain_values(**plain.TINY), plain.finetuned_values(**plain.TINY)):
        plain.make_file(tmp_path / "a.pth", values)
        model, info = stored.load_tokenizer(tmp_path / "a.pth")
        assert info["image_size"] == 16
        assert torch.equal(model.tokenize(pictures(16)), plain.tokenize(values, pictures(16)))


def test_extra_keys_of_unknown_names(tmp_path):
    extra = {"projector.0.weight": torch.ones(3, 3), "head.bn.num_batches_tracked": torch.tensor(5)}
    extra |= {"temperature": torch.ones(()), "vqgan.loss.logvar": torch.ones(1)}
    w = plain.make_file(tmp_path / "a.pth", plain.pretrain_values(**plain.TINY) | extra)
    opened = stored.open_model(tmp_path / "a.pth")
    assert set(extra) < set(opened.unused)
    compare_with_plain(opened, w, 16)


def test_another_tokenizer(tmp_path):
    w = plain.make_file(tmp_path / "a.pth")
    del w["token_emb.position_ids"]
    bare = {name: value for name, value in w.items() if not name.startswith("vqgan.")}
    plain.make_file(tmp_path / "bare.pth", bare)
    assert stored.open_model(tmp_path / "bare.pth").tokenizer is None
    other = plain.make_tokenizer(tmp_path / "t.ckpt", multipliers=(1, 1, 1, 2))
    opened = stored.open_model(tmp_path / "bare.pth", tmp_path / "t.ckpt")  # 8 pixels a token: 4 x 4 of 32
    assert opened.image_size == 32
    assert torch.equal(opened.tokenizer.tokenize(pictures(32)), plain.tokenize(other, pictures(32)))
    with pytest.raises(UserError, match=r"makes 4 tokens of 1024 codes of 16 px, .* takes 16 of 1024"):
        stored.open_model(tmp_path / "a.pth", tmp_path / "t.ckpt")
    with pytest.raises(UserError, match=r"bare.pth: holds no tokenizer"):
        stored.load_tokenizer(tmp_path / "bare.pth")
    with pytest.raises(UserError, match="is a tokenizer itself"):
        stored.open_model(tmp_path / "t.ckpt", tmp_path / "t.ckpt")


def spoilt(tmp_path, change, values=None):
    """What is said of a file after `change` of its values."""
    values = dict(plain.pretrain_values(**plain.TINY) if values is None else values)
    change(values)
    plain.make_file(tmp_path / "a.pth", values)
    with pytest.raises(UserError) as error:
        stored.open_model(tmp_path / "a.pth")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value).removeprefix(f"{tmp_path}/a.pth: ")


def without(*names):
    return lambda values: [values.pop(name) for name in names]


def test_what_does_not_fit_is_named_key_by_key(tmp_path):
    names = [
        f"blocks.1.{part}" for part in ("norm1.weight", "norm1.bias", "attn.proj.bias", "mlp.fc1.bias", "norm2.bias")
    ]
    line = spoilt(tmp_path, without(*names))
    assert line.startswith("does not fit: 5 missing: blocks.1.norm1.weight, ") and ", ...; is it" in line

    line = spoilt(
        tmp_path, lambda v: v.update({"norm.weight": torch.ones(65), "blocks.0.attn.q_norm.weight": torch.ones(8)})
    )
    assert "1 unexpected: blocks.0.attn.q_norm.weight; 1 wrong: norm.weight (65,) float32 instead of (64,)" in line

    line = spoilt(tmp_path, lambda v: v.update({"norm.bias": torch.ones(64, dtype=torch.int64)}))
    assert "1 wrong: norm.bias (64,) int64 instead of (64,)" in line
    line = spoilt(tmp_path, lambda v: v.update({"vqgan.encoder.conv_in.bias": torch.ones(32)}))
    assert "1 unexpected: vqgan.encoder.conv_in.bias" in line
    line = spoilt(tmp_path, without("vqgan.decoder.conv_out.weight"))
    assert "1 missing: vqgan.decoder.conv_out.weight" in line


@pytest.mark.parametrize(
    "change, said",
    [
        (without("token_emb.word_embeddings.weight"), "token_emb.word_embeddings.weight is missing"),
        (without("decoder_embed.weight"), "decoder_embed.weight is missing"),
        (without("vqgan.quantize.embedding.weight"), "quantize.embedding.weight is missing"),
        (lambda v: v.update({"token_emb.word_embeddings.weight": torch.ones(2026, 64)}), "has 2026 words"),
        (lambda v: v.update({"token_emb.word_embeddings.weight": torch.ones(2025, 65)}), "width of 65"),
        (lambda v: v.update({"token_emb.word_embeddings.weight": torch.ones(2025)}), "1 dimensions instead of 2"),
        (lambda v: v.update({"token_emb.position_embeddings.weight": torch.ones(18, 64)}), "decoder_pos_embed_learned"),
        (lambda v: v.update({"vqgan.quantize.embedding.weight": torch.ones(512, 8)}), "512 codes, its MAGE 1024"),
        (lambda v: v.update({"decoder_embed.weight": torch.ones(30, 64)}), "do not build a mage"),
        (lambda v: v.update({f"blocks.{i}.x": torch.ones(1) for i in (7, 9)}), "missing: blocks.2.norm1.weight"),
        (lambda v: v.clear(), "in none of the authors' layouts; it holds 0 tensors"),
    ],
)
def test_wrong_layouts(tmp_path, change, said):
    assert said in spoilt(tmp_path, change)


def test_other_peoples_models(tmp_path):
    mae = {"cls_token": torch.ones(1), "blocks.0.norm1.weight": torch.ones(3), "head.weight": torch.ones(2, 3)}
    line = spoilt(tmp_path, lambda v: None, mae)
    assert (
        "in none of the authors' layouts" in line and "3 tensors: cls_token, blocks.0.norm1.weight, head.weight" in line
    )
    for file in ({"epoch": 3}, {"model": [1, 2]}, {"model": {"a": "text"}}, {"state_dict": {1: torch.ones(1)}}):
        torch.save(file, tmp_path / "b.pth")
        with pytest.raises(UserError, match=r"b.pth: "):
            stored.open_model(tmp_path / "b.pth")


def test_float64_is_refused_and_float16_keeps_its_values(tmp_path):
    line = spoilt(tmp_path, lambda v: v.update({name: v[name].double() for name in ("norm.weight", "norm.bias")}))
    assert line == "norm.weight is float64; have the file saved as float32"
    line = spoilt(tmp_path, lambda v: v.update({"vqgan.encoder.conv_in.weight": torch.ones(32, 3, 3, 3).double()}))
    assert line.startswith("vqgan.encoder.conv_in.weight is float64")
    values = plain.pretrain_values(**plain.TINY) | {"projector.scale": torch.ones(2).double()}
    values |= {name: value.half() for name, value in values.items() if name.startswith("blocks.")}
    plain.make_file(tmp_path / "a.pth", values)
    official.write(tmp_path / "b.pth", official.read(tmp_path / "a.pth"), lambda _: None)
    found = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert found["projector.scale"].dtype == torch.float64
    assert all(torch.equal(found[name].to(value.dtype), value) for name, value in values.items())
    assert all(value.dtype == torch.float32 for name, value in found.items() if name.startswith("blocks."))


def test_names_in_a_file_are_shown_printable(tmp_path):
    line = spoilt(tmp_path, lambda v: v.update({"blocks.0.x\nmage-ds: done\x1b[2J": torch.ones(1)}))
    assert "1 unexpected: blocks.0.x?mage-ds: done?[2J" in line
    values = plain.pretrain_values(**plain.TINY) | {"a\n\x1b": torch.ones(1)}
    plain.make_file(tmp_path / "a.pth", values)
    assert official.read(tmp_path / "a.pth").origin.isprintable()
    for file in ({"a\n\x1b": 1}, {"model": {"a\n\x1b": 1}}, {"model": {"a\n\x1b": torch.ones(1)}}):
        torch.save(file, tmp_path / "b.pth")
        with pytest.raises(UserError, match=r"a\?\?") as error:
            official.read(tmp_path / "b.pth")
        assert str(error.value).isprintable()


def test_only_torchs_own_runtime_error_is_one_of_writing(tmp_path, monkeypatch):
    plain.make_file(tmp_path / "a.pth")
    parts = official.read(tmp_path / "a.pth")

    def fail(*_):
        raise RuntimeError("unexpected pos 64\nbacktrace")

    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"unexpected pos 64$"):
        patched.setattr(torch, "save", fail)
        official.write(tmp_path / "b.pth", parts, lambda _: None)
    monkeypatch.setattr(official, "table", fail)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        official.write(tmp_path / "b.pth", parts, lambda _: None)


def test_a_full_disk_is_an_os_error(tmp_path):
    plain.make_file(tmp_path / "a.pth")
    with pytest.raises(OSError, match="No space left"):
        official.write("/dev/full", official.read(tmp_path / "a.pth"), lambda _: None)


def test_settings_of_our_own_are_checked(tmp_path):
    values = plain.pretrain_values(**plain.TINY)
    for settings in (
        {"image_size": 18},
        {"codes": "\x1b\n"},
        {"encoder_heads": 0},
        {"decoder_heads": "16"},
        {"codes": 10**12},
        {"encoder_heads": 7},
    ):
        torch.save({"model": values, "mage_ds": settings}, tmp_path / "a.pth")
        with pytest.raises(UserError) as error:
            official.read(tmp_path / "a.pth")
        assert str(error.value).isprintable()


def test_vocabulary_of_our_own_moves_to_the_authors_places():
    numbers = {"encoder": {"depth": 1, "width": 64, "heads": 1}, "decoder": {"depth": 1, "width": 32, "heads": 16}}
    numbers |= {"tokens": 16, "codes": 1024, "vocabulary": 1026, "dropout": 0.1, "padding": "cls"}
    model = Mage(**numbers).eval()
    for i, value in enumerate(model.parameters()):
        value.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    parts = official.Parts("mage", numbers, model.state_dict(), 64, origin="")
    w = official.table(parts)
    expected = plain.pretrain_values(**plain.TINY | {"depth": 1, "tokenizer": plain.FULL_TOKENIZER})
    shapes = {name: tuple(value.shape) for name, value in expected.items() if not name.startswith("vqgan.")}
    assert {name: tuple(value.shape) for name, value in w.items()} == shapes  # all that the authors' code looks for
    tokens = torch.randint(1024, (2, 16), generator=torch.Generator().manual_seed(1))
    close(plain.logits(w, tokens, some_masked(tokens)), model(tokens, some_masked(tokens)))
    close(plain.features(w, tokens), model.features(tokens))


@pytest.mark.full
def test_vit_base(tmp_path):
    w = plain.make_file(tmp_path / "a.pth", **plain.VIT_BASE)
    opened = stored.open_model(tmp_path / "a.pth")
    assert opened.image_size == 256
    assert sum(value.numel() for value in opened.mage.parameters()) == 144_896_745
    assert opened.mage.blocks[0].attn.num_heads == 12
    compare_with_plain(opened, w, 256)
