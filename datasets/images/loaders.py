"""Images decoded while training: DataLoader workers, which keep no state, read files; the device augments batches."""

import atexit
import multiprocessing
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from datasets.augment import Augmentation, KeyedTransforms
from datasets.errors import DataError
from datasets.images import packed, unreadable
from datasets.images.read import BadImage, FitName, InterpolationName, random_window, to_square
from datasets.images.workers import PREFETCHED, blocked_signals, empty_batch, end_workers, start_worker, worker_context
from datasets.loaders import Batch, sent

Bad = list[tuple[str, str]]  # path and reason of each unreadable image


class Key(NamedTuple):
    """One batch to decode: which images of which split, and the epoch that their random choices belong to."""
    split: str
    samples: list[int]
    epoch: int


class DecodedBatch(NamedTuple):
    """What a worker sends back."""
    images: Tensor  # uint8 (B, 3, size, size)
    samples: list[int]  # those asked for (B,), less those that nothing could replace
    sources: list[int]  # the images that are shown (B,): other ones where a sample was unreadable
    bad: Bad


@dataclass(frozen=True, kw_only=True)
class Decoding(Dataset[Any]):
    """The work of one worker: files to a batch of uint8 images. It is copied to every worker, and holds no state."""
    splits: Mapping[str, packed.ImageSource]
    size: int
    fit: FitName = "squash"
    resize_size: int | None = None
    interpolation: InterpolationName | None = None
    seed: int = 0
    smallest_area: float = 1.0  # of the random windows of training images; 1 for none
    skip_bad: int = 0  # how many unreadable training images may follow each other
    train_size: int | None = None  # of training images, if it is another than that of the others
    keyed: KeyedTransforms | None = None  # of training images, before they leave the worker
    threads: int = 1  # that crop and resize stored pixels, where there is no worker

    def __getitem__(self, key: Key) -> DecodedBatch | DataError:
        size = self.size_of(key.split)
        images = empty_batch(len(key.samples), size, size, 3).permute(0, 3, 1, 2)  # as they are stored, and resized
        threads = self.threads if self.splits[key.split].raw and get_worker_info() is None else 1
        shown: list[int | None] = [None] * len(key.samples)
        bad: Bad = []

        def fill(first: int) -> None:
            for row in range(first, len(shown), threads):
                shown[row] = self.fill(images[row], key, key.samples[row], bad)

        try:
            if threads == 1:
                fill(0)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(fill, range(threads)))
        except DataError as error:
            return error  # which no worker could raise in one line
        rows = [row for row, each in enumerate(shown) if each is not None]
        images, samples = images if len(rows) == len(shown) else images[rows], [key.samples[row] for row in rows]
        if self.keyed is not None and key.split == "train":
            self.keyed(images, samples, key.epoch)
        return DecodedBatch(images, samples, [each for each in shown if each is not None], bad)

    def size_of(self, split: str) -> int:
        """Height and width of its images."""
        return self.train_size or self.size if split == "train" else self.size

    def fill(self, image: Tensor, key: Key, sample: int, bad: Bad) -> int | None:
        """Fill in the image of a sample, in training of the next readable one; returns which, if any. Adds to `bad`."""
        num_images = len(self.splits[key.split])
        for offset in range(min(self.skip_bad + 1, num_images) if key.split == "train" else 1):
            shown = (sample + offset) % num_images
            try:
                image.copy_(self.read(key, sample, shown))
                return shown
            except BadImage as error:
                bad.append((str(self.splits[key.split].path(shown)), str(error)))
        return None

    def read(self, key: Key, sample: int, shown: int) -> Tensor:
        """One image; a random window of it where training asks for that."""
        content, window, size = self.splits[key.split].read(shown), None, self.size_of(key.split)
        if self.splits[key.split].fitted and not isinstance(content, bytes | memoryview):
            return torch.from_numpy(content).permute(2, 0, 1)
        if key.split == "train" and self.smallest_area < 1:
            window = random_window(sample, seed=self.seed, epoch=key.epoch, smallest_area=self.smallest_area)
        resize_size = self.resize_size and round(self.resize_size * size / self.size)
        return to_square(content, size=size, fit=self.fit, window=window, resize_size=resize_size,
                         interpolation=self.interpolation)


