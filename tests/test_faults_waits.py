"""Waits without an end: workers, reads, pipes, stopped jobs. Each works another way, or is named within --timeout."""

import fcntl
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launch.launcher import usable_cores
from tests.helpers.comparing import outcome, run_in
from tests.helpers.faults import Fault, assert_ends_as_specified, cases, check, check_nothing_left
from tests.helpers.hooks import (
    Hook,
    at,
    become_user,
    hang_on_open,
    no_more_threads,
    read_without_end,
    run_out_of_memory,
    say,
    sleep_for,
    sleep_in_a_users_function,
    slow_steps,
    small_shared_memory,
    touch,
)
from tests.helpers.images import image_tree, write_idx
from tests.helpers.processes import newest_checkpoint, read_json
from tests.helpers.server import NORMED, run, slack, start

pytestmark = pytest.mark.timeout(120)

SHORT = ["--batch-size", "12", "--epochs", "1", "--threads", "1", "--no-pictures", "--run-name", "r"]
TMPDIR = "a-long-name-" * 12
FAULTS = [
    Fault(name="a-read-that-never-returns", hook=at(7, "data", sleep_for(60)), flags=("--timeout", "2"), codes=(3,),
          state="FAILED", error=r"ERROR data: --timeout 2: no data for longer at step 7 \(.*hooks.py:\d+ sleep_for\); "
                                r".*--data-dir.*/dev/shm has \d+ MiB free", resumes=True),
    Fault(name="a-read-that-never-returns-in-the-evaluation", hook=at(10, "evaluation data", sleep_for(60)),
          flags=("--timeout", "2"), codes=(3,), state="FAILED", error="ERROR data: --timeout 2: .* at step 10"),
    Fault(name="a-read-that-never-returns-on-two-ranks", hook=at(7, "data", sleep_for(60), ranks=[1]), ranks=2,
          flags=("--timeout", "2"), codes=(6,), state="FAILED",
          error=r"ERROR distributed: rank 1 of 2: no progress for 2 s at step 7, phase data; .*/dev/shm has"),
    Fault(name="no-thread-can-be-started", hook=no_more_threads(), codes=(5,), state=None,
          error="ERROR device: threads: no more can be started here; raise `ulimit -u`"),
    Fault(name="no-thread-can-be-started-in-mid-run", hook=at(7, "forward", no_more_threads(), run_out_of_memory("x")),
          codes=(5,), state="FAILED", error="ERROR device: memory: x"),
]


@pytest.mark.slow
def test_where_shared_memory_is_small_batches_take_another_way(tmp_path: Path) -> None:
    flags = ["--data-dir", image_tree(tmp_path / "images"), "--batch-size", "60"]
    expected = run_in(tmp_path / "room", *flags, trainer="image_folder")
    assert expected.codes == [0], expected.err
    ended = run_in(tmp_path / "small", *flags, "--workers", "2", trainer="image_folder",
                   hook=small_shared_memory("300k"))
    skip_if_not_allowed(ended.err)
    check(ended, Fault(name="small"))
    assert ended.err.count("WARNING --workers: no room for their batches (/dev/shm has 0.") == 1
    assert outcome(tmp_path / "small") == outcome(tmp_path / "room")


@pytest.mark.slow
def test_where_shared_memory_has_no_room_at_all_that_is_said(tmp_path: Path) -> None:
    flags = ["--data-dir", image_tree(tmp_path / "images"), "--workers", "2"]
    ended = run_in(tmp_path, *flags, trainer="image_folder", hook=small_shared_memory("4k"))
    skip_if_not_allowed(ended.err)
    check(ended, Fault(name="none", codes=(3,), error=r"ERROR data: --workers: none can be started \(No space left.*; "
                                                      r"/dev/shm has 0.0 MiB free\); .*docker run --shm-size"))


def skip_if_not_allowed(err: str) -> None:
    if "no mount of its own" in err:
        pytest.skip("needs the right to mount")


@pytest.mark.parametrize("fault", cases(FAULTS, default={"a-read-that-never-returns", "no-thread-can-be-started"}))
def test_a_wait_without_an_end_is_named(tmp_path: Path, fault: Fault) -> None:
    ended = assert_ends_as_specified(fault, tmp_path)
    assert ended.seconds < 20 * slack()


