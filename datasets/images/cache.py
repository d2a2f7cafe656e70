"""Decoded images in one uint8 file that all ranks of a node map into memory: files are decoded once, not every epoch.

    cache = ImageCache(tree, "train", folder, size=32, fit="squash")
    if not cache.exists():
        for num_done in cache.build(decoder, bad_images): ...      # one rank per node; the others wait
    dataset = cache.open(bad_images)

The name carries a fingerprint of the folder (names, sizes, modification times), the image size and the decoder's
versions, so a cache is never stale. The file is renamed into place whole, and its record, written last, commits it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from datasets.augment import Augmentation
from datasets.errors import DataError
from datasets.images.loaders import Decoder, Key
from datasets.images.read import DECODER, FitName, InterpolationName
from datasets.images.source import ImageSource
from datasets.images.unreadable import BadImages
from datasets.tensors import TensorDataset

FORMAT = 1
BATCH_SIZE = 8  # few, so that progress is marked often also while large images are decoded


class ImageCache:
    """The cache of one split; `folder` may hold many."""

    def __init__(self, tree: ImageSource, split: str, folder: Path, *, size: int, fit: FitName,
                 resize_size: int | None = None, interpolation: InterpolationName | None = None) -> None:
        what = f"{FORMAT} {tree.fingerprint(times=True)} {size} {fit} {DECODER} {torchvision.__version__}"
        what += f" {resize_size} {interpolation}" if resize_size or interpolation else ""
        name = f"{split}-{size}px-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
        self.tree, self.split, self.size = tree, split, size
        self.path, self.record_path = folder / f"{name}.u8", folder / f"{name}.json"

    @property
    def num_bytes(self) -> int:
        """Size of the file when every image is readable."""
        return len(self.tree) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Size of one image."""
        return 3 * self.size * self.size

    def exists(self) -> bool:
        """Whether it was built, and is still as long as it was."""
        return self.record() is not None

    def record(self) -> dict[str, Any] | None:
        """What was written when it was built: the image in each row, and what was unreadable; None if there is none."""
        try:
            record = json.loads(self.record_path.read_text())
            return record if self.path.stat().st_size == len(record["sources"]) * self.row_bytes else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def build(self, decoder: Decoder, bad_images: BadImages) -> Generator[int]:
        """Decode all images into the file, in order; yields how many are done, after every few.

        Closing the iterator early leaves nothing behind.

        Raises:
            DataError: if the folder cannot be written or is too full, or for an image that may not be skipped.
        """
        sources: list[int] = []
        bad: list[tuple[str, str]] = []
        temporary = self.path.with_name(f".{self.path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        samples = torch.arange(len(self.tree))
        try:
            self.make_room()
            with open(temporary, "wb") as file:
                for batch in decoder.decode([Key(self.split, some.tolist(), 0) for some in samples.split(BATCH_SIZE)]):
                    bad_images.add(batch.bad)
                    bad += batch.bad
                    sources += batch.sources
                    file.write(batch.images.numpy().tobytes())  # not into a map: a full disk would kill the process
                    yield len(sources)
                file.flush()
                os.fsync(file.fileno())
            self.record_path.unlink(missing_ok=True)
            os.replace(temporary, self.path)
            self.commit({"sources": sources, "bad": bad})
        except OSError as error:
            raise DataError(f"--cache-dir {self.path.parent}: cannot be written ({error.strerror}); choose a folder "
                            f"that can") from None
        finally:
            with contextlib.suppress(OSError):  # no such file, or no such folder
                temporary.unlink()

    def make_room(self) -> None:
        """Create the folder, remove what killed builders left in it, and make sure that the file will fit.

        Raises:
            DataError: if not.
            OSError: as the file system says.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in self.path.parent.glob(f".*.{socket.gethostname()}.*.tmp"):
            if not is_alive(int(path.name.split(".")[-2])):
                path.unlink(missing_ok=True)
        free = shutil.disk_usage(self.path.parent).free
        if free < self.num_bytes:
            raise DataError(f"--cache-dir {self.path.parent}: the cache needs {self.num_bytes / 2**20:.0f} MiB and "
                            f"{free / 2**20:.0f} MiB are free; choose another folder, or leave --cache out")

    def commit(self, record: dict[str, Any]) -> None:
        """Write the record, which makes the cache valid."""
        temporary = self.record_path.with_name(f".{self.record_path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        with open(temporary, "w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.record_path)

    def open(self, bad_images: BadImages) -> TensorDataset:
        """The images, mapped from the file: ranks that open the same one share its memory.

        Raises:
            DataError: if more images were unreadable than may be skipped now, or the file is gone.
        """
        record = self.record()
        if record is None:
            raise DataError(f"--cache-dir {self.path.parent}: the cache built for this run is gone; choose a folder "
                            f"that every rank of the node sees and nothing clears")
        bad_images.add(tuple(item) for item in record["bad"])
        self.file, self.num_mapped_bytes = open(self.path, "rb"), len(record["sources"]) * self.row_bytes
        rows = np.memmap(self.file, np.uint8, mode="c", shape=(len(record["sources"]), 3, self.size, self.size))
        return TensorDataset(inputs=torch.from_numpy(rows), targets=self.tree.targets[record["sources"]],
                             class_names=self.tree.class_names)

    def check(self) -> None:
        """Raise DataError if the open file was cut short: to read there would kill the process (SIGBUS)."""
        if os.fstat(self.file.fileno()).st_size < self.num_mapped_bytes:
            raise DataError(f"--cache-dir {self.path.parent}: {self.path.name} was cut short while in use; start the "
                            f"same command again, which builds it again")


class GatherThenAugment:
    """An augmentation for images in a cache: padding them all at once would copy the file into every rank's memory."""

    def __init__(self, augmentation: Augmentation, check: Callable[[], None] = lambda: None) -> None:
        self.augmentation, self.check = augmentation, check

    def normalize(self, images: Tensor) -> Tensor:
        """As the augmentation does, if they are all there."""
        self.check()
        return self.augmentation.normalize(images)

    def prepare(self, images: Tensor) -> Tensor:
        """Nothing."""
        return images

    def __call__(self, prepared: Tensor, samples: Tensor, *, epoch: int) -> Tensor:
        """The inputs of these samples in this epoch, the same as when they are decoded each time."""
        self.check()
        return self.augmentation.batch(prepared[samples], samples, epoch=epoch)


def is_alive(pid: int) -> bool:
    """Whether a process of this host exists."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True  # another user's
        return True
    return False
