"""The run folder: its owner, its fence, what may change between two starts, and files that are whole or absent."""

import errno
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.errors import CheckpointError, UsageError
from launch.files import read_object, replace_file
from tests.helpers.processes import PROGRAMS
from trainers.engine.run import ownership
from trainers.engine.run.folder import RunFolder

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "r", is_main=True)
    folder.claim()
    return folder


def begin(folder: RunFolder, **config: Any) -> bool:
    return folder.begin({"epochs": 1, "lr": 0.1, **config}, world={})


def commit_a_checkpoint(folder: RunFolder) -> None:
    (folder.checkpoints / "step-00000001.json").write_text("{}")


def test_every_owner_raises_the_fencing_token(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        folder = RunFolder(tmp_path / "r", is_main=True)
        folder.claim()
        assert folder.ownership.incarnation == expected
        folder.release()


def test_a_folder_locked_by_another_process_is_refused_and_names_it(tmp_path: Path) -> None:
    words = [sys.executable, str(PROGRAMS / "claim.py"), str(tmp_path / "r")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(CheckpointError, match=f"in use by pid {other.pid} on {socket.gethostname()}"):
            RunFolder(tmp_path / "r", is_main=True).claim()
        other.kill()
        other.wait()
    RunFolder(tmp_path / "r", is_main=True).claim()  # the kernel gave the lock up


AGENT = {"host": "a", "pid": 7, "started": 100, "run_id": "mine"}


@pytest.mark.parametrize(("job", "launcher", "then", "now", "other"), [
    ("slurm-7", None, 0, 1000, None), ("slurm-7", AGENT, 2, 1000, {**AGENT, "pid": 8}),
    ("torchrun-mine", AGENT, 0, 1, AGENT), ("slurm-7", AGENT, 1000, 1001, AGENT)],
    ids=["requeued step", "requeued torchrun", "restarted by torchrun", "restarted by torchrun in Slurm"])
def test_the_same_job_started_again_takes_the_run_over_and_the_old_one_writes_nothing_more(
        folder: RunFolder, monkeypatch: pytest.MonkeyPatch, job: str, launcher: Any, then: int, now: int,
        other: Any) -> None:
    owner = {**(folder.read_json("owner.json") or {}), "job": job, "restart": then, "launcher": launcher}
    replace_file(folder.path / "owner.json", json.dumps(owner).encode())
    monkeypatch.setattr(ownership, "job_identity", lambda: {"job": job, "restart": now})
    monkeypatch.setattr(ownership, "launcher_identity", lambda: other)
    monkeypatch.setattr(ownership, "still_beats", lambda *args, **how: pytest.fail("the launcher proves it"))
    later = RunFolder(folder.path, is_main=True)
    later.claim()
    before = sorted(path.name for path in folder.path.iterdir())
    for write in (lambda: folder.write_status("DONE"), lambda: folder.append_metrics({"step": 1}),
                  lambda: folder.truncate_metrics(0, evaluated=True) or folder.ownership.check(), folder.set_aside):
        with pytest.raises(CheckpointError, match="a later incarnation"):
            write()
    folder.ownership._beat_at = 0
    folder.beat()
    folder.release()
    assert sorted(path.name for path in folder.path.iterdir()) == before
    assert (read_object(folder.path / "owner.json") or {})["incarnation"] == 2
    later.write_status("RUNNING")


@pytest.mark.parametrize(("job", "restart", "launcher"), [
    ("slurm-7", 1, None), ("slurm-7", 3, {**AGENT, "pid": 8}), ("torchrun-mine", 1, {**AGENT, "pid": 8}),
    ("torchrun-mine", 2, {**AGENT, "started": 101}), ("torchrun-mine", 1, {**AGENT, "host": "b"}),
    ("torchrun-mine", 0, AGENT), ("slurm-8", 1000, AGENT), (None, 0, None)])
def test_a_second_launcher_of_one_name_is_refused_however_often_it_restarts(
        folder: RunFolder, monkeypatch: pytest.MonkeyPatch, job: str | None, restart: int, launcher: Any) -> None:
    elsewhere = {"job": "slurm-7" if "slurm" in str(job) else "torchrun-mine", "restart": 0, "launcher": AGENT}
    elsewhere = {**(folder.read_json("owner.json") or {}), **elsewhere, "host": "elsewhere", "pid": 5}
    replace_file(folder.path / "owner.json", json.dumps(elsewhere).encode())
    monkeypatch.setattr(ownership, "job_identity", lambda: {"job": job, "restart": restart})
    monkeypatch.setattr(ownership, "launcher_identity", lambda: launcher)
    monkeypatch.setattr(ownership.time, "sleep", lambda _: replace_file(folder.path / "heartbeat.json", b'{"b": 1}'))
    with pytest.raises(CheckpointError, match="in use by pid 5 on elsewhere"):
        RunFolder(folder.path, is_main=True).claim()
    assert folder.read_json("owner.json") == elsewhere


def test_a_folder_that_was_deleted_and_made_again_has_one_writer(folder: RunFolder) -> None:
    shutil.rmtree(folder.path)
    for write in (lambda: folder.write_status("RUNNING"), lambda: folder.append_metrics({"step": 1})):
        with pytest.raises(CheckpointError, match=r"owner.json was deleted or damaged .* start the same command again"):
            write()
    assert not folder.path.exists()
    later = RunFolder(folder.path, is_main=True)
    later.claim()
    assert later.ownership.incarnation == folder.ownership.incarnation  # both are the first: the word tells them apart
    with pytest.raises(CheckpointError, match="a later incarnation"):
        folder.append_metrics({"step": 1})
    later.append_metrics({"step": 1})
    folder.release()
    later.append_metrics({"step": 2})


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"incarnation": 1}', b'{"incarnation": 1, "word": "x"}'])
def test_a_claim_that_was_deleted_or_damaged_is_lost(folder: RunFolder, content: bytes | None) -> None:
    (folder.path / "owner.json").unlink()
    if content is not None:
        (folder.path / "owner.json").write_bytes(content)
    before = sorted(path.name for path in folder.path.iterdir())
    with pytest.raises(CheckpointError, match=r"deleted or damaged|a later incarnation"):
        folder.append_metrics({"step": 1})
    folder.beat()
    assert sorted(path.name for path in folder.path.iterdir()) == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_file_locks_a_second_start_on_the_same_host_is_refused_while_the_first_beats(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(ownership.fcntl, "lockf", no_locks)
    first, second = RunFolder(tmp_path / "r", is_main=True), RunFolder(tmp_path / "r", is_main=True)
    first.claim()

    def pause(seconds: float) -> None:
        assert seconds > 2 * ownership.BEAT_SECONDS
        first.ownership._beat_at = 0
        first.beat()

    monkeypatch.setattr(ownership.time, "sleep", pause)
    with pytest.raises(CheckpointError, match="in use by pid"):
        second.claim()
    first.append_metrics({"step": 1})
    monkeypatch.setattr(ownership.time, "sleep", lambda _: None)  # as after kill -9
    second.claim()
    with pytest.raises(CheckpointError, match="a later incarnation"):
        first.append_metrics({"step": 2})


def test_a_deleted_lock_lets_nobody_in_while_the_owner_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, str(PROGRAMS / "claim.py"), str(tmp_path / "r")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        (tmp_path / "r" / "lock").unlink()
        beat = tmp_path / "r" / "heartbeat.json"
        monkeypatch.setattr(ownership.time, "sleep", lambda _: replace_file(beat, b'{"beats": 2}'))
        with pytest.raises(CheckpointError, match=f"in use by pid {other.pid}"):
            RunFolder(tmp_path / "r", is_main=True).claim()
        other.kill()
        other.wait()
    monkeypatch.setattr(ownership.time, "sleep", lambda _: pytest.fail("a dead owner is not waited for"))
    RunFolder(tmp_path / "r", is_main=True).claim()


def test_an_owner_on_another_host_counts_as_long_as_its_heartbeat_changes(folder: RunFolder,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = {**(folder.read_json("owner.json") or {}), "host": "elsewhere", "pid": 5}
    folder.release()
    replace_file(folder.path / "owner.json", json.dumps(elsewhere).encode())
    beats = iter(range(10))
    beat_file = folder.path / "heartbeat.json"
    monkeypatch.setattr(ownership.time, "sleep", lambda _: replace_file(beat_file, b'{"beats": %d}' % next(beats)))
    with pytest.raises(CheckpointError, match="in use by pid 5 on elsewhere"):
        RunFolder(folder.path, is_main=True).claim()
    monkeypatch.setattr(ownership.time, "sleep", lambda _: None)  # no more heartbeats: it is dead
    RunFolder(folder.path, is_main=True).claim()


def test_flags_that_alter_a_run_are_refused_once_it_has_a_checkpoint(folder: RunFolder) -> None:
    assert begin(folder)
    assert begin(folder, lr=0.2)  # nothing is lost by it
    commit_a_checkpoint(folder)
    with pytest.raises(UsageError, match=r"--lr 0.3 \(was 0.2\): would alter the run"):
        begin(folder, lr=0.3)
    assert begin(folder, lr=0.2, epochs=5)
    assert begin(folder, lr=0.2, added_by_a_later_version=1)


def test_a_run_that_is_done_goes_on_only_for_more(folder: RunFolder) -> None:
    begin(folder)
    commit_a_checkpoint(folder)
    folder.write_status("DONE", step=10)
    assert not begin(folder)
    assert begin(folder, epochs=2)
    assert (folder.read_json("status.json") or {})["step"] == 10


def test_an_evaluation_does_not_replace_the_result_of_a_training_run(folder: RunFolder) -> None:
    assert begin(folder, evaluate="best.pt")
    assert begin(folder, evaluate="best.pt")  # again into its own folder
    assert begin(folder)
    commit_a_checkpoint(folder)
    before = folder.read_json("config.json")
    with pytest.raises(UsageError, match=r"--evaluate best\.pt: .*/r holds a training run, .* another --run-name"):
        begin(folder, evaluate="best.pt")
    assert folder.read_json("config.json") == before


@pytest.mark.parametrize("line", [b"[" * 10**5, b"\xff", b"3", b"{}"])
def test_a_first_line_of_metrics_of_any_kind_names_no_split(folder: RunFolder, line: bytes) -> None:
    (folder.path / "metrics.jsonl").write_bytes(line)
    assert folder.first_evaluated_split() is None


def test_metrics_are_cut_to_the_lines_that_will_not_be_written_again(folder: RunFolder) -> None:
    lines = [("train", 5), ("train", 10), ("test", 10), ("train", 15)]
    for split, step in lines:
        folder.append_metrics({"split": split, "step": step, "loss": float("nan")})
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b"[" * 10**5 + b'\n[3]\n\xff\xfe{"split": "tra')
    folder.truncate_metrics(10, evaluated=True)
    kept = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in kept] == lines[:3]
    assert kept[0]["loss"] is None  # JSON has no NaN
    folder.truncate_metrics(10, evaluated=False)
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("content", ["", "[]", "3", '{"incarnation": "x"}', "\0\0", '{"incarnation": 1'])
def test_a_damaged_owner_file_stops_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "owner.json").write_text(content)
    folder = RunFolder(tmp_path / "r", is_main=True)
    folder.claim()
    folder.write_status("RUNNING")
    assert folder.ownership.incarnation == 1


