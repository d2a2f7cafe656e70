"""Nodes that lose power, cable or slurmd, and rendezvous that cannot come up, on a real Slurm."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import PROGRAMS, TINY, largest_difference, newest_checkpoint, read_json, wait_until
from tests.helpers.server import HOOKED, run
from tests.helpers.slurm import Cluster, Job, own_jobs, slowed, state_of, step_of

__all__ = ["own_jobs"]  # a fixture
pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("own_jobs"), pytest.mark.timeout(600)]
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
STEPS = ["--max-steps", "80", "--checkpoint-every", "10"]
SHORT = ["--timeout", "25"]
LISTEN = str(PROGRAMS / "listen.py")


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 80 steps on 4 ranks of one machine that nothing happens to."""
    folder = tmp_path_factory.mktemp("never-stopped")
    done = run("cifar", *TINY, *STEPS, "--output-dir", folder, "--run-name", "run", ranks=4)
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture
def mended(cluster: Cluster) -> Iterator[None]:
    """Whatever a test breaks is repaired for the next."""
    yield
    for node in ("node1", "node2", "node3"):
        cluster.call("power", node, "on")
        cluster.call("link", node, "on")
        if "slurmd" not in cluster.processes(node):
            cluster.call("daemon", node, "on")
    states = lambda: cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").out  # noqa: E731
    wait_until(lambda: "down" not in states() and "comp" not in states(), 60, states)


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize(("part", "broken", "step_seconds"), [
    ("power", 0, 0.15), ("link", 1, 0.15), ("daemon", 1, 0.6)])
def test_a_job_that_loses_a_node_goes_on_elsewhere_from_its_last_checkpoint_and_leaves_nothing_running(
        cluster: Cluster, tmp_path: Path, never_stopped: Path, part: str, broken: int,
        step_seconds: float):
    job = cluster.submit("multi_node", HOOKED, *TINY, *STEPS, *SHORT, "--output-dir", tmp_path,
                         "--run-name", "run", log=tmp_path / "log", options=("--exclude=node[4-5]", *TWO_BY_TWO),
                         **slowed(step_seconds))
    run = tmp_path / "run"
    wait_until(lambda: step_of(run) >= 20, 120, job.text)
    node, saved_at = job.nodes()[broken], step_of(run)
    cluster.call(part, node, "off")
    wait_until(lambda: job.restarts == 1, 90, job.text)
    if part != "power":  # Slurm cannot end what runs there; it ends by itself when it has lost its peers
        wait_until(lambda: cluster.pids(str(tmp_path), node=node) == [], 120, lambda: cluster.processes(node))
    assert job.wait(180) == "COMPLETED", job.text()
    assert node not in job.nodes()
    resumed_at = int(job.text().rpartition("(from step-")[2].partition(".pt")[0])
    assert resumed_at >= saved_at
    expected = read_json(never_stopped / "result.json")
    assert read_json(run / "result.json")["weights_sha256"] == expected["weights_sha256"]
    assert cluster.pids(str(tmp_path)) == []


@pytest.mark.usefixtures("mended")
def test_an_elastic_run_goes_on_with_one_node_and_takes_the_other_in_again(
        cluster: Cluster, tmp_path: Path, never_stopped: Path):
    array = cluster.submit("elastic", HOOKED, *TINY, *STEPS, *SHORT, "--output-dir", tmp_path,
                           "--run-name", "run", log=tmp_path / "log-%a", **slowed(0.6),
                           options=("--array=0-1", "--exclude=node[3-5]", "--exclusive", "--ntasks-per-node=1"))
    first, second = (Job(cluster, f"{array.key}_{task}", tmp_path / f"log-{task}") for task in (0, 1))
    text = lambda: first.text() + second.text()  # noqa: E731
    run = tmp_path / "run"
    wait_until(lambda: "world      2 x cpu" in text() and step_of(run) >= 10, 120, text)
    node = second.nodes()[0]
    cluster.call("power", node, "off")
    wait_until(lambda: "world      1 x cpu" in text(), 90, text)
    reached = step_of(run)
    cluster.call("power", node, "on")
    wait_until(lambda: text().count("world      2 x cpu") == 2, 90, text)
    assert step_of(run) >= reached
    assert first.wait(120) == "COMPLETED", text()
    assert second.wait(60) == "COMPLETED", text()
    assert second.restarts == 1
    # the same samples in every step whatever the number of ranks: sums differ in their rounding only
    ours, alone = (newest_checkpoint(folder) for folder in (run, never_stopped))
    assert (ours["step"], ours["samples_consumed"]) == (alone["step"], alone["samples_consumed"])
    assert largest_difference(ours["model"], alone["model"]) < 1e-5


@pytest.fixture
def taken_port(cluster: Cluster) -> Iterator[int]:
    """A port on which something else listens on node1."""
    port = 9731
    listener = subprocess.Popen([str(cluster.script), "on", "node1", "python3", LISTEN, str(port)], text=True,
                                stdout=subprocess.PIPE, env=cluster.environment())
    assert listener.stdout is not None
    assert listener.stdout.readline() == "up\n"
    yield port
    for pid in cluster.pids(f"{LISTEN}\0{port}"):
        subprocess.run(["kill", str(pid)], check=False)
    listener.wait(10)


def test_a_rendezvous_that_cannot_come_up_ends_in_one_line_that_says_host_port_and_interface(
        cluster: Cluster, tmp_path: Path, taken_port: int):
    broken = {
        "lo": ("multi_node", {"GLOO_SOCKET_IFNAME": "lo"}, ":", "interface lo: node", "cannot be reached by other"),
        "absent": ("per_rank", {"GLOO_SOCKET_IFNAME": "eth7"}, "node1:", "interface eth7", "has no interface eth7"),
        "taken": ("multi_node", {"MASTER_PORT": str(taken_port)}, f"node1:{taken_port}", "interface eth0",
                  "address already in use"),
        "away": ("multi_node", {"MASTER_ADDR": "10.77.0.99", "MASTER_PORT": "9732"}, "10.77.0.99:9732",
                 "interface eth0", "MASTER_ADDR to the first node"),
    }
    jobs = {name: cluster.submit(file, "trainers/cifar.py", *TINY, "--output-dir", tmp_path / name, "--run-name",
                                 "run", log=tmp_path / f"{name}.log", **variables,
                                 options=("--nodes=2", "--nodelist=node[1-2]", "--ntasks-per-node=1"))
            for name, (file, variables, *_) in broken.items()}
    began = time.monotonic()
    for name, job in jobs.items():
        assert job.wait(90 - (time.monotonic() - began)) == "FAILED", job.text()
        assert len(job.errors()) == 1, job.text()
        for words in broken[name][2:]:
            assert words in job.errors()[0]
        assert state_of(tmp_path / name / "run") == ""