@pytest.mark.parametrize("place", [(7, "data"), pytest.param((10, "evaluation data"), marks=pytest.mark.slow)])
def test_a_stop_is_heard_in_a_read_that_never_returns(tmp_path: Path, place: tuple[int, str]) -> None:
    flags = [*NORMED, "--output-dir", tmp_path]
    with start("cifar", *flags, folder=tmp_path, hook=at(*place, say("hangs"), sleep_for(60))) as job:
        job.wait_for_line("hangs")
        before = time.monotonic()
        job.signal(signal.SIGTERM)
        ended = job.wait(30)
        assert time.monotonic() - before < 4 * slack()
        check_nothing_left(job)
    check(ended, Fault(name="stop", codes=(75,)))
    status = read_json(tmp_path / "r" / "status.json")
    assert (status["state"], status["step"]) == ("PREEMPTED", place[0])
    assert newest_checkpoint(tmp_path / "r")["step"] == place[0]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "place", "saved", "read"), [
    (1, (7, "data"), 6, sleep_for(60)), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (0, (7, "data"), 6, read_without_end()), (1, (10, "evaluation data"), 9, read_without_end())))])
def test_a_stop_is_heard_while_one_of_several_ranks_reads_without_end(tmp_path: Path, rank: int, place: tuple[int, str],
                                                                      saved: int, read: Hook) -> None:
    hook = at(*place, say("hangs"), read, ranks=[rank])
    with start("cifar", *NORMED, "--output-dir", tmp_path, folder=tmp_path, hook=hook, ranks=2) as job:
        job.wait_for_line("hangs")
        before = time.monotonic()
        job.signal(signal.SIGTERM)
        check(job.wait(30), Fault(name="stop", codes=(75,), ranks=2))
        assert time.monotonic() - before < 9 * slack()
        check_nothing_left(job)
    status = read_json(tmp_path / "r" / "status.json")
    assert (status["state"], status["step"]) == ("PREEMPTED", saved)
    assert status["reason"].endswith(f"; rank {rank} waited for data")
    assert newest_checkpoint(tmp_path / "r")["step"] == saved
    assert run_in(tmp_path, ranks=2).codes == [0, 0]
    assert run_in(tmp_path / "whole", ranks=2).codes == [0, 0]
    assert outcome(tmp_path) == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_stop_in_a_read_that_no_signal_interrupts_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    hook = at(7, "data", say("hangs"), read_without_end())
    with start("cifar", *NORMED, "--output-dir", tmp_path, folder=tmp_path, hook=hook) as job:
        job.wait_for_line("hangs")
        job.signal(signal.SIGTERM)
        check(job.wait(12 * slack()), Fault(name="stop", codes=(75,)))
    assert read_json(tmp_path / "r" / "status.json")["step"] == newest_checkpoint(tmp_path / "r")["step"] == 6


@pytest.mark.slow
def test_a_stop_within_a_step_of_several_micro_batches_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    flags = ["--accumulation-steps", "2"]
    assert run_in(tmp_path / "whole", *flags).codes == [0]
    second = at(7, "data", say("hangs"), sleep_for(60), time=2)
    with start("cifar", *NORMED, *flags, "--output-dir", tmp_path, folder=tmp_path, hook=second) as job:
        job.wait_for_line("hangs")
        job.signal(signal.SIGTERM)
        check(job.wait(30), Fault(name="stop", codes=(75,)))
    assert read_json(tmp_path / "r" / "status.json")["step"] == newest_checkpoint(tmp_path / "r")["step"] == 6
    assert run_in(tmp_path, *flags).codes == [0]
    assert outcome(tmp_path) == outcome(tmp_path / "whole")


HANGING = '''
import sys, time
if any("forkserver" in word for word in sys.orig_argv):
    sys.addaudithook(lambda event, args: event == "open" and str(args[0]).endswith("0007.png") and time.sleep(600))
'''


STARTING = '''
import sys, time
if any("forkserver" in word for word in sys.orig_argv):
    from multiprocessing.synchronize import SemLock
    unpickle = SemLock.__setstate__
    SemLock.__setstate__ = lambda lock, state: (time.sleep(3), unpickle(lock, state))
'''


