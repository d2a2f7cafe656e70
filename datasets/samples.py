"""Any map-style data set as batches: each sample is read under a key of its own, by workers that open the splits."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, default_collate
from torchvision.transforms.v2.functional import pil_to_tensor

from datasets import loaders, tensors
from datasets.errors import DataError
from datasets.images.loaders import Decoder, Key, unless_failed
from datasets.keyed_random import GOLDEN, WORD, Purpose, key, mix

NAMES = {"train": "training", "validation": "validation", "test": "test"}
SEED_IT = "seed whatever splits or shuffles it, such as random_split(..., generator=torch.Generator().manual_seed(0))"
Explain = Callable[[BaseException, str], BaseException]


class Splits(NamedTuple):
    """What is trained and evaluated on: map-style data sets of (input, target), None of a split that there is not."""
    train: Any = None
    validation: Any = None
    test: Any = None
    collate: Callable[[list[Any]], Any] = default_collate

    def present(self) -> dict[str, Any]:
        """The data sets that there are, by name."""
        return {name: dataset for name, dataset in zip(NAMES, self, strict=False) if dataset is not None}


def seed_sample(seed: int, epoch: int, purpose: Purpose, sample: int) -> None:
    """Put torch's, Python's and numpy's own generators where this sample begins; 13 us, the first draws included."""
    word = mix((key(seed, epoch, purpose) + GOLDEN + sample) & WORD)  # key(seed, epoch, purpose, sample)
    torch.default_generator.manual_seed(word)
    random.seed(word)
    np.random.seed(word & 0xFFFFFFFF)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the three generators as they were, so that dropout does not notice; 75 us, once a batch."""
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


class Reading(Dataset[Any]):
    """The work of one worker, or of this process: a key to (inputs, targets) or to the error of what reads."""

    def __init__(self, open_splits: Callable[[], Splits], *, seed: int, name: str = "--data",
                 explain: Explain | None = None) -> None:
        self.open_splits, self.seed, self.name, self.explain = open_splits, seed, name, explain
        self.splits = open_splits()
        for split, dataset in self.splits.present().items():
            check_map_style(dataset, NAMES[split], name)
        self.largest_target: int | None = None  # where it is known, all targets are held to it, and to be at least 0
        self.labels: dict[str, Tensor] = {}  # of a split with classes in another order: the label of each of its own
        self.facts = describe(self.splits)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "splits": None}  # a worker opens its own

    def __getitem__(self, key: Key) -> Any:
        place = "opened in a worker"
        try:
            with generators_kept():
                if self.splits is None:
                    self.splits = self.open_splits()
                    if describe(self.splits) != self.facts:
                        raise DataError(f"{self.name}: a worker finds other samples than its rank; {SEED_IT}")
                items, dataset = [], getattr(self.splits, key.split)
                purpose = Purpose.TRAIN_SAMPLE if key.split == "train" else Purpose.TEST_SAMPLE
                for sample in key.samples:
                    place = place_of(sample, key.split)
                    seed_sample(self.seed, key.epoch, purpose, sample)
                    item = dataset[sample]
                    items.append(map_leaves(as_tensors, item) if self.splits.collate is default_collate else item)
                place = "collating a batch"
                inputs, targets = map_leaves(as_tensors, self.splits.collate(items))
                labels = self.labels.get(key.split)
                check_targets(targets, key, self.largest_target if labels is None else len(labels) - 1, self.name)
                return inputs, targets if labels is None else labels[targets]
        except (Exception, SystemExit) as error:
            return error if self.explain is None else self.explain(error, place)

    def fingerprint(self) -> str:
        """What notices that the data changed since a checkpoint."""
        return self.facts

    def join_classes(self, names: tuple[str, ...], *, owner: str) -> None:
        """Take labels for positions in these names, which `owner` knows; DataError for a class that it lacks."""
        for split, dataset in self.splits.present().items():
            if (own := class_names_of(dataset)) not in ((), names):
                joined = tensors.join_classes(own, names, place=f"{self.name}: {NAMES[split]} class ", owner=owner)
                self.labels[split] = torch.tensor(list(joined.values()))


def place_of(sample: int, split: str) -> str:
    """A sample in words."""
    return f"sample {sample:,} of the {NAMES[split]} set"


def check_map_style(dataset: Any, split: str, name: str) -> None:
    """Raise DataError for a data set without samples by number, or without any."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"{name}: the {split} set is {type(dataset).__name__}, which has no samples by number, so no "
                        f"run could be resumed exactly; give one with __getitem__ and __len__")
    if len(dataset) == 0:
        raise DataError(f"{name}: the {split} set has no samples; check what it reads")


