"""Faults for a real trainer process, placed at an exact step and phase. Only tests import this.

A hook is a line of Python such as `at(7, "backward", kill)` or `at(3, "data", sleep_for(60), ranks=[1])`. Phases are
those that the training loop announces to its watchdog: data, forward, backward, optimizer, reduce, checkpoint,
evaluate, main.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from launch.errors import launched_rank
from launch.files import read_object, replace_file
from launch.watchdog import Watchdog
from trainers import models
from trainers.engine.run import ownership
from trainers.engine.step import TrainStep


class Normed(nn.Module):
    """A small network with BatchNorm and dropout. Used in another order than defined, which DDP learns."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(width * 49, 32), nn.ReLU(), nn.Linear(32, num_classes))
        self.features = nn.Sequential(nn.Conv2d(3, width, 5, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
                                      nn.MaxPool2d(2))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, 32, 32)."""
        return self.head(self.features(images).flatten(1))


def install(trainer: str, hook: str) -> None:
    """Add the network to those that `--model` knows, for any trainer, and run the hook."""
    models.OURS["normed"] = Normed
    if trainer == "image_folder":
        from trainers import image_folder

        image_folder.OUR_MODELS = (*image_folder.OUR_MODELS, "normed")
    exec(hook, globals())


def at(step: int, phase: str, action: Callable[[], None], *, ranks: Collection[int] | None = None) -> None:
    """Run `action` once, when the training loop reaches that phase of that step (completed steps, from 0)."""
    original, fired = Watchdog.mark, []

    def mark(self: Watchdog, where: str, now: int | None = None) -> None:
        original(self, where, now)
        if self.step >= step and where == phase and not fired and (ranks is None or launched_rank() in ranks):
            fired.append(True)
            action()

    Watchdog.mark = mark


def send(number: int) -> Callable[[], None]:
    """Send this process a signal."""
    return lambda: os.kill(os.getpid(), number)


kill = send(signal.SIGKILL)
stop = send(signal.SIGSTOP)


def each(*actions: Callable[[], None]) -> Callable[[], None]:
    """Run several actions one after the other."""
    return lambda: [action() for action in actions] and None


def sleep_for(seconds: float) -> Callable[[], None]:
    """Sleep, as a loader does that waits for a file system."""
    return lambda: time.sleep(seconds)


def raise_error(error: Exception) -> Callable[[], None]:
    """Raise it."""
    def action() -> None:
        raise error
    return action


def bad_loss_from(step: int, *, ranks: Collection[int] | None = None) -> None:
    """Make the loss NaN from that step on."""
    original = TrainStep.forward

    def forward(self: TrainStep, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs, loss = original(self, inputs, targets)
        broken = self.world.watchdog.step >= step and (ranks is None or launched_rank() in ranks)
        return outputs, loss * torch.nan if broken else loss

    TrainStep.forward = forward


def taken_over() -> None:
    """Do to this process's run what a later incarnation on another node does: raise the fencing token."""
    for claimed in CLAIMED:
        owner = read_object(claimed.path / "owner.json") or {}
        later = {**owner, "incarnation": owner["incarnation"] + 1, "host": "elsewhere", "pid": 1}
        replace_file(claimed.path / "owner.json", str(later).replace("'", '"').replace("None", "null")
                     .replace("False", "false").encode())


CLAIMED: list[ownership.Ownership] = []
original_claim = ownership.Ownership.claim


def remember_claim(self: ownership.Ownership) -> None:
    """Note which folder this process owns."""
    original_claim(self)
    CLAIMED.append(self)


ownership.Ownership.claim = remember_claim


def slow_steps(seconds: float) -> None:
    """Make every step take that much longer."""
    original = TrainStep.__call__

    def train_step(self: TrainStep, *args: object, **kwargs: object) -> None:
        time.sleep(seconds)
        original(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    TrainStep.__call__ = train_step


def clock_jumps(at_call: int, seconds: float) -> None:
    """Have time.time() jump, as an adjusted system clock does."""
    real, calls = time.time, []

    def jumped() -> float:
        calls.append(1)
        return real() + (seconds if len(calls) > at_call else 0)

    time.time = jumped


def fill(path: str) -> None:
    """Write to a file until the disk is full."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 14))