@pytest.mark.slow
def test_a_stop_while_workers_start_ends_them_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STARTING)
    flags = ["--data-dir", image_tree(tmp_path / "images"), *SHORT, "--batch-size", "60", "--workers", "2",
             "--output-dir", tmp_path]
    with start("image_folder", *flags, folder=tmp_path, PYTHONPATH=str(tmp_path)) as job:
        job.wait_until(lambda: len(job.alive()) >= 5)  # the trainer, the server, its tracker, the workers
        job.signal(signal.SIGTERM)
        ended = job.wait(30)
        check_nothing_left(job)
    check(ended, Fault(name="worker", codes=(75,)))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_whose_read_never_returns_is_noticed_and_does_not_delay_a_stop(tmp_path: Path, stopped: bool) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGING)
    flags = ["--data-dir", image_tree(tmp_path / "images"), *SHORT, "--batch-size", "60", "--workers", "2",
             "--output-dir", tmp_path, "--timeout", "60" if stopped else "4"]
    with start("image_folder", *flags, folder=tmp_path, PYTHONPATH=str(tmp_path)) as job:
        job.wait_for_line("parameters")
        if stopped:
            job.wait_until(lambda: len(job.alive()) >= 4)  # the trainer, the server, its tracker, a worker
            job.signal(signal.SIGTERM)
        ended = job.wait(30)
        check_nothing_left(job)
    fault = Fault(name="worker", codes=(75 if stopped else 3,), error="" if stopped else "ERROR data: --timeout 4")
    check(ended, fault)


@pytest.mark.parametrize(("thread", "stopped"), [
    ("--no-download", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("--no-download", False), ("--download", True), ("--download", False)))])
def test_a_read_that_never_returns_before_training_is_named_and_a_stop_is_heard(tmp_path: Path, thread: str,
                                                                                stopped: bool) -> None:
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte", np.zeros((30, 28, 28)))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte", np.zeros(30))
    flags = [*SHORT, "--data-dir", tmp_path, "--output-dir", tmp_path, thread, "--timeout", "60" if stopped else "2"]
    with start("mnist", *flags, folder=tmp_path, hook=hang_on_open("train-images-idx3-ubyte")) as job:
        job.wait_for_line("hangs")
        if stopped:
            job.signal(signal.SIGTERM)
        ended = job.wait(20)
        check_nothing_left(job)
    error = "" if stopped else "ERROR data: --timeout 2: no data"
    check(ended, Fault(name="start", codes=(75 if stopped else 3,), error=error))
    assert read_json(tmp_path / "r" / "status.json")["state"] == ("PREEMPTED" if stopped else "FAILED")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_checkpoint_whose_read_never_returns_is_named_and_a_stop_is_heard(tmp_path: Path, stopped: bool) -> None:
    assert run_in(tmp_path, "--max-steps", "4").codes == [0]
    flags = [*NORMED, "--output-dir", tmp_path, "--timeout", "60" if stopped else "2"]
    with start("cifar", *flags, folder=tmp_path, hook=hang_on_open(".pt")) as job:
        job.wait_for_line("hangs")
        if stopped:
            job.signal(signal.SIGTERM)
        ended = job.wait(20)
        check_nothing_left(job)
    error = "" if stopped else "ERROR data: --timeout 2: no data for longer at step 0"
    check(ended, Fault(name="load", codes=(75 if stopped else 3,), error=error))
    assert read_json(tmp_path / "r" / "status.json")["state"] == ("PREEMPTED" if stopped else "FAILED")


@pytest.mark.slow
def test_a_long_folder_of_temporary_files_has_room_for_sockets(tmp_path: Path) -> None:
    (tmp_path / TMPDIR).mkdir()
    flags = ["--data-dir", image_tree(tmp_path / "images"), "--workers", "1"]
    ended = run_in(tmp_path, *flags, trainer="image_folder", TMPDIR=str(tmp_path / TMPDIR))
    check(ended, Fault(name="long"))


