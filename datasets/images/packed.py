"""A pack: all images of a data set in a few large files, mapped into memory that the ranks of a node share.

    pack.json               format, class names, number of images; bytes and sha256 of every other file
    train-00000.bin …       the images one after another, files' own bytes or pixels, each behind its name
    train.index             an ENTRY for each image
    train.labels            int64 for each image"""

import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import image_folder, tensors
from datasets.errors import DAMAGED, DataError
from datasets.images.read import DECODER, BadImage, Stored

FORMAT = 1
RECORD = "pack.json"
PARTIAL = ".partial"  # behind the name of a pack that is being written
part_name = "{}-{:05d}.bin".format  # of a split and a number
ENTRY = np.dtype([
    ("offset", "<u8"), ("length", "<u4"),  # of the image in its part
    ("name_length", "<u4"),  # of the name just before it
    ("crc32", "<u4"), ("label", "<u4"),
    ("height", "<u4"), ("width", "<u4"),  # of pixels (height, width, 3); 0 for the bytes of a file
    ("original", "<u8")])  # a hash of the bytes that were packed, to find equal ones


@dataclass(frozen=True, kw_only=True)
class PackedImages:
    """The images of one split of a pack. It is copied to every worker, without what it has opened."""
    root: Path
    split: str
    record: Mapping[str, Any]  # what pack.json says
    class_names: tuple[str, ...]  # by label; where a checkpoint knows more than the pack, its own
    rows: Tensor | None = None  # the images of a subset; None for all
    origin: Path | None = None  # of a cache: the folder that its images are in
    decoder: str | None = None  # name and version of what decodes the images, or has decoded those of a cache
    raw: bool = False  # whether they are pixels
    fitted: bool = False  # and those as the network sees them, of its size
    left_out: Counter[str] = field(default_factory=Counter)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    maps: dict[str, mmap.mmap] = field(default_factory=dict, init=False)  # the files that were opened, by name

    def __getstate__(self) -> dict[str, Any]:
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, "maps": {}}  # a copy opens its own

    def __len__(self) -> int:
        return self.record["splits"][self.split] if self.rows is None else len(self.rows)

    @property
    def folder(self) -> Path:
        """What the names of the images are below."""
        return self.origin or self.root / self.split

    @property
    def targets(self) -> Tensor:
        """Labels, int64 (N,)."""
        labels = torch.frombuffer(self.map(f"{self.split}.labels"), dtype=torch.int64)
        labels = labels if self.rows is None else labels[self.rows]
        names = self.record["class_names"]
        if tuple(names) == self.class_names:
            return labels
        known = tensors.join_classes(names, self.class_names, place=f"--data-dir {self.root}: ", owner="the checkpoint")
        return torch.tensor([known[name] for name in names])[labels]

    def map(self, name: str) -> mmap.mmap:
        """A file, opened when it is first needed; `damaged` if it is gone, or cut short: to read it kills a process."""
        if name not in self.maps:
            try:
                with open(self.root / name, "rb") as file:
                    self.maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:  # the latter of an empty file
                raise self.damaged(f"{name} cannot be read ({error})") from None
        if self.maps[name].size() < len(self.maps[name]):
            raise self.damaged(f"{name} was cut short while in use")
        return self.maps[name]

    def damaged(self, what: str) -> Exception:
        """A bad image; where the pack is a cache, what ends the run."""
        if self.origin is None:
            return BadImage(f"{what}: copy or pack it again")
        return DataError(f"--cache-dir {self.root}: {what}; remove it, and the same command builds it again")

    @cached_property
    def checked(self) -> np.ndarray:
        """Which pixels, by row, this process has compared with their CRC-32."""
        return np.zeros(self.record["splits"][self.split], np.bool_)

    def find(self, sample: int) -> tuple[Any, int, str]:
        """The entry of an image, its row in the index, and the file it is in."""
        row = sample if self.rows is None else int(self.rows[sample])
        entry = np.frombuffer(self.map(f"{self.split}.index"), ENTRY, count=1, offset=row * ENTRY.itemsize)[0]
        return entry, row, part_name(self.split, row // self.record["images_per_part"])

    def path(self, sample: int) -> Path:
        """Pack, split and name of an image."""
        try:
            entry, _, part = self.find(sample)
            start = int(entry["offset"])
            return self.folder / os.fsdecode(self.map(part)[start - int(entry["name_length"]) : start])
        except BadImage:
            return self.folder / f"image {sample}"

    def read(self, sample: int) -> Stored:
        """The bytes of a file, or pixels (H, W, 3), not copied; `damaged` if they are not those that were packed.
        Pixels are checked when a process first reads them: each time, that would be a third of what reading costs."""
        entry, row, part = self.find(sample)
        start = int(entry["offset"])
        content = memoryview(self.map(part))[start : start + int(entry["length"])]
        if len(content) < entry["length"]:  # before this process opened it
            raise self.damaged(f"{part} was cut short while in use")
        if not self.checked[row] and zlib.crc32(content) != entry["crc32"]:
            raise self.damaged(f"damaged in {part}, whose bytes have changed since they were packed")
        if not entry["height"]:
            return content
        self.checked[row] = True
        return np.frombuffer(content, np.uint8).reshape(entry["height"], entry["width"], 3)

    def subset(self, samples: Tensor) -> "PackedImages":
        """Some of the images, in the order given."""
        return replace(self, rows=samples if self.rows is None else self.rows[samples])

    def fingerprint(self, *, times: bool = False) -> str:
        """A hash of all that is in the pack, by the sha256 of its files."""
        text = (self.split + json.dumps(self.record, sort_keys=True)).encode()
        return hashlib.sha256(text if self.rows is None else text + self.rows.numpy().tobytes()).hexdigest()[:16]

    listing_hash = fingerprint


# The images of one split, in a fixed order. Loaders know no more of them than: length, targets, class_names,
# read(sample) and path(sample); left_out and unreadable; decoder, raw and fitted; fingerprint() and folder.
ImageSource = image_folder.ImageTree | PackedImages


def is_pack(path: Path) -> bool:
    """Whether this is a pack, or one that is not finished."""
    return (path / RECORD).exists() or (path.with_name(path.name + PARTIAL).exists() and not path.exists()) or (
        path.name.endswith(PARTIAL) and path.exists())


def is_whole(root: Path) -> bool:
    """Whether a cache is there; one that is damaged is removed."""
    try:
        return is_pack(root) and bool(read_record(root))
    except DataError:
        shutil.rmtree(root, ignore_errors=True)
        return False


def load(root: Path, *, validation_fraction: float | None = None, seed: int = 0, train: bool = True,
         known: Sequence[str] | None = None) -> tuple[PackedImages | None, PackedImages]:
    """The training and the test split of a pack, as image_folder.load of the folder it was made of, in the same order.
    DataError if it is not finished, damaged, of another version, or has no test images and none are to be split."""
    record = read_record(root)
    training = PackedImages(root=root, split="train", record=record, class_names=tuple(known or record["class_names"]),
                            decoder=None if record["raw"] else DECODER, raw=bool(record["raw"]))
    if validation_fraction is not None:
        return image_folder.split(training, validation_fraction, seed=seed)  # pyright: ignore (an ImageTree to it)
    if "test" not in record["splits"]:
        raise DataError(f"--data-dir {root}: has no test images; set some apart with --validation-fraction 0.2")
    return training if train else None, image_folder.shuffled(replace(training, split="test"))  # pyright: ignore


def load_test(root: Path, known: Sequence[str]) -> PackedImages | None:
    """The test split alone, with the labels of the classes that are known; None where there is none."""
    return load(root, train=False, known=known)[1] if "test" in read_record(root)["splits"] else None


def read_record(root: Path) -> dict[str, Any]:
    """What pack.json says, if all files are as long as it says, and those of entries and labels the same."""
    if not (root / RECORD).exists():
        raise DataError(f"--data-dir {root}: is still being packed, or packing was stopped; wait, or start the same "
                        f"python datasets/pack.py again")
    try:
        record = json.loads((root / RECORD).read_bytes())
        for name, facts in record["files"].items() if record["format"] == FORMAT else ():
            if (root / name).stat().st_size != facts["bytes"]:
                raise ValueError(f"{name} is not {facts['bytes']:,} bytes long")
            if not name.endswith(".bin"):
                with open(root / name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
                        raise ValueError(f"{name} has changed")
    except DAMAGED as error:
        raise DataError(f"--data-dir {root}: is damaged ({error}); copy it again, or pack again") from None
    if record["format"] != FORMAT:
        raise DataError(f"--data-dir {root}: is a pack of format {record['format']}, and format {FORMAT} is read here; "
                        f"pack again with python datasets/pack.py")
    return record
