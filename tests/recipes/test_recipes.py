"""The packaged recipes: they load, they hold the paper's numbers, and every field explains itself."""

import pytest
import yaml

from mage_ds import recipes
from mage_ds.errors import UserError

# The supplement's Table 10 and model sizes, written out once more.
TABLE_10 = {
    "duration": {"epochs": 1600},
    "warmup": {"epochs": 40},
    "optimizer.base_lr": 0.00015,
    "optimizer.min_lr": 0.0,
    "optimizer.weight_decay": 0.05,
    "optimizer.betas": [0.9, 0.95],
    "optimizer.clip": 3.0,
    "inputs.image_size": 256,
    "inputs.augmentation.scale": [0.2, 1.0],
    "inputs.augmentation.ratio": [3 / 4, 4 / 3],
    "inputs.augmentation.flip": True,
    "inputs.interpolation": "linear",
    "tokenizer.channels": 128,
    "tokenizer.multipliers": [1, 1, 2, 2, 4],
    "tokenizer.blocks": 2,
    "tokenizer.code_dim": 256,
    "tokenizer.codes": 1024,
    "model.tokens": 256,
    "model.codes": 1024,
    "model.vocabulary": 1026,
    "model.dropout": 0.1,
    "model.padding": "cls",
    "masking.mean": 0.55,
    "masking.std": 0.25,
    "masking.low": 0.5,
    "masking.high": 1.0,
    "masking.drop": 0.5,
    "masking.per": "sample",
    "label_smoothing": 0.1,
    "sampling.steps": 20,
    "sampling.temperature": 6.0,
}
BOTH_SIZES = ("linear_probe", "finetune", "scratch", "mage_c")
SIZES = {  # batch, effective lr, encoder and decoder as depth, width, heads
    "pretrain_vit_base": (4096, 2.4e-3, (12, 768, 12), (8, 768, 16)),
    "pretrain_vit_large": (2048, 1.2e-3, (24, 1024, 16), (8, 1024, 16)),
    "pretrain_vit_huge": (2048, 1.2e-3, (32, 1280, 16), (8, 1024, 16)),
}


def test_names():
    digits = [
        "class_conditional",
        "finetune",
        "mage",
        "mage_c",
        "probe",
        "scratch",
        "simclr",
        "tokenizer",
        "vit_scratch",
    ]
    samples = [*(f"digits_{name}" for name in digits), "emoji_mage", "emoji_tokenizer"]
    sizes = [f"{task}_vit_{size}" for task in BOTH_SIZES for size in ("base", "large")]
    paper = ["class_conditional_vit_base", *sorted(SIZES), *sizes, "simclr_vit_base"]
    assert recipes.recipe_names() == sorted([*samples, *paper, "tokenizer_finetune", "tokenizer_imagenet"])


CONTRAST = {  # section 3, Tables 7 to 9; the head's size is ours
    "contrastive.weight": 0.1,
    "contrastive.temperature": 0.2,
    "contrastive.highest": 0.6,
    "contrastive.hidden": 4096,
    "contrastive.hidden_layers": 2,
    "contrastive.out": 256,
}


@pytest.mark.parametrize("size", ["base", "large"])
def test_mage_c_is_mage_but_for_its_contrast(size):
    mage, mage_c = (recipes.load_recipe(f"{name}_vit_{size}").identity() for name in ("pretrain", "mage_c"))
    images = {"base": 4096, "large": 2048}[size]
    other = CONTRAST | {"contrastive.images": images, "objective": "both", "masking.high": 0.6}
    other |= {"duration": {"epochs": 800}} if size == "base" else {}
    del mage["contrastive"]
    assert mage_c == mage | other


def test_simclr_has_its_own_augmentation():
    simclr, mage_c = (recipes.load_recipe(f"{name}_vit_base").identity() for name in ("simclr", "mage_c"))
    differ = {key for key in simclr.keys() | mage_c.keys() if simclr.get(key) != mage_c.get(key)}
    assert {key for key in differ if not key.startswith(("masking", "inputs.colour"))} == {
        *("objective", "contrastive.weight", "contrastive.highest", "inputs.augmentation.scale"),
    }
    jitter = [simclr[f"inputs.colour.{key}"] for key in ("brightness", "contrast", "saturation", "hue", "jitter")]
    assert (jitter, simclr["masking"], simclr["objective"]) == ([0.8, 0.8, 0.8, 0.2, 0.8], None, "contrastive")
    chances = [simclr[f"inputs.colour.{key}"] for key in ("grey", "blur", "sigma")]
    assert chances == [0.2, 0.5, [0.1, 2.0]] and simclr["inputs.augmentation.scale"] == [0.08, 1.0]


