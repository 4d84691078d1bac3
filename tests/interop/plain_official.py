"""Files of the authors' layouts with random values, and what such a file means, in plain functions.

Written from the specification alone: nothing here comes from the package. A file is a dict of tensors by the
published names, `w`; functions read their sizes from it. Heads are 64 wide in the encoder, and 16 in the decoder.
Shapes: tokens int64 (B, N), masked bool (B, N), images float32 (B, 3, H, W) in [0, 1].
"""

import argparse
import math

import torch
import torch.nn.functional as F

CODES, WORDS, CLASS, MASK = 1024, 2025, 1100, 2024
TINY_TOKENIZER = {"channels": 32, "multipliers": (1, 2, 2), "blocks": 1, "code_dim": 8}  # 4 pixels make a token
FULL_TOKENIZER = {"channels": 128, "multipliers": (1, 1, 2, 2, 4), "blocks": 2, "code_dim": 256}  # 16 pixels
TINY = {"width": 64, "depth": 2, "decoder_width": 32, "decoder_depth": 1, "grid": 4, "tokenizer": TINY_TOKENIZER}
VIT_BASE = {"width": 768, "depth": 12, "decoder_width": 768, "decoder_depth": 8, "grid": 16}
VIT_BASE["tokenizer"] = FULL_TOKENIZER


# --- files ---------------------------------------------------------------------------------------------------


class _Values(dict):
    """Random values by name: far from 0 and 1 where those would hide mistakes, small enough not to explode."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        self[name] = torch.randn(shape, generator=self.generator) * std + mean

    def linear(self, name: str, out: int, into: int, *kernel: int, bias: bool = True) -> None:
        self.normal(f"{name}.weight", out, into, *kernel, std=(into * math.prod(kernel)) ** -0.5)
        if bias:
            self.normal(f"{name}.bias", out, std=0.1)

    def norm(self, name: str, width: int) -> None:
        self.normal(f"{name}.weight", width, std=0.1, mean=1.0)
        self.normal(f"{name}.bias", width, std=0.1)

    def blocks(self, name: str, width: int, depth: int) -> None:
        for block in (f"{name}.{i}" for i in range(depth)):
            self.norm(f"{block}.norm1", width)
            self.linear(f"{block}.attn.qkv", 3 * width, width)
            self.linear(f"{block}.attn.proj", width, width)
            self.norm(f"{block}.norm2", width)
            self.linear(f"{block}.mlp.fc1", 4 * width, width)
            self.linear(f"{block}.mlp.fc2", width, 4 * width)

    def residual(self, name: str, into: int, out: int) -> None:
        self.norm(f"{name}.norm1", into)
        self.linear(f"{name}.conv1", out, into, 3, 3, bias=False)
        self.norm(f"{name}.norm2", out)
        self.linear(f"{name}.conv2", out, out, 3, 3, bias=False)
        if into != out:
            self.linear(f"{name}.nin_shortcut", out, out, 1, 1, bias=False)

    def token_embedding(self, width: int, tokens: int) -> None:
        self.normal("token_emb.word_embeddings.weight", WORDS, width, std=0.05)
        self.normal("token_emb.position_embeddings.weight", 1 + tokens, width, std=0.05)
        self.norm("token_emb.LayerNorm", width)
        self["token_emb.position_ids"] = torch.arange(1 + tokens)[None]


def tokenizer_values(channels, multipliers, blocks, code_dim, prefix="", seed=0, codes=CODES) -> dict:
    """The tokenizer's tensors, each name with `prefix` in front."""
    values, widths = _Values(seed), [channels * m for m in multipliers]
    values.linear("encoder.conv_in", channels, 3, 3, 3, bias=False)
    for level, (into, out) in enumerate(zip([channels, *widths], widths, strict=False)):
        for i in range(blocks):
            values.residual(f"encoder.down.{level}.block.{i}", out if i else into, out)
    for part in ("encoder", "decoder"):
        for i in (1, 2):
            values.residual(f"{part}.mid.block_{i}", widths[-1], widths[-1])
    values.norm("encoder.norm_out", widths[-1])
    values.linear("encoder.conv_out", code_dim, widths[-1], 1, 1)
    values.normal("quantize.embedding.weight", codes, code_dim, std=1.0)
    values["quantize.embedding.weight"] /= values["quantize.embedding.weight"].norm(dim=1, keepdim=True)  # one norm:
    values["quantize.embedding.weight"] *= code_dim**0.5  # else the shortest codes are the nearest of all points
    values.linear("decoder.conv_in", widths[-1], code_dim, 3, 3)
    for level, out in enumerate(widths):
        into = widths[min(level + 1, len(widths) - 1)]
        for i in range(blocks):
            values.residual(f"decoder.up.{level}.block.{i}", out if i else into, out)
        if level:
            values.linear(f"decoder.up.{level}.upsample.conv", out, out, 3, 3)
    values.norm("decoder.norm_out", widths[0])
    values.linear("decoder.conv_out", 3, widths[0], 3, 3)
    return {prefix + name: value for name, value in values.items()}


