"""Loss and accuracy over all ranks, counted exactly. An evaluation is a confusion matrix and a loss sum, added over the
ranks by ONE all_reduce; of many thousand classes two columns, wrong and right: a matrix of 21,841 classes is 3.8 GB."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launch.errors import UsageError
from launch.process_group import World, gather
from launch.stop import Stopped, StopRequest

MOST_MATRIX_CLASSES = 2000  # a matrix of 32 MB

BestName = Literal["accuracy", "top5", "loss"]
TOP = 5


def all_reduce_sum(values: Tensor, world: World) -> Tensor:
    """The sum over ranks, in place."""
    if world.backend is not None:
        world.watchdog.mark("reduce")
        dist.all_reduce(values)
    return values


def num_samples(tree: Any) -> int:
    """How many samples a batch of targets holds: the length of its first tensor."""
    while not isinstance(tree, Tensor):
        tree = next(iter(tree.values() if isinstance(tree, Mapping) else tree))
    return len(tree)


class TrainingSums:
    """Loss, correct predictions and samples of this rank since the epoch began. A step leaves its numbers on the
    device; `collect` fetches and adds them in their order, so that no bit of the sums depends on when that is done."""

    def __init__(self, *, classification: bool) -> None:
        self.classification = classification
        self.loss = self.correct = self.samples = 0.0
        self.bad_steps = 0  # consecutive micro-batches, up to the last collected one, whose loss is not finite
        self._waiting: list[tuple[Tensor, Tensor | None, int]] = []

    def update(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add one micro-batch: its mean loss, outputs (B, ...), targets (B, ...). Nothing here waits for the device."""
        if self.classification and targets.is_floating_point():
            targets = targets.argmax(1)  # of mixed samples: the label of the larger share
        correct = (outputs.detach().argmax(1) == targets).sum() if self.classification else None
        self._waiting.append((loss.detach(), correct, num_samples(targets)))  # .item() here would wait for every step

    def collect(self) -> None:
        """Fetch what waits: one wait for the device."""
        if self._waiting:
            losses, corrects, sizes = zip(*self._waiting, strict=True)
            self._waiting = []
            corrects = torch.stack(corrects).tolist() if self.classification else [0] * len(losses)
            for loss, correct, size in zip(torch.stack(losses).tolist(), corrects, sizes, strict=True):
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
        if len(rows) != world.world_size:
            rows = [[sum(column) for column in zip(*rows, strict=True)], *([[0.0] * 4] * world.world_size)]
        self.loss, self.correct, self.samples = rows[world.rank][:3]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass over a test set gives, the same on every rank."""
    loss: float
    num_samples: int
    confusion_matrix: list[list[int]] | None = None  # true classes by predicted ones; None without, or with too many
    wrong_and_right: list[list[int]] | None = None  # of each class, where there are too many for a matrix
    accuracy_top5: float | None = None  # whose class is among the five with the largest outputs; None up to 5 classes
    metrics: dict[str, float] = field(default_factory=dict)  # further figures, by name

    @property
    def class_counts(self) -> list[tuple[int, int]]:
        """Of each class, the samples predicted right and all; empty without classes."""
        rows = self.confusion_matrix or self.wrong_and_right or []
        return [(row[label if self.confusion_matrix else 1], sum(row)) for label, row in enumerate(rows)]

    @property
    def accuracy(self) -> float | None:
        """The share of all samples predicted right."""
        counts = self.class_counts
        return sum(right for right, _ in counts) / self.num_samples if counts else None

    @property
    def per_class_accuracy(self) -> list[float | None] | None:
        """Of each class, the share predicted right; None for a class without samples."""
        return [right / samples if samples else None for right, samples in self.class_counts] or None

    def summary(self) -> dict[str, float | None]:
        """The figures by which evaluations are compared."""
        return {"accuracy": self.accuracy, "accuracy_top5": self.accuracy_top5, "loss": self.loss}


def with_metrics(figures: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The figures and people's metrics; of those one whose name is taken, as `precision`, is `metric_precision`."""
    return {**figures, **{f"metric_{name}" if name in figures else name: value for name, value in metrics.items()}}


