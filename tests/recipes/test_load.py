"""Overrides, YAML's pits, durations, and what a mistake in a recipe looks like."""

import pytest

from mage_ds import recipes
from mage_ds.errors import UserError


def base(*overrides):
    return recipes.load_recipe("pretrain_vit_base", overrides)


def error(*overrides, name="pretrain_vit_base") -> str:
    with pytest.raises(UserError) as caught:
        recipes.load_recipe(name, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(tmp_path, old: str, new: str) -> str:
    """A copy of the ViT-B recipe with one piece of text replaced."""
    text = recipes.recipe_file("pretrain_vit_base").read_text()
    assert text.count(old) == 1
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    return str(path)


# ---- overrides


@pytest.mark.parametrize(
    "text, value",
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.5e-4", 2.5e-4), ("1e3", 1000.0), ("+.5e1", 5.0), ("3", 3.0), ("0.5", 0.5)],
)
def test_numbers(text, value, tmp_path):
    assert base(f"optimizer.base_lr={text}").optimizer.base_lr == value
    recipe = recipes.load_recipe(changed(tmp_path, "base_lr: 1.5e-4", f"base_lr: {text}"))
    assert recipe.optimizer.base_lr == value


def test_values_of_every_kind():
    recipe = base(
        "batch=4",
        "optimizer.betas=[0.8, 0.9]",
        "optimizer.clip=null",
        "inputs.augmentation=weak",
        "inputs.augmentation.flip=false",
        "machine.micro_batch=2",
        "model.encoder={depth: 1, width: 64, heads: 2}",
        "machine.compile=true",
        "batch=8",
    )
    assert recipe.batch == 8  # the last one counts
    assert recipe.optimizer.betas == [0.8, 0.9]
    assert recipe.optimizer.clip is None
    assert recipe.inputs.augmentation.model_dump() == {"scale": [0.8, 1.0], "ratio": [3 / 4, 4 / 3], "flip": False}
    assert recipe.machine.micro_batch == 2
    assert recipe.machine.compile is True
    assert recipe.model.encoder.model_dump() == {"depth": 1, "width": 64, "heads": 2}
    own = base("inputs.augmentation={scale: [0.5, 0.9], ratio: [1, 1], flip: true}").inputs.augmentation
    assert own.scale == [0.5, 0.9]


def test_a_duration_has_one_unit():
    assert base("duration.steps=2").duration.model_dump() == {"steps": 2}
    assert base("duration.epochs=3").duration.model_dump() == {"epochs": 3}
    assert base("duration.steps=2", "duration.samples=9").duration.model_dump() == {"samples": 9}
    assert base("report.checkpoint_every.steps=7").report.checkpoint_every.model_dump() == {"steps": 7}
    assert base("warmup.steps=0").warmup.model_dump() == {"steps": 0}
    assert base("duration={samples: 5}").identity()["duration"] == {"samples": 5}
    sampling = base("sampling.steps=5").sampling  # not a duration
    assert (sampling.steps, sampling.temperature) == (5, 6.0)


def test_a_recipe_is_not_changed_by_loading_another():
    first = base()
    base("inputs.augmentation.flip=false", "batch=1")
    assert base() == first


# ---- durations


@pytest.mark.parametrize(
    "override, samples, batch, steps",
    [
        ("duration.steps=7", 100, 8, 7),
        ("duration.samples=80", 100, 8, 10),
        ("duration.samples=81", 100, 8, 11),  # the last step finishes what was asked for
        ("duration.samples=1", 100, 8, 1),
        ("duration.epochs=1", 100, 8, 13),  # 12.5
        ("duration.epochs=2", 100, 8, 25),
        ("duration.epochs=3", 5, 4096, 1),
        ("duration.epochs=1600", 1_281_167, 4096, 500_456),  # 1600 * 1281167 / 4096 = 500455.86
    ],
)
def test_resolve(override, samples, batch, steps):
    assert recipes.resolve(base(override).duration, samples=samples, batch=batch) == steps


def test_schedule():
    # ImageNet-1K: 1281167 * 40 / 4096 = 12511.4
    assert recipes.schedule(base(), 1_281_167) == (500_456, 12_512, "")
    steps, warmup, note = recipes.schedule(base("duration.steps=2", "batch=4"), 100)
    assert (steps, warmup) == (2, 2)
    assert "1000" in note and "2 steps" in note  # 40 * 100 / 4 = 1000
    assert recipes.schedule(base("duration.steps=9", "warmup.steps=9"), 100) == (9, 9, "")
    assert recipes.schedule(base("duration.steps=9", "warmup.epochs=0"), 100) == (9, 0, "")


# ---- mistakes


@pytest.mark.parametrize(
    "override, parts",
    [
        ("batch=0", ["command line", "batch = 0", "a whole number at least 1"]),
        ("batch=1.5", ["batch = 1.5", "whole number"]),
        ("batch=yes", ["batch = true", "whole number"]),
        ("batch=", ["batch = null", "whole number"]),
        ("batch.size=3", ["batch = {size: 3}", "whole number"]),
        ("batc=4", ["batc: there is no such key", "did you mean batch?"]),
        ("base_lr=1", ["did you mean optimizer.base_lr?"]),
        ("optimizer.base_lrr=1", ["did you mean optimizer.base_lr?"]),
        ("optimiser.base_lr=1", ["did you mean optimizer?"]),
        ("model.encoder.dept=1", ["did you mean model.encoder.depth?"]),
        ("wholly_different=1", ["wholly_different", "the keys are task, description"]),
        ("optimizer.base_lr=fast", ["optimizer.base_lr = fast", "a number above 0"]),
        ("optimizer.base_lr=.nan", ["optimizer.base_lr = .nan"]),
        ("optimizer.base_lr=.inf", ["optimizer.base_lr = .inf"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas = [0.9]", "a list of 2"]),
        ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas = [0.9, 1.0]", "at least 0 and below 1"]),
        ("optimizer=fast", ["optimizer = fast", "a section with the keys name, base_lr, min_lr"]),
        ("model.dropout=1", ["model.dropout = 1", "at least 0 and below 1"]),
        ("machine.precision=fp16", ["machine.precision = fp16", "one of auto, bf16, float32"]),
        ("machine.micro_batch=0", ["machine.micro_batch = 0", "auto or a whole number at least 1"]),
        ("inputs.augmentation=heavy", ["inputs.augmentation = heavy", "strong, weak, none"]),
        ("inputs.augmentation.scale=[0.9, 0.2]", ["inputs.augmentation", "scale = [0.9, 0.2]"]),
        ("inputs.augmentation.scale=[0.5, 2.0]", ["scale = [0.5, 2.0]", "at most 1"]),
        ("inputs.augmentation.scale=null", ["scale and ratio"]),
        ("inputs.evaluation_resize=128", ["evaluation_resize = 128", "image_size = 256"]),
        ("duration.steps=0", ["duration.steps = 0", "a whole number at least 1"]),
        ("duration.hours=1", ["duration.hours: there is no such key"]),
        ("duration={steps: 1, epochs: 1}", ["duration", "exactly one of epochs, steps, samples"]),
        ("warmup.steps=-1", ["warmup.steps = -1", "at least 0"]),
        ("masking.low=1.0", ["masking", "low = 1.0", "high = 1.0"]),
        ("masking.drop=0.6", ["masking", "drop = 0.6", "low = 0.5"]),
        ("model.encoder.heads=7", ["model.encoder", "heads = 7", "width = 768"]),
        ("model.vocabulary=1025", ["vocabulary = 1025", "1026"]),
        ("model.codes=512", ["pretrain_vit_base.yaml model.codes=512", "tokenizer.codes = 1024"]),
        ("model.tokens=64", ["model.tokens = 64", "tokenizer.multipliers", "256 tokens", "inputs.image_size = 256"]),
        ("inputs.image_size=250", ["no whole number of tokens", "inputs.image_size = 250"]),
        ("tokenizer.channels=12", ["tokenizer.channels = 12", "a multiple of 8"]),
        ("tokenizer.codes=65537", ["tokenizer.codes = 65537", "at most 65536"]),
        ("task=classifier", ["task = classifier", "one of tokenizer, pretrain, classify"]),
        ("inputs.policy=rand-m9-mdst0.5", ["policy = rand-m9-mdst0.5", "mstdX"]),
        ("inputs.policy=augmix-m5", ["policy = augmix-m5: must be `rand`"]),
        ("inputs.crop=clamp", ["inputs.crop = clamp", "one of tried, clamped"]),
        ("batch", ["batch: an override is key=value"]),
        ("=3", ["=3: an override is key=value"]),
        ("model..codes=3", ["an override is key=value"]),
        ("batch=[1", ["batch=[1", "not valid YAML"]),
    ],
)  # fmt: skip
def test_a_wrong_override(override, parts):
    message = error(override)
    for part in parts:
        assert part in message


def test_two_mistakes_are_counted():
    assert error("batch=0", "seed=-1").endswith("(and 1 more)")
    assert "more)" not in error("machine.micro_batch=0")  # one value, though it misses both of its kinds


def test_tokenizer_recipe_mistakes():
    message = error("inputs.image_size=36", "inputs.evaluation_resize=36", name="digits_tokenizer")
    assert "inputs.image_size = 36: must be a multiple of 8 (model.multipliers has 4 levels)" in message
    assert "did you mean" in error("loss.commitmen=1", name="digits_tokenizer")
    small = ["inputs.image_size=16", "inputs.evaluation_resize=16"]
    message = error(*small, name="tokenizer_imagenet")
    assert "adversary.layers = 3: leaves nothing of inputs.image_size = 16, it needs 24 pixels" in message
    small = ["inputs.image_size=8", "inputs.evaluation_resize=8", "loss.perceptual=1.0"]
    assert "loss.perceptual: inputs.image_size = 8 must be at least 16" in error(*small, name="digits_tokenizer")


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("batch: 4096", "batch: many", ["mine.yaml: batch = many: must be a whole number at least 1"]),
        ("label_smoothing: 0.1", "label_smooting: 0.1", ["mine.yaml: ", "label_smoothing"]),
        ("seed: 0", "seed: 0\nseed: 1", ["mine.yaml: line", "the key seed is given twice"]),
        ("seed: 0", "seed: [", ["mine.yaml: line"]),
        ("seed: 0", "seed: !!python/object/apply:os.getpid []", ["mine.yaml: line"]),
        ("augmentation: strong", "augmentation: heavy", ["mine.yaml: inputs.augmentation = heavy"]),
        ("task: pretrain", "", ["mine.yaml: task = None", "tokenizer, pretrain"]),
        ("task: pretrain", "task: [pretrain]", ["mine.yaml: task = ", "tokenizer, pretrain"]),
        ("seed: 0", "3: 4\nseed: 0", ["mine.yaml: "]),
    ],
)
def test_a_wrong_file(old, new, parts, tmp_path):
    message = error(name=changed(tmp_path, old, new))
    for part in parts:
        assert part in message


def test_no_recipe(tmp_path):
    assert "did you mean pretrain_vit_base?" in error(name="pretrain_vitbase")
    assert "digits_tokenizer, digits_vit_scratch" in error(name="zzz")
    assert "there.yaml: no such recipe file" in error(name="there.yaml")
    for text in ("", "just words", "- a\n- list"):
        path = tmp_path / "odd.yaml"
        path.write_text(text)
        assert "odd.yaml: not a recipe" in error(name=str(path))
    path.write_bytes(b"\xff\xfe\x00")
    assert "odd.yaml: " in error(name=str(path))
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml: no such recipe file" in error(name=str(tmp_path / "folder.yaml"))
