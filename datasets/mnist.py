"""MNIST (LeCun, Cortes and Burges, 1998): 60,000 training and 10,000 test images of 28x28 pixels, handwritten digits.
From IDX files, plain or .gz, in `data_dir/MNIST/raw` (torchvision's), `data_dir/MNIST` or `data_dir`, or mnist.npz."""

import lzma
import tokenize
import zipfile
from pathlib import Path

import numpy as np
from torchvision.datasets import MNIST

from datasets import idx, tensors
from datasets.download import fetch
from datasets.errors import DAMAGED, DataError

MEAN, STD = (0.1307,), (0.3081,)  # over the 60,000 training images; tests/test_mnist.py recomputes them
CLASS_NAMES = tuple("0123456789")
NPZ_KEYS = (  # images and labels of the training set, then of the test set
    ("x_train", "y_train", "x_test", "y_test"),  # Keras
    ("trainInps", "trainTargs", "testInps", "testTargs"))  # flat images, one-hot labels
# RuntimeError for encrypted or deeply nested content, NotImplementedError for a method of compression
DAMAGED_ARCHIVE = (*DAMAGED, RuntimeError, NotImplementedError, zipfile.BadZipFile, lzma.LZMAError, tokenize.TokenError)


def load(data_dir: Path, *, train: bool = True) -> tensors.Splits:
    """The training and test split; DataError if files are missing or damaged."""
    for folder in (data_dir / "MNIST" / "raw", data_dir / "MNIST", data_dir):
        if list(folder.glob("t*ubyte*")):
            return idx.load(folder, CLASS_NAMES, train=train)  # says which of the four is missing
        if (folder / "mnist.npz").is_file():
            return load_npz(folder / "mnist.npz")
    raise DataError(f"--data-dir {data_dir}: MNIST is not there, neither its IDX files nor mnist.npz; add --download, "
                    f"or train on --dataset synthetic")


def prepare(data_dir: Path, *, download: bool, train: bool = True) -> None:
    """Fetch the four files, if they are not there; for one process per node. DataError as `fetch` raises."""
    if download:
        fetch(lambda folder: MNIST(folder, download=True), data_dir, "MNIST", load=load)


def load_npz(path: Path) -> tensors.Splits:
    """Both splits from one file, whose keys say of which kind it is. Python objects in it are never unpickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = next((names for names in NPZ_KEYS if set(names) <= set(archive.files)), None)
            if names is None:
                raise DataError(f"{path}: holds {', '.join(archive.files) or 'nothing'}, not "
                                f"{' or '.join(', '.join(names) for names in NPZ_KEYS)}; fetch the file again")
            size = sum(member.file_size for member in archive.zip.infolist())
            if size > idx.MOST_BYTES:  # a small archive may unpack to any size
                raise DataError(f"{path}: unpacks to {size:,} bytes, above {idx.MOST_BYTES:,}; fetch the file again")
            arrays = [archive[name] for name in names]
    except DAMAGED_ARCHIVE as error:
        reason = "holds Python objects" if "allow_pickle" in str(error) else f"cannot be read ({error})"
        raise DataError(f"{path}: {reason}; only arrays of numbers are read, fetch the file again") from None
    return split_of(*arrays[:2], path=path, names=names[:2]), split_of(*arrays[2:], path=path, names=names[2:])


def split_of(images: np.ndarray, labels: np.ndarray, *, path: Path, names: tuple[str, ...]) -> tensors.TensorDataset:
    """One split from images (N, 784), (N, 28, 28) or with one channel, and labels (N,) or one-hot (N, 10)."""
    source = f"{path}: {names[0]} and {names[1]}"
    if images.ndim < 2 or images[:1].size not in (0, idx.SIZE**2):
        raise DataError(f"{source}: images of shape {images.shape[1:]}, not 28 x 28; fetch the file again")
    if images.dtype != np.uint8 and images.size:  # numbers within 0 to 1 or 0 to 255
        if images.dtype.kind not in "uif" or not (images.min() >= 0 and images.max() <= 255):  # false for NaN, too
            raise DataError(f"{source}: pixels of type {images.dtype} outside 0 to 255; fetch the file again")
        images = np.rint(images * (255 if images.dtype.kind == "f" and images.max() <= 1 else 1))
    images = images.reshape(len(images), idx.SIZE, idx.SIZE).astype(np.uint8)
    if labels.shape[1:] == (len(CLASS_NAMES),) and ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all():
        labels = labels.argmax(1)
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise DataError(f"{source}: labels of type {labels.dtype} and shape {labels.shape}, not whole numbers or "
                        f"one-hot; fetch the file again")
    return idx.in_memory(images, labels.astype(np.int64), CLASS_NAMES, source=source)
