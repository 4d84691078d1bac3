"""The command line: what reaches a task, what a mistake looks like, exit codes, and how fast help answers."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mage_ds import cli, recipes
from mage_ds.errors import Stopped, UserError

VERBS = ("prepare", "train", "sample", "evaluate", "recipes")


def parameters(module: str, function: str) -> tuple[set, set]:
    """Names of a task's parameters, and those without a default; read, since importing it would import torch."""
    tree = ast.parse(Path(cli.__file__).with_name("tasks").joinpath(f"{module}.py").read_text())
    [found] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    positional = [arg.arg for arg in found.args.args]
    required = set(positional[: len(positional) - len(found.args.defaults)])
    keyword = dict(zip([arg.arg for arg in found.args.kwonlyargs], found.args.kw_defaults, strict=True))
    others = parameters("score", "score")[0] if found.args.kwarg else set()  # **options are those of `score`
    return {*positional, *keyword, *others}, required | {name for name, default in keyword.items() if default is None}


@pytest.fixture
def calls(monkeypatch):
    """Tasks are recorded instead of run; what they are given must be what their source asks for."""
    found = []

    def task(module, function, **given):
        names, required = parameters(module, function)
        assert required <= set(given) <= names
        found.append((module, function, given))

    monkeypatch.setattr(cli, "_task", task)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return found


