"""Sizes, names, gradients, precision and static shapes of Mage."""

import math
import zlib

import pytest
import torch

from mage_ds.models import Mage, initialize
from mage_ds.models.mage import token_loss
from mage_ds.models.masking import mask_ratio, masks

VIT = {
    "B": ({"depth": 12, "width": 768, "heads": 12}, {"depth": 8, "width": 768, "heads": 16}),
    "L": ({"depth": 24, "width": 1024, "heads": 16}, {"depth": 8, "width": 1024, "heads": 16}),
    "H": ({"depth": 32, "width": 1280, "heads": 16}, {"depth": 8, "width": 1024, "heads": 16}),
}


def full(size, vocabulary=1026, padding="cls"):
    encoder, decoder = VIT[size]
    return Mage(
        encoder=encoder,
        decoder=decoder,
        tokens=256,
        codes=1024,
        vocabulary=vocabulary,
        dropout=0.1,
        padding=padding,
    )


def tiny(padding="cls", vocabulary=34, dropout=0.1):
    model = Mage(
        encoder={"depth": 2, "width": 24, "heads": 2},
        decoder={"depth": 1, "width": 16, "heads": 2},
        tokens=16,
        codes=32,
        vocabulary=vocabulary,
        dropout=dropout,
        padding=padding,
    )
    initialize(model, named_generator)
    return model


def named_generator(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def sample_inputs(batch=4, count=16, codes=32):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(codes, (batch, count), generator=generator)
    ratio = mask_ratio(torch.rand(batch, generator=generator), mean=0.55, std=0.25, low=0.5, high=1.0)
    return tokens, *masks(torch.rand(batch, count, generator=generator), ratio, 0.5)


def count_of(module):
    return sum(p.numel() for p in module.parameters())


def count_by_hand(encoder, decoder, vocabulary):
    """Weights and biases layer by layer."""

    def block(w):
        norms, qkv, proj = 2 * (w + w), 3 * w * w + 3 * w, w * w + w
        return norms + qkv + proj + (4 * w * w + 4 * w) + (4 * w * w + w)

    w, d = encoder["width"], decoder["width"]
    embedding = vocabulary * w + 257 * w + 2 * w
    head = (d * w + w) + 2 * w + vocabulary
    stacks = encoder["depth"] * block(w) + 2 * w + decoder["depth"] * block(d) + 2 * d
    return embedding + stacks + (w * d + d) + 257 * d + head


@pytest.mark.parametrize(
    ("size", "vocabulary", "padding", "expected"),
    [
        ("B", 1026, "cls", 144_128_514),
        ("B", 2025, "cls", 144_896_745),
        ("B", 2025, "mask", 144_897_513),
        ("L", 1026, "cls", 406_764_546),
        ("L", 2025, "cls", 407_788_521),
        ("L", 2025, "mask", 407_789_545),
        # 32 encoder blocks of 12 * 1280^2 + 13 * 1280 and 8 decoder blocks of 12 * 1024^2 + 13 * 1024 parameters,
        # token embedding (1026 + 257 + 2) * 1280, norms 2 * 1280 + 2 * 1024, projection 1280 * 1024 + 1024,
        # decoder positions 257 * 1024, head 1024 * 1280 + 3 * 1280 + 1026
        ("H", 1026, "cls", 734_987_778),
    ],
)
def test_parameter_counts(size, vocabulary, padding, expected):
    with torch.device("meta"):
        model = full(size, vocabulary, padding)
    mask_token = VIT[size][1]["width"] if padding == "mask" else 0
    assert count_by_hand(*VIT[size], vocabulary) + mask_token == expected
    assert count_of(model) == expected


def test_parts_of_vit_b():
    with torch.device("meta"):
        model = full("B", 2025)
    parts = model.blocks, model.decoder_blocks, model.token_emb, model.mlm_layer
    assert [count_of(part) for part in parts] == [85_054_464, 56_702_976, 1_754_112, 594_153]


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = full("B", 2025, "mask")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "token_emb.word_embeddings.weight": (2025, 768),
        "token_emb.position_embeddings.weight": (257, 768),
        "decoder_pos_embed_learned": (1, 257, 768),
        "mask_token": (1, 1, 768),
        "mlm_layer.bias": (1, 1, 2025),
    }
    for norm in ("token_emb.LayerNorm", "norm", "decoder_norm", "mlm_layer.ln"):
        expected |= {f"{norm}.weight": (768,), f"{norm}.bias": (768,)}
    for linear in ("decoder_embed", "mlm_layer.fc"):
        expected |= {f"{linear}.weight": (768, 768), f"{linear}.bias": (768,)}
    for prefix, depth in (("blocks", 12), ("decoder_blocks", 8)):
        for i in range(depth):
            for norm in ("norm1", "norm2"):
                expected |= {f"{prefix}.{i}.{norm}.weight": (768,), f"{prefix}.{i}.{norm}.bias": (768,)}
            sizes = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
            for linear, shape in sizes.items():
                expected |= {f"{prefix}.{i}.{linear}.weight": shape, f"{prefix}.{i}.{linear}.bias": shape[:1]}
    assert shapes == expected
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {name for name, value in eps.items() if value != 1e-6} == {"mlm_layer.ln"}
    assert eps["mlm_layer.ln"] == 1e-5