def test_a_file_that_cannot_be_written_is_one_line_with_a_remedy(folder: RunFolder) -> None:
    (folder.path / "status.json").mkdir()
    with pytest.raises(CheckpointError, match=r"status.json: cannot be written \(it is no regular file\); move away"):
        folder.write_status("RUNNING")
    assert not list(folder.path.glob(".*.tmp"))


def test_ranks_other_than_zero_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r", is_main=False)
    folder.write_status("RUNNING")
    folder.append_metrics({"step": 1})
    folder.beat()
    folder.release()
    folder.claim()
    folder.set_aside()
    folder.truncate_metrics(0, evaluated=True)
    folder.write_bytes("weights.pt", b"weights")
    folder.failed("lost", step=3)
    assert not (tmp_path / "r").exists()


def test_how_a_run_failed_is_written_only_by_a_process_that_started_it(folder: RunFolder) -> None:
    folder.failed("a usage error, before anything", step=0)
    assert folder.read_json("status.json") is None
    begin(folder)
    folder.write_status("RUNNING", step=20, epoch=2)
    folder.failed(CheckpointError("the disk\nis full"), step=7)
    assert folder.read_json("status.json") == {"state": "FAILED", "step": 20, "epoch": 2,
                                               "reason": "ERROR checkpoint: the disk is full"}
    folder.failed(ValueError("a bug"), step=21)
    status = folder.read_json("status.json") or {}
    assert (status["step"], status["reason"]) == (21, "ValueError: a bug")
