"""mage-ds evaluate RUN --reference REF --versus RUN2|key=value...: which of two draws the better pictures?

tiles of both, of the same noise -> a look at 500, 1,000, 2,000, ... pictures of each -> until they are told apart
"""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from mage_ds.engine import extracting, process, scoring
from mage_ds.engine.scoring import Job
from mage_ds.errors import UserError
from mage_ds.evaluation import figures, paired
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.evaluation.moments import root_of
from mage_ds.recipes.sections import Sampling
from mage_ds.report import passport
from mage_ds.sampling.claims import Claims

_NUM = 50_000
_KEYS = ("checkpoint", "weights", *Sampling.model_fields)
_PLACE = ("source", "origin", "n")  # of facts: not what the pictures are
_LOOK_S = 0.5  # seconds between two looks at what another process does
_PATIENCE_S = 4 * 3600  # KID of 50,000 pictures takes its time
_CLAIM = "look"
_COLUMNS, _WIDTHS = ("A", "B", "B - A", "95 % at any look"), (10, 10, 11, 24)
_ASSUMED = {
    "fid": (
        "FID: the interval holds the difference with and without what few pictures add to it (measured by halves, as "
        "c / n); the reference counts as given"
    ),
    "kid": "KID: of all pairs of pictures, unbiased at any n; the reference counts as given",
}


def versus(
    source,
    versus: Sequence[str],
    *,
    reference,
    metrics: Sequence[str] | None = None,
    inception=None,
    features: str | None = None,
    num: int | None = None,
    tokenizer=None,
    class_label: str | None = None,
    seed: int = 0,
    precision: str = "float32",
    checkpoint: int | None = None,
    weights: str | None = None,
    round: bool = False,
    batch: int | None = None,
    threads: int = 1,
    out=None,
    **sampling,
) -> dict:
    """Compares two MAGEs, or one sampled from in two ways; prints a row a look and the verdict; writes versus.json.

    Any number of processes may run it on one `out`, as ranks of a launch or not; what was killed goes on, with a larger
    `num` too: no picture is drawn twice, and no look is made twice.

    Args: source: the one, A; versus: the other, B: a run or an export, or changes of A: checkpoint=300, weights=raw, or
    fields of a recipe's `sampling` (steps=8); or both; metrics: fid, kid, of which the first decides and ends the
    comparison, fid by default; num: pictures of each at most, 50,000 by default; sampling: fields of `sampling`, of
    both; out: by default a folder beside the other evaluations of A; the others as of `tasks.score.score`, for both
    (checkpoint, weights: of A, and of B where it is the same run).
    Returns: what versus.json holds. Raises: UserError.
    """
    options = {name: value for name, value in locals().items() if name not in ("out", "sampling", "versus")}
    options |= dict.fromkeys(Sampling.model_fields) | sampling | {"metrics": _metrics(metrics), "num": num or _NUM}
    options |= dict.fromkeys(("definition", "data", "per_class")) | {"kid_subset": 1000, "neighbours": "off"}
    other = _changed(options, versus)
    process.start(threads)
    return _Comparison(_open(options, other, None if out is None else Path(out))).run()


def _metrics(given: Sequence[str] | None) -> list[str]:
    given = list(given or ["fid"])
    if strange := [name for name in given if name not in paired.METRICS]:
        raise UserError(f"--metrics {strange[0]}: a comparison is of {' or '.join(paired.METRICS)}, or of both")
    return given


