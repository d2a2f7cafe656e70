"""What a trainer is given to learn: the loss, and batches to learn it from and to be judged by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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
