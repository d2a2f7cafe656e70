"""fp16's skipped steps, with the gradient scaler that torch has for the CPU; autocast is tested by training."""

import pytest
import torch
from torch import nn

from launch.errors import UsageError
from trainers.engine.precision import Precision

CPU = torch.device("cpu")


def with_scaler() -> Precision:
    precision = Precision("fp32", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return precision


def step(precision: Precision, model: nn.Linear, factor: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision.backward((model(torch.ones(1, 2)) * factor).sum())
    precision.scaler.unscale_(optimizer)
    precision.step(optimizer)
    optimizer.zero_grad()


def test_a_step_whose_gradients_overflow_is_skipped_counted_and_remembered_by_a_checkpoint() -> None:
    precision, model = with_scaler(), nn.Linear(2, 1)
    before = model.weight.clone()
    step(precision, model, 1e38)  # times the scale it is beyond fp32
    assert torch.equal(model.weight, before)
    assert precision.num_skipped_steps == 1
    state = precision.state_dict()
    assert state["scale"] == 2.0**9
    step(precision, model, 1.0)
    assert not torch.equal(model.weight, before)
    assert precision.num_skipped_steps == 1
    resumed = with_scaler()
    resumed.load_state_dict(state)
    assert resumed.num_skipped_steps == 1
    step(resumed, nn.Linear(2, 1), 1e38)
    assert resumed.num_skipped_steps == 2


def test_without_a_scaler_nothing_is_skipped_or_saved() -> None:
    precision = Precision("bf16", CPU)
    assert precision.state_dict() == {}
    assert precision.num_skipped_steps == 0


def test_half_precision_on_a_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="use bf16"):
        Precision("fp16", CPU)


def test_sgds_momentum_begins_at_zero_where_the_first_step_overflows() -> None:
    """torch's fused kernel allocates it then and does not write it."""
    torch.use_deterministic_algorithms(True)  # what is allocated is NaN and not, by chance, zero
    try:
        models = [nn.Linear(2, 1) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        fused = torch.optim.SGD(models[0].parameters(), lr=0.1, momentum=0.9, fused=True)
        reference = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, foreach=True)
        for model, optimizer in zip(models, (fused, reference), strict=True):
            precision = with_scaler()
            for factor in (1e38, 1.0, 2.0):
                precision.backward((model(torch.ones(1, 2)) * factor).sum())
                precision.step(optimizer)
                optimizer.zero_grad()
            assert precision.num_skipped_steps == 1
        assert torch.equal(models[0].weight, models[1].weight)
    finally:
        torch.use_deterministic_algorithms(False)
