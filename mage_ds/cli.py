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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; an unexpected exception keeps its traceback (exit code 1)."""
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


def _run(argv: list[str]) -> None:
    parser = _Parser(
        prog="mage-ds",
        description=mage_ds.__doc__.split("\n", 1)[0],
        epilog="verbs:\n" + "\n".join(f"  {name:9} {verb.summary}" for name, verb in _VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=mage_ds.__version__)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("verb", choices=_VERBS, metavar="VERB", help="see below; each has its own --help")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    top = parser.parse_args(argv)
    verb = _VERBS[top.verb]
    parser = _Parser(
        prog=f"mage-ds {top.verb}",
        description=verb.summary,
        epilog=f"example:\n{verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.arguments(parser)
    verb.call(parser.parse_intermixed_args(top.rest))


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


_count = _number(int, 1)


def _metrics(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in _METRICS:
            raise argparse.ArgumentTypeError(f"{name}: must be one of {', '.join(_METRICS)}")
    return names


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", nargs="?", metavar="SRC", help="your folder of pictures, or of class folders")
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
    parser.add_argument("recipe", metavar="RECIPE", help="a name that `mage-ds recipes` lists, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe to change")
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
        "--metrics", type=_metrics, default=["readable"], metavar="LIST", help=f"of {', '.join(_METRICS)}"
    )
    parser.add_argument("--run", help="run of the samples: adds rows for its reconstructions and for copying")
    parser.add_argument("--out", metavar="DIR", help="folder for results.json (SOURCE)")


def _recipes_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe's name, or a .yaml file")


_VERBS = {
    "prepare": _Verb(
        "check a folder of pictures, and split it into train/ and val/",
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
    "recipes": _Verb(
        "list the recipes, or explain every field of one",
        "  mage-ds recipes pretrain_vit_base",
        _recipes_arguments,
        lambda args: _task("inspect", "recipes", **vars(args)),
    ),
}
