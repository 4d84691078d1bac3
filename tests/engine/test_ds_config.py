"""The configuration in force: filled, refused, and how a batch is shared out."""

import json

import pytest
import tiny

from mage_ds.engine import ds_config
from mage_ds.engine.ds_config import Share
from mage_ds.errors import UserError

SHARE = Share(batch=64, micro_batch=4, accumulation=8, world=2)


def written(folder, **config):
    path = folder / "mine.json"
    path.write_text(json.dumps(config))
    return str(path)


def force(path, clip=3.0, precision="float32"):
    return ds_config.in_force(*ds_config.read(path), SHARE, clip=clip, precision=precision)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_auto_is_filled(stage, precision):
    if (stage, precision) == (0, "bf16"):
        with pytest.raises(UserError, match=r"zero0\.json.*stage = 0 with bf16.*zero1.*float32"):
            force("zero0", precision="bf16")
        return
    config = force(f"zero{stage}", precision=precision)
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 8
    assert config["gradient_clipping"] == 3.0
    assert config["bf16"]["enabled"] is (precision == "bf16")
    assert config["zero_optimization"]["stage"] == stage
    if precision == "bf16":
        assert config["data_types"]["grad_accum_dtype"] == "fp32"
        assert config["communication_data_type"] == "fp32"


def test_the_default_is_zero1():
    path, config = ds_config.read(None)
    assert path.name == "zero1.json" and config["zero_optimization"]["stage"] == 1


def test_no_clip_is_written_down():
    assert force("zero1", clip=None)["gradient_clipping"] == 0.0


def test_what_the_user_writes_stays(tmp_path):
    path = written(
        tmp_path,
        train_batch_size=64,
        gradient_clipping=3,
        zero_optimization={"stage": 2, "reduce_bucket_size": 1000},
        data_types={"grad_accum_dtype": "bf16"},
        communication_data_type="bf16",
        steps_per_print=7,
        bf16={"enabled": True},
    )
    config = force(path, precision="bf16")
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert config["data_types"]["grad_accum_dtype"] == "bf16" and config["communication_data_type"] == "bf16"
    assert config["steps_per_print"] == 7


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"train_batch_size": 32}, ["train_batch_size = 32", "the recipe's batch (64)"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu = 8", "--micro-batch (4)"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps = 1", "(8)"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping = 1.0", "optimizer.clip (3.0)"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled = True", "--precision float32"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage = 4"]),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, ["stage 1", "zero2_offload"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["stage 3", "zero3_offload"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["nvme", "only"]),
        ({"zero_optimization": {"stage": "auto"}}, ["zero_optimization.stage = auto"]),
        ({"zero_optimization": 3}, ["zero_optimization = 3", "must be a block"]),
        ({"bf16": True}, ["bf16 = True", "must be a block"]),
        ({"zero_optimization": {"stage": 1, "bucket": 5}}, ["zero_optimization.bucket = 5"]),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "x"}}, ["reduce_bucket_size = x"]),
    ],
)
def test_contradictions_name_both_sides(tmp_path, config, parts):
    with pytest.raises(UserError) as caught:
        force(written(tmp_path, **config))
    assert "mine.json" in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_other_auto_is_left_to_deepspeed(tmp_path):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": 7}
    config = force(written(tmp_path, zero_optimization=zero, communication_data_type="auto"))
    assert config["zero_optimization"] == {"stage": 3, "stage3_prefetch_bucket_size": 7}
    assert "communication_data_type" not in config


def test_one_nan_may_not_pass(tmp_path):
    path = written(tmp_path, bf16={"enabled": "auto", "check_grad_overflow": False}, zero_optimization={"stage": 1})
    with pytest.raises(UserError, match="check_grad_overflow"):
        force(path, precision="bf16")


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ("optimizer", "recipe"),
        ("scheduler", "recipe"),
        ("fp16", "--precision bf16"),
        ("activation_checkpointing", "machine.activation_checkpointing=full"),
        ("elasticity", "any number of ranks"),
        ("tensorboard", "RUN/tensorboard"),
        ("amp", "--precision bf16"),
        ("torch_autocast", "--precision"),
        ("checkpoint", "layout of ours"),
        ("wandb", "metrics.jsonl"),
        ("csv_monitor", "metrics.jsonl"),
        ("comet", "metrics.jsonl"),
    ],
)
def test_refused_blocks(tmp_path, block, why):
    with pytest.raises(UserError, match=f"mine.json: {block}: .*{why}"):
        ds_config.read(written(tmp_path, **{block: {"enabled": True}}))
    ds_config.read(written(tmp_path, **{block: {"enabled": False}}))  # switched off: no contradiction


def test_unknown_block_and_file(tmp_path):
    with pytest.raises(UserError, match=r"zero_optimisation: unknown block; did you mean zero_optimization\?"):
        ds_config.read(written(tmp_path, zero_optimisation={"stage": 1}))
    with pytest.raises(UserError, match=r"--deepspeed_config zer3: no such file; did you mean zero3\?.*zero1"):
        ds_config.read("zer3")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json: not a readable JSON file"):
        ds_config.read(str(tmp_path / "broken.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        ds_config.read(str(tmp_path / "list.json"))


def test_share():
    def shared(batch, world, micro, largest=100):
        return ds_config.share(tiny.recipe(f"batch={batch}", f"machine.micro_batch={micro}"), world, largest)

    assert shared(64, 2, 4) == SHARE
    assert shared(64, 2, "auto", largest=20) == Share(64, 16, 2, 2)
    assert shared(64, 1, "auto", largest=0) == Share(64, 1, 64, 1)
    assert shared(12, 2, "auto", largest=5) == Share(12, 3, 2, 2)
    with pytest.raises(UserError, match=r"batch = 64: does not divide over 3 ranks; choose batch=63 or batch=66"):
        shared(64, 3, "auto")
    with pytest.raises(UserError, match=r"batch = 2: .* 3 ranks; choose batch=3,"):
        shared(2, 3, "auto")
    with pytest.raises(UserError) as caught:
        shared(60, 2, 7)
    message = str(caught.value)
    assert "--micro-batch 7" in message and "30 samples of a rank" in message
    proposed = [int(word) for word in message.split("choose ")[1].replace(",", "").split() if word.isdigit()]
    assert proposed and all(30 % size == 0 for size in proposed)


def test_precision_is_chosen_by_the_hardware(monkeypatch):
    import torch

    cpu = torch.device("cpu")
    for has, chosen in ((True, "bf16"), (False, "float32")):
        fake = type("mkldnn", (), {"_is_mkldnn_bf16_supported": staticmethod(lambda has=has: has)})
        monkeypatch.setattr(torch.ops, "mkldnn", fake)
        assert ds_config.choose_precision("auto", cpu) == chosen
        assert ds_config.choose_precision("float32", cpu) == "float32"
