"""Loss and accuracy over all ranks, counted exactly: sums stay on the device until a line is reported.

Training keeps three numbers since the epoch began. Evaluation keeps a confusion matrix and a loss sum, which ONE
all_reduce adds over the ranks; accuracy, per-class accuracy and the plot come from that matrix, and its total is the
number of test samples. A task without classes has a loss only.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.process_group import World
from launch.stop import Stopped, StopRequest


def all_reduce_sum(values: Tensor, world: World) -> Tensor:
    """The sum over ranks, in place."""
    if world.backend is not None:
        world.watchdog.mark("reduce")
        dist.all_reduce(values)
    return values


class TrainingSums:
    """Loss, correct predictions and samples of this rank since the epoch began.

    A step leaves its numbers on the device; `collect` fetches all that wait in one go and adds them one after the
    other, so that the sums do not depend, to the last bit, on when that is done.
    """

    def __init__(self, *, classification: bool) -> None:
        self.classification = classification
        self.loss = self.correct = self.samples = 0.0
        self.bad_steps = 0
        """Consecutive micro-batches, up to the last collected one, whose loss is not finite."""
        self._waiting: list[tuple[Tensor, Tensor | None, int]] = []

    def update(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add one micro-batch: its mean loss, outputs (B, ...), targets (B, ...). Nothing here waits for the device."""
        correct = (outputs.detach().argmax(1) == targets).sum() if self.classification else None
        self._waiting.append((loss.detach(), correct, len(targets)))  # .item() here would wait for every step

    def collect(self) -> None:
        """Fetch what waits: one wait for the device."""
        if not self._waiting:
            return
        losses, corrects, sizes = zip(*self._waiting, strict=True)
        self._waiting = []
        losses = torch.stack(losses).tolist()
        corrects = torch.stack(corrects).tolist() if self.classification else [0] * len(losses)
        for loss, correct, size in zip(losses, corrects, sizes, strict=True):
            self.loss += loss * size
            self.correct += correct
            self.samples += size
            self.bad_steps = 0 if math.isfinite(loss) else self.bad_steps + 1

    def reset(self) -> None:
        """An epoch starts."""
        self.loss = self.correct = self.samples = 0.0

    def means(self, world: World) -> tuple[float, float | None]:
        """Mean loss and accuracy over all ranks since the epoch began. A collective."""
        self.collect()
        sums = torch.tensor([self.loss, self.correct, self.samples], dtype=torch.float64)
        loss, correct, samples = all_reduce_sum(sums, world).tolist()
        samples = max(samples, 1.0)
        return loss / samples, correct / samples if self.classification else None

    def of_all_ranks(self, world: World) -> list[list[float]]:
        """Each rank's three sums and its bad steps, for a checkpoint: (W, 4). A collective."""
        self.collect()
        rows = torch.zeros(world.world_size, 4, dtype=torch.float64)
        rows[world.rank] = torch.tensor([self.loss, self.correct, self.samples, self.bad_steps], dtype=torch.float64)
        return all_reduce_sum(rows, world).tolist()

    def restore(self, rows: list[list[float]], world: World) -> None:
        """Take this rank's sums from a checkpoint; after one at another world size, rank 0 takes them all."""
        mine = [0.0, 0.0, 0.0, 0.0]
        if len(rows) == world.world_size:
            mine = rows[world.rank]
        elif world.is_main:
            mine = [sum(column) for column in zip(*rows, strict=True)]
        self.loss, self.correct, self.samples = mine[:3]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass over a test set gives, the same on every rank."""

    loss: float
    num_samples: int
    confusion_matrix: list[list[int]] | None = None
    """Rows are true classes, columns predicted ones; None where the task has no classes."""

    @property
    def accuracy(self) -> float | None:
        """The share of all samples on the diagonal."""
        if self.confusion_matrix is None:
            return None
        return sum(row[label] for label, row in enumerate(self.confusion_matrix)) / self.num_samples

    @property
    def per_class_accuracy(self) -> list[float | None] | None:
        """Of each class, the share predicted right; None for a class without samples."""
        if self.confusion_matrix is None:
            return None
        return [row[label] / sum(row) if sum(row) else None for label, row in enumerate(self.confusion_matrix)]

    def is_better_than(self, best: dict[str, float | None] | None) -> bool:
        """Higher accuracy, or without classes lower loss, than the best so far."""
        if best is None:
            return True
        if self.accuracy is not None and best["accuracy"] is not None:
            return self.accuracy > best["accuracy"]
        return best["loss"] is not None and self.loss < best["loss"]


class EvaluationSums:
    """Loss sum and confusion matrix of this rank's share of a test set, in one float64 vector (exact below 2**53)."""

    def __init__(self, device: torch.device, *, num_classes: int | None) -> None:
        self.num_classes = num_classes
        self.sums = torch.zeros(2 + (num_classes or 0) ** 2 + 1, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: its mean loss, outputs (B, num_classes) or (B, ...), targets (B,) or (B, ...)."""
        self.sums[0] += loss.detach() * len(targets)
        self.sums[1] += len(targets)
        if self.num_classes is not None:
            cells = targets * self.num_classes + outputs.argmax(1)
            self.sums[2:-1] += torch.bincount(cells, minlength=self.num_classes**2)

    def reduce(self, world: World, stop: StopRequest) -> Evaluation:
        """The evaluation over all ranks, by one all_reduce; Stopped on every rank if any was asked to stop midway."""
        self.sums[-1] = float(bool(stop))
        loss, samples, *cells, any_stopped = all_reduce_sum(self.sums, world).tolist()
        if any_stopped:
            raise Stopped(stop.reason)
        size = self.num_classes or 0
        matrix = [[int(cell) for cell in cells[row * size : (row + 1) * size]] for row in range(size)]
        return Evaluation(loss=loss / max(samples, 1), num_samples=int(samples), confusion_matrix=matrix or None)


def sync_buffers(model: nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers: BatchNorm's running statistics differ between ranks after a step."""
    if world.backend is None:
        return
    world.watchdog.mark("reduce")
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)
