"""`--parallel dp`: as far as a machine without GPUs can show it, and whole where there are two."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from launch.errors import UsageError
from launch.process_group import World
from tests.helpers.processes import TINY, read_json
from tests.helpers.server import run
from trainers.engine.config import TrainConfig
from trainers.engine.dropout import default_generators
from trainers.engine.parallel import choose_parallel, gradient_sync, parallelize, unwrap

GPU = World(device=torch.device("cuda", 0))


def test_dataparallel_is_chosen_only_where_there_are_gpus_to_split_over():
    assert choose_parallel("dp", GPU, num_gpus=2) == ("dp", "")
    for world, num_gpus, found in ((GPU, 1, "one GPU"), (World(), 0, "no GPU"), (World(), 8, "no GPU")):
        parallel, remark = choose_parallel("dp", world, num_gpus=num_gpus)
        assert parallel == "none"
        assert "DataParallel has nothing to split" in remark
        assert found in remark
    with pytest.raises(UsageError, match="2 ranks would train apart"):
        choose_parallel("dp", World(world_size=2, backend="gloo"), num_gpus=2)


def test_a_wrapped_network_is_unwrapped_to_names_without_a_prefix():
    """DataParallel without GPUs calls its module, so the wrapper itself stands in for one with several."""
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    wrapped = parallelize(network, "dp", World())
    assert isinstance(wrapped, DataParallel)
    assert all(name.startswith("module.") for name in wrapped.state_dict())
    assert unwrap(wrapped) is network
    with gradient_sync(wrapped, last=False):  # nothing to defer: gradients are added on one device
        wrapped(torch.ones(4, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_compile_inside_dataparallel_is_refused():
    with pytest.raises(UsageError, match="--compile with --parallel dp"):
        TrainConfig(compile=True, parallel="dp").check()
    TrainConfig(compile=True, parallel="ddp").check()


def test_on_the_cpu_dropout_has_one_generator_even_when_wrapped():
    network = nn.Linear(2, 2)
    assert default_generators(DataParallel(network), torch.device("cpu")) == [torch.default_generator]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_without_gpus_dp_says_so_and_trains_as_none(tmp_path: Path):
    results = {}
    for parallel in ("none", "dp"):
        done = run("cifar", *TINY, "--device", "cpu", "--parallel", parallel, "--output-dir", tmp_path, "--run-name",
                     parallel, "--no-pictures")
        assert done.code == 0, done.err
        assert ("DataParallel has nothing to split" in done.out) == (parallel == "dp")
        results[parallel] = read_json(tmp_path / parallel / "result.json")
    assert results["dp"]["parallel"] == "none"
    assert results["dp"]["weights_sha256"] == results["none"]["weights_sha256"]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.timeout(240)
def test_on_two_gpus_dp_trains_like_one_and_its_checkpoint_loads_anywhere(tmp_path: Path):
    for parallel in ("none", "dp"):
        done = run("cifar", *TINY, "--parallel", parallel, "--output-dir", tmp_path, "--run-name", parallel,
                   launcher="python", CUDA_VISIBLE_DEVICES="0,1")
        assert done.code == 0, done.err
    one, split = (read_json(tmp_path / name / "result.json") for name in ("none", "dp"))
    assert split["parallel"] == "dp"
    assert split["loss"] == pytest.approx(one["loss"], rel=1e-3)
    checkpoint = next((tmp_path / "dp" / "checkpoints").glob("step-*.pt"))
    done = run("cifar", *TINY, "--device", "cpu", "--evaluate", checkpoint, "--output-dir", tmp_path, "--run-name",
                 "again")
    assert done.code == 0, done.err
    assert read_json(tmp_path / "again" / "result.json")["accuracy"] == pytest.approx(split["accuracy"], abs=0.01)
