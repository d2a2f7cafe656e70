"""A real Slurm for the tests, started by them and always taken down: nodes, jobs, and what is left of them.

The cluster comes from ../shared/slurm-cluster. Where that is missing, or cannot be started, tests are skipped and say
why; with REQUIRE_SLURM=1, which .ci/run sets, a cluster that is there and cannot be started is a failure.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hooks import slow_steps, to_json
from tests.helpers.processes import ROOT, SHARED, Ended, environment, read_json, wait_until

NODES = 5  # two for a job that waits for its time limit; two for another, and one for its restart when one is lost
CONF = """KillWait=10
SlurmdTimeout=10
AuthInfo=cred_expire=5
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
"""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}


@dataclass(frozen=True)
class Job:
    """A job that was submitted; `key` is its id, or an array task's `<array>_<task>`."""

    cluster: "Cluster"
    key: str
    log: Path

    def record(self) -> dict[str, str]:
        """The fields of `scontrol show job` that have no spaces in them."""
        text = self.cluster.run("scontrol", "-o", "show", "job", self.key).out
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.record()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.record()["Restarts"])

    def nodes(self) -> list[str]:
        """The nodes of the job, the batch script's first."""
        found = self.cluster.run("scontrol", "show", "hostnames", self.record()["NodeList"])
        return found.out.split()

    def text(self) -> str:
        """What the job has printed so far, in all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def errors(self) -> list[str]:
        return [line for line in self.text().splitlines() if line.startswith("ERROR")]

    def wait(self, seconds: float = 120) -> str:
        """The state in which the job has ended; fails the test, with the log, if it has not in time."""
        wait_until(lambda: self.state in ENDED, seconds, lambda: f"job {self.key} is {self.state}:\n{self.text()}")
        return self.state


class Cluster:
    """A running cluster."""

    def __init__(self, script: Path, folder: str) -> None:
        self.script, self.folder = script, folder
        self.jobs: list[Job] = []

    def environment(self, **variables: str) -> dict[str, str]:
        """What the cluster script needs to find this cluster."""
        return environment(SLURM_RIG_DIR=self.folder, **variables)

    def call(self, *words: Any, cwd: Path = ROOT, timeout: float = 60, **variables: str) -> Ended:
        """The cluster script with some arguments."""
        found = subprocess.run([str(self.script), *map(str, words)], cwd=cwd, timeout=timeout, text=True,
                               capture_output=True, stdin=subprocess.DEVNULL, env=self.environment(**variables))
        return Ended([found.returncode], found.stdout, found.stderr)

    def run(self, *words: Any, **options: Any) -> Ended:
        """A command on the login node."""
        return self.call("run", *words, **options)

    def submit(self, file: str, *args: Any, log: Path, options: tuple[str, ...] = (), cwd: Path = ROOT, user: str = "",
               **variables: str) -> Job:
        """sbatch one of slurm/, with this test's Python as its environment."""
        who = ("-u", user) if user else ()
        words = ("sbatch", "--parsable", f"--output={log}", *options, f"slurm/{file}.sbatch", *args)
        done = self.call("run", *who, *words, cwd=cwd, **{"TRAINERS_ENV": str(Path(sys.prefix)), **variables})
        assert done.code == 0, done.err
        self.jobs.append(Job(self, done.out.strip(), log))
        return self.jobs[-1]

    def processes(self, node: str) -> str:
        """What runs on a node."""
        return self.call("on", node, "ps", "-eo", "pid,ppid,etimes,args").out

    def pids(self, marker: str, *, node: str | None = None) -> list[int]:
        """Python processes on all nodes, or on one, whose command line contains `marker`: seen from outside them."""
        network = self.call("on", node, "readlink", "/proc/self/ns/net").out.strip() if node else None
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    ours = marker.encode() in (entry / "cmdline").read_bytes()
                    if ours and "(python" in (entry / "stat").read_text() and (
                            network is None or os.readlink(entry / "ns" / "net") == network):
                        found.append(int(entry.name))
        return found


@pytest.fixture
def own_jobs(cluster: Cluster) -> Iterator[None]:
    """What a test submits ends with it, passed or failed."""
    before = len(cluster.jobs)
    yield
    for job in cluster.jobs[before:]:
        if job.state not in ENDED:
            cluster.run("scancel", job.key)


def step_of(run: Path) -> int:
    """The last step that metrics.jsonl or a checkpoint's manifest tells of; 0 before there is one."""
    manifests = sorted((run / "checkpoints").glob("step-*.json"))
    return read_json(manifests[-1])["step"] if manifests else 0


def state_of(run: Path) -> str:
    path = run / "status.json"
    return json.loads(path.read_text())["state"] if path.exists() else ""


def slowed(seconds: float) -> dict[str, str]:
    """Variables for HOOKED, the trainer with hooks: a pause in every step; the same weights, and time to stop it."""
    return {"HOOKS": to_json(slow_steps(seconds))}


def start_cluster() -> Iterator[Cluster]:
    """Bring a cluster up, and take it down whatever happens."""
    script = SHARED / "slurm-cluster" / "cluster"
    if not script.exists():
        pytest.skip(f"needs a Slurm cluster: no {script}")
    folder = tempfile.mkdtemp(prefix="rig-", dir="/tmp")  # short: unix sockets lie in it
    os.chmod(folder, 0o755)  # the home of the ordinary user is in it
    cluster = Cluster(script, folder)
    before = signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit("SIGTERM"))  # so that `finally` is reached
    try:
        conf = Path(folder).with_suffix(".conf")
        conf.write_text(CONF)
        with open(Path(tempfile.gettempdir()) / "slurm-up.lock", "w") as alone:  # what it downloads, all use
            fcntl.flock(alone, fcntl.LOCK_EX)
            up = cluster.call("up", NODES, timeout=180, SLURM_RIG_CONF=str(conf), SLURM_RIG_NICE="0")
        conf.unlink()
        if up.code != 0:
            reason = f"the Slurm cluster could not be started: {up.err.strip()[-500:]}"
            if os.environ.get("REQUIRE_SLURM"):
                pytest.fail(reason)
            pytest.skip(reason)
        yield cluster
    finally:
        signal.signal(signal.SIGTERM, before)
        cluster.call("down", timeout=120)
        shutil.rmtree(folder, ignore_errors=True)