def pretrain_values(*, width, depth, decoder_width, decoder_depth, grid, tokenizer, seed=0) -> dict:
    """What `model` of a pre-training file holds, unused tensors and tokenizer (`vqgan.`) included."""
    values, tokens, patch = _Values(seed), grid * grid, 2 ** (len(tokenizer["multipliers"]) - 1)
    values.normal("cls_token", 1, 1, width, std=0.02)
    values.normal("pos_embed", 1, 1 + tokens, width, std=0.5)
    values.normal("mask_token", 1, 1, decoder_width, std=0.02)
    values.normal("decoder_pos_embed", 1, 1 + tokens, decoder_width, std=0.5)
    values.normal("decoder_pos_embed_learned", 1, 1 + tokens, decoder_width, std=0.05)
    values.token_embedding(width, tokens)
    values.linear("patch_embed.proj", width, 3, patch, patch)
    values.blocks("blocks", width, depth)
    values.norm("norm", width)
    values.linear("decoder_embed", decoder_width, width)
    values.blocks("decoder_blocks", decoder_width, decoder_depth)
    values.norm("decoder_norm", decoder_width)
    values.linear("decoder_pred", 3 * patch * patch, decoder_width)
    values.linear("mlm_layer.fc", width, decoder_width)
    values.norm("mlm_layer.ln", width)
    values.normal("mlm_layer.bias", 1, 1, WORDS, std=0.3)
    return {**values, **tokenizer_values(**tokenizer, prefix="vqgan.", seed=seed + 1)}


def finetuned_values(*, width, depth, grid, tokenizer, classes=10, seed=0, **_) -> dict:
    """What `model` of a fine-tuned file holds; takes the sizes of a pre-training file as well."""
    values, patch = _Values(seed), 2 ** (len(tokenizer["multipliers"]) - 1)
    values.normal("cls_token", 1, 1, width, std=0.02)
    values.normal("pos_embed", 1, 197, width, std=0.5)  # of 14 x 14 patches: it belongs to nothing
    values.token_embedding(width, grid * grid)
    values.linear("patch_embed.proj", width, 3, patch, patch)
    values.blocks("blocks", width, depth)
    values.norm("fc_norm", width)
    values.linear("head", classes, width)
    return {**values, **tokenizer_values(**tokenizer, prefix="vqgan.", seed=seed + 1)}


def make_file(path, values: dict | None = None, *, training: bool = True, **sizes) -> dict:
    """Writes a pre-training file, or one around `values`, as `{"model": ...}`; returns the values.

    sizes: of `pretrain_values`, TINY where not said. training: with what a training's own files hold as well.
    """
    values = pretrain_values(**TINY | sizes) if values is None else values
    file = {"model": values}
    if training:
        file |= {
            "optimizer": {
                "state": {0: {"step": torch.tensor(3.0)}},
                "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}],
            },
            "epoch": 3,
            "scaler": {"scale": 65536.0, "growth_interval": 2000},
            "args": argparse.Namespace(model="mage_vit_base_patch16", epochs=1600, output_dir="out", device="cuda"),
        }
    torch.save(file, path)
    return values


def make_tokenizer(path, layout: str = "state_dict", seed: int = 1, **sizes) -> dict:
    """Writes a tokenizer alone: `state_dict`, `flat` or `vqgan.` (names with this prefix); returns plain names."""
    values = tokenizer_values(**TINY_TOKENIZER | sizes, seed=seed)
    prefixed = {f"vqgan.{name}": value for name, value in values.items()}
    torch.save({"state_dict": {"state_dict": values}, "flat": values, "vqgan.": prefixed}[layout], path)
    return values


# --- what they mean ------------------------------------------------------------------------------------------


def count(w: dict, name: str) -> int:
    """How many numbered parts `name`.0, `name`.1, ... there are."""
    return len({key[len(name) + 1 :].split(".")[0] for key in w if key.startswith(f"{name}.")})


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x, eps, weight=1.0, bias=0.0):
    x = x - x.mean(dim=-1, keepdim=True)
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias


def norm(w, name, x, eps=1e-6):
    return layer_norm(x, eps, w[f"{name}.weight"], w[f"{name}.bias"])


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def blocks(w, name, x, heads):
    """Pre-norm transformer blocks: (B, L, width) -> the same."""
    for block in (f"{name}.{i}" for i in range(count(w, name))):
        qkv = linear(w, f"{block}.attn.qkv", norm(w, f"{block}.norm1", x))
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        weight = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)
        x = x + linear(w, f"{block}.attn.proj", (weight @ v).transpose(1, 2).flatten(2))
        x = x + linear(w, f"{block}.mlp.fc2", gelu(linear(w, f"{block}.mlp.fc1", norm(w, f"{block}.norm2", x))))
    return x


