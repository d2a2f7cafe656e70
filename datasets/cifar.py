"""CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 pixels in ten classes, in memory."""

from pathlib import Path

import torch
from torchvision.datasets import CIFAR10

from datasets.download import fetch
from datasets.errors import DataError
from datasets.tensors import TensorDataset

MEAN = (0.4914, 0.4822, 0.4465)  # per channel, over the 50,000 training images; tests/test_cifar.py recomputes it
STD = (0.2470, 0.2435, 0.2616)  # likewise


def load(data_dir: Path) -> tuple[TensorDataset, TensorDataset]:
    """The training and test split from `data_dir/cifar-10-batches-py`, checked against the published md5.

    Raises:
        DataError: if files are missing or damaged.
    """
    try:
        train, test = (CIFAR10(str(data_dir), train=is_train, download=False) for is_train in (True, False))
    except (RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
        missing = not (data_dir / CIFAR10.base_folder).is_dir()
        raise DataError(f"--data-dir {data_dir}: CIFAR-10 is {'not there' if missing else f'damaged ({error})'}; add "
                        f"--download, or train on --dataset synthetic") from None
    return in_memory(train), in_memory(test)


def in_memory(dataset: CIFAR10) -> TensorDataset:
    """torchvision's (N, 32, 32, 3) array and list of labels, as tensors with the channels first."""
    return TensorDataset(
        inputs=torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(),
        targets=torch.tensor(dataset.targets),
        class_names=tuple(dataset.classes),
    )


def download(data_dir: Path) -> None:
    """Fetch CIFAR-10. For one process per node; others wait. Raises DataError as `fetch` does."""
    fetch(lambda folder: CIFAR10(folder, download=True), data_dir, CIFAR10.base_folder, name="CIFAR-10")
