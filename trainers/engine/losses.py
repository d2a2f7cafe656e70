"""Losses from flags: the classification task that most trainers share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.command_line import UsageError
from trainers.engine.config import TrainConfig
from trainers.engine.task import Task


def classification_task(config: TrainConfig, class_names: tuple[str, ...], device: torch.device) -> Task:
    """Cross-entropy by `--label-smoothing` and `--class-weights` to train, without either to report.

    Raises:
        UsageError: if there are not as many class weights as classes.
    """
    loss: nn.Module = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    if config.class_weights:
        if len(config.class_weights) != len(class_names):
            raise UsageError(f"--class-weights {' '.join(map(str, config.class_weights))}: {len(config.class_weights)} "
                             f"weights for {len(class_names)} classes; give one for each of {', '.join(class_names)}")
        weights = torch.tensor(config.class_weights, device=device)
        loss = WeightedCrossEntropy(weights, label_smoothing=config.label_smoothing)
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
