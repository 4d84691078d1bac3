"""mage-ds evaluate RUN --reference REF --sweep steps=8,12,20 temperature=3,6,9: which settings draw the best pictures?

every combination -> a folder of its own, as `evaluate` makes it, of the same noise -> one table, one plot
"""

import difflib
import itertools
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mage_ds import files
from mage_ds.engine import process, scored, scoring
from mage_ds.engine.scoring import Job
from mage_ds.errors import UserError
from mage_ds.evaluation import fid
from mage_ds.recipes.sections import Sampling
from mage_ds.report import passport, sweep_plot, sweep_table
from mage_ds.report.progress import duration
from mage_ds.report.sweep_table import Row

_MOST = 200  # rows
_EXAMPLE = "such as steps=8,12,20"
_SAMPLE = {"steps": 1, "temperature": 1}  # the fields of `sampling` without a default


def sweep(
    source,
    sweep: Sequence[str],
    *,
    reference,
    threads: int = 1,
    out=None,
    **options,
) -> dict | None:
    """Evaluates a MAGE sampled from in every combination of the given settings; prints a table, writes sweep.json,
    sweep.md (the table) and sweep.png.

    Any number of processes may run it on one `out`, as ranks of a launch or not; what was killed goes on, what has
    ended is reused, and more values may be added later. All rows have the same noise, checkpoint, and features of the
    reference, which are extracted once.

    Args: sweep: KEY=VALUE,VALUE,... of fields of a recipe's `sampling`; out: each row's results are in a folder in it
    that is named by the settings; by default one beside the run's other evaluations; options: as of
    `tasks.score.score` but keep and data, the other fields of `sampling` among them.
    Returns: what sweep.json holds, on the first rank; None on the others. Raises: UserError.
    """
    asked = {"source": source, "reference": reference, "threads": threads, **options}
    settings = combinations(sweep, asked)
    if not scoring.is_model(Path(source)):
        raise UserError(f"{source}: --sweep samples from a MAGE, and this is none; give a run, an export or a file")
    process.start(threads)
    jobs = _open(asked, settings, None if out is None else Path(out))
    return _Sweep(jobs, settings).run()


# --- what is asked for -----------------------------------------------------------------------------------------------


def combinations(words: Sequence[str], given: dict) -> list[dict]:
    """KEY=VALUE,VALUE,... -> settings of each row, the first key's change last. UserError for what cannot be."""
    found: dict[str, list] = {}
    for word in words:
        key, equals, text = word.partition("=")
        name = key.replace("-", "_")
        if not equals:
            raise UserError(f"--sweep {word}: is no KEY=VALUE,VALUE {_EXAMPLE}; SOURCE stands before --sweep")
        if name not in Sampling.model_fields:
            close = difflib.get_close_matches(name, Sampling.model_fields, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"--sweep {word}: there is no such key, {hint}keys are {', '.join(Sampling.model_fields)}")
        if name in found or given.get(name) is not None:
            where = "before" if name in found else f"as --{name.replace('_', '-')}"
            raise UserError(f"--sweep {word}: {key} was given {where}; leave one out")
        found[name] = [_value(name, each) for each in text.split(",")]
        shown = [sweep_table.written(value) for value in found[name]]
        if twice := [each for each in shown if shown.count(each) > 1]:
            raise UserError(f"--sweep {word}: {key} {twice[0]} is given twice; leave one out")
    number = math.prod(len(values) for values in found.values())
    if not 2 <= number <= _MOST:
        what = "is one row, which needs no --sweep" if number == 1 else f"are {number:,} rows, {_MOST} are the most"
        raise UserError(f"--sweep {' '.join(words)}: {what}; give {'more' if number == 1 else 'fewer'} values")
    return [dict(zip(found, values, strict=True)) for values in itertools.product(*found.values())]


def _value(name: str, text: str) -> int | float | str:
    """A value of a field of `Sampling`, checked as one of a recipe is."""
    value = text
    for kind in (float, int):
        with suppress(ValueError):
            value = kind(text)
    try:
        return getattr(Sampling.model_validate(_SAMPLE | {name: value}), name)
    except ValueError as error:  # pydantic's
        said = error.errors()[0]["msg"]
        raise UserError(f"--sweep {name}={text}: {said[0].lower()}{said[1:]}") from None


