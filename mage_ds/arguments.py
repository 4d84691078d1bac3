"""What each verb of the command line takes. `cli` says what it does with it."""

import argparse
import math
from collections.abc import Callable, Sequence

_METRICS = ("readable",)


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


def prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", nargs="?", metavar="SRC", help="your folder of pictures, of class folders, or of tars")
    parser.add_argument(
        "--sample", choices=("digits", "photos", "emoji"), help="pictures of an installed package instead"
    )
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


def train(parser: argparse.ArgumentParser) -> None:
    _take_recipe(parser, "recipe")
    parser.add_argument("--data", required=True, help="folder of pictures (train/, val/), or `tokenize`'s of tokens")
    parser.add_argument("--tokenizer", metavar="PATH|random", help="a tokenizer's run folder, or random values")
    parser.add_argument("--init", metavar="PATH", help="a tokenizer whose weights a new tokenizer begins with")
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder; an existing one continues")
    parser.add_argument("--deepspeed_config", metavar="JSON|NAME", help="a JSON file or one of ds_configs/: zero2")
    parser.add_argument("--precision", metavar="auto|bf16|float32", help="as machine.precision=...")
    parser.add_argument("--micro-batch", metavar="auto|N", help="as machine.micro_batch=...")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="checkpoint to go on from (auto)")
    parser.add_argument("--extend", action="store_true", help="continue a run with another duration")


def sample(parser: argparse.ArgumentParser) -> None:
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


def evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of pictures that `sample` made; or a tokenizer")
    made = parser.add_argument_group("made pictures, beside labelled real ones")
    made.add_argument("--reference", metavar="DATA", help="folder of labelled real pictures")
    made.add_argument("--metrics", type=_some(_METRICS), metavar="LIST", help=f"of {', '.join(_METRICS)}")
    made.add_argument("--run", help="run of the samples: adds rows for its reconstructions and for copying")
    tokenizer = parser.add_argument_group("a tokenizer, on pictures of your own")
    tokenizer.add_argument("--data", metavar="DATA", help="folder of pictures to tokenize and draw again")
    tokenizer.add_argument("--against", metavar="DATA2", help="pictures that it is known to fit: does it fit DATA?")
    tokenizer.add_argument("--inception", metavar="FILE", help="Inception's weights (torch-fidelity's): adds rFID")
    tokenizer.add_argument("--lpips-weights", metavar="FILE", help="VGG-16's weights for LPIPS (torchvision's cached)")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for results.json (SOURCE; of a tokenizer: evaluated/DATA in its folder)"
    )


def export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", help="a run's folder; or an export, or a file of the authors'")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for it")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="of the weights (float32)")
    parser.add_argument(
        "--layout", choices=("ours", "official"), default="ours", help="safetensors, or one file as the authors' (ours)"
    )
    parser.add_argument("--checkpoint", type=_number(int, 0), metavar="STEP", help="which checkpoint (the newest)")
    parser.add_argument(
        "--licence", "--license", metavar="TEXT", help="for the model card, such as cc-by-4.0 (unknown)"
    )


def convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="OFFICIAL.pth", help="pre-training or fine-tuned file, or tokenizer alone")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the export")


def doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", metavar="H", help="examine its hosts, through ssh (this host)")
    parser.add_argument("--ssh_port", type=_number(int, 1, 65535), metavar="P", help="where their sshd listens (22)")
    parser.add_argument("--shared", metavar="PATH", help="folder that all hosts should see: that of your runs")
    parser.add_argument("--data", metavar="DATA", help="data set to list and decode (made pictures)")
    parser.add_argument("--json", dest="answers", action="store_true", help=argparse.SUPPRESS)  # what it runs there
    parser.add_argument("--wire", dest="rank", action="store_true", help=argparse.SUPPRESS)  # what it launches


def recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe's name, or a .yaml file")


def plan(parser: argparse.ArgumentParser) -> None:
    _take_recipe(parser)
    parser.add_argument("--gpus", type=_count, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu-memory", type=_positive, required=True, metavar="GIB", help="memory of one GPU, GiB")
    parser.add_argument("--hosts", type=_count, default=1, metavar="H", help="hosts that they are in (1)")
    parser.add_argument("--mfu", type=_number(float, 0.001, 1), metavar="M", help="used share of the peak, as measured")
    parser.add_argument("--peak", type=_positive, metavar="TFLOPS", help="of one GPU (an H100's: bf16 989, float32 67)")
    parser.add_argument("--price", type=_number(float, 0), metavar="DOLLARS", help="of an hour of one GPU")
    _take_samples(parser)


def bench_scale(parser: argparse.ArgumentParser) -> None:
    stages, choices = ("0", "1", "2", "3", "2_offload", "3_offload"), ("none", "selective", "full")
    _take_recipe(parser)
    parser.add_argument(
        "--stages", type=_some(stages), default=["1", "2", "3"], metavar="LIST", help=f"of {','.join(stages)} (1,2,3)"
    )
    parser.add_argument(
        "--checkpointing", type=_some(choices), default=list(choices), metavar="LIST", help=f"of {','.join(choices)}"
    )


def bench_listing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=_count, default=1_300_000, metavar="N", help="pictures to make (1,300,000)")
    parser.add_argument("--folders", type=_count, default=1000, metavar="N", help="class folders, or tars (1,000)")
    parser.add_argument("--dir", default=".", metavar="DIR", help="where; removed afterwards (here)")
    parser.add_argument("--tars", action="store_true", help="tars with .cls labels instead of hard links in folders")


def bench_save(parser: argparse.ArgumentParser) -> None:
    _take_recipe(parser)
    parser.add_argument("--dir", dest="where", default=".", metavar="DIR", help="disk to save on; cleaned up (here)")
    parser.add_argument("--deepspeed_config", default="zero1", metavar="JSON|NAME", help="as of `train` (zero1)")
    parser.add_argument("--images-per-s", type=_positive, metavar="R", help="of the training: how much saving takes")
    _take_samples(parser)


def tokenize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of pictures, with or without train/ and val/")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="a tokenizer's run folder")
    parser.add_argument("--out", required=True, metavar="TOKENS", help="folder for them; an unfinished one continues")
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="whose `inputs`, `seed` and precision are meant: name or .yaml file"
    )
    parser.add_argument("--views", type=_number(int, 1, 999), default=1, metavar="K", help="crops of a picture (1)")
    parser.add_argument(
        "--augmentation", choices=("strong", "weak", "none"), help="of the views (the recipe's; without one: none)"
    )
    parser.add_argument("--batch", type=_count, default=16, metavar="B", help="pictures of one forward pass (16)")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "float32"),
        default="auto",
        help="the tokenizer's (auto: the recipe's machine.precision, without a recipe as of `train`)",
    )


def bench_tokens(parser: argparse.ArgumentParser) -> None:
    _take_recipe(parser)
    parser.add_argument("--data", required=True, help="folder of pictures for the live tokenization")
    parser.add_argument("--images", type=_count, default=16, metavar="N", help="how many of them, on each rank (16)")
    parser.add_argument("--samples", type=_count, default=100_000, metavar="N", help="of the cache (100,000)")
    parser.add_argument("--dir", dest="where", default=".", metavar="DIR", help="where it lies; cleaned up (here)")


def checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
