"""What is set for GPUs, as far as a machine without one can show: numbers, NCCL's flight recorder, NCCL's errors."""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch import process_group
from launch.errors import DeviceError, DistributedError
from launch.failure import translated
from launch.launcher import Launch
from launch.machine import environment_record
from launch.process_group import World, join, prepare
from launch.watchdog import DUMP_PREFIXES, Watchdog, dump_collectives
from tests.helpers.processes import read_json
from tests.helpers.server import NORMED, run

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def numbers() -> Iterator[None]:
    """torch's settings, as they were, afterwards."""
    matmul, cudnn, deterministic = (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
                                    torch.are_deterministic_algorithms_enabled())
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = cudnn, True
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*DUMP_PREFIXES, "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT",
                 "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return monkeypatch


def join_in_vain(monkeypatch: pytest.MonkeyPatch, said: str = "no GPU") -> None:
    """Join a group of NCCL's, which cannot be made."""
    def fail(*_: object, **__: object) -> None:
        raise dist.DistBackendError(f"NCCL error in: NCCLUtils.cpp:94, invalid usage, NCCL version 2.28\nncclInvalid"
                                    f"Usage: This usually reflects invalid usage.\nLast error:\n{said}")

    monkeypatch.setattr(dist, "init_process_group", fail)
    monkeypatch.setattr(process_group, "check_paths", lambda store, world: None)
    join(World(world_size=2, device=torch.device("cuda", 0), backend="nccl"), dist.HashStore())


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_computes_by_tf32_and_tunes_cudnn_unless_deterministic(
        variables: pytest.MonkeyPatch, deterministic: bool) -> None:
    variables.setattr(torch.cuda, "is_available", lambda: True)
    variables.setattr(torch.cuda, "device_count", lambda: 1)
    variables.setattr(torch.cuda, "set_device", lambda device: None)
    prepare(Launch(), Watchdog(), "auto", device="cuda", threads=torch.get_num_threads(), deterministic=deterministic)
    variables.undo()
    record = environment_record()
    assert record["float32_matmul"] == ("highest" if deterministic else "high")
    assert record["cudnn_benchmark"] is record["cudnn_tf32"] is not deterministic
    assert record["deterministic"] is deterministic


def test_a_run_records_how_it_computes(tmp_path: Path) -> None:
    ended = run("cifar", *NORMED, "--max-steps", "1", "--output-dir", tmp_path)
    assert ended.code == 0, ended.err
    record = read_json(tmp_path / "r" / "environment.json")
    assert (record["float32_matmul"], record["deterministic"]) == ("highest", False)


@pytest.mark.usefixtures("variables")
def test_the_flight_recorder_is_on_unless_the_user_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DistributedError):
        join_in_vain(monkeypatch)
    assert int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "0")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    with pytest.raises(DistributedError):
        join_in_vain(monkeypatch)
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"


class Run:
    def beat(self) -> None: ...

    def failed(self, cause: Exception | str, *, step: int) -> None: ...

    def preempted(self, reason: str) -> None: ...


def test_a_hang_leaves_nccls_last_collectives_in_the_run_folder(
        variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The recorder itself is torch's, and empty here."""
    watchdog = Watchdog()
    watchdog.attend(Run(), traces=tmp_path)
    watchdog.stop()
    assert dump_collectives(3) == ""  # no group
    variables.setattr(dist, "is_initialized", lambda: True)
    variables.setattr(dist, "get_backend_config", lambda: "cpu:gloo")
    assert dump_collectives(3) == ""
    variables.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert dump_collectives(3) == (f"; NCCL's last collectives are in {tmp_path}/nccl-trace-rank-*, for torchfrtrace "
                                   f"to compare")
    assert "entries" in pickle.loads((tmp_path / "nccl-trace-rank-3").read_bytes())


def test_the_users_own_place_for_traces_is_left_alone(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(tmp_path / "mine-"))
    watchdog = Watchdog()
    watchdog.attend(Run(), traces=tmp_path / "run")
    watchdog.stop()
    assert "TORCH_FR_DUMP_TEMP_FILE" not in os.environ
    variables.setattr(dist, "is_initialized", lambda: True)
    variables.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert str(tmp_path / "mine-*") in dump_collectives(0)
    assert (tmp_path / "mine-0").exists()


@pytest.mark.parametrize(("said", "remedy"), [
    ("Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000", "start one rank per GPU, or use --backend"),
    ("Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)", "enlarge /dev/shm .*--shm-size"),
    ("socketStartConnect: Connect to 10.0.0.1<40000> failed : No route to host", "NCCL_SOCKET_IFNAME")])
@pytest.mark.usefixtures("variables")
def test_what_nccl_says_when_ranks_cannot_connect_has_a_remedy(
        monkeypatch: pytest.MonkeyPatch, said: str, remedy: str) -> None:
    with pytest.raises(DistributedError, match=f"{said.split()[0]}.*{remedy}"):
        join_in_vain(monkeypatch, said)


def test_an_error_of_the_gpu_is_a_device_error() -> None:
    known = translated(torch.AcceleratorError("CUDA error: device-side assert triggered\nSearch for cudaErrorAssert"))
    assert isinstance(known, DeviceError)
    assert str(known).startswith("GPU: CUDA error: device-side assert triggered; look at nvidia-smi")


def test_an_error_line_is_left_where_torchrun_looks_for_it(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    ended = run("cifar", "--dataset", "synthetic", "--batch-size", "0", TORCHELASTIC_ERROR_FILE=str(file))
    assert json.loads(file.read_text())["message"]["message"] == ended.errors[0]