@dataclass(frozen=True, kw_only=True)
class FromMemory(Dataset[DecodedBatch]):
    """The same work where the images (N, C, H, W) are in memory, which all workers share."""
    images: Tensor
    keyed: KeyedTransforms

    def __getitem__(self, key: Key) -> DecodedBatch:
        return DecodedBatch(self.keyed(self.images[key.samples], key.samples, key.epoch), key.samples, key.samples, [])


class Decoder:
    """A pool of workers that turns keys into batches, in order; without workers, this process decodes."""

    def __init__(self, decoding: Dataset[Any], *, workers: int = 0, pin_memory: bool = False,
                 prepare_worker: Callable[[], None] | None = None) -> None:
        self.workers = workers
        self.keys: list[Key] = []  # what to decode next: replaced before each pass
        self.processes: list[BaseProcess] = []
        workers_end, lifeline = multiprocessing.Pipe(duplex=False)
        self.end_workers = weakref.finalize(self, end_workers, self.processes, lifeline)
        atexit.register(self.end_workers)  # before multiprocessing waits for workers that an error has left behind
        self.loader = DataLoader(
            decoding, batch_size=None, sampler=self.keys, num_workers=workers, pin_memory=pin_memory,
            collate_fn=as_it_is, multiprocessing_context=worker_context() if workers else None,  # pyright: ignore
            prefetch_factor=PREFETCHED if workers else None, persistent_workers=workers > 0,
            worker_init_fn=partial(start_worker, prepare_worker, workers_end) if workers else None,
            generator=torch.Generator())  # its own: numbers taken from torch's would alter the dropout of this step

    def decode(self, split: str, parts: Sequence[Tensor], epoch: int) -> Iterator[Any]:
        """A `Read` of any split; raises what stands in the place of a batch, and DataError if a worker dies."""
        return map(unless_failed, self.batches([Key(split, part.tolist(), epoch) for part in parts]))

    def batches(self, keys: list[Key]) -> Iterator[Any]:
        """What the workers make of these keys, in order."""
        self.keys[:] = keys
        try:
            with blocked_signals():
                before = multiprocessing.active_children()
                batches = iter(self.loader)
                self.processes += [each for each in multiprocessing.active_children() if each not in before]
            yield from batches
        except (RuntimeError, EOFError, OSError) as error:  # the last two when it dies while it hands a batch over
            if self.workers == 0 or str(error).startswith("Caught "):  # raised by our code in a worker: a bug
                raise
            raise DataError(f"--workers {self.workers}: a DataLoader worker was killed or lost (out of memory?); start "
                            f"the same command again, perhaps with fewer") from None
        except BaseException as error:
            if not isinstance(error, GeneratorExit):  # a stop, in a wait for a worker that may never answer
                self.end_workers()
            raise


def unless_failed(batch: Any) -> Any:
    """A batch; raises the error that stands in its place."""
    if isinstance(batch, BaseException):
        raise batch
    return batch


def as_it_is(batch: Any) -> Any:
    """DataLoader's collate function: batches come out of the data set whole."""
    return batch


class DecodedImages:
    """A `Read` of one split: images decoded by workers, augmented (`train`) or normalised a whole batch at a time."""

    def __init__(self, split: str, targets: Tensor, decoder: Decoder, augmentation: Augmentation,
                 bad_images: unreadable.BadImages, *, device: torch.device) -> None:
        self.split, self.targets, self.decoder, self.augmentation = split, targets, decoder, augmentation
        self.bad_images, self.device = bad_images, device

    def __call__(self, parts: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        """The batches, without images that nothing may replace; DataError for one too many, or a dead worker. Before
        the last of several, all ranks compare bad images: not at the first, which rank 0 may take alone."""
        for number, batch in enumerate(self.decoder.decode(self.split, parts, epoch), start=1):
            self.bad_images.add(batch.bad)
            if self.split == "train" and number == len(parts) > 1:
                self.bad_images.share()
            images, samples = (sent(tensor, self.device) for tensor in (batch.images, torch.tensor(batch.samples)))
            if self.split == "train":
                yield self.augmentation(images, samples, epoch=epoch), self.targets[batch.sources]
            elif batch.sources:
                yield self.augmentation.normalize(images), self.targets[batch.sources]
