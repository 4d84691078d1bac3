"""Jobs of a table, done: one after the other here, or by index as tasks of SLURM's arrays.

Whether a job is done is read from what it wrote, so all may be started again at any time.
`python -m mage_ds.engine.jobs FILE INDEX` is what launch/slurm_sweep.sbatch asks.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mage_ds import files
from mage_ds.engine import starts
from mage_ds.errors import EXIT_USER, Stopped, UserError
from mage_ds.recipes.jobs import Job

_WRITTEN = {"prepare": "prepared.json", "evaluate": "results.json", "fewshot": "fewshot.json"}  # last, by verb
_SAY_EVERY_S, _LOOK_EVERY_S = 30, 1
_PR_SET_PDEATHSIG = 1


def done(job: Job) -> bool:
    if job.words[0] == "train":
        return starts.status_of(job.out).get("state") == "finished"
    return Path(job.out, _WRITTEN[job.words[0]]).is_file()


def results(job: Job) -> dict | None:
    """What an evaluation has written; None before it has."""
    return json.loads(Path(job.out, _WRITTEN[job.words[0]]).read_text()) if done(job) else None


# --- here, one after the other ---------------------------------------------------------------------------------------


def run_all(jobs: Mapping[str, Job], out: Path, launch: Sequence[str], say: Callable[[str], None]) -> dict[str, str]:
    """Does what is not done, in order. launch: words that start mage_ds in place of this Python.

    Returns the jobs that are not done afterwards, and why: one that failed stops those that need it, and no others.
    Raises Stopped after SIGINT or SIGTERM, which the running job has been told; UserError where `out` is not writable.
    """
    lost: dict[str, str] = {}
    with files.writing(out):
        (out / "logs").mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs.values() if not done(job)]
    say(f"{len(jobs)} jobs in {out}, {len(jobs) - len(todo)} of them done")
    with _Signals() as signals:
        for number, job in enumerate(todo, 1):
            if missing := next((name for name in job.needs if name in lost), None):
                lost[job.name] = f"needs {missing}"
                continue
            log = out / "logs" / f"{job.name}.log"
            say(f"{number}/{len(todo)}  {job.words[0]} {job.name}  for {_rows(job)}; log: {log}")
            began = time.monotonic()
            code = _run(job, log, launch, signals, say)
            if signals.asked:
                raise Stopped(f"{signals.name}: {job.name} was told")
            if not done(job):
                lost[job.name] = f"{_reason(log) or f'exit code {code}'} (all of it: {log})"
                say(f"{number}/{len(todo)}  {job.name} FAILED: {lost[job.name]}")
            else:
                say(f"{number}/{len(todo)}  {job.name} done in {time.monotonic() - began:.0f} s")
    return lost


def _rows(job: Job) -> str:
    return job.rows[0] if len(job.rows) == 1 else f"{len(job.rows)} rows"


def _reason(log: Path) -> str:
    """What a log says about its end: the last line of an error."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("mage-ds: error: ")] or [line for line in lines if line.strip()]
    return errors[-1].removeprefix("mage-ds: error: ") if errors else ""


class _Signals:
    """SIGINT and SIGTERM are for the running job, which saves first; this process then ends by itself."""

    def __init__(self):
        self.asked, self._told = 0, 0

    def __enter__(self):
        self._before = {each: signal.signal(each, self._catch) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number, frame) -> None:
        self.asked, self.name, self.number = self.asked + 1, signal.Signals(number).name, number

    def news(self) -> bool:
        """Whether there is a signal that the job has not been told."""
        self._told, before = self.asked, self._told
        return self.asked > before


def _run(job: Job, log: Path, launch: Sequence[str], signals: _Signals, say: Callable[[str], None]) -> int:
    """One job from its start until its last process is gone; its exit code. It is a session of its own: Ctrl-C in a
    terminal reaches it through this process only, once."""
    mark, said = uuid.uuid4().hex, time.monotonic()
    alone = not launch or job.words[0] == "prepare"
    line = [*([sys.executable, "-m", "mage_ds"] if alone else launch), *job.words]
    with open(log, "w") as file:
        child = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MAGE_DS_LAUNCH": mark},
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(_LOOK_EVERY_S)
            break
        if signals.news():
            say(f"{signals.name}: {job.name} is told, and saves what it can")
            child.send_signal(signals.number) if alone else starts.tell(mark, str(int(signals.number)))
        elif signals.asked and not alone:  # ranks that were just being started
            starts.tell(mark, str(int(signal.SIGTERM)))
        elif time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            say(f"    {_last(log)}")
    if not alone:
        starts.gone(mark)
    return code


def _end_with_parent() -> None:
    """In the child: SIGTERM, after which a training saves, when the process that started it is killed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _last(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 2000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "has said nothing yet")[:200]


# --- by index, for SLURM ---------------------------------------------------------------------------------------------


def write(path: Path, jobs: Mapping[str, Job]) -> None:
    with files.saved(path) as file:
        file.write((json.dumps([job._asdict() for job in jobs.values()], indent=1) + "\n").encode())


def read(path: Path) -> list[Job]:
    return [Job(**each) for each in json.loads(path.read_text())]


def words_of(path: str, index: str) -> list[str]:
    """Of the job of this index; none where it is done. Raises UserError where one that it needs is not done."""
    listed = read(Path(path))
    job, by_name = listed[int(index)], {each.name: each for each in listed}
    if done(job):
        return []
    if missing := [name for name in job.needs if not done(by_name[name])]:
        raise UserError(
            f"{job.name}: needs {missing[0]}, which is not done (see the job of it); submit again when it is"
        )
    return job.words


if __name__ == "__main__":
    try:
        sys.stdout.write("".join(f"{word}\0" for word in words_of(*sys.argv[1:])))
    except UserError as error:
        sys.exit(print(f"mage-ds: error: {error}", file=sys.stderr) or EXIT_USER)
