"""The folder of a run without `--run-name`: a short name, one launcher's own, found again by its restarts."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch import launcher
from launch.errors import CheckpointError, UsageError, user_line
from launch.files import read_object, replace_file
from tests.helpers.faults import Fault, assert_ends_as_specified
from tests.helpers.hooks import at, kill, on_first_start
from tests.helpers.processes import TINY, read_json
from tests.helpers.server import NORMED, run, start
from trainers.engine.run import ownership
from trainers.engine.run.folder import RunFolder
from trainers.engine.run.ownership import check_run_name, unnamed_run

pytestmark = pytest.mark.timeout(240)

BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}
STANDALONE = {"TORCHELASTIC_RUN_ID": "3f2b8a10-5c1d-4e9a-9b7e-0a1b2c3d4e5f"}
TIME = r"20\d{6}-\d{6}"
UNNAMED = NORMED[: NORMED.index("--run-name")]


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_PTY_PORT", "SLURM_ARRAY_TASK_ID",
                 "SLURM_JOB_NAME", "ENVIRONMENT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(("variables", "ending"), [
    ({}, TIME),
    (BATCH, "17"),
    ({**BATCH, "SLURM_STEP_ID": "0"}, "17"),
    ({**BATCH, "SLURM_STEP_ID": "0", "TORCHELASTIC_RUN_ID": "17-1"}, "17"),
    ({**BATCH, "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5"}, "12_5"),
    ({"SLURM_JOB_ID": "17"}, TIME),
    ({**BATCH, "SLURM_STEP_ID": "4294967290"}, TIME),
    ({**BATCH, "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "35017"}, TIME),
    ({**BATCH, "SLURM_STEP_ID": "1", "SLURM_JOB_NAME": "interactive"}, TIME),
    ({**BATCH, "ENVIRONMENT": "BATCH", "SLURM_PTY_PORT": "35017", "SLURM_JOB_NAME": "interactive"}, "17"),
    ({"TORCHELASTIC_RUN_ID": "my run"}, "my_run"),
    ({"TORCHELASTIC_RUN_ID": "none"}, TIME),
    (STANDALONE, TIME),
    ({**STANDALONE, "SLURM_JOB_ID": "17"}, TIME),
], ids=["python", "batch script", "srun", "torchrun in a batch script", "array task", "salloc", "salloc on a node",
        "srun --pty", "srun in salloc", "sbatch from srun --pty", "--rdzv-id", "torchrun", "torchrun --standalone",
        "torchrun in salloc"])
def test_a_run_is_named_after(no_launcher: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str],
                              ending: str) -> None:
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    assert re.fullmatch(f"cifar-fast-{ending}", unnamed_run(tmp_path, "cifar", "fast"))


def test_runs_started_in_the_same_second_get_a_folder_each(no_launcher: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_launcher.setattr(ownership.time, "strftime", lambda form: "20261125-093314")
    with ThreadPoolExecutor(max_workers=8) as threads:
        names = list(threads.map(lambda _: unnamed_run(tmp_path / "runs", "cifar", "fast"), range(24)))
    name = "cifar-fast-20261125-093314"
    assert sorted(names) == sorted([name, *(f"{name}-{number}" for number in range(2, 25))])


@pytest.mark.parametrize("run_id", ["none", STANDALONE["TORCHELASTIC_RUN_ID"]], ids=["no id", "standalone"])
def test_a_restart_finds_its_folder_and_another_launcher_does_not(no_launcher: pytest.MonkeyPatch, tmp_path: Path,
                                                                 run_id: str) -> None:
    no_launcher.setenv("TORCHELASTIC_RUN_ID", run_id)
    no_launcher.setattr(ownership.time, "strftime", lambda form: "20261125-093314")
    name = unnamed_run(tmp_path, "cifar", "fast")
    no_launcher.setattr(ownership.time, "strftime", lambda form: "20261125-093315")
    assert unnamed_run(tmp_path, "cifar", "fast") == name  # killed before it became the owner
    folder = RunFolder(tmp_path / name, is_main=True)
    folder.claim()
    assert unnamed_run(tmp_path, "cifar", "fast") == name
    folder.release()
    assert unnamed_run(tmp_path, "cifar", "fast") == name
    owner = read_object(tmp_path / name / "owner.json") or {}
    assert owner["incarnation"] == 1
    no_launcher.setattr(ownership.time, "strftime", lambda form: "20261125-093314")
    for number, change in enumerate(({"host": "elsewhere"}, {"pid": 1}, {"started": 1}, {"run_id": "x"}), start=2):
        other = {**owner, "launcher": {**owner["launcher"], **change}}
        replace_file(tmp_path / name / "owner.json", json.dumps(other).encode())
        assert unnamed_run(tmp_path, "cifar", "fast") == f"{name}-{number}"
        replace_file(tmp_path / f"{name}-{number}" / "owner.json", b"{}")


def test_the_commands_of_a_batch_script_are_a_run_each_and_found_again_by_their_flags(
        no_launcher: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {**BATCH, "SLURM_STEP_ID": "0"}.items():
        no_launcher.setenv(name, value)
    commands = [{"seed": 0}, {"seed": 1}, {"seed": 1, "epochs": 20}, {"seed": 1, "data_dir": "b"}, {"seed": None}]
    flags = [{"seed": 0, "epochs": 10, "data_dir": "a", "evaluate": None, **changes} for changes in commands]
    names = [unnamed_run(tmp_path, "cifar", "fast", config) for config in flags]
    assert names == ["cifar-fast-17", *(f"cifar-fast-{number}-17" for number in (2, 3, 4, 5))]
    folder = RunFolder(tmp_path / names[1], is_main=True)
    folder.claim()
    folder.begin(flags[1], world={})
    folder.release()
    no_launcher.setenv("SLURM_RESTART_COUNT", "1")
    no_launcher.setenv("SLURM_STEP_ID", "3")
    for name, config in sorted(zip(names, flags, strict=True), reverse=True):
        assert unnamed_run(tmp_path, "cifar", "fast", {**config, "of_a_later_version": 1}) == name
    assert unnamed_run(tmp_path, "mnist", "fast", flags[0]) == "mnist-fast-17"
    assert {path.name for path in tmp_path.iterdir()} == {*names, "mnist-fast-17"}
    no_launcher.setenv("SLURM_JOB_ID", "18")
    assert unnamed_run(tmp_path, "cifar", "fast", flags[1]) == "cifar-fast-18"


def test_commands_that_a_batch_script_starts_at_once_get_a_folder_each(no_launcher: pytest.MonkeyPatch,
                                                                      tmp_path: Path) -> None:
    for name, value in BATCH.items():
        no_launcher.setenv(name, value)
    with ThreadPoolExecutor(max_workers=8) as threads:
        names = list(threads.map(lambda seed: unnamed_run(tmp_path / "runs", "cifar", "fast", {"seed": seed}),
                                 range(16)))
    assert len(set(names)) == 16
    for seed, name in enumerate(names):
        assert read_object(tmp_path / "runs" / name / "config.json") == {"seed": seed}


@pytest.mark.parametrize("name", ["a/b", "/tmp/x", "..", ".", "../up", "two\nlines", "bell\x07", "\x00", "x" * 300,
                                  "\u00e9" * 128])
def test_a_run_name_that_is_not_that_of_one_folder_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"--run-name .*must name one folder: .*; say with --output-dir") as caught:
        check_run_name(name)
    assert len(user_line(caught.value) or "") < 300


@pytest.mark.parametrize("name", ["r", "x" * 255, "\u00e9" * 127, "a b", "...", "-x", "x$(touch y);'\"&|*", "\udcff"])
def test_any_other_run_name_is_taken(tmp_path: Path, name: str) -> None:
    check_run_name(name)
    (tmp_path / name).mkdir()


def test_a_run_name_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    fault = Fault(name="name", flags=("--run-name", "../r"), codes=(2,), state=None,
                  error="ERROR usage: --run-name ../r: must name one folder")
    assert_ends_as_specified(fault, tmp_path)
    assert not list(tmp_path.rglob("r"))


def test_a_folder_with_an_owner_of_an_earlier_version_is_nobody_elses(no_launcher: pytest.MonkeyPatch,
                                                                     tmp_path: Path) -> None:
    no_launcher.setenv("TORCHELASTIC_RUN_ID", "none")
    no_launcher.setattr(ownership.time, "strftime", lambda form: "20261125-093314")
    name = unnamed_run(tmp_path, "cifar", "fast")
    owner = {"incarnation": 1, "host": "h", "pid": 7, "job": None, "restart": 0, "released": True}
    replace_file(tmp_path / name / "owner.json", json.dumps(owner).encode())
    assert unnamed_run(tmp_path, "cifar", "fast") == f"{name}-2"
    RunFolder(tmp_path / name, is_main=True).claim()
    assert (read_object(tmp_path / name / "owner.json") or {})["incarnation"] == 2


def test_without_proc_a_standalone_torchrun_still_names_its_restarts_alike(no_launcher: pytest.MonkeyPatch,
                                                                          tmp_path: Path) -> None:
    no_launcher.setattr(launcher, "stat_of", lambda pid: [])
    no_launcher.setenv("TORCHELASTIC_RUN_ID", STANDALONE["TORCHELASTIC_RUN_ID"])
    name = unnamed_run(tmp_path, "cifar", "fast")
    no_launcher.setattr(ownership.time, "strftime", lambda form: "20991231-235959")
    assert unnamed_run(tmp_path, "cifar", "fast") == name
    no_launcher.setenv("TORCHELASTIC_RUN_ID", STANDALONE["TORCHELASTIC_RUN_ID"].replace("3f", "4f"))
    assert unnamed_run(tmp_path, "cifar", "fast") == "cifar-fast-20991231-235959"


def test_an_output_folder_that_is_a_file_is_one_line(no_launcher: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(CheckpointError, match=r"--output-dir .*runs: cannot be written \(File exists: .*\); move"):
        unnamed_run(tmp_path / "runs", "cifar", "fast")


@pytest.mark.slow
def test_a_restart_by_torchrun_continues_the_unnamed_run(tmp_path: Path) -> None:
    hook = on_first_start(at(13, "data", kill, ranks=[1]))
    with start("cifar", *UNNAMED, "--output-dir", tmp_path / "runs", folder=tmp_path, ranks=2, launcher="torchrun",
               options=("--max-restarts=1",), hook=hook) as job:
        finished = job.wait(100)
    assert finished.code == 0, finished.err[-2000:]
    folders = list((tmp_path / "runs").iterdir())
    assert [bool(re.fullmatch(f"cifar-blitz-{TIME}", folder.name)) for folder in folders] == [True]
    assert "(from step-" in finished.out
    assert read_json(folders[0] / "status.json")["state"] == "DONE"
    assert read_json(folders[0] / "owner.json")["incarnation"] == 2


@pytest.mark.slow
def test_a_second_unnamed_run_by_python_is_another_run(tmp_path: Path) -> None:
    for count in (1, 2):
        finished = run("cifar", *TINY, "--max-steps", 2, "--output-dir", tmp_path)
        assert finished.code == 0, finished.err
        assert len(list(tmp_path.glob("cifar-blitz-*"))) == count
