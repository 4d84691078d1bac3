"""What each verb of the command line takes. `cli` says what it does with it."""

import argparse
import math
from collections.abc import Callable, Sequence

_METRICS = ("readable", "top1", "fid", "fid_infinity", "is", "kid", "prc")
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # as evaluation.features.FILE, which imports torch


def number(kind: type, low: float, high: float | None = None) -> Callable[[str], float]:
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


count, positive = number(int, 1), number(float, 1e-9)


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: a list of known names, with commas."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name}: must be one of {', '.join(known)}")
        return text.split(",")

    return parse


def each_of(parse: Callable[[str], float]) -> Callable[[str], list[float]]:
    """An argparse type: a list of what `parse` takes, with commas."""
    return lambda text: [parse(one) for one in text.split(",")]


def take_recipe(parser: argparse.ArgumentParser, called: str = "name") -> None:
    parser.add_argument(called, metavar="RECIPE", help="a name that `mage-ds recipes` lists, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe to change")


def take_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", type=count, default=1_281_167, metavar="N", help="pictures of the data set (ImageNet-1K's)"
    )


def _take_weights(parser: argparse.ArgumentParser, otherwise: str = "ema") -> None:
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help=f"of a run with optimizer.ema: the average of its weights, or what the last update left ({otherwise})",
    )


def _take_decoding(parser: argparse.ArgumentParser, drop: bool = True) -> None:
    decoding = parser.add_argument_group("decoding; without them as the model's recipe says")
    decoding.add_argument("--steps", type=count, metavar="T", help="decoding iterations")
    decoding.add_argument("--temperature", type=number(float, 0), metavar="TAU", help="noise of what stays")
    decoding.add_argument("--token-temperature", type=number(float, 0), metavar="TAU", help="of the tokens drawn")
    decoding.add_argument("--order", choices=("confidence", "halton"), help="which tokens stay first")
    if drop:
        decoding.add_argument(
            "--drop",
            type=number(float, 0, 0.999),
            metavar="F",
            help="share of the tokens left out of the encoder, early",
        )
    decoding.add_argument("--guidance", type=number(float, 0), metavar="S", help="towards the class; 0: none")
    decoding.add_argument(
        "--guidance-schedule", choices=("constant", "linear", "power-cosine"), help="the guidance over the steps"
    )


def prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", nargs="?", metavar="SRC", help="your folder of pictures, of class folders, or of tars")
    parser.add_argument(
        "--sample", choices=("digits", "photos", "emoji"), help="pictures of an installed package instead"
    )
    parser.add_argument("--out", metavar="DATA", help="folder for the good pictures; without it SRC is only checked")
    parser.add_argument(
        "--val-fraction",
        type=number(float, 0, 1),
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
    take_recipe(parser, "recipe")
    parser.add_argument("--data", required=True, help="folder of pictures (train/, val/), or `tokenize`'s of tokens")
    parser.add_argument("--tokenizer", metavar="PATH|random", help="a tokenizer's run folder, or random values")
    parser.add_argument(
        "--init",
        metavar="PATH",
        help="a tokenizer whose weights a new one begins with; a MAGE (run, export, file of the authors') whose "
        "encoder a model with classes, a probe or fine-tuning gets; with model.patch: mae:FILE, timm:NAME",
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder; an existing one continues")
    parser.add_argument("--deepspeed_config", metavar="JSON|NAME", help="a JSON file or one of ds_configs/: zero2")
    parser.add_argument("--precision", metavar="auto|bf16|float32", help="as machine.precision=...")
    parser.add_argument("--micro-batch", metavar="auto|N", help="as machine.micro_batch=...")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="checkpoint to go on from (auto)")
    parser.add_argument("--extend", action="store_true", help="continue a run with another duration")


def sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a MAGE: folder of a run or an export, or a file of the authors")
    # -n: the launcher of DeepSpeed takes --num for one of its own options (before Python 3.12).
    parser.add_argument(
        "-n", "--num", type=count, required=True, metavar="N", help="pictures to make: index 0 to N - 1"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for them; any number of processes may work on it at once"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="where RUN comes without one")
    parser.add_argument(
        "--class-label", metavar="3|0..9|1,4", help="what to show, in turn: numbers or names (all classes)"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="start of the noise (0)")
    _take_decoding(parser)
    files = parser.add_argument_group("files and machine")
    files.add_argument(
        "--format",
        choices=("png", "tar", "npz"),
        help="files, WebDataset's shards, ADM's array (png; of 10,000: tar)",
    )
    files.add_argument(
        "--batch", type=count, metavar="B", help="pictures computed together (what DIR was begun with; else 64)"
    )
    files.add_argument(
        "--precision",
        choices=("auto", "bf16", "float32"),
        default="float32",
        help="of the model; tokens are drawn in float64 (float32)",
    )
    files.add_argument(
        "--checkpoint", type=number(int, 0), metavar="STEP", help="of a run (what DIR was begun with; else the newest)"
    )
    _take_weights(files, "what DIR was begun with; else ema")
    files.add_argument(
        "--threads", type=number(int, 1, 1024), default=1, metavar="N", help="CPU threads of one process (1)"
    )
    files.add_argument("--round", action="store_true", help="round pixels (the published code truncates them)")
    files.add_argument("--movie", action="store_true", help="also film how the first pictures fill (needs ffmpeg)")


def edit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a MAGE's run folder, export or file of the authors'")
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="of any size: short side resized to the model's, centre square"
    )
    parser.add_argument(
        "--region",
        action="append",
        required=True,
        metavar="SPEC",
        help="what is filled, once for all pictures or once for each: inpaint[:x,y,w,h] (a rectangle, in pixels of the "
        "model's picture; the central half by half), outpaint[:fraction], uncrop[:fraction] (all around a centre of "
        "this share of each side; 0.5, 0.25), MASK.png (what is not black, or what is transparent; as large as the "
        "picture or the model's), alpha (where the picture itself is transparent). A token of which a pixel is to "
        "fill is drawn anew as a whole",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for results; an unfinished one continues")
    parser.add_argument("--tokenizer", metavar="PATH", help="where RUN comes without one")
    parser.add_argument("--variants", type=count, default=4, metavar="V", help="results of each picture (4)")
    parser.add_argument("--class-label", metavar="K", help="number or name: one, or one for each picture (2,0,7)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="start of the noise (0)")
    parser.add_argument("--composite", action="store_true", help="keep the original's pixels outside of the region")
    parser.add_argument(
        "--feather", type=number(int, 0), default=0, metavar="N", help="with it: blend over N pixels inwards (0)"
    )
    parser.add_argument("--show-mask", action="store_true", help="also draw which tokens a mask touches")
    _take_decoding(parser, drop=False)  # a picture's result would depend on its company
    parser.add_argument("--batch", type=count, metavar="B", help="pictures computed together (what suits the device)")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "float32"), default="float32", help="of the model (float32)"
    )
    parser.add_argument("--checkpoint", type=number(int, 0), metavar="STEP", help="of a run (the newest)")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Nothing has a default here: what is given says what is meant (see cli)."""
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a MAGE, pictures (a folder, tars, npz); or a tokenizer"
    )
    made = parser.add_argument_group("pictures, or a MAGE that draws them, beside real ones")
    made.add_argument(
        "--reference", metavar="DATA|NPZ", help="real pictures (train/ where there is one), or statistics of them"
    )
    made.add_argument(
        "--metrics",
        type=some_of(_METRICS),
        metavar="LIST",
        help=f"of {', '.join(_METRICS)} (default: readable; with --features: fid,kid,prc; with --inception: "
        "fid,is,kid,prc); top1: of a classifier as SOURCE, on val/",
    )
    made.add_argument("--inception", metavar="FILE", help=f"Inception's weights: {INCEPTION}, of torch-fidelity")
    made.add_argument(
        "--features", metavar="timm:NAME[:FILE]|run:PATH", help="another extractor: a model of timm, or a MAGE"
    )
    made.add_argument("--run", help="with readable: run of the samples: adds rows for its reconstructions and copies")
    made.add_argument("--definition", choices=("torch-fidelity", "adm"), help="whose IS splits, precision and recall")
    made.add_argument("--kid-subset", type=number(int, 2), metavar="N", help="pictures of a subset of KID (1000)")
    made.add_argument(
        "--neighbours",
        choices=("auto", "on", "off"),
        help="look for copies, and for the best and worst (auto: where the reference has 100,000 pictures at most)",
    )
    drawn = parser.add_argument_group("of a MAGE as SOURCE; its pictures are drawn, looked at and thrown away")
    drawn.add_argument(
        "-n", "--num", type=count, metavar="N", help="pictures: index 0 to N - 1 (50,000; of files: all)"
    )
    drawn.add_argument(
        "--per-class", type=count, metavar="N", help="so many of each class instead, and ADM's definitions (ADM: 50)"
    )
    drawn.add_argument("--keep", metavar="DIR", help="also write them there, as `sample` does")
    drawn.add_argument("--tokenizer", metavar="PATH", help="where SOURCE comes without one")
    drawn.add_argument("--class-label", metavar="3|0..9|1,4", help="as of `sample` (all classes, in turn)")
    drawn.add_argument("--seed", type=number(int, 0), help="start of the noise (0)")
    drawn.add_argument("--precision", choices=("auto", "bf16", "float32"), help="of the MAGE (float32)")
    drawn.add_argument("--checkpoint", type=number(int, 0), metavar="STEP", help="of a run (the newest)")
    _take_weights(drawn)
    drawn.add_argument("--round", action="store_true", help="round pixels (the published code truncates them)")
    _take_decoding(parser)
    drawn.add_argument(
        "--sweep",
        nargs="+",
        metavar="KEY=V,V",
        help="every combination of these settings, such as steps=8,12,20 temperature=3,6,9: a table and a plot",
    )
    drawn.add_argument(
        "--versus",
        nargs="+",
        metavar="RUN2|KEY=VALUE",
        help="is this one better? Another MAGE, or the same with checkpoint=300 or steps=8 temperature=3: as many "
        "pictures as it takes to tell, N of each at most",
    )
    beside = parser.add_argument_group("of a MAGE in training as SOURCE, or one to come")
    beside.add_argument(
        "--watch",
        action="store_true",
        help="evaluate its newest checkpoint whenever there is one, until the training has ended: figures go to its "
        "tensorboard and metrics.jsonl, and to OUT (RUN/evaluated/watch)",
    )
    beside.add_argument("--every", type=count, metavar="STEPS", help="only at multiples of it, and the last (all)")
    beside.add_argument(
        "--patience", type=number(float, 0), metavar="HOURS", help="wait so long for a sign of life of it (24)"
    )
    tokenizer = parser.add_argument_group("a tokenizer, on pictures of your own (with --inception: rFID)")
    tokenizer.add_argument(
        "--data",
        metavar="DATA",
        help="pictures to tokenize and draw again; beside --reference: reconstructions of which that is measured",
    )
    tokenizer.add_argument("--against", metavar="DATA2", help="pictures that it is known to fit: does it fit DATA?")
    tokenizer.add_argument("--lpips-weights", metavar="FILE", help="VGG-16's weights for LPIPS (torchvision's cached)")
    other = parser.add_argument_group("without a SOURCE")
    other.add_argument("--make-reference", metavar="DATA", help="write statistics of real pictures to the npz --out")
    other.add_argument("--size", type=number(int, 8), metavar="PX", help="with it: Resize and centre crop (256)")
    other.add_argument("--replay", metavar="results.json", help="the same evaluation anew: does it give these figures?")
    parser.add_argument("--batch", type=count, metavar="B", help="pictures computed together (what OUT has; else 64)")
    parser.add_argument("--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads of one process (1)")
    parser.add_argument("--out", metavar="DIR", help="folder for results.json; any number of processes may share it")


def fewshot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="RUN",
        help="a run, an export or a file of the authors'; timm:NAME[:FILE] or mae:FILE: a model of others",
    )
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="DATA", help="folders with train/ and val/ of classes"
    )
    parser.add_argument(
        "--shots", type=each_of(count), default=[1, 5, 10, 25], metavar="LIST", help="pictures a class (1,5,10,25)"
    )
    parser.add_argument("--trials", type=count, default=5, metavar="N", help="draws of each, the same for all RUNs (5)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the draws (0)")
    parser.add_argument(
        "--size",
        type=number(int, 8),
        metavar="PX",
        help="of the pictures a RUN is given (256; of smaller ones theirs)",
    )
    parser.add_argument("--batch", type=count, default=64, metavar="B", help="pictures computed together (64)")
    parser.add_argument(
        "--threads", type=number(int, 1, 1024), default=1, metavar="N", help="CPU threads of one process (1)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for results; features in it are used again")


def sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a table, or a .yaml file; without it: lists them")
    parser.add_argument(
        "--scale", choices=("paper", "digits"), help="digits: tiny recipes, from nothing (what DIR has; else paper)"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for runs and tables; several tables may share it")
    given = parser.add_argument_group("what is given, once for a DIR: it is known from then on, as --scale is")
    given.add_argument("--data", metavar="DATA", help="pictures that all is trained on")
    given.add_argument("--tokenizer", metavar="PATH", help="a trained tokenizer")
    given.add_argument("--inception", metavar="FILE", help=f"{INCEPTION}; without it FID is left out")
    given.add_argument("--models", metavar="FOLDER", help="files of others by their published names, such as MAE's")
    given.add_argument("--sets", nargs="+", default=[], metavar="DATA", help="data sets of few-shot classification")
    parser.add_argument(
        "--seeds", type=count, metavar="N", help="train all that many times (what the table has; else 1)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="make these rows: their labels")
    how = parser.add_argument_group("how; without them one job after the other, in one process each")
    how.add_argument(
        "--launch",
        default="",
        metavar="WORDS",
        help="what starts mage-ds instead: 'deepspeed --num_accelerators 8 --module mage_ds'",
    )
    how.add_argument(
        "--slurm", nargs="?", const="", metavar="OPTIONS", help="submit arrays; --slurm='--partition=gpu': with these"
    )
    how.add_argument("--table", action="store_true", help="only tell what is measured so far")
    how.add_argument("--record", action="store_true", help="only write the curves that later runs are compared with")


def export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", help="a run's folder; or an export, or a file of the authors'")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for it")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="of the weights (float32)")
    parser.add_argument(
        "--layout", choices=("ours", "official"), default="ours", help="safetensors, or one file as the authors' (ours)"
    )
    parser.add_argument("--checkpoint", type=number(int, 0), metavar="STEP", help="which checkpoint (the newest)")
    _take_weights(parser)
    parser.add_argument(
        "--licence", "--license", metavar="TEXT", help="for the model card, such as cc-by-4.0 (unknown)"
    )


def convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="OFFICIAL.pth", help="pre-training or fine-tuned file, or tokenizer alone")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the export")


def doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hostfile", metavar="H", help="examine its hosts, through ssh (this host)")
    parser.add_argument("--ssh_port", type=number(int, 1, 65535), metavar="P", help="where their sshd listens (22)")
    parser.add_argument("--shared", metavar="PATH", help="folder that all hosts should see: that of your runs")
    parser.add_argument("--data", metavar="DATA", help="data set to list and decode (made pictures)")
    parser.add_argument("--json", dest="answers", action="store_true", help=argparse.SUPPRESS)  # what it runs there
    parser.add_argument("--wire", dest="rank", action="store_true", help=argparse.SUPPRESS)  # what it launches


def recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe's name, or a .yaml file")


def plan(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu-memory", type=positive, required=True, metavar="GIB", help="memory of one GPU, GiB")
    parser.add_argument("--hosts", type=count, default=1, metavar="H", help="hosts that they are in (1)")
    parser.add_argument("--mfu", type=number(float, 0.001, 1), metavar="M", help="used share of the peak, as measured")
    parser.add_argument("--peak", type=positive, metavar="TFLOPS", help="of one GPU (an H100's: bf16 989, float32 67)")
    parser.add_argument("--price", type=number(float, 0), metavar="DOLLARS", help="of an hour of one GPU")
    take_samples(parser)


def tokenize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder of pictures, with or without train/ and val/")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="a tokenizer's run folder")
    parser.add_argument("--out", required=True, metavar="TOKENS", help="folder for them; an unfinished one continues")
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="whose `inputs`, `seed` and precision are meant: name or .yaml file"
    )
    parser.add_argument("--views", type=number(int, 1, 999), default=1, metavar="K", help="crops of a picture (1)")
    parser.add_argument(
        "--augmentation", choices=("strong", "weak", "none"), help="of the views (the recipe's; without one: none)"
    )
    parser.add_argument("--batch", type=count, default=16, metavar="B", help="pictures of one forward pass (16)")
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "float32"),
        default="auto",
        help="the tokenizer's (auto: the recipe's machine.precision, without a recipe as of `train`)",
    )


def checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
