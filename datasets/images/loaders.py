"""Loaders for images that are decoded while training: DataLoader workers read files, the device augments whole batches.

    decoder = Decoder(Decoding(splits={"train": train, "test": test}, size=224), workers=4)
    train_loader = DecodedTrainLoader(train, decoder, augmentation, sampler, ...)
    evaluation_loader = DecodedEvaluationLoader(test, decoder, ...)

A worker is sent what to decode together with the key of its random choices (epoch and sample), and keeps no state. So
any number of workers gives the same bits, from any position in any epoch, and one pool serves both loaders.
"""

import atexit
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.augment import Augmentation, KeyedTransforms
from datasets.errors import DataError
from datasets.images.read import BadImage, FitName, InterpolationName, random_window, to_square
from datasets.images.source import ImageSource
from datasets.images.unreadable import BadImages
from datasets.images.workers import WorkerStart, blocked_signals, worker_context
from datasets.loaders import check_size
from datasets.order import ResumableSampler, evaluation_indices
from datasets.tensors import TensorDataset

Batch = tuple[Tensor, Tensor]


class Key(NamedTuple):
    """One batch to decode: which images of which split, and the epoch that their random choices belong to."""

    split: str
    samples: list[int]
    epoch: int


class DecodedBatch(NamedTuple):
    """What a worker sends back."""

    images: Tensor
    """uint8 (B, 3, size, size)."""
    samples: list[int]
    """The samples asked for (B,), less those that nothing could replace."""
    sources: list[int]
    """The images that are shown (B,): other ones where a sample was unreadable."""
    bad: list[tuple[str, str]]
    """Path and reason of each unreadable image."""


@dataclass(frozen=True, kw_only=True)
class Decoding(Dataset[DecodedBatch]):
    """The work of one worker: files to a batch of uint8 images. It is copied to every worker, and holds no state."""

    splits: Mapping[str, ImageSource]
    size: int
    fit: FitName = "squash"
    resize_size: int | None = None
    interpolation: InterpolationName | None = None
    seed: int = 0
    smallest_area: float = 1.0
    """Of the random windows of training images; 1 for none."""
    skip_bad: int = 0
    """How many unreadable training images may follow each other."""
    train_size: int | None = None
    """Of training images, if it is another than that of the others."""
    keyed: KeyedTransforms | None = None
    """Of training images, before they leave the worker."""

    def __getitem__(self, key: Key) -> DecodedBatch:
        images: list[Tensor] = []
        samples: list[int] = []
        sources: list[int] = []
        bad: list[tuple[str, str]] = []
        for sample in key.samples:
            for source in self.candidates(key.split, sample):
                try:
                    images.append(self.read(key, sample, source))
                except BadImage as error:
                    bad.append((str(self.splits[key.split].path(source)), str(error)))
                    continue
                samples.append(sample)
                sources.append(source)
                break
        batch = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        if self.keyed is not None and key.split == "train":
            self.keyed(batch, samples, key.epoch)
        return DecodedBatch(batch, samples, sources, bad)

    def candidates(self, split: str, sample: int) -> list[int]:
        """The image of a sample and, in training, those after it, of which the first readable one is shown.

        A test image is never replaced, which would count another one twice.
        """
        if split != "train":
            return [sample]
        num_samples = len(self.splits[split])
        return [(sample + offset) % num_samples for offset in range(min(self.skip_bad + 1, num_samples))]

    def read(self, key: Key, sample: int, source: int) -> Tensor:
        """One image; a random window of it where training asks for that."""
        window, size, resize_size = None, self.size, self.resize_size
        if key.split == "train" and self.smallest_area < 1:
            window = random_window(sample, seed=self.seed, epoch=key.epoch, smallest_area=self.smallest_area)
        if key.split == "train" and self.train_size is not None:
            size, resize_size = self.train_size, resize_size and round(resize_size * self.train_size / size)
        return to_square(self.splits[key.split].read(source), size=size, fit=self.fit, window=window,
                         resize_size=resize_size, interpolation=self.interpolation)


@dataclass(frozen=True, kw_only=True)
class FromMemory(Dataset[DecodedBatch]):
    """The same work where the images (N, C, H, W) are in memory, which all workers share."""

    images: Tensor
    keyed: KeyedTransforms

    def __getitem__(self, key: Key) -> DecodedBatch:
        return DecodedBatch(self.keyed(self.images[key.samples], key.samples, key.epoch), key.samples, key.samples, [])


