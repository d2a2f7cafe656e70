"""Jobs of real trainer processes that start in milliseconds: forked from one server that has imported torch.

    with Job(server, "cifar", [*NORMED, "--output-dir", folder], folder=folder, ranks=2,
             hook='at(7, "backward", kill)') as job:
        ended = job.wait()                   # codes by rank, out, err
    done = forked("mnist", *flags, ranks=2)  # for tests of what is trained and not of how it is launched
"""

import contextlib
import functools
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.processes import ROOT, Finished, environment

# Two epochs of ten steps on 600 drawn images: BatchNorm, dropout and augmentation, checkpoints in mid-epoch.
NORMED = ["--dataset", "synthetic", "--recipe", "blitz", "--model", "normed", "--batch-size", "60", "--lr", "0.05",
          "--epochs", "2", "--shift", "2", "--flip", "random", "--threads", "1", "--checkpoint-every", "3",
          "--no-pictures", "--run-name", "r"]
SMALL = "trainers.cifar.synthetic.load = partial(load, num_train=600, num_test=200)"
PREPARE = f"""
import trainers.cifar
from functools import partial
from datasets.synthetic import load
{SMALL}
"""


@dataclass(frozen=True)
class Ended:
    """A job whose ranks have all ended."""

    codes: list[int]
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that begin with ERROR, from either stream of any rank."""
        return [line for line in (self.out + self.err).splitlines() if line.startswith("ERROR")]


class Server:
    """The process that forks trainers."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "helpers" / "hooked.py"), "--serve"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=ROOT,
                                        start_new_session=True)
        self.codes: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        self._num_requests = 0
        self._pending = b""

    def fork(self, request: dict[str, Any]) -> int:
        """Start one process; returns its id."""
        self._num_requests += 1
        number = self._num_requests
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps({"id": number, **request}) + "\n").encode())
        self.process.stdin.flush()
        deadline = time.monotonic() + 60
        while number not in self.pids:
            self.read(0.05)
            assert time.monotonic() < deadline
            assert self.process.poll() is None
        return self.pids[number]

    def read(self, seconds: float) -> None:
        """Take in what the server says, waiting at most so long."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        if not select.select([descriptor], [], [], seconds)[0]:
            return
        *lines, self._pending = (self._pending + os.read(descriptor, 1 << 16)).split(b"\n")
        for line in map(json.loads, lines):
            if "ended" in line:
                self.codes[line["ended"]] = line["code"]
            else:
                self.pids[line["id"]] = line["pid"]
                self.codes.pop(line["pid"], None)  # an earlier process may have had the same id

    def close(self) -> None:
        """End the server; whatever it forked is ended by its job."""
        self.process.communicate(timeout=10)


class Job:
    """The ranks of one job, in a process group of their own. As a context manager it leaves nothing behind."""

    def __init__(self, server: Server, trainer: str, flags: list[Any], *, folder: Path, ranks: int = 1, hook: str = "",
                 prepare: str = PREPARE, streams: dict[str, str | None] | None = None, **variables: str) -> None:
        self.server, self.folder, self.began = server, folder, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.names = {"out": str(folder / "out.txt"), "err": str(folder / "err.txt"), **(streams or {})}
        for name in self.names.values():
            if name is not None and Path(name).is_file():
                Path(name).unlink()
        self.pids: list[int] = []
        port = str(free_port())
        for rank in range(ranks):
            launched = variables_of(rank, ranks, port) if ranks > 1 else {}
            self.pids.append(server.fork({
                "group": self.pids[0] if self.pids else None, "environment": environment(**{**launched, **variables}),
                "trainer": trainer, "flags": list(map(str, flags)), "hook": prepare + hook, "folder": str(folder),
                **self.names}))

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float = 60) -> Ended:
        """Until every rank has ended.

        Raises:
            TimeoutError: past the limit.
        """
        deadline = time.monotonic() + timeout
        while any(pid not in self.server.codes for pid in self.pids):
            self.server.read(0.05)
            if time.monotonic() > deadline:
                for pid in self.pids:
                    if pid not in self.server.codes:
                        os.kill(pid, signal.SIGUSR2)  # it shows its stack
                time.sleep(1)
                raise TimeoutError(f"still alive after {timeout} s: {self.alive()}; {self.text('err')[-4000:]}")
        return Ended([self.server.codes[pid] for pid in self.pids], self.text("out"), self.text("err"),
                     time.monotonic() - self.began)

    def text(self, stream: str) -> str:
        """What all ranks have written to a stream so far."""
        name = self.names[stream]
        return Path(name).read_text() if name is not None and Path(name).is_file() else ""

    def signal(self, number: int, rank: int | None = None) -> None:
        """Signal one rank, or the whole process group with its loader workers."""
        if rank is None:
            os.killpg(self.pids[0], number)
        else:
            os.kill(self.pids[rank], number)

    def alive(self) -> list[int]:
        """The live processes of the group, loader workers too (zombies are not alive)."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (OSError, IndexError):
                continue
            if entry.name.isdigit() and int(fields[2]) == self.pids[0] and fields[0] not in "ZX":
                found.append(int(entry.name))
        return found

    def wait_for_line(self, text: str, *, timeout: float = 60) -> None:
        """Until some rank has written that text."""
        self.wait_until(lambda: text in self.text("out") + self.text("err"), timeout=timeout)

    def wait_until(self, condition: Any, *, timeout: float = 60) -> None:
        """Until a condition holds; fails if a rank ends or time runs out before."""
        deadline = time.monotonic() + timeout
        while not condition():
            self.server.read(0.01)
            assert time.monotonic() < deadline, self.text("err")[-2000:]
            assert all(pid not in self.server.codes for pid in self.pids), self.text("err")[-2000:]


@functools.cache
def common_server() -> Server:
    """The server of this test session; conftest.py ends it."""
    return Server()


def forked(trainer: str, *flags: Any, ranks: int | None = None, timeout: float = 120, **variables: str) -> Finished:
    """Like support.train, in processes that need not import torch first; without a torchrun around the ranks.

    Returns:
        With the exit code of the first rank that did not return 0.

    Raises:
        TimeoutError: past the limit; nothing is left running.
    """
    if ranks == 1:  # a process group of one
        variables = {**variables_of(0, 1, str(free_port())), **variables}
    with (tempfile.TemporaryDirectory() as folder,
          Job(common_server(), trainer, list(flags), folder=Path(folder), ranks=ranks or 1, prepare="",
              **variables) as job):
        ended = job.wait(timeout)
    return Finished(next(filter(None, ended.codes), 0), ended.out, ended.err)


def slack() -> float:
    """By how much longer than on an idle machine things may take here and now: the load of each core, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def variables_of(rank: int, ranks: int, port: str) -> dict[str, str]:
    """What a launcher tells one rank of a job on one node."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost", "MASTER_PORT": port}


def free_port() -> int:
    """A port that nobody listens on, of those that the system gives nobody (Linux) nor this to another test process."""
    first = 20_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for port in random.sample(range(first, first + 1000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise RuntimeError("no port is free")
