"""FashionMNIST (Xiao, Rasul and Vollgraf, 2017): MNIST's format and sizes, with pictures of ten kinds of clothing."""

from pathlib import Path

from torchvision.datasets import FashionMNIST

from datasets import idx
from datasets.download import fetch
from datasets.errors import DataError
from datasets.tensors import Splits

CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def load(data_dir: Path, *, train: bool = True) -> Splits:
    """The training and test split from `data_dir/FashionMNIST/raw`, where torchvision puts it, or above.

    Never from `data_dir` itself: MNIST's files have the same names.

    Raises:
        DataError: if files are missing or damaged.
    """
    folders = [data_dir / "FashionMNIST" / "raw", data_dir / "FashionMNIST"]
    for folder in folders:
        if folder.is_dir() and list(folder.glob("t*ubyte*")):
            return idx.load(folder, CLASS_NAMES, train=train)
    raise DataError(f"--data-dir {data_dir}: FashionMNIST is not there, its IDX files belong into {folders[0]}; add "
                    f"--download, or train on --dataset synthetic")


def download(data_dir: Path) -> None:
    """Fetch the four files. For one process per node; others wait. Raises DataError as `fetch` does."""
    fetch(lambda folder: FashionMNIST(folder, download=True), data_dir, "FashionMNIST", name="FashionMNIST", load=load)
