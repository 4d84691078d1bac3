"""What the ways of sampling cost, and what they are worth: seconds a picture of each order of the tokens, number of
steps and drop, the used share of the machine's peak, and how many pictures a classifier can read."""

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mage_ds.engine import ds_config, inference, planner, process, stored
from mage_ds.errors import UserError
from mage_ds.evaluation import readable
from mage_ds.inputs.catalog import open_catalog
from mage_ds.models import Mage
from mage_ds.report import pictures
from mage_ds.report.progress import counter, peak_flops
from mage_ds.sampling import decode, labels
from mage_ds.sampling.tiles import tiles

_SEED = 0
_BATCH = 64


class _Choice(NamedTuple):
    order: str
    steps: int
    drop: float


@dataclass
class _Row:
    """What a choice costs and gives. operations: of decoding a picture; seconds, busy: of a picture, by way (eager,
    compiled), on the clock and, on a CPU, of this thread, which other processes do not lengthen; drawn: of the busy
    eager ones, the detokenizer's; same: share of the compiled way's tokens that are the eager ones."""

    choice: _Choice
    operations: int
    seconds: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    drawn: float = 0.0
    same: float = 1.0
    judged: dict = field(default_factory=dict)


def samplers(
    run: str,
    *,
    num: int = 256,
    steps: list[int],
    orders: list[str],
    drop: list[float],
    tokenizer: str | None = None,
    checkpoint: int | None = None,
    reference: str | None = None,
    batch: int | None = None,
    precision: str = "float32",
    compiled: bool = False,
) -> None:
    """Prints a Markdown table: a row for each combination of `orders`, `steps` and `drop`, all with the same noise, and
    one where they name the same thing twice.

    The first row is the model's own T with order confidence and no drop; the same again stands last, and the difference
    of the two is what chance adds. Ratios and the used share of the peak (mfu) are of seconds, on a CPU of "CPU s": the
    time of this thread alone, without what other processes take. Time and operations are those of the whole picture:
    decoding, in `precision` with the choices in float64, and the detokenizer in float32. Stopped early, it prints the
    rows that it has.

    Args: run, tokenizer: whatever `stored.open_model` opens; checkpoint: a run's step, by default the newest;
    reference: a data set with labels, whose classifier judges the pictures; batch: pictures of a tile; compiled: time a
    compiled step beside the plain one.
    Raises: UserError for a model without tokenizer, a reference without labels, and several ranks.
    """
    me = process.start()
    if me.world > 1:
        raise UserError("bench samplers: measures one engine; start it as one process, without `deepspeed`")
    opened = stored.open_model(Path(run), tokenizer and Path(tokenizer), checkpoint)
    if opened.mage is None:
        raise UserError(f"{run}: is a {opened.kind}, which makes no pictures; give a MAGE's run, export or file")
    if opened.tokenizer is None:
        raise UserError(f"{run}: comes without a tokenizer; give the one that it was trained with: --tokenizer PATH")
    judge = None if reference is None else _Judge(Path(reference))
    tile_size = batch or min(_BATCH, num)
    dtype = ds_config.dtype_of(precision)
    choices = dict.fromkeys(_Choice(*each) for each in itertools.product(orders, steps, drop))
    own = _Choice("confidence", opened.sampling["steps"], 0.0)
    choices = [own, *(each for each in choices if each != own), own]
    rows = [_Row(choice, operations(opened.mage, opened.sampling, choice)) for choice in choices]
    drawing = _drawing_operations(opened)
    torch.backends.cudnn.allow_tf32 = False  # as `sample`; matrix products have it off by default
    maker = _Maker(opened, dtype, num, tile_size, compiled)
    peak = peak_flops(me.device, dtype)
    cpu = me.device.type == "cpu"
    where = f"{torch.get_num_threads()} CPU threads" if cpu else torch.cuda.get_device_name()
    process.say(
        f"{opened.origin}: {num} pictures in batches of {tile_size}, {precision}, {where}, "
        f"peak {peak / 1e12:.3g} TFLOP/s; the detokenizer's part: {drawing / 1e9:,.3g} GFLOP a picture"
    )
    first = ", ".join(f"{way} {seconds:.1f} s" for way, seconds in maker.warm_up(drop).items())
    process.say(f"first calls, not counted below: {first}")
    done, total = [], len(rows) * len(maker.ways) * num
    try:
        with counter(total, "picture", "sampled", first=me.first, say=process.say) as advance:
            for row in rows:
                maker.measure(row, judge, advance)
                done.append(row)
    finally:
        if done:
            process.say(_table(done, drawing, peak, judge, cpu))
    process.say(_spread(done, cpu))


