"""A folder of images by class, as torchvision's ImageFolder reads it: train/<class>/… and test/<class>/… (or val/)."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from datasets import download, order, synthetic, tensors
from datasets.errors import DataError
from datasets.images.read import DECODER, read_file
from datasets.listing import EXTENSIONS, describe_left_out, is_hidden, list_images

TEST_NAMES = ("test", "val", "valid", "validation")


@dataclass(frozen=True, kw_only=True)
class ImageTree:
    """The image files of one split, in a fixed order, with their labels; see packed.ImageSource."""
    folder: Path
    names: tuple[str, ...]  # paths below the folder
    targets: torch.Tensor  # int64 (N,)
    class_names: tuple[str, ...]
    left_out: Counter[str] = field(default_factory=Counter)  # files that are no images, by extension, and hidden names
    unreadable: Mapping[str, str] = field(default_factory=dict)  # what the listing could not read: path and reason
    decoder: str = DECODER
    raw: bool = False
    fitted: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def path(self, sample: int) -> Path:
        """The path of an image."""
        return self.folder / self.names[sample]

    def read(self, sample: int) -> bytes:
        """The content of an image; BadImage if it cannot be read."""
        return read_file(self.path(sample))

    def subset(self, samples: torch.Tensor) -> "ImageTree":
        """Some of the images, in the order given."""
        return replace(self, names=tuple(self.names[each] for each in samples.tolist()), targets=self.targets[samples])

    def listing_hash(self) -> str:
        """A hash of names and labels, to see that all ranks found the same files."""
        text = "\n".join(self.names) + str(self.targets.tolist()) + str(self.class_names)
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]

    def sizes_and_times(self, files: dict[str, list[int]] | None = None) -> dict[str, list[int]]:
        """Bytes and modification time (ns) of each image, -1 if it cannot be read, added to `files` one by one."""
        files = {} if files is None else files
        for name in self.names:
            files[name] = [-1, -1]
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(self.folder, name))
                files[name] = [status.st_size, status.st_mtime_ns]
        return files

    def fingerprint(self, files: Mapping[str, Sequence[int]] | None = None, *, times: bool = False) -> str:
        """A hash of names, labels and sizes, and `times`, if asked for, to notice data that changed."""
        digest = hashlib.sha256(self.listing_hash().encode())
        for size, time in (files or self.sizes_and_times()).values():
            digest.update(f"{size} {time if times else ''}\n".encode() if size >= 0 else b"unreadable\n")
        return digest.hexdigest()[:16]


def load(data_dir: Path, *, validation_fraction: float | None = None, seed: int = 0, train: bool = True,
         known: Sequence[str] | None = None) -> tuple[ImageTree | None, ImageTree]:
    """Training and test split: train/ and test/ (or val/) of `data_dir`; or of train/ alone or classes there, the rest
    and this share of each, by `seed`. `known` are a checkpoint's. DataError for missing, empty or unknown folders."""
    if not os.path.isdir(data_dir):
        raise DataError(f"--data-dir {data_dir}: no such folder; give the one that holds train/ and test/, or train on "
                        f"--dataset synthetic")
    folders = subfolders(data_dir)
    if validation_fraction is not None:
        whole = scan(data_dir / "train" if "train" in folders else data_dir, class_names=known, owner="the checkpoint")
        return split(whole, validation_fraction, seed=seed)
    if not {*folders} & {*TEST_NAMES} or (train and "train" not in folders):
        missing = "train/" if train and "train" not in folders else "test/ or val/"
        raise DataError(f"--data-dir {data_dir}: has no {missing} but {tensors.some_of(folders) or 'no folder'}; add "
                        f"it, or split one folder of classes with --validation-fraction 0.2")
    training = scan(data_dir / "train") if train or (known is None and "train" in folders) else None
    owner = "the checkpoint" if training is None else "the training split"
    known = training.class_names if training is not None else known
    return training, load_test(data_dir, known, owner=owner)  # pyright: ignore (there is one)


