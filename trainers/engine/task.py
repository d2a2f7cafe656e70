"""What a trainer is given: the loss, and training and evaluation batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.errors import Above, AtLeast, UsageError
from trainers.engine.user_code import Reference

Batch = tuple[Any, Any]  # inputs and targets: tensors, or dicts and tuples of them
Loss = Callable[[Any, Any], Tensor]  # (outputs, targets) -> mean over the batch
Metric = Callable[[Tensor, Tensor], Any]  # (logits, targets) of the whole test set -> a number, or several by name
EvaluationBatches = Iterable[Batch]  # this rank's share of a test set
# datasets.loaders.TrainLoader and its like: steps_per_epoch, global_batch_size (samples that all ranks together consume
# in one step) and batches(epoch, samples_consumed), this rank's micro-batches from that position to the epoch's end
TrainBatches = Any


@dataclass(frozen=True, kw_only=True)
class MixingFlags:
    """Flags of the trainers that can mix samples in pairs, so that targets become shares of labels."""
    TITLES: ClassVar = {"mixup": "Data"}
    mixup: Annotated[float | None, Above(0, such_as=0.2)] = None
    """Mix the images of each pair with each other, and their labels, by lambda and 1 - lambda from Beta(this, this).
    Targets are then rows of shares, one per class; also those of a loss of yours."""
    cutmix: Annotated[float | None, Above(0, such_as=1)] = None
    """Exchange a box of each pair, of an area from Beta(this, this). With --mixup: one of them per pair, half each."""
    mix_off_epoch: Annotated[int | None, AtLeast(1)] = None
    """Epochs after which nothing is mixed any more."""

    def mixing(self) -> dict[str, Any]:
        """The arguments of datasets.mixing.Mixing; none where nothing is mixed."""
        kinds = {"mixup": self.mixup, "cutmix": self.cutmix}
        return {} if set(kinds.values()) == {None} else {**kinds, "off_epoch": self.mix_off_epoch}

    def check_mixing(self, batch_size: int, rank_batch_size: int) -> None:
        """Raise UsageError for an end of what never begins, or a micro-batch that is not all pairs."""
        if self.mix_off_epoch is not None and not self.mixing():
            raise UsageError(f"--mix-off-epoch {self.mix_off_epoch}: does nothing alone; add --mixup 0.2")
        if self.mixing() and rank_batch_size % 2:
            even = batch_size // rank_batch_size * (rank_batch_size + 1)
            raise UsageError(f"--batch-size {batch_size}: leaves {rank_batch_size} samples per rank and micro-batch, "
                             f"and --mixup and --cutmix need pairs; try {even}")


@dataclass(kw_only=True)
class Task:
    """What is learned: the loss to minimise, the loss to report on the test set, and the number of classes."""
    loss: Loss
    test_loss: Loss
    num_classes: int | None  # None where there are none: then only the loss is reported
    logits: Callable[[Any], Tensor] = field(default_factory=lambda: logits_of)  # of what the model returns
    metrics: dict[str, Metric] = field(default_factory=dict)  # further figures of an evaluation, by name
    is_own: bool = False  # whether the network or the loss may be people's own


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returns: itself, `.logits`, key `logits` or `out`, or the first element."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(found := getattr(outputs, "logits", None), Tensor):
        return found
    parts = ([outputs[name] for name in ("logits", "out") if name in outputs] or list(outputs.values())
             if isinstance(outputs, Mapping) else outputs if isinstance(outputs, list | tuple) else ())
    if parts:
        return logits_of(parts[0])
    raise UsageError(f"--model: returns {type(outputs).__name__}, in which no logits are found; return a tensor, or "
                     f"write a function logits(outputs) beside it")


def user_loss(function: Loss, name: str) -> Loss:
    """A loss of the user's own, of all that the model returns; UsageError unless that is one number of torch."""
    def one_number(outputs: Any, targets: Any) -> Tensor:
        loss = function(outputs, targets)
        if not isinstance(loss, Tensor) or loss.shape != () or (torch.is_grad_enabled() and not loss.requires_grad):
            kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(f"{name}: gives {kind}, not one number that depends on the outputs; return torch's mean")
        return loss
    return one_number


