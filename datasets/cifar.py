"""CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 pixels in ten classes, in memory."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10

from datasets.tensors import DataError, TensorDataset

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
        raise DataError(
            f"--data-dir {data_dir}: CIFAR-10 is {'not there' if missing else f'damaged ({first_line(error)})'}; "
            f"add --download, or train on --dataset synthetic"
        ) from None
    return in_memory(train), in_memory(test)


def in_memory(dataset: CIFAR10) -> TensorDataset:
    """torchvision's (N, 32, 32, 3) array and list of labels, as tensors with the channels first."""
    return TensorDataset(
        inputs=torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(),
        targets=torch.tensor(dataset.targets),
        class_names=tuple(dataset.classes),
    )


def download(data_dir: Path) -> None:
    """Fetch CIFAR-10 into a temporary folder and move it in place whole. For one process a node; others wait.

    Raises:
        DataError: without network, or if what arrives is damaged.
    """
    if (data_dir / CIFAR10.base_folder).is_dir():
        return
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as temporary:
            CIFAR10(temporary, download=True)
            (Path(temporary) / CIFAR10.filename).unlink(missing_ok=True)
            move_in_place(Path(temporary) / CIFAR10.base_folder, data_dir / CIFAR10.base_folder)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"--download: CIFAR-10 could not be fetched ({first_line(error)}); put it into --data-dir {data_dir} "
            f"by hand, or train on --dataset synthetic"
        ) from None


def move_in_place(source: Path, target: Path) -> None:
    """Rename, unless another node that shares the folder was faster."""
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(source, ignore_errors=True)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type."""
    return str(error).strip().split("\n")[0] or type(error).__name__