def _open(asked: dict, settings: list[dict], out: Path | None) -> list[Job]:
    """A job for each row, of one model, extractor and reference, which are opened once."""
    names = [sweep_table.told(each, ",") for each in settings]
    first = scoring.open_job(scoring.settled(asked | settings[0]), out and out / names[0], None)
    if out is None:
        facts = {name: value for name, value in first.facts["source"].items() if name not in settings[0]}
        place = scoring.place(Path(asked["source"]), first.facts | {"source": facts | {"swept": [*settings[0]]}})
        out = place.with_name(f"sweep-{place.name}")
    first = first._replace(shared=out / "features")
    return [scoring.otherwise(first, each, out / name) for each, name in zip(settings, names, strict=True)]


# --- at work ---------------------------------------------------------------------------------------------------------


class _Sweep:
    """Row after row by all processes; those of a launch that do not compute a row's figures go on with the next."""

    def __init__(self, jobs: list[Job], settings: list[dict]):
        self.jobs, self.settings, self.out = jobs, settings, jobs[0].out.parent
        self.total, self.n = len(jobs), jobs[0].source.n

    def run(self) -> dict | None:
        extractor = self.jobs[0].extractor
        room = self.total * self.n * (extractor.width + (extractor.logits or 0)) * 4 / 2**30
        kept = f", with {room:.1f} GiB of features" if room > 0.1 else ""
        process.say(f"{self.total} rows of {self.n:,} pictures into {self.out}{kept}")
        process.on_first(self._begin)
        found = [scored.known(job) for job in self.jobs] if process.start().first else None
        todo = process.broadcast_object(found and [each is None for each in found])
        if reused := todo.count(False):
            process.say(f"{reused} of them are there already")
        began, made = time.monotonic(), 0
        with scoring.pinned(self.jobs[0].choice, self.out):
            for number in (number for number, wanted in enumerate(todo) if wanted):
                seconds = (time.monotonic() - began) / made * (sum(todo) - made) if made else 0
                left = f" (eta {duration(seconds)})" if made else ""
                process.say(f"row {number + 1}/{self.total}: {sweep_table.told(self.settings[number])}{left}")
                results, made = scored.run(self.jobs[number], aloud=False), made + 1
                if found:
                    found[number] = results
        return self._ended(found) if found else None

    def _begin(self) -> None:
        """The folders of all rows, so that one that holds something else is known before the first picture."""
        for job in self.jobs:
            job.begin("samples", job.source)
        if self.jobs[0].real is not None:
            self.jobs[0].begin("reference", self.jobs[0].real)

    def _ended(self, found: list[dict]) -> dict:
        """The table, the plot, sweep.json."""
        names = [name for name in found[0]["figures"] if all(name in each["figures"] for each in found)]
        rows = [
            Row(job.out.name, settings, {name: results["figures"][name] for name in names})
            for job, settings, results in zip(self.jobs, self.settings, found, strict=True)
        ]
        best = {name: rows[number].name for name, number in sweep_table.best(rows).items()}
        facts, varied = self.jobs[0].facts, self.settings[0]
        same = {
            name: {key: value for key, value in facts[name].items() if key not in varied} for name in passport.IDENTITY
        }
        told = {"rows": [row._asdict() for row in rows], "best": best, "remarks": self._remarks(found)}
        passport.write(self.out, {**told, **same, **passport.circumstances()}, "sweep.json")
        with files.saved(self.out / "sweep.md") as file:
            file.write(sweep_table.markdown(rows).encode())
        run, by = Path(facts["source"]["source"]).name, facts["extractor"]["name"]
        sweep_plot.save(self.out / "sweep.png", rows, f"{run}: {self.n:,} pictures a point, features of {by}")
        process.say(sweep_table.table(rows))
        for line in [*passport.notes(found[0]), *(f"- {remark}" for remark in told["remarks"])]:
            process.say(line)
        process.say(f"written to {self.out}: sweep.json, sweep.md, sweep.png, and a folder for each row")
        return told | same

    def _remarks(self, found: list[dict]) -> list[str]:
        """What holds for all rows; each row's own are in its results.json."""
        common = [each for each in found[0]["remarks"] if all(each in other["remarks"] for other in found)]
        if "fid" in found[0]["figures"] and self.n < fid.ENOUGH:
            common.append(
                f"FIDs of {self.n:,} pictures are biased upwards (fewer than {fid.ENOUGH:,}): set them beside each "
                "other only"
            )
        common.append("* is the best of its column; of rows whose intervals overlap, --versus tells which is better")
        return common
