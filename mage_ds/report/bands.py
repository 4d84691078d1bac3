"""Is a training on track? Its figures beside those that finished runs of the same recipe had after as many samples.

A curve is JSON beside the recipe: per figure the samples seen, and the mean and the range of runs of several seeds.
"""

import bisect
import itertools
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from mage_ds import files, recipes
from mage_ds.errors import UserError
from mage_ds.recipes.schema import Recipe

FIGURES = ("loss", "top1", "usage", "val_loss", "val_top1", "val_codes_used", "lr")
_WORSE = {"loss": 1, "val_loss": 1, "top1": -1, "val_top1": -1, "usage": -1, "val_codes_used": -1}  # side of the band
_PATIENCE = 2  # records in a row: one step's loss is a draw
_MARGIN = 0.5  # of the band's width on each side: three runs and three records hold the range of nine draws, 3 sigma
_LR = 0.2  # relative difference of learning rates that are not the same, between points of a curve too
_WARM = 0.05  # of the highest learning rate: below it a rate is at its warm-up's or its cosine's end, and no sign
# A run with other values here is compared all the same: a mistake in how it learns is what a band is to show.
_MAY_DIFFER = ("batch", "duration", "warmup", "optimizer.", "codebook_init", "reseed_after")


def path_of(recipe: Path) -> Path:
    """The curve's place, beside the file of its recipe."""
    return recipe.parent / "curves" / f"{recipe.stem}.json"


def identity(recipe: Recipe) -> dict:
    """What makes it this training, whatever its seed."""
    found = recipe.identity()
    del found["seed"]
    return json.loads(json.dumps(found))


def beneath(facts: Mapping) -> dict | None:
    """The identity of the training that made what a run began with (--init), by the run's facts; None where it began
    with initial values, empty where that is not known."""
    init = facts.get("init")
    if init is None:
        return None
    try:
        return identity(recipes.load_recipe(str(Path(init["path"] if isinstance(init, dict) else init, "recipe.yaml"))))
    except UserError:
        return {}


# --- written ---------------------------------------------------------------------------------------------------------


