"""From a data set to the batches of one rank: a training loader that can start anywhere, an unpadded evaluation one.

Both yield (inputs, targets) on the rank's device, one micro-batch at a time, and hold the whole data set there as
uint8. Data that must be decoded from files goes through DataLoader workers instead; see images/loaders.py.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from datasets.errors import DataError
from datasets.order import ResumableSampler, evaluation_indices
from datasets.tensors import TensorDataset

Batch = tuple[Tensor, Tensor]
CHUNK_SAMPLES = 1024  # augmented at once: small batches would pay the same two dozen kernels each
CHUNK_BYTES = 2**24  # of stored inputs, and no more samples than that: large images would fill the memory


class Transform(Protocol):
    """What `augment.Augmentation` is: a preparation of the whole data set, and a function of the sample and epoch."""

    def prepare(self, images: Tensor) -> Tensor:
        """Once, before training."""
        ...

    def __call__(self, prepared: Tensor, samples: Tensor, *, epoch: int) -> Tensor:
        """The inputs of these samples in this epoch."""
        ...


class PlainTransform:
    """No augmentation: select, then normalise (or leave floats as they are)."""

    def __init__(self, normalize: Callable[[Tensor], Tensor] = lambda inputs: inputs) -> None:
        self.normalize = normalize

    def prepare(self, images: Tensor) -> Tensor:
        """Nothing to prepare."""
        return images

    def __call__(self, prepared: Tensor, samples: Tensor, *, epoch: int) -> Tensor:
        """The normalised inputs; the same in every epoch."""
        return self.normalize(prepared[samples])


class TrainLoader:
    """Micro-batches of one rank from a data set in memory, from any position of any epoch."""

    def __init__(self, dataset: TensorDataset, transform: Transform, sampler: ResumableSampler, *,
                 rank_batch_size: int, device: torch.device) -> None:
        self.inputs = transform.prepare(dataset.inputs.to(device))
        self.targets = dataset.targets.to(device)
        self.transform, self.sampler = transform, sampler
        self.rank_batch_size = rank_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; the incomplete last global batch is dropped."""
        return self.sampler.steps_per_epoch

    @property
    def global_batch_size(self) -> int:
        """Samples that all ranks together consume in one optimizer step."""
        return self.sampler.global_batch_size

    def batches(self, epoch: int, samples_consumed: int) -> Iterator[Batch]:
        """The rest of the epoch, in micro-batches of `rank_batch_size`."""
        self.sampler.set_position(epoch, samples_consumed)
        samples = self.sampler.indices()
        if self.inputs.device.type != "cpu":
            samples = samples.pin_memory().to(self.inputs.device, non_blocking=True)  # else a step waits for the GPU
        largest = min(CHUNK_SAMPLES, CHUNK_BYTES // max(1, self.inputs[0].nbytes))
        chunk_size = self.rank_batch_size * max(1, largest // self.rank_batch_size)
        for chunk in samples.split(chunk_size):
            inputs = self.transform(self.inputs, chunk, epoch=epoch)
            yield from zip(inputs.split(self.rank_batch_size), self.targets[chunk].split(self.rank_batch_size),
                           strict=True)


def train_loader(dataset: TensorDataset | None, transform: Transform, *, batch_size: int, rank_batch_size: int,
                 rank: int, world_size: int, seed: int, device: torch.device) -> TrainLoader | None:
    """The training loader of one rank; None of no data set, where nothing is trained.

    Raises:
        DataError: if the data set is smaller than one global batch.
    """
    if dataset is None:
        return None
    check_size(len(dataset), batch_size)
    sampler = ResumableSampler(dataset, global_batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
    return TrainLoader(dataset, transform, sampler, rank_batch_size=rank_batch_size, device=device)


def check_size(num_samples: int, batch_size: int) -> None:
    """Raise DataError if there are too few samples for one step."""
    if num_samples < batch_size:
        raise DataError(f"--batch-size {batch_size}: the training set has only {num_samples} samples; use at most that")


class EvaluationLoader:
    """This rank's share of a test set, in batches: over all ranks every sample once."""

    def __init__(self, dataset: TensorDataset, normalize: Callable[[Tensor], Tensor], *, batch_size: int, rank: int,
                 world_size: int, device: torch.device) -> None:
        self.num_samples = len(dataset)
        share = evaluation_indices(len(dataset), rank=rank, world_size=world_size)
        self.inputs = dataset.inputs[share.start :: share.step].to(device)
        self.targets = dataset.targets[share.start :: share.step].to(device)
        self.normalize, self.batch_size = normalize, batch_size

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.inputs), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.normalize(self.inputs[part]), self.targets[part]


def evaluation_loader(dataset: TensorDataset | None, normalize: Callable[[Tensor], Tensor], *, rank: int,
                      world_size: int, device: torch.device, batch_size: int = 500) -> EvaluationLoader | None:
    """The evaluation loader of one rank, None of no data; `normalize` makes what the network sees of stored inputs."""
    if dataset is None:
        return None
    return EvaluationLoader(dataset, normalize, batch_size=batch_size, rank=rank, world_size=world_size, device=device)
