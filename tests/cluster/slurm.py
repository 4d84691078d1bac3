"""For tests: a SLURM cluster of two nodes on this machine, with keys, ports, state and logs of its own."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from launched import MARK, environment, kill_all, living

_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not on every user's PATH
# The nodes' names are addresses: they need no name service. A job that is queued again waits until its credential has
# expired, 5 s at least.
_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=20
NodeName=127.0.0.1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=127.0.0.2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    programs = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if not _find(name)]
    return f"no {', '.join(programs)}: apt-get install slurm-wlm munge" if programs else ""


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], *_SBIN]))


class Cluster:
    """The daemons run from `with` to its end; then nothing of them or of their jobs is left."""

    def __init__(self):
        self._mark, self._daemons = uuid.uuid4().hex, []
        # Not pytest's own folder: munge wants one that others may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="mage_ds_slurm_"))
        self._conf = self.folder / "slurm.conf"
        ours = {"SLURM_CONF": str(self._conf), "VIRTUAL_ENV": sys.prefix, MARK: self._mark}
        self.env = {k: v for k, v in environment().items() if not k.startswith("SLURM_")} | ours

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        if len(self._daemons) > 1:
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=self.env, capture_output=True, timeout=60)
            self._wait(lambda: not self.squeue(), 40)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        self._wait(lambda: all(daemon.poll() is not None for daemon in self._daemons), 20)
        kill_all(f"{MARK}={self._mark}", self._daemons)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self.folder.chmod(0o711)
        for name in ("munge", "log", "state"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._conf.write_text(_CONF.format(user=getpass.getuser(), folder=self.folder, ports=_free_ports(3)))
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={self.folder}/munge/{name}" for option, name in places.items()]
        self._daemon("munged", "--foreground", *options)
        self._until((self.folder / "munge" / "socket").exists)
        self._daemon("slurmctld", "-D", "-f", self._conf)
        for node in ("127.0.0.1", "127.0.0.2"):
            self._daemon("slurmd", "-D", "-f", self._conf, "-N", node)
        self._until(lambda: self._said("sinfo", "--noheader", "--format=%T %D") == "idle 2")

    def _daemon(self, program: str, *words) -> None:
        line = [_find(program), *map(str, words)]
        with open(self.folder / f"{program}.out", "a") as out:
            daemon = subprocess.Popen(
                line, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self._daemons.append(daemon)

    def _until(self, condition, seconds: float = 60.0) -> None:
        said = lambda: "\n".join(f"{path}: {path.read_text()[-2000:]}" for path in self.folder.glob("*.out"))  # noqa: E731
        assert self._wait(condition, seconds), f"the cluster does not start:\n{said()}"

    @staticmethod
    def _wait(condition, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not (met := condition()) and time.monotonic() < end:
            time.sleep(0.1)
        return bool(met)

    def rank(self, number: int) -> int | None:
        """The process id of a rank of the running step, None before it is one."""
        for pid, words in living(f"{MARK}={self._mark}").items():
            if b"mage_ds" in words and b"srun" not in words[0] and pid in living(f"SLURM_PROCID={number}"):
                return pid
        return None

    # --- what a user does

    def run(self, *line, cwd: Path, **more) -> subprocess.CompletedProcess:
        words = [str(word) for word in line]
        return subprocess.run(words, cwd=cwd, env=self.env | more, capture_output=True, text=True, timeout=300)

    def _said(self, *line) -> str:
        return self.run(*line, cwd=self.folder).stdout.strip()

    def squeue(self) -> str:
        return self._said("squeue", "--noheader", "--format=%i %T")

    def submit(self, *line, cwd: Path, **more) -> "Job":
        done = self.run("sbatch", "--parsable", *line, cwd=cwd, **more)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip().partition(";")[0], cwd)


class Job:
    """A job by its number; its output is where sbatch puts it."""

    def __init__(self, cluster: Cluster, number: str, cwd: Path):
        self._cluster, self.number = cluster, number
        self._output = cwd / f"slurm-{number}.out"

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, ..."""
        said = self._cluster.run("scontrol", "--oneliner", "show", "job", self.number, cwd=self._cluster.folder).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def until(self, condition, seconds: float = 180.0):
        """Wait for condition() to be true and return it."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"waited in vain:\n{self.facts()}\n{self.output}"
            time.sleep(0.05)
        return value

    def ended(self, seconds: float = 300.0) -> dict[str, str]:
        """Wait for the end for good; its facts."""

        def end():
            facts = self.facts()
            return facts if facts["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING") else None

        return self.until(end, seconds)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
