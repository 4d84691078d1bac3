"""The command line: `mage-ds VERB ...`. Each verb calls one function in tasks/, imported when it is called.

Exit codes: 0, 2 (the user can mend it), 75 (stopped by a signal after saving), 130 (interrupted), 1 (a bug).
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mage_ds
from mage_ds import arguments, bench_arguments
from mage_ds.engine import launched
from mage_ds.errors import EXIT_STOPPED, EXIT_USER, Stopped, UserError


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line leave as UserError, so that they are said like every other one."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


class _Verb(NamedTuple):
    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace], None]
    alone: bool = False  # of several ranks the first does it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; an unexpected exception keeps its traceback (exit code 1)."""
    launched.adopt()
    try:
        _run(sys.argv[1:] if argv is None else list(argv))
        return 0
    except UserError as error:
        if os.environ.get("MAGE_DS_DEBUG") == "1":
            traceback.print_exc()
        _say(str(error))
        return EXIT_USER
    except Stopped:
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return 130


def entry() -> None:
    """The process's way in and out: `mage-ds` and `python -m mage_ds`."""
    code = main()
    if _several() and "mage_ds.engine.process" in sys.modules:  # a rank that never joined the others just ends
        from mage_ds.engine import process

        process.leave(code)
    sys.exit(code)


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class _Group(NamedTuple):
    """A verb of several words: `mage-ds bench WHAT`."""

    summary: str
    verbs: dict[str, _Verb]


