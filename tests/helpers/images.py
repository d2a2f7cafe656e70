"""Small folders and files of images for tests."""

import functools
import gzip
import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from datasets import synthetic
from datasets.augment import Augmentation
from datasets.images.loaders import DecodedImages, Decoder, Decoding
from datasets.images.packed import ImageSource
from datasets.images.read import pixels, read_file, to_square
from datasets.images.unreadable import BadImages
from datasets.loaders import split_loaders

# 20 steps in two epochs of a network without BatchNorm and dropout, every random choice on
FLAGS = ["--batch-size", "12", "--epochs", "2", "--threads", "1", "--random-crop", "0.5", "--seed", "3",
         "--no-pictures", "--workers", "0"]
NUM_TRAIN, NUM_TEST = 120, 30
PLAIN = Augmentation(seed=0, mean=(0.0,) * 3, std=(1.0,) * 3)
# one before cannot read the YCbCr that it writes, and takes a TIFF with an odd tag for no image
NEEDS_PILLOW_13 = pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="needs Pillow 13")
MOVED = Augmentation(seed=5, mean=(0.5,) * 3, std=(0.5,) * 3, shift=2, flip="random")


def open_rgb(path: str | Path, *, shortest_side: int | None = None) -> Image.Image:
    """A file as an 8-bit RGB image; arguments and errors are those of `pixels`."""
    return Image.fromarray(pixels(read_file(path), shortest_side=shortest_side))


def read_image(path: str | Path, **how: Any) -> torch.Tensor:
    """A file as uint8 (3, size, size); see `to_square`."""
    return to_square(read_file(path), **how)


def image_loaders(splits: Mapping[str, ImageSource], *, images: Augmentation = MOVED, workers: int = 0, rank: int = 0,
                  world_size: int = 1, bad_images: BadImages | None = None, evaluation_batch_size: int = 64,
                  **decoding: Any) -> dict[str, Any]:
    """The loaders of one rank: 12 images per step, of 24 pixels, with random crops and flips."""
    decoder = Decoder(Decoding(splits=splits, **{"size": 24, "seed": 5, "smallest_area": 0.4, **decoding}),
                      workers=workers)
    reads = {name: (DecodedImages(name, split.targets, decoder, images, bad_images or BadImages(0),
                                  device=torch.device("cpu")), len(split)) for name, split in splits.items()}
    return split_loaders(reads, batch_size=12, rank_batch_size=12 // world_size, seed=5, rank=rank,
                         world_size=world_size, evaluation_batch_size=evaluation_batch_size)


def write_tree(folder: Path) -> Path:
    """train/ and test/ of PNG files in ten classes of drawn shapes; returns the folder."""
    for name, content in drawn_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@functools.cache
def drawn_files() -> dict[str, bytes]:
    """The files of a tree by name, drawn once a session."""
    files = {}
    for split, first, count in (("train", 0, NUM_TRAIN), ("test", 10**6, NUM_TEST)):
        drawn = synthetic.generate(range(first, first + count), seed=0)
        for sample, (image, label) in enumerate(zip(drawn.inputs, drawn.targets.tolist(), strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="png")
            files[f"{split}/{drawn.class_names[label]}/{sample:03d}.png"] = buffer.getvalue()
    return files


def write_bomb(path: Path, *, side: int) -> Path:
    """A PNG file of a few hundred bytes whose header promises side x side pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
                     + chunk(b"IEND", b""))
    return path


def write_photos(folder: Path, *, count: int) -> Path:
    """A tree whose training images take long to decode: one photograph-sized PNG under many names."""
    for split, number in (("train", count), ("test", 2)):
        for label in ("left", "right"):
            place = folder / split / label
            place.mkdir(parents=True)
            first = place / "0000.png"
            Image.effect_noise((1600, 1200), 60).convert("RGB").save(first, compress_level=1)
            for index in range(1, number):
                (place / f"{index:04d}.png").hardlink_to(first)
    return folder


def image_tree(folder: Path, *, num_train: int = 120, num_test: int = 40) -> Path:
    """Two classes of small noisy images: train/<class>/*.png and test/<class>/*.png."""
    generator = torch.Generator().manual_seed(1)
    for split, number in (("train", num_train), ("test", num_test)):
        for index in range(number):
            label = index % 2
            pixels = torch.randint(0, 128, (36, 36, 3), generator=generator) + 100 * label
            path = folder / split / "ab"[label] / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of unsigned bytes, gzipped if its name says so."""
    header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


class Noted(torch.utils.data.Dataset):
    """Batches with where they were in the worker's shared memory when they were made; None if they were not."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding

    def __getitem__(self, key: Any) -> Any:
        batch = self.decoding[key]
        images = batch.images  # type: ignore
        return images.data_ptr() if images.is_shared() else None, batch
