"""What a trainer is given to learn: the loss, and batches to learn it from and to be judged by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.errors import UsageError

Batch = tuple[Tensor, Tensor]


class TrainBatches(Protocol):
    """What `fit` trains on: datasets.loaders.TrainLoader and its like."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        ...

    @property
    def global_batch_size(self) -> int:
        """Samples that all ranks together consume in one optimizer step."""
        ...

    def batches(self, epoch: int, samples_consumed: int) -> Iterator[Batch]:
        """This rank's micro-batches from that position to the end of the epoch."""
        ...


def samples_per_epoch(train: TrainBatches) -> int:
    """Samples that all ranks together consume in one epoch; the incomplete last global batch is left out."""
    return train.steps_per_epoch * train.global_batch_size


class EvaluationBatches(Protocol):
    """What `evaluate` counts: this rank's share of a test set."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches."""
        ...


@dataclass(kw_only=True)
class Task:
    """What is learned: the loss to minimise, the loss to report on the test set, and the number of classes."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """(outputs, targets) -> mean over the batch."""
    test_loss: Callable[[Tensor, Tensor], Tensor]
    num_classes: int | None
    """None where there are none: then only the loss is reported."""


def classification_task(class_names: tuple[str, ...], device: torch.device, *, label_smoothing: float = 0.0,
                        class_weights: tuple[float, ...] = ()) -> Task:
    """Cross-entropy by `--label-smoothing` and `--class-weights` to train, without either to report.

    Raises:
        UsageError: if there are not as many class weights as classes.
    """
    loss: nn.Module = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    if class_weights:
        if len(class_weights) != len(class_names):
            raise UsageError(f"--class-weights {' '.join(map(str, class_weights))}: {len(class_weights)} weights for "
                             f"{len(class_names)} classes; give one for each of {', '.join(class_names)}")
        loss = WeightedCrossEntropy(torch.tensor(class_weights, device=device), label_smoothing=label_smoothing)
    return Task(loss=loss, test_loss=nn.CrossEntropyLoss(), num_classes=len(class_names))


class WeightedCrossEntropy(nn.Module):
    """The mean over the batch of each sample's cross-entropy times the weight of its class.

    torch's own CrossEntropyLoss(weight=...) divides by the sum of the batch's weights instead. That sum differs between
    ranks, so the average of their gradients would not be the gradient of the whole batch.
    """

    def __init__(self, weights: Tensor, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.weights, self.label_smoothing = weights, label_smoothing

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits (B, C) for labels (B,)."""
        return F.cross_entropy(outputs, targets, weight=self.weights, label_smoothing=self.label_smoothing,
                               reduction="none").mean()
