"""Parameter groups, the schedule by hand, and what DeepSpeed does with both."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch

from mage_ds.engine import optim
from mage_ds.models import Classifier, Mage, PixelViT, Vqgan


def names_of(model, group) -> set[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def test_groups_of_mage():
    model = Mage(**tiny.recipe("model.padding=mask").model.model_dump())
    decayed, free = optim.parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    layers = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    stacks = {"blocks.0", "blocks.1", "decoder_blocks.0"}
    assert names_of(model, decayed) == {
        "token_emb.word_embeddings.weight",
        "token_emb.position_embeddings.weight",
        "decoder_embed.weight",
        "decoder_pos_embed_learned",
        "mask_token",
        "mlm_layer.fc.weight",
        *(f"{stack}.{layer}.weight" for stack in stacks for layer in layers),
    }
    # The head's bias has three dimensions and no decay.
    assert "mlm_layer.bias" in names_of(model, free)
    assert names_of(model, free) == {name for name, _ in model.named_parameters()} - names_of(model, decayed)


def test_groups_of_the_tokenizer():
    model = Vqgan(**tiny.recipe().tokenizer.model_dump())
    decayed, free = optim.parameter_groups(model, 0.05)
    assert "quantize.embedding.weight" in names_of(model, decayed)
    assert all(p.ndim == 4 for name, p in model.named_parameters() if name.endswith(("conv1.weight", "conv2.weight")))
    assert all(name.endswith(".bias") or "norm" in name for name in names_of(model, free))


def test_groups_leave_out_what_is_frozen_and_what_is_empty():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    (only,) = optim.parameter_groups(model, 0.1)
    assert only["params"] == [model[1].weight]


def test_groups_read_the_full_shape_of_a_sharded_parameter():
    model = torch.nn.Linear(3, 2)
    model.weight.ds_shape, model.bias.ds_shape = torch.Size([2, 3]), torch.Size([2])
    model.weight.data, model.bias.data = torch.empty(0), torch.empty(0)
    decayed, free = optim.parameter_groups(model, 0.1)
    assert decayed["params"] == [model.weight] and free["params"] == [model.bias]


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.0),
        (1, 0.25),
        (3, 0.75),
        (4, 1.0),
        (8, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (12, 0.6),
        (20, 0.2),
        (25, 0.2),
    ],
)
def test_schedule(step, lr):
    assert optim.cosine(step, peak=1.0, floor=0.2, steps=20, warmup=4) == pytest.approx(lr, abs=1e-12)


def test_schedule_without_warmup_and_with_nothing_else():
    assert optim.cosine(0, peak=3.0, floor=0.0, steps=10, warmup=0) == 3.0
    values = [optim.cosine(step, peak=3.0, floor=0.0, steps=3, warmup=3) for step in range(4)]
    assert values == [0.0, 1.0, 2.0, 3.0]


def test_lr_reaches_every_group():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=1.0)
    optim.set_lr(SimpleNamespace(optimizer=optimizer), 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_lr_reaches_the_optimizer_inside_deepspeed(me, stage):
    engine = tiny.engine_of(tiny.recipe(), stage)
    optim.set_lr(engine, 0.125)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert [group["lr"] for group in inner.param_groups] == [0.125, 0.125]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_clip_means_no_clipping(me, stage):
    """DeepSpeed clips at 1.0 where its configuration names no value."""
    numbers = tiny.recipe("optimizer.clip=null", "label_smoothing=0.0", "duration.steps=3", "warmup.steps=0")
    wide = tiny.recipe("optimizer.clip=1.0", "label_smoothing=0.0", "duration.steps=3", "warmup.steps=0")

    def steep(engines, batch, step):  # so that the norm is far above 1
        for name, loss, logs in tiny.pretrain.step_fn(engines, batch, step, recipe=numbers, tokenize=tiny.tokenize):
            yield name, loss * (1, 50, 1)[step], logs

    run = tiny.train(tiny.engine_of(numbers, stage), numbers, 3, step_fn=steep)
    assert run.figures[1]["grad_norm"] > 5
    clipped = tiny.train(tiny.engine_of(wide, stage), wide, 3, step_fn=steep)
    assert run.losses[:2] == clipped.losses[:2]
    assert abs(run.losses[2] - clipped.losses[2]) > 1e-4  # the clip shows, so the next line says something
    assert run.losses[2] == pytest.approx(unclipped(numbers), rel=1e-6)


def unclipped(numbers) -> float:
    """The third loss of a plain loop whose second step has 50 times the loss."""
    import numpy as np

    from mage_ds import keyed
    from mage_ds.engine import wrap

    model = Mage(**numbers.model.model_dump())
    wrap.initialize_weights(model, numbers.seed)
    groups = [
        {"params": [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("bias")]},
        {"params": [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("bias")], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    peak, floor = 0.3 * 8 / 256, 1e-3
    for step in range(3):
        adam.zero_grad()
        total = 0.0
        for g in range(2):
            torch.manual_seed(keyed.seed_of(numbers.seed, "dropout", step, g))
            batch = tiny.batch_at(step * 8 + g * 4 + np.arange(4))
            step_fn = tiny.pretrain.step_fn({"mage": model}, batch, step, recipe=numbers, tokenize=tiny.tokenize)
            ((_, loss, _),) = step_fn
            (loss * (1, 50, 1)[step] / 2).backward()
            total += float(loss.detach()) / 2
        for group in adam.param_groups:
            group["lr"] = floor + (peak - floor) * (1 + math.cos(math.pi * step / 3)) / 2
        adam.step()
    return total


# --- layer-wise decay of the learning rate (paper.md 4)


def test_layer_decay_is_the_papers_and_timms():
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_layer_decay

    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=5, global_pool="avg"
    )
    groups = optim.parameter_groups(model, 0.05, 0.65)
    ours = {name: group["lr_scale"] for group in groups for name in names_of(model, group)}
    assert ours["patch_embed.proj.weight"] == ours["pos_embed"] == pytest.approx(0.65**4)
    assert [ours[f"blocks.{n}.mlp.fc1.bias"] for n in range(3)] == pytest.approx([0.65**3, 0.65**2, 0.65])
    assert ours["fc_norm.weight"] == ours["head.weight"] == 1.0
    theirs = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.65)
    for group in theirs:
        for name in names_of(model, group):
            assert ours[name] == pytest.approx(group["lr_scale"], rel=1e-12), name


SIZE = {"encoder": {"depth": 3, "width": 12, "heads": 2}, "classes": 5}
CLASSIFIERS = {
    "tokens": lambda: Classifier(tokens=4, vocabulary=9, class_id=7, dropout=0.0, **SIZE),
    "pixels": lambda: PixelViT(image_size=8, patch=4, **SIZE),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_layers_of_a_classifier(kind):
    """Every parameter, by the paper's formula: embeddings layer 0, block N layer N + 1, norm and head depth + 1."""
    model = CLASSIFIERS[kind]()
    groups = optim.parameter_groups(model, 0.05, 0.65)
    by_name = {name: group for group in groups for name in names_of(model, group)}
    below = {"tokens": ("token_emb.",), "pixels": ("patch_embed.", "pos_embed", "cls_token")}[kind]
    assert len(by_name) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        if name.startswith(below):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            assert name.startswith(("fc_norm.", "head.")), name
            layer = 4
        assert by_name[name]["lr_scale"] == pytest.approx(0.65 ** (4 - layer)), name
        assert by_name[name]["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.05), name


def test_layer_decay_reaches_the_learning_rates(me):
    numbers = tiny.recipe("optimizer.layer_decay=0.5")
    for stage in (1, 3):
        engine = tiny.engine_of(numbers, stage)
        optim.set_lr(engine, 0.8)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        # Of 2 blocks: what is below them 0.5^3, the blocks 0.5^2 and 0.5, the norm behind them 1.
        assert sorted({group["lr"] for group in inner.param_groups}) == pytest.approx([0.1, 0.2, 0.4, 0.8])


# --- LARS alone; tests/engine/test_optimizer_ranks.py has it in an engine


def test_lars_where_a_norm_is_zero():
    """A head that begins with zeros, and one whose gradient is zero at first, have a trust ratio of 1 there."""
    numbers = tiny.recipe(
        "optimizer={name: lars, base_lr: 0.1, min_lr: 0.0, weight_decay: 0.0, momentum: 0.9, trust: 0.001, clip: null}"
    )
    usual = torch.tensor([[3.0, 4.0]])
    starts = {"zero": torch.zeros(2, 3), "usual": usual, "idle": usual, "bias": torch.tensor([1.0, 2.0])}
    first = {"zero": torch.ones(2, 3), "usual": torch.tensor([[0.0, 2.0]]), "idle": torch.zeros(1, 2)}
    first["bias"] = torch.tensor([0.5, 0.0])
    model = torch.nn.ParameterDict({name: value.clone() for name, value in starts.items()})
    lars = optim.build(model, numbers)
    for group in lars.param_groups:
        group["lr"] = 0.5
    for share in (1.0, 0.0):  # a gradient, then none
        for name, parameter in model.items():
            parameter.grad = share * first[name]
        lars.step()
    # Two steps of 0.5, of which the second goes 0.9 of the first: 0.95 x ratio x the first gradient.
    ratios = dict.fromkeys(starts, 1.0) | {"usual": 0.001 * 5 / 2}
    expected = {name: value - 0.95 * ratios[name] * first[name] for name, value in starts.items()}
    for name, parameter in model.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-7)
