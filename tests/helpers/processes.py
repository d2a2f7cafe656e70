"""What many tests need: starting any command with a time limit (trainers: server.py), and reading what runs wrote."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "helpers" / "programs"
SHARED = Path(os.environ.get("TRAINERS_SHARED", ROOT.parent / "shared"))

# A run of a few seconds: the smallest network on the synthetic data set.
TINY = ["--dataset", "synthetic", "--recipe", "blitz", "--batch-size", "60", "--lr", "0.02", "--epochs", "1",
        "--max-steps", "20", "--threads", "1", "--no-pictures"]


@dataclass(frozen=True)
class Ended:
    """What has been run and has ended: the ranks of a job, or one process."""

    codes: list[int]
    """Of every rank; one where a launcher or a single process was started."""
    out: str
    err: str
    seconds: float = 0.0

    @property
    def code(self) -> int:
        """The first exit code that is not 0."""
        return next(filter(None, self.codes), 0)

    @property
    def errors(self) -> list[str]:
        """The lines that begin with ERROR, from either stream of any rank."""
        return [line for line in (self.out + self.err).splitlines() if line.startswith("ERROR")]


def environment(**variables: str) -> dict[str, str]:
    """This environment without any launcher's variables and without GPUs, plus some; PYTHONPATH is added in front."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    kept = {name: value for name, value in os.environ.items()
            if name not in ours and not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    if "PYTHONPATH" in variables and "PYTHONPATH" in kept:  # where packages are that this Python does not have
        variables["PYTHONPATH"] += os.pathsep + kept["PYTHONPATH"]
    return {**kept, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def execute(words: list[str], *, timeout: float = 120, cwd: Path | None = None, **variables: str) -> Ended:
    """Run any command that is no trainer to its end, in a session of its own that is killed past the time limit."""
    process = start(words, cwd=cwd, **variables)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_session(process)
        raise
    return Ended([process.returncode], out, err)


def start(words: list[str], *, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start a command in a session of its own, so that it and all its children can be ended together."""
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=cwd, env=environment(**variables), start_new_session=True)


def members(leader: int) -> list[int]:
    """The live processes of the session or process group that a process leads (zombies are not alive)."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if entry.name.isdigit() and leader in (int(fields[2]), int(fields[3])) and fields[0] not in "ZX":
            pids.append(int(entry.name))
    return pids


def marked(name: str) -> list[int]:
    """The live processes in whose environment this variable was when they started."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{name}=".encode() in (entry / "environ").read_bytes():  # a zombie has none
                pids.append(int(entry.name))
        except OSError:
            continue
    return pids


def kill_session(process: subprocess.Popen[str]) -> None:
    """SIGKILL every process of a session that `start` made, and collect its leader."""
    for pid in members(process.pid):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue
    process.communicate(timeout=10)


def wait_until(condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = lambda: "", *,
               every: float = 0.25) -> None:
    """Poll until something holds; fail the test with an explanation if it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s. {explain()}"
        time.sleep(every)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def metrics(run: Path, *names: str) -> list[tuple[Any, ...]]:
    """The named fields of every line of metrics.jsonl, by default those that do not depend on the clock."""
    names = names or ("split", "step", "epoch", "loss", "accuracy", "learning_rate")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines]


def accuracies(run: Path) -> list[float]:
    """Percent on the test set after each epoch."""
    return [100 * accuracy for split, accuracy in metrics(run, "split", "accuracy") if split == "test"]


def newest_checkpoint(run: Path) -> dict[str, Any]:
    """The state in the newest checkpoint file."""
    return torch.load(sorted((run / "checkpoints").glob("step-*.pt"))[-1], weights_only=True)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two state dicts of the same names."""
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)
