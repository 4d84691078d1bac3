"""A run's folder: what is refused, what is continued, what is rewound, and how an end is written down."""

import fcntl
import hashlib
import json
import shutil
from functools import partial

import pytest
import tiny

from mage_ds import recipes
from mage_ds.engine import checkpoint, process, run_folder, training
from mage_ds.engine.run import Run
from mage_ds.engine.run_folder import choose_start
from mage_ds.errors import Stopped, UserError

FACTS = {"data": "pictures A", "tokenizer": "tokenizer A"}


@pytest.fixture
def out(me, tmp_path):
    """A run folder with a recipe and two checkpoints that are names only."""
    out = tmp_path / "run"
    run_folder.own(run_folder.create(out, tiny.recipe(), FACTS, {"train_micro_batch_size_per_gpu": 4}, COPIES))
    for step in (3, 12):
        folder = checkpoint.folder_of(out, step)
        folder.mkdir(parents=True)
        meta = signed({"format": 1, "step": step, "engines": {}, "files": {}})
        (folder / "meta.json").write_text(json.dumps(meta))
    return out


def signed(meta: dict) -> dict:
    return {**meta, "digest": hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()}


def save_tokenizer(folder, text="A"):
    folder.mkdir()
    (folder / "weights").write_text(text)


COPIES = {"tokenizer": save_tokenizer}


def start(out, *overrides, facts=FACTS, resume="auto", extend=False):
    return choose_start(out, tiny.recipe(*overrides), facts, resume, extend)


# --- choosing


def test_a_new_folder_starts_anew(tmp_path):
    assert start(tmp_path / "new") is None
    assert start(tmp_path / "new", resume="never") is None
    (tmp_path / "empty").mkdir()
    assert start(tmp_path / "empty") is None
    assert not (tmp_path / "new").exists()


def test_auto_continues_from_the_newest(out):
    assert start(out) == checkpoint.folder_of(out, 12)
    assert start(out, resume=str(checkpoint.folder_of(out, 3))) == checkpoint.folder_of(out, 3)
    shutil.rmtree(out / "checkpoints")
    assert start(out) is None


def test_machine_fields_may_change(out):
    assert start(out, "machine.micro_batch=2", "machine.compile=true", "report.keep=9", "machine.precision=bf16")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optimizer.base_lr=0.5"], ["optimizer.base_lr = 0.3", "0.5", "choose another folder"]),
        (["batch=16"], ["batch = 8", "16"]),
        (["duration.steps=30"], ["duration", "20", "30", "--extend"]),
        (["model.padding=mask"], ["model.padding = cls", "mask"]),
        (["seed=1"], ["seed = 0", "1"]),
    ],
)
def test_another_recipe_is_refused(out, overrides, parts):
    with pytest.raises(UserError) as caught:
        start(out, *overrides)
    assert str(out) in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


def test_the_duration_may_be_extended_and_nothing_else(out):
    assert start(out, "duration.steps=30", extend=True)
    with pytest.raises(UserError, match="batch = 8"):
        start(out, "duration.steps=30", "batch=16", extend=True)


@pytest.mark.parametrize(("key", "flag"), [("data", "--data"), ("tokenizer", "--tokenizer")])
def test_other_data_or_tokenizer_is_refused(out, key, flag):
    with pytest.raises(UserError, match=f"{flag}: differs .*{key[:5]}.* A there, .* B here"):
        start(out, facts=FACTS | {key: FACTS[key][:-1] + "B"})


def test_never_and_paths(out, tmp_path):
    with pytest.raises(UserError, match=r"already holds a run; .*--resume auto"):
        start(out, resume="never")
    for path in (tmp_path, out, checkpoint.folder_of(out, 4), out / "checkpoints" / "nowhere"):
        with pytest.raises(UserError, match=r"--resume .*must be auto, never or a checkpoint folder"):
            start(out, resume=str(path))
    with pytest.raises(UserError, match=r"--resume .*is no run folder"):
        start(tmp_path / "new", resume=str(checkpoint.folder_of(out, 3)))


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="exists and is no run folder"):
        start(tmp_path)
    with pytest.raises(UserError, match="exists and is no run folder"):
        start(tmp_path / "thesis.txt")


