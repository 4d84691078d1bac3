"""`mage-ds plan`: what it says, what it recommends, and what it refuses."""

import subprocess
import sys

import pytest
import torch
from launched import environment, mage_ds

from mage_ds import recipes
from mage_ds.cli import main
from mage_ds.engine import planner
from mage_ds.tasks import plan as task

GIB = 2**30


@pytest.fixture(scope="module")
def counted():
    """The digits' MAGE, and what planner.activations says of it, which takes the longest."""
    recipe = recipes.load_recipe("digits_mage", ["batch=96"])
    return recipe, planner.activations(recipe, torch.bfloat16, gpu=True)


def table(counted, monkeypatch, gpus: int, memory: float) -> list[task.Row]:
    recipe, activations = counted
    monkeypatch.setattr(planner, "activations", lambda *args, **kwargs: activations)
    return task.table(recipe, planner.parameters(recipe), "bf16", gpus, memory)


def plan(capsys, *words) -> str:
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_output(capsys):
    words = ["batch=64", "--gpus", 8, "--gpu-memory", 80, "--hosts", 2, "--price", 2.5, "--mfu", 0.4]
    mage = plan(capsys, "digits_mage", *words)
    assert (
        "--hostfile HOSTFILE --num_nodes 2 --num_gpus 4" in mage
        and "40% of 989" in mage
        and "GPU hours at $2.5" in mage
    )
    assert (
        "train digits_mage batch=64 machine.activation_checkpointing=none" in mage and "--tokenizer TOKENIZER" in mage
    )
    tokenizer = plan(capsys, "digits_tokenizer", "--gpus", 1, "--gpu-memory", 0.0001)
    assert "assumed" in tokenizer and "Nothing fits" in tokenizer and "deepspeed --" not in tokenizer


def test_lars_is_planned_as_it_can_run(capsys):
    """Whole tensors in float32: no other configuration is offered."""
    lars = "optimizer={name: lars, base_lr: 0.3, min_lr: 0.0, weight_decay: 0.0, momentum: 0.9, trust: 0.1, clip: null}"
    shown = plan(capsys, "digits_mage", "batch=64", lars, "--gpus", 8, "--gpu-memory", 80)
    assert "zero1" not in shown and "zero3" not in shown
    assert "--precision float32" in shown and "--deepspeed_config zero0" in shown
    count = int(shown.partition("parameters   ")[2].split()[0].replace(",", ""))
    assert f"disk         {8 * count / GIB:.2f} GiB a checkpoint" in shown  # a weight and its momentum


def test_of_classifiers(capsys):
    """A probe's frozen encoder is planned in bf16, though LARS wants the head in float32; their inputs differ."""
    words = ["--gpus", 8, "--gpu-memory", 80]
    probe = plan(capsys, "linear_probe_vit_base", *words)
    assert "parameters   769,000\n" in probe and "989 TFLOP/s" in probe  # 768 x 1000 + 1000
    assert "(forward and backward, the frozen encoder, the tokenizer's encoder)" in probe
    assert "--data DATA --init MAGE --out RUN" in probe and "--precision" not in probe
    exact = plan(capsys, "linear_probe_vit_base", "machine.precision=float32", *words)
    assert "67 TFLOP/s" in exact and "--precision float32" in exact
    tuned = plan(capsys, "digits_finetune", *words)
    assert "(forward and backward, the tokenizer's encoder)" in tuned and "--data DATA --init MAGE" in tuned
    assert "--data DATA --tokenizer TOKENIZER --out RUN" in plan(capsys, "digits_scratch", *words)
    pixels = plan(capsys, "digits_vit_scratch", *words)
    assert "(forward and backward)" in pixels and "--data DATA --out RUN" in pixels


def test_of_a_decoder(capsys):
    shown = plan(capsys, "digits_class_conditional", "batch=64", "--gpus", 8, "--gpu-memory", 80)
    assert "parameters   433,794\n" in shown  # the decoder's: 2 blocks of 128, positions, head, and 11 labels
    assert "(forward and backward, the frozen encoder, the tokenizer's encoder)" in shown
    assert "--data DATA --init MAGE --out RUN" in shown and "--tokenizer" not in shown


def test_it_imports_no_deepspeed(tmp_path):
    program = (
        "import sys; from mage_ds.tasks.plan import plan; "
        "plan('digits_tokenizer', [], gpus=1, gpu_memory=80); assert 'deepspeed' not in sys.modules"
    )
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deepspeed --num_gpus 1" in done.stdout and "--tokenizer" not in done.stdout


def test_rows(counted, monkeypatch):
    rows = {(row.name, row.checkpointing): row for row in table(counted, monkeypatch, 8, GIB)}
    assert {name for name, _ in rows} == {"zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}  # bf16: no 0
    for name, _ in rows:
        none, selective, full = (rows[name, which].kinds["activations"] for which in planner.CHECKPOINTING)
        assert none >= selective >= full > 0
    assert rows["zero2_offload", "none"].kinds["optimizer"] == 0 < rows["zero2_offload", "none"].host


def test_largest_micro_batch_divides_and_is_the_largest(counted, monkeypatch):
    large = table(counted, monkeypatch, 2, 1000 * GIB)
    assert all(row.micro_batch == 48 and row.fits for row in large)
    memory = large[0].total / task._USABLE * 0.8  # zero1 without checkpointing needs a little more
    rows = table(counted, monkeypatch, 2, memory)
    assert 1 < rows[0].micro_batch < 48 and rows[0].fits
    for row in rows:
        assert 48 % row.micro_batch == 0 and row.fits == (row.total <= task._USABLE * memory)
        assert row.fits or row.micro_batch == 1


def test_choice():
    """The least work first: nothing computed again, a low stage, in the GPU's memory; else what fits at all."""

    def row(name, which, micro, fits=True):
        return task.Row(name, which, micro, {}, 0.0, 0.0, fits)

    rows = [row("zero1", "none", 4), row("zero1", "full", 64), row("zero2", "none", 32), row("zero2", "full", 64)]
    assert task.choose(rows, 64) == rows[2]
    assert task.choose(rows[:1] + rows[3:], 64) == rows[3]
    assert task.choose(rows, 4) == rows[0]
    assert task.choose([row("zero2_offload", "none", 8), row("zero1", "none", 4)], 64).name == "zero2_offload"


@pytest.mark.parametrize(
    "words, said",
    [
        (["pretrain_vit_bas", "--gpus", "8", "--gpu-memory", "80"], "pretrain_vit_base"),
        (["pretrain_vit_base", "--gpus", "0", "--gpu-memory", "80"], "--gpus"),
        (["pretrain_vit_base", "--gpus", "8", "--gpu-memory", "0"], "--gpu-memory"),
        (["pretrain_vit_base", "--gpus", "8", "--gpu-memory", "80", "--hosts", "3"], "--hosts 3"),
        (["pretrain_vit_base", "--gpus", "7", "--gpu-memory", "80"], "7 ranks"),
        (["pretrain_vit_base", "--gpus", "8", "--gpu-memory", "80", "machine.micro_batch=3"], "--micro-batch 3"),
        (["pretrain_vit_base", "--gpus", "8", "--gpu-memory", "80", "--mfu", "40"], "--mfu"),
    ],
)
def test_bad_inputs(words, said, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.full
def test_vit_huge_as_typed(tmp_path):
    done = mage_ds("plan", "pretrain_vit_huge", "--gpus", 64, "--gpu-memory", 80, "--hosts", 8, cwd=tmp_path)
    assert "734,987,778" in done.stdout and "--deepspeed_config" in done.stdout
