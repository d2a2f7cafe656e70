"""A labelled data set in memory, as two tensors; and of any with labels: classes joined by name, a share held out."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from datasets.errors import DataError
from datasets.keyed_random import Purpose, random_bits

Splits = tuple["TensorDataset | None", "TensorDataset"]  # training and test, the first only where it is asked for
ThreeSplits = tuple["TensorDataset | None", "TensorDataset | None", "TensorDataset"]  # with validation in the middle


@dataclass(frozen=True, kw_only=True)
class TensorDataset:
    """Inputs and targets of one split, both of length N."""
    inputs: Tensor  # uint8 images (N, C, H, W), or float32 features (N, F)
    targets: Tensor  # int64 labels (N,), or float32 values (N, 1)
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def with_classes(self, known: Sequence[str] | None) -> "TensorDataset":
        """The same data with the labels of a network that knows these classes; DataError if it lacks one."""
        if known is None:
            return self
        labels = join_classes(self.class_names, known, place="--dataset: class ", owner="the checkpoint")
        return replace(self, targets=torch.tensor(list(labels.values()))[self.targets], class_names=tuple(known))

    def subset(self, samples: Tensor) -> "TensorDataset":
        """Some of the samples, in the order given."""
        return replace(self, inputs=self.inputs[samples], targets=self.targets[samples])

    def fingerprint(self) -> str:
        """A hash of every byte, to notice that the data changed since a checkpoint; 0.1 s for CIFAR-10."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data.cast("B"))
        return digest.hexdigest()[:16]


def hold_out(dataset: Any, fraction: float | None, *, seed: int) -> tuple[Any, Any]:
    """A data set less this share of each class, and the share: to train and to validate with. All and None of None."""
    if fraction is None or dataset is None:
        return dataset, None
    chosen = held_out(dataset.targets, fraction, seed=seed, class_names=dataset.class_names)
    return dataset.subset((~chosen).nonzero().flatten()), dataset.subset(chosen.nonzero().flatten())


def held_out(targets: Tensor, fraction: float, *, seed: int, class_names: Sequence[str] = ()) -> Tensor:
    """Which samples are set apart, bool (N,), by keyed order: some of each class, not all; DataError for a lone one."""
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    order = random_bits(torch.arange(len(targets)), seed, Purpose.SPLIT)
    classes = torch.zeros(len(targets), dtype=torch.int64) if targets.is_floating_point() else targets
    for label in classes.unique().tolist():
        members = (classes == label).nonzero().flatten()
        if len(members) < 2:
            name = class_names[label] if class_names else "of all"
            raise DataError(f"--validation-fraction {fraction}: class {name} has a single sample; add more")
        num_chosen = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen[members[order[members].argsort()[:num_chosen]]] = True
    return chosen


def join_classes(found: Sequence[str], known: Sequence[str], *, place: str, owner: str) -> dict[str, int]:
    """Each found class's label: its position in those the `owner` knows; DataError, saying `place`, for another one."""
    labels = {name: label for label, name in enumerate(known)}
    for name in found:
        if name not in labels:
            plain, *others = (unicodedata.normalize("NFC", each).casefold().strip() for each in (name, *known))
            alike = next((other for other, text in zip(known, others, strict=True) if text == plain), None)
            remedy = ("leave it out, or train with images of it" if alike is None else
                      f"that one has {alike}, which is spelled in another way: rename one of them")
            raise DataError(f"{place}{name}: no such class in {owner}, which knows {some_of(known)}; {remedy}")
    return {name: labels[name] for name in found}


def some_of(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
