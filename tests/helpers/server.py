"""Starting trainers: real processes, most of them forked in milliseconds from one server that has imported torch.

    ended = run("mnist", *flags, ranks=2)                       # to its end: codes by rank, out, err
    with start("cifar", *NORMED, "--output-dir", folder, folder=folder, ranks=2, hook=at(7, "backward", kill)) as job:
        job.wait_for_line("epoch 0:")                           # and signal it, look at it
        ended = job.wait()

Where the launcher is what is tested, `launcher` is "torchrun", or "python" for a new interpreter.
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
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tests.helpers.hooks import Hook, Hooks, small_data, to_json
from tests.helpers.processes import ROOT, Ended, environment, marked, members

HOOKED = ROOT / "tests" / "helpers" / "hooked.py"
# Two epochs of ten steps on 600 synthetic images: BatchNorm, dropout and augmentation, checkpoints in mid-epoch.
NORMED = ["--dataset", "synthetic", "--recipe", "blitz", "--model", "normed", "--batch-size", "60", "--lr", "0.05",
          "--epochs", "2", "--shift", "2", "--flip", "random", "--threads", "1", "--checkpoint-every", "3",
          "--no-pictures", "--run-name", "r", "--workers", "0"]
# The same on files of images.
IMAGES = ["--model", "normed", "--batch-size", "12", "--lr", "0.02", "--epochs", "2", "--schedule", "constant",
          "--shift", "2", "--flip", "random", "--random-crop", "0.5", "--threads", "1", "--checkpoint-every", "3",
          "--no-pictures", "--run-name", "r"]


class Server:
    """The process that forks trainers."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, str(HOOKED), "--serve"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=environment(), cwd=ROOT, start_new_session=True)
        self.codes: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        self._num_requests = 0
        self._pending = b""

    def fork(self, request: dict[str, Any]) -> "Forked":
        """Start one process."""
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
        return Forked(self, self.pids[number])

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


class Forked:
    """A process of the server, with those methods of subprocess.Popen that a job needs."""

    def __init__(self, server: Server, pid: int) -> None:
        self.server, self.pid = server, pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        self.server.read(0)
        return self.server.codes.get(self.pid)


@functools.cache
def common_server() -> Server:
    """The server of this test session; conftest.py ends it."""
    return Server()


class Job:
    """The ranks of one job, or the one process that launches them. As a context manager it leaves nothing behind."""

    def __init__(self, processes: list[Any], out: str | None, err: str | None, *, mark: str = "") -> None:
        self.processes, self.names, self.began = processes, {"out": out, "err": err}, time.monotonic()
        self.mark = mark
        """In the environment of every process, where they are not one group: torchrun's ranks lead their own."""
        self.pids: list[int] = [process.pid for process in processes]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            if isinstance(process, subprocess.Popen):
                process.wait(10)

    def codes(self) -> list[int | None]:
        """The exit code of every process so far; None for one that runs."""
        return [process.poll() for process in self.processes]

    def wait(self, timeout: float = 60) -> Ended:
        """Until every process has ended.

        Raises:
            TimeoutError: past the limit.
        """
        deadline = time.monotonic() + timeout
        while None in (codes := self.codes()):
            time.sleep(0.02)
            if time.monotonic() > deadline:
                for process in self.processes:
                    if isinstance(process, Forked) and process.poll() is None:
                        os.kill(process.pid, signal.SIGRTMIN)  # it shows its stack
                time.sleep(1)
                raise TimeoutError(f"still alive after {timeout} s: {self.alive()}; {self.text('err')[-4000:]}")
        return Ended([code for code in codes if code is not None], self.text("out"), self.text("err"),
                     time.monotonic() - self.began)

    def text(self, stream: str) -> str:
        """What all ranks have written to a stream so far."""
        name = self.names[stream]
        return Path(name).read_text() if name is not None and Path(name).is_file() else ""

    def signal(self, number: int, process: int | None = None) -> None:
        """Signal one process (a rank, or the launcher), or the whole process group with its loader workers."""
        if process is None:
            os.killpg(self.pids[0], number)
        else:
            os.kill(self.pids[process], number)

    def alive(self) -> list[int]:
        """The live processes of the job, loader workers too (zombies are not alive)."""
        return sorted({*members(self.pids[0]), *(marked(self.mark) if self.mark else [])})

    def wait_for_line(self, text: str, *, timeout: float = 60) -> None:
        """Until some rank has written that text."""
        self.wait_until(lambda: text in self.text("out") + self.text("err"), timeout=timeout)

    def wait_until(self, condition: Callable[[], bool], *, timeout: float = 60) -> None:
        """Until a condition holds; fails if a process ends or time runs out before."""
        deadline = time.monotonic() + timeout
        while not condition():
            time.sleep(0.01)
            assert time.monotonic() < deadline, self.text("err")[-2000:]
            assert self.codes() == [None] * len(self.pids), self.text("err")[-2000:]