@pytest.mark.parametrize("name", SIZES)
def test_paper(name):
    recipe = recipes.load_recipe(name)
    batch, lr, encoder, decoder = SIZES[name]
    identity = recipe.identity()
    assert {key: identity[key] for key in TABLE_10} == TABLE_10
    assert recipe.batch == batch
    assert recipe.effective_lr() == pytest.approx(lr)
    for stack, numbers in ((recipe.model.encoder, encoder), (recipe.model.decoder, decoder)):
        assert (stack.depth, stack.width, stack.heads) == numbers
    checkpointing = "none" if name == "pretrain_vit_base" else "full"
    assert recipe.machine.activation_checkpointing == checkpointing


@pytest.mark.parametrize(
    "name, below, decoder",
    [
        ("class_conditional_vit_base", "pretrain_vit_base", (12, 768, 16)),
        ("digits_class_conditional", "digits_mage", (2, 128, 4)),
    ],
)
def test_class_conditional(name, below, decoder):
    """The recipe of what is below it, but for the decoder, its labels and how long it is trained."""
    recipe, mage = recipes.load_recipe(name), recipes.load_recipe(below)
    stack = recipe.model.decoder
    assert (stack.depth, stack.width, stack.heads) == decoder
    assert recipe.model.classes == (1000 if "vit" in name else 10) and recipe.label_dropout == 0.1
    assert recipe.sampling == mage.sampling and recipe.sampling.guidance == 0
    fields = recipe.model.model_dump(exclude={"decoder", "classes"})
    assert fields == mage.model.model_dump(exclude={"decoder", "classes"})
    shared = ("batch", "warmup", "optimizer", "inputs", "tokenizer", "masking", "label_smoothing", "machine")
    for key in (*shared, "duration", "report")[: None if "vit" in name else len(shared)]:
        assert getattr(recipe, key) == getattr(mage, key), key


# Tables 11 to 13, written out once more; the values of ViT-B and ViT-L where they differ.
CLASSIFIERS = {
    "linear_probe": {
        "protocol": "probe",
        "batch": 4096,
        "duration": {"epochs": 90},
        "warmup": {"epochs": 10},
        "optimizer.name": "lars",
        "optimizer.base_lr": (0.1, 0.05),
        "optimizer.min_lr": 0.0,
        "optimizer.weight_decay": 0.0,
        "optimizer.momentum": 0.9,
        "optimizer.trust": 0.001,
        "optimizer.layer_decay": None,
        "optimizer.ema": None,
        "inputs.crop": "clamped",
        "inputs.policy": None,
        "model.drop_path": 0.0,
        "model.head_std": 0.01,
        "label_smoothing": 0.0,
        "mix": None,
    },
    "finetune": {
        "protocol": "finetune",
        "batch": 1024,
        "duration": ({"epochs": 100}, {"epochs": 50}),
        "warmup": {"epochs": 5},
        "optimizer.name": "adamw",
        "optimizer.base_lr": 2.5e-4,
        "optimizer.min_lr": 1e-6,
        "optimizer.weight_decay": 0.05,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.layer_decay": (0.65, 0.75),
        "optimizer.ema": None,
        "inputs.crop": "tried",
        "inputs.policy": "rand-m9-mstd0.5-inc1",
        "model.drop_path": (0.1, 0.2),
        "model.head_std": 2e-5,
        "label_smoothing": 0.1,
    },
    "scratch": {
        "protocol": "scratch",
        "batch": 4096,
        "duration": ({"epochs": 300}, {"epochs": 200}),
        "warmup": {"epochs": 20},
        "optimizer.name": "adamw",
        "optimizer.base_lr": 1e-4,
        "optimizer.min_lr": 0.0,
        "optimizer.weight_decay": 0.3,
        "optimizer.betas": [0.9, 0.95],
        "optimizer.layer_decay": None,
        "optimizer.ema": 0.9999,
        "inputs.crop": "tried",
        "inputs.policy": "rand-m9-mstd0.5-inc1",
        "model.drop_path": (0.1, 0.2),
        "model.head_std": 0.02,
        "label_smoothing": 0.1,
    },
}
ALL_CLASSIFIERS = {
    "optimizer.clip": None,
    "inputs.image_size": 256,
    "inputs.augmentation.scale": [0.2, 1.0],
    "inputs.augmentation.ratio": [3 / 4, 4 / 3],
    "inputs.augmentation.flip": True,
    "inputs.colour": None,
    "inputs.interpolation": "cubic",
    "inputs.evaluation_resize": 292,
    "model.classes": 1000,
    "model.tokens": 256,
    "model.vocabulary": 1026,
    "model.patch": None,
    "model.dropout": 0.1,
}
MIX = {"mix.mixup": 0.8, "mix.cutmix": 1.0, "mix.probability": 1.0, "mix.switch": 0.5}
PUBLISHED = {"linear_probe": (74.7, 78.9), "finetune": (82.5, 83.9), "scratch": (None, None)}


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers(kind, size):
    name = ("base", "large")[size]
    recipe, mage = (recipes.load_recipe(f"{each}_vit_{name}") for each in (kind, "pretrain"))
    own = CLASSIFIERS[kind] | ({} if kind == "linear_probe" else MIX)
    wanted = {key: value[size] if isinstance(value, tuple) else value for key, value in (ALL_CLASSIFIERS | own).items()}
    identity = recipe.identity()
    assert {key: identity[key] for key in wanted} == wanted
    assert (recipe.published or {"top1": None})["top1"] == PUBLISHED[kind][size]
    assert recipe.model.encoder == mage.model.encoder and recipe.tokenizer == mage.tokenizer
    assert recipe.report.evaluate_samples == 50_000  # all of ImageNet's


