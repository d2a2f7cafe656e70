"""The learning rate as a pure function of the step, of which no checkpoint holds a state: shares of the peak rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from launch.errors import AtLeast, UsageError

ScheduleName = Literal["constant", "linear", "step", "cosine", "onecycle"]
START, PEAK_AT, END = 0.2, 0.23, 0.07  # of onecycle: cifar10-airbench's triangle


def curve(name: ScheduleName, step: int, total_steps: int) -> float:
    """The share of the peak rate at a step: linear from 1 to 0, cosine by half a wave (Loshchilov and Hutter, 2016),
    step a tenth at half and at three quarters (He et al., 2015), onecycle from 0.2 to 1 at 23 %, then to 0.07."""
    done, peak = min(1.0, step / total_steps), max(1.0, PEAK_AT * total_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "step": 0.1 ** ((done >= 0.5) + (done >= 0.75)),
            "onecycle": START + (1 - START) * step / peak if step < peak else
            1 + (END - 1) * min(1.0, (step - peak) / max(1.0, total_steps - peak))}[name]


def schedule(name: ScheduleName, *, total_steps: int, warmup_steps: int = 0, milestones: Sequence[int] = (),
             floor: float | None = None) -> Callable[[int], float]:
    """step -> multiplier: a linear warm-up to 1, then the curve over the rest of `total_steps`. Each of `milestones`
    (steps) divides the rate by ten. `floor`: the share of the peak where curves end, below which step does not fall."""
    remaining = max(1, total_steps - warmup_steps)
    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        value = (0.1 ** sum(step >= milestone for milestone in milestones) if milestones else
                 curve(name, step - warmup_steps, remaining))
        if floor is None:
            return value
        if name in ("linear", "cosine"):
            return floor + (1 - floor) * value
        if name == "onecycle" and step - warmup_steps >= PEAK_AT * remaining:
            return 1 - (1 - floor) * (1 - value) / (1 - END)
        return max(floor, value)
    return multiplier


@dataclass(frozen=True, kw_only=True)
class ScheduleFlags:
    """The flags of a run's length and learning rate."""
    TITLES: ClassVar = {"epochs": "Optimization"}
    epochs: Annotated[int, AtLeast(1)] = 10
    """Passes over the training set."""
    max_steps: Annotated[int | None, AtLeast(1)] = None
    """Stop after so many optimizer steps, even within an epoch."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"]), AtLeast(0)] = 0.1
    """Peak rate, at the global batch size."""
    schedule: ScheduleName = "constant"
    """Learning-rate curve over the run. linear and cosine fall to --min-lr, step by ten at half and three quarters."""
    min_lr: Annotated[float | None, AtLeast(0)] = None
    """Lowest rate of a schedule. Default: 0, of onecycle 7 % of the peak."""
    milestones: Annotated[tuple[int, ...], AtLeast(1)] = ()
    """Epochs after each of which --schedule step divides the rate by ten, in place of its own."""
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    """Steps over which the rate first rises linearly."""
    warmup_epochs: Annotated[float, AtLeast(0)] = 0.0
    """The same in epochs."""

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, of so many per epoch."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def check_schedule(self) -> None:
        """Raise UsageError for flags of the learning rate that contradict each other."""
        if self.min_lr is not None and (self.schedule == "constant" or self.min_lr > self.learning_rate):
            raise UsageError(f"--min-lr {self.min_lr}: needs a --schedule that falls to it, from a --learning-rate "
                             f"above it; these are {self.schedule} and {self.learning_rate}")
        if self.milestones and (self.schedule != "step" or sorted(set(self.milestones)) != [*self.milestones]):
            raise UsageError(f"--milestones {' '.join(map(str, self.milestones))}: must be rising epochs of --schedule "
                             f"step; that is {self.schedule}")
        if self.warmup_epochs and self.warmup_steps:
            raise UsageError(f"--warmup-epochs {self.warmup_epochs}: is given beside --warmup-steps; leave one out")

    def rate_curve(self, steps_per_epoch: int) -> Callable[[int], float]:
        """step -> share of the peak learning rate, over the whole run."""
        floor = None if self.min_lr is None or not self.learning_rate else self.min_lr / self.learning_rate
        return schedule(self.schedule, total_steps=self.total_steps(steps_per_epoch), floor=floor,
                        warmup_steps=self.warmup_steps or round(self.warmup_epochs * steps_per_epoch),
                        milestones=[epoch * steps_per_epoch for epoch in self.milestones])