def test_a_start_killed_before_the_recipe_was_written_can_start_again_with_other_facts(me, tmp_path):
    """facts.json and tokenizer/ are there, recipe.yaml is not: nothing was trained, the next start decides."""
    out = tmp_path / "run"
    config = {"train_micro_batch_size_per_gpu": 4}
    run_folder.create(out, tiny.recipe(), FACTS, config, COPIES)
    (out / "recipe.yaml").unlink()
    other = {"data": "pictures B", "tokenizer": "tokenizer B"}
    assert start(out, "seed=5", facts=other) is None
    run_folder.create(out, tiny.recipe("seed=5"), other, config, {"tokenizer": partial(save_tokenizer, text="B")})
    assert json.loads((out / "facts.json").read_text()) == other
    assert (out / "tokenizer" / "weights").read_text() == "B"
    assert start(out, "seed=5", facts=other) is None  # a run without a checkpoint yet
    with pytest.raises(UserError, match="--data: differs"):
        start(out, "seed=5", facts=FACTS)


# --- creating


def test_what_a_run_stands_on(out):
    names = {"recipe.yaml", "ds_config.json", "environment.json", "facts.json", "status.json", "tokenizer"}
    assert {entry.name for entry in out.glob("[!.]*")} == names | {"checkpoints"}
    assert run_folder.load_recipe(out) == tiny.recipe()
    environment = json.loads((out / "environment.json").read_text())
    assert environment["world_size"] == 1 and {"torch", "deepspeed"} <= set(environment["versions"])
    assert run_folder.read_status(out)["state"] == "running"


def test_the_tokenizer_stays_the_first_one(out):
    run_folder.create(
        out, tiny.recipe("duration.steps=30"), FACTS, {}, {"tokenizer": partial(save_tokenizer, text="other")}
    )
    assert (out / "tokenizer" / "weights").read_text() == "A"
    assert run_folder.load_recipe(out).duration.steps == 30


def test_a_folder_that_cannot_be_written(me, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*cannot be written"):
        run_folder.create(tmp_path / "file" / "run", tiny.recipe(), FACTS, {}, {})


# --- metrics


def lines(*steps):
    return [json.dumps({"step": step, "loss": 1.0 / step}) for step in steps]


@pytest.mark.parametrize("cut", ['{"step": 12, "lo', '{"step"', "12", "null"])
def test_metrics_are_rewound_to_the_resumed_step(me, tmp_path, cut):
    kept = [*lines(1, 5), json.dumps({"step": 5, "val_loss": 2.0}), *lines(10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*kept, *lines(11, 15), cut]))
    run = Run(tmp_path, tiny.recipe(), FACTS, steps=20, dataset=40)
    run.step = 10
    run._rewind()
    run.begin(flops_per_image=None, peak_flops=None)
    run.end_of_step(11, {}, {"loss": 0.5, "lr": 1.0}, None, None)
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [json.dumps(line) for line in told[:4]] == kept
    assert (told[4]["step"], told[4]["loss"]) == (11, 0.5) and len(told) == 5


def test_a_run_without_checkpoint_starts_its_metrics_anew(me, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines(1, 2)))
    Run(tmp_path, tiny.recipe(), FACTS, steps=20, dataset=40).resume({}, None)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_continued_run_has_the_metrics_of_an_uninterrupted_one(me, tmp_path):
    """Steps 1-6 at once, and 1-5 with a checkpoint at 3, killed, continued from there."""
    numbers = tiny.recipe("report.checkpoint_every={steps: 3}", "duration.steps=6")

    def part(out, steps, source):
        run = Run(out, numbers, FACTS, steps=6, dataset=40)
        engine = tiny.engine_of(numbers, 1)
        out.mkdir(exist_ok=True)
        run.resume({"mage": engine}, source)
        run.begin(flops_per_image=None, peak_flops=None)
        tiny.train(engine, numbers, steps, run)
        return run

    part(tmp_path / "whole", 6, None)
    part(tmp_path / "parts", 5, None)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    run = part(tmp_path / "parts", 6, checkpoint.find(tmp_path / "parts"))
    assert run.step == 6 and checkpoint.steps(run.path) == [3, 6]

    def told(name):
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["top1"], r["skipped"]) for r in records]

    assert told("parts") == told("whole") and len(told("whole")) == 6


# --- status


