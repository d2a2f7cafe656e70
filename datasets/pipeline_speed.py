"""Images per second that one way of loading and augmenting delivers; launch/benchmark.py --pipeline compares them.

    python datasets/pipeline_speed.py pil:2          # torchvision's PIL transforms in 2 workers; v2:2 on tensors; batch
    python datasets/pipeline_speed.py timm:1 --data-dir photos     # photographs in files; torchvision:1, ours:1

Of drawn 32x32 images, a random crop after reflect padding by 2; of photographs, one of 8 to 100 % of the area at 224; a
random flip, normalise. `timm:2+network` trains a trivial network too. What workers prefetched is used up before."""

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from operator import getitem
from pathlib import Path
from typing import Any

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from datasets import augment, image_folder, synthetic, tensors
from datasets.images import loaders, packed, unreadable
from datasets.loaders import memory_loaders
from datasets.transforms import Images, Transformed

SHIFT = 2
MANY_BATCHES = 2000  # in a row; between epochs workers would run dry, more often the smaller the folder
SIZE, SMALLEST_AREA = 224, 0.08  # of photographs
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision and timm have them


def single_samples(train: tensors.TensorDataset, kind: str, batch_size: int, workers: int) -> Iterator[Any]:
    """Batches without end from a DataLoader: `pil` as most tutorials do it, `v2` the same on uint8 tensors."""
    images: Any = train.inputs
    if kind == "pil":
        images = images.permute(0, 2, 3, 1).contiguous().numpy()
        transform: Callable[[Any], Tensor] = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomCrop(32, padding=SHIFT, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(synthetic.MEAN, synthetic.STD)])
    else:
        transform = v2.Compose([v2.RandomCrop(32, padding=SHIFT, padding_mode="reflect"), v2.RandomHorizontalFlip(),
                                v2.ToDtype(torch.float32, scale=True), v2.Normalize(synthetic.MEAN, synthetic.STD)])
    samples = Transformed(Images(partial(getitem, images), train.targets), transform, transform, train=True)
    return endless(samples, batch_size, workers)


def endless(samples: Any, batch_size: int, workers: int) -> Iterator[Any]:
    """Batches from a DataLoader of a map-style data set; the clock ends the run."""
    sampler = RandomSampler(samples, replacement=True, num_samples=10**9)
    return iter(DataLoader(samples, batch_size, sampler=sampler, num_workers=workers))


def whole_batches(train: tensors.TensorDataset, batch_size: int) -> Iterator[Any]:
    """Ours, epoch after epoch."""
    augmentation = augment.Augmentation(seed=0, mean=synthetic.MEAN, std=synthetic.STD, shift=SHIFT, flip="random")
    loader = memory_loaders({"train": train}, augmentation, batch_size=batch_size, rank_batch_size=batch_size, rank=0,
                            world_size=1, seed=0, device=torch.device("cpu"))["train"]
    for epoch in itertools.count():
        yield from loader.batches(epoch, 0)


def mean_color(num_classes: int) -> nn.Module:
    """A network of images (B, 3, H, W) that costs nothing: all time is that of data and loop."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


def photographs(kind: str, data_dir: Path, batch_size: int, workers: int) -> Iterator[Any]:
    """Batches of photographs without end, or waits between epochs, by `torchvision`, `timm` or `ours` (packs, too)."""
    if kind == "ours":
        tree, _ = (packed if packed.is_pack(data_dir) else image_folder).load(data_dir)
        assert tree is not None
        decoding = loaders.Decoding(splits={"train": tree}, size=SIZE, smallest_area=SMALLEST_AREA)
        augmentation = augment.Augmentation(seed=0, mean=MEAN, std=STD, flip="random")
        read = loaders.DecodedImages("train", tree.targets, loaders.Decoder(decoding, workers=workers), augmentation,
                                     unreadable.BadImages(0), device=torch.device("cpu"))
        parts = [torch.randint(len(tree), (batch_size,)) for _ in range(MANY_BATCHES)]
        return itertools.chain.from_iterable(read(parts, epoch) for epoch in itertools.count())
    if kind == "torchvision":  # as in its references/classification, without an automatic policy
        return endless(ImageFolder(str(data_dir / "train"), transforms.Compose([
            transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float32), transforms.Normalize(MEAN, STD)])), batch_size, workers)
    from timm.data import create_dataset, create_loader  # pyright: ignore[reportMissingImports]

    photos: Any = create_dataset("", str(data_dir / "train"), is_training=True)
    loader: Any = create_loader(photos, (3, SIZE, SIZE), batch_size, is_training=True, num_workers=workers,
                                color_jitter=0.0, interpolation="bilinear", device=torch.device("cpu"),
                                use_multi_epochs_loader=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def trained_on(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, each after a step of a trivial network on it."""
    model = mean_color(1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for images, labels in batches:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield images, labels


def main() -> None:
    """Time one variant, in whole batches, and print `{"variant", "images_per_second"}`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", help="pil:N, v2:N, batch; torchvision:N, timm:N, ours:N [+network], of N workers")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4)
    flags = parser.parse_args()
    names = "torchvision|timm|ours" if flags.data_dir else "pil|v2"
    match = re.fullmatch(rf"({names}):(\d+)(\+network)?|batch", flags.variant)
    if match is None:
        parser.error(f"{flags.variant}: must be as --help says")
    torch.set_num_threads(1)
    workers = int(match[2] or 0)
    if flags.data_dir:
        batches = photographs(match[1], flags.data_dir, flags.batch_size, workers)
    elif match[1] is None:
        batches = whole_batches(synthetic.load(num_test=10)[0], flags.batch_size)
    else:
        batches = single_samples(synthetic.load(num_test=10)[0], match[1], flags.batch_size, workers)
    batches = trained_on(batches) if match[3] else batches
    for _ in range(5 + 2 * workers):  # which prefetch two each
        next(batches)
    num_images, began = 0, time.perf_counter()
    while time.perf_counter() - began < flags.seconds:
        num_images += len(next(batches)[0])
    print(json.dumps({"variant": flags.variant, "images_per_second": num_images / (time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
