"""Stop signals: to one rank, to all, at any moment. Nothing is lost, and the same command resumes."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
import uuid
from pathlib import Path

import pytest

from launch.stop import signals_flag
from tests.helpers.faults import Fault, assert_ends_as_specified, cases, check, check_nothing_left
from tests.helpers.hooks import at, on_ranks, send, sleep_for
from tests.helpers.images import image_tree
from tests.helpers.processes import ROOT, TINY, environment, newest_checkpoint, read_json, wait_until
from tests.helpers.server import IMAGES, NORMED, Job, slack, start

pytestmark = pytest.mark.timeout(120)

STOPPED = {"codes": (75,), "state": "PREEMPTED", "resumes": True}
STOPS = [
    Fault(name="SIGTERM-to-rank-0-in-training", ranks=2, hook=at(7, "backward", send(15), ranks=[0]), **STOPPED),
    Fault(name="SIGTERM-to-rank-1-in-training", ranks=2, hook=at(7, "forward", send(15), ranks=[1]), **STOPPED),
    Fault(name="SIGUSR1-to-one-rank", ranks=2, hook=at(7, "data", send(10), ranks=[1]), **STOPPED),
    Fault(name="SIGHUP-to-one-rank", ranks=2, hook=at(7, "data", send(1), ranks=[1]), **STOPPED),
    Fault(name="SIGQUIT-to-rank-0", ranks=2, hook=at(7, "backward", send(3), ranks=[0]), **STOPPED),
    Fault(name="SIGUSR2-in-the-evaluation", ranks=2, hook=at(10, "evaluate", send(12), ranks=[1]), **STOPPED),
    Fault(name="SIGXCPU-to-one-process", hook=at(7, "optimizer", send(24)), **STOPPED),
    Fault(name="SIGINT-to-one-process", hook=at(7, "optimizer", send(2)), **STOPPED),
    Fault(name="SIGTERM-in-the-evaluation", ranks=2, hook=at(10, "evaluate", send(15), ranks=[1]), **STOPPED),
    Fault(name="SIGTERM-in-the-last-evaluation", hook=at(20, "evaluate", send(15)), **STOPPED),
    Fault(name="SIGTERM-while-saving", ranks=2, hook=at(3, "checkpoint", send(15), ranks=[0]), **STOPPED),
    Fault(name="SIGTERM-at-start-up", ranks=2, hook=send(15), **STOPPED),
    Fault(name="SIGTERM-to-one-rank-at-start-up", ranks=2, hook=on_ranks([1], send(15)), **STOPPED),
    Fault(name="two-SIGTERMs", hook=at(7, "data", send(15), sleep_for(1.2), send(15)), **STOPPED),
    Fault(name="two-SIGINTs-at-once", hook=at(7, "data", send(2), send(2)), **STOPPED),
    Fault(name="a-second-SIGINT-a-second-later", hook=at(7, "data", send(2), sleep_for(1.2), send(2)),
          codes=(130,), state="RUNNING", resumes=True),
]


@pytest.mark.parametrize("fault", cases(STOPS, default={
    "SIGTERM-to-rank-1-in-training", "SIGXCPU-to-one-process", "SIGTERM-in-the-last-evaluation",
    "SIGTERM-to-one-rank-at-start-up", "a-second-SIGINT-a-second-later"}))
def test_a_stop_signal_ends_the_run_at_a_step_it_can_go_on_from(tmp_path: Path, fault: Fault) -> None:
    assert_ends_as_specified(fault, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow),
                                    pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
                         ids=lambda number: number.name)
def test_a_signal_to_the_whole_process_group_stops_all_ranks_within_seconds(tmp_path: Path,
                                                                           number: signal.Signals) -> None:
    flags = [*NORMED, "--epochs", "500", "--output-dir", tmp_path]
    with start("cifar", *flags, folder=tmp_path, ranks=2) as job:
        job.wait_for_line("epoch 1:")
        job.signal(number)
        asked_at = time.monotonic()
        check(job.wait(20), Fault(name="group", ranks=2, codes=(75,)))
        assert time.monotonic() - asked_at < 3 * slack()  # two seconds, and a step
        check_nothing_left(job)
    status = read_json(tmp_path / "r" / "status.json")
    assert status["state"] == "PREEMPTED"
    assert status["step"] == newest_checkpoint(tmp_path / "r")["step"] > 10


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR2],
                         ids=lambda number: number.name)
def test_a_signal_to_the_process_group_leaves_loader_workers_alive_until_the_ranks_have_saved(
        tmp_path: Path, number: signal.Signals) -> None:
    flags = [*IMAGES, "--data-dir", image_tree(tmp_path / "images"), "--workers", "2", "--epochs", "500",
             "--output-dir", tmp_path]
    with start("image_folder", *flags, folder=tmp_path) as job:
        job.wait_for_line("epoch 0:")
        job.signal(number)
        check(job.wait(20), Fault(name="group", codes=(75,)))
        check_nothing_left(job)
    status = read_json(tmp_path / "r" / "status.json")
    assert status["state"] == "PREEMPTED"
    assert status["step"] == newest_checkpoint(tmp_path / "r")["step"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_a_terminal_that_is_closed_stops_the_run_saved_under_torchrun_even_with_nohup(tmp_path: Path,
                                                                                    launcher: str) -> None:
    ours, terminal = os.openpty()
    mark = f"JOB_{uuid.uuid4().hex}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", signals_flag()]

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # a session's leader is told when its terminal goes away
        signal.signal(signal.SIGHUP, signal.SIG_IGN if launcher == "torchrun" else signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, *(torchrun if launcher == "torchrun" else []), ROOT / "trainers" / "cifar.py", *TINY,
         "--epochs", "500", "--max-steps", "100000", "--run-name", "r", "--output-dir", tmp_path],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=take_terminal,
        env=environment(**{mark: ""}))
    os.close(terminal)
    with Job([process], None, None, mark=mark) as job:
        wait_until(lambda: (tmp_path / "r" / "metrics.jsonl").exists(), 60)
        os.close(ours)
        assert job.wait(40).codes == [75 if launcher == "python" else 1]
        check_nothing_left(job)
    status = read_json(tmp_path / "r" / "status.json")
    assert (status["state"], status["step"]) == ("PREEMPTED", newest_checkpoint(tmp_path / "r")["step"])
