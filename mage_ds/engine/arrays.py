"""Jobs of a table as SLURM's arrays: one for each stage, which begins when all of the one before has ended.

`afterany`, not `afterok`: one job that failed must not stop those that do not need it. Each task asks whether what it
needs is done (engine/jobs.py), and ends with an error where it is not.
"""

import hashlib
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import mage_ds
from mage_ds import files
from mage_ds.engine import jobs
from mage_ds.errors import UserError
from mage_ds.recipes.jobs import Graph

_SCRIPT = "slurm_sweep.sbatch"


def submit(graph: Graph, name: str, out: Path, options: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Submits what is not done; options: of sbatch, which win over the script's head. Returns the arrays' numbers.

    Raises UserError where sbatch refuses, and where an earlier submission is still in the queue.
    """
    launch = Path(mage_ds.__file__).resolve().parent.parent / "launch"
    if not (launch / _SCRIPT).is_file():
        raise UserError(f"--slurm: {launch / _SCRIPT} is missing; a checkout has it (git clone, pip install -e .)")
    book = out / f"{name}.slurm.json"
    _refuse_queued(book)
    text = json.dumps([job._asdict() for job in graph.jobs.values()])
    file = (
        out / "jobs" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    )  # arrays in the queue keep theirs
    with files.writing(out):
        file.parent.mkdir(parents=True, exist_ok=True)
        jobs.write(file, graph.jobs)
    index = {each: number for number, each in enumerate(graph.jobs)}
    submitted: list[str] = []
    for stage in graph.stages():
        todo = [each for each in stage if not jobs.done(graph.jobs[each])]
        if not todo:
            continue
        words = [f"--array={','.join(str(index[each]) for each in todo)}", f"--job-name={name}"]
        words += [f"--dependency=afterany:{submitted[-1]}"] if submitted else []
        number = _sbatch([*options, *words, str(launch / _SCRIPT), str(file), str(launch)])
        submitted.append(number)
        with files.saved(book) as written:
            written.write((json.dumps(submitted) + "\n").encode())
        say(f"array {number}: {len(todo)} jobs: {', '.join(todo)}")
    return submitted


def _sbatch(words: list[str]) -> str:
    try:
        asked = subprocess.run(["sbatch", "--parsable", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("--slurm: there is no sbatch here; start it on a login node, or leave --slurm out") from None
    if asked.returncode:
        reason = (asked.stderr.strip() or f"exit code {asked.returncode}").splitlines()[-1]
        raise UserError(f"--slurm: sbatch refuses ({reason}); give its options, such as --slurm='--partition=gpu'")
    return asked.stdout.strip().partition(";")[0]


def _refuse_queued(book: Path) -> None:
    """The same jobs twice would be in each other's way."""
    if not book.is_file():
        return
    line = ["squeue", "--noheader", "--format=%F", f"--jobs={','.join(json.loads(book.read_text()))}"]
    try:
        queued = subprocess.run(line, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        return
    if queued:
        numbers = " ".join(dict.fromkeys(queued))
        raise UserError(f"--slurm: arrays {numbers} of this table are in the queue; wait, or `scancel {numbers}` first")