def run(trainer: str, *flags: Any, folder: Path | None = None, timeout: float = 120, **how: Any) -> Ended:
    """Run a trainer to its end; `how` is what `start` takes.

    Raises:
        TimeoutError: past the limit; nothing is left running.
    """
    with (tempfile.TemporaryDirectory() as own,
          start(trainer, *flags, folder=Path(own) if folder is None else folder, **how) as job):
        return job.wait(timeout)


def start(trainer: str, *flags: Any, folder: Path, ranks: int | None = None, hook: Hooks = (),
          launcher: Literal["fork", "python", "torchrun"] = "fork", options: tuple[str, ...] = (),
          streams: dict[str, str | None] | None = None, **variables: str) -> Job:
    """Start a trainer with these flags, in `folder`, which takes its output too.

    Args:
        trainer: the name of one of trainers/, or the path of any script.
        ranks: None for a process that no launcher started, which is not the same as one rank.
        hook: what goes wrong in it; see hooks.py.
        options: of torchrun.
        streams: a file for "out" or "err", or None for a closed one.
        variables: of the environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out, err = ({name: str(folder / f"{name}.txt") for name in ("out", "err")} | (streams or {})).values()
    for name in (out, err):
        if name is not None and Path(name).is_file():
            Path(name).unlink()
    words = list(map(str, flags))
    hooks = [hook] if isinstance(hook, Hook) else list(hook)
    if "normed" in words:  # the network of NORMED, which is trained on 600 images
        hooks.insert(0, small_data())
    if launcher == "fork":
        return Job(fork_ranks(trainer, words, ranks, to_json(hooks), variables, folder, out, err), out, err)
    script = HOOKED if hooks else trainer if trainer.endswith(".py") else ROOT / "trainers" / f"{trainer}.py"
    alone = [] if any(option.startswith("--rdzv") for option in options) else ["--standalone"]
    launched = [] if launcher == "python" else ["-m", "torch.distributed.run", *alone, f"--nproc-per-node={ranks}",
                                                *options]
    mark = f"JOB_{uuid.uuid4().hex}"
    with open(str(out), "wb") as out_file, open(str(err), "wb") as err_file:
        process = subprocess.Popen(
            [sys.executable, *launched, str(script), *words], stdin=subprocess.DEVNULL, stdout=out_file,
            stderr=err_file, cwd=folder, start_new_session=True,
            env=environment(**({"TRAINER": trainer, "HOOKS": to_json(hooks)} if hooks else {}),
                            **variables, **{mark: ""}))
    return Job([process], out, err, mark=mark)


def fork_ranks(trainer: str, flags: list[str], ranks: int | None, hooks: str, variables: dict[str, str], folder: Path,
               out: str | None, err: str | None) -> list[Forked]:
    """The ranks of a job in a process group of their own, without a launcher around them."""
    port, forked = str(free_port()), []
    for rank in range(ranks or 1):
        launched = {} if ranks is None else variables_of(rank, ranks, port)
        forked.append(common_server().fork({
            "group": forked[0].pid if forked else None, "environment": environment(**{**launched, **variables}),
            "trainer": trainer, "flags": flags, "hooks": hooks, "folder": str(folder), "out": out, "err": err}))
    return forked


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
