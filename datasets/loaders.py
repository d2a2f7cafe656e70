"""From a data set to the batches of one rank: a training loader that can start anywhere, an unpadded evaluation one.
Where batches come from is a `Read`: of data in memory here, of images in images/loaders.py, of others in samples.py."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from datasets.augment import Augmentation
from datasets.errors import DataError
from datasets.order import ResumableSampler, evaluation_indices
from datasets.tensors import TensorDataset

Batch = tuple[Tensor, Tensor]
Read = Callable[[Sequence[Tensor], int], Iterator[Any]]  # (the samples of each batch, the epoch) -> the batches
# augmented at once, as small batches would pay the same two dozen kernels each; images in memory have at most 3 KiB
CHUNK_SAMPLES, GPU_CHUNK_SAMPLES = 1024, 16384


class TrainLoader:
    """Micro-batches of one rank, from any position of any epoch."""

    def __init__(self, read: Read, sampler: ResumableSampler, *, rank_batch_size: int, remedy: str = "") -> None:
        self.read, self.sampler, self.rank_batch_size = read, sampler, rank_batch_size
        self.remedy = remedy  # what a user can do where training waits for these batches
        self.steps_per_epoch, self.global_batch_size = sampler.steps_per_epoch, sampler.global_batch_size
        self.mix: Callable[[Iterator[Any], Tensor, int], Iterator[Any]] | None = None  # of batches, samples and epoch

    def batches(self, epoch: int, samples_consumed: int) -> Iterator[Any]:
        """The rest of the epoch, in micro-batches of `rank_batch_size`."""
        self.sampler.set_position(epoch, samples_consumed)
        samples = self.sampler.indices()
        batches = self.read([part for part in samples.split(self.rank_batch_size) if len(part)], epoch)
        yield from batches if self.mix is None else self.mix(batches, samples, epoch)


class EvaluationLoader:
    """This rank's share of a test set, in batches: over all ranks every sample once."""

    def __init__(self, read: Read, share: range, *, batch_size: int) -> None:
        self.read, self.share, self.batch_size = read, share, batch_size

    def __iter__(self) -> Iterator[Any]:
        share = torch.arange(self.share.start, self.share.stop, self.share.step)
        return self.read([part for part in share.split(self.batch_size) if len(part)], 0)


def split_loaders(reads: Mapping[str, tuple[Read, int]], *, batch_size: int, rank_batch_size: int, seed: int, rank: int,
                  world_size: int, remedy: str = "", evaluation_batch_size: int = 64) -> dict[str, Any]:
    """A rank's loaders by split, from its `Read` and length, to train (`train`) or evaluate; DataError for too few."""
    loaders: dict[str, Any] = {}
    for split, (read, num_samples) in reads.items():
        if split == "train":
            check_size(num_samples, batch_size)
            sampler = ResumableSampler(range(num_samples), global_batch_size=batch_size, rank=rank,
                                       world_size=world_size, seed=seed)
            loaders[split] = TrainLoader(read, sampler, rank_batch_size=rank_batch_size, remedy=remedy)
        else:
            share = evaluation_indices(num_samples, rank=rank, world_size=world_size)
            loaders[split] = EvaluationLoader(read, share, batch_size=evaluation_batch_size)
    return loaders


def check_size(num_samples: int, batch_size: int) -> None:
    """Raise DataError if there are too few samples for one step."""
    if num_samples < batch_size:
        raise DataError(f"--batch-size {batch_size}: the training set has only {num_samples} samples; use at most that")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on its way to the device: from pinned memory, else the host would wait for a GPU."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class InMemory:
    """A `Read` of one split on the device: augmented (`train`) or normalised; without images, inputs as they are."""

    def __init__(self, split: str, dataset: TensorDataset, images: Augmentation | None, device: torch.device) -> None:
        self.images, self.trains = images, split == "train"
        inputs, self.targets = dataset.inputs.to(device), dataset.targets.to(device)
        self.inputs = images.prepare(inputs) if images is not None and self.trains else inputs

    def __call__(self, parts: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        """Several batches are prepared at once, where they are small."""
        size = max(map(len, parts), default=1)
        together = max(1, (CHUNK_SAMPLES if self.inputs.device.type == "cpu" else GPU_CHUNK_SAMPLES) // size)
        for start in range(0, len(parts), together):
            samples = sent(torch.cat(list(parts[start : start + together])), self.inputs.device)
            if self.images is not None and self.trains:
                inputs = self.images(self.inputs, samples, epoch=epoch, rows=samples)
            else:
                inputs = self.inputs[samples] if self.images is None else self.images.normalize(self.inputs[samples])
            yield from zip(inputs.split(size), self.targets[samples].split(size), strict=True)


def memory_loaders(splits: Mapping[str, TensorDataset], images: Augmentation | None, *, device: torch.device, **how: Any
                   ) -> dict[str, Any]:
    """The loader of each split on this rank, for data in memory. See split_loaders."""
    reads = {name: (InMemory(name, dataset, images, device), len(dataset)) for name, dataset in splits.items()}
    return split_loaders(reads, evaluation_batch_size=500, **how)
