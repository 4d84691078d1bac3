"""`mage-ds doctor`: is this host, or every host of a hostfile, fit for training? Facts, then a table, then findings."""

import contextlib
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mage_ds.engine import hosts, launched, machine, wire
from mage_ds.errors import UserError
from mage_ds.report import findings, host_table

HERE = "localhost"
_START_S = 40  # for a remote Python that imports nothing heavy yet
_WIRE_S = wire.LIMIT_S + 20
_PATIENCE_S = 10.0  # for a file to be seen by another host
_TICKS = 7  # readings of a clock; the quickest counts
_TOGETHER = 32  # hosts examined at the same time


class NoAnswer(Exception):
    """Why a host did not answer a question; the message is a short clause."""


def doctor(*, hostfile=None, ssh_port=None, shared=None, data=None, answers=False, rank=False) -> None:
    """Examines this host, or all of `hostfile` through ssh; prints a table and the findings.

    Args: shared: folder that all hosts should see; data: data set whose pictures are listed and decoded on each;
    answers: answer another doctor's questions on stdin instead; rank: be one of the all-reduce instead.
    Raises: UserError where a finding is red (exit code 2).
    """
    if answers:
        machine.answer()
    elif rank:
        wire.rank()
    elif os.environ.get("RANK", "0") == "0":  # under a launcher one of the ranks looks
        _examine(hostfile, ssh_port, *(os.path.abspath(path) if path else None for path in (shared, data)))


def _examine(hostfile, ssh_port: int | None, shared: str | None, data: str | None) -> None:
    slots = {host.name: host.slots for host in hosts.read_hostfile(hostfile)} if hostfile else {HERE: None}
    facts = {name: {} for name in slots}
    if hostfile:
        _tell(f"reaching {len(slots)} hosts")
        away = hosts.unreachable(hosts.read_hostfile(hostfile), ssh_port)
        facts.update({name: _unreachable(name, why, ssh_port) for name, why in away.items()})
    sessions = {name: Session(name, _words(name, ssh_port, bool(hostfile))) for name in slots if not facts[name]}
    try:
        with ThreadPoolExecutor(_TOGETHER) as pool:
            for name, answers in pool.map(lambda each: _ask_all(each, shared, data), sessions.values()):
                facts[name] = answers
        _meet(sessions, facts, shared)
        report = _all_reduce(sessions, facts, slots if hostfile else None, ssh_port)
    finally:
        for session in sessions.values():
            session.close()
    asked = tuple(name for name, path in (("shared", shared), ("data", data)) if path)
    _print(facts, slots if hostfile else None, report, asked)


def _tell(text: str) -> None:
    print(f"doctor: {text} ...", file=sys.stderr, flush=True)


# --- asking a host ---------------------------------------------------------------------------------------------


def _words(name: str, port: int | None, remote: bool) -> list[str]:
    """The command that answers our questions on a host: this Python, with what .deepspeed_env gives the ranks."""
    words = [sys.executable, "-m", "mage_ds", "doctor", "--json"]
    if not remote:
        return words
    # Double quotes as DeepSpeed's: a line PATH=/somewhere/bin:$PATH is meant to be filled in there.
    exports = "".join(f'export {key}="{value}"; ' for key, value in _exported().items())
    line = hosts.ssh_command(name, ["sh", "-c", f"{exports}exec {shlex.join(words)}"], port)
    if "-n" in line:
        line.remove("-n")  # we have something to say on stdin
    return line


def _exported() -> dict[str, str]:
    """What the launcher exports to every host, from the files in which it looks."""
    found = {}
    for folder in (Path.home(), Path()):
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for line in path.read_text().splitlines() if path.is_file() else ():
            key, equals, value = line.partition("=")
            if not equals:
                raise UserError(f"{path}: {line!r} is no NAME=VALUE, and the launcher stops at it; remove the line")
            found[key.strip()] = value.strip()
    return found


