"""CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 pixels in ten classes, in memory."""

import shutil
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from datasets.download import fetch, install
from datasets.errors import DataError
from datasets.tensors import Splits, TensorDataset

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of training images; see tests/test_cifar.py


class TestBatch(CIFAR10):
    """The test batch alone: CIFAR10 checks all six files to read one."""
    train_list: ClassVar = []


def load(data_dir: Path, *, train: bool = True) -> Splits:
    """Training and test split from `data_dir/cifar-10-batches-py`, checked by md5; DataError if missing or damaged."""
    try:
        training = CIFAR10(str(data_dir), train=True) if train else None
        test = TestBatch(str(data_dir), train=False)
    except (RuntimeError, OSError, ValueError, KeyError, EOFError) as error:
        missing = not (data_dir / CIFAR10.base_folder).is_dir()
        raise DataError(f"--data-dir {data_dir}: CIFAR-10 is {'not there' if missing else f'damaged ({error})'}; add "
                        f"--download, put {CIFAR10.filename} there, or train on --dataset synthetic") from None
    return in_memory(training) if training is not None else None, in_memory(test)


def in_memory(dataset: CIFAR10) -> TensorDataset:
    """torchvision's (N, 32, 32, 3) array and list of labels, as tensors with the channels first."""
    return TensorDataset(inputs=torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(),
                         targets=torch.tensor(dataset.targets), class_names=tuple(dataset.classes))


def prepare(data_dir: Path, *, download: bool, train: bool = True) -> None:
    """Unpack the published archive where files of it are missing, or fetch them; one process per node. DataError."""
    folder, archive = data_dir / CIFAR10.base_folder, data_dir / CIFAR10.filename
    files = [name for name, _ in (*CIFAR10.train_list[: 5 * train], *CIFAR10.test_list)] + [CIFAR10.meta["filename"]]
    if archive.is_file() and not all((folder / name).is_file() for name in files):
        if check_integrity(archive, CIFAR10.tgz_md5):
            install(partial(shutil.unpack_archive, archive), data_dir, CIFAR10.base_folder)
        elif not download:
            raise DataError(f"{archive}: is damaged, or not the published one (its md5 is another than "
                            f"{CIFAR10.tgz_md5}); fetch {CIFAR10.url} again, or add --download")
    if download:
        fetch(lambda place: CIFAR10(place, download=True), data_dir, folder.name, load=partial(load, train=train))
