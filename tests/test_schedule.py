"""trainers/engine/schedule.py against torch's own schedulers and the formulas it names."""

import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR

from launch.errors import UsageError
from tests.helpers.comparing import run_in
from tests.helpers.processes import metrics
from trainers.engine.config import TrainConfig
from trainers.engine.schedule import ScheduleName, schedule

STEPS = 200


def rates(make: type[LRScheduler], **arguments: object) -> list[float]:
    """The multipliers of one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = make(optimizer, **arguments), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(name: str, **arguments: Any) -> list[float]:
    """The multipliers of one of our curves."""
    multiplier = schedule(name, total_steps=STEPS, **arguments)  # pyright: ignore[reportArgumentType]
    return [multiplier(step) for step in range(STEPS)]


def test_cosine_is_torchs_cosine_annealing() -> None:
    assert ours("cosine") == pytest.approx(rates(CosineAnnealingLR, T_max=STEPS), abs=1e-9)


def test_step_falls_tenfold_at_a_half_and_at_three_quarters() -> None:
    assert ours("step") == pytest.approx(rates(MultiStepLR, milestones=[100, 150], gamma=0.1))


def test_a_floor_is_where_the_curves_of_torch_end_too() -> None:
    assert ours("cosine", floor=0.1) == pytest.approx(rates(CosineAnnealingLR, T_max=STEPS, eta_min=0.1), abs=1e-9)
    linear = rates(LinearLR, start_factor=1.0, end_factor=0.25, total_iters=STEPS)
    assert ours("linear", floor=0.25) == pytest.approx(linear)
    assert ours("linear")[STEPS // 2] == 0.5
    falling = schedule("onecycle", total_steps=STEPS, floor=0.01)
    assert (falling(0), falling(46), falling(STEPS)) == pytest.approx((0.2, 1.0, 0.01))
    assert min(ours("step", floor=0.05)) == 0.05


def test_milestones_are_torchs() -> None:
    assert ours("step", milestones=[30, 60, 190]) == pytest.approx(rates(MultiStepLR, milestones=[30, 60, 190]))


def test_flags_of_epochs_become_steps() -> None:
    config = TrainConfig(schedule="step", epochs=10, milestones=(3, 6), warmup_epochs=0.5, learning_rate=2.0)
    curve = config.rate_curve(20)
    assert [curve(step) for step in (0, 4, 9, 10, 59, 60, 119, 120)] == pytest.approx(
        [0.1, 0.5, 1, 1, 1, 0.1, 0.1, 0.01])
    config = TrainConfig(schedule="cosine", epochs=2, min_lr=0.5, learning_rate=2.0)
    assert config.rate_curve(10)(20) == pytest.approx(0.25)


@pytest.mark.parametrize(("flags", "wrong"), [
    ({"min_lr": 0.01}, "--min-lr 0.01: needs a --schedule"),
    ({"min_lr": 0.2, "schedule": "cosine"}, "--min-lr 0.2: needs .* above"),
    ({"milestones": (3,), "schedule": "cosine"}, "--milestones 3: must be rising epochs of --schedule step"),
    ({"milestones": (3, 3), "schedule": "step"}, "--milestones 3 3: must be rising"),
    ({"warmup_steps": 3, "warmup_epochs": 1.0}, "--warmup-epochs 1.0: is given beside --warmup-steps"),
    ({"ema_warmup_steps": 3}, "--ema-warmup-steps 3: does nothing alone"),
    ({"compile_mode": "max-autotune"}, "--compile-mode max-autotune: does nothing alone"),
])
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        TrainConfig(**flags).check()


def test_constant_stays() -> None:
    assert ours("constant") == [1.0] * STEPS


def test_onecycle_is_the_triangle_through_its_three_corners() -> None:
    peak = 0.23 * STEPS
    expected = [0.2 + 0.8 * step / peak if step < peak else 1 - 0.93 * (step - peak) / (STEPS - peak)
                for step in range(STEPS)]
    assert ours("onecycle") == pytest.approx(expected)
    assert max(ours("onecycle")) == pytest.approx(1.0)


def test_the_warm_up_rises_linearly_and_then_lays_the_curve_over_the_rest() -> None:
    found = ours("cosine", warmup_steps=20)
    torchs = rates(LinearLR, start_factor=1 / 20, end_factor=1.0, total_iters=19)
    assert found[:20] == pytest.approx(torchs[:20])
    assert found[20:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 180)) for step in range(180)])


@pytest.mark.parametrize("name", get_args(ScheduleName))
@pytest.mark.parametrize("total_steps", [1, 2, 3, 7])
def test_every_curve_stays_within_zero_and_one_in_short_runs_and_past_the_end(name: str, total_steps: int) -> None:
    multiplier = schedule(name, total_steps=total_steps, warmup_steps=2)  # pyright: ignore[reportArgumentType]
    assert all(0 <= multiplier(step) <= 1 for step in range(total_steps + 3))


@pytest.mark.parametrize(("name", "limit"), [("cosine", ("--epochs", 1, 3)), ("onecycle", ("--max-steps", 7, 18)),
                                             ("constant", ("--epochs", 1, 2))])
def test_a_run_that_is_made_longer_says_from_which_rate_to_which(tmp_path: Path, name: str,
                                                                 limit: tuple[str, int, int]) -> None:
    flag, few, more = limit
    flags = ("--schedule", name, "--checkpoint-every", "100")
    assert "schedule  " not in run_in(tmp_path, *flags, flag, few).out
    before = metrics(tmp_path / "r", "learning_rate")[-1][0]
    ended = run_in(tmp_path, *flags, flag, more)
    assert ended.code == 0, ended.err
    found = re.findall(r"^schedule .* over (\d+) steps, not (\d+): the learning rate goes from (\S+) to (\S+)$",
                       ended.out, re.MULTILINE)
    if name == "constant":
        assert found == []
        return
    old, new = (10 * few, 10 * more) if flag == "--epochs" else (few, more)
    ((now, then, was, becomes),) = found
    assert (int(now), int(then)) == (new, old)
    assert float(was) == pytest.approx(before, rel=0.01)
    assert float(becomes) == pytest.approx(0.05 * schedule(name, total_steps=new)(old), rel=0.01)
    assert "schedule  " not in run_in(tmp_path, *flags, flag, more).out