@pytest.fixture
def full_pipe(tmp_path: Path) -> Iterator[Path]:
    """A pipe that is full, and that nobody reads."""
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    fcntl.fcntl(descriptor, 1031, 4096)  # F_SETPIPE_SZ: the least
    os.write(descriptor, bytes(4096))
    yield tmp_path / "pipe"
    os.close(descriptor)


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nobody_need_read_what_is_printed(tmp_path: Path, full_pipe: Path, stopped: bool) -> None:
    streams = {"out": str(full_pipe), "err": str(full_pipe)}
    hook = [at(3, "data", touch("in-training"))] + [slow_steps(0.5)] * stopped
    with start("cifar", *NORMED, "--output-dir", tmp_path, folder=tmp_path, streams=streams, hook=hook) as job:
        if stopped:
            job.wait_until(lambda: (tmp_path / "in-training").exists())
            job.signal(signal.SIGTERM)
        while None in job.codes():
            time.sleep(0.05)
        check_nothing_left(job)
        assert job.codes() == [75 if stopped else 0]
    assert read_json(tmp_path / "r" / "status.json")["state"] == ("PREEMPTED" if stopped else "DONE")


@pytest.mark.parametrize(("phase", "function", "file"), [
    ("forward", sleep_for(2.2), "hooks.py"),
    pytest.param("data", sleep_in_a_users_function(2.2), "/home/me/mine.py:3 transform", marks=pytest.mark.slow)])
def test_compute_and_a_users_function_may_take_longer_than_the_timeout(tmp_path: Path, phase: str, function: object,
                                                                       file: str) -> None:
    ended = run_in(tmp_path, "--timeout", "1", hook=at(7, phase, function))  # pyright: ignore[reportArgumentType]
    check(ended, Fault(name="slow"))
    assert ended.err.count("WARNING") == 1
    assert f"WARNING no progress for 1 s at step 7, phase {phase} (" in ended.err
    assert file in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_job_that_was_stopped_for_longer_than_the_timeout_continues(tmp_path: Path, ranks: int) -> None:
    flags, hook = [*NORMED, "--output-dir", tmp_path, "--timeout", "2"], [slow_steps(0.1), at(4, "data", touch("here"))]
    with start("cifar", *flags, folder=tmp_path, ranks=ranks, hook=hook) as job:
        job.wait_until(lambda: (tmp_path / "here").exists())
        job.signal(signal.SIGSTOP)
        time.sleep(5)  # what is tested: longer than --timeout
        job.signal(signal.SIGCONT)
        check(job.wait(60), Fault(name="continued", ranks=ranks))
    assert read_json(tmp_path / "r" / "status.json")["state"] == "DONE"


def test_more_threads_than_cores_are_warned_of_once(tmp_path: Path) -> None:
    threads = usable_cores() + 1
    ended = run_in(tmp_path, "--threads", str(threads), "--max-steps", "2", ranks=2)
    check(ended, Fault(name="threads", ranks=2))
    assert ended.err.count(f"WARNING --threads {threads}: 2 ranks x {threads} threads on {usable_cores()} usable") == 1


@pytest.mark.skipif(os.getuid() != 0, reason="needs the right to become another user")
def test_a_user_without_a_name_or_home_trains() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        ended = run_in(Path(folder), "--max-steps", "2", hook=become_user(12345))
        check(ended, Fault(name="nobody"))
        assert (Path(folder) / "r" / "result.json").stat().st_uid == 12345


WAITING = '''
import time, torch
class Slow(torch.utils.data.Dataset):
    classes = ["a", "b"]
    def __len__(self): return 60
    def __getitem__(self, sample):
        time.sleep({seconds})
        return torch.full((3, 8, 8), float(sample % 2)), sample % 2
def load(data_dir): return Slow(), Slow()
class Net(torch.nn.Sequential):
    def __init__(self): super().__init__(torch.nn.Flatten(), torch.nn.Linear(192, 2))
'''


@pytest.mark.parametrize(("seconds", "warned"), [(0.03, True), pytest.param(0.0, False, marks=pytest.mark.slow)])
def test_a_run_that_waits_for_its_data_says_so_once_and_in_its_result(seconds: float, warned: bool,
                                                                      tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(WAITING.format(seconds=seconds))
    ended = run("custom", "--data", f"{tmp_path}/my.py:load", "--model", f"{tmp_path}/my.py:Net", "--batch-size", "10",
                "--epochs", "2", "--threads", "1", "--no-pictures", "--output-dir", tmp_path, "--run-name", "r")
    assert ended.code == 0, ended.err
    assert ended.err.count("WARNING data: training has waited") == warned
    assert not warned or "% of its time; raise --workers from 0\n" in ended.err
    share = read_json(tmp_path / "r" / "result.json")["data_wait_share"]
    assert 0.5 < share <= 1 if warned else 0 <= share < 1
