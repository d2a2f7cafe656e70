"""A folder of images by class, as torchvision's ImageFolder reads it: train/<class>/… and test/<class>/… (or val/).

Without a test folder, or to keep it untouched while flags are tuned, one folder of classes is split by a fraction.
Only names are read here; images/read.py reads the pixels, in loader workers (images/loaders.py) or into a cache
(images/cache.py).
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from datasets import synthetic
from datasets.download import install
from datasets.errors import DataError
from datasets.keyed_random import Purpose, random_bits
from datasets.listing import EXTENSIONS, describe_left_out, is_hidden, list_images
from datasets.order import epoch_order

TEST_NAMES = ("test", "val", "valid", "validation")
SYNTHETIC_TRAIN, SYNTHETIC_TEST = 2000, 500


@dataclass(frozen=True, kw_only=True)
class ImageTree:
    """The image files of one split, in a fixed order, with their labels."""

    root: Path
    names: tuple[str, ...]
    """Paths below the root."""
    targets: Tensor
    """int64 (N,)."""
    class_names: tuple[str, ...]
    left_out: Counter[str] = field(default_factory=Counter)
    """Files that are no images, counted by extension, and hidden names."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """What the listing could not read: path and reason."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, sample: int) -> Path:
        """The path of an image."""
        return self.root / self.names[sample]

    def subset(self, samples: Tensor) -> "ImageTree":
        """Some of the images, in the order given."""
        return replace(self, names=tuple(self.names[sample] for sample in samples.tolist()),
                       targets=self.targets[samples])

    def listing_hash(self) -> str:
        """A hash of names and labels, to see that all ranks found the same files."""
        text = "\n".join(self.names) + str(self.targets.tolist()) + str(self.class_names)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]

    def fingerprint(self, *, times: bool = False) -> str:
        """A hash of names, labels and sizes, to notice data that changed since a checkpoint; one `stat` per image.

        A file that cannot be read counts as such; decoding it names it.
        With `times`, of the modification times too: for a cache, where a copied folder may count as a new one.
        """
        digest = hashlib.sha256(self.listing_hash().encode())
        for name in self.names:
            try:
                status = os.stat(self.root / name)
            except OSError:
                digest.update(b"unreadable\n")
                continue
            digest.update(f"{status.st_size} {status.st_mtime_ns if times else ''}\n".encode())
        return digest.hexdigest()[:16]


def load(data_dir: Path, *, validation_fraction: float | None = None, seed: int = 0) -> tuple[ImageTree, ImageTree]:
    """The training and the test split of `data_dir`.

    Args:
        data_dir: holds train/ and test/ (or val/); or, to be split, train/ alone or the classes themselves.
        validation_fraction: the share of each class that is set apart as the test split.
        seed: decides which images those are.

    Raises:
        DataError: for missing folders, empty classes, or classes that only the test folder has.
    """
    if not data_dir.is_dir():
        raise DataError(f"--data-dir {data_dir}: no such folder; give the one that holds train/ and test/, or train on "
                        f"--dataset synthetic")
    train = data_dir / "train"
    if validation_fraction is not None:
        return split(scan(train if train.is_dir() else data_dir), validation_fraction, seed=seed)
    test = next((data_dir / name for name in TEST_NAMES if (data_dir / name).is_dir()), None)
    if not train.is_dir() or test is None:
        missing = "train/" if not train.is_dir() else "test/ or val/"
        found = sorted(path.name for path in data_dir.iterdir() if path.is_dir() and not is_hidden(path.name))
        raise DataError(f"--data-dir {data_dir}: has no {missing} but {some_of(found) or 'no folder'}; add it, or "
                        f"split one folder of classes with --validation-fraction 0.2")
    training = scan(train)
    return training, shuffled(scan(test, class_names=training.class_names))


