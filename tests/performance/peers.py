"""The other side of each comparison, as anyone would write it: `peers.py NAME batch=128 steps=50` prints JSON.

Every peer gets drawn images like those of the trainer (32x32, or 28x28 digits), one thread, and prints how many samples
a second it trained on, after a few untimed steps. Under torchrun `ddp`, `fabric` and `accelerate` have several ranks.
"""

import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms
from torchvision.transforms import v2

from datasets import synthetic, synthetic_digits
from launch.machine import keep_freed_memory
from trainers import models

Step = Callable[[Tensor, Tensor], object]


class Pictures(Dataset[Any]):
    """An array of images in memory, handed out one by one as PIL images, as torchvision's CIFAR10 does."""

    def __init__(self, transform: Callable[[Any], Tensor], *, digits: bool = False) -> None:
        train, _ = synthetic_digits.load(seed=0) if digits else synthetic.load(num_test=10)
        self.pixels = (train.inputs[:, 0] if digits else train.inputs.permute(0, 2, 3, 1).contiguous()).numpy()
        self.targets, self.transform = train.targets.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.targets[index]


HALF = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
HALF_V2 = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


def timed(batches: Iterator[Any], step: Step, *, steps: int, batch: int, ranks: int = 1) -> dict[str, float]:
    """Samples per second of the ranks together, by the clock, and of this process by its CPU time."""
    for images, labels in itertools.islice(batches, max(5, steps // 5)):
        step(images, labels)
    began, used = time.perf_counter(), time.process_time()
    for images, labels in itertools.islice(batches, steps):
        step(images, labels)
    samples = steps * batch
    return {"samples_per_second": samples * ranks / (time.perf_counter() - began),
            "samples_per_cpu_second": samples / (time.process_time() - used)}


def forever(loader: Any) -> Iterator[Any]:
    """A loader's batches, epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer,
               backward: Callable[[Tensor], object] = Tensor.backward) -> Step:
    """One optimizer step, and nothing else."""
    loss_of = nn.CrossEntropyLoss()

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        backward(loss_of(model(images), labels))
        optimizer.step()
    return step


def tutorial(*, steps: int, batch: int = 4) -> dict[str, float]:
    """The loop of PyTorch's CIFAR-10 tutorial: PIL, two workers, a running loss read at every step."""
    loader = DataLoader(Pictures(HALF), batch_size=batch, shuffle=True, num_workers=2)
    net, criterion = models.Net(10), nn.CrossEntropyLoss()
    optimizer, running = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9), [0.0]

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        loss = criterion(net(images), labels)
        loss.backward()
        optimizer.step()
        running[0] += loss.item()
    return timed(forever(loader), step, steps=steps, batch=batch)


def bare(*, steps: int, batch: int, model: str = "net", onednn: int = 1) -> dict[str, float]:
    """The same maths as the trainer's from tensors in memory, without all that a trainer adds."""
    torch.backends.mkldnn.enabled = bool(onednn)
    keep_freed_memory()  # worth more than what is compared
    train, _ = synthetic.load(num_test=10)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for indices in torch.randperm(len(train)).split(batch):
                if len(indices) == batch:
                    yield train.inputs[indices].float().mul_(1 / 127.5).sub_(1), train.targets[indices]

    net = models.build(model, num_classes=10).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    return timed(batches(), plain_step(net, optimizer), steps=steps, batch=batch)


def distributed(kind: str, *, steps: int, batch: int, model: str = "net", workers: int = 0) -> dict[str, float]:
    """The usual set-up on several ranks: a DistributedSampler, a DataLoader with v2 transforms, and a wrapped model."""
    ranks = int(os.environ["WORLD_SIZE"])
    net = models.build(model, num_classes=10).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    pictures, share, backward = Pictures(HALF_V2), batch // ranks, Tensor.backward
    more: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0, "drop_last": True}
    loader: Any = DataLoader(pictures, share, shuffle=True, **more)
    if kind == "fabric":
        from lightning.fabric import Fabric  # pyright: ignore[reportMissingImports]

        fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp")
        fabric.launch()
        net, optimizer = fabric.setup(net, optimizer)
        loader, backward = fabric.setup_dataloaders(loader), fabric.backward
    elif kind == "accelerate":
        from accelerate import Accelerator  # pyright: ignore[reportMissingImports]

        accelerator = Accelerator(cpu=True)
        net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
        backward = accelerator.backward
    else:
        torch.distributed.init_process_group("gloo")
        net = nn.parallel.DistributedDataParallel(net)
        loader = DataLoader(pictures, share, sampler=DistributedSampler(pictures), **more)
    return timed(forever(loader), plain_step(net, optimizer, backward=backward), steps=steps, batch=share, ranks=ranks)


def mnist(*, steps: int, batch: int = 100) -> dict[str, float]:
    """The tutorial's MNIST loop: slices of float arrays in memory, a network with dropout."""
    train, _ = synthetic_digits.load(seed=0)
    images, labels = train.inputs.float() / 255, train.targets
    net = models.build("mnistnet", num_classes=10).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
    starts = forever(range(0, len(images) - batch + 1, batch))
    return timed(((images[at : at + batch], labels[at : at + batch]) for at in starts), plain_step(net, optimizer),
                 steps=steps, batch=batch)


PEERS: dict[str, Callable[..., dict[str, float]]] = {
    "tutorial": tutorial, "bare": bare, "mnist": mnist,
    **{kind: functools.partial(distributed, kind) for kind in ("ddp", "fabric", "accelerate")},
}

if __name__ == "__main__":
    torch.manual_seed(0)
    options: dict[str, Any] = dict(word.split("=", 1) for word in sys.argv[2:])
    torch.set_num_threads(int(options.pop("threads", 1)))
    figures = PEERS[sys.argv[1]](**{name: int(value) if value.isdigit() else value for name, value in options.items()})
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(figures), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a rank that ends before the other may abort it
