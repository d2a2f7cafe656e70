"""The doctor: one page, nothing trained, and every broken thing found with its fix."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.checks import machine
from launch.checks.finding import ok, warn
from launch.checks.job import job_findings, port_finding
from launch.checks.machine import cores_finding, device_findings, required_versions, versions_finding
from launch.checks.ranks import gathered, rank_devices_finding
from launch.launcher import Launch, usable_cores
from tests.helpers.processes import PROGRAMS, ROOT, Ended, environment, execute

DOCTOR = str(ROOT / "launch" / "doctor.py")


def doctor(*flags: str, ranks: int | None = None, **variables: str) -> Ended:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return execute([sys.executable, *launcher, DOCTOR, *flags], timeout=90, **variables)


def findings(finished: Ended) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in json.loads(finished.out)["findings"]}


def record(rank: int, **changed: object) -> dict[str, object]:
    return {"rank": rank, "local_rank": rank, "host": "a", "device": "cuda:0", "uuid": f"GPU-{rank}", "problem": None,
            **changed}


@pytest.mark.timeout(120)
def test_a_sound_machine_exits_zero_and_nothing_is_left_in_the_output_folder(tmp_path: Path):
    finished = doctor("--output-dir", str(tmp_path / "runs" / "mine"), "--device", "cpu")
    assert finished.code == 0, finished.out + finished.err
    assert "versions" in finished.out
    assert "rename and fsync work" in finished.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(120)
def test_on_a_terminal_the_page_is_words_without_escapes(tmp_path: Path) -> None:
    ours, terminal = os.openpty()
    with open(ours, "rb", buffering=0) as screen:
        process = subprocess.Popen([sys.executable, DOCTOR, "--device", "cpu", "--output-dir", str(tmp_path)],
                                   stdout=terminal, env=environment())
        os.close(terminal)
        text = b""
        with contextlib.suppress(OSError):  # as a terminal ends
            while part := screen.read(4096):
                text += part
        assert process.wait(60) == 0
    assert b"OK    versions" in text
    assert b"x1b" not in text
    assert b"\x1b" not in text


@pytest.mark.timeout(120)
def test_an_output_folder_that_cannot_be_written_fails_with_code_5_and_a_fix(tmp_path: Path):
    (tmp_path / "file").write_text("")
    finished = doctor("--output-dir", str(tmp_path / "file"), "--json")
    found = findings(finished)["--output-dir"]
    assert finished.code == 5
    assert json.loads(finished.out)["ok"] is False
    assert found["state"] == "FAIL"
    assert found["fix"]


@pytest.mark.timeout(120)
def test_secrets_in_the_environment_are_not_printed(tmp_path: Path):
    for flags in ([], ["--json"]):
        finished = doctor("--output-dir", str(tmp_path), *flags, HF_TOKEN="hunter2", SLURM_JWT="hunter2",
                          OMP_NUM_THREADS="1")
        assert "hunter2" not in finished.out + finished.err
        assert "OMP_NUM_THREADS=1" in finished.out


@pytest.mark.timeout(120)
def test_two_ranks_are_mapped_timed_and_found_to_run_the_same_code(tmp_path: Path):
    finished = doctor("--output-dir", str(tmp_path), "--json", "--device", "cpu", ranks=2)
    found, ranks = findings(finished), json.loads(finished.out)["ranks"]
    assert finished.code == 0, finished.out + finished.err
    assert [(one["rank"], one["device"]) for one in ranks] == [(0, "cpu"), (1, "cpu")]
    assert len({one["pid"] for one in ranks}) == 2
    assert {found[name]["state"] for name in ("rank devices", "code", "clocks", "all_reduce")} == {"OK"}
    assert "25 MiB over gloo" in found["all_reduce"]["text"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_rank_that_runs_other_code_is_named(tmp_path: Path):
    finished = execute([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                        str(PROGRAMS / "doctor_of_two_checkouts.py"), str(tmp_path)], timeout=90)
    found = findings(finished)["code"]
    assert finished.code != 0
    assert found["state"] == "FAIL"
    assert "ranks 1: code edited" in found["text"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_that_never_come_are_a_finding_and_not_a_hang(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    finished = doctor("--output-dir", str(tmp_path), "--timeout", "3", "--json", RANK="0", WORLD_SIZE="2",
                      LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert finished.code == 5, finished.out + finished.err
    assert "not all ranks met" in findings(finished)["ranks"]["text"]
    assert "versions" in findings(finished)


@pytest.mark.timeout(120)
def test_launcher_variables_that_are_no_numbers_are_a_finding(tmp_path: Path):
    finished = doctor("--output-dir", str(tmp_path), "--json", RANK="zero", WORLD_SIZE="2")
    assert finished.code == 5
    assert "zero" in findings(finished)["launcher"]["text"]


@pytest.mark.parametrize(("visible", "state", "words"), [
    (None, "FAIL", "finds no CUDA device"), ("", "OK", "hides all GPUs"), ("-1", "OK", "hides all GPUs")])
def test_a_driver_without_a_gpu_is_a_failure_unless_the_user_has_hidden_the_gpus(
        monkeypatch: pytest.MonkeyPatch, visible: str | None, state: str, words: str):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or exists(path))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = next(finding for finding in device_findings() if finding.check == "devices")
    assert (found.state, words in found.text) == (state, True)


def test_ranks_that_share_a_gpu_fail_under_nccl_and_are_warned_of_under_gloo():
    ranks = [record(0, uuid="GPU-x"), record(1, uuid="GPU-x"), record(2)]
    assert rank_devices_finding(ranks, "auto").state == "FAIL"
    assert "ranks 0, 1 share GPU-x" in rank_devices_finding(ranks, "auto").text
    assert rank_devices_finding(ranks, "gloo").state == "WARN"
    assert rank_devices_finding([record(0), record(1)], "auto").state == "OK"


def test_a_rank_without_a_gpu_is_named_with_its_host():
    broken = record(9, host="b", device=None, uuid=None, problem="local rank 9 has no GPU; start 8 ranks")
    found = rank_devices_finding([record(0), broken], "auto")
    assert (found.state, found.fix) == ("FAIL", "start 8 ranks")
    assert "rank 9 on b" in found.text


def test_the_room_in_shared_memory_is_compared_with_what_workers_need(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "free_shared_memory", lambda: 64 * 2**20)
    assert machine.shared_memory_finding(batch_bytes=2**20, workers=4).state == "OK"
    short = machine.shared_memory_finding(batch_bytes=32 * 3 * 224**2, workers=8)
    assert short.state == "WARN"
    assert "8 workers x 3 batches of 4.6 MiB" in short.text
    monkeypatch.setattr(machine, "free_shared_memory", lambda: None)
    assert machine.shared_memory_finding(batch_bytes=2**20, workers=4).state == "OK"


def test_of_another_node_only_trouble_is_shown_and_with_its_name():
    good, bad = ok("/dev/shm", text=""), warn("/dev/shm", text="")
    found = gathered([[good], [], [bad, good]], [record(0), record(1), record(2, host="b")])
    assert [(finding.state, finding.host) for finding in found] == [("OK", ""), ("WARN", "b")]


def test_more_threads_than_cores_is_a_warning_with_the_number_that_fits(monkeypatch: pytest.MonkeyPatch):
    ranks = 2
    launch = Launch(launcher="slurm", world_size=ranks, local_world_size=ranks)
    monkeypatch.setenv("OMP_NUM_THREADS", str(usable_cores() + 1))
    found = cores_finding(launch)
    assert found.state == "WARN"
    assert f"OMP_NUM_THREADS={max(1, usable_cores() // ranks)}" in found.fix
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cores_finding(Launch()).state == "OK"


def test_a_port_in_use_is_told_from_a_free_one():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert port_finding(Launch(port=port)).state == "WARN"
    assert port_finding(Launch(port=port)).state == "OK"


def test_plain_python_inside_a_slurm_job_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    states = {finding.check: finding.state for finding in job_findings(Launch())}
    assert states["launcher"] == "WARN"


def test_required_versions_come_from_pyproject_and_compare_as_numbers(monkeypatch: pytest.MonkeyPatch):
    assert {"torch", "torchvision", "tyro", "matplotlib"} <= required_versions().keys()
    monkeypatch.setattr(machine, "required_versions", lambda: {"torch": "2.10", "numpy": "0"})
    for version, state in (("2.9.1+cu128", "FAIL"), ("2.10.0+cu128", "OK"), ("2.14.0a0+git1", "OK")):
        monkeypatch.setattr(machine.metadata, "version", lambda name, found=version: found)
        assert versions_finding().state == state


@pytest.mark.timeout(60)
def test_a_python_without_torch_gets_one_line_and_no_traceback(tmp_path: Path):
    finished = execute([sys.executable, "-S", DOCTOR], timeout=30, PYTHONPATH=os.devnull)
    assert finished.code != 0
    assert "has no torch" in finished.err
    assert "Traceback" not in finished.err
