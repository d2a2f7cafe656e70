"""A folder of images by class, as torchvision's ImageFolder reads it: train/<class>/… and test/<class>/… (or val/).

Without a test folder, or to keep it untouched while flags are tuned, one folder of classes is split by a fraction.
Only names are read here; images/read.py reads the pixels, in loader workers (images/loaders.py) or into a cache
(images/cache.py).
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from datasets import synthetic
from datasets.download import move_in_place, temporary_folder
from datasets.errors import DataError
from datasets.keyed_random import Purpose, random_bits
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

    def __len__(self) -> int:
        return len(self.names)

    def path(self, sample: int) -> Path:
        """The path of an image."""
        return self.root / self.names[sample]

    def subset(self, samples: Tensor) -> "ImageTree":
        """Some of the images, in the order given."""
        return ImageTree(root=self.root, names=tuple(self.names[sample] for sample in samples.tolist()),
                         targets=self.targets[samples], class_names=self.class_names)

    def listing_hash(self) -> str:
        """A hash of names and labels, to see that all ranks found the same files."""
        text = "\n".join(self.names) + str(self.targets.tolist()) + str(self.class_names)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]

    def fingerprint(self, *, times: bool = False) -> str:
        """A hash of names, labels and sizes, to notice data that changed since a checkpoint; one `stat` per image.

        With `times`, of the modification times too: for a cache, where a copied folder may count as a new one.
        """
        digest = hashlib.sha256(self.listing_hash().encode())
        for name in self.names:
            status = os.stat(self.root / name)
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
        raise DataError(f"--data-dir {data_dir}: has no {missing}; add it, or split one folder with "
                        f"--validation-fraction 0.2")
    training = scan(train)
    return training, shuffled(scan(test, class_names=training.class_names))


def scan(folder: Path, *, class_names: Sequence[str] | None = None) -> ImageTree:
    """All images below `folder`/<class>/, sorted by class and name; files with other extensions are left out.

    Args:
        folder: one folder per class in it; hidden ones are no classes.
        class_names: those of the training split, which fix the labels. By default the folders' own, sorted.

    Raises:
        DataError: if there is no class folder, an empty one, or one that is not in `class_names`.
    """
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
        names = tuple(class_names or found)
        unknown = [name for name in found if name not in names]
        if unknown:
            raise DataError(f"--data-dir {folder / unknown[0]}: no such class in the training split; remove it, or add "
                            f"images of it there")
        if not found:
            raise DataError(f"--data-dir {folder}: holds no folder per class; put images into {folder.name}/<class>/")
        labels = {name: names.index(name) for name in found}
        files = make_dataset(str(folder), labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    except OSError as error:
        raise DataError(f"--data-dir {folder}: cannot be read ({error.strerror}); check its permissions") from None
    filled = {label for _, label in files}
    for name in found:
        if labels[name] not in filled:
            raise DataError(f"--data-dir {folder / name}: holds no image ({' '.join(IMG_EXTENSIONS)}); add some, or "
                            f"remove the folder")
    return ImageTree(root=folder, names=tuple(os.path.relpath(path, folder) for path, _ in files),
                     targets=torch.tensor([label for _, label in files]), class_names=names)


def find_images(path: Path) -> list[Path]:
    """The file itself, or all images in a folder and the folders below it, sorted.

    Raises:
        DataError: if there is nothing of that name, or no image in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; check the name")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())
    if not found:
        raise DataError(f"{path}: holds no image ({' '.join(IMG_EXTENSIONS)}); name another folder")
    return found


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
    return tree.subset((~chosen).nonzero().flatten()), shuffled(tree.subset(chosen.nonzero().flatten()))


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
    try:
        with temporary_folder(folder.parent, prefix=".synthetic-") as temporary:
            for split_name, images in splits:
                for sample, (image, label) in enumerate(zip(images.inputs, images.targets.tolist(), strict=True)):
                    path = temporary / "whole" / split_name / images.class_names[label] / f"{sample:05d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            move_in_place(temporary / "whole", folder)
    except OSError as error:
        raise DataError(f"--data-dir {folder.parent}: cannot be written ({error.strerror}); choose one that "
                        f"can") from None
