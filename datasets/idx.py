"""The IDX files of MNIST and of the data sets in its format: a big-endian header and unsigned bytes, maybe gzipped."""

import gzip
import math
from pathlib import Path

import numpy as np
import torch

from datasets.errors import DAMAGED, DataError
from datasets.tensors import Splits, TensorDataset

SIZE = 28  # pixels on each side
MOST_BYTES = 2**30  # of one file, unpacked; MNIST's largest has 47 million
REMEDY = "fetch the file again, or train on --dataset synthetic"


def load(folder: Path, class_names: tuple[str, ...], *, train: bool = True) -> Splits:
    """Both splits from a folder's four files, plain or .gz; DataError if one is missing, damaged or unlike the rest."""
    return load_split(folder, "train", class_names) if train else None, load_split(folder, "t10k", class_names)


def load_split(folder: Path, split: str, class_names: tuple[str, ...]) -> TensorDataset:
    """One split: images uint8 (N, 1, 28, 28) and labels int64 (N,)."""
    images, labels = find(folder, f"{split}-images", 3), find(folder, f"{split}-labels", 1)
    return in_memory(read(images, 3), read(labels, 1), class_names, source=f"{images} and {labels.name}")


def find(folder: Path, stem: str, num_dimensions: int) -> Path:
    """The file of one part, plain rather than .gz; DataError if there is none."""
    names = [f"{stem}{mark}idx{num_dimensions}-ubyte{end}" for end in ("", ".gz") for mark in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"--data-dir: {folder / names[0]} (or .gz) is not there; add --download, or --dataset synthetic")


def in_memory(images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], *, source: str) -> TensorDataset:
    """Checked arrays, images uint8 (N, 28, 28) and labels of any integer type (N,), as a data set; else DataError."""
    if images.shape[1:] != (SIZE, SIZE):
        raise DataError(f"{source}: images of {' x '.join(map(str, images.shape[1:]))} pixels, not {SIZE} x {SIZE}; "
                        f"{REMEDY}")
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(f"{source}: {len(images)} images and {len(labels)} labels; {REMEDY}")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise DataError(f"{source}: labels {labels.min()} to {labels.max()} of {len(class_names)} classes; {REMEDY}")
    inputs, targets = torch.tensor(images).unsqueeze(1), torch.tensor(labels, dtype=torch.int64)
    return TensorDataset(inputs=inputs, targets=targets, class_names=class_names)


def read(path: Path, num_dimensions: int) -> np.ndarray:
    """The array in one file: uint8, of as many dimensions as asked for; DataError for another header or length."""
    magic, header_size = bytes([0, 0, 8, num_dimensions]), 4 * (1 + num_dimensions)  # 8: of unsigned bytes
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(header_size)
            shape = [int(size) for size in np.frombuffer(header[4 : len(header) // 4 * 4], ">u4")]
            expected = math.prod(shape)  # in Python integers: a damaged header overflows others
            content = file.read(expected + 1 if expected <= MOST_BYTES else 0)  # a small archive may unpack to any size
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    if header[:4] != magic:
        raise DataError(f"{path}: begins with {header[:4].hex() or 'nothing'}, an IDX file of {num_dimensions} "
                        f"dimensions with {magic.hex()}; {REMEDY}")
    if len(header) < header_size or len(content) != expected:
        raise DataError(f"{path}: {len(header) + len(content)} bytes, of at most {MOST_BYTES:,}, were read, and its "
                        f"header says {header_size + expected}; {REMEDY}")
    return np.frombuffer(content, np.uint8).reshape(shape)
