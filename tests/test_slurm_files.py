"""What can be said of slurm/ and of launch/'s view of Slurm without a cluster."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.errors import UsageError
from launch.launcher import host_names, read_launch
from launch.network import address_among, connect_problem, interface_of
from tests.helpers.processes import ROOT, environment

SLURM = ROOT / "slurm"
FILES = sorted(SLURM.glob("*.sbatch"))
STEP = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1734567", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
        "SLURM_STEP_NODELIST": "gpu[08-10]"}


def directives(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if re.match(r"\s*#\s*SBATCH", line)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_directive_is_one_that_slurm_reads(path: Path):
    lines = path.read_text().splitlines()
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert directives(path)
    for line in directives(path):
        assert re.match(r"#SBATCH --[a-z-]+(=\S+)?$", line), f"Slurm would take {line!r} for a comment"
        assert lines.index(line) < first_command, f"Slurm stops reading before {line!r}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_count_of_nodes_tasks_or_gpus_is_typed_twice(path: Path):
    code = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert not re.findall(r"--(?:nodes|ntasks|ntasks-per-node|nproc-per-node|gpus[a-z-]*|cpus[a-z-]*)=\"?\d", code)
    names = [line.split("=")[0] for line in directives(path)]
    assert len(names) == len(set(names))


def test_the_shell_files_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-x", *FILES, SLURM / "common.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_file_is_in_the_readme_and_every_file_the_readme_names_is_there():
    text = (SLURM / "README.md").read_text()
    assert {path.name for path in SLURM.iterdir() if path.name != "README.md"} == set(
        re.findall(r"\b(\w+\.(?:sbatch|sh))\b", text))


def ask_common(script: str, *args: str, **variables: str) -> str:
    """What a line of shell prints after common.sh was sourced."""
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "17", **variables}
    done = subprocess.run(["bash", "-c", f"source slurm/common.sh; {script}", "bash", *args], cwd=ROOT, text=True,
                          capture_output=True, env=environment(**job), timeout=30)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


@pytest.mark.parametrize(("variables", "ranks"), [
    ({}, "1"),
    ({"SLURM_GPUS_ON_NODE": "8"}, "8"),
    ({"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "4"}, "4"),
    ({"SLURM_TASKS_PER_NODE": "64(x2)"}, "1"),  # --exclusive: as many tasks as cores, which nobody asked for
])
def test_ranks_are_the_tasks_asked_for_or_else_the_gpus_or_else_one(variables: dict[str, str], ranks: str):
    assert ask_common('echo "$RANKS_PER_NODE"', **variables) == ranks


def test_nodes_with_different_numbers_of_tasks_are_refused():
    said = ask_common("echo reached", SLURM_NTASKS="3", SLURM_TASKS_PER_NODE="2,1")
    assert said.startswith("ERROR usage: --ntasks 3: the nodes got 2,1 tasks")


@pytest.mark.parametrize(("flags", "file"), [
    (["--run-name", "my run"], "runs/my run/status.json"),
    (["--run_name=a=b", "--output_dir", "out put"], "out put/a=b/status.json"),
    (["--run-name", "first", "--run-name=last"], "runs/last/status.json"),
    (["--run-name", "$(touch executed)"], "runs/$(touch executed)/status.json"),
])
def test_the_status_is_looked_for_where_the_flags_say(flags: list[str], file: str):
    assert ask_common('status_file "$@"', "trainers/cifar.py", "--epochs", "2", *flags) == file


def test_the_status_of_a_run_without_a_name_is_found_by_its_job(tmp_path: Path):
    for name in ("cifar-fast-16_0", "cifar-fast-16_1", "mnist-fast-16_1"):
        (tmp_path / name).mkdir()
    found = ask_common('status_file "$@"', "trainers/cifar.py", "--output-dir", str(tmp_path), SLURM_ARRAY_JOB_ID="16",
                       SLURM_ARRAY_TASK_ID="1")
    assert found == f"{tmp_path}/cifar-fast-16_1/status.json"


@pytest.mark.parametrize(("before", "code"), [("the stamp of an earlier file", "0"), ("$(stamp_of \"$file\")", "1")])
def test_a_run_that_is_done_is_not_failed_by_a_late_signal_but_by_a_start_that_did_nothing(
        tmp_path: Path, before: str, code: str):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "status.json").write_text('{"state": "DONE", "reason": ""}')
    script = (f'file=$(status_file "$@"); STEP_CODE=1; code=0; '
              f'(conclude_or_requeue "{before}" "$@") >/dev/null 2>&1 || code=$?; echo $code')
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert ask_common(script, "trainers/cifar.py", "--output-dir", str(tmp_path), "--run-name", "r", PATH=path) == code


def test_ranks_come_from_srun_and_torchruns_variables_win():
    launch = read_launch(STEP)
    assert (launch.launcher, launch.rank, launch.local_rank, launch.world_size) == ("slurm", 5, 1, 6)
    assert (launch.local_world_size, launch.address, launch.port, launch.peer) == (2, "gpu08", 24567, "gpu08")
    assert read_launch({**STEP, "SLURM_NODEID": "0"}).peer == "gpu10"
    both = read_launch({**STEP, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    assert (both.launcher, both.rank, both.world_size) == ("torchrun", 0, 2)
    assert read_launch({name: STEP[name] for name in STEP if name != "SLURM_STEP_ID"}).launcher == "none"
    with pytest.raises(UsageError, match="is no host name of a Slurm node list"):
        read_launch({**STEP, "SLURM_STEP_NODELIST": "$(touch executed)"})


@given(st.lists(st.integers(0, 120), min_size=1, max_size=8), st.sampled_from([1, 3]))
def test_a_node_list_names_every_host_in_order(numbers: list[int], width: int):
    listed = ",".join(f"{number:0{width}d}" for number in numbers)
    assert host_names(f"login,gpu[{listed}]x,b-1.site") == [
        "login", *(f"gpu{number:0{width}d}x" for number in numbers), "b-1.site"]
    low, high = min(numbers), max(numbers)
    assert host_names(f"n[{low:03d}-{high:03d}]") == [f"n{number:03d}" for number in range(low, high + 1)]


def test_the_interface_is_that_of_the_way_to_the_other_host():
    assert interface_of(address_among(["localhost"])) == "lo"
    assert address_among(["no-such-host.invalid", "127.0.0.1"]) == "127.0.0.1"
    assert "refused" in connect_problem("127.0.0.1", 1)


STUB = """
refuse() { echo "ERROR usage: $*"; exit 2; }
flag_value() { :; }
enter_environment() { :; }
say() { :; }
status_file() { :; }
stamp_of() { :; }
train_on_all_nodes() { printf '%s ' "$@"; }
conclude_or_requeue() { :; }
"""


def sweep(folder: Path, task: int, *args: str) -> str:
    """What a task of the sweep would run, or why not."""
    (folder / "slurm").mkdir(exist_ok=True)
    (folder / "slurm" / "common.sh").write_text(STUB)
    variables = {"TRAINERS_ROOT": str(folder), "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "7"}
    done = subprocess.run(["bash", "-eu", SLURM / "sweep.sbatch", *args], capture_output=True, text=True, timeout=20,
                          env={**os.environ, **variables})
    return done.stdout.strip() + done.stderr


def test_a_sweep_runs_seeds_or_every_combination_of_the_values_of_flags(tmp_path: Path):
    assert sweep(tmp_path, 4, "trainers/cifar.py", "--epochs", "1") == "trainers/cifar.py --epochs 1 --seed 4"
    grid = ("--lr", "0.1,0.3,1.0", "--seed", "5,6", "trainers/cifar.py")
    assert [sweep(tmp_path, task, *grid).removeprefix("trainers/cifar.py ") for task in range(6)] == [
        f"--lr {rate} --seed {seed}" for rate in ("0.1", "0.3", "1.0") for seed in (5, 6)]
    assert sweep(tmp_path, 6, *grid).endswith("task 6 has no value in --lr --seed 0.1,0.3,1.0 5,6; use --array=0-5")
    assert sweep(tmp_path, 2, "--lr", "0.1,0.3", "x.py").endswith("use --array=0-1")
    for args in (("--lr",), ("--lr", ""), ("--lr", "--seed", "1")):
        assert "ERROR usage: --lr: has no values" in sweep(tmp_path, 0, *args)
