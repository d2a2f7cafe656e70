"""The network is tried before training, and neither that nor its batches leave a trace in what is trained."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.errors import UsageError
from launch.process_group import World
from tests.helpers.hooks import Normed
from trainers.engine.precision import Precision
from trainers.engine.step import tried_first


def step_of(network: nn.Module) -> Any:
    """As much of a TrainStep as is needed."""
    return SimpleNamespace(network=network, train_mode=network.train, precision=Precision("fp32", torch.device("cpu")),
                           world=World())


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 3, 32, 32), torch.zeros(size, dtype=torch.int64)) for size in sizes]


def test_buffers_generators_and_batches_are_left_as_they_were() -> None:
    network, given = Normed(10), batches(5, 5)
    torch.manual_seed(3)
    before, random = {name: tensor.clone() for name, tensor in network.state_dict().items()}, torch.get_rng_state()
    taken = list(tried_first(step_of(network), iter(given), {}))
    assert all(one is other for one, other in zip(itertools.chain(*taken), itertools.chain(*given), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_no_more_than_two_samples_are_tried() -> None:
    seen: list[tuple[int, bool]] = []
    network = Normed(10)
    network.register_forward_pre_hook(lambda module, inputs: seen.append((len(inputs[0]), module.training)))
    network.forward = lambda images: nn.Module.__call__(network.features, images)  # pyright: ignore
    network.features.register_forward_pre_hook(
        lambda module, inputs: seen.append((len(inputs[0]), module.training)))
    list(tried_first(step_of(network), iter(batches(64)), {}))
    assert seen == [(2, False), (2, True)]


class OnlyInTraining(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return self.missing(images) if self.training else images  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(("network", "size", "message"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), 4, "--model m: cannot take inputs of 3 x 32 x 32 .*choose a model"),
    (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072)), 1, "--batch-size 1: leaves one sample per rank .*raise it"),
    (OnlyInTraining(), 4, "--model m: fails in training on inputs of 3 x 32 x 32"),
], ids=["of another size", "one value per channel", "in training only"])
def test_a_network_that_fails_is_told_in_one_line(network: nn.Module, size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        next(tried_first(step_of(network), iter(batches(size)), {"model": "m", "batch_size": size}))
    assert "\n" not in str(refused.value)


def test_a_network_that_is_only_evaluated_is_not_tried_in_training() -> None:
    step = step_of(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072)))
    assert len(list(tried_first(step, iter(batches(1)), {"evaluate": "best.pt"}))) == 1
    step = step_of(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)))
    with pytest.raises(UsageError, match=r"--evaluate best\.pt: its network cannot take inputs of 3 x 32 x 32"):
        next(tried_first(step, iter(batches(4)), {"evaluate": "best.pt", "model": "m"}))


def test_memory_used_up_is_no_mistake_in_the_flags() -> None:
    network = nn.Sequential()
    network.forward = lambda images: (_ for _ in ()).throw(torch.OutOfMemoryError("used up"))  # pyright: ignore
    with pytest.raises(torch.OutOfMemoryError):
        next(tried_first(step_of(network), iter(batches(2)), {}))


def test_an_epoch_without_a_batch_is_let_through() -> None:
    assert list(tried_first(step_of(nn.Sequential()), iter([]), {})) == []