def encode(w, tokens, masked=None):
    """The last block's output (B, 1 + N, width): the class word in front, [MASK] where masked, nothing dropped."""
    ids = tokens if masked is None else torch.where(masked, MASK, tokens)
    ids = torch.cat([torch.full_like(ids[:, :1], CLASS), ids], dim=1)
    x = w["token_emb.word_embeddings.weight"][ids] + w["token_emb.position_embeddings.weight"]
    x = norm(w, "token_emb.LayerNorm", x)
    return blocks(w, "blocks", x, heads=x.shape[2] // 64)


def logits(w, tokens, masked):
    """(B, N, 1024): where masked, the decoder sees the encoder's class output."""
    x = linear(w, "decoder_embed", norm(w, "norm", encode(w, tokens, masked)))
    for picture, places in zip(x, masked, strict=True):
        for place in places.nonzero().flatten().tolist():
            picture[place + 1] = picture[0]
    x = blocks(w, "decoder_blocks", x + w["decoder_pos_embed_learned"], heads=16)
    x = gelu(linear(w, "mlm_layer.fc", norm(w, "decoder_norm", x)))
    x = norm(w, "mlm_layer.ln", x, eps=1e-5) @ w["token_emb.word_embeddings.weight"].T + w["mlm_layer.bias"]
    return x[:, 1:, :CODES]


def features(w, tokens):
    """(B, width): layer_norm without affine of the mean of the last block over the tokens."""
    return layer_norm(encode(w, tokens)[:, 1:].mean(dim=1), 1e-6)


def classes(w, tokens):
    """A fine-tuned file: (features (B, width), scores (B, classes))."""
    vector = norm(w, "fc_norm", encode(w, tokens)[:, 1:].mean(dim=1))
    return vector, linear(w, "head", vector)


def _tokenizer(w: dict) -> dict:
    inside = {name.removeprefix("vqgan."): value for name, value in w.items() if name.startswith("vqgan.")}
    return inside or w


def _conv(w, name, x):
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w.get(f"{name}.bias"), padding=weight.shape[2] // 2)


def _active(w, name, x):
    x = F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)
    return x * torch.sigmoid(x)


def _residual(w, name, x):
    h = _conv(w, f"{name}.conv1", _active(w, f"{name}.norm1", x))
    h = _conv(w, f"{name}.conv2", _active(w, f"{name}.norm2", h))
    return h + (_conv(w, f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.weight" in w else x)


def tokenize(w, images):
    """The nearest of the 1024 codes by squared distance; w: of a tokenizer, or of a file with `vqgan.`."""
    w = _tokenizer(w)
    h = _conv(w, "encoder.conv_in", images)
    for level in range(count(w, "encoder.down")):
        if level:
            h = F.avg_pool2d(h, 2)
        for i in range(count(w, f"encoder.down.{level}.block")):
            h = _residual(w, f"encoder.down.{level}.block.{i}", h)
    for i in (1, 2):
        h = _residual(w, f"encoder.mid.block_{i}", h)
    z = _conv(w, "encoder.conv_out", _active(w, "encoder.norm_out", h)).flatten(2).transpose(1, 2)
    return torch.cdist(z.double(), w["quantize.embedding.weight"].double()).argmin(dim=2)


def detokenize(w, tokens):
    """(B, 3, H, W), not clamped."""
    w = _tokenizer(w)
    side = math.isqrt(tokens.shape[1])
    h = w["quantize.embedding.weight"][tokens].transpose(1, 2).unflatten(2, (side, side))
    h = _conv(w, "decoder.conv_in", h)
    for i in (1, 2):
        h = _residual(w, f"decoder.mid.block_{i}", h)
    for level in reversed(range(count(w, "decoder.up"))):
        for i in range(count(w, f"decoder.up.{level}.block")):
            h = _residual(w, f"decoder.up.{level}.block.{i}", h)
        if level:
            h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = _conv(w, f"decoder.up.{level}.upsample.conv", h)
    return _conv(w, "decoder.conv_out", _active(w, "decoder.norm_out", h))


def sampling_step(w, tokens, masked, t, *, steps, temperature, for_tokens, for_confidences):
    """One step t = 1..steps of decoding: (tokens, still masked), one picture and one position at a time.

    masked: at the start all of them (N_0 = N). for_tokens, for_confidences (B, N): uniform numbers. A token is the
    first whose cumulated probability exceeds its number; a confidence is its log-probability plus Gumbel noise.
    """
    probabilities = logits(w, tokens, masked).double().softmax(dim=2)
    tokens, after = tokens.clone(), torch.zeros_like(masked)
    for b in range(len(tokens)):
        confidence = {}
        for n in masked[b].nonzero().flatten().tolist():
            total, code = 0.0, -1
            while total <= for_tokens[b, n] and code < CODES - 1:
                code += 1
                total += float(probabilities[b, n, code])
            tokens[b, n] = code
            gumbel = -math.log(-math.log(float(for_confidences[b, n])))
            confidence[n] = math.log(float(probabilities[b, n, code])) + temperature * (1 - t / steps) * gumbel
        keep = max(1, min(len(confidence) - 1, math.floor(tokens.shape[1] * math.cos(math.pi / 2 * (t / steps)))))
        for n in sorted(confidence, key=confidence.get)[: keep if t < steps else 0]:
            after[b, n] = True
    return tokens, after