def load_test(data_dir: Path, known: Sequence[str] | None, *, owner: str = "the training split") -> ImageTree | None:
    """The test split alone, with the labels of the classes that are known; None where there is no folder of it."""
    names = [name for name in TEST_NAMES if name in subfolders(data_dir)]
    if not names:
        return None
    test = shuffled(scan(data_dir / names[0], class_names=known, owner=owner))
    test.left_out.update(f"split ({name}/: {names[0]}/ is taken)" for name in names[1:])
    return test


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in one, links to folders too, sorted, without hidden ones."""
    try:
        return sorted(name for name in os.listdir(folder) if os.path.isdir(folder / name) and not is_hidden(name))
    except OSError as error:
        raise DataError(f"--data-dir {folder}: cannot be read ({error.strerror}); check its permissions") from None


def scan(folder: Path, *, class_names: Sequence[str] | None = None, owner: str = "") -> ImageTree:
    """All images below `folder`/<class>/, sorted by class, folder and name; `class_names` that `owner` knows fix the
    labels, by default the folders' own. DataError for no class folder, only one, an empty or an unknown one."""
    listing = list_images(folder, flag="--data-dir ")
    broken = {name.partition(os.sep)[0] for name in listing.unreadable}
    found = sorted({*listing.folders, *(name for name in broken if not os.path.splitext(name)[1])})
    names = tuple(class_names or found)
    images = [name for name in listing.images if os.sep in name]
    listing.left_out["outside of the class folders"] += len(listing.images) - len(images)
    left_out = describe_left_out(+listing.left_out)
    if not found:
        raise DataError(f"--data-dir {folder}: holds no folder per class{left_out}; add one, {folder.name}/<class>/")
    labels = tensors.join_classes(found, names, place=f"--data-dir {folder}{os.sep}", owner=owner)
    empty = set(found) - broken - {image.partition(os.sep)[0] for image in images}
    if empty:
        raise DataError(f"--data-dir {folder / min(empty)}: holds no image ({' '.join(EXTENSIONS)}){left_out}; add "
                        f"some, or remove the folder")
    if len(names) == 1:
        inner = sorted({name.split(os.sep)[1] for name in images if name.count(os.sep) > 1})
        remedy = (f" in {tensors.some_of(inner)}; if those are the classes, move them one level up, into {folder.name}/"
                  if inner else f"; put those of each class into {folder.name}/<class>/")
        raise DataError(f"--data-dir {folder}: holds one class only, {names[0]} with {len(images)} images{remedy}")
    images.sort(key=lambda name: (name.partition(os.sep)[0], os.path.dirname(name), name))
    return ImageTree(folder=folder, names=tuple(images), class_names=names, left_out=+listing.left_out,
                     targets=torch.tensor([labels[name.partition(os.sep)[0]] for name in images], dtype=torch.int64),
                     unreadable={str(folder / name): reason for name, reason in sorted(listing.unreadable.items())})


def describe(splits: Mapping[str, Any]) -> str:
    """What was found in a folder or pack, by split, and what of it is left out, in one line."""
    parts = [f"{len(tree):,} training images in {len(tree.class_names)} classes" if name == "train" else
             f"{len(tree):,} {name} images" for name, tree in splits.items()]
    return ", ".join(parts) + describe_left_out(sum((tree.left_out for tree in splits.values()), Counter[str]()))


def split(tree: ImageTree, fraction: float, *, seed: int) -> tuple[ImageTree, ImageTree]:
    """Set a share of each class apart by keyed random order, at least one image and never all; DataError for one."""
    training, test = tensors.hold_out(tree, fraction, seed=seed)
    return training, shuffled(replace(test, left_out=Counter(), unreadable={}))  # these are said of the training split


def shuffled(tree: ImageTree) -> ImageTree:
    """The same images in a fixed random order, not class by class: the first ones are shown as examples."""
    return tree.subset(order.epoch_order(len(tree), seed=0, epoch=0))


def write_synthetic(folder: Path, *, seed: int) -> None:
    """The images of synthetic.py as a folder of PNG files, whole, if it is not there; for one process per node."""
    if folder.is_dir():
        return
    splits = synthetic.load(seed=seed, num_train=2000, num_test=500)

    def write(place: str) -> None:
        for split_name, images in zip(("train", "test"), splits, strict=True):
            for sample, (image, label) in enumerate(zip(images.inputs, images.targets.tolist(), strict=True)):
                path = Path(place, folder.name, split_name, images.class_names[label], f"{sample:05d}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)

    download.install(write, folder.parent, folder.name)
