"""What a trainer is given: the loss, and training and evaluation batches."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.errors import UsageError

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> mean over the batch
EvaluationBatches = Iterable[Batch]  # this rank's share of a test set


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


@dataclass(kw_only=True)
class Task:
    """What is learned: the loss to minimise, the loss to report on the test set, and the number of classes."""

    loss: Loss
    test_loss: Loss
    num_classes: int | None
    """None where there are none: then only the loss is reported."""


def classification_task(class_names: tuple[str, ...], device: torch.device, *, label_smoothing: float = 0.0,
                        class_weights: tuple[float, ...] = ()) -> Task:
    """Cross-entropy by `--label-smoothing` and `--class-weights` to train, without either to report.

    Raises:
        UsageError: if there are not as many class weights as classes.
    """
    loss = functools.partial(F.cross_entropy, label_smoothing=label_smoothing)
    if class_weights:
        if len(class_weights) != len(class_names):
            raise UsageError(f"--class-weights {' '.join(map(str, class_weights))}: {len(class_weights)} weights for "
                             f"{len(class_names)} classes; give one for each of {', '.join(class_names)}")
        weights = torch.tensor(class_weights, device=device)
        loss = functools.partial(weighted_cross_entropy, weights=weights, label_smoothing=label_smoothing)
    return Task(loss=loss, test_loss=F.cross_entropy, num_classes=len(class_names))


def weighted_cross_entropy(outputs: Tensor, targets: Tensor, *, weights: Tensor, label_smoothing: float = 0.0
                           ) -> Tensor:
    """The mean over the batch of each sample's cross-entropy times the weight of its class; logits (B, C), labels (B,).

    torch's own CrossEntropyLoss(weight=...) divides by the sum of the batch's weights instead. That sum differs between
    ranks, so the average of their gradients would not be the gradient of the whole batch.
    """
    return F.cross_entropy(outputs, targets, weight=weights, label_smoothing=label_smoothing, reduction="none").mean()