def targets_of(dataset: Any) -> Any:
    """The targets of all samples, where a data set has them at hand; else None."""
    if isinstance(dataset, Subset) and (whole := targets_of(dataset.dataset)) is not None:
        return torch.as_tensor(np.asarray(whole))[list(dataset.indices)]
    return dataset.tensors[-1] if isinstance(dataset, TensorDataset) else getattr(dataset, "targets", None)


def class_names_of(dataset: Any) -> tuple[str, ...]:
    """`.classes` of a data set, or of the one it is a part of."""
    found = getattr(dataset, "classes", None)
    if found is None and isinstance(dataset, Subset):
        return class_names_of(dataset.dataset)
    return tuple(map(str, found or ()))


def describe(splits: Splits) -> str:
    """A hash of length, class names, targets and chosen indices: the same wherever the same samples are found."""
    found = [(len(dataset), class_names_of(dataset), digest(targets_of(dataset)),
              digest(getattr(dataset, "indices", None))) for dataset in splits.present().values()]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def digest(tree: Any) -> str:
    """A hash of nested tensors, arrays and plain values."""
    if isinstance(tree, Mapping):
        return digest([list(tree), list(tree.values())])
    if isinstance(tree, list | tuple) and not all(isinstance(each, int | float | str) for each in tree):
        return hashlib.sha256("".join(map(digest, tree)).encode()).hexdigest()
    if isinstance(tree, Tensor | np.ndarray):
        return hashlib.sha256(np.asarray(tree).tobytes()).hexdigest()
    plain = isinstance(tree, int | float | str | list | tuple) or tree is None  # the text of others may hold an address
    return hashlib.sha256(repr(tree if plain else type(tree)).encode()).hexdigest()


def map_leaves(change: Callable[[Any], Any], tree: Any) -> Any:
    """Nested dicts, lists and tuples with every leaf changed."""
    if isinstance(tree, Mapping):
        return {name: map_leaves(change, child) for name, child in tree.items()}
    return tuple(map_leaves(change, child) for child in tree) if isinstance(tree, list | tuple) else change(tree)


def as_tensors(leaf: Any) -> Any:
    """float64, which numpy's noise and Python's numbers become, as float32; PIL images as torchvision's ToTensor."""
    if isinstance(leaf, Image.Image):
        return pil_to_tensor(leaf).float() / 255
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.float64 else leaf


def check_targets(targets: Any, key: Key, largest: int | None, name: str) -> None:
    """Raise DataError for a target that is NaN or, where a largest is known, no class or label, naming the sample."""
    if not isinstance(targets, Tensor) or len(targets) != len(key.samples):
        return
    bad = targets.isnan() if largest is None else ~((targets >= 0) & (targets <= largest))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        kind = "number" if largest is None else f"{'label' if bad.ndim > 1 else 'class'} from 0 to {largest}"
        raise DataError(f"{name}: {place_of(key.samples[row], key.split)}: target {targets[row].tolist()} must be a "
                        f"{kind}; correct it or leave the sample out")


def set_apart(splits: Splits, fraction: float, *, seed: int) -> Splits:
    """The splits with this share of the training set for validation; of each class, where targets say which."""
    found, train = targets_of(splits.train), splits.train
    labels = torch.as_tensor(np.asarray(found)) if found is not None else torch.zeros(len(train))
    by_class = labels.ndim == 1 and not labels.is_floating_point() and labels.unique(return_counts=True)[1].min() > 1
    chosen = tensors.held_out(labels if by_class else torch.zeros(len(train)), fraction, seed=seed)
    parts = [Subset(train, mask.nonzero().flatten().tolist()) for mask in (~chosen, chosen)]
    return splits._replace(train=parts[0], validation=parts[1])


def sample_loaders(reading: Reading, *, device: torch.device, workers: int = 0,
                   prepare_worker: Callable[[], None] | None = None, warn: Callable[[str], None] = lambda line: None,
                   **how: Any) -> dict[str, Any]:
    """The loaders of one rank, by split; `how` as of split_loaders. Warns where random choices cannot be keyed."""
    decoder = Decoder(reading, workers=workers, pin_memory=device.type == "cuda", prepare_worker=prepare_worker)
    present = reading.splits.present()
    reads = {name: (partial(decoder.decode, name), len(dataset)) for name, dataset in present.items()}
    by_split = loaders.split_loaders(reads, evaluation_batch_size=min(64, how["batch_size"]),
                                     remedy=f"raise --workers from {workers}", **how)
    if "train" in present and how["rank"] == 0:
        first, second = (digest(unless_failed(reading[Key("train", [0], 0)])) for _ in range(2))
        if first != second:
            warn(f"WARNING data: {reading.name}: training sample 0 differs between two readings under one key, as a "
                 f"resumed run will; draw from torch, random, np.random or default_rng(torch.initial_seed() % 2**32)")
    return by_split