# --- what is made


class _Maker:
    """Pictures in memory, tile by tile, by each way: the inference engine, and its compiled module."""

    def __init__(self, opened: stored.Stored, dtype: torch.dtype, num: int, batch: int, compiled: bool):
        self.device, self.sampling, self.num = process.start().device, opened.sampling, num
        self.classes, self.width = opened.mage.classes, opened.mage.tokens
        self.names, self.tiles = opened.classes, tiles(num, batch)
        self.clock = time.thread_time if self.device.type == "cpu" else time.perf_counter
        engine = inference.engine(opened.mage, dtype)
        self.ways = {"eager": engine}
        if compiled:  # on a GPU this mode replays CUDA graphs; shapes are the same in every step
            self.ways["compiled"] = torch.compile(engine.module, dynamic=False, fullgraph=True, mode="reduce-overhead")
        self.tokenizer = inference.frozen(opened.tokenizer)

    def warm_up(self, drops: list[float]) -> dict[str, float]:
        """A step of each shape by each way: the first one is slow, and compiles. Returns the seconds that they took."""
        seconds = {}
        for way, predict in self.ways.items():
            began = time.perf_counter()
            for drop in sorted({0.0, *drops}):
                self._draw(self._tokens(predict, self.tiles[0], _Choice("confidence", 1, drop)))
            seconds[way] = time.perf_counter() - began
        return seconds

    def measure(self, row: _Row, judge: "_Judge | None", advance: Callable[[int], None]) -> None:
        """Fills in the row."""
        made, images = {}, []
        for way, predict in self.ways.items():
            found, drawn, began = [], 0.0, (time.perf_counter(), self.clock())
            for tile in self.tiles:
                found.append(self._tokens(predict, tile, row.choice))
                then = self.clock()
                some = self._draw(found[-1])
                drawn += self.clock() - then
                if judge is not None and way == "eager":
                    images.append(some)
                advance(int((tile < self.num).sum()))
            count = sum(map(len, self.tiles))  # the last tile may be padded: computed all the same
            row.seconds[way] = (time.perf_counter() - began[0]) / count
            row.busy[way] = (self.clock() - began[1]) / count
            if way == "eager":
                row.drawn = drawn / count
            made[way] = torch.cat(found)[: self.num]
        row.same = float((made["eager"] == made[way]).double().mean())
        if judge is not None:
            asked = None if self.classes is None else [labels.named(i, self.names) for i in range(self.classes)]
            row.judged = judge(np.concatenate(images)[: self.num], asked)

    def _tokens(self, predict, index: np.ndarray, choice: _Choice) -> torch.Tensor:
        """int64 (B, N), on the host."""
        tokens = torch.zeros(len(index), self.width, dtype=torch.int64, device=self.device)
        asked = None if self.classes is None else torch.from_numpy(index % self.classes).to(self.device)  # in turn
        masked, noise = torch.ones_like(tokens, dtype=torch.bool), decode.keyed_noise(_SEED, index, self.width)
        settings = self.sampling | choice._asdict()
        return decode.decode(predict, tokens, masked, noise=noise, labels=asked, **settings).cpu()

    def _draw(self, tokens: torch.Tensor) -> np.ndarray:
        """uint8 (B, H, W, 3)."""
        return inference.draw(self.tokenizer, tokens.to(self.device))


# --- what it costs


