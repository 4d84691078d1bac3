"""For tests: mage_ds started as a user starts it, watched from outside, and whatever is left of it found in /proc."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

BIN = Path(sys.executable).parent
# A MAGE of 33,154 parameters and steps of milliseconds: what is tested is what happens around them.
TINY = ["batch=16", *(f"model.{part}={{depth: 1, width: 32, heads: 2}}" for part in ("encoder", "decoder"))]
OFTEN = ["report.log_every=1", "report.evaluate_every.steps=1000", "report.pictures_every.steps=1000"]
MARK = "MAGE_DS_TEST"  # in the environment of all that a test starts


def environment(**more) -> dict:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    # A user's setting would decide for the tests, and a rank's would make this one.
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MAGE_DS_DEBUG")}
    return ours | {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} | more


def mage_ds(*argv, cwd=None, code: int | None = 0) -> subprocess.CompletedProcess:
    """One process: `python -m mage_ds argv`, and the exit code that it must have (None: any)."""
    line = [sys.executable, "-m", "mage_ds", *map(str, argv)]
    done = subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done


def several(*lines: list, cwd: Path) -> list[tuple[int, str, str]]:
    """Command lines one after the other in one process, which imports torch once: (exit code, stdout, stderr)."""
    program = (
        "import json, sys\n"
        "from mage_ds.cli import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    code = main(line)\n"
        "    for stream in (sys.stdout, sys.stderr): print(f'RESULT {code}', file=stream, flush=True)"
    )
    words = json.dumps([[str(word) for word in line] for line in lines])
    line = [sys.executable, "-c", program, words]
    done = subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    out, err = (re.split(r"^RESULT (\d+)\n", text, flags=re.MULTILINE) for text in (done.stdout, done.stderr))
    return [(int(code), said, wrong) for said, code, wrong in zip(out[::2], out[1::2], err[::2], strict=False)]


def living(assignment: str) -> dict[int, list[bytes]]:
    """The living processes with this NAME=VALUE in their environment: process id -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if assignment.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
    return found


def kill_all(assignment: str, children: list[subprocess.Popen]) -> None:
    """SIGKILL to all that are living, until none is left; children: those of them that are this process's own."""
    while left := living(assignment):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for child in children:
            child.poll()


class Launch:
    """`deepspeed --num_accelerators RANKS --module mage_ds argv`, running in a session of its own.

    script: a Python file in place of `--module mage_ds`. All its processes carry a mark in their environment.
    """

    def __init__(self, *argv, cwd: Path, ranks: int = 2, script: Path | None = None):
        program = [str(script)] if script else ["--module", "mage_ds"]
        front = [BIN / "deepspeed", "--master_port", _free_port(), "--num_accelerators", ranks]
        self._start([*front, *program, *argv], cwd, {})

    def _start(self, line: list, cwd: Path, more: dict[str, str]) -> None:
        self._mark, self.cwd = uuid.uuid4().hex, cwd
        self._output = cwd / f"launch-{self._mark}.log"
        with open(self._output, "w") as file:
            self.outer = subprocess.Popen(
                [str(word) for word in line],
                cwd=cwd,
                env=environment(**{MARK: self._mark}, **more),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self._output.unlink()

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def said(self) -> list[str]:
        """The lines that are not the launcher's."""
        return [line for line in self.output.splitlines() if line and not line.startswith("[20")]

    def processes(self) -> dict[int, str]:
        """The living processes of this launch: process id -> `deepspeed`, `launch.py`, `rank 0`, ..., `other`."""
        return {pid: _role(command) for pid, command in living(f"{MARK}={self._mark}").items()}

    def pid(self, role: str) -> int:
        return next(pid for pid, what in self.processes().items() if what == role)

    def until(self, condition, seconds: float = 240.0, *, alive: bool = True):
        """Wait for condition() to be true and return it; fails after `seconds`, or when the launch has ended."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            gone = alive and self.outer.poll() is not None
            assert not gone and time.monotonic() < end, f"{'ended' if gone else 'waited in vain'}:\n{self.output}"
            time.sleep(0.01)
        return value

    def ended(self, seconds: float = 240.0) -> int | None:
        """Wait until no process is left; the exit code of `deepspeed`."""
        self.until(lambda: self.outer.poll() is not None and not self.processes(), seconds, alive=False)
        return self.outer.returncode

    def kill(self) -> None:
        """SIGKILL to every process, until none is left."""
        kill_all(f"{MARK}={self._mark}", [self.outer])
        self.outer.wait()


class Script(Launch):
    """`bash launch/NAME argv`, with `more` in its environment; `outer` is the script."""

    def __init__(self, name: str, *argv, cwd: Path, **more: str):
        # A shell cannot catch what was ignored when it began, as Ctrl-C is for whatever `&` has started.
        line = ["env", "--default-signal=INT", "bash", Path(__file__).parents[1] / "launch" / name, *argv]
        self._start(line, cwd, {"VIRTUAL_ENV": str(BIN.parent), **more})


def run(*argv, cwd: Path, code: int | None = 0, **options) -> Launch:
    """A launch from start to end, and the exit code of `deepspeed` that it must have (None: any)."""
    with Launch(*argv, cwd=cwd, **options) as launch:
        ended, launch.text = launch.ended(600), launch.output
        assert code is None or ended == code, launch.text
    return launch


def _role(command: list[bytes]) -> str:
    if b"deepspeed.launcher.launch" in command:
        return "launch.py"
    for word in command:
        if word.startswith(b"--local_rank="):
            return f"rank {word.decode().partition('=')[2]}"
    return "deepspeed" if any(word.endswith(b"/deepspeed") for word in command) else "other"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# --- what a run folder says


def metrics(run: Path) -> list[dict]:
    """The whole lines of metrics.jsonl (the last may be half written)."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training record, in the order of the file."""
    return [(record["step"], record["loss"]) for record in metrics(run) if "loss" in record]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def tree(*folders: Path) -> dict[str, tuple]:
    """Every file below the folders with what tells a change: to compare before and after."""
    entries = [entry for folder in folders if folder.exists() for entry in (folder, *folder.rglob("*"))]
    return {str(entry): (entry.lstat().st_mode, entry.lstat().st_size) for entry in entries}


def make_data_and_tokenizer(folder: Path) -> tuple[Path, Path]:
    """Prepared digits and a tokenizer of three steps, in `folder`."""
    data, tokenizer = folder / "digits", folder / "tokenizer"
    few = ["duration.steps=3", "batch=16", *OFTEN]
    results = several(
        ["prepare", "--sample", "digits", "--out", data],
        ["train", "digits_tokenizer", *few, "--data", data, "--out", tokenizer],
        cwd=folder,
    )
    assert [code for code, _, _ in results] == [0, 0], results
    return data, tokenizer