class Session:
    """Questions to one host, one after the other, answered by a process there that is started anew if it dies."""

    def __init__(self, name: str, words: list[str]):
        self.name, self._words, self._process = name, words, None
        self.dead: str | None = None  # why it cannot even be started

    def ask(self, check: str, **given):
        """The value of a check of engine/machine.py. Raises: NoAnswer."""
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it died since the last answer
        if self._process is None:
            self._start()
        if shown := machine.CHECKS[check].shown:
            _tell(f"{self.name}: {shown}")
        try:
            self._process.stdin.write(json.dumps({"check": check, **given}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise NoAnswer(self._ended()) from None
        return self._answer(machine.CHECKS[check].seconds + machine.GRACE_S + 5)

    def _start(self) -> None:
        if self.dead:
            raise NoAnswer(self.dead)
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed with the session)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._process = subprocess.Popen(self._words, env=launched.without_rank(), text=True, errors="replace", **pipes)
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        try:
            self._answer(_START_S)
        except NoAnswer as reason:
            self.dead = str(reason)
            raise

    def _answer(self, seconds: float):
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise NoAnswer(f"no answer within {seconds:.0f} s") from None
        if line is None:
            raise NoAnswer(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise NoAnswer(answer["error"])
        return answer["value"]

    def _ended(self) -> str:
        """Why the process is gone."""
        self._process.wait()
        self._said.seek(0)
        last = [line.strip() for line in self._said.read().splitlines() if line.strip()][-1:] or ["without a word"]
        code = self._process.returncode
        self.close()
        if "No module named mage_ds" in last[0] or "invalid choice: 'doctor'" in last[0]:
            return f"no mage_ds of this version for {sys.executable}"
        if code == 127:
            return f"no {sys.executable}"
        return f"ended with exit code {code}: {last[0]}"

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):  # it is gone already
                self._process.stdin.close()  # it ends by itself, also beyond a broken connection
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._said.close()
            self._process = None


def _read(stream, lines) -> None:
    with stream:
        for line in stream:
            if line.startswith(machine.MARK):
                lines.put(line.removeprefix(machine.MARK))
    lines.put(None)


def _unreachable(name: str, why: str, port: int | None) -> dict:
    command = f"ssh{f' -p {port}' if port else ''} {name} true"
    remedy = f"make `{command}` work without a password, or take it out of the hostfile"
    return {"unreachable": f"cannot be reached ({why})", "remedy": remedy}


def _try(session: Session, check: str, **given) -> dict:
    try:
        return session.ask(check, **given)
    except NoAnswer as reason:
        return {"error": str(reason)}


# --- what is asked ---------------------------------------------------------------------------------------------


def _ask_all(session: Session, shared: str | None, data: str | None) -> tuple[str, dict]:
    """What a host can say alone."""
    try:
        answers = {"packages": session.ask("packages")}
    except NoAnswer as reason:
        if session.dead:
            remedy = f"make this environment at the same path there: `{sys.executable} -m mage_ds doctor` must run"
            return session.name, {"unreachable": session.dead, "remedy": remedy}
        answers = {"packages": {"error": str(reason)}}
    for check in ("system", "build", "gpus", "ops"):
        answers[check] = _try(session, check)
    if data:
        answers["listing"] = _try(session, "listing", data=data)
    readable = "error" not in answers.get("listing", {})  # else its red line is enough: made pictures
    answers["decode"] = _try(session, "decode", data=data if readable else None)
    if shared:
        answers["disk"] = _try(session, "disk", folder=shared)
    return session.name, answers


def _meet(sessions: dict, facts: dict, shared: str | None) -> None:
    """What only several hosts together tell: their clocks, and whether a path is the same for all."""
    there = {name: session for name, session in sessions.items() if "unreachable" not in facts[name]}
    if len(sessions) > 1:
        for name, session in there.items():
            facts[name]["clock"] = _clock(session)
    if not shared:
        return
    token, written = uuid.uuid4().hex, {}
    for k, (name, session) in enumerate(there.items()):
        path = f"{shared}/.mage-ds-doctor-{token}-{k}"
        try:
            session.ask("leave_file", path=path, text=name)
            written[name] = path
        except NoAnswer as reason:
            facts[name]["shared"] = {"error": f"cannot be written ({reason})"}
    if not written:
        return
    try:
        for name, session in there.items():
            if name in written:  # one that cannot even write has its red line
                facts[name]["shared"] = _sees(session, written)
    finally:
        for name, path in written.items():
            _try(there[name], "take_file", path=path)


def _sees(session: Session, written: dict[str, str]) -> dict:
    try:
        texts = session.ask("see_files", paths=[*written.values()], patience=_PATIENCE_S)
    except NoAnswer as reason:
        return {"error": f"cannot be read ({reason})"}
    return {"missing": [name for name, text in zip(written, texts, strict=True) if text != name]}


def _clock(session: Session) -> dict:
    """Seconds that a host's clock is ahead of ours, known to half of the way there and back."""
    best = None
    for _ in range(_TICKS):
        before = machine.clock()
        try:
            theirs = session.ask("clock")
        except NoAnswer as reason:
            return {"error": str(reason)}
        half = (machine.clock() - before) / 2
        if best is None or half < best["within"]:
            best = {"offset": theirs - before - half, "within": half}
    return best


def _all_reduce(sessions: dict, facts: dict, slots: dict | None, ssh_port: int | None) -> dict | None:
    """The report of a launch over all hosts that answer: over their GPUs, else over CPU ranks."""
    gpus = {name: len(each["gpus"]["gpus"]) for name, each in facts.items() if "gpus" in each.get("gpus", {})}
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        gpus = dict.fromkeys(gpus, 0)
    if any(gpus.values()):
        gpus = {name: count for name, count in gpus.items() if count}
    if not gpus:
        return None
    if slots:
        ranks = {name: min(slots[name], count) if count else 1 for name, count in gpus.items()}
    else:
        ranks = {name: count or 2 for name, count in gpus.items()}
    try:
        place = sessions[next(iter(ranks))].ask("meeting_place")
    except NoAnswer as reason:
        return {"error": str(reason)}
    _tell(f"all-reduce over {sum(ranks.values())} ranks on {', '.join(ranks)}")
    return wire.launch(ranks, gpus=any(gpus.values()), ssh_port=ssh_port, seconds=_WIRE_S, **place)


# --- what is said ----------------------------------------------------------------------------------------------


def _print(facts: dict, slots: dict | None, report: dict | None, asked: tuple) -> None:
    found = findings.judge(facts, slots=slots, wire=report, asked=asked)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size((160, 24)).columns
    for line in [*host_table.table(facts, width, slots), *findings.lines(found, colour)]:
        print(line)
    red = sum(each.level == findings.RED for each in found)
    sys.stdout.flush()
    if red:
        raise UserError(f"doctor: {red} red line{'s' * (red > 1)} above; each names its remedy")
