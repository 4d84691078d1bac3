"""An evaluation at work: features by every process, then figures, neighbours, results.json and sheet.png by one."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from mage_ds.engine import extracting, process, scoring, shown
from mage_ds.engine.scoring import Job
from mage_ds.errors import UserError
from mage_ds.evaluation import figures, suspicions
from mage_ds.evaluation.feature_set import FeatureSet
from mage_ds.report import passport
from mage_ds.report.progress import counter
from mage_ds.sampling.claims import Claims

_LOOK_S = 0.5  # seconds between two looks at what another process does
_LONG_S = 10  # seconds: what takes longer shows how far it is
_PATIENCE_S = 4 * 3600  # neighbours of 100,000 pictures take their time
_END = "figures"  # the claim of who computes them
_STEPS = ("samples", "reference")  # folders of features


def run(job: Job, aloud: bool = True) -> dict | None:
    """Features by all, then the rest by the first rank of each launch, of which one does it; aloud: says the results,
    which are returned there."""
    given = [(name, source) for name, source in zip(_STEPS, (job.source, job.real), strict=True) if source is not None]
    sets = [job.begin(name, source) for name, source in given]
    with scoring.pinned(job.choice, job.out):
        for (name, source), held in zip(given, sets, strict=True):
            process.say(f"{name}: {source.n:,} pictures of {source.facts['source']}")
            extracting.extract(held, source, job.extractor)
        if job.kept is not None:
            job.kept.complete(job.source.read)
        results = _figured(job, sets) if process.start().first else None
    return said(results, job.out) if aloud and results else results


def _figured(job: Job, sets: list[FeatureSet]) -> dict:
    """The results, by this process, or by another that is at it already."""
    claims, waited = Claims(job.out / ".work"), False
    claims.patience = _PATIENCE_S
    while not claims.take(_END):
        if not waited:
            process.say(f"{job.out}: another process computes the figures; waiting for it")
            waited = True
        time.sleep(_LOOK_S)
    try:
        return (known(job, waited) if waited else None) or _computed(job, waited, *sets)
    finally:
        claims.clear()


def _computed(job: Job, waited: bool, samples: FeatureSet, real: FeatureSet | None = None) -> dict:
    """Beside figures of the same evaluation that OUT has already, which are kept, or, if by other code, made anew."""
    before, fresh = _before(job, waited)
    asked, had = job.options["metrics"], before["options"]["metrics"] if before else []
    metrics = [name for name in figures.METRICS if name in (*asked, *had)]
    todo = [name for name in metrics if not (fresh and name in had)]
    remarks = [*job.remarks, *_seen(job, samples, real)]
    process.say(f"figures of {samples.n:,} pictures: {', '.join(todo)}")
    found, more = figures.figures(
        todo,
        samples,
        real or job.statistics,
        definition=job.options["definition"],
        kid_subset=job.options["kid_subset"],
        counted=_counted,
    )
    near, said = _sheet(job, samples, real)
    me = process.start()
    kept = before if fresh else {"figures": {}, "remarks": []}
    results = {
        "figures": kept["figures"] | found,
        "remarks": [*dict.fromkeys([*remarks, *kept["remarks"], *more, *said])],
        "published": job.published,
        "neighbours": near,
        **job.facts,
        "options": job.options | {"metrics": metrics},
        "machine": {"device": samples.settings["device"], "threads": samples.settings["threads"], "ranks": me.world},
        **passport.circumstances(),
    }
    if line := passport.set_aside(job.out, results):
        process.say(line)
    passport.write(job.out, results)
    return passport.read(job.out)


@contextmanager
def _counted(total: int, unit: str, done: str) -> Iterator[Callable]:
    """As `counter`, of steps that are worth a line only where they take long."""
    began = time.monotonic()
    say = lambda line: process.say(line) if time.monotonic() - began > _LONG_S else None  # noqa: E731
    with counter(total, unit, done, first=True, say=say) as advance:
        yield advance


def _seen(job: Job, samples: FeatureSet, real: FeatureSet | None) -> list[str]:
    """What is suspicious about pictures that have been looked at."""
    what = job.options["source"]
    labels, sums = (np.concatenate(each) for each in zip(*samples.chunks("labels", "sums"), strict=True))
    remarks = suspicions.duplicates(what, sums) + suspicions.balance(what, labels, job.classes)
    if real is not None:
        found = Counter(tuple(map(int, size)) for (sizes,) in real.chunks("sizes") for size in sizes)
        remarks += suspicions.copies(what, sums, np.concatenate([each for (each,) in real.chunks("sums")]))
        remarks += suspicions.sizes(job.options["reference"], found, job.source.size)
    return remarks


def _sheet(job: Job, samples: FeatureSet, real: FeatureSet | None) -> tuple[dict | None, list[str]]:
    """sheet.png; what the neighbours say, as figures and as remarks."""
    wanted, rows = job.options["neighbours"], job.statistics.features if job.statistics else None
    beside = rows if real is None else (real, job.real)
    many = 0 if beside is None else real.n if real else len(rows)
    if wanted == "off" or (wanted == "auto" and many > shown.MOST):
        beside = None
    said = shown.show(job.out / "sheet.png", samples, job.source, beside, _counted)
    if said is None:
        return None, []
    line = (
        f"nearest real pictures: {said['share']:.1%} of the samples are nearer to one than real ones are to each other "
        f"(median {said['median']:.4g}); about half is usual; more: they keep to the densest regions (low temperature, "
        "guidance), or are copies: look at sheet.png"
    )
    return said, [line]


def known(job: Job, new: bool = False) -> dict | None:
    """Results of the same evaluation, by the same code, that are there already, perhaps with more figures; code that
    somebody is changing counts as another, but where they are new."""
    before, fresh = _before(job, new)
    whole = fresh and {*job.options["metrics"]} <= {*before["options"]["metrics"]} and (job.out / "sheet.png").is_file()
    return before if whole else None


def _before(job: Job, new: bool) -> tuple[dict | None, bool]:
    """Results in OUT of the same evaluation, whatever its metrics, and whether they are by the same code."""
    with suppress(UserError):
        found = passport.read(job.out)
        if not passport.other(found, job.facts, exact=True):
            now = passport.circumstances() | {"machine": found["machine"]}
            return found, not passport.changes(found, now) and (new or not now["code"].get("changed"))
    return None, False


def said(results: dict, out: Path) -> dict:
    process.say(passport.table(results))
    process.say(f"written to {out}: results.json, sheet.png")
    return results
