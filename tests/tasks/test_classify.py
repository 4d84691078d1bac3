"""Classifiers as a user trains them: against plain loops, killed and continued, on one rank and on two."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launched import metrics
from made_classifiers import BATCH, CLASSES, KINDS, MICRO, STEPS, TRAIN, pictures, seen
from safetensors.torch import load_file

from mage_ds import cli
from mage_ds.engine import stored
from mage_ds.inputs import order

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def place(classifiers):
    return classifiers


@pytest.fixture(scope="module")
def two(place):
    for kind in ("probe", "finetune"):
        place.lines.two(*place.line(kind, f"two {kind}"))
    return place


# --- what a run says and holds


def figures(run) -> list[dict]:
    """All that does not depend on the clock."""
    kept = ("step", "loss", "top1", "lr", "grad_norm", "val_loss", "val_top1", "val_top5")
    return [{key: record[key] for key in kept if key in record} for record in metrics(run)]


def curve(run) -> list[float]:
    return [record["loss"] for record in metrics(run) if "loss" in record]


def held(run) -> dict[int, dict]:
    return {
        record["step"]: {key: value for key, value in record.items() if key != "step"}
        for record in metrics(run)
        if "val_loss" in record
    }


def state(run, step: int = STEPS) -> dict:
    """Every tensor of a checkpoint."""
    files = sorted((run / "checkpoints" / f"step_{step:06d}").glob("*.safetensors"))
    return {(file.name, name): value for file in files for name, value in load_file(file).items()}


def weights(run, step: int = STEPS) -> dict:
    return {name: value for (file, name), value in state(run, step).items() if ".weight." in file}


@torch.no_grad()
def judged(place, run) -> dict:
    """What the opened classifier says of the held-out pictures, one after the other."""
    classifier, (given, labels) = stored.open_model(run).classifier, seen(place, "val", run)
    loss, top1, top5 = 0.0, 0, 0
    for each, label in zip(given, labels.tolist(), strict=True):
        scores = classifier(each[None])[0].double()
        loss -= torch.log_softmax(scores, 0)[label].item() / len(labels)
        place_of = int((scores > scores[label]).sum())
        top1, top5 = top1 + (place_of == 0), top5 + (place_of < 5)
    assert len(labels) == 13
    return {"val_loss": loss, "val_top1": top1 / 13, "val_top5": top5 / 13}


# --- the same as plain loops


@pytest.mark.parametrize("run", ["probe", "finetune", "scratch", "vit", "two probe", "two finetune"])
def test_held_out_figures_are_those_of_the_saved_classifier(two, run):
    """Each picture counts once, on two ranks too, whose shares differ; dropout is off; of a run with an average of the
    weights, its; of a probe, by rank 0's running statistics, which are saved."""
    found = held(two.root / run)
    assert sorted(found) == [3, 6]
    assert found[STEPS] == pytest.approx(judged(two, two.root / run), rel=1e-5)