def score(figures: Mapping[str, float | None], by: BestName) -> float:
    """A number that grows as an evaluation gets better; without classes that is its loss, negated."""
    value = figures.get({"top5": "accuracy_top5"}.get(by, by))
    if by == "loss" or value is None:
        value = -(math.inf if figures["loss"] is None else figures["loss"])
    return -math.inf if math.isnan(value) else value


class EvaluationSums:
    """Loss sum and confusion matrix of this rank's share of a test set, in one float64 vector (exact below 2**53)."""

    def __init__(self, device: torch.device, *, num_classes: int | None,
                 metrics: Mapping[str, Callable[[Tensor, Tensor], Any]] | None = None) -> None:
        self.num_classes, self.metrics = num_classes or 0, metrics or {}
        self.num_columns = self.num_classes if self.num_classes <= MOST_MATRIX_CLASSES else 2
        self._kept: list[tuple[Tensor, Tensor]] = []  # this rank's outputs and targets, where metrics need all
        self.sums = torch.zeros(3 + self.num_classes * self.num_columns + 1, dtype=torch.float64, device=device)

    def update(self, loss: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: its mean loss, outputs (B, num_classes) or (B, ...), targets (B,) or (B, ...)."""
        self.sums[0] += loss.detach() * num_samples(targets)
        self.sums[1] += num_samples(targets)
        if self.metrics:
            self._kept.append((outputs.detach().cpu(), targets.cpu()))
        if self.num_classes:
            predicted = outputs.argmax(1)
            if self.num_classes > TOP:
                self.sums[2] += (outputs.topk(TOP).indices == targets[:, None]).sum()
            columns = predicted if self.num_columns == self.num_classes else predicted == targets
            cells = targets * self.num_columns + columns
            self.sums[3:-1] += torch.bincount(cells, minlength=self.num_classes * self.num_columns)

    def reduce(self, world: World, stop: StopRequest) -> Evaluation:
        """The evaluation over all ranks, by one all_reduce; Stopped on every rank if any was asked to stop midway."""
        self.sums[-1] = float(bool(stop))
        sums = all_reduce_sum(self.sums, world)
        if sums[-1].item():
            raise Stopped(stop.reason)
        loss, samples, top5 = sums[:3].tolist()
        rows = sums[3:-1].long().view(self.num_classes, -1).tolist() if self.num_classes else None
        kind = "confusion_matrix" if self.num_columns == self.num_classes else "wrong_and_right"
        return Evaluation(loss=loss / max(samples, 1), num_samples=int(samples), **{kind: rows},
                          accuracy_top5=top5 / max(samples, 1) if self.num_classes > TOP else None,
                          metrics=self._whole_metrics(world) if self.metrics else {})

    def _whole_metrics(self, world: World) -> dict[str, float]:  # in the order of the test set, the same on every rank
        ranks = gather(world, [torch.cat(part) for part in zip(*self._kept, strict=True)])
        order = torch.cat([torch.arange(len(part[0])) * world.world_size + rank
                           for rank, part in enumerate(ranks) if part]).argsort()
        outputs, targets = (torch.cat([part[place] for part in ranks if part])[order] for place in (0, 1))
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            value = metric(outputs, targets)
            for key, number in (value if isinstance(value, Mapping) else {name: value}).items():
                if not isinstance(number, int | float | Tensor) or torch.as_tensor(number).numel() != 1:
                    raise UsageError(f"--metric {name}: gives {type(number).__name__}, no number; return one or a dict")
                found[key] = float(number)
        return found


def sync_buffers(model: nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers: BatchNorm's running statistics differ between ranks after a step."""
    if world.backend is not None:
        world.watchdog.mark("reduce")
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