def test_the_digits_classifiers_fit_its_mage():
    mage = recipes.load_recipe("digits_mage")
    for name in ("probe", "finetune", "scratch"):
        recipe = recipes.load_recipe(f"digits_{name}")
        assert (recipe.tokenizer, recipe.model.encoder, recipe.inputs) == (
            mage.tokenizer,
            mage.model.encoder,
            mage.inputs,
        )
        assert (recipe.model.tokens, recipe.model.vocabulary) == (mage.model.tokens, mage.model.vocabulary)
    pixels, tokens = recipes.load_recipe("digits_vit_scratch"), recipes.load_recipe("digits_scratch")
    assert pixels.model.encoder == tokens.model.encoder
    assert (pixels.inputs.image_size // pixels.model.patch) ** 2 == tokens.model.tokens
    shared = ("batch", "duration", "warmup", "optimizer", "inputs", "label_smoothing", "mix")
    assert all(getattr(pixels, key) == getattr(tokens, key) for key in shared)


# The original VQGAN's numbers, as "details as VQGAN" stands for them, and the paper's batch, augmentation and sizes.
VQGAN = {
    "inputs.image_size": 256,
    "inputs.augmentation.scale": [0.2, 1.0],
    "inputs.augmentation.flip": True,
    "optimizer.weight_decay": 0.0,
    "optimizer.betas": [0.5, 0.9],
    "optimizer.clip": None,
    "loss.l1": 1.0,
    "loss.perceptual": 1.0,
    "loss.codebook": 1.0,
    "loss.commitment": 0.25,
    "adversary.start": {"steps": 250001},
    "adversary.weight": 0.8,
    "adversary.most": 1e4,
    "adversary.layers": 3,
    "adversary.channels": 64,
    "adversary.norm": "batch",
    "reseed_after": 0,
}


def test_the_tokenizers():
    recipe = recipes.load_recipe("tokenizer_imagenet")
    identity = recipe.identity()
    assert {key: identity[key] for key in VQGAN} == VQGAN
    assert recipe.batch == 256
    assert recipe.effective_lr() == pytest.approx(256 * 4.5e-6) == recipe.optimizer.min_lr  # constant
    assert recipe.model == recipes.load_recipe("pretrain_vit_base").tokenizer
    tuned = recipes.load_recipe("tokenizer_finetune")
    assert tuned.model == recipe.model and tuned.adversary.start.steps < tuned.duration.steps


def test_a_rate_that_would_rise_is_refused():
    with pytest.raises(UserError, match=r"min_lr = 0.001152: is above the learning rate in force.* = 0.000576; choose"):
        recipes.load_recipe("tokenizer_imagenet", ["batch=128"])
    smaller = recipes.load_recipe("tokenizer_imagenet", ["batch=128", "optimizer.min_lr=5.76e-4"])
    assert smaller.effective_lr() == pytest.approx(smaller.optimizer.min_lr)


def test_an_adversary_may_be_left_out_or_null():
    without = recipes.load_recipe("digits_tokenizer")
    assert without.adversary is None and without.identity()["adversary"] is None
    assert recipes.load_recipe("tokenizer_imagenet", ["adversary=null"]).adversary is None
    given = "adversary={start: {epochs: 2}, weight: 1.0, most: 5.0, layers: 2, channels: 8, norm: spectral}"
    recipe = recipes.load_recipe("digits_tokenizer", [given, "adversary.start.steps=7"])
    assert recipe.identity()["adversary.start"] == {"steps": 7}
    assert "adversary" not in recipe.identity()


@pytest.mark.parametrize(
    "override, message",
    [
        ("adversary.weigth=1", "adversary.weigth: there is no such key; did you mean adversary.weight?"),
        ("adversary.norm=layer", "adversary.norm = layer: must be one of batch, spectral"),
        ("adversary.weight=-1", "adversary.weight = -1: must be a number above 0"),
        (
            "adversary=5",
            "adversary = 5: must be a section with the keys start, weight, most, layers, channels, norm or null",
        ),
    ],
)
def test_what_is_wrong_in_an_optional_section(override, message):
    with pytest.raises(UserError) as caught:
        recipes.load_recipe("tokenizer_imagenet", [override])
    assert str(caught.value) == f"command line: {message}"


@pytest.mark.parametrize("sample", ["digits", "emoji"])
def test_a_samples_recipes_fit_each_other(sample):
    tokenizer, mage = recipes.load_recipe(f"{sample}_tokenizer"), recipes.load_recipe(f"{sample}_mage")
    assert mage.tokenizer == tokenizer.model
    assert mage.inputs == tokenizer.inputs
    assert mage.inputs.augmentation.model_dump() == {"scale": None, "ratio": None, "flip": False}


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_each_recipe(name, tmp_path):
    recipe = recipes.load_recipe(name)
    # Its header says where the numbers are from, how to run it, what to expect.
    header = [line for line in recipes.recipe_file(name).read_text().splitlines() if line.startswith("#")]
    assert any("paper.md" in line for line in header)
    assert any(f"train {name}" in line for line in header)
    assert any("Expected:" in line for line in header)
    # Written and read again it is the same.
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    assert recipes.load_recipe(path) == recipe
    # Plain YAML that any reader understands, every value in it given, every field explained.
    plain = yaml.safe_load(path.read_text())
    assert plain["optimizer"]["base_lr"] == recipe.optimizer.base_lr
    leaves = {leaf.key: leaf for leaf in recipe.leaves()}
    assert all(leaf.meaning and len(leaf.meaning) > 10 for leaf in leaves.values())
    for leaf in leaves.values():
        value = plain
        for part in leaf.key.split("."):
            value = value[part]
        assert value == leaf.value, leaf.key


def test_identity_and_machine():
    recipe = recipes.load_recipe("pretrain_vit_base")
    machine = {leaf.key for leaf in recipe.leaves() if leaf.kind == "machine"}
    assert machine == {
        "description",
        "published",
        "inputs.broken_limit",
        *(f"report.{name}" for name in ("log_every", "evaluate_every", "pictures_every", "checkpoint_every")),
        "report.evaluate_samples",
        "report.inception",
        "report.keep",
        "report.keep_every",
        *(f"report.spike.{name}" for name in ("action", "factor", "window")),
        "report.max_skipped",
        *(f"machine.{name}" for name in ("precision", "micro_batch", "activation_checkpointing", "compile")),
        "machine.hang_timeout",
    }
    assert not machine & set(recipe.identity())
    faster = recipes.load_recipe("pretrain_vit_base", ["machine.compile=true", "report.log_every=1"])
    assert faster.identity() == recipe.identity()
    assert recipes.load_recipe("pretrain_vit_base", ["seed=1"]).identity() != recipe.identity()