def operations(mage: Mage, sampling: dict, choice: _Choice) -> int:
    """Of decoding a picture whose tokens are all masked: those of each call of the model, counted by its shapes."""
    mage, known, calls = _shell(mage), {}, []

    def predict(tokens, masked, *others):
        inputs = [None if each is None else each.to("meta") for each in (tokens, masked, *others)]
        shapes = tuple(None if each is None else each.shape for each in inputs)
        if shapes not in known:
            known[shapes] = planner.forward_flops(lambda: mage(*inputs))
        calls.append(known[shapes])
        return torch.zeros(*tokens.shape, mage.codes)

    tokens = torch.zeros(1, mage.tokens, dtype=torch.int64)
    asked = None if mage.classes is None else tokens[:, 0]
    masked, noise = torch.ones_like(tokens, dtype=torch.bool), decode.keyed_noise(_SEED, [0], mage.tokens)
    decode.decode(predict, tokens, masked, noise=noise, labels=asked, **sampling | choice._asdict())
    return sum(calls)


def _drawing_operations(opened: stored.Stored) -> int:
    tokenizer = _shell(opened.tokenizer)
    tokens = torch.zeros(1, opened.mage.tokens, dtype=torch.int64, device="meta")
    return planner.forward_flops(lambda: tokenizer.detokenize(tokens))


def _shell(model: torch.nn.Module) -> torch.nn.Module:
    """The model on the meta device, without a copy of its values on the way."""
    empty = {id(p): torch.nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, empty | {id(b): b.to("meta") for b in model.buffers()})


# --- what it is worth


class _Judge:
    """evaluation/readable.py's classifier, fitted on the training pictures of a labelled data set."""

    def __init__(self, reference: Path):
        train = open_catalog(reference, "train")
        self.names = train.classes
        readable.refuse_unfit(train.labels, train.classes, reference)
        self.classifier = readable.fit(
            [pictures.decoded(train.read(i), train.path(i)) for i in range(train.n)], train.labels
        )

    def __call__(self, images: np.ndarray, asked: list[str] | None) -> dict:
        """As `Judgement.summary`. asked: the names of the classes that were asked for, in turn."""
        wanted = None if asked is None else readable.wanted(asked, self.names, len(images))
        return readable.readable(self.classifier, images).summary(len(self.names), wanted)


# --- what is shown


def _table(rows: list[_Row], drawing: int, peak: float, judge: _Judge | None, cpu: bool) -> str:
    seconds = ["s a picture", "CPU s"] if cpu else ["s a picture"]
    head = ["order", "T", "drop", *seconds, "ratio", "detokenizer", "GFLOP", "mfu"]
    if "compiled" in rows[0].seconds:
        head += ["compiled", *(["its CPU s"] if cpu else []), "to eager", "same tokens"]
    head += ["readable", "rarest class"] if judge else []
    head += ["as asked"] if "right" in rows[0].judged else []
    lines = [head, ["---"] * len(head)]
    lines += [_cells(row, rows[0].busy["eager"], drawing, peak, judge, cpu) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: _Row, first: float, drawing: int, peak: float, judge: _Judge | None, cpu: bool) -> list[str]:
    (order, steps, drop), all_, eager = row.choice, row.operations + drawing, row.busy["eager"]
    times = {way: [f"{row.seconds[way]:.4g}", *([f"{busy:.4g}"] if cpu else [])] for way, busy in row.busy.items()}
    cells = [order, str(steps), f"{drop:g}", *times["eager"], f"{eager / first:.2f}", f"{row.drawn / eager:.1%}"]
    cells += [f"{all_ / 1e9:,.4g}", f"{all_ / eager / peak:.1%}"]
    if "compiled" in times:
        cells += [*times["compiled"], f"{row.busy['compiled'] / eager:.2f}", f"{row.same:.1%}"]
    if judge:
        rarest = int(np.argmin(row.judged["classes"]))
        cells += [f"{row.judged['readable']:.1%}", f"{row.judged['classes'][rarest]:.1%} ({judge.names[rarest]})"]
    if "right" in row.judged:
        cells.append(f"{row.judged['right']:.1%}")
    return cells


def _spread(rows: list[_Row], cpu: bool) -> str:
    first, last = rows[0].busy["eager"], rows[-1].busy["eager"]
    return (
        f"the last row is the first again: {first:.4g} and {last:.4g} {'CPU ' * cpu}s a picture, spread "
        f"{abs(last - first) / min(first, last):.1%}; a smaller difference between rows says nothing"
    )