def _changed(options: dict, words: Sequence[str]) -> dict:
    """The options of B."""
    given, runs = {}, []
    for word in words:
        key, equals, text = word.partition("=")
        name = key.replace("-", "_")
        if not equals or Path(word).exists():
            runs.append(word)
        elif name not in _KEYS:
            raise UserError(f"--versus {word}: {key} is no setting of sampling; those are {', '.join(_KEYS)}")
        elif name in given:
            raise UserError(f"--versus {word}: {key} is given twice; leave one out")
        else:
            given[name] = _value(text)
    if len(runs) > 1:
        raise UserError(f"--versus {' '.join(runs)}: compare with one; SOURCE stands before --versus")
    if runs and not Path(runs[0]).exists():
        raise UserError(f"--versus {runs[0]}: no such run or export, and no key=value such as steps=8")
    step = given.get("checkpoint")
    if step is not None and (not isinstance(step, int) or step < 0):
        raise UserError(f"--versus checkpoint={step}: must be a step, as `mage-ds checkpoints RUN` lists them")
    return options | ({"source": runs[0], "checkpoint": None, "weights": None} if runs else {}) | given


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _open(options: dict, other: dict, out: Path | None) -> list[Job]:
    """Both, in the folders a and b of the comparison's, with tiles of one size."""
    for path in (options["source"], other["source"]):
        if not scoring.is_model(Path(path)):
            raise UserError(f"{path}: is no run, export or file of a MAGE; --versus compares models that draw pictures")
    first = scoring.open_job(scoring.settled(options), out and out / "a", None)
    second = scoring.settled(other) | {"batch": first.options["batch"]}
    second = scoring.open_job(second, out and out / "b", None)
    jobs = [first, second._replace(extractor=first.extractor)]
    what = [_identity(job.facts["source"]) for job in jobs]
    if what[0] == what[1]:
        raise UserError(
            f"--versus: nothing to compare, {other['source']} with these settings is what it is compared with"
        )
    sizes = [job.source.size for job in jobs]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--versus {other['source']}: draws pictures of {sizes[1]} px, {options['source']} of {sizes[0]} px; FIDs "
            "of unlike sizes say nothing about each other"
        )
    if out is None:
        digest = hashlib.sha256(json.dumps([*what, options["metrics"]], sort_keys=True).encode()).hexdigest()[:8]
        out = first.out.with_name(f"{first.out.name}-versus-{digest}")
    return [job._replace(out=out / name) for job, name in zip(jobs, "ab", strict=True)]


def _identity(facts: dict) -> dict:
    """What the pictures are, wherever they come from."""
    return {name: value for name, value in facts.items() if name not in _PLACE}


def names(a: dict, b: dict) -> list[str]:
    """What to call the two, by their facts: what differs."""
    runs = [Path(each["source"]) for each in (a, b)]
    a, b = ({**each, "weights": each.get("weights_of")} for each in (a, b))  # in facts it is their hash
    keys = [name for name in (_KEYS if runs[0] == runs[1] else Sampling.model_fields) if a[name] != b[name]]
    if runs[0] == runs[1]:
        front = [[], []]
    else:
        front = [[run.name] if runs[0].name != runs[1].name else [str(run)] for run in runs]
    return [" ".join([*own, *(f"{key}={each[key]}" for key in keys)]) for own, each in zip(front, (a, b), strict=True)]