def _run(argv: list[str]) -> None:
    prog, verb, rest = "mage-ds", _Group(mage_ds.__doc__.split("\n", 1)[0], _VERBS), argv
    while isinstance(verb, _Group):
        word, rest = _choose(prog, verb, rest)
        prog, verb = f"{prog} {word}", verb.verbs[word]
    parser = _Parser(
        prog=prog,
        description=verb.summary,
        epilog=f"example:\n{verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.arguments(parser)
    if not verb.alone or os.environ.get("RANK", "0") == "0":
        verb.call(parser.parse_intermixed_args(rest))


def _choose(prog: str, group: _Group, argv: list[str]) -> tuple[str, list[str]]:
    parser = _Parser(
        prog=prog,
        description=group.summary,
        epilog="verbs:\n" + "\n".join(f"  {name:11} {verb.summary}" for name, verb in group.verbs.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=mage_ds.__version__)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("verb", choices=group.verbs, metavar="VERB", help="see below; each has its own --help")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    top = parser.parse_args(argv)
    return top.verb, top.rest


def _say(message: str) -> None:
    if _several():
        from mage_ds.engine import process  # knows which rank speaks

        process.say_error(message)
    else:
        print(f"mage-ds: error: {message}", file=sys.stderr)


def _task(module: str, function: str, **arguments) -> None:
    getattr(importlib.import_module(f"mage_ds.tasks.{module}"), function)(**arguments)


def _train(args: argparse.Namespace) -> None:
    from mage_ds.recipes import load_recipe

    flags = {"machine.precision": args.precision, "machine.micro_batch": args.micro_batch}
    overrides = [*args.overrides, *(f"{key}={value}" for key, value in flags.items() if value is not None)]
    recipe = load_recipe(args.recipe, overrides)
    names = ("data", "out", "deepspeed_config", "resume", "extend")
    common = {"recipe": recipe, **{name: getattr(args, name) for name in names}}
    if recipe.task == "tokenizer":
        if args.tokenizer:
            raise UserError(f"--tokenizer {args.tokenizer}: recipe {args.recipe} trains a tokenizer, it takes none")
        _task("train_tokenizer", "train_tokenizer", init=args.init, **common)
    elif recipe.task == "classify":
        _task("classify", "classify", tokenizer=args.tokenizer, init=args.init, **common)
    elif args.init and recipe.model.classes is None:
        raise UserError(
            f"--init {args.init}: only a tokenizer and a classifier begin with given weights, and a model with classes "
            f"(model.classes) has a given encoder; {args.recipe} trains a whole MAGE: leave it out"
        )
    else:
        _task("pretrain", "pretrain", tokenizer=args.tokenizer, init=args.init, **common)


_FIGURES = ("metrics", "inception", "features", "definition", "kid_subset", "neighbours", "num", "per_class", "keep")
_FIGURES += ("tokenizer", "class_label", "seed", "precision", "checkpoint", "weights", "round", "steps", "temperature")
_FIGURES += ("data", "token_temperature", "order", "drop", "guidance", "guidance_schedule", "batch", "threads")
_LATER = tuple(name for name in _FIGURES if name not in ("keep", "checkpoint", "data"))


class _Evaluation(NamedTuple):
    """One of the things that `evaluate` does. task: module and function; beside: options that may stand beside what
    says that it is meant; called: what the function calls an option otherwise."""

    task: tuple[str, str]
    beside: tuple[str, ...]
    called: dict[str, str] = {}  # noqa: RUF012 (never changed)


_TOP1 = "reference with --metrics top1"
_BY_FEATURES, _WATCH = "reference with --inception or --features", "reference with --watch"
_VERSUS, _SWEEP = "reference with --versus", "reference with --sweep"
_UNPAIRED = ("definition", "kid_subset", "neighbours", "per_class", "keep", "data")
_EVALUATIONS = {  # by what says which one is meant
    "reference": _Evaluation(("evaluate", "evaluate"), ("source", "metrics", "run")),
    "data": _Evaluation(
        ("evaluate_tokenizer", "evaluate_tokenizer"),
        ("source", "against", "inception", "lpips_weights"),
        {"source": "tokenizer"},
    ),
    _TOP1: _Evaluation(
        ("evaluate_classifier", "evaluate_classifier"),
        ("source", "tokenizer", "checkpoint", "weights", "precision", "batch", "threads"),
    ),
    _BY_FEATURES: _Evaluation(("score", "score"), ("source", *_FIGURES)),
    _WATCH: _Evaluation(("score_watch", "watch"), ("source", "every", "patience", *_LATER)),
    _VERSUS: _Evaluation(
        ("score_versus", "versus"), ("source", "versus", *(name for name in _FIGURES if name not in _UNPAIRED))
    ),
    _SWEEP: _Evaluation(
        ("score_sweep", "sweep"),
        ("source", "sweep", *(name for name in _FIGURES if name not in ("keep", "data"))),
    ),
    "make-reference": _Evaluation(
        ("score", "make_reference"),
        ("inception", "features", "size", "batch", "threads"),
        {"make_reference": "data"},
    ),
    "replay": _Evaluation(("score", "replay"), (), {"replay": "results"}),
}


def _evaluate(args: argparse.Namespace) -> None:
    """Several things have one verb, because all say how good something is; what is given says which is meant."""
    given = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    mode, said = _meant(given)
    chosen = _EVALUATIONS[mode]
    for name in given:
        if name not in (*chosen.beside, said, "out"):
            where = next((each for each, other in _EVALUATIONS.items() if name in other.beside), None)
            word = "SOURCE" if name == "source" else f"--{name.replace('_', '-')}"
            where = f"goes with --{where}, not" if where else "does not go"
            raise UserError(f"{word} {where} with --{mode}; leave it out")
    if "source" in chosen.beside and "source" not in given:
        raise UserError(f"evaluate: give a SOURCE, which is measured, beside --{said}")
    _task(*chosen.task, **{chosen.called.get(name, name): value for name, value in given.items()})


def _meant(given: dict) -> tuple[str, str]:
    """The key of _EVALUATIONS, and the option that it is known by; `given` loses what only says so."""
    modes = [name for name in ("reference", "data", "make_reference", "replay") if name in given]
    if {"reference", "data"} <= {*modes}:  # reconstructions of the one beside the other
        modes.remove("data")
    if len(modes) != 1:
        raise UserError(
            "evaluate: give --reference DATA for pictures or a model that makes them, or --data DATA for a tokenizer "
            "(or --make-reference DATA, or --replay results.json, without a SOURCE)"
        )
    [said] = modes
    mode, figures = said.replace("_", "-"), set(given.get("metrics", [])) - {"readable"}
    if said == "reference" and "top1" in figures:
        if len(figures) > 1 or len(given["metrics"]) > 1:
            raise UserError("--metrics top1: is of a classifier, the others are of pictures; name it alone")
        del given["metrics"]
        mode = _TOP1
    elif said == "reference" and given.pop("watch", False):
        mode = _WATCH
    elif said == "reference" and "versus" in given:
        mode = _VERSUS
    elif said == "reference" and "sweep" in given:
        mode = _SWEEP
    elif said == "reference" and (figures or {"inception", "features"} & {*given}):
        mode = _BY_FEATURES
    return mode, said


_BENCHES = {
    "tokens": _Verb(
        "images/s of a training's input from a token cache, and with live tokenization",
        "  mage-ds bench tokens pretrain_vit_base --data work/photos --images 16",
        bench_arguments.bench_tokens,
        lambda args: _task("bench_tokens", "tokens", **vars(args)),
    ),
    "samplers": _Verb(
        "seconds a picture of each way of sampling, the used share of the peak, and what can be read",
        "  mage-ds bench samplers work/mage --num 256 --reference work/digits\n"
        "  mage-ds bench samplers work/mage --steps 20 --orders confidence --drop 0.5 --compile",
        bench_arguments.bench_samplers,
        lambda args: _task("bench_samplers", "samplers", **vars(args)),
    ),
    "metrics": _Verb(
        "the figures of `evaluate` beside torch-fidelity's on the same features, and the time of both",
        "  mage-ds bench metrics\n  mage-ds bench metrics --pictures work/digits --inception FILE",
        bench_arguments.bench_metrics,
        lambda args: _task("bench_metrics", "metrics", **vars(args)),
        alone=True,
    ),
    "listing": _Verb(
        "time and memory of opening a large data set, with and without its cache",
        "  mage-ds bench listing --dir /mnt/data",
        bench_arguments.bench_listing,
        lambda args: _task("bench_listing", "listing", **vars(args)),
        alone=True,
    ),
    "save": _Verb(
        "seconds that a checkpoint takes, and its share of the training time",
        "  mage-ds bench save pretrain_vit_base --images-per-s 4000 --dir /mnt/runs",
        bench_arguments.bench_save,
        lambda args: _task("bench_save", "save", **vars(args)),
    ),
    "scale": _Verb(
        "memory by kind and images/s of real steps, beside what `plan` says",
        "  deepspeed --num_accelerators 2 --module mage_ds bench scale pretrain_vit_base machine.micro_batch=2 \\\n"
        "      --stages 1,2,3 --checkpointing none,full",
        bench_arguments.bench_scale,
        lambda args: _task("bench", "scale", **vars(args)),
    ),
}

_VERBS = {
    "prepare": _Verb(
        "check a folder of pictures or tars, and split it into train/ and val/",
        "  mage-ds prepare --sample digits --out work/digits\n"
        "  mage-ds prepare ~/pictures --out work/mine --val-fraction 0.1",
        arguments.prepare,
        lambda args: _task("prepare", "prepare", **vars(args)),
    ),
    "train": _Verb(
        "train by a recipe: a tokenizer, a MAGE or its decoder that takes labels, a classifier",
        "  mage-ds train digits_tokenizer --data work/digits --out work/tokenizer\n"
        "  mage-ds train digits_probe --data work/digits --init work/mage --out work/probe\n"
        "  deepspeed --module mage_ds train pretrain_vit_base batch=1024 duration.epochs=400 \\\n"
        "      --data IMAGENET --tokenizer TOKENIZER --out work/vit_base --deepspeed_config zero2",
        arguments.train,
        _train,
    ),
    "sample": _Verb(
        "make pictures with a trained MAGE",
        "  mage-ds sample work/mage --num 256 --out work/samples\n"
        "  deepspeed --module mage_ds sample work/mage -n 50000 --out work/samples",
        arguments.sample,
        lambda args: _task("sample", "sample", **vars(args)),
    ),
    "edit": _Verb(
        "fill regions of pictures anew: inpaint, outpaint, uncrop, or a mask's",
        "  mage-ds edit work/mage photo.jpg --region inpaint --out work/edited\n"
        "  mage-ds edit work/mage a.png b.png --region uncrop:0.4 --region mask_of_b.png --composite --feather 8 \\\n"
        "      --out work/edited",
        arguments.edit,
        lambda args: _task("edit", "edit", **vars(args)),
        alone=True,
    ),
    "evaluate": _Verb(
        "FID and other figures of a model or of pictures, accuracy of a classifier, or how well a tokenizer draws",
        "  mage-ds evaluate work/mage --reference work/digits --features run:work/mage --num 5000 --out work/score\n"
        "  deepspeed --module mage_ds evaluate RUN --reference IMAGENET/val --inception FILE --out work/score\n"
        "  mage-ds evaluate --make-reference IMAGENET/val --inception FILE --out work/imagenet_256.npz\n"
        "  mage-ds evaluate --replay work/score/results.json\n"
        "  mage-ds evaluate work/mage --reference work/digits --features run:work/other --num 5000 --watch\n"
        "  mage-ds evaluate work/mage --reference work/digits --features run:work/mage --sweep steps=8,12,16\n"
        "  mage-ds evaluate work/mage --reference work/digits --features run:work/mage --versus steps=8 temperature=3\n"
        "  mage-ds evaluate work/samples --reference work/digits --metrics readable --run work/mage\n"
        "  mage-ds evaluate work/probe --reference work/digits --metrics top1\n"
        "  mage-ds evaluate work/tokenizer --data ~/pictures --against work/digits",
        arguments.evaluate,
        _evaluate,
    ),
    "fewshot": _Verb(
        "accuracy with a few labelled pictures a class, of several models on several data sets: a table and a plot",
        "  mage-ds fewshot work/mage --data work/digits --out work/fewshot\n"
        "  deepspeed --module mage_ds fewshot RUN mae:mae_pretrain_vit_large.pth --data FOOD101 PETS --out work/fig2",
        arguments.fewshot,
        lambda args: _task("fewshot", "fewshot", **vars(args)),
    ),
    "sweep": _Verb(
        "make a table of the paper: all its trainings and measurements, and the table beside the published one",
        "  mage-ds sweep table8 --scale digits --out work/table8\n"
        "  mage-ds sweep table6 --data IMAGENET --tokenizer TOKENIZER --inception FILE --out work/paper --slurm\n"
        "  mage-ds sweep table6 --out work/paper --table",
        arguments.sweep,
        lambda args: _task("sweep", "sweep", **vars(args)),
        alone=True,
    ),
    "export": _Verb(
        "write a trained model as safetensors with a model card, or in the authors' layout",
        "  mage-ds export work/mage --out work/handed_on --dtype bf16 --licence cc-by-4.0\n"
        "  mage-ds export work/mage --out work/theirs --layout official",
        arguments.export,
        lambda args: _task("export", "export", **vars(args)),
        alone=True,
    ),
    "convert": _Verb(
        "write a checkpoint of the authors as an export",
        "  mage-ds convert mage-vitb-1600.pth --out work/vit_base",
        arguments.convert,
        lambda args: _task("export", "convert", **vars(args)),
        alone=True,
    ),
    "tokenize": _Verb(
        "make a token cache of a data set, for trainings that read it instead",
        "  mage-ds tokenize --data work/digits --tokenizer work/tokenizer --out work/tokens\n"
        "  deepspeed --module mage_ds tokenize --data IMAGENET --tokenizer TOKENIZER --out TOKENS \\\n"
        "      --recipe pretrain_vit_base --views 10 --batch 128",
        arguments.tokenize,
        lambda args: _task("tokenize", "tokenize", **vars(args)),
    ),
    "checkpoints": _Verb(
        "list the checkpoints of a run, and see whether they are whole",
        "  mage-ds checkpoints work/mage --verify",
        arguments.checkpoints,
        lambda args: _task("inspect", "checkpoints", **vars(args)),
        alone=True,
    ),
    "doctor": _Verb(
        "see whether this host, or all of a hostfile, can train",
        "  mage-ds doctor\n  mage-ds doctor --hostfile hostfile --shared /mnt/runs --data /mnt/imagenet",
        arguments.doctor,
        lambda args: _task("doctor", "doctor", **vars(args)),
    ),
    "plan": _Verb(
        "memory, time, cost and the command of a training, before it is started",
        "  mage-ds plan pretrain_vit_huge --gpus 64 --gpu-memory 80 --hosts 8 --price 2.5",
        arguments.plan,
        lambda args: _task("plan", "plan", **vars(args)),
        alone=True,
    ),
    "bench": _Group("measure the system itself", _BENCHES),
    "recipes": _Verb(
        "list the recipes, or explain every field of one",
        "  mage-ds recipes pretrain_vit_base",
        arguments.recipes,
        lambda args: _task("inspect", "recipes", **vars(args)),
        alone=True,
    ),
}