def function_of(reference: Reference, device: torch.device, num_classes: int | None = None) -> Callable[..., Any]:
    """The loss or metric that a flag names; a class is made first, and a module moved to the device."""
    found = reference.find()
    found = reference.make({"num_classes": num_classes}) if isinstance(found, type) else found
    if not callable(found):
        raise UsageError(f"{reference.flag} {reference.text}: the file has no function {reference.name} but "
                         f"{type(found).__name__}; give a function of (outputs, targets)")
    return found.to(device) if isinstance(found, nn.Module) else found


def with_own_code(task: Task, found: Sequence[Reference], device: torch.device, *, loss: Loss | None = None,
                  metric: Metric | None = None) -> Task:
    """The task with the loss, the metric and the `logits` of people's files, or of the program that called us."""
    own = {each.flag: each for each in found}
    logits: Any = own["--model"].extra("logits") if "--model" in own else None
    logits, name, metrics = logits if callable(logits) else logits_of, "loss", dict(task.metrics)
    if "--loss" in own:
        loss, name = function_of(own["--loss"], device, task.num_classes), f"--loss {own['--loss'].text}"
    if "--metric" in own:
        metrics[own["--metric"].name] = function_of(own["--metric"], torch.device("cpu"), task.num_classes)
    elif metric is not None:
        metrics["metric"] = metric
    train, test = (partial(on_logits, each, logits, task.num_classes) if loss is None else user_loss(loss, name)
                   for each in (task.loss, task.test_loss))
    return replace(task, loss=train, test_loss=test, logits=logits, metrics=metrics, is_own=task.is_own or bool(found))


def on_logits(loss: Loss, logits: Callable[..., Tensor], num_classes: int | None, outputs: Any, targets: Any) -> Tensor:
    """A loss of logits, for a model that may return more than those; UsageError if they are not of so many classes."""
    found = logits(outputs)
    if num_classes is not None and (found.ndim < 2 or found.shape[1] != num_classes):
        raise UsageError(f"--model: gives logits of shape {tuple(found.shape)} for {num_classes} classes; give it as "
                         f"many outputs")
    return loss(found, targets)


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Nested dicts, lists and tuples with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {name: map_tensors(change, child) for name, child in tree.items()}
    return tuple(map_tensors(change, child) for child in tree) if isinstance(tree, list | tuple) else tree


def apply(model: Callable[..., Any], inputs: Any) -> Any:
    """What the model returns: dicts go to it as keywords, tuples by position."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def classification_task(class_names: tuple[str, ...], device: torch.device, *, loss: str = "cross-entropy",
                        label_smoothing: float = 0.0, class_weights: tuple[float, ...] = ()) -> Task:
    """Cross-entropy or bce, trained by these options, reported without; UsageError for another number of weights."""
    if len(class_weights) not in (0, len(class_names)):
        raise UsageError(f"--class-weights {' '.join(map(str, class_weights))}: {len(class_weights)} weights for "
                         f"{len(class_names)} classes; give one for each of {', '.join(class_names)}")
    plain, weighted = (label_wise, label_wise) if loss == "bce" else (F.cross_entropy, weighted_cross_entropy)
    weights = {"weights": torch.tensor(class_weights, device=device)} if class_weights else {}
    trained = partial(weighted if weights else plain, label_smoothing=label_smoothing, **weights)
    return Task(loss=trained, test_loss=plain, num_classes=len(class_names))


def weighted_cross_entropy(logits: Tensor, targets: Tensor, *, weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean over the batch of each sample's cross-entropy times the weight of its class; logits (B, C), labels (B,)
    or shares (B, C). torch divides by the sum of the batch's weights instead, which differs between ranks."""
    return F.cross_entropy(logits, targets, weight=weights, label_smoothing=label_smoothing, reduction="none").mean()


def label_wise(logits: Tensor, targets: Tensor, *, weights: Any = None, label_smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of each class against the rest, the mean over classes and batch; targets as above."""
    shares = targets if targets.is_floating_point() else F.one_hot(targets, logits.shape[1]).float()
    factors = None
    if weights is not None:
        factors = (shares @ weights)[:, None]
        shares = shares * weights / factors.clamp(min=1e-30)  # of a pair whose weights are all 0 nothing counts
    shares = (1 - label_smoothing) * shares + label_smoothing / logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits.float(), shares, factors)