def scan(folder: Path, *, class_names: Sequence[str] | None = None) -> ImageTree:
    """All images below `folder`/<class>/, sorted by class, folder and name.

    Args:
        folder: one folder per class in it.
        class_names: those of the training split, which fix the labels. By default the folders' own, sorted.

    Raises:
        DataError: if there is no class folder, only one, an empty one, or one that is not in `class_names`.
    """
    try:
        listing = list_images(folder)
    except OSError as error:
        raise DataError(f"--data-dir {folder}: cannot be read ({error.strerror}); check its permissions") from None
    broken = {name.partition(os.sep)[0] for name in listing.unreadable}
    found = sorted({*listing.folders, *(name for name in broken if not os.path.splitext(name)[1])})
    names = tuple(class_names or found)
    labels = {name: label for label, name in enumerate(names)}
    images = [name for name in listing.images if os.sep in name]
    listing.left_out["outside of the class folders"] += len(listing.images) - len(images)
    if not found:
        raise DataError(f"--data-dir {folder}: holds no folder per class{describe_left_out(+listing.left_out)}; put "
                        f"images into {folder.name}/<class>/")
    check_names(folder, found, names)
    filled = broken | {image.partition(os.sep)[0] for image in images}
    for name in found:
        if name not in filled:
            raise DataError(f"--data-dir {folder / name}: holds no image ({' '.join(EXTENSIONS)})"
                            f"{describe_left_out(+listing.left_out)}; add some, or remove the folder")
    if len(names) == 1:
        raise DataError(f"--data-dir {folder}: holds one class only, {names[0]}{one_class(folder, images)}")
    images.sort(key=lambda name: (name.partition(os.sep)[0], os.path.dirname(name), name))
    return ImageTree(root=folder, names=tuple(images), class_names=names, left_out=+listing.left_out,
                     targets=torch.tensor([labels[name.partition(os.sep)[0]] for name in images], dtype=torch.int64),
                     unreadable={str(folder / name): reason for name, reason in sorted(listing.unreadable.items())})


def check_names(folder: Path, found: Sequence[str], known: Sequence[str]) -> None:
    """Raise DataError for a class folder that the training split does not have."""
    for name in found:
        if name not in known:
            alike = next((other for other in known if folded(other) == folded(name)), None)
            remedy = ("remove it, or add images of it there" if alike is None else
                      f"that one has {alike}, which is spelled in another way: rename one of them")
            raise DataError(f"--data-dir {folder / name}: no such class in the training split; {remedy}")


def one_class(folder: Path, images: Sequence[str]) -> str:
    """What is in the only class, and what to do: the end of an error."""
    inner = sorted({name.split(os.sep)[1] for name in images if name.count(os.sep) > 1})
    if not inner:
        return f" with {len(images)} images; put those of each class into {folder.name}/<class>/"
    return (f" with {len(images)} images in {some_of(inner)}; if those are the classes, move them one level up, into "
            f"{folder.name}/")


def some_of(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def folded(name: str) -> str:
    """A class name without what people and file systems do not tell apart: case, and how accents are stored."""
    return unicodedata.normalize("NFC", name).casefold().strip()


def describe(train: ImageTree, test: ImageTree) -> str:
    """What was found, and what of it is left out, in one line."""
    return (f"{len(train):,} training images in {len(train.class_names)} classes, {len(test):,} test images"
            f"{describe_left_out(train.left_out + test.left_out)}")


def split(tree: ImageTree, fraction: float, *, seed: int) -> tuple[ImageTree, ImageTree]:
    """Set a share of each class apart, at least one image and never all, by keyed random order.

    Raises:
        DataError: if a class has a single image.
    """
    chosen = torch.zeros(len(tree), dtype=torch.bool)
    order = random_bits(torch.arange(len(tree)), seed, Purpose.SPLIT)
    for label, name in enumerate(tree.class_names):
        members = (tree.targets == label).nonzero().flatten()
        if len(members) < 2:
            raise DataError(f"--validation-fraction {fraction}: class {tree.root / name} has a single image; add more")
        num_chosen = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen[members[order[members].argsort()[:num_chosen]]] = True
    test = replace(tree, left_out=Counter(), unreadable={})  # said once, of the training split
    return tree.subset((~chosen).nonzero().flatten()), shuffled(test.subset(chosen.nonzero().flatten()))


def shuffled(tree: ImageTree) -> ImageTree:
    """The same images in a fixed random order, not class by class: the first ones are shown as examples."""
    return tree.subset(epoch_order(len(tree), seed=0, epoch=0))


def synthetic_folder(data_dir: Path, *, seed: int) -> Path:
    """Where `write_synthetic` puts the images of a seed."""
    return data_dir / f"synthetic-images-{seed}"


def write_synthetic(folder: Path, *, seed: int) -> None:
    """The images of synthetic.py as a folder of PNG files: 2,000 to train on and 500 to test, in two seconds.

    For one process per node. The folder appears whole; nothing is done if it is there.
    """
    if folder.is_dir():
        return
    splits = zip(("train", "test"), synthetic.load(seed=seed, num_train=SYNTHETIC_TRAIN, num_test=SYNTHETIC_TEST),
                 strict=True)

    def write(place: str) -> None:
        for split_name, images in splits:
            for sample, (image, label) in enumerate(zip(images.inputs, images.targets.tolist(), strict=True)):
                path = Path(place, folder.name, split_name, images.class_names[label], f"{sample:05d}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)

    try:
        install(write, folder.parent, folder.name)
    except OSError as error:
        raise DataError(f"--data-dir {folder.parent}: cannot be written ({error.strerror}); choose one that "
                        f"can") from None