def test_untrained_loss_of_vit_b():
    with torch.device("meta"):
        model = full("B").eval()
    model.to_empty(device="cpu")
    initialize(model, named_generator)
    tokens, masked, keep = sample_inputs(2, 256, 1024)
    with torch.no_grad():
        loss, _ = token_loss(model(tokens, masked, keep), tokens, masked, 0.1)
    assert loss.mean().item() == pytest.approx(math.log(1024) + 0.0002 * 768, abs=0.08)


@pytest.mark.parametrize("padding", ["cls", "mask"])
@pytest.mark.parametrize("dropping", [True, False])
def test_every_parameter_gets_a_gradient(padding, dropping):
    model = tiny(padding)
    tokens, masked, keep = sample_inputs(8)
    loss, _ = token_loss(model(tokens, masked, keep if dropping else None), tokens, masked, 0.1)
    loss.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name
        assert torch.isfinite(parameter.grad).all(), name
    assert (model.mlm_layer.bias.grad[..., 32:] == 0).all()


@pytest.mark.parametrize(("vocabulary", "class_id", "mask_id"), [(34, 32, 33), (2025, 1100, 2024)])
def test_word_embeddings_learn_from_the_input_only(vocabulary, class_id, mask_id):
    """The head's product with the word embeddings is detached: words that are not read get no gradient."""
    model = tiny(vocabulary=vocabulary)
    tokens = torch.arange(16).expand(2, 16) % 5
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, ::2] = True
    loss, _ = token_loss(model(tokens, masked), tokens, masked, 0.1)
    loss.sum().backward()
    read = {class_id, mask_id, *tokens[~masked].tolist()}
    moved = (model.token_emb.word_embeddings.weight.grad != 0).any(dim=1).nonzero().flatten()
    assert set(moved.tolist()) == read


def test_head_follows_the_word_embeddings():
    model = tiny(dropout=0.0)
    tokens, masked, _ = sample_inputs()
    before = model(tokens, torch.ones_like(masked))
    with torch.no_grad():
        model.token_emb.word_embeddings.weight[7] += 1.0  # a code that is not read: everything is masked
        model.mlm_layer.bias[0, 0, 9] += 2.0
    changed = model(tokens, torch.ones_like(masked)) - before
    assert (changed != 0).any(dim=0).any(dim=0).nonzero().flatten().tolist() == [7, 9]
    torch.testing.assert_close(changed[..., 9], torch.full((4, 16), 2.0))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("padding", ["cls", "mask"])
def test_bf16(padding, autocast):
    model = tiny(padding, dropout=0.0)
    tokens, masked, keep = sample_inputs()
    expected, _ = token_loss(model(tokens, masked, keep), tokens, masked, 0.1)
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(tokens, masked, keep)
        loss, _ = token_loss(logits, tokens, masked, 0.1)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0.02)
    loss.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.features(tokens).isfinite().all()


@pytest.mark.parametrize("padding", ["cls", "mask"])
def test_forward_on_the_meta_device(padding):
    """A host read or a shape that hangs on data raises there."""
    tokens, masked, keep = (t.to("meta") for t in sample_inputs())
    model = tiny(padding).to("meta")
    for kept in (keep, None):
        logits = model(tokens, masked, kept)
        assert logits.shape == (4, 16, 32)
        loss, top1 = token_loss(logits, tokens, masked, 0.1)
        assert loss.shape == top1.shape == (4,)
        loss.sum().backward()
    assert model.features(tokens).shape == (4, 24)


@pytest.mark.parametrize(("padding", "backend"), [("cls", "aot_eager"), ("mask", "eager")])
def test_compiles_as_one_graph(padding, backend):
    model = tiny(padding, dropout=0.0)
    tokens, masked, keep = sample_inputs()

    def step(kept):
        loss, top1 = token_loss(model(tokens, masked, kept), tokens, masked, 0.1)
        return loss, top1

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for kept in (keep, None):
        model.zero_grad()
        loss, _ = step(kept)
        loss.sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        again, _ = compiled(kept)
        again.sum().backward()
        torch.testing.assert_close(again, loss)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


def test_initial_values():
    model = tiny("mask")
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
    for name in ("token_emb.word_embeddings", "token_emb.position_embeddings"):
        assert model.get_parameter(f"{name}.weight").std().item() == pytest.approx(0.02, rel=0.15)
    assert model.decoder_pos_embed_learned.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.5)
    qkv = model.blocks[0].attn.qkv.weight.abs().max().item()  # one matrix of 3 * 24 rows
    assert 0.98 * math.sqrt(6 / (24 + 72)) < qkv <= math.sqrt(6 / (24 + 72))
    embed = model.decoder_embed.weight.abs().max().item()
    assert 0.98 * math.sqrt(6 / (24 + 16)) < embed <= math.sqrt(6 / (24 + 16))


def test_initial_values_hang_on_the_name_alone():
    model, other = tiny(), tiny("mask").bfloat16()
    initialize(other, named_generator)
    for name, parameter in model.named_parameters():
        value = model.initial_value(name, parameter.shape, named_generator(name))
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        assert torch.equal(parameter, value)
        assert torch.equal(other.get_parameter(name), value.bfloat16())


def test_refuses_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="vocabulary 33"):
        tiny(vocabulary=33)
    with pytest.raises(ValueError, match="zero"):
        tiny(padding="zero")
