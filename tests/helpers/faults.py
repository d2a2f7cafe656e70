"""What every test of a fault checks: the codes, the one line, the state on the disk, and that nothing is left."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hooks import Hooks
from tests.helpers.processes import Ended, newest_checkpoint, read_json
from tests.helpers.server import NORMED, Job, run, slack, start


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, and how the run must end."""

    name: str
    hook: Hooks = ()
    """What goes wrong inside the process; see hooks.py."""
    flags: tuple[str, ...] = ()
    ranks: int = 1
    codes: tuple[int, ...] = (0,)
    """By rank; one code stands for all ranks."""
    state: str | None = "DONE"
    """In status.json; None where the run folder must not exist or not be touched."""
    error: str = ""
    """A pattern that the one ERROR line must match; empty where there must be none."""
    variables: tuple[tuple[str, str], ...] = ()
    """Of the environment."""
    streams: tuple[tuple[str, str | None], ...] = ()
    resumes: bool = False
    """Whether the same command then ends DONE."""

    def __str__(self) -> str:
        return self.name


def cases(faults: list[Fault], *, default: set[str]) -> list[Any]:
    """The faults as parameters: those named in `default` belong to the default suite, the others are slow."""
    assert default <= {fault.name for fault in faults}
    return [pytest.param(fault, id=fault.name, marks=[] if fault.name in default else pytest.mark.slow)
            for fault in faults]


def assert_ends_as_specified(fault: Fault, folder: Path) -> Ended:
    """Run a trainer with the fault and check how it ends."""
    flags: list[Any] = [*NORMED, "--output-dir", folder / "runs", *fault.flags]
    ranks = None if fault.ranks == 1 else fault.ranks
    with start("cifar", *flags, folder=folder, ranks=ranks, hook=fault.hook, streams=dict(fault.streams),
               **dict(fault.variables)) as job:
        ended = job.wait(60)
        check(ended, fault)
        check_nothing_left(job)
    made = folder / "runs" / "r"
    if fault.state is None:
        assert not (made / "status.json").exists()
    else:
        status = read_json(made / "status.json")
        assert status["state"] == fault.state, status
        if fault.state == "PREEMPTED" and status["step"]:
            assert newest_checkpoint(made)["step"] == status["step"]
    if fault.resumes:
        again = run("cifar", *flags, folder=folder, ranks=ranks, timeout=60)
        assert again.codes == [0] * fault.ranks, again.err
        assert read_json(made / "status.json")["state"] == "DONE"
    return ended


def check(ended: Ended, fault: Fault) -> None:
    """The codes and the lines."""
    codes = fault.codes * fault.ranks if len(fault.codes) == 1 else fault.codes
    assert tuple(ended.codes) == codes, f"{ended.codes}: {ended.err[-3000:]}"
    check_lines(ended, fault.error)


def check_lines(ended: Ended, error: str) -> None:
    """Exactly one ERROR line that matches, or none; and no traceback."""
    assert "Traceback (most recent call last)" not in ended.out + ended.err, ended.err[-3000:]
    if not error:
        assert ended.errors == []
    else:
        assert len(ended.errors) == 1, ended.errors or ended.err[-3000:]
        assert re.search(error, ended.errors[0]), ended.errors[0]


def check_nothing_left(job: Job) -> None:
    """No process of the job, loader workers too, lives longer than five seconds after its ranks."""
    deadline = time.monotonic() + 5 * slack()
    while job.alive():
        assert time.monotonic() < deadline, f"left behind: {[(pid, command_of(pid)) for pid in job.alive()]}"
        time.sleep(0.05)


def command_of(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "gone"
