"""Run folders, checkpoints, disks and streams in every bad state: a run resumes or says in one line why it cannot."""

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.comparing import outcome, run_in
from tests.helpers.faults import Fault, assert_ends_as_specified, cases, check, check_lines
from tests.helpers.hooks import (
    at,
    clock_jumps,
    fill,
    kill,
    limit_file_size,
    no_locks,
    sleep_for,
    slow_steps,
    small_data,
    touch,
)
from tests.helpers.processes import newest_checkpoint, read_json
from tests.helpers.server import NORMED, run, start

pytestmark = pytest.mark.timeout(120)

CUT = at(13, "data", kill)
STREAMS = [
    Fault(name="stdout-closed", streams=(("out", None),)),
    Fault(name="stderr-closed", streams=(("err", None),)),
    Fault(name="both-closed", streams=(("out", None), ("err", None))),
    Fault(name="clock-jumps-forward", hook=clock_jumps(3, 86400)),
    Fault(name="clock-jumps-back", ranks=2, hook=clock_jumps(3, -86400)),
    Fault(name="disk-full-for-a-checkpoint", hook=limit_file_size(20000), codes=(4,), state="FAILED", resumes=True,
          error="ERROR checkpoint: .*checkpoints: cannot be written"),
    Fault(name="disk-full-for-everything", hook=limit_file_size(600), codes=(4,), state=None,
          error="ERROR checkpoint: .*config.json: cannot be written"),
]


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at step 13, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("cut")
    assert run_in(folder, hook=CUT, ranks=1).codes == [-9]
    for path in (folder / "r" / "checkpoints").glob("step-*.pt"):
        if not path.with_suffix(".json").exists():
            path.unlink()  # of step 12, still being saved at the kill; the tests are to spoil whole ones
    assert newest_checkpoint(folder / "r")["step"] >= 9
    return folder


@pytest.fixture
def spoilt(cut_run: Path, tmp_path: Path) -> Path:
    """A copy of it, in a folder of its own."""
    shutil.copytree(cut_run / "r", tmp_path / "r")
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the run computes when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_in(folder).codes == [0]
    return outcome(folder)


@pytest.mark.parametrize("fault", cases(STREAMS, default={
    "both-closed", "clock-jumps-back", "disk-full-for-a-checkpoint"}))
def test_a_run_whose_surroundings_fail_goes_on_or_says_why_not(tmp_path: Path, fault: Fault) -> None:
    assert_ends_as_specified(fault, tmp_path)


def test_a_reader_of_stdout_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with start("cifar", *NORMED, "--output-dir", tmp_path, folder=tmp_path, streams={"out": str(tmp_path / "pipe")},
               hook=[at(2, "data", touch("ready")), sleep_for(0.5)]) as job:
        job.wait_until(lambda: (tmp_path / "ready").exists())
        os.close(reader)
        check(job.wait(), Fault(name="reader"))
    assert read_json(tmp_path / "r" / "status.json")["state"] == "DONE"


