"""mage-ds sweep table8 --data D --tokenizer T --out DIR: a table of the paper, from nothing to its figures.

a file -> jobs, which are other commands, each once -> done here or by SLURM -> the table beside the published one
"""

import json
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from mage_ds import files
from mage_ds.engine import arrays, checkpoint, jobs, run_folder, run_parts
from mage_ds.errors import UserError, refuse_differences
from mage_ds.recipes import jobs as graphs
from mage_ds.recipes import load_recipe, recipe_file, recipe_names
from mage_ds.recipes.jobs import Graph, Inputs
from mage_ds.recipes.sweep import Sweep, load_sweep, sweep_names
from mage_ds.report import bands, paper_table, table_plot
from mage_ds.report.paper_table import Line

_GIVEN = "inputs.json"
_SHOTS = "shots"  # the column that stands for one of each number of shots


def sweep(
    *,
    name: str | None = None,
    scale: str | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    inception: str | None = None,
    models: str | None = None,
    sets: Sequence[str] = (),
    out: str | None = None,
    seeds: int | None = None,
    only: Sequence[str] = (),
    launch: str = "",
    slurm: str | None = None,
    table: bool = False,
    record: bool = False,
) -> None:
    """Makes a table of the paper in `out`, which any number of tables may share; without a name lists them.

    What is done is not done again. Args: scale ("paper"), data, tokenizer, inception, models, sets: of
    `recipes.jobs.Inputs`, known from the first command on; seeds (1): of `recipes.jobs.expand`, known for this table;
    only: of the same, for making; launch: words that start mage_ds, such as
    `deepspeed --num_gpus 8 --module mage_ds`; slurm: options of sbatch, submits arrays in place of doing it here;
    table: only tells what is measured so far; record: only writes the curves that later runs are compared with.
    Raises: UserError, where a job failed too; Stopped.
    """
    if name is None:
        return print(*(f"{each:8}  {load_sweep(each).title}" for each in sweep_names()), sep="\n")
    asked = load_sweep(name)
    if out is None and not table:
        raise UserError("--out DIR: is missing; it is the folder for the runs, and several tables may share it")
    if only and (table or record):
        raise UserError("--only: chooses what is made; --table and --record are of all rows: leave it out")
    folder, title = Path(out or "."), Path(name).stem
    given = {"data": data, "tokenizer": tokenizer, "inception": inception, "models": models, "sets": [*sets]}
    told = table or record
    known = _remembered(folder if out else None, {key: value for key, value in given.items() if value}, scale)
    scale, seeds = known["scale"], seeds or known["seeds"].get(title, 1)
    inputs = Inputs(**{key: value for key, value in known.items() if key in given})
    graph = graphs.expand(asked, scale, inputs, folder, seeds=seeds, only=only, told=told)
    if record:
        return _record(graph, folder)
    lost: dict[str, str] = {}
    if not table:
        starter, options = _starter(launch), _split("--slurm", slurm or "")
        _remember(folder, known | {"seeds": known["seeds"] | {title: max(seeds, known["seeds"].get(title, 1))}})
        for remark in graph.remarks:
            _say(f"- {remark}")
        if slurm is not None:
            return _submitted(graph, title, folder, options, f"mage-ds sweep {name} --out {folder} --table")
        lost = jobs.run_all(graph.jobs, folder, starter, _say)
    _tell(asked, scale, graph, title, folder if out else None)
    if lost:
        failed, reason = next(iter(lost.items()))
        raise UserError(f"{len(lost)} of {len(graph.jobs)} jobs are not done, first {failed}: {reason}")


