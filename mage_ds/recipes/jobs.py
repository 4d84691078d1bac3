"""A table -> the commands that make it, each once: a graph of jobs.

A job is named by what it makes, a hash of its resolved recipe and of the names of what is beneath it. So two rows, and
two tables with the same --out, share what they have in common, and a command given again finds what is done.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mage_ds.errors import UserError
from mage_ds.recipes.schema import Recipe
from mage_ds.recipes.sweep import Entry, Sweep, Training

_KINDS = ("mae:", "timm:", "run:")  # what may stand before the name of a file of others


class Inputs(NamedTuple):
    """Paths that the command line gives. sets: data of few-shot classification; models: a folder of files of others."""

    data: str | None = None
    tokenizer: str | None = None
    inception: str | None = None
    models: str | None = None
    sets: Sequence[str] = ()


class Job(NamedTuple):
    """words: of the command line behind `mage-ds`; needs: names of jobs that must have ended before; out: the folder
    that it writes to; rows: labels of the rows that it is for."""

    name: str
    words: list[str]
    needs: list[str]
    out: str
    rows: list[str]


class Measured(NamedTuple):
    """Of a row, with one item for each seed: where its model is, and the names of the jobs whose figures are its."""

    sources: list[str]
    fid: list[str]
    probe: list[str]
    finetune: list[str]
    fewshot: list[str]


class Graph(NamedTuple):
    """jobs: by name, each behind those that it needs; rows: by label; remarks: what is left out and why."""

    jobs: dict[str, Job]
    rows: dict[str, Measured]
    remarks: list[str]

    def stages(self) -> list[list[str]]:
        """Names of the jobs that need nothing, of those that need only these, and so on."""
        level: dict[str, int] = {}
        for job in self.jobs.values():
            level[job.name] = 1 + max((level[name] for name in job.needs), default=-1)
        return [[name for name, its in level.items() if its == each] for each in range(max(level.values()) + 1)]


def expand(
    sweep: Sweep, scale: str, inputs: Inputs, out: Path, *, seeds: int = 1, only: Sequence[str] = (), told: bool = False
) -> Graph:
    """The jobs of a table at a scale, in `out`.

    seeds: all that a row trains is done with so many seeds, but for what its FID is measured by; only: labels of rows;
    told: only names are of interest, so nothing need be given. Raises UserError for what is needed and not given, and
    for recipes that cannot be.
    """
    for label in only:
        if label not in sweep.rows:
            raise UserError(f"--only {label}: there is no such row; the rows are {', '.join(sweep.rows)}")
    chosen = [(label, entry) for label, entry in sweep.entries(scale) if not only or label in only]
    if not chosen:
        raise UserError(f"--scale {scale}: none of the rows{' of --only' if only else ''} stands at this scale")
    graph = _Expansion(sweep, scale, inputs, out, told)
    for seed in range(seeds):
        for label, entry in chosen:
            graph.row(label, entry, seed)
        graph.fewshot(seed)
    return Graph(graph.jobs, graph.rows, [*dict.fromkeys(graph.remarks)])


class _Expansion:
    def __init__(self, sweep: Sweep, scale: str, inputs: Inputs, out: Path, told: bool):
        self.scale, self.inputs, self.out, self.told = getattr(sweep, scale), inputs, out, told
        self.columns, self.called = sweep.columns, scale
        self.jobs: dict[str, Job] = {}
        self.rows: dict[str, Measured] = {}
        self.remarks: list[str] = []

    def row(self, label: str, entry: Entry, seed: int) -> None:
        """The jobs of a row with one seed."""
        found = self.rows.setdefault(label, Measured([], [], [], [], []))
        if entry.given:
            if (source := self._file(label, entry.given)) is None:
                return
            below, recipe = entry.given, None
        else:
            below, recipe = self._train(label, entry.train, seed)
            source = self.jobs[below].out
        found.sources.append(source)
        if (
            "fid" in self.columns
            and self.scale.samples
            and getattr(recipe, "objective", None) in ("reconstruction", "both")
        ):
            self._score(label, below, found)
        if recipe is not None and recipe.task == "classify":  # its own accuracy is the row's
            found.probe.append(below)
            return
        for training, names in ((entry.probe or self.scale.probe, found.probe), (entry.finetune, found.finetune)):
            if training:
                names.append(self._train(label, training, seed, (below, source))[0])

    def fewshot(self, seed: int) -> None:
        """One job for all rows with one seed: each is a line of its figure."""
        numbers = self.scale.fewshot
        rows = {label: found for label, found in self.rows.items() if len(found.sources) > seed}
        if numbers is None or not rows:
            return
        data, first = self._data("few-shot") if self.scale.sample else (None, [])
        sets = self.inputs.sets or ([data] if data else [])
        if not sets and not self.told:
            raise UserError(
                "--sets: give folders of few-shot data, each with train/ and val/ (data/README.md makes them)"
            )
        sources = [found.sources[seed] for found in rows.values()]
        made = {job.out: job.name for job in self.jobs.values()}
        below = [made.get(source, Path(source).name) for source in sources]
        needs = [made[source] for source in sources if source in made]
        shots = ",".join(map(str, numbers.shots))
        words = ["fewshot", *sources, "--data", *sets, "--shots", shots, "--trials", str(numbers.trials)]
        for label, found in rows.items():
            found.fewshot.append(
                self._add(
                    label,
                    "fewshot",
                    {"of": below, "shots": shots, "trials": numbers.trials},
                    words,
                    [*first, *needs],
                    "fewshot",
                )
            )

    # --- jobs

    def _train(
        self, label: str, training: Training, seed: int, upon: tuple[str, str] | None = None
    ) -> tuple[str, Recipe]:
        """upon: name and path of what the trained encoder of a classifier is in."""
        try:
            recipe, changes = training.resolved(seed)
        except UserError as error:
            said = str(error).replace("command line: ", f"{training.recipe}: ", 1)
            raise UserError(f"row {label}: {said}") from None
        data, needs = self._data(label)
        words, below = ["train", training.recipe, *changes, "--data", data], None
        if upon:
            below, source = upon
            words += ["--init", source]
            needs = needs + [below] * (below in self.jobs)
        elif recipe.task != "tokenizer" and recipe.tokenizer is not None:
            below, source = self._tokenizer(label, seed)
            words += ["--tokenizer", source]
            needs = needs + [below] * (below in self.jobs)
        stem = Path(training.recipe).stem
        return self._add(label, stem, {"recipe": recipe.identity(), "below": below}, words, needs, "runs"), recipe

    def _score(self, label: str, below: str, found: Measured) -> None:
        data, needs = self._data(label)
        words, measure = (
            ["evaluate", self.jobs[below].out, "--reference", data + ":val" * (self.scale.reference == "val")],
            None,
        )
        if self.scale.extractor:
            measure, _ = self._train(label, self.scale.extractor, 0)
            words += ["--features", f"run:{self.jobs[measure].out}", "--metrics", "fid"]
            needs = [*needs, measure]
        elif self.inputs.inception or self.told:
            words += ["--inception", self.inputs.inception or "", "--metrics", "fid,is"]
        else:
            self.remarks.append("FID and IS are left out: they need Inception's weights (--inception FILE)")
            return
        n = self.scale.samples
        words += ["-n", str(n), "--neighbours", "off"]  # not --num, which DeepSpeed's launcher takes for its own
        facts = {"of": below, "by": measure, "n": n, "reference": self.scale.reference}
        found.fid.append(self._add(label, "score", facts, words, [*needs, below], "scores"))

    def _data(self, label: str) -> tuple[str, list[str]]:
        """The path of the data, and the job that makes it."""
        if self.inputs.data or (self.told and not self.scale.sample):
            return self.inputs.data or "", []
        if self.scale.sample is None:
            raise UserError(f"--data: is missing; --scale {self.called} of this table trains on a data set of yours")
        name = f"data-{self.scale.sample}"
        out = str(self.out / name)
        job = Job(name, ["prepare", "--sample", self.scale.sample, "--out", out], [], out, [])
        self._for(label, self.jobs.setdefault(name, job))
        return out, [name]

    def _tokenizer(self, label: str, seed: int) -> tuple[str, str]:
        """Its name and its path."""
        if self.inputs.tokenizer or (self.told and not self.scale.tokenizer):
            return "given", self.inputs.tokenizer or ""
        if self.scale.tokenizer is None:
            raise UserError(f"--tokenizer: is missing; --scale {self.called} of this table needs a trained one")
        name, _ = self._train(label, self.scale.tokenizer, seed)
        return name, self.jobs[name].out

    def _file(self, label: str, given: str) -> str | None:
        """The path of a file of others, with what stands before it; None, and a remark, where it is not there."""
        kind = next((each for each in _KINDS if given.startswith(each)), "")
        path = Path(self.inputs.models or "") / given.removeprefix(kind)
        if self.told or (self.inputs.models and path.exists()):
            return f"{kind}{path}"
        where = f"--models {self.inputs.models} does not hold" if self.inputs.models else "is in --models FOLDER"
        self.remarks.append(f"row {label} is left out: it is of {path.name}, which {where}")
        return None

    def _add(self, label: str, stem: str, facts: dict, words: list[str], needs: list[str], folder: str) -> str:
        """The name of a job, which is added where it is new."""
        text = json.dumps(facts, sort_keys=True, default=str)
        name = f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        out = str(self.out / folder / name)
        job = Job(name, [*words, "--out", out], [*dict.fromkeys(needs)], out, [])
        self._for(label, self.jobs.setdefault(name, job))
        return name

    def _for(self, label: str, job: Job) -> None:
        if label not in job.rows:
            job.rows.append(label)