def spoil(folder: Path, what: str) -> None:
    """Damage a run folder."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*.pt"))
    if what == "metrics":
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"split": "train", "step": 13, "lo')
    elif what in ("status.json", "config.json", "owner.json"):
        (folder / what).write_text('[{"state": "DO')
    elif what == "environment":
        (folder / "environment.json").unlink()
    elif what == "newest":
        data = bytearray(checkpoints[-1].read_bytes())
        data[len(data) // 2] ^= 1
        checkpoints[-1].write_bytes(data)
    elif what == "temporary":
        (folder / "checkpoints" / ".step-00000099.pt.1.tmp").write_bytes(b"half")
        (folder / "checkpoints" / "step-00000099.pt").write_bytes(b"never committed")
    elif what == "stale lock":
        owner = {"incarnation": 7, "pid": 2**22 - 1, "host": os.uname().nodename, "released": False, "job": None}
        (folder / "owner.json").write_text(str(owner).replace("'", '"').replace("None", "null").replace("F", "f"))


@pytest.mark.parametrize("what", [
    "metrics", "config.json", "newest",
    *(pytest.param(what, marks=pytest.mark.slow)
      for what in ("status.json", "owner.json", "environment", "temporary", "stale lock"))])
def test_a_damaged_run_folder_is_resumed_exactly(spoilt: Path, whole: dict[str, object],
                                                      what: str) -> None:
    spoil(spoilt / "r", what)
    ended = run_in(spoilt)
    check(ended, Fault(name=what))
    assert ("WARNING checkpoint" in ended.err) == (what == "newest")
    assert outcome(spoilt) == whole


def test_a_run_without_a_whole_checkpoint_is_not_silently_started_over(spoilt: Path) -> None:
    for path in (spoilt / "r" / "checkpoints").glob("step-*.pt"):
        path.write_bytes(path.read_bytes()[:-7])
    check(run_in(spoilt), Fault(name="all damaged", codes=(4,), error="ERROR checkpoint: .*none is whole"))
    assert list((spoilt / "r" / "checkpoints").glob("step-*.pt"))


def test_resuming_with_other_flags_is_refused_and_the_run_left_as_it_was(spoilt: Path) -> None:
    before = (spoilt / "r" / "status.json").read_bytes()
    check(run_in(spoilt, "--lr", "0.5", "--momentum", "0.1"), Fault(
        name="flags", codes=(2,), error=r"ERROR usage: --learning-rate 0.5 \(was 0.05\), --momentum 0.1 \(was 0.9\)"))
    assert (spoilt / "r" / "status.json").read_bytes() == before


def test_data_that_changed_since_the_checkpoint_is_refused(spoilt: Path) -> None:
    ended = run_in(spoilt, hook=small_data(add_to_seed=1))
    check(ended, Fault(name="data", codes=(4,), error="ERROR checkpoint: .*dataset was"))


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(spoilt: Path) -> None:
    path = sorted((spoilt / "r" / "checkpoints").glob("step-*.pt"))[-1]
    ended = run_in(spoilt, "--run-name", "other", "--model", "net", "--resume", str(path))
    check(ended, Fault(name="model", codes=(4,), error="ERROR checkpoint: .*step-.*and .* more"))


def test_a_finished_run_whose_checkpoints_were_cleared_is_done_and_not_trained_again(tmp_path: Path) -> None:
    assert run_in(tmp_path).codes == [0]
    before = (tmp_path / "r" / "result.json").read_bytes()
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    ended = run_in(tmp_path)
    check(ended, Fault(name="done"))
    assert "is DONE" in ended.out
    assert (tmp_path / "r" / "result.json").read_bytes() == before
    check(run_in(tmp_path, "--epochs", "3", ranks=2), Fault(
        name="more", ranks=2, codes=(4,), error="ERROR checkpoint: .*is DONE and its checkpoints are.*--resume never"))
    check(run_in(tmp_path, "--epochs", "3", "--resume", "never"), Fault(name="never"))


@pytest.mark.parametrize(("name", "kind"), [
    ("metrics.jsonl", "pipe"), ("status.json", "pipe"), ("config.json", "folder"),
    *(pytest.param(name, kind, marks=pytest.mark.slow) for name, kind in (
        ("metrics.jsonl", "folder"), ("status.json", "folder"), ("config.json", "pipe"), ("owner.json", "folder"),
        ("result.json", "pipe"), ("checkpoints", "pipe"), ("lock", "folder"), ("model.json", "folder"),
        ("owner.json", "pipe"), ("environment.json", "folder")))])
def test_a_pipe_or_folder_under_one_of_our_names_is_one_line_or_none(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "r").mkdir()
    if kind == "pipe":
        os.mkfifo(tmp_path / "r" / name)
    else:
        (tmp_path / "r" / name / "inside").mkdir(parents=True)
    ended = run_in(tmp_path, ranks=2, timeout=40)
    if ended.code:
        assert ended.codes[0] == 4
        assert ended.codes[1] in (0, 4, 6)  # it may only see that rank 0 has left, or have nothing left to do
        check_lines(ended, f"ERROR checkpoint: .*{name}.*(move away|choose)")
        assert "free some space" not in ended.err
    else:
        assert (name, kind) == ("owner.json", "pipe")  # replaced


def test_a_second_process_on_a_run_is_told_who_has_it(tmp_path: Path) -> None:
    flags = [*NORMED, "--output-dir", tmp_path]
    with start("cifar", *flags, folder=tmp_path / "1", hook=slow_steps(0.3)) as first:
        first.wait_for_line("parameters")
        second = run("cifar", *flags, folder=tmp_path / "2", ranks=2, timeout=60)
        check(second, Fault(name="second", ranks=2, codes=(4,),
                            error=f"ERROR checkpoint: .*in use by pid {first.pids[0]} on "))
        check(first.wait(), Fault(name="first"))
    assert read_json(tmp_path / "r" / "status.json")["state"] == "DONE"


@pytest.mark.slow
def test_a_second_process_is_refused_by_heartbeats_where_the_file_system_has_no_locks(tmp_path: Path) -> None:
    flags = [*NORMED, "--output-dir", tmp_path]
    without = no_locks(errno.ENOLCK)
    with start("cifar", *flags, "--epochs", "500", folder=tmp_path / "1", hook=[without, slow_steps(0.1)]) as first:
        first.wait_for_line("parameters")
        second = run("cifar", *flags, "--epochs", "500", folder=tmp_path / "2", hook=without, timeout=30)
        check(second, Fault(name="second", codes=(4,), error=f"ERROR checkpoint: .*in use by pid {first.pids[0]} on "))
        assert first.codes() == [None]
        first.signal(signal.SIGKILL, 0)
    third = run("cifar", *flags, folder=tmp_path / "3", hook=without, timeout=60)
    check(third, Fault(name="third"))
    assert "(from step-" in third.out


@pytest.mark.parametrize("where", ["file", "/proc/none"])
def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("no folder")
    fault = Fault(name=where, ranks=2, codes=(4,), error="ERROR checkpoint: --output-dir .*: cannot be written")
    check(run_in(tmp_path, "--output-dir", str(tmp_path / where), ranks=2), fault)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_the_last_checkpoint_kept(small_disk: Path) -> None:
    fault = Fault(name="full", codes=(4,), error="ERROR checkpoint: .*free")
    check(run_in(small_disk.parent / "logs", "--output-dir", small_disk,
              hook=at(9, "data", fill(str(small_disk / "filler")))), fault)
    assert newest_checkpoint(small_disk / "r")["step"] in (3, 6, 9)
    (small_disk / "filler").unlink()
    assert run_in(small_disk.parent / "logs", "--output-dir", small_disk).codes == [0]


def test_a_run_folder_on_a_disk_that_became_read_only_is_named(small_disk: Path) -> None:
    assert run_in(small_disk.parent / "logs", "--output-dir", small_disk, hook=CUT).codes == [-9]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    check(run_in(small_disk.parent / "logs", "--output-dir", small_disk),
          Fault(name="read-only", codes=(4,), error="ERROR checkpoint: --output-dir .*Read-only"))
