"""launch/hostfile.sh over two hosts: network namespaces with an sshd each."""

import shutil
import signal

import namespaces
import pytest
from launched import OFTEN, TINY, Launch, Script, losses, status

pytestmark = [
    pytest.mark.full,
    pytest.mark.processes,
    pytest.mark.skipif(bool(reason := namespaces.why_not()), reason=str(reason)),
]

STEPS = 400
RECIPE = ["digits_mage", f"duration.steps={STEPS}", *TINY, *OFTEN, "report.checkpoint_every.steps=100"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with namespaces.two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture
def where(made, tmp_path):
    data, tokenizer = made
    return ["--data", data, "--tokenizer", tokenizer, "--out", tmp_path / "run"]


@pytest.fixture(scope="module")
def unbroken(made, tmp_path_factory):
    """The losses of the same training by two ranks of one host, which nobody stops."""
    folder = tmp_path_factory.mktemp("unbroken")
    with Launch(
        "train", *RECIPE, "--data", made[0], "--tokenizer", made[1], "--out", folder / "run", cwd=folder
    ) as launch:
        launch.ended(600)
    assert status(folder / "run")["state"] == "finished"
    return losses(folder / "run")


def start(hosts, hostfile, *argv, cwd, launcher="pdsh") -> Script:
    if not shutil.which(launcher):
        pytest.skip(f"needs {launcher}: apt-get install {launcher}")
    options = ["--ssh_port", hosts.port, "--launcher", launcher, "--backoff", 0]
    return Script("hostfile.sh", *options, hostfile, *argv, cwd=cwd, **hosts.environment)


def under_way(script, hosts, folder) -> None:
    """Wait until the training runs, with a rank on either host."""
    script.until(lambda: len(losses(folder)) >= 5)
    for name in hosts.names:
        assert any("--local_rank=0 train" in line for line in hosts.processes(name).values())


def all_gone(script, hosts) -> bool:
    return script.outer.poll() is not None and not any(hosts.processes(name) for name in hosts.names)


@pytest.mark.parametrize("launcher", ["pdsh", "ssh"])
def test_sigterm_saves_and_the_next_start_goes_on_with_the_same_losses(two, where, unbroken, launcher, tmp_path):
    folder = tmp_path / "run"
    argv = [*RECIPE, "report.evaluate_every.steps=1000", *where]
    with start(two, two.hostfile(), *argv, cwd=tmp_path, launcher=launcher) as script:
        under_way(script, two, folder)
        script.outer.terminate()
        script.until(lambda: all_gone(script, two), alive=False)
        assert script.outer.returncode == 75, script.output
    state = status(folder)
    assert state["state"] == "stopped" and "SIGTERM" in state["reason"] and 5 <= state["step"] < STEPS
    with start(two, two.hostfile(), *argv, cwd=tmp_path, launcher=launcher) as script:
        script.until(lambda: all_gone(script, two), alive=False)
        assert script.outer.returncode == 0, script.output
        assert f"at step {state['step']} " in script.output
    assert status(folder)["state"] == "finished"
    assert losses(folder) == unbroken


@pytest.mark.parametrize("launcher", ["pdsh", "ssh"])
def test_ranks_whose_connection_is_lost_save_and_end(two, where, launcher, tmp_path):
    folder = tmp_path / "run"
    with start(two, two.hostfile(), *RECIPE, *where, cwd=tmp_path, launcher=launcher) as script:
        under_way(script, two, folder)
        script.outer.send_signal(signal.SIGKILL)
        script.until(lambda: all_gone(script, two), alive=False)
    state = status(folder)
    assert state["state"] == "stopped" and "launcher died" in state["reason"], state
    assert losses(folder)[-1][0] == state["step"] >= 5


def test_a_wrong_host_is_named_before_any_rank_starts(two, where, tmp_path):
    for line in ("nowhere.invalid slots=1", "node-1 slots=2", "node-3 slots=two"):
        with start(two, two.hostfile(1, line), *RECIPE, *where, cwd=tmp_path) as script:
            assert script.ended(60) == 2
            assert len(script.output.splitlines()) == 1 and line.split()[0] in script.output, script.output
        assert not any(two.processes(name) for name in two.names)
    assert not (tmp_path / "run").exists()


def test_an_unshared_run_folder_is_refused(made, tmp_path):
    private = tmp_path / "runs"
    private.mkdir()
    where = ["--data", made[0], "--tokenizer", made[1], "--out", private / "run"]
    with (
        namespaces.two_hosts(tmp_path, private) as hosts,
        start(hosts, hosts.hostfile(), *RECIPE, *where, cwd=tmp_path) as script,
    ):
        assert script.ended() == 2, script.output
        errors = [line for line in script.output.splitlines() if "mage-ds: error" in line]
    assert len(errors) == 1 and "node-2 does not see what node-1 writes" in errors[0] and str(private) in errors[0], (
        errors
    )
    assert list(private.iterdir()) == []