def mistake(capsys, *argv) -> str:
    """The one line that this command line ends with."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mage-ds: error: ") and err.count("\n") == 1
    return err


# ---- help


@pytest.mark.parametrize("argv", [[], *([verb] for verb in VERBS), ["--local_rank=0", "train"]])
def test_help_is_quick_and_imports_no_torch(argv):
    heavy = "('torch', 'deepspeed', 'nvidia', 'timm', 'sklearn', 'matplotlib', 'PIL', 'scipy')"
    code = (
        "import sys; from mage_ds.cli import main\n"
        f"try: main({[*argv, '--help']})\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"assert not [name for name in {heavy} if name in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if argv:
        assert "example:\n  mage-ds " in done.stdout
    else:
        assert all(verb in done.stdout for verb in VERBS)


def test_recipes_imports_no_torch_and_module_runs():
    code = "import sys; from mage_ds.cli import main; main(['recipes']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-m", "mage_ds", "frobnicate"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("mage-ds: error: ") and done.stderr.count("\n") == 1
    assert "prepare" in done.stderr


# ---- arguments


def test_train(calls):
    line = (
        "--local_rank=1 train pretrain_vit_base batch=4 duration.steps=2 --deepspeed_config zero2 "
        "--tokenizer random --data P seed=5 --out R --precision float32 report.keep=1 --micro-batch 2"
    )
    assert cli.main(line.split()) == 0
    [(module, function, given)] = calls
    assert (module, function) == ("pretrain", "pretrain")
    recipe = given.pop("recipe")
    assert given == {
        "data": "P",
        "tokenizer": "random",
        "init": None,
        "out": "R",
        "deepspeed_config": "zero2",
        "resume": "auto",
        "extend": False,
    }
    assert (recipe.batch, recipe.seed, recipe.report.keep) == (4, 5, 1)
    assert recipe.duration.model_dump() == {"steps": 2}
    assert (recipe.machine.precision, recipe.machine.micro_batch) == ("float32", 2)


def test_train_tokenizer(calls):
    assert cli.main(["train", "digits_tokenizer", "--data", "P", "--out", "R", "--resume", "never", "--extend"]) == 0
    [(module, function, given)] = calls
    assert (module, function) == ("train_tokenizer", "train_tokenizer")
    recipe = given.pop("recipe")
    expected = {"data": "P", "out": "R", "deepspeed_config": None, "resume": "never", "extend": True, "init": None}
    assert given == expected
    assert recipe == recipes.load_recipe("digits_tokenizer")


def test_init(calls, capsys):
    assert cli.main(["train", "tokenizer_finetune", "--data", "P", "--out", "R", "--init", "T"]) == 0
    assert calls.pop()[2]["init"] == "T"
    assert cli.main(["train", "digits_mage", "--data", "P", "--tokenizer", "T", "--out", "R", "--init", "M"]) == 2
    assert (
        "--init M: only a tokenizer and a classifier begin with given weights" in capsys.readouterr().err and not calls
    )
    assert cli.main(["train", "digits_class_conditional", "--data", "P", "--out", "R", "--init", "M"]) == 0
    assert (calls[0][0], calls[0][2]["init"], calls[0][2]["tokenizer"]) == ("pretrain", "M", None)


@pytest.mark.parametrize("front", [["--local_rank=3"], ["--local_rank", "3"], ["--local-rank=3"], []])
def test_other_verbs(calls, front):
    for line in (
        "sample R --num 3 --out D --temperature 0 --threads 2 --round --class-label 0..9 --order halton --format npz",
        "edit R a.png b.png --region inpaint:1,2,3,4 --region m.png --out D --composite --feather 4 --class-label 2,0",
        "evaluate D --reference P --run R",
        "evaluate T --data P --against Q --lpips-weights F --out E",
        "tokenize --data P --tokenizer T --out K --recipe digits_mage --views 4 --augmentation weak --batch 8",
        "bench tokens digits_mage seed=1 --data P --images 4",
        "prepare --sample photos --out P",
        "prepare S --out P --val-fraction 0.25 --verify full",
        "recipes digits_mage",
        "recipes",
    ):
        assert cli.main([*front, *line.split()]) == 0
    sample = {"run": "R", "num": 3, "out": "D", "steps": None, "temperature": 0.0, "seed": 0, "batch": None}
    sample |= {"checkpoint": None, "threads": 2, "round": True, "tokenizer": None, "class_label": "0..9"}
    sample |= {"token_temperature": None, "order": "halton", "drop": None, "guidance": None, "guidance_schedule": None}
    sample |= {"format": "npz", "precision": "float32", "movie": False, "weights": None}
    edit = {"run": "R", "pictures": ["a.png", "b.png"], "region": ["inpaint:1,2,3,4", "m.png"], "out": "D"}
    edit |= {"tokenizer": None, "variants": 4, "class_label": "2,0", "seed": 0, "composite": True, "feather": 4}
    edit |= {"show_mask": False, "steps": None, "temperature": None, "guidance": None, "batch": None}
    edit |= {"token_temperature": None, "order": None, "guidance_schedule": None, "precision": "float32"}
    edit |= {"checkpoint": None}
    evaluate = {"source": "D", "reference": "P", "run": "R"}
    fitness = {"tokenizer": "T", "data": "P", "against": "Q", "lpips_weights": "F", "out": "E"}
    tokens = {"data": "P", "tokenizer": "T", "out": "K", "recipe": "digits_mage", "views": 4, "augmentation": "weak"}
    tokens |= {"batch": 8, "precision": "auto"}
    bench = {"name": "digits_mage", "overrides": ["seed=1"], "data": "P", "images": 4, "samples": 100000, "where": "."}
    photos = {"src": None, "sample": "photos", "out": "P", "val_fraction": None, "verify": "quick"}
    own = {"src": "S", "sample": None, "out": "P", "val_fraction": 0.25, "verify": "full"}
    assert calls == [
        ("sample", "sample", sample),
        ("edit", "edit", edit),
        ("evaluate", "evaluate", evaluate),
        ("evaluate_tokenizer", "evaluate_tokenizer", fitness),
        ("tokenize", "tokenize", tokens),
        ("bench_tokens", "tokens", bench),
        ("prepare", "prepare", photos),
        ("prepare", "prepare", own),
        ("inspect", "recipes", {"name": "digits_mage"}),
        ("inspect", "recipes", {"name": None}),
    ]


def test_evaluations(calls):
    """What is given says which one is meant; what is not given is left to the task."""
    for line in (
        "evaluate M --reference P --features run:M -n 9 --seed 0 --temperature 0 --round --out E --keep K",
        "evaluate D --reference S.npz --inception F --metrics fid,is",
        "evaluate M --reference P --metrics fid_infinity --features timm:resnet18 --per-class 50 --definition adm",
        "evaluate --make-reference P --inception F --size 32 --out S.npz",
        "evaluate --replay results.json --out E",
        "evaluate R --reference P --inception F --watch --every 500 --patience 1.5 --num 9",
    ):
        assert cli.main(line.split()) == 0
    drawn = {"source": "M", "reference": "P", "features": "run:M", "num": 9, "seed": 0, "temperature": 0.0}
    balanced = {"source": "M", "reference": "P", "metrics": ["fid_infinity"], "features": "timm:resnet18"}
    assert calls == [
        ("score", "score", drawn | {"round": True, "out": "E", "keep": "K"}),
        ("score", "score", {"source": "D", "reference": "S.npz", "inception": "F", "metrics": ["fid", "is"]}),
        ("score", "score", balanced | {"per_class": 50, "definition": "adm"}),
        ("score", "make_reference", {"data": "P", "inception": "F", "size": 32, "out": "S.npz"}),
        ("score", "replay", {"results": "results.json", "out": "E"}),
        (
            "score_watch",
            "watch",
            {"source": "R", "reference": "P", "inception": "F", "every": 500, "patience": 1.5, "num": 9},
        ),
    ]


def test_what_the_help_repeats():
    """Names that the parser says without importing what they are from."""
    from mage_ds import arguments
    from mage_ds.evaluation import features, figures
    from mage_ds.tasks import evaluate

    assert arguments.INCEPTION == features.FILE
    assert (*evaluate.METRICS, "top1", *figures.METRICS) == arguments._METRICS


# ---- mistakes

TRAIN = "train pretrain_vit_base --data P --out R"


@pytest.mark.parametrize(
    "line, parts",
    [
        ("", ["VERB"]),
        ("trian", ["trian", "train"]),
        ("train digits_mage", ["--data", "--out", "mage-ds train --help"]),
        ("train digits_tokenizer --data P --out R --tokenizer T", ["--tokenizer T", "digits_tokenizer"]),
        (f"{TRAIN} --tokenizer random --batch 4", ["--batch"]),
        (f"{TRAIN} --tokenizer random --extend batc=4", ["did you mean batch?"]),
        (f"{TRAIN} --tokenizer random 4", ["4: an override is key=value"]),
        (f"{TRAIN} --tokenizer random --precision fp16", ["machine.precision = fp16", "auto, bf16, float32"]),
        (f"{TRAIN} --tokenizer random --micro-batch 0", ["machine.micro_batch = 0", "at least 1"]),
        ("train digits --data P --out R", ["recipe digits", "did you mean digits_mage?"]),
        ("sample R --out D", ["--num"]),
        ("sample R --num 0 --out D", ["--num: 0", "at least 1"]),
        ("sample R --num many --out D", ["--num: many", "whole number"]),
        ("sample R --num 1 --out D --temperature -1", ["--temperature"]),
        ("sample R --num 1 --out D --temperature nan", ["--temperature: nan", "at least 0"]),
        ("sample R S --num 1 --out D", ["unrecognized arguments: S"]),
        ("edit R a.png --out D", ["--region"]),
        ("edit R --region inpaint --out D", ["PICTURE"]),
        ("edit R a.png --region inpaint --out D --variants 0", ["--variants: 0", "at least 1"]),
        ("evaluate D", ["--reference", "--data"]),
        ("evaluate D --reference P --data P", ["--reference", "--data"]),
        ("evaluate T --data P --run R", ["--run goes with --reference", "leave it out"]),
        ("evaluate T --data P --metrics readable", ["--metrics goes with --reference"]),
        ("evaluate D --reference P --against Q", ["--against goes with --data"]),
        ("evaluate D --reference P --lpips-weights F", ["--lpips-weights goes with --data"]),
        ("evaluate --reference P", ["give a SOURCE", "--reference"]),
        ("evaluate R --reference P --inception F --watch --checkpoint 5", ["--checkpoint goes with", "--watch"]),
        ("evaluate R --reference P --inception F --every 5", ["--every goes with --reference with --watch"]),
        ("evaluate R --reference P --watch --every 0", ["--every: 0", "at least 1"]),
        ("evaluate D --reference P --num 5", ["--num goes with --reference with --inception or --features"]),
        ("evaluate D --reference P --run R --features run:M", ["--run goes with --reference, not with"]),
        ("evaluate D --replay results.json", ["SOURCE goes with --reference, not with --replay"]),
        ("evaluate D --make-reference P --out S.npz", ["SOURCE goes with", "not with --make-reference"]),
        ("evaluate D --reference P --per-class 0", ["--per-class: 0"]),
        ("evaluate D --reference P --metrics readable,fidd", ["--metrics: fidd", "one of readable"]),
        ("prepare --sample emojis", ["--sample", "digits", "photos"]),
        ("prepare S --out P --val-fraction 2", ["--val-fraction: 2", "from 0 to 1"]),
        ("recipes nothing_like_it", ["nothing_like_it", "digits_mage"]),
    ],
)
def test_mistakes(line, parts, calls, capsys, monkeypatch):
    if line.startswith("recipes"):
        monkeypatch.undo()
    message = mistake(capsys, *line.split())
    for part in parts:
        assert part in message
    assert calls == []


# ---- how it ends


def ending(monkeypatch, error: BaseException, *, world=None, debug=False):
    def task(*_, **__):
        raise error

    monkeypatch.setattr(cli, "_task", task)
    for name, value in (("WORLD_SIZE", world), ("MAGE_DS_DEBUG", "1" if debug else None)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    return cli.main(["recipes"])


def test_exit_codes(monkeypatch, capsys):
    assert ending(monkeypatch, UserError("data P: no pictures")) == 2
    assert capsys.readouterr().err == "mage-ds: error: data P: no pictures\n"
    assert ending(monkeypatch, Stopped("step 7")) == 75
    assert ending(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""
    assert ending(monkeypatch, UserError("odd"), debug=True) == 2
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(RuntimeError):  # a bug is not swallowed
        ending(monkeypatch, RuntimeError("planted"))


def test_a_bug_keeps_its_traceback():
    code = (
        "import sys; from mage_ds import cli\n"
        "def task(*_, **__): raise RuntimeError('planted')\n"
        "cli._task = task; sys.exit(cli.main(['recipes']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: planted" in done.stderr


def test_several_ranks_leave_the_choice_of_the_speaker_to_the_engine(monkeypatch, capsys):
    said = []
    process = SimpleNamespace(say_error=said.append)
    monkeypatch.setitem(sys.modules, "mage_ds.engine", SimpleNamespace(process=process))
    monkeypatch.setitem(sys.modules, "mage_ds.engine.process", process)
    assert ending(monkeypatch, UserError("data P: no pictures"), world="2") == 2
    assert said == ["data P: no pictures"]
    assert capsys.readouterr().err == ""
    assert ending(monkeypatch, UserError("data P: no pictures"), world="1") == 2
    assert len(said) == 1


# ---- recipes


def test_recipes(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("COLUMNS", "160")  # what is shown is as wide as the terminal
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    from mage_ds import recipes

    for name in recipes.recipe_names():
        assert recipes.load_recipe(name).description in listed
        assert cli.main(["recipes", name]) == 0
        shown = capsys.readouterr().out
        for leaf in recipes.load_recipe(name).leaves():
            row = next(line for line in shown.splitlines() if line.startswith(f"{leaf.key} "))
            assert f" {leaf.kind} " in row
            assert leaf.meaning.split()[0] in row
    assert f"{'duration':34}".strip() in shown and "500000 steps" in shown  # the last one is of the paper
    assert "Learning rate in force: 0.001152" in shown
