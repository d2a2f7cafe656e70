"""What many tests need: starting real trainers and torchruns with a time limit, and reading what they wrote."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("TRAINERS_SHARED", ROOT.parent / "shared"))

# A run of a few seconds: the smallest network on the drawn data set.
TINY = ["--dataset", "synthetic", "--recipe", "blitz", "--batch-size", "60", "--lr", "0.02", "--epochs", "1",
        "--max-steps", "20", "--threads", "1", "--no-pictures"]


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that begin with ERROR, from either stream."""
        return [line for line in (self.out + self.err).splitlines() if line.startswith("ERROR")]


def environment(**variables: str) -> dict[str, str]:
    """This environment without any launcher's variables, plus some."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    kept = {name: value for name, value in os.environ.items()
            if name not in ours and not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    return {**kept, "PYTHONUNBUFFERED": "1", **variables}


def command(trainer: str, flags: list[str], *, ranks: int | None = None,
            torchrun: list[str] | None = None) -> list[str]:
    """The command line of a trainer: under python, or under torchrun when `ranks` is given."""
    script = [str(ROOT / "trainers" / f"{trainer}.py"), *map(str, flags)]
    if ranks is None:
        return [sys.executable, *script]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            *(torchrun or []), *script]


def train(trainer: str, *flags: Any, ranks: int | None = None, torchrun: list[str] | None = None, timeout: float = 120,
          cwd: Path | None = None, **variables: str) -> Finished:
    """Run a trainer to its end. Raises subprocess.TimeoutExpired past the limit, after killing its whole session."""
    return execute(command(trainer, [str(flag) for flag in flags], ranks=ranks, torchrun=torchrun), timeout=timeout,
                   cwd=cwd, **variables)


def execute(words: list[str], *, timeout: float = 120, cwd: Path | None = None, **variables: str) -> Finished:
    """Run any command to its end, in a session of its own that is killed past the time limit."""
    process = start(words, cwd=cwd, **variables)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_session(process)
        raise
    return Finished(process.returncode, out, err)


def start(words: list[str], *, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start a command in a session of its own, so that it and all its children can be ended together."""
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=cwd, env=environment(**variables), start_new_session=True)


def session_pids(session: int) -> list[int]:
    """The live processes of a session that `start` made (zombies are not alive)."""
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            pids.append(int(entry.name))
    return pids


def kill_session(process: subprocess.Popen[str]) -> None:
    """SIGKILL every process of a session that `start` made, and collect its leader."""
    for pid in session_pids(process.pid):
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


def newest_checkpoint(run: Path) -> dict[str, Any]:
    """The state in the newest checkpoint file."""
    return torch.load(sorted((run / "checkpoints").glob("step-*.pt"))[-1], weights_only=True)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two state dicts of the same names."""
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)