def plans(world: int, rank: int, steps: int = STEPS):
    share = {"batch": BATCH, "micro_batch": MICRO, "rank": rank, "world": world}
    made = order.plans(TRAIN, seed=0, position=0, **share)
    return [[next(made)[1] for _ in range(BATCH // MICRO // world)] for _ in range(steps)]


def test_the_probe_is_a_plain_loop(place):
    """BatchNorm of each micro-batch, a linear layer, LARS by its formula, on features of the frozen encoder."""
    tokens, labels = seen(place, "train", place.root / "probe")
    encoder, info = stored.load_encoder(place.root / "mage")
    x = encoder.features(tokens)
    assert info["kind"] == "encoder" and x.std() > 0.05
    saved = weights(place.root / "probe", 2)  # whose learning rate was 0 in step 1; the start is not the test's to know
    moments = {name: v for (file, name), v in state(place.root / "probe", 2).items() if "momentum" in file}
    weight, bias = (saved[f"linear.{name}"].double() for name in ("weight", "bias"))
    speed = [moments[f"linear.{name}"].double() for name in ("weight", "bias")]
    peak, losses = 1.6 * BATCH / 256, []
    for step, micros in enumerate(plans(1, 0)):
        if step < 2:
            continue
        lr = peak * 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        one, two = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        parts = []
        for index in micros:
            rows = x[index].double()
            rows = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-6).sqrt()
            parts.append(F.cross_entropy(rows @ one.T + two, labels[index]))
        loss = sum(parts) / len(parts)
        losses.append(loss.item())
        g_weight, g_bias = torch.autograd.grad(loss, (one, two))
        g_weight = g_weight * 0.001 * weight.norm() / g_weight.norm()
        speed = [0.9 * old + g for old, g in zip(speed, (g_weight, g_bias), strict=True)]
        weight, bias = weight - lr * speed[0], bias - lr * speed[1]
    assert curve(place.root / "probe")[2:] == pytest.approx(losses, rel=1e-5)
    end = weights(place.root / "probe")
    torch.testing.assert_close(end["linear.weight"].double(), weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(end["linear.bias"].double(), bias, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world, run", [(1, "probe"), (2, "two probe")])
def test_the_probes_running_statistics_are_rank_0s(two, world, run):
    tokens, _ = seen(two, "train", two.root / run)
    x = stored.load_encoder(two.root / "mage")[0].features(tokens).double()
    mean, variance = torch.zeros(32, dtype=torch.float64), torch.ones(32, dtype=torch.float64)
    for index in [index for micros in plans(world, 0) for index in micros]:
        mean = 0.9 * mean + 0.1 * x[index].mean(0)
        variance = 0.9 * variance + 0.1 * x[index].var(0)
    found = {name: value for (_, name), value in state(two.root / run).items()}
    torch.testing.assert_close(found["norm.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["norm.running_var"].double(), variance, rtol=1e-5, atol=1e-6)


def test_the_probes_encoder_stays_outside_of_the_engine(place):
    run = place.root / "probe"
    names = {name for _, name in state(run)}
    linear, norm = (
        {"linear.weight", "linear.bias"},
        {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"},
    )
    assert names == linear | norm
    theirs = stored.load_encoder(place.root / "mage")[0].state_dict()
    ours = load_file(run / "encoder" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((run / "facts.json").read_text())["classes"] == [str(i) for i in range(CLASSES)]
    config = json.loads((run / "ds_config.json").read_text())
    assert config["zero_optimization"]["stage"] == 0 and not config["bf16"]["enabled"]


def test_features_are_computed_once_where_pictures_are_always_the_same(place):
    run = place.root / "probe"
    assert "features of 29 training pictures, computed once" in place.said["probe"]
    tokens, _ = seen(place, "train", run)
    table = np.fromfile(run / "features" / "train.float32", np.float32).reshape(TRAIN, 32)
    torch.testing.assert_close(torch.from_numpy(table), stored.load_encoder(place.root / "mage")[0].features(tokens))


def test_a_probe_with_augmentation_computes_them_in_each_step(place):
    """With dropout after the embedding, as published; without it, features of a table are those of the step."""
    flip = "inputs.augmentation={scale: null, ratio: null, flip: true}"
    live = place.root / "live"
    assert "computed once" not in place.lines.done(*place.line("probe", "live", flip, "duration.steps=3"))
    assert not (live / "features").exists()
    assert curve(live)[0] != pytest.approx(curve(place.root / "probe")[0], rel=1e-4)
    place.lines.done(*place.line("probe", "dropped", "model.dropout=0.1", "duration.steps=3"))
    dropped = place.root / "dropped"
    assert not (dropped / "features").exists()
    assert curve(dropped)[0] != pytest.approx(curve(place.root / "probe")[0], rel=1e-4)
    assert held(dropped)[3] == pytest.approx(judged(place, dropped), rel=1e-5)  # where dropout is off


def test_fine_tuning_begins_with_the_encoder_and_a_small_head(place):
    """In step 1 the learning rate is 0."""
    place.lines.done(*place.line("finetune", "begun", "duration.steps=1"))
    mine, theirs = weights(place.root / "begun", 1), stored.load_encoder(place.root / "mage")[0].state_dict()
    shared = [name for name in mine if name.startswith(("token_emb.", "blocks."))]
    assert len(shared) == len(mine) - 4 and all(torch.equal(mine[name], theirs[name]) for name in shared)
    assert torch.equal(mine["fc_norm.weight"], torch.ones(32)) and not mine["fc_norm.bias"].any()
    assert 0.5e-5 < mine["head.weight"].std() < 4e-5 and not mine["head.bias"].any()
    assert curve(place.root / "begun")[0] == pytest.approx(math.log(CLASSES), abs=1e-3)


def test_fine_tuning_learns_less_in_lower_layers(place):
    """Adam's first step is the learning rate in size: each layer's is layer_decay times that of the one above."""
    more = ["duration.steps=1", "warmup.steps=0", "model.head_std=0.05"]
    place.lines.done(*place.line("finetune", "moved", *more))
    theirs, mine = stored.load_encoder(place.root / "mage")[0].state_dict(), weights(place.root / "moved", 1)
    parts = ["token_emb.position_embeddings.weight", *(f"blocks.{i}.attn.qkv.weight" for i in (0, 1))]
    steps = [(mine[name] - theirs[name]).abs().median().item() for name in parts]
    peak = 0.03 * BATCH / 256
    assert steps == pytest.approx([peak * 0.75**3, peak * 0.75**2, peak * 0.75], rel=0.02)


def test_the_scratch_loss_is_of_smoothed_labels_and_pictures_are_joined(place):
    """The first loss, of initial values, without drop path: torch's own smoothing; with `mix` it is another."""
    plain = ["model.drop_path=0.0", "duration.steps=1"]
    place.lines.done(*place.line("vit", "unmixed", *plain, "mix=null"))
    place.lines.done(*place.line("vit", "mixed", *plain, "mix.probability=1.0"))
    found, labels = pictures(place.data, "train")
    model = stored.open_model(place.root / "unmixed", weights="raw").classifier  # after a step at a rate of 0
    [micros] = plans(1, 0, 1)
    losses = [F.cross_entropy(model(found[i]), labels[i], label_smoothing=0.1).item() for i in micros]
    assert curve(place.root / "unmixed") == pytest.approx([np.mean(losses)], rel=1e-5)
    assert curve(place.root / "mixed")[0] != pytest.approx(np.mean(losses), rel=1e-4)


# --- ranks, kills


def test_two_ranks_learn_as_one(two):
    """The same micro-batches, joined alike, with the same dropout."""
    assert curve(two.root / "two finetune") == pytest.approx(curve(two.root / "finetune"), rel=1e-5)
    assert held(two.root / "two finetune")[STEPS] == pytest.approx(held(two.root / "finetune")[STEPS], rel=1e-4)
    assert curve(two.root / "two probe") == pytest.approx(curve(two.root / "probe"), rel=1e-5)
    one, many = (
        np.fromfile(two.root / run / "features" / "train.float32", np.float32) for run in ("probe", "two probe")
    )
    assert one == pytest.approx(many, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind, kills", [
    ("probe", ["2 features", "1 step_000004"]),
    ("finetune", ["1 step_000002", "1 step_000004"]),
    ("scratch", ["1 step_000004"]),
    ("vit", ["1 step_000006"]),
])  # fmt: skip
def test_killed_and_continued_it_is_the_same(place, kind, kills):
    out, whole = place.root / f"killed {kind}", place.root / kind
    for kill_at in kills:
        assert place.lines.run(*place.line(kind, out.name), kill_at=kill_at) == -9, place.lines.log.read_text()
    assert place.lines.run(*place.line(kind, out.name)) == 0, place.lines.log.read_text()
    assert figures(out) == figures(whole)
    one, two = state(out), state(whole)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_goes_on_without_what_it_began_with(place):
    """Its tokenizer and a probe's encoder are copies; fine-tuning needs its encoder at the start only."""
    for kind in ("probe", "finetune"):
        shutil.copytree(place.root / kind, place.root / f"alone {kind}")
        line = ["train", *KINDS[kind], "duration.steps=7", "--data", place.data, "--out", place.root / f"alone {kind}"]
        away = place.root / "mage"
        away = away.rename(place.root / "away")
        try:
            place.lines.done(*line, "--extend")
        finally:
            away.rename(place.root / "mage")
        assert curve(place.root / f"alone {kind}")[:STEPS] == curve(place.root / kind)


def test_a_token_cache_gives_the_same_where_pictures_are_not_changed(place):
    base = ["train", *KINDS["probe"], "model.dropout=0.1", "duration.steps=3", "report.evaluate_every.steps=3"]
    cache, out = place.root / "tokens", place.root / "cached"
    words = ["--recipe", place.root / "probe" / "recipe.yaml", "--precision", "float32"]
    place.lines.done("tokenize", "--data", place.data, "--tokenizer", place.root / "mage", "--out", cache, *words)
    place.lines.done(*base, "--data", cache, "--init", place.root / "mage", "--out", out)
    place.lines.done(*base, "--data", place.data, "--init", place.root / "mage", "--out", place.root / "uncached")
    assert curve(out) == pytest.approx(curve(place.root / "uncached"), rel=1e-6)
    assert held(out)[3] == pytest.approx(held(place.root / "uncached")[3], rel=1e-6)


# --- what cannot be


def refused(capsys, *words) -> str:
    assert cli.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mage-ds: error: ") and error.count("\n") == 1
    return error.removeprefix("mage-ds: error: ")


def test_one_line_says_what_is_wrong(place, tmp_path, capsys):
    def said(kind, *more, data=place.data, out=tmp_path / "never"):
        line = refused(capsys, "train", *KINDS[kind], *more, "--data", data, "--out", out)
        assert not (tmp_path / "never").exists()
        return line

    mage, tokenizer = ["--init", place.root / "mage"], ["--tokenizer", place.root / "mage"]
    assert said("probe").startswith("--init is missing: protocol = probe measures the encoder of a trained MAGE; give")
    assert said("finetune").startswith("--init is missing: protocol = finetune begins with the encoder of")
    assert "protocol = scratch begins with initial values" in said("scratch", *tokenizer, *mage)
    assert said("scratch").startswith("--tokenizer is missing")
    assert "this model sees pixels (model.patch); leave it out" in said("vit", *tokenizer)
    wide = "model.encoder={depth: 2, width: 64, heads: 2}"
    for kind in ("probe", "finetune"):
        assert '"model.encoder={depth: 2, width: 32, heads: 2}"' in said(kind, wide, *mage)
        assert "model.vocabulary=34" in said(kind, "model.vocabulary=40", *mage)
        assert "no such run folder" in said(kind, "--init", tmp_path / "nothing")
    assert 'add "model.classes=6"' in said("probe", "model.classes=5", *mage)
    odd = ["batch=9", "machine.micro_batch=3"]
    assert "--micro-batch 3: mix joins the pictures of a micro-batch in pairs; choose" in said("finetune", *odd, *mage)
    assert "--micro-batch 1: the probe's batch norm needs two" in said("probe", "machine.micro_batch=1", *mage)
    stage = ["--deepspeed_config", "zero2"]
    assert "lars" in said("probe", *mage, *stage).lower()
    shutil.copytree(place.data / "train" / "0", tmp_path / "flat")
    assert "has no classes" in said("probe", *mage, data=tmp_path / "flat")
    began = said("finetune", "--init", place.root / "probe", out=place.root / "finetune")
    assert f"began with {place.root / 'mage'}; leave --init out, or choose another --out" in began
