"""Faults around a real torchrun: signals to it, its own death, restarts. Each starts everything anew, which is slow."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.faults import check_lines
from tests.helpers.processes import (
    ROOT,
    Finished,
    kill_session,
    metrics,
    newest_checkpoint,
    read_json,
    session_pids,
    start,
    wait_until,
)
from tests.helpers.server import NORMED, PREPARE, slack

pytestmark = pytest.mark.timeout(150)

SIGNALS = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
FIRST_TIME = 'if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0": '


@contextmanager
def torchrun(folder: Path, *flags: Any, options: list[str] | None = None, hook: str = "",
             ranks: int = 2) -> Iterator[subprocess.Popen[str]]:
    """A trainer with a fault in it, under torchrun; whatever is left of it at the end is killed."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
             *(options or []), str(ROOT / "tests" / "helpers" / "hooked.py"), *NORMED, "--output-dir", str(folder),
             *map(str, flags)]
    process = start(words, cwd=folder, HOOK=PREPARE + hook)
    try:
        yield process
    finally:
        if session_pids(process.pid):
            kill_session(process)


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Finished:
    out, err = process.communicate(timeout=timeout)
    deadline = time.monotonic() + 5 * slack()
    while session_pids(process.pid):
        assert time.monotonic() < deadline, "left behind after five seconds"
        time.sleep(0.05)
    return Finished(process.returncode, out, err)


def wait_for_steps(run: Path, step: int) -> None:
    wait_until(lambda: (run / "metrics.jsonl").exists()
               and max((line[0] for line in metrics(run, "step")), default=0) >= step, 60, every=0.05)


def ours(finished: Finished) -> Finished:
    """Without the report that torchrun prints about ranks that failed, which has a traceback of its own."""
    lines = [line for line in finished.err.splitlines() if "[rank" in line or line.startswith(("ERROR", "WARNING"))]
    return Finished(finished.code, finished.out, "\n".join(lines))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1,
                                    pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
                         ids=lambda number: number.name)
def test_a_signal_to_torchrun_stops_the_run_with_nothing_lost(tmp_path: Path, number: signal.Signals) -> None:
    with torchrun(tmp_path, "--epochs", 500, options=SIGNALS) as process:
        wait_for_steps(tmp_path / "r", 12)
        process.send_signal(number)
        finished = finish(process)
    check_lines(ours(finished), "")
    status = read_json(tmp_path / "r" / "status.json")
    assert (status["state"], status["step"]) == ("PREEMPTED", newest_checkpoint(tmp_path / "r")["step"])


@pytest.mark.slow
def test_control_c_in_a_terminal_reaches_torchrun_and_ranks_and_stops_once(tmp_path: Path) -> None:
    with torchrun(tmp_path, "--epochs", 500) as process:
        wait_for_steps(tmp_path / "r", 12)
        for pid in session_pids(process.pid):
            os.kill(pid, signal.SIGINT)
        finished = finish(process)
    check_lines(ours(finished), "")
    assert read_json(tmp_path / "r" / "status.json")["state"] == "PREEMPTED"


def test_ranks_whose_torchrun_was_killed_end_within_five_seconds(tmp_path: Path) -> None:
    with torchrun(tmp_path, "--epochs", 500) as process:
        wait_for_steps(tmp_path / "r", 12)
        process.kill()
        finished = finish(process)
    check_lines(finished, "ERROR distributed: rank 0 of 2: its launcher died at step")
    assert read_json(tmp_path / "r" / "status.json")["state"] == "FAILED"


@pytest.mark.slow
def test_ranks_whose_torchrun_was_killed_while_they_start_end_too(tmp_path: Path) -> None:
    with torchrun(tmp_path, hook='open(f"up-{launched_rank()}", "w").close()\nsleep_for(2)()') as process:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"up-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        time.sleep(2)
        finished = finish(process)
    assert len(finished.errors) == 1
    assert "Traceback" not in finished.err
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_under_torchrun(tmp_path: Path) -> None:
    with torchrun(tmp_path, hook='at(13, "backward", kill, ranks=[1])') as process:
        finished = finish(process)
    assert finished.code == 1
    check_lines(ours(finished), "ERROR distributed: rank 1 of 2: exited silently at about step 13")
    assert read_json(tmp_path / "r" / "status.json")["state"] == "FAILED"


def test_torchrun_restarts_after_a_killed_rank_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    hook = FIRST_TIME + 'at(13, "data", kill, ranks=[1])'
    with torchrun(tmp_path, options=["--max-restarts=3"], hook=hook) as process:
        finished = finish(process, timeout=100)
    assert finished.code == 0, finished.err[-2000:]
    assert len(finished.errors) == 1
    assert "(from step-" in finished.out
    assert read_json(tmp_path / "r" / "status.json")["state"] == "DONE"
    steps = metrics(tmp_path / "r", "split", "step")
    assert sorted(set(steps)) == sorted(steps)  # nothing twice
    assert read_json(tmp_path / "r" / "owner.json")["incarnation"] == 2
