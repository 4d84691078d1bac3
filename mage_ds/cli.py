"""The command line: `mage-ds VERB ...`. Each verb calls one function in tasks/, imported when it is called.

Exit codes: 0, 2 (the user can mend it), 75 (stopped by a signal after saving), 130 (interrupted), 1 (a bug).
"""

import argparse
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mage_ds
from mage_ds.engine import launched
from mage_ds.errors import EXIT_STOPPED, EXIT_USER, Stopped, UserError

_METRICS = ("readable",)


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


def _number(kind: type, low: float, high: float | None = None) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value < math.inf or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high:,}"
            noun = "whole number" if kind is int else "finite number"
            raise argparse.ArgumentTypeError(f"{text}: must be a {noun} {limits}")
        return value

    return parse


_count, _positive = _number(int, 1), _number(float, 1e-9)


def _some(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: a list of known names, with commas."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name}: must be one of {', '.join(known)}")
        return text.split(",")

    return parse


def _take_recipe(parser: argparse.ArgumentParser, called: str = "name") -> None:
    parser.add_argument(called, metavar="RECIPE", help="a name that `mage-ds recipes` lists, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe to change")


def _take_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", type=_count, default=1_281_167, metavar="N", help="pictures of the data set (ImageNet-1K's)"
    )


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", nargs="?", metavar="SRC", help="your folder of pictures, of class folders, or of tars")
    parser.add_argument("--sample", choices=("digits", "photos"), help="pictures of an installed package instead")
    parser.add_argument("--out", metavar="DATA", help="folder for the good pictures; without it SRC is only checked")
    parser.add_argument(
        "--val-fraction",
        type=_number(float, 0, 1),
        metavar="F",
        help="share that goes to val/, by path hash",
    )
    parser.add_argument(
        "--verify",
        choices=("quick", "full"),
        default="quick",
        help="look at each file's ends (quick) or decode it (full)",
    )


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _take_recipe(parser, "recipe")
    parser.add_argument("--data", required=True, help="folder of pictures, with or without train/ and val/")
    parser.add_argument("--tokenizer", metavar="PATH|random", help="a tokenizer's run folder, or random values")
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder; an existing one continues")
    parser.add_argument("--deepspeed_config", metavar="JSON|NAME", help="a JSON file or one of ds_configs/: zero2")
    parser.add_argument("--precision", metavar="auto|bf16|float32", help="as machine.precision=...")
    parser.add_argument("--micro-batch", metavar="auto|N", help="as machine.micro_batch=...")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="checkpoint to go on from (auto)")
    parser.add_argument("--extend", action="store_true", help="continue a run with another duration")


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
        _task("train_tokenizer", "train_tokenizer", **common)
    else:
        _task("pretrain", "pretrain", tokenizer=args.tokenizer, **common)


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder of a MAGE's run")
    # -n: the launcher of DeepSpeed takes --num for one of its own options (before Python 3.12).
    parser.add_argument(
        "-n", "--num", type=_count, required=True, metavar="N", help="pictures to make: index 0 to N - 1"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for them; an unfinished one continues")
    parser.add_argument("--steps", type=_count, metavar="T", help="decoding iterations (the recipe's)")
    parser.add_argument(
        "--temperature", type=_number(float, 0), metavar="TAU", help="noise of the choice (the recipe's)"
    )
    parser.add_argument("--seed", type=_number(int, 0), default=0, help="start of the noise (0)")
    parser.add_argument(
        "--batch", type=_count, metavar="B", help="pictures computed together (what DIR was begun with; else 64)"
    )
    parser.add_argument("--checkpoint", type=_number(int, 0), metavar="STEP", help="which checkpoint (the newest)")
    parser.add_argument(
        "--threads", type=_number(int, 1, 1024), default=1, metavar="N", help="CPU threads of one process (1)"
    )
    parser.add_argument("--round", action="store_true", help="round pixels (the published code truncates them)")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of pictures that `sample` made")
    parser.add_argument("--reference", required=True, metavar="DATA", help="folder of labelled real pictures")
    parser.add_argument(
        "--metrics", type=_some(_METRICS), default=["readable"], metavar="LIST", help=f"of {', '.join(_METRICS)}"
    )
    parser.add_argument("--run", help="run of the samples: adds rows for its reconstructions and for copying")
    parser.add_argument("--out", metavar="DIR", help="folder for results.json (SOURCE)")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", metavar="H", help="examine its hosts, through ssh (this host)")
    parser.add_argument("--ssh_port", type=_number(int, 1, 65535), metavar="P", help="where their sshd listens (22)")
    parser.add_argument("--shared", metavar="PATH", help="folder that all hosts should see: that of your runs")
    parser.add_argument("--data", metavar="DATA", help="data set to list and decode (made pictures)")
    parser.add_argument("--json", dest="answers", action="store_true", help=argparse.SUPPRESS)  # what it runs there
    parser.add_argument("--wire", dest="rank", action="store_true", help=argparse.SUPPRESS)  # what it launches


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe's name, or a .yaml file")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _take_recipe(parser)
    parser.add_argument("--gpus", type=_count, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu-memory", type=_positive, required=True, metavar="GIB", help="memory of one GPU, GiB")
    parser.add_argument("--hosts", type=_count, default=1, metavar="H", help="hosts that they are in (1)")
    parser.add_argument("--mfu", type=_number(float, 0.001, 1), metavar="M", help="used share of the peak, as measured")
    parser.add_argument("--peak", type=_positive, metavar="TFLOPS", help="of one GPU (an H100's: bf16 989, float32 67)")
    parser.add_argument("--price", type=_number(float, 0), metavar="DOLLARS", help="of an hour of one GPU")
    _take_samples(parser)


def _scale_arguments(parser: argparse.ArgumentParser) -> None:
    stages, choices = ("0", "1", "2", "3", "2_offload", "3_offload"), ("none", "selective", "full")
    _take_recipe(parser)
    parser.add_argument(
        "--stages", type=_some(stages), default=["1", "2", "3"], metavar="LIST", help=f"of {','.join(stages)} (1,2,3)"
    )
    parser.add_argument(
        "--checkpointing", type=_some(choices), default=list(choices), metavar="LIST", help=f"of {','.join(choices)}"
    )


def _listing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=_count, default=1_300_000, metavar="N", help="pictures to make (1,300,000)")
    parser.add_argument("--folders", type=_count, default=1000, metavar="N", help="class folders, or tars (1,000)")
    parser.add_argument("--dir", default=".", metavar="DIR", help="where; removed afterwards (here)")
    parser.add_argument("--tars", action="store_true", help="tars with .cls labels instead of hard links in folders")


def _save_arguments(parser: argparse.ArgumentParser) -> None:
    _take_recipe(parser)
    parser.add_argument("--dir", dest="where", default=".", metavar="DIR", help="disk to save on; cleaned up (here)")
    parser.add_argument("--deepspeed_config", default="zero1", metavar="JSON|NAME", help="as of `train` (zero1)")
    parser.add_argument("--images-per-s", type=_positive, metavar="R", help="of the training: how much saving takes")
    _take_samples(parser)


def _checkpoints_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--verify", action="store_true", help="read all files and compare their checksums")


_BENCHES = {
    "listing": _Verb(
        "time and memory of opening a large data set, with and without its cache",
        "  mage-ds bench listing --dir /mnt/data",
        _listing_arguments,
        lambda args: _task("bench_listing", "listing", **vars(args)),
        alone=True,
    ),
    "save": _Verb(
        "seconds that a checkpoint takes, and its share of the training time",
        "  mage-ds bench save pretrain_vit_base --images-per-s 4000 --dir /mnt/runs",
        _save_arguments,
        lambda args: _task("bench_save", "save", **vars(args)),
    ),
    "scale": _Verb(
        "memory by kind and images/s of real steps, beside what `plan` says",
        "  deepspeed --num_accelerators 2 --module mage_ds bench scale pretrain_vit_base machine.micro_batch=2 \\\n"
        "      --stages 1,2,3 --checkpointing none,full",
        _scale_arguments,
        lambda args: _task("bench", "scale", **vars(args)),
    ),
}

_VERBS = {
    "prepare": _Verb(
        "check a folder of pictures or tars, and split it into train/ and val/",
        "  mage-ds prepare --sample digits --out work/digits\n"
        "  mage-ds prepare ~/pictures --out work/mine --val-fraction 0.1",
        _prepare_arguments,
        lambda args: _task("prepare", "prepare", **vars(args)),
    ),
    "train": _Verb(
        "train a tokenizer or a MAGE by a recipe",
        "  mage-ds train digits_tokenizer --data work/digits --out work/tokenizer\n"
        "  deepspeed --module mage_ds train pretrain_vit_base batch=1024 duration.epochs=400 \\\n"
        "      --data IMAGENET --tokenizer TOKENIZER --out work/vit_base --deepspeed_config zero2",
        _train_arguments,
        _train,
    ),
    "sample": _Verb(
        "make pictures with a trained MAGE",
        "  mage-ds sample work/mage --num 256 --out work/samples\n"
        "  deepspeed --module mage_ds sample work/mage -n 50000 --out work/samples",
        _sample_arguments,
        lambda args: _task("sample", "sample", **vars(args)),
    ),
    "evaluate": _Verb(
        "measure made pictures against real ones",
        "  mage-ds evaluate work/samples --reference work/digits --metrics readable --run work/mage",
        _evaluate_arguments,
        lambda args: _task("evaluate", "evaluate", **vars(args)),
    ),
    "checkpoints": _Verb(
        "list the checkpoints of a run, and see whether they are whole",
        "  mage-ds checkpoints work/mage --verify",
        _checkpoints_arguments,
        lambda args: _task("inspect", "checkpoints", **vars(args)),
        alone=True,
    ),
    "doctor": _Verb(
        "see whether this host, or all of a hostfile, can train",
        "  mage-ds doctor\n  mage-ds doctor --hostfile hostfile --shared /mnt/runs --data /mnt/imagenet",
        _doctor_arguments,
        lambda args: _task("doctor", "doctor", **vars(args)),
    ),
    "plan": _Verb(
        "memory, time, cost and the command of a training, before it is started",
        "  mage-ds plan pretrain_vit_huge --gpus 64 --gpu-memory 80 --hosts 8 --price 2.5",
        _plan_arguments,
        lambda args: _task("plan", "plan", **vars(args)),
        alone=True,
    ),
    "bench": _Group("measure the system itself", _BENCHES),
    "recipes": _Verb(
        "list the recipes, or explain every field of one",
        "  mage-ds recipes pretrain_vit_base",
        _recipes_arguments,
        lambda args: _task("inspect", "recipes", **vars(args)),
        alone=True,
    ),
}