def test_states(me, tmp_path):
    numbers = tiny.recipe("report.checkpoint_every={steps: 100}")
    engine = tiny.engine_of(numbers, 0)
    run_folder.create(tmp_path, numbers, FACTS, {}, {})
    run = Run(tmp_path, numbers, FACTS, steps=2, dataset=40)
    run.begin(flops_per_image=None, peak_flops=None)
    assert run_folder.read_status(tmp_path) | {"state": "running", "step": 0, "steps": 2} == (
        run_folder.read_status(tmp_path)
    )
    tiny.train(engine, numbers, 2, run)
    run.save({"mage": engine})
    run.finish()
    status = run_folder.read_status(tmp_path)
    assert (status["state"], status["step"], status["steps"]) == ("finished", 2, 2)
    assert (tmp_path / "pictures" / "loss.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("error", "state", "reason", "code"),
    [
        (Stopped("SIGTERM: saved after step 7"), "stopped", "SIGTERM: saved after step 7", None),
        (UserError("--data x: missing"), "failed", "--data x: missing", 2),
        (RuntimeError("a bug"), "failed", "RuntimeError: a bug", 1),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt: ", 1),
    ],
)
def test_an_end_is_written_down(out, error, state, reason, code):
    with pytest.raises(type(error)), run_folder.ending(out):
        raise error
    status = run_folder.read_status(out)
    assert (status["state"], status["reason"], status.get("exit_code")) == (state, reason, code)
    run_folder.write_status(out, "running")
    assert "exit_code" not in run_folder.read_status(out)


@pytest.mark.parametrize("before", ["finished", "stopped"])
def test_a_refused_start_leaves_the_state(out, before):
    run_folder.write_status(out, before, step=20)
    run_folder.own("another start")
    with pytest.raises(UserError), run_folder.ending(out):
        raise UserError("--data: differs")
    status = run_folder.read_status(out)
    assert (status["state"], status["reason"], status["step"]) == (before, "--data: differs", 20)


@pytest.mark.parametrize(("alive", "state"), [(True, "running"), (False, "failed")])
def test_an_error_of_another_start_leaves_a_running_run_alone(out, alive, state):
    run_folder.own("another start")
    run_folder._locked.close()
    with open(out / ".lock") as other:
        if alive:  # else a kill left the word "running" behind
            fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError), run_folder.ending(out):
            raise UserError("--data: differs")
    assert run_folder.read_status(out)["state"] == state


def test_one_start_at_a_time(out):
    run_folder._locked.close()
    with open(out / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training in it"):
            run_folder.create(out, tiny.recipe(), FACTS, {}, {})
        with pytest.MonkeyPatch.context() as patch:  # it took the lock after this start had looked
            patch.setattr(run_folder, "_busy", lambda _: False)
            with pytest.raises(UserError, match="has just begun to train in it"):
                run_folder.create(out, tiny.recipe(), FACTS, {}, {})
        assert run_folder._busy(out)  # a lock that was not had is not held for one's own
    run_folder.create(out, tiny.recipe(), FACTS, {}, {})


def test_a_folder_that_is_no_run_gets_no_status(me, tmp_path):
    with pytest.raises(UserError), run_folder.ending(tmp_path):
        raise UserError("exists and is no run folder")
    assert not list(tmp_path.iterdir())


# --- the plan of a start


def plan(out, *overrides, **options):
    return training.plan(
        tiny.recipe(*overrides), training.Options(out, **options), dataset=40, facts=FACTS, largest=lambda: 3
    )


def test_a_plan_writes_nothing_and_decides_all(me, tmp_path, capsys):
    found = plan(tmp_path / "new", "machine.micro_batch=auto", "duration={epochs: 2}", "warmup={samples: 9}")
    assert (found.steps, found.warmup) == (10, 2)  # 80 samples and 9 samples, of 8 a step
    assert (found.share.micro_batch, found.share.accumulation) == (2, 4)
    assert (found.precision, found.source, found.done) == ("float32", None, False)
    assert found.config["zero_optimization"]["stage"] == 1
    assert "zero1.json (choose another with --deepspeed_config)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_auto_keeps_the_micro_batch_of_the_run(out):
    assert plan(out, "machine.micro_batch=auto").share.micro_batch == 4  # 3 would fit: 2
    assert plan(out, "machine.micro_batch=1").share.micro_batch == 1


def test_a_finished_run_is_done(out):
    assert not plan(out).done
    checkpoint.folder_of(out, 12).rename(checkpoint.folder_of(out, 20))
    meta = {"format": 1, "step": 20, "engines": {}, "files": {}}
    (checkpoint.folder_of(out, 20) / "meta.json").write_text(json.dumps(signed(meta)))
    assert plan(out).done
    assert not plan(out, "duration.steps=21", extend=True).done


def test_a_warmup_longer_than_the_training_is_cut_and_said(me, tmp_path, capsys):
    assert plan(tmp_path / "new", "duration.steps=3").warmup == 3
    assert "warm-up" in capsys.readouterr().out


def test_errors_of_rank_0_reach_all(me):
    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        process.on_first(refuse)
    assert process.on_first(lambda: 5) == 5


def test_the_recipe_in_the_folder_is_the_resolved_one(out):
    assert recipes.load_recipe(str(out / "recipe.yaml")).identity() == tiny.recipe().identity()
