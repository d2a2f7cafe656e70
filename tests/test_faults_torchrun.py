"""Faults around a real torchrun: signals to it, its own death, restarts. Each starts interpreters, which is slow."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.stop import signals_flag
from tests.helpers.faults import check_lines, check_nothing_left
from tests.helpers.hooks import at, kill, on_first_start, sleep_for, touch
from tests.helpers.processes import ROOT, Ended, execute, metrics, newest_checkpoint, read_json, wait_until
from tests.helpers.server import NORMED, Job, free_port, start

pytestmark = pytest.mark.timeout(150)

SIGNALS = (signals_flag(),)


def torchrun(folder: Path, *flags: Any, **how: Any) -> Job:
    """Two ranks under torchrun; whatever is left of them at the end is killed."""
    return start("cifar", *NORMED, "--output-dir", folder, *flags, folder=folder, ranks=2, launcher="torchrun", **how)


def finish(job: Job, timeout: float = 60) -> Ended:
    job.wait(timeout)
    check_nothing_left(job)
    return job.wait()  # with what ranks wrote after their torchrun had gone


def wait_for_steps(run: Path, step: int) -> None:
    wait_until(lambda: (run / "metrics.jsonl").exists()
               and max((line[0] for line in metrics(run, "step")), default=0) >= step, 60, every=0.05)


def ours(ended: Ended) -> Ended:
    """Without the report that torchrun prints about ranks that failed, which has a traceback of its own."""
    lines = [line for line in ended.err.splitlines() if "[rank" in line or line.startswith(("ERROR", "WARNING"))]
    return replace(ended, err="\n".join(lines))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1,
                                    pytest.param(signal.SIGINT, marks=pytest.mark.slow),
                                    pytest.param(signal.SIGXCPU, marks=pytest.mark.slow)],
                         ids=lambda number: number.name)
def test_a_signal_to_torchrun_stops_the_run_with_nothing_lost(tmp_path: Path, number: signal.Signals) -> None:
    with torchrun(tmp_path, "--epochs", 500, options=SIGNALS) as job:
        wait_for_steps(tmp_path / "r", 12)
        job.signal(number, 0)
        finished = finish(job)
    check_lines(ours(finished), "")
    status = read_json(tmp_path / "r" / "status.json")
    assert (status["state"], status["step"]) == ("PREEMPTED", newest_checkpoint(tmp_path / "r")["step"])


@pytest.mark.slow
def test_control_c_in_a_terminal_reaches_torchrun_and_ranks_and_stops_once(tmp_path: Path) -> None:
    with torchrun(tmp_path, "--epochs", 500) as job:
        wait_for_steps(tmp_path / "r", 12)
        for pid in job.alive():
            os.kill(pid, signal.SIGINT)
        finished = finish(job)
    check_lines(ours(finished), "")
    assert read_json(tmp_path / "r" / "status.json")["state"] == "PREEMPTED"


def test_ranks_whose_torchrun_was_killed_end_within_five_seconds(tmp_path: Path) -> None:
    with torchrun(tmp_path, "--epochs", 500) as job:
        wait_for_steps(tmp_path / "r", 12)
        job.signal(signal.SIGKILL, 0)
        finished = finish(job)
    check_lines(finished, "ERROR distributed: rank 0 of 2: its launcher died at step")
    assert read_json(tmp_path / "r" / "status.json")["state"] == "FAILED"


@pytest.mark.slow
def test_ranks_whose_torchrun_was_killed_while_they_start_end_too(tmp_path: Path) -> None:
    with torchrun(tmp_path, hook=[touch("up-{rank}"), sleep_for(2)]) as job:
        job.wait_until(lambda: all((tmp_path / f"up-{rank}").exists() for rank in range(2)))
        job.signal(signal.SIGKILL, 0)
        time.sleep(2)
        finished = finish(job)
    assert len(finished.errors) == 1
    assert "Traceback" not in finished.err
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_under_torchrun(tmp_path: Path) -> None:
    with torchrun(tmp_path, hook=at(13, "backward", kill, ranks=[1])) as job:
        finished = finish(job)
    assert finished.code == 1
    check_lines(ours(finished), "ERROR distributed: rank 1 of 2: exited silently at about step 13")
    assert read_json(tmp_path / "r" / "status.json")["state"] == "FAILED"


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank_and_the_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    hook = on_first_start(at(13, "data", kill, ranks=[1]))
    with torchrun(tmp_path, options=("--max-restarts=3",), hook=hook) as job:
        finished = finish(job, timeout=100)
    assert finished.code == 0, finished.err[-2000:]
    assert len(finished.errors) == 1
    assert "(from step-" in finished.out
    assert read_json(tmp_path / "r" / "status.json")["state"] == "DONE"
    steps = metrics(tmp_path / "r", "split", "step")
    assert sorted(set(steps)) == sorted(steps)  # nothing twice
    assert read_json(tmp_path / "r" / "owner.json")["incarnation"] == 2


@pytest.mark.slow
def test_a_second_torchrun_of_the_same_id_is_refused_at_every_restart(tmp_path: Path) -> None:
    def launch(name: str) -> Job:
        options = ("--rdzv-id=x", "--max-restarts=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}")
        return start("cifar", *NORMED, "--output-dir", tmp_path, "--epochs", 500, folder=tmp_path / name, ranks=1,
                     launcher="torchrun", options=options)

    with launch("first") as first:
        wait_for_steps(tmp_path / "r", 12)
        with launch("second") as second:
            refused = finish(second)
        assert refused.code == 1
        assert len(refused.errors) == 2  # at each of two starts
        assert all("in use by pid" in line for line in refused.errors)
        first.signal(signal.SIGTERM, 0)
        finish(first)
    assert read_json(tmp_path / "r" / "status.json")["state"] == "PREEMPTED"


@pytest.mark.slow
def test_torchruns_own_report_shows_the_line_of_the_rank_that_failed(tmp_path: Path) -> None:
    with torchrun(tmp_path, "--sync-bn") as job:
        finished = finish(job)
    assert finished.code == 1
    check_lines(ours(finished), "ERROR usage: --sync-bn: ")
    root_cause = finished.err.partition("Root Cause")[2]
    assert f"traceback : {finished.errors[0]}" in root_cause
    assert "To enable traceback see" not in root_cause


@pytest.mark.slow
def test_in_our_own_torchrun_the_line_of_the_rank_that_failed_is_the_last(tmp_path: Path) -> None:
    ended = execute([sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone", "--nproc-per-node=2",
                     str(ROOT / "trainers" / "mnist.py"), "--dataset", "synthetic", "--sync-bn", "--output-dir",
                     str(tmp_path)], cwd=tmp_path, timeout=100, OMP_NUM_THREADS="1")
    assert ended.code == 1
    assert ended.errors == ended.err.splitlines()[-1:]
    assert ended.errors[0].startswith("ERROR usage: --sync-bn: ")
    assert "Traceback" not in ended.err