class _Comparison:
    """versus.json, and this process at work on it beside others, which it knows by their files only.

    Every process extracts features of both up to the next look; the first rank of a launch that claims the look makes
    it, the others wait for it to stand in versus.json.
    """

    def __init__(self, jobs: list[Job]):
        self.jobs, self.out = jobs, jobs[0].out.parent
        self.path, self.first, options = self.out / "versus.json", jobs[0], jobs[0].options
        self.num, self.batch, self.metrics = options["num"], options["batch"], options["metrics"]
        self.facts = dict(zip("ab", (job.facts["source"] for job in jobs), strict=True))
        self.names = names(*self.facts.values())
        self.facts |= {name: self.first.facts[name] for name in ("reference", "extractor", "options")}
        self.claims = Claims(self.out / ".work")
        self.claims.patience = _PATIENCE_S
        self.shown = 0  # looks that are printed
        self.real: FeatureSet | None = None

    def run(self) -> dict:
        """What versus.json holds in the end."""
        for name, called in zip("ab", self.names, strict=True):
            process.say(f"{name.upper()}: {called} ({self.facts[name]['source']})")
        process.say(f"up to {self.num:,} pictures of each, of the same noise; written to {self.path}")
        process.say(_row(["n", *(f"{name.upper()} {what}".strip() for name in self.metrics for what in _COLUMNS)]))
        a, b = self.jobs
        with scoring.pinned(a.choice, self.out), scoring.pinned(b.choice, self.out):
            while not self._enough(looks := self._show()):
                n = paired.following([look["n"] for look in looks], self.num, self.batch)
                self._look(n, self._extracted(n))
        if process.start().first:
            self.claims.clear()
        process.say(self._verdict(looks)["text"])
        for remark in self._remarks():
            process.say(f"- {remark}")
        return self._read()

    def _enough(self, looks: list[dict]) -> bool:
        return bool(looks) and (looks[-1]["n"] >= self.num or paired.over(looks[-1][self.metrics[0]]) is not None)

    def _verdict(self, looks: list[dict]) -> dict:
        return paired.verdict(self.metrics[0], looks[-1][self.metrics[0]], len(looks), looks[-1]["n"], self.names)

    # --- versus.json

    def _read(self) -> dict:
        """What it holds; no looks at first. UserError where it is of another comparison."""
        try:
            found = json.loads(self.path.read_text())
            kept = {"n", *self.metrics}
            if not all(kept <= {*look} for look in found["looks"]):
                raise ValueError("a look is not whole")
            before = _settings(found)
        except FileNotFoundError:
            return {"looks": []}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: is no such comparison ({error!r}); choose another --out") from None
        if differs := passport.difference(before, _settings(self.facts), tuple(before)):
            raise UserError(f"{self.path}: holds another comparison, {differs}; choose another --out")
        return found

    def _show(self) -> list[dict]:
        """The looks in versus.json, of which new ones are printed."""
        looks = self._read()["looks"]
        for look in looks[self.shown :]:
            cells = [f"{look['n']:,}"]
            for found in (look[name] for name in self.metrics):
                cells += [f"{found['a']:.5g}", f"{found['b']:.5g}", f"{found['difference']:+.4g}"]
                cells.append(" to ".join(f"{each:+.3g}" for each in found["interval"]))
            process.say(_row(cells))
        self.shown = len(looks)
        return looks

    def _remarks(self) -> list[str]:
        found = [remark for job in self.jobs for remark in job.remarks]
        return [*dict.fromkeys(found), *(_ASSUMED[name] for name in self.metrics)]

    # --- a look

    def _extracted(self, n: int) -> list[FeatureSet]:
        """Features of the reference, once, and of the first n pictures of both."""
        if self.first.real is not None and self.real is None:
            self.real = self.first.begin("reference", self.first.real)
            extracting.extract(self.real, self.first.real, self.first.extractor)
        found = []
        for job in self.jobs:
            source = job.source._replace(n=n)
            found.append(job.begin("samples", source))
            extracting.extract(found[-1], source, job.extractor)
        return found

    def _look(self, n: int, held: list[FeatureSet]) -> None:
        """Returns when a look of n pictures or more stands in versus.json."""
        while not self._there(n):
            if process.start().first and self.claims.take(_CLAIM):
                try:
                    if not self._there(n):  # what another wrote before the claim was free
                        self._append(n, held)
                finally:
                    self.claims.release(_CLAIM)
            else:
                time.sleep(_LOOK_S)

    def _there(self, n: int) -> bool:
        looks = self._read()["looks"]
        return bool(looks) and looks[-1]["n"] >= n

    def _append(self, n: int, held: list[FeatureSet]) -> None:
        looks = self._read()["looks"]
        number, look = len(looks) + 1, {"n": n}
        for name in self.metrics:
            a, b = (self._figure(name, each) for each in held)
            look[name] = paired.compared(a, b, number)
        looks = [*looks, look]
        results = {
            "verdict": self._verdict(looks) if self._enough(looks) else None,
            "looks": looks,
            "names": dict(zip("ab", self.names, strict=True)),
            "alpha": paired.ALPHA,
            "remarks": self._remarks(),
        }
        passport.write(self.out, {**results, **self.facts, **passport.circumstances()}, self.path.name)

    def _figure(self, name: str, held: FeatureSet) -> paired.Figure:
        if name == "fid":
            return paired.fid_of(lambda: (rows for (rows,) in held.chunks("features")), held.n, *self._gaussian)
        return paired.kid_of(figures.rows_of(held), *self._rows)

    @cached_property
    def _gaussian(self) -> tuple:
        """Of the reference, and its root."""
        found = figures.gaussian_of(self.real or self.first.statistics, self.first.extractor.width)
        return found, root_of(found)

    @cached_property
    def _rows(self) -> tuple:
        """Of the reference, and its mean kernel."""
        found = figures.rows_of(self.real or self.first.statistics)
        return found, paired.kernel_within(found)


def _settings(facts: dict) -> dict:
    """What decides the looks."""
    found = {name: _identity(facts[name]) for name in "ab"}
    found |= {"reference": _identity(facts["reference"]) | {"n": facts["reference"]["n"]}}
    return found | {"extractor": facts["extractor"], "metrics": facts["options"]["metrics"]}


def _row(cells: list[str]) -> str:
    """Rows appear one by one, so that the widths are fixed."""
    widths = [8, *(_WIDTHS * (len(cells) // len(_WIDTHS)))]
    return "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