def _split(option: str, text: str) -> list[str]:
    """The words of an option. UserError where a quote is open."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option} {text}: {str(error).lower()}; mend the quotes") from None


def _starter(launch: str) -> list[str]:
    """The words of --launch. UserError where they start nothing."""
    words = _split("--launch", launch)
    if words and shutil.which(words[0]) is None:
        raise UserError(f"--launch {words[0]}: there is no such program; name one that is on the PATH, as `deepspeed`")
    return words


def _say(line: str) -> None:
    print(line, flush=True)


# --- what is given, and done -----------------------------------------------------------------------------------------


def _remembered(folder: Path | None, given: dict, scale: str | None) -> dict:
    """What was given by now for this folder. UserError where it was something else: runs would not fit together."""
    try:
        before = json.loads((folder / _GIVEN).read_text()) if folder else {}
    except (OSError, ValueError):
        before = {}
    now = {key: [_place(each) for each in value] if key == "sets" else _place(value) for key, value in given.items()}
    now |= {"scale": scale} if scale else {}
    refuse_differences(folder, "runs", before, {key: now[key] for key in now if key in before}, str)
    return {"scale": "paper", "seeds": {}} | before | now


def _remember(folder: Path, known: dict) -> None:
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_aside(folder / _GIVEN, json.dumps(known, indent=1) + "\n")


def _place(given: str) -> str:
    return given if given == "random" else str(Path(given).resolve())


def _submitted(graph: Graph, title: str, folder: Path, options: list[str], later: str) -> None:
    numbers = arrays.submit(graph, title, folder, options, _say)
    if not numbers:
        _say(f"all {len(graph.jobs)} jobs are done already")
    _say(f"then: {later}")


# --- the table -------------------------------------------------------------------------------------------------------


def _tell(asked: Sweep, scale: str, graph: Graph, title: str, folder: Path | None) -> None:
    """Prints the table; writes it and its plot to `folder`."""
    columns = [name for name in asked.columns if name != _SHOTS]
    numbers = getattr(asked, scale).fewshot
    if _SHOTS in asked.columns and numbers:
        columns += map(str, numbers.shots)
    lines = [
        Line(label, row.at, row.published, _figures(graph, label) if label in graph.rows and folder else {})
        for label, row in asked.rows.items()
    ]
    done = sum(map(jobs.done, graph.jobs.values())) if folder else 0
    notes = [f"{asked.title}: {asked.compared}", *_notes(asked, scale, graph, done)]
    _say(f"{title}: {notes[0]}\n{paper_table.text(lines, columns)}")
    for note in notes[1:]:
        _say(f"- {note}")
    if folder is None or not folder.is_dir():
        return
    written = [f"{title}.md"]
    with files.saved(folder / f"{title}.md") as file:
        text = [
            f"# {title}: {notes[0]}\n\n",
            paper_table.markdown(lines, columns),
            "\n",
            *(f"- {n}\n" for n in notes[1:]),
        ]
        file.write("".join(text).encode())
    if asked.trend:
        trend, picture = asked.trend, folder / f"{title}.png"
        if table_plot.save(
            picture, lines, trend.figures, trend.axis, f"{title}: {asked.title}", apart=scale != "paper"
        ):
            written.append(picture.name)
    _say(f"written to {folder}: {', '.join(written)}")


def _notes(asked: Sweep, scale: str, graph: Graph, done: int) -> list[str]:
    notes = [
        f"{done} of {len(graph.jobs)} jobs are done (--scale {scale}); what is not measured, or not published, is blank"
    ]
    if scale != "paper":
        notes.append(
            "measured with tiny recipes on digits, published with the paper's on ImageNet: compare trends only"
        )
    numbers = getattr(asked, scale)
    if numbers.extractor and "fid" in asked.columns:
        notes.append(
            f"FID is of {numbers.samples:,} pictures and features of {numbers.extractor.recipe}, not Inception's"
        )
    for name in {each for row in graph.rows.values() for each in row.fewshot}:
        notes.append(f"the figure: {Path(graph.jobs[name].out) / 'fewshot.png'}")
    return notes


def _figures(graph: Graph, label: str) -> dict[str, list[float]]:
    """column -> what is measured of a row, one for each seed that has ended."""
    row, found = graph.rows[label], {}
    for column, names in (("top1", row.probe), ("finetune", row.finetune)):
        ended = [Path(graph.jobs[name].out) for name in names if jobs.done(graph.jobs[name])]
        found[column] = [
            100 * v for run in ended if (v := run_parts.figures(run, math.inf).get("val_top1")) is not None
        ]
    for results in filter(None, (_results(graph, name) for name in row.fid)):
        for column in ("fid", "is"):
            if (value := results["figures"].get(column, {}).get("value")) is not None:
                found.setdefault(column, []).append(value)
    for name, source in zip(row.fewshot, row.sources, strict=True) if row.fewshot else ():
        for shots, top1 in _by_shots(_results(graph, name), source).items():
            found.setdefault(shots, []).append(top1)
    return found


def _by_shots(results: dict | None, source: str) -> dict[str, float]:
    """Number of shots -> accuracy of a source in per cent, the mean over the data sets."""
    if results is None:
        return {}
    called = next((each["name"] for each in results["sources"] if each["given"] == source), None)
    found: dict[str, list[float]] = {}
    for each in results["results"]:
        if each["source"] == called:
            found.setdefault(str(each["shots"]), []).append(100 * each["top1"])
    return {shots: sum(values) / len(values) for shots, values in found.items()}


def _results(graph: Graph, name: str) -> dict | None:
    """What a job has written; None before it has."""
    return jobs.results(graph.jobs[name])


# --- curves ----------------------------------------------------------------------------------------------------------


def _record(graph: Graph, folder: Path) -> None:
    """Writes the curve of every packaged recipe that was trained to its end, unchanged but for its seed; of a
    classifier, on the first encoder that was."""
    packaged = {name: load_recipe(name) for name in recipe_names()}
    known = [None, *map(bands.identity, packaged.values())]
    found: dict[str, dict[int, Path]] = {}
    first: dict[str, dict | None] = {}
    for job in graph.jobs.values():
        name, run = job.words[1], Path(job.out)
        if job.words[0] != "train" or name not in packaged or not jobs.done(job):
            continue
        recipe, upon = run_folder.load_recipe(run), bands.beneath(run_folder.read_facts(run))
        same = bands.identity(recipe) == bands.identity(packaged[name])
        if same and upon in known and first.setdefault(name, upon) == upon:
            found.setdefault(name, {})[recipe.seed] = run
    if not found:
        raise UserError(f"--record: {folder} has no finished run of a packaged recipe as it is; finish the table first")
    for name, runs in found.items():
        path = bands.path_of(recipe_file(name))
        bands.write(path, packaged[name], runs, _dataset(next(iter(runs.values()))), first[name])
        few = "" if len(runs) > 2 else "; of fewer than three seeds a band is a guess: --seeds 3"
        _say(f"{path}: seeds {', '.join(map(str, sorted(runs)))}{few}")


def _dataset(run: Path) -> int:
    return checkpoint.read_meta(checkpoint.newest_whole(run))["dataset"]
