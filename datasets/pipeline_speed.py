"""Images per second that one way of loading and augmenting delivers; launch/benchmark.py --pipeline compares them.

    python datasets/pipeline_speed.py pil:2          # torchvision's PIL transforms in a DataLoader with 2 workers
    python datasets/pipeline_speed.py v2:0           # its v2 transforms on tensors, sample by sample, no workers
    python datasets/pipeline_speed.py batch          # this project's augmentation of a whole batch

All do the same to the same synthetic 32x32 images: random crop after reflect padding by 2, random flip, normalise. One
thread per process. Workers are running, and what they prefetched is used up, before the clock starts.
"""

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.transforms import v2

from datasets import synthetic
from datasets.augment import Augmentation
from datasets.loaders import train_loader
from datasets.tensors import TensorDataset

SHIFT = 2
PREFETCHED = 2  # batches per worker, DataLoader's default
FOREVER = 10**9  # samples; the clock ends the run
WARMUP_BATCHES = 5


class Samples(Dataset):
    """Single samples of a data set in memory, through a transform of PIL images or of uint8 tensors."""

    def __init__(self, images: Any, targets: list[int], transform: Callable[[Any], Tensor]) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def single_samples(train: TensorDataset, kind: str, batch_size: int, workers: int) -> Iterator[Any]:
    """Batches without end from a DataLoader: `pil` as most tutorials do it, `v2` the same on uint8 tensors."""
    images: Any = train.inputs
    transform: Callable[[Any], Tensor] = v2.Compose([
        v2.RandomCrop(32, padding=SHIFT, padding_mode="reflect"), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(synthetic.MEAN), list(synthetic.STD)),
    ])
    if kind == "pil":
        images = images.permute(0, 2, 3, 1).contiguous().numpy()
        transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomCrop(32, padding=SHIFT, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(synthetic.MEAN, synthetic.STD),
        ])
    samples = Samples(images, train.targets.tolist(), transform)
    sampler = RandomSampler(samples, replacement=True, num_samples=FOREVER)
    return iter(DataLoader(samples, batch_size=batch_size, sampler=sampler, num_workers=workers))


def whole_batches(train: TensorDataset, batch_size: int) -> Iterator[Any]:
    """Ours, epoch after epoch."""
    augmentation = Augmentation(seed=0, mean=synthetic.MEAN, std=synthetic.STD, shift=SHIFT, flip="random")
    loader = train_loader(train, augmentation, batch_size=batch_size, rank_batch_size=batch_size, rank=0, world_size=1,
                          seed=0, device=torch.device("cpu"))
    assert loader is not None
    for epoch in itertools.count():
        yield from loader.batches(epoch, 0)


def images_per_second(batches: Iterator[Any], *, skipped: int, seconds: float) -> float:
    """Whole batches over the time they took."""
    for _ in range(skipped):
        next(batches)
    num_images, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        num_images += len(next(batches)[0])
    return num_images / (time.perf_counter() - began)


def main() -> None:
    """Time one variant and print `{"variant", "images_per_second"}`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", help="pil:WORKERS, v2:WORKERS or batch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4)
    flags = parser.parse_args()
    match = re.fullmatch(r"(pil|v2):(\d+)|batch", flags.variant)
    if match is None:
        parser.error(f"{flags.variant}: must be pil:WORKERS, v2:WORKERS or batch")
    torch.set_num_threads(1)
    train, _ = synthetic.load(num_test=10)
    workers = int(match[2] or 0)
    if match[1] is None:
        batches = whole_batches(train, flags.batch_size)
    else:
        batches = single_samples(train, match[1], flags.batch_size, workers)
    rate = images_per_second(batches, skipped=WARMUP_BATCHES + PREFETCHED * workers, seconds=flags.seconds)
    print(json.dumps({"variant": flags.variant, "images_per_second": rate}))


if __name__ == "__main__":
    main()
