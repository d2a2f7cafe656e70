"""trainers/engine/optimizer.py: every rule trains, is torch's own, and resumes from its saved state."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from trainers.engine.config import TrainConfig
from trainers.engine.optimizer import MuonWithAdamW, build_optimizer, parameter_groups

RATES = {"sgd": 0.05, "adam": 0.01, "adamw": 0.01, "rmsprop": 0.005, "muon": 0.02}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost these tiny networks more than they give, ten times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network() -> nn.Module:
    """A small network with matrices, a convolution and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * 36, 16), nn.ReLU(), nn.Linear(16, 3))


def config(name: str, **changes: object) -> TrainConfig:
    """The flags of one rule."""
    return TrainConfig(optimizer=name, learning_rate=RATES[name], **changes)  # pyright: ignore[reportArgumentType]


def batch() -> tuple[Tensor, Tensor]:
    """Images whose class is where they are bright."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(48) % 3
    images = torch.randn(48, 1, 8, 8, generator=generator)
    for label in range(3):
        images[labels == label, :, label * 2 : label * 2 + 2] += 1.0
    return images, labels


def train(model: nn.Module, optimizer: object, steps: int) -> list[float]:
    """Losses of so many steps on the one batch."""
    images, labels = batch()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.zero_grad()  # pyright: ignore[reportAttributeAccessIssue]
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", RATES)
def test_each_optimizer_brings_the_loss_to_a_fifth(name: str) -> None:
    model = network()
    losses = train(model, build_optimizer(model, config(name)), 60)
    assert losses[-1] < losses[0] / 5


TORCHS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.005, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("name", TORCHS)
def test_flags_mean_what_they_mean_in_torch(name: str) -> None:
    ours, theirs = network(), network()
    train(ours, build_optimizer(ours, config(name, weight_decay=0.01)), 5)
    train(theirs, TORCHS[name](theirs.parameters()), 5)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_nesterov_is_torchs() -> None:
    ours, theirs = network(), network()
    train(ours, build_optimizer(ours, config("sgd", nesterov=True)), 5)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, nesterov=True), 5)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_muon_updates_the_matrices_and_adamw_the_rest() -> None:
    model = network()
    optimizer = build_optimizer(model, config("muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    shapes = [[parameter.ndim for group in part.param_groups for parameter in group["params"]]
              for part in optimizer.parts]
    assert shapes == [[2, 2], [4, 1, 1, 1, 1]]
    assert [type(part) for part in optimizer.parts] == [torch.optim.Muon, torch.optim.AdamW]


@pytest.mark.parametrize("name", RATES)
def test_training_goes_on_from_a_saved_state_as_if_never_stopped(name: str) -> None:
    model = network()
    optimizer = build_optimizer(model, config(name))
    train(model, optimizer, 5)
    other = copy.deepcopy(model)
    resumed = build_optimizer(other, config(name))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 5) == train(other, resumed, 5)


@pytest.mark.parametrize("name", RATES)
def test_every_group_knows_the_peak_rate_that_the_schedule_scales(name: str) -> None:
    optimizer = build_optimizer(network(), config(name))
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx(
        [RATES[name]] * len(optimizer.param_groups))


def test_biases_of_norms_get_their_own_rate_and_the_same_pull_towards_zero() -> None:
    model = network()
    rest, biases = parameter_groups(model, config("sgd", norm_bias_lr_scale=64.0, weight_decay=0.64))
    norm = model[1]  # pyright: ignore[reportIndexIssue]
    assert [id(bias) for bias in biases["params"]] == [id(norm.bias)]
    assert biases["lr"] * biases["weight_decay"] == pytest.approx(0.05 * 0.64)
    assert biases["lr"] == pytest.approx(0.05 * 64)
    assert len(rest["params"]) + 1 == len(list(model.parameters()))


def test_frozen_parameters_are_left_alone() -> None:
    model = network()
    first = model[0].weight  # pyright: ignore[reportIndexIssue]
    first.requires_grad_(False)
    before = first.clone()
    train(model, build_optimizer(model, config("adamw", weight_decay=0.1)), 3)
    assert torch.equal(first, before)
