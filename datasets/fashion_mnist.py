"""FashionMNIST (Xiao, Rasul and Vollgraf, 2017): MNIST's format and sizes, with pictures of ten kinds of clothing."""

from pathlib import Path

from torchvision.datasets import FashionMNIST

from datasets import idx, tensors
from datasets.download import fetch
from datasets.errors import DataError

CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def load(data_dir: Path, *, train: bool = True) -> tensors.Splits:
    """Both splits from `data_dir/FashionMNIST/raw` or above, not `data_dir`, the place of MNIST's; DataError as idx."""
    folders = [data_dir / "FashionMNIST" / "raw", data_dir / "FashionMNIST"]
    for folder in folders:
        if folder.is_dir() and list(folder.glob("t*ubyte*")):
            return idx.load(folder, CLASS_NAMES, train=train)
    raise DataError(f"--data-dir {data_dir}: FashionMNIST is not there, its IDX files belong into {folders[0]}; add "
                    f"--download, or train on --dataset synthetic")


def prepare(data_dir: Path, *, download: bool, train: bool = True) -> None:
    """Fetch the four files, if they are not there; for one process per node. DataError as `fetch` raises."""
    if download:
        fetch(lambda folder: FashionMNIST(folder, download=True), data_dir, "FashionMNIST", load=load)
