"""Which sample comes when: a pure function of (seed, epoch, position), whatever the number of ranks and workers.
Optimizer step k of an epoch consumes order[k * G : (k + 1) * G], G the global batch; rank r takes every world_size-th
of them, or pair of them where pairs are mixed (mixing.py). So a position is just (epoch, samples consumed)."""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import DistributedSampler

from datasets.keyed_random import Purpose, random_bits


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of range(num_samples), int64, by keyed bits: torch.randperm's may change with torch's version."""
    return torch.argsort(random_bits(torch.arange(num_samples), seed, epoch, Purpose.ORDER), stable=True)


def evaluation_indices(num_samples: int, *, rank: int, world_size: int) -> range:
    """What this rank evaluates: over all ranks every sample once, none padded. ValueError for a rank out of range."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside [0, {world_size})")
    return range(rank, num_samples, world_size)


class ResumableSampler(DistributedSampler[int]):
    """torch's DistributedSampler in the order above, from any position on, without the incomplete last global batch."""

    def __init__(self, dataset: Sized, *, global_batch_size: int, rank: int, world_size: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed, drop_last=True)  # pyright: ignore
        self.global_batch_size, self.samples_consumed = global_batch_size, 0
        self.steps_per_epoch = len(dataset) // global_batch_size
        self.group_size = 1  # neighbours in the order that go to one rank together: 2 for partners that will be mixed

    def set_position(self, epoch: int, samples_consumed: int) -> None:
        """Start the next iteration there, samples counted over all ranks. ValueError for a part of a global batch."""
        if samples_consumed % self.global_batch_size:
            raise ValueError(f"{samples_consumed} samples are no whole number of batches of {self.global_batch_size}")
        self.set_epoch(epoch)
        self.samples_consumed = samples_consumed

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices().tolist())

    def indices(self) -> torch.Tensor:
        """This rank's samples from the position to the end of the epoch, in order: int64."""
        order = epoch_order(len(self.dataset), seed=self.seed, epoch=self.epoch)  # pyright: ignore (it is Sized)
        end = self.steps_per_epoch * self.global_batch_size
        return order[self.samples_consumed : end].view(-1, self.group_size)[self.rank :: self.num_replicas].flatten()

    def __len__(self) -> int:
        return (self.steps_per_epoch * self.global_batch_size - self.samples_consumed) // self.num_replicas
