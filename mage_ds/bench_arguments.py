"""The command line of `bench`: as arguments.py."""

import argparse

from mage_ds.arguments import INCEPTION, count, each_of, number, positive, some_of, take_recipe, take_samples


def bench_scale(parser: argparse.ArgumentParser) -> None:
    stages, choices = ("0", "1", "2", "3", "2_offload", "3_offload"), ("none", "selective", "full")
    take_recipe(parser)
    parser.add_argument(
        "--stages", type=some_of(stages), default=["1", "2", "3"], metavar="LIST", help=f"of {','.join(stages)} (1,2,3)"
    )
    parser.add_argument(
        "--checkpointing", type=some_of(choices), default=list(choices), metavar="LIST", help=f"of {','.join(choices)}"
    )


def bench_listing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=count, default=1_300_000, metavar="N", help="pictures to make (1,300,000)")
    parser.add_argument("--folders", type=count, default=1000, metavar="N", help="class folders, or tars (1,000)")
    parser.add_argument("--dir", default=".", metavar="DIR", help="where; removed afterwards (here)")
    parser.add_argument("--tars", action="store_true", help="tars with .cls labels instead of hard links in folders")


def bench_save(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)
    parser.add_argument("--dir", dest="where", default=".", metavar="DIR", help="disk to save on; cleaned up (here)")
    parser.add_argument("--deepspeed_config", default="zero1", metavar="JSON|NAME", help="as of `train` (zero1)")
    parser.add_argument("--images-per-s", type=positive, metavar="R", help="of the training: how much saving takes")
    take_samples(parser)


def bench_tokens(parser: argparse.ArgumentParser) -> None:
    take_recipe(parser)
    parser.add_argument("--data", required=True, help="folder of pictures for the live tokenization")
    parser.add_argument("--images", type=count, default=16, metavar="N", help="of them at least, on each rank (16)")
    parser.add_argument("--samples", type=count, default=100_000, metavar="N", help="of the cache (100,000)")
    parser.add_argument("--dir", dest="where", default=".", metavar="DIR", help="where it lies; cleaned up (here)")


def bench_samplers(parser: argparse.ArgumentParser) -> None:
    orders = ("confidence", "halton")
    parser.add_argument("run", metavar="RUN", help="a run's folder; or an export, or a file of the authors'")
    parser.add_argument("--tokenizer", metavar="PATH", help="where RUN comes without one")
    parser.add_argument("--checkpoint", type=number(int, 0), metavar="STEP", help="of a run (the newest)")
    parser.add_argument("--num", type=count, default=256, metavar="N", help="pictures of each row (256)")
    parser.add_argument(
        "--steps", type=each_of(count), default=[4, 8, 16, 32], metavar="LIST", help="numbers of steps T (4,8,16,32)"
    )
    parser.add_argument(
        "--orders", type=some_of(orders), default=list(orders), metavar="LIST", help=f"of {','.join(orders)}"
    )
    parser.add_argument(
        "--drop",
        type=each_of(number(float, 0, 0.99)),
        default=[0.0, 0.5],
        metavar="LIST",
        help="shares of the tokens that are left out of the encoder while as many are masked (0,0.5)",
    )
    parser.add_argument("--reference", metavar="DATA", help="labelled real pictures: adds how many can be read")
    parser.add_argument("--batch", type=count, metavar="B", help="pictures computed together (64, or N if fewer)")
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of the model; choices are in float64"
    )
    parser.add_argument("--compile", dest="compiled", action="store_true", help="also time the compiled step")


def bench_metrics(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", metavar="DIR", help="for Inception: a folder, tars, npz (made ones of 256 px)")
    parser.add_argument("--inception", metavar="FILE", help=f"{INCEPTION} (random weights, which take as long)")
    parser.add_argument("--images", type=count, default=64, metavar="N", help="pictures of each round (64)")
