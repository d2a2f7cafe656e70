"""Launcher variables that contradict each other, or that no launcher would set: one line, and by whom."""

from pathlib import Path

import pytest

from launch.errors import UsageError
from launch.launcher import read_launch
from tests.helpers.comparing import run_in
from tests.helpers.faults import Fault, check

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0"}
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NODEID": "0",
         "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(("changed", "text", "speaks"), [
    ({"WORLD_SIZE": "0"}, "world size 0", None),
    ({"WORLD_SIZE": "-1"}, "world size -1", None),
    ({"RANK": "4"}, "rank 4 is not from 0 to 3", True),
    ({"RANK": "-1"}, "rank -1", True),
    ({"LOCAL_RANK": "2"}, "local rank 2 is not from 0 to 1", True),
    ({"LOCAL_WORLD_SIZE": "8"}, "ranks on this node 8", None),
    ({"LOCAL_WORLD_SIZE": "0"}, "ranks on this node 0", None),
    ({"MASTER_PORT": "99999"}, "port 99999 is not from 1 to 65535", None),
    ({"MASTER_PORT": "0"}, "port 0", None),
    ({"MASTER_PORT": "http"}, "'http'", None),
    ({"TORCHELASTIC_RESTART_COUNT": "x"}, "'x'", None),
    ({"TORCHELASTIC_RESTART_COUNT": "-1"}, "TORCHELASTIC_RESTART_COUNT=-1", None),
])
def test_torchruns_variables_must_fit_each_other(changed: dict[str, str], text: str, speaks: bool | None) -> None:
    with pytest.raises(UsageError, match=rf"launcher variables: .*{text}.*; start with torchrun, srun") as found:
        read_launch({**TORCHRUN, **changed})
    assert found.value.speaks is speaks


@pytest.mark.parametrize(("changed", "text"), [
    ({"SLURM_PROCID": "4"}, "rank 4 is not from 0 to 3"),
    ({"SLURM_LOCALID": "2"}, "local rank 2"),
    ({"SLURM_NODEID": "2"}, "node 2, tasks on 2 nodes"),
    ({"SLURM_NODEID": "-1"}, "node -1"),
    ({"SLURM_STEP_NODELIST": "n1"}, "tasks on 2 nodes and a list of 1"),
    ({"SLURM_STEP_NODELIST": "n[2-1]"}, "no range of a Slurm node list"),
    ({"SLURM_STEP_NODELIST": "n[1-99999999999]"}, "no range of a Slurm node list"),
    ({"SLURM_STEP_NODELIST": "n[1-"}, "no host name"),
    ({"SLURM_STEP_NODELIST": ""}, "no host name"),
    ({"SLURM_STEP_TASKS_PER_NODE": "two"}, "no list of tasks per node"),
    ({"SLURM_STEP_TASKS_PER_NODE": "3,3"}, "6 tasks on the nodes of a step of 4"),
    ({"SLURM_NTASKS": "0", "SLURM_STEP_TASKS_PER_NODE": "0", "SLURM_STEP_NODELIST": "n1"}, "world size 0"),
    ({"SLURM_RESTART_COUNT": "x"}, "'x'"),
    ({"SLURM_JOB_ID": "x"}, "'x'"),
])
def test_slurms_variables_must_fit_each_other(changed: dict[str, str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        read_launch({**SLURM, **changed})


def test_half_of_torchruns_variables_is_no_single_process() -> None:
    for half in ({"WORLD_SIZE": "2"}, {"RANK": "1"}):
        with pytest.raises(UsageError, match=r"launcher variables: .*=. is set without .*; start with torchrun"):
            read_launch(half)
    assert read_launch({"WORLD_SIZE": "1"}).world_size == read_launch({"RANK": "0"}).world_size == 1
    assert read_launch({"WORLD_SIZE": "2", **SLURM}).world_size == 4


def test_variables_that_fit_are_read() -> None:
    assert read_launch(TORCHRUN).rank == read_launch(SLURM).rank == 1
    without_local = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL")}
    assert read_launch(without_local).local_rank == 1


@pytest.mark.parametrize("variables", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}])
def test_a_process_with_contradictory_variables_says_so_in_one_line(tmp_path: Path, variables: dict[str, str]) -> None:
    ended = run_in(tmp_path, timeout=20, **variables)
    check(ended, Fault(name="variables", codes=(2,), error="ERROR usage: launcher variables: "))
