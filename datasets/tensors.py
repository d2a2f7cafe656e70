"""A labelled data set in memory, as two tensors."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from datasets.classes import join_classes

Splits = tuple["TensorDataset | None", "TensorDataset"]  # training and test, the first only where it is asked for


@dataclass(frozen=True, kw_only=True)
class TensorDataset:
    """Inputs and targets of one split, both of length N."""

    inputs: Tensor
    """uint8 images (N, C, H, W), or float32 features (N, F)."""
    targets: Tensor
    """int64 labels (N,), or float32 values (N, 1)."""
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> "TensorDataset":
        """The same data on a device."""
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))

    def with_classes(self, known: Sequence[str] | None) -> "TensorDataset":
        """The same data with the labels of a network that knows these classes; DataError if it lacks one."""
        if known is None:
            return self
        labels = join_classes(self.class_names, known, place="--dataset: class ", owner="the checkpoint")
        return replace(self, targets=torch.tensor(list(labels.values()))[self.targets], class_names=tuple(known))

    def fingerprint(self) -> str:
        """A hash of every byte, to notice that the data changed since a checkpoint; 0.1 s for CIFAR-10."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data.cast("B"))
        return digest.hexdigest()[:16]
