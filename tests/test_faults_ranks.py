"""Ranks that die, hang, compute nonsense or never come: one is named, once, and all of them end."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.helpers.faults import Fault, assert_ends_as_specified, cases, check, check_lines, check_nothing_left
from tests.helpers.hooks import (
    Hook,
    at,
    bad_loss_from,
    delete,
    kill,
    list_files,
    rank_without_a_gpu,
    run_out_of_memory,
    say,
    silent_after,
    sleep_for,
    slow_steps,
    stop,
    taken_over,
)
from tests.helpers.processes import read_json, wait_until
from tests.helpers.server import NORMED, free_port, run, slack, start, variables_of

pytestmark = pytest.mark.timeout(150)

LOST = {"ranks": 2, "resumes": True}
FAULTS = [
    Fault(name="rank-1-killed", hook=at(13, "backward", kill, ranks=[1]), codes=(6, -9), state="FAILED",
          error="ERROR distributed: rank 1 of 2: exited silently at about step 13", **LOST),
    Fault(name="rank-0-killed", hook=at(13, "data", kill, ranks=[0]), codes=(-9, 6), state="RUNNING",
          error="ERROR distributed: rank 0 of 2: exited silently at about step 13", **LOST),
    Fault(name="rank-1-killed-in-the-evaluation", hook=at(10, "evaluate", kill, ranks=[1]), codes=(6, -9),
          state="FAILED", error="ERROR distributed: rank 1 of 2", **LOST),
    Fault(name="all-ranks-killed", hook=at(13, "optimizer", kill), codes=(-9,), state="RUNNING", **LOST),
    Fault(name="loss-not-finite-on-one-rank", ranks=2, hook=bad_loss_from(4, ranks=[1]), codes=(7,), state="FAILED",
          flags=("--max-bad-steps", "3"), error="ERROR numeric: step .*: the loss is not finite", resumes=True),
    Fault(name="loss-not-finite-on-all-ranks", ranks=2, hook=bad_loss_from(4), codes=(7,), state="FAILED",
          error="ERROR numeric: step", resumes=True),
    Fault(name="loss-not-finite-in-the-last-step", hook=bad_loss_from(19), codes=(7,), state="FAILED",
          error="ERROR numeric: step 20", resumes=True),
    Fault(name="memory-used-up-on-one-rank", ranks=2, codes=(6, 5), state="FAILED", resumes=True,
          hook=at(7, "forward", run_out_of_memory("full"), ranks=[1]), error="ERROR device: memory: full"),
    Fault(name="taken-over-by-a-later-incarnation", ranks=2, hook=at(11, "data", taken_over(), ranks=[0]), codes=(4, 6),
          state="RUNNING", error="ERROR checkpoint: .*a later incarnation, pid 1 on elsewhere, owns this run"),
    Fault(name="run-folder-deleted", ranks=2, hook=at(11, "data", delete("runs/r"), ranks=[0]), codes=(4, 6),
          state=None, error="ERROR checkpoint: .*owner.json was deleted or damaged .*; start the same command again",
          resumes=True),
    Fault(name="owner-file-deleted", hook=at(11, "data", delete("runs/r/owner.json")), codes=(4,), state="RUNNING",
          error="ERROR checkpoint: .*owner.json was deleted or damaged", resumes=True),
    Fault(name="checkpoints-deleted", hook=at(11, "data", delete("runs/r/checkpoints")), codes=(4,), state="FAILED",
          error="ERROR checkpoint: .*cannot be written .No such file or directory.; move it back if it was moved while "
                "in use, then start the same command again", resumes=True),
]


@pytest.mark.parametrize("fault", cases(FAULTS, default={
    "rank-0-killed", "loss-not-finite-on-one-rank", "loss-not-finite-in-the-last-step", "owner-file-deleted",
    "checkpoints-deleted"}))
def test_a_rank_that_fails_is_named_once_and_every_rank_ends(tmp_path: Path, fault: Fault) -> None:
    assert_ends_as_specified(fault, tmp_path)


def test_a_process_that_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    fault = Fault(name="fence", hook=at(12, "data", taken_over(), list_files("runs", into="before.txt")), codes=(4,),
                  state="RUNNING", error="a later incarnation")
    assert_ends_as_specified(fault, tmp_path)
    after = sorted((str(path.relative_to(tmp_path)), path.stat().st_mtime_ns)
                   for path in (tmp_path / "runs").rglob("*") if path.is_file())
    before = (tmp_path / "before.txt").read_text()
    late = [entry for entry in after if str(entry) not in before]
    assert [name for name, _ in late if "heartbeat" not in name and "checkpoints/" not in name] == []
    newest = max(name for name, _ in after if name.endswith(".json") and "step-" in name)
    assert int(re.findall(r"step-(\d+)", newest)[0]) <= 12


@pytest.mark.parametrize(("action", "stack"), [
    pytest.param(stop, "", id="stopped", marks=pytest.mark.slow),
    pytest.param(sleep_for(60), "hooks.py", id="sleeping")])
def test_a_rank_that_hangs_is_named_with_its_step_and_phase(tmp_path: Path, action: Hook, stack: str) -> None:
    flags = [*NORMED, "--timeout", "5", "--output-dir", tmp_path]
    hangs = at(7, "data", say("hangs"), action, ranks=[1])
    with start("cifar", *flags, folder=tmp_path, ranks=2, hook=hangs) as job:
        job.wait_for_line("hangs")
        before = time.monotonic()
        ended = job.wait(30)
        assert time.monotonic() - before < 5 + 2 * slack()
        check_nothing_left(job)
    assert ended.codes == [6, -9 if action == stop else 6]
    check_lines(ended, "ERROR distributed: rank 1 of 2: no progress for 5 s at step 7, "
                       + ("phase data" if stack else "(phase|last seen)"))
    assert read_json(tmp_path / "r" / "status.json")["state"] == "FAILED"
    assert stack in ended.err
    assert bool(stack) == ("most recent call first" in ended.err)


def test_a_rank_whose_store_falls_silent_with_its_host_ends_too(tmp_path: Path) -> None:
    flags = [*NORMED, "--timeout", "3", "--output-dir", tmp_path]  # rank 0 hosts the store: as if its cable was pulled
    hook = [silent_after(2), at(7, "data", stop, ranks=[0])]
    with start("cifar", *flags, folder=tmp_path, ranks=2, hook=hook) as job:
        job.wait_until(lambda: len(job.alive()) == 2)
        wait_until(lambda: job.codes()[1] is not None, 30, lambda: job.text("err"), every=0.05)
        job.signal(signal.SIGKILL, 0)
        ended = job.wait(5)
        check_nothing_left(job)
    assert ended.codes == [-9, 6]
    check_lines(ended, "ERROR distributed: rank 1 of 2: the host of the rendezvous has not answered for [5-9] s at "
                       "step 7")


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    variables = variables_of(0, 2, str(free_port()))
    flags = [*NORMED, "--timeout", "3", "--output-dir", tmp_path]
    ended = run("cifar", *flags, folder=tmp_path, timeout=30, **variables)
    assert ended.codes == [6]
    check_lines(ended, "ERROR distributed: rank 0 of 2 .*not all ranks met within 3 s .missing: rank 1")
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_rank_whose_rank_0_never_comes_says_so(tmp_path: Path) -> None:
    variables = variables_of(1, 2, str(free_port()))
    flags = [*NORMED, "--timeout", "3", "--output-dir", tmp_path]
    ended = run("cifar", *flags, folder=tmp_path, timeout=30, **variables)
    assert ended.codes == [6]
    check_lines(ended, "ERROR distributed: rank 1 of 2 .*Connection refused")


@pytest.mark.slow
def test_a_stop_signal_is_heard_while_a_rank_is_awaited(tmp_path: Path) -> None:
    variables = variables_of(0, 2, str(free_port()))
    with start("cifar", *NORMED, "--output-dir", tmp_path, folder=tmp_path, hook=say("up"), **variables) as job:
        job.wait_for_line("up")
        job.signal(signal.SIGTERM)
        check(job.wait(20), Fault(name="stopped", codes=(75,)))


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("localhost", 0))
        holder.listen()
        fault = Fault(name="port", codes=(6,), state=None, error=f"ERROR distributed: .*:{holder.getsockname()[1]} .*"
                      "EADDRINUSE.*MASTER_PORT", variables=(
                          ("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", str(holder.getsockname()[1]))))
        assert_ends_as_specified(fault, tmp_path)


@pytest.mark.parametrize(("variables", "ranks", "why"), [
    ({}, 2, "EADDRINUSE|2 ranks have met there already"),
    pytest.param({"RANK": "1", "WORLD_SIZE": "2"}, None, "rank 1 of 2 .*2 ranks have met there already; .*MASTER_PORT",
                 marks=pytest.mark.slow),
    pytest.param({"RANK": "2", "WORLD_SIZE": "3"}, None, "rank 2 of 3 .*the 2 ranks of another job meet there; .*PORT",
                 marks=pytest.mark.slow)], ids=["a whole job", "a late rank", "another world size"])
def test_ranks_that_come_to_another_jobs_port_are_refused_and_that_job_trains_on(
        tmp_path: Path, variables: dict[str, str], ranks: int | None, why: str) -> None:
    port = str(free_port())
    flags = [*NORMED, "--output-dir"]
    with start("cifar", *flags, tmp_path, folder=tmp_path / "first", ranks=2, hook=slow_steps(0.15),
               MASTER_PORT=port) as job:
        job.wait_until(lambda: (tmp_path / "r" / "metrics.jsonl").exists())
        with start("cifar", *flags, tmp_path / "second", folder=tmp_path / "other", ranks=ranks,
                   **{"MASTER_PORT": port, "MASTER_ADDR": "localhost", **variables}) as other:
            refused = other.wait(20)
            check_nothing_left(other)
        assert set(refused.codes) == {6}
        check_lines(refused, f"ERROR distributed: .*({why})")
        assert not (tmp_path / "second").exists()
        assert job.codes() == [None, None]
        assert job.wait(30).codes == [0, 0]
    assert read_json(tmp_path / "r" / "status.json")["state"] == "DONE"


@pytest.mark.parametrize(("name", "value"), [("RANK", "first"), ("WORLD_SIZE", "")])
def test_launcher_variables_that_are_no_numbers_are_a_usage_error(tmp_path: Path, name: str,
                                                                 value: str) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", **{name: value}}
    fault = Fault(name="variables", codes=(2,), state=None, error="ERROR usage: launcher variables: invalid",
                  variables=tuple(variables.items()))
    assert_ends_as_specified(fault, tmp_path)


@pytest.mark.slow
def test_a_rank_without_a_device_is_named_and_the_other_ends(tmp_path: Path) -> None:
    fault = Fault(name="device", ranks=3, hook=rank_without_a_gpu(2, num_gpus=2), codes=(6, 6, 5), state=None,
                  error="ERROR device: --device auto: local rank 2 of 3 has no GPU, 2 are visible")
    ended = assert_ends_as_specified(fault, tmp_path)
    assert ended.seconds < 30


def test_the_status_of_a_run_that_lost_a_rank_says_so(tmp_path: Path) -> None:
    fault = Fault(name="killed", ranks=2, hook=at(13, "backward", kill, ranks=[1]), codes=(6, -9), state="FAILED",
                  error="rank 1 of 2")
    assert_ends_as_specified(fault, tmp_path)
    assert read_json(tmp_path / "runs" / "r" / "status.json")["reason"] == "ERROR distributed: another rank was lost"