class Keys(Sampler[Key]):
    """Hands the workers what to decode next; replaced before each pass."""

    def __init__(self) -> None:
        self.keys: list[Key] = []

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class Decoder:
    """A pool of workers that turns keys into batches, in order; without workers, this process decodes."""

    def __init__(self, decoding: Dataset[Any], *, workers: int = 0, pin_memory: bool = False,
                 prepare_worker: Callable[[], None] | None = None) -> None:
        self.splits: Mapping[str, ImageSource] = getattr(decoding, "splits", {})
        self.size, self.workers = getattr(decoding, "size", 0), workers
        self.keys = Keys()
        workers_end, self.lifeline = multiprocessing.Pipe(duplex=False)
        atexit.register(self.lifeline.close)  # before multiprocessing waits for workers that an error has left behind
        self.loader = DataLoader(
            decoding, batch_size=None, sampler=self.keys, num_workers=workers, pin_memory=pin_memory,
            collate_fn=as_it_is,  # pyright: ignore[reportArgumentType]
            multiprocessing_context=worker_context() if workers else None, persistent_workers=workers > 0,
            worker_init_fn=WorkerStart(prepare_worker, workers_end) if workers else None,
            generator=torch.Generator(),  # its own: numbers taken from torch's would alter the dropout of this step
        )

    def decode(self, keys: list[Key]) -> Iterator[Any]:
        """The batches of these keys, in order.

        Raises:
            DataError: if a worker dies.
        """
        self.keys.keys = keys
        try:
            with blocked_signals():
                batches = iter(self.loader)
            yield from batches
        except (RuntimeError, EOFError, OSError) as error:  # the last two when it dies while it hands a batch over
            if self.workers == 0 or str(error).startswith("Caught "):  # raised by our code in a worker: a bug
                raise
            raise DataError(f"--workers {self.workers}: a DataLoader worker was killed or lost (out of memory?); start "
                            f"the same command again, perhaps with fewer") from None
        except BaseException as error:
            if not isinstance(error, GeneratorExit):  # a stop, in a wait for a worker that may never answer
                self.lifeline.close()
            raise


def as_it_is(batch: Any) -> Any:
    """DataLoader's collate function: batches come out of the data set whole."""
    return batch


class DecodedTrainLoader:
    """Micro-batches of one rank, decoded from files, from any position of any epoch; as loaders.TrainLoader."""

    def __init__(self, tree: ImageSource | TensorDataset, decoder: Decoder, augmentation: Augmentation,
                 sampler: ResumableSampler, bad_images: BadImages, *, rank_batch_size: int,
                 device: torch.device) -> None:
        self.targets, self.decoder, self.augmentation, self.sampler = tree.targets, decoder, augmentation, sampler
        self.bad_images, self.rank_batch_size, self.device = bad_images, rank_batch_size, device
        self.steps_per_epoch, self.global_batch_size = sampler.steps_per_epoch, sampler.global_batch_size

    def batches(self, epoch: int, samples_consumed: int) -> Iterator[Batch]:
        """The rest of the epoch, in micro-batches of `rank_batch_size`.

        Before the last of several, which all ranks reach in the same step, they compare their bad images: not at the
        start, since rank 0 alone may take a first batch, for --show-batch.

        Raises:
            DataError: for an unreadable image that may not be skipped, or a dead worker.
        """
        self.sampler.set_position(epoch, samples_consumed)
        keys = [Key("train", samples.tolist(), epoch) for samples in self.sampler.indices().split(self.rank_batch_size)]
        for number, batch in enumerate(self.decoder.decode(keys), start=1):
            self.bad_images.add(batch.bad)
            if number == len(keys) > 1:
                self.bad_images.share()
            images = batch.images.to(self.device, non_blocking=True)
            samples = torch.tensor(batch.samples).to(self.device, non_blocking=True)
            yield self.augmentation.batch(images, samples, epoch=epoch), self.targets[batch.sources]


def decoded_train_loader(tree: ImageSource | TensorDataset, decoder: Decoder, augmentation: Augmentation,
                         bad_images: BadImages, *, batch_size: int, rank_batch_size: int, seed: int,
                         device: torch.device, **shard: int) -> DecodedTrainLoader:
    """The training loader of one rank; DataError if there are too few samples for one step."""
    check_size(len(tree), batch_size)
    sampler = ResumableSampler(tree, global_batch_size=batch_size, seed=seed, **shard)
    return DecodedTrainLoader(tree, decoder, augmentation, sampler, bad_images, rank_batch_size=rank_batch_size,
                              device=device)


class DecodedEvaluationLoader:
    """This rank's share of a test or validation split, decoded from files: over all ranks every readable image once."""

    def __init__(self, tree: ImageSource, decoder: Decoder, normalize: Callable[[Tensor], Tensor],
                 bad_images: BadImages, *, rank: int, world_size: int, device: torch.device,
                 batch_size: int = 64) -> None:
        self.targets, self.decoder, self.normalize = tree.targets, decoder, normalize
        self.bad_images, self.device = bad_images, device
        share = torch.tensor(evaluation_indices(len(tree), rank=rank, world_size=world_size))
        split = next(name for name, each in decoder.splits.items() if each is tree)
        self.keys = [Key(split, samples.tolist(), 0) for samples in share.split(batch_size) if len(samples)]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.decoder.decode(self.keys):
            self.bad_images.add(batch.bad)
            if batch.sources:
                yield self.normalize(batch.images.to(self.device, non_blocking=True)), self.targets[batch.sources]
