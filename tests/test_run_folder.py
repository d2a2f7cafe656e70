"""The run folder: its owner, its fence, what may change between two starts, and files that are whole or absent."""

import json
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


def test_a_restart_of_the_same_job_takes_the_run_over_and_the_old_one_writes_nothing_more(
        folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = {**(folder.read_json("owner.json") or {}), "job": "slurm-7", "restart": 0}
    replace_file(folder.path / "owner.json", json.dumps(owner).encode())
    monkeypatch.setattr(ownership, "job_identity", lambda: {"job": "slurm-7", "restart": 1})
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


def test_metrics_are_cut_to_the_lines_that_will_not_be_written_again(folder: RunFolder) -> None:
    lines = [("train", 5), ("train", 10), ("test", 10), ("train", 15)]
    for split, step in lines:
        folder.append_metrics({"split": split, "step": step, "loss": float("nan")})
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(b'[3]\n\xff\xfe{"split": "tra')
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
