"""What the CPU tests hold, on one GPU: two gloo ranks share it, NCCL alone, DataParallel, fp16, kill and resume.

They need a machine with a GPU, and say so where there is none. Trainers are started as new processes, since a fork
cannot use the GPU once its parent has.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch.process_group import World
from tests.helpers.hooks import at, kill
from tests.helpers.processes import TINY, Ended, metrics, read_json
from tests.helpers.server import NORMED, run
from trainers.engine.config import TrainConfig
from trainers.engine.optimizer import build_optimizer
from trainers.engine.precision import Precision
from trainers.engine.step import StepOptions, TrainStep
from trainers.engine.task import classification_task

pytestmark = [pytest.mark.timeout(240), pytest.mark.cuda,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

EXACT = ("--device", "cuda", "--deterministic", "--run-name", "r")


def train(folder: Path, *flags: Any, ranks: int | None = None, **how: Any) -> Ended:
    """A trainer in processes of its own that see one GPU."""
    return run("cifar", *flags, "--output-dir", folder, ranks=ranks, launcher="python" if ranks is None else "torchrun",
               timeout=200, CUDA_VISIBLE_DEVICES="0", **how)


def result(folder: Path) -> dict[str, Any]:
    return read_json(folder / "r" / "result.json")


def losses(folder: Path) -> list[float]:
    return [loss for split, loss in metrics(folder / "r", "split", "loss") if split == "train"]


def test_two_gloo_ranks_on_one_gpu_train_as_one_process_does(tmp_path: Path) -> None:
    assert train(tmp_path / "one", *TINY, *EXACT).code == 0
    ended = train(tmp_path / "two", *TINY, *EXACT, "--backend", "gloo", ranks=2)
    assert ended.code == 0, ended.err
    assert (result(tmp_path / "two")["world_size"], result(tmp_path / "two")["device"]) == (2, "cuda:0")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_nccl_with_one_rank_trains_as_one_process_does(tmp_path: Path) -> None:
    assert train(tmp_path / "plain", *TINY, *EXACT).code == 0
    ended = train(tmp_path / "nccl", *TINY, *EXACT, ranks=1)
    assert ended.code == 0, ended.err
    assert read_json(tmp_path / "nccl" / "r" / "environment.json")["backend"] == "nccl"
    assert result(tmp_path / "nccl")["parallel"] == "ddp"
    assert losses(tmp_path / "nccl") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_two_nccl_ranks_on_one_gpu_are_told_what_to_do(tmp_path: Path) -> None:
    ended = train(tmp_path, *TINY, *EXACT, ranks=2)
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert "start one rank per GPU, or use --backend gloo" in ended.errors[0]


def test_dataparallel_on_one_gpu_has_nothing_to_split_and_trains(tmp_path: Path) -> None:
    ended = train(tmp_path, *TINY, *EXACT, "--parallel", "dp")
    assert ended.code == 0, ended.err
    assert "DataParallel has nothing to split on one GPU" in ended.out
    assert result(tmp_path)["parallel"] == "none"


def test_a_run_killed_on_a_gpu_resumes_to_the_bits_of_one_never_stopped(tmp_path: Path) -> None:
    flags = (*NORMED, "--device", "cuda", "--deterministic")
    assert train(tmp_path / "whole", *flags).code == 0
    assert train(tmp_path / "parts", *flags, hook=at(13, "data", kill)).codes == [-signal.SIGKILL]
    ended = train(tmp_path / "parts", *flags)
    assert ended.code == 0, ended.err
    assert "(from step-" in ended.out
    assert result(tmp_path / "parts")["weights_sha256"] == result(tmp_path / "whole")["weights_sha256"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_step_that_overflows_in_fp16_is_skipped_counted_and_the_scale_lowered(optimizer: str) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).to(device)
    step = TrainStep(model, build_optimizer(model, TrainConfig(optimizer=optimizer, learning_rate=0.01)),
                     classification_task(tuple("0123456789"), device), World(device=device),
                     precision=Precision("fp16", device), schedule=lambda number: 1.0, options=StepOptions(seed=0))
    step.precision.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)  # beyond fp16's 65504
    before = [parameter.clone() for parameter in model.parameters()]
    batch = (torch.rand(8, 3, 2, 2), torch.arange(8))
    step(iter([batch]), step=0, before_update=lambda: None)
    assert all(map(torch.equal, model.parameters(), before))
    assert (step.precision.num_skipped_steps, step.precision.state_dict()["scale"]) == (1, 2.0**29)
    for number in range(1, 20):
        step(iter([batch]), step=number, before_update=lambda: None)
    skipped = step.precision.num_skipped_steps
    assert 1 <= skipped < 19
    assert not any(map(torch.equal, model.parameters(), before))
    again = Precision("fp16", device)
    again.load_state_dict(step.precision.state_dict())
    assert (again.num_skipped_steps, again.state_dict()["scale"]) == (skipped, step.precision.state_dict()["scale"])


def test_a_profile_shows_the_gpus_kernels_and_what_its_memory_held(tmp_path: Path) -> None:
    ended = train(tmp_path, *TINY, *EXACT, "--profile", "3:2")
    assert ended.code == 0, ended.err
    events = json.loads((tmp_path / "r" / "profile" / "rank-0.pt.trace.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert (tmp_path / "r" / "profile" / "rank-0.memory.pickle").stat().st_size > 0


def test_speedrun_trains_compiled_and_its_warm_up_is_no_part_of_the_training_time(tmp_path: Path) -> None:
    ended = train(tmp_path, "--recipe", "speedrun", "--dataset", "synthetic", "--max-steps", "5", "--device", "cuda",
                  "--no-pictures", "--run-name", "r")
    assert ended.code == 0, ended.err
    found = result(tmp_path)
    assert found["warm_up_seconds"] > found["train_seconds"] > 0
    environment = read_json(tmp_path / "r" / "environment.json")
    assert (environment["float32_matmul"], environment["cudnn_benchmark"]) == ("high", True)
