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
    """The training and test split from four files in a folder, plain or .gz, `idx3-ubyte` after a hyphen or a dot.
    DataError if a file is missing or damaged, or does not fit the others."""
    return load_split(folder, "train", class_names) if train else None, load_split(folder, "t10k", class_names)


def load_split(folder: Path, split: str, class_names: tuple[str, ...]) -> TensorDataset:
    """One split: images uint8 (N, 1, 28, 28) and labels int64 (N,)."""
    files: list[Path] = []
    for stem, num_dimensions in ((f"{split}-images", 3), (f"{split}-labels", 1)):
        file = find(folder, stem, num_dimensions)
        if file is None:
            raise DataError(f"--data-dir: {folder / stem}-idx{num_dimensions}-ubyte (or .gz) is not there; add "
                            f"--download, or train on --dataset synthetic")
        files.append(file)
    return in_memory(read(files[0], num_dimensions=3), read(files[1], num_dimensions=1), class_names,
                     source=f"{files[0]} and {files[1].name}")


def in_memory(images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], *, source: str) -> TensorDataset:
    """Checked arrays, images uint8 (N, 28, 28) and labels of any integer type (N,), as a data set; else DataError."""
    if images.shape[1:] != (SIZE, SIZE):
        raise DataError(f"{source}: images of {' x '.join(map(str, images.shape[1:]))} pixels, not {SIZE} x {SIZE}; "
                        f"{REMEDY}")
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(f"{source}: {len(images)} images and {len(labels)} labels; {REMEDY}")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise DataError(f"{source}: labels from {labels.min()} to {labels.max()}, not within 0 to "
                        f"{len(class_names) - 1}; {REMEDY}")
    return TensorDataset(inputs=torch.tensor(images).unsqueeze(1), targets=torch.tensor(labels, dtype=torch.int64),
                         class_names=class_names)


def is_complete(folder: Path, *, train: bool = True) -> bool:
    """Whether all four files are there, in any of their spellings; without `train`, the two of the test split."""
    return all(find(folder, f"{split}-{content}", num_dimensions) for split in ("train", "t10k")[not train :]
               for content, num_dimensions in (("images", 3), ("labels", 1)))


def find(folder: Path, stem: str, num_dimensions: int) -> Path | None:
    """The file of one part, plain rather than .gz; None if there is none."""
    names = [f"{stem}{mark}idx{num_dimensions}-ubyte{end}" for end in ("", ".gz") for mark in ("-", ".")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read(path: Path, *, num_dimensions: int) -> np.ndarray:
    """The array in one file: uint8, of as many dimensions as asked for; DataError for another header or length."""
    magic, header_size = 0x0800 | num_dimensions, 4 * (1 + num_dimensions)  # 08: of unsigned bytes
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(header_size)
            shape = [int(size) for size in np.frombuffer(header[4 : len(header) // 4 * 4], ">u4")]
            expected = math.prod(shape)  # in Python integers: a damaged header overflows others
            content = file.read(expected + 1 if expected <= MOST_BYTES else 0)  # a small archive may unpack to any size
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    if len(header) < header_size or int.from_bytes(header[:4], "big") != magic:
        raise DataError(f"{path}: begins with {header[:4].hex() or 'nothing'}, an IDX file of {num_dimensions} "
                        f"dimensions with {magic:08x}; {REMEDY}")
    if expected > MOST_BYTES:
        raise DataError(f"{path}: its header says {expected:,} bytes, at most {MOST_BYTES:,} are read; {REMEDY}")
    if len(content) != expected:
        more = "at least " if len(content) > expected else ""
        raise DataError(f"{path}: {more}{header_size + len(content)} bytes, its header says {header_size + expected}; "
                        f"{REMEDY}")
    return np.frombuffer(content, np.uint8).reshape(shape)