def write(path: Path, recipe: Recipe, runs: Mapping[int, Path], dataset: int, upon: dict | None = None) -> None:
    """The curve of finished runs of a recipe. runs: seed -> folder; dataset: samples of their training split; upon: as
    `beneath` gives it for them.

    low and high at a point are the range of all runs there and at both neighbours. Raises UserError.
    """
    logs = [_log(run) for _, run in sorted(runs.items())]
    curve = {"identity": identity(recipe), "upon": upon, "dataset": dataset, "samples": _samples(recipe, dataset)}
    curve |= {"seeds": sorted(runs), "figures": {}}
    for name in FIGURES:
        steps = sorted(set.intersection(*({*log.get(name, {})} for log in logs)))
        if not steps:
            continue
        points = [[log[name][step] for log in logs] for step in steps]
        near = [[*itertools.chain(*points[max(0, i - 1) : i + 2])] for i in range(len(points))]
        curve["figures"][name] = {
            "samples": [step * recipe.batch for step in steps],
            "mean": [_short(statistics.fmean(each)) for each in points],
            "low": [_short(min(each)) for each in near],
            "high": [_short(max(each)) for each in near],
        }
    try:
        path.parent.mkdir(exist_ok=True)
        with files.saved(path) as file:
            file.write((json.dumps(curve) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); record from a checkout of your own") from None


def _log(run: Path) -> dict[str, dict[int, float]]:
    """figure -> step -> value, of a run's metrics.jsonl."""
    found: dict[str, dict[int, float]] = {}
    try:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{run}/metrics.jsonl: cannot be read ({error}); leave this run out") from None
    for record in records:
        for name in FIGURES:
            if isinstance(record.get(name), int | float):
                found.setdefault(name, {})[record["step"]] = record[name]
    return found


def _samples(recipe: Recipe, dataset: int) -> int:
    """What the whole training sees."""
    return recipes.schedule(recipe, dataset)[0] * recipe.batch


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# --- compared --------------------------------------------------------------------------------------------------------


def of(recipe: Recipe, facts: Mapping) -> "Band | None":
    """The band for a run: of the packaged recipe that trains the same on as many samples of as many, how it learns
    apart (_MAY_DIFFER), and begins with the same; None: there is none.

    facts: the run's, with `dataset`, the samples of its training split.
    """
    found = []
    for path in sorted(Path(recipes.__file__).parent.glob("*/curves/*.json")):
        try:
            band = Band(path.stem, json.loads(path.read_text()), recipe)
            if band.fits(facts):
                found.append(band)
        except (OSError, ValueError, KeyError, TypeError):  # no reason to end a training
            continue
    return min(found, key=lambda band: len(band.differs), default=None)


class Band:
    """Follows a run while it writes its records. differs: key -> the value there and here, of what is not the same."""

    def __init__(self, name: str, curve: Mapping, recipe: Recipe):
        self._whole, self._curve, self._recipe = curve, curve["figures"], recipe
        self._name, self._runs = name, len(curve["seeds"])
        there, here = curve["identity"], identity(recipe)
        self.differs = {
            key: (there.get(key), here.get(key)) for key in {**there, **here} if there.get(key) != here.get(key)
        }
        self._batches = recipe.batch / there["batch"]
        self._since: dict[str, int] = {}  # figure -> samples seen at the first record outside
        self._count: dict[str, int] = {}  # figure -> records outside in a row
        self._off: set[str] = set()  # what has been said to be off track
        self._first: set[str] = set()  # what was outside at its first record
        self._rate: str | None = None  # what is wrong with the learning rate, as of the newest record that tells

    def fits(self, facts: Mapping) -> bool:
        samples = _samples(self._recipe, facts["dataset"])
        return (
            all(key.startswith(_MAY_DIFFER) for key in self.differs)
            and self._whole["dataset"] == facts["dataset"]
            and abs(self._whole["samples"] - samples) <= 0.01 * samples
            and self._whole["upon"] == beneath(facts)
        )

    def about(self) -> str:
        """The line for a run's start."""
        runs = f"{self._runs} finished run{'s' * (self._runs > 1)}"
        told = "; ".join(f"{key} {there} there, {here} here" for key, (there, here) in self.differs.items())
        return f"compared while it trains with {runs} of {self._name}{f' ({told})' if told else ''}"

    def look(self, step: int, record: Mapping) -> list[str]:
        """Lines to say after a record of `step`: where figures have left the band, or are back in it."""
        samples, lines = step * self._recipe.batch, []
        self._judge_rate(samples, record.get("lr"))
        sides = {name: self._side(name, samples, record[name]) for name in _WORSE if _number(record.get(name))}
        for name, side in sides.items():
            if side and name not in self._since:
                self._since[name] = samples
                if samples <= self._curve[name]["samples"][0]:
                    self._first.add(name)
            self._count[name] = self._count.get(name, 0) + 1 if side else 0
        left = [name for name in sides if self._count[name] >= _PATIENCE and name not in self._off]
        back = [name for name, side in sides.items() if not side and name in self._off]
        if left:
            told = "; ".join(self._told(name, samples, record[name]) for name in left)
            since = min(self._since[name] for name in left)
            cause = self._cause(left[0], sides[left[0]], samples)
            lines.append(f"off track since {since:,} samples: {told}; this looks like {cause}")
            self._off.update(left)
        if back:
            since = min(self._since[name] for name in back)
            lines.append(f"on track again: {', '.join(back)}, after {samples - since:,} samples outside")
            self._off.difference_update(back)
        for name in [name for name, side in sides.items() if not side]:
            self._since.pop(name, None)
            self._first.discard(name)
        return lines

    def _told(self, name: str, samples: int, value: float) -> str:
        low, high = self._limits(name, samples)
        mean = self._at(name, "mean", samples)
        return f"{name} {value:.4g}, reference {mean:.4g} ({low:.4g} to {high:.4g} for {self._runs} runs)"

    def _side(self, name: str, samples: int, value: float) -> int:
        """-1 below the band, 1 above it; 0 inside, where there is no band, and where outside is no sign of a fault."""
        limits = self._limits(name, samples)
        if limits is None:
            return 0
        side = (value > limits[1]) - (value < limits[0])
        suspicious = name == "loss" and self._recipe.task == "pretrain"  # a loss that is too low is one too
        return side if suspicious or side == _WORSE[name] else 0

    def _limits(self, name: str, samples: int) -> tuple[float, float] | None:
        low, high = (self._at(name, edge, samples) for edge in ("low", "high"))
        if low is None:
            return None
        lows, highs = self._curve[name]["low"], self._curve[name]["high"]
        usual = statistics.median(b - a for a, b in zip(lows, highs, strict=True))
        noisier = max(1.0, self._batches**-0.5)  # a step's loss is a mean over its batch
        margin = (_MARGIN + noisier - 1) * max(usual, high - low)
        return low - margin, high + margin

    def _at(self, name: str, edge: str, samples: int) -> float | None:
        """A value of the curve after so many samples, between its points on a line; None before and behind them."""
        if name not in self._curve:
            return None
        there, values = self._curve[name]["samples"], self._curve[name][edge]
        if not there[0] <= samples <= there[-1]:
            return None
        i = min(max(bisect.bisect_left(there, samples), 1), len(there) - 1)
        if len(there) == 1:
            return values[0]
        share = (samples - there[i - 1]) / (there[i] - there[i - 1])
        return values[i - 1] + share * (values[i] - values[i - 1])

    # --- why

    def _cause(self, name: str, side: int, samples: int) -> str:
        """The known cause that looks like this."""
        ema = self._recipe.optimizer.ema
        if self._rate:
            return self._rate
        if name in ("usage", "val_codes_used"):
            return "dead codes: the codebook collapses (codebook_init=data, and reseed_after, bring codes back)"
        if name == "loss" and side < 0:
            return (
                "dead codes in the tokenizer, or a wrong range of pixels before it: few codes are used, so they are "
                "easy to guess (see its val_codes_used)"
            )
        if name.startswith("val_") and not self._off & {"loss", "top1"}:
            if ema:
                return (
                    f"EMA lag: the average of {1 / (1 - ema):,.0f} steps (optimizer.ema = {ema:g}) is behind the "
                    "weights, which are on track; compare --weights raw"
                )
            return "held-out pictures of another kind than the training's, for the training's own figures are on track"
        if name in self._first:
            return (
                "a wrong range of pixels, for it is so from the first step on: pictures are wanted in [0, 1], not in 0 "
                "to 255 and not minus a mean"
            )
        return (
            "a learning rate that is too low or too high for this batch (base_lr * batch / 256), for it began on track "
            "and learns too slowly"
        )

    def _judge_rate(self, samples: int, lr: float | None) -> None:
        """A batch that is so many times as large wants a learning rate that is."""
        wanted = self._at("lr", "mean", samples)
        if not _number(lr) or wanted is None or wanted < _WARM * max(self._curve["lr"]["mean"]):
            return
        wanted *= self._batches
        self._rate = None
        if abs(lr - wanted) > _LR * wanted:
            self._rate = (
                f"a learning rate that is not scaled: it is {lr:.3g} where the reference had {wanted:.3g} "
                "(base_lr * batch / 256, after the warm-up)"
            )


def _number(value) -> bool:
    return isinstance(value, int | float)
