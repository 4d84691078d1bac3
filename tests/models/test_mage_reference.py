"""Mage in float64 against a plain implementation: one sample, one position, one head at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mage_ds.models import Mage, initialize
from mage_ds.models.mage import token_loss
from mage_ds.models.masking import masks
from mage_ds.models.transformer import stack

N, CODES, HEADS, DECODER_HEADS = 9, 11, 2, 4


def tiny(padding="cls", vocabulary=13, dropout=0.0, encoder_depth=2, decoder_depth=2):
    model = Mage(
        encoder={"depth": encoder_depth, "width": 16, "heads": HEADS},
        decoder={"depth": decoder_depth, "width": 24, "heads": DECODER_HEADS},
        tokens=N,
        codes=CODES,
        vocabulary=vocabulary,
        dropout=dropout,
        padding=padding,
    )
    # Values far from the initial ones: zero biases and unit scales would hide mistakes.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double()


def sample_inputs(batch=3, seed=0):
    """Tokens, masks with unlike numbers of masked positions, and half of the positions kept."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CODES, (batch, N), generator=generator)
    ratio = torch.tensor([0.6, 0.8, 1.0] * batch)[:batch]
    return tokens, *masks(torch.rand(batch, N, generator=generator), ratio, 0.5)


class Plain:
    """The specification in numpy; `w` are the weights by their published names."""

    def __init__(self, model):
        self.w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    def norm(self, x, name, eps):
        x = (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + eps)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x, name):
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]

    def gelu(self, x):
        return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])

    def attention(self, xs, name, heads):
        qkv = [self.linear(x, f"{name}.qkv") for x in xs]
        width = len(xs[0])
        size = width // heads
        out = [np.zeros(width) for _ in xs]
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            q, k, v = ([t[i * width : (i + 1) * width][part] for t in qkv] for i in range(3))
            for i in range(len(xs)):
                weight = np.exp([q[i] @ k[j] / math.sqrt(size) for j in range(len(xs))])
                out[i][part] = sum(weight[j] / weight.sum() * v[j] for j in range(len(xs)))
        return [self.linear(x, f"{name}.proj") for x in out]

    def block(self, xs, name, heads):
        attended = self.attention([self.norm(x, f"{name}.norm1", 1e-6) for x in xs], f"{name}.attn", heads)
        xs = [x + a for x, a in zip(xs, attended, strict=True)]
        hidden = [self.gelu(self.linear(self.norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1")) for x in xs]
        return [x + self.linear(h, f"{name}.mlp.fc2") for x, h in zip(xs, hidden, strict=True)]

    def encode(self, ids, places, depth):
        words, positions = (self.w[f"token_emb.{n}_embeddings.weight"] for n in ("word", "position"))
        xs = [self.norm(words[ids[p]] + positions[p], "token_emb.LayerNorm", 1e-6) for p in places]
        for i in range(depth):
            xs = self.block(xs, f"blocks.{i}", HEADS)
        return xs

    def logits(self, tokens, masked, keep, *, vocabulary, padding, depths=(2, 2)):
        """One sample: logits (N, CODES)."""
        class_id, mask_id = vocabulary - 2, vocabulary - 1
        ids = [class_id] + [mask_id if m else t for t, m in zip(tokens, masked, strict=True)]
        places = [0] + [k + 1 for k in keep]
        encoded = [self.norm(x, "norm", 1e-6) for x in self.encode(ids, places, depths[0])]
        projected = {p: self.linear(x, "decoder_embed") for p, x in zip(places, encoded, strict=True)}
        pad = projected[0] if padding == "cls" else self.w["mask_token"][0, 0]
        xs = []
        for place in range(N + 1):
            visible = place == 0 or (place in projected and not masked[place - 1])
            xs.append((projected[place] if visible else pad) + self.w["decoder_pos_embed_learned"][0, place])
        for i in range(depths[1]):
            xs = self.block(xs, f"decoder_blocks.{i}", DECODER_HEADS)
        rows = []
        for x in xs[1:]:
            h = self.gelu(self.linear(self.norm(x, "decoder_norm", 1e-6), "mlm_layer.fc"))
            h = self.norm(h, "mlm_layer.ln", 1e-5)
            words, bias = self.w["token_emb.word_embeddings.weight"], self.w["mlm_layer.bias"][0, 0]
            rows.append([words[c] @ h + bias[c] for c in range(CODES)])
        return np.array(rows)


@pytest.mark.parametrize("padding", ["cls", "mask"])
@pytest.mark.parametrize("dropping", [True, False])
def test_forward_equals_the_plain_implementation(padding, dropping):
    model = tiny(padding, vocabulary=17)  # words without a use between codes and class
    tokens, masked, keep = sample_inputs()
    keep = keep if dropping else None
    logits = model(tokens, masked, keep)
    assert logits.shape == (3, N, CODES)
    plain = Plain(model)
    for i in range(3):
        kept = keep[i].tolist() if dropping else range(N)
        expected = plain.logits(tokens[i].tolist(), masked[i].tolist(), kept, vocabulary=17, padding=padding)
        np.testing.assert_allclose(logits[i].detach().numpy(), expected, rtol=1e-10, atol=1e-10)


def test_features_equal_the_plain_implementation():
    model = tiny()
    tokens, _, _ = sample_inputs()
    features = model.features(tokens)
    assert features.shape == (3, 16)
    for i in range(3):
        last = Plain(model).encode([11, *tokens[i].tolist()], range(N + 1), 2)
        mean = sum(last[1:]) / N
        expected = (mean - mean.mean()) / math.sqrt(mean.var() + 1e-6)
        np.testing.assert_allclose(features[i].detach().numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", ["cls", "mask"])
def test_padded_positions_keep_their_own_position_embedding(padding):
    """Without decoder blocks a position's logits hang on its own decoder input alone."""
    model = tiny(padding, decoder_depth=0)
    tokens, masked, keep = sample_inputs(batch=1, seed=3)
    before = model(tokens, masked, keep)
    kinds = set()
    for position in range(N):
        kinds.add((bool(masked[0, position]), position in keep[0].tolist()))
        with torch.no_grad():
            model.decoder_pos_embed_learned[0, position + 1, ::2] += 1.0
        after = model(tokens, masked, keep)
        moved = (after != before)[0].any(dim=1)
        assert moved.nonzero().flatten().tolist() == [position]
        before = after
    assert kinds == {(True, False), (True, True), (False, True)}  # dropped, masked only, visible


@pytest.mark.parametrize("padding", ["cls", "mask"])
def test_padding_carries_no_content(padding):
    """With equal positions, all padded places look alike and visible ones do not."""
    model = tiny(padding, decoder_depth=0)
    with torch.no_grad():
        model.decoder_pos_embed_learned[:] = model.decoder_pos_embed_learned[:, :1]
    tokens, masked, keep = sample_inputs(batch=1, seed=3)
    logits = model(tokens, masked, keep)[0]
    padded, visible = logits[masked[0]], logits[~masked[0]]
    assert torch.equal(padded, padded[:1].expand_as(padded))
    assert len(torch.unique(visible, dim=0)) == len(visible)


def test_the_order_of_keep_does_not_matter():
    model = tiny()
    tokens, masked, keep = sample_inputs()
    torch.testing.assert_close(model(tokens, masked, keep), model(tokens, masked, keep.flip(1)))


def test_masked_tokens_are_not_read():
    model = tiny()
    tokens, masked, keep = sample_inputs()
    other = torch.where(masked, (tokens + 1) % CODES, tokens)
    assert torch.equal(model(tokens, masked, keep), model(other, masked, keep))
    assert torch.equal(model(tokens, masked), model(other, masked))


def test_loss_equals_loops_and_torch():
    tokens, masked, _ = sample_inputs(batch=4)
    masked[3] = False  # nothing to predict: 0, and no NaN
    logits = torch.randn(4, N, CODES, dtype=torch.float64, requires_grad=True)
    loss, top1 = token_loss(logits, tokens, masked, 0.1)
    for i in range(3):
        losses, right = [], []
        for position in range(N):
            if masked[i, position]:
                row = logits[i, position].detach().numpy()
                log_p = row - math.log(sum(math.exp(v) for v in row))
                losses.append(-0.9 * log_p[tokens[i, position]] - 0.1 * sum(log_p) / CODES)
                right.append(int(np.argmax(row)) == int(tokens[i, position]))
        assert loss[i].item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert top1[i].item() == pytest.approx(sum(right) / len(right))
        theirs = F.cross_entropy(logits[i][masked[i]], tokens[i][masked[i]], label_smoothing=0.1)
        assert loss[i].item() == pytest.approx(theirs.item(), rel=1e-12)
    assert loss[3] == 0 and top1[3] == 0
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~masked] == 0).all() and (logits.grad[masked] != 0).any()


def test_loss_is_float32_for_bf16_logits():
    tokens, masked, _ = sample_inputs(batch=2)
    logits = torch.randn(2, N, CODES).bfloat16()
    loss, top1 = token_loss(logits, tokens, masked, 0.1)
    assert loss.dtype == top1.dtype == torch.float32
    torch.testing.assert_close(loss, token_loss(logits.float(), tokens, masked, 0.1)[0], rtol=0, atol=0)


def test_dropout_places():
    """Training mode against the same functions in the paper's order, with the same random numbers."""
    blocks, p = stack(depth=2, width=16, heads=2, dropout=0.3), 0.3
    x = torch.randn(2, 5, 16)
    torch.manual_seed(0)
    got = x
    for block in blocks:
        got = block(got)
    torch.manual_seed(0)
    expected = x
    for block in blocks:
        w = dict(block.named_parameters())
        h = F.layer_norm(expected, (16,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        qkv = F.linear(h, w["attn.qkv.weight"], w["attn.qkv.bias"])
        q, k, v = qkv.view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).reshape(2, 5, 16)
        expected = expected + F.dropout(F.linear(h, w["attn.proj.weight"], w["attn.proj.bias"]), p)
        h = F.layer_norm(expected, (16,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        h = F.dropout(F.gelu(F.linear(h, w["mlp.fc1.weight"], w["mlp.fc1.bias"])), p)
        expected = expected + F.dropout(F.linear(h, w["mlp.fc2.weight"], w["mlp.fc2.bias"]), p)
    torch.testing.assert_close(got, expected)


def test_dropout_of_the_whole_model():
    model = tiny(dropout=0.1)
    found = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    places = ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2")
    stacks = [f"{s}.{i}.{place}" for s in ("blocks", "decoder_blocks") for i in (0, 1) for place in places]
    assert found == dict.fromkeys(["token_emb.dropout", *stacks], 0.1)
    tokens, masked, keep = sample_inputs()
    assert not torch.equal(model(tokens, masked, keep), model(tokens, masked, keep))
    model.eval()
    assert torch.equal(model(tokens, masked, keep), model(tokens, masked, keep))


def test_initial_loss_is_uniform_guessing():
    """Symmetry at the start: small logits, so nearly log of the number of codes."""
    model = tiny()
    initialize(model, lambda name: torch.Generator().manual_seed(len(name)))
    tokens, masked, keep = sample_inputs()
    loss, _ = token_loss(model(tokens, masked, keep), tokens, masked, 0.1)
    assert loss.mean().item() == pytest.approx(math.log(CODES) + 0.0002 * 16, abs=0.05)
