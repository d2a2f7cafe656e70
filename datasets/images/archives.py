"""What datasets/pack.py packs: folders, tar shards as webdataset names them, and Hugging Face's Parquet files.

    train-000.tar       cat/1.jpg and cat/1.cls, a number, for each image
    train-000.parquet   columns image (bytes, or a struct of bytes and path) and label, a number"""

import contextlib
import functools
import hashlib
import json
import posixpath
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets.errors import DAMAGED, DataError
from datasets.image_folder import TEST_NAMES, ImageTree, scan
from datasets.listing import EXTENSIONS, is_hidden

MOST_CLASSES = 2**20  # a larger label is another kind of number
Row = tuple[str, int, int, int]  # name and label; offset and length in a tar file, or row group and row
Sources = dict[str, "ImageTree | ArchivedImages"]  # by split
LOCK = threading.Lock()  # of the one row group in memory


@dataclass(frozen=True, kw_only=True)
class ArchivedImages:
    """The images of one split, in the order of the archives: what a pack needs of an ImageSource."""
    folder: Path  # what the names of the images are below
    rows: Sequence[tuple[Path, Row]]
    targets: torch.Tensor  # int64 (N,)
    class_names: tuple[str, ...]
    left_out: Counter[str]
    unreadable: Mapping[str, str]
    read_at: Callable[[Path, int, int], bytes]

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, sample: int) -> Path:
        """The archive, and the name in it."""
        file, row = self.rows[sample]
        return file / row[0]

    def read(self, sample: int) -> bytes:
        """The content of an image; DataError if the archive is damaged there."""
        file, (_, _, *place) = self.rows[sample]
        with damage_named(file):
            return self.read_at(file, *place)

    def fingerprint(self) -> str:
        """A hash of names and labels, and of where in the archives they are."""
        return hashlib.sha256(repr(self.rows).encode(errors="surrogateescape")).hexdigest()[:16]


def open_sources(data_dir: Path) -> Sources:
    """The splits to pack: `train`, and `test` if there is one under any of its names, the first that has labels."""
    for pattern in ("{}", "{}-*.tar", "{}-*.parquet", "data/{}-*.parquet"):  # the last as Hugging Face has it
        train, *tests = (sorted(data_dir.glob(pattern.format(name))) for name in ("train", *TEST_NAMES))
        if train:
            sources: Sources = {"train": open_split(train)}
            for files in filter(None, tests):
                test = None if "test" in sources else open_split(files, sources["train"].class_names)
                if test is not None and not (len(test) and (test.targets < 0).all()):
                    sources["test"] = test
                else:
                    reason = "another one is taken" if test is None else "no labels"
                    sources["train"].left_out[f"split ({files[0].name}: {reason})"] += 1
            return sources
    raise DataError(f"--data-dir {data_dir}: holds no train/, train-*.tar or train-*.parquet; name another folder")


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what the readers of archives raise into a DataError that names the file."""
    try:
        yield
    except (*DAMAGED, tarfile.TarError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{path}: is cut short or damaged ({reason}); copy or download it again") from None


def open_split(files: Sequence[Path], class_names: tuple[str, ...] | None = None) -> "ImageTree | ArchivedImages":
    """The images of one split, `files` all .tar or all .parquet, or one folder; DataError for a damaged one, or one
    without labels. `class_names` are the training split's. All of a test split may have the label -1, which is none."""
    if files[0].is_dir():
        return scan(files[0], class_names=class_names, owner="the training split")
    if (total := re.search(r"-of-(\d+)\.", files[0].name)) and len(files) != int(total[1]):
        raise DataError(f"{files[0].parent}: holds {len(files)} of the {int(total[1])} files; download the others")
    left_out, rows, known = Counter[str](), list[tuple[Path, Row]](), class_names or ()
    for file in files:
        with damage_named(file):
            found, names = (list_tar if file.suffix == ".tar" else list_parquet)(file, left_out)
        if names and known not in ((), names):
            first = "the training split" if class_names else files[0]
            raise DataError(f"{file}: names its classes otherwise than {first}; make them the same")
        known = known or names
        rows += [(file, row) for row in found]
    labels, most = [row[1] for _, row in rows], len(known) or MOST_CLASSES
    lowest = -1 if class_names is not None and {*labels} == {-1} else 0
    for file, (name, label, *_) in rows:
        if not lowest <= label < most:
            raise DataError(f"{file / name}: its label {label} is none of {most:,} classes; number them from 0")
    return ArchivedImages(folder=files[0].parent, rows=rows, left_out=left_out, unreadable={},
                          targets=torch.tensor(labels, dtype=torch.int64),
                          class_names=known or tuple(map(str, range(max(labels, default=-1) + 1))),
                          read_at=read_tar if files[0].suffix == ".tar" else read_parquet)


def list_tar(path: Path, left_out: Counter[str]) -> tuple[list[Row], tuple[str, ...]]:
    """The images of one tar file; its classes have no names."""
    images, labels = dict[str, tarfile.TarInfo](), dict[str, int]()
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            folder, name = posixpath.split(member.name)
            stem, _, kind = name.partition(".")
            key = posixpath.join(folder, stem)
            if is_hidden(name) or not member.isfile():
                left_out["hidden" if is_hidden(name) else "links in archives"] += not member.isdir()
                continue
            if key in (labels if kind == "cls" else images if f".{kind.lower()}" in EXTENSIONS else ()):
                raise DataError(f"{path}: holds {key}.{kind} twice, or two images of that name; rename one of them")
            if kind == "cls":
                text = archive.extractfile(member).read().strip()  # pyright: ignore[reportOptionalMemberAccess]
                if not text.isdigit():
                    raise DataError(f"{path / member.name}: the label {text[:40].decode(errors='replace')!r} is no "
                                    f"number; number the classes from 0")
                labels[key] = int(text)
            elif f".{kind.lower()}" in EXTENSIONS:
                images[key] = member
            else:
                left_out[f".{kind}"] += 1
        archive.fileobj.seek(archive.offset)  # pyright: ignore[reportOptionalMemberAccess]
        if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:  # pyright: ignore
            raise EOFError("no end of the archive")  # tarfile itself takes it for the end
    for key, member in images.items():
        if key not in labels:
            raise DataError(f"{path / member.name}: has no label; add {key}.cls to the archive")
    return [(each.name, labels[key], each.offset_data, each.size) for key, each in images.items()], ()


def read_tar(path: Path, offset: int, length: int) -> bytes:
    """The content of a member."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def list_parquet(path: Path, left_out: Counter[str]) -> tuple[list[Row], tuple[str, ...]]:
    """The rows of one Parquet file, and the names of its classes, if Hugging Face's metadata has them."""
    file = parquet_file(path)
    schema = file.schema_arrow
    for column in ("image", "label"):
        if column not in schema.names:
            raise DataError(f"{path}: has no column {column} but {', '.join(schema.names)}; rename the one meant")
    if not str(schema.field("label").type).startswith(("int", "uint")):
        raise DataError(f"{path}: labels of type {schema.field('label').type}, no numbers; number the classes from 0")
    labels = file.read(columns=["label"]).column(0).to_pylist()
    if None in labels:
        raise DataError(f"{path}: row {labels.index(None)} has no label; leave it out")
    places = [(group, row) for group in range(file.num_row_groups)
              for row in range(file.metadata.row_group(group).num_rows)]
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return ([(f"row {number}", label, *places[number]) for number, label in enumerate(labels)],
            tuple(features.get("label", {}).get("names", ())))


def parquet_file(path: Path) -> Any:
    """An open Parquet file; DataError without pyarrow."""
    try:
        from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"{path}: needs pyarrow; pip install pyarrow") from None
    return ParquetFile(path)


@functools.lru_cache(maxsize=1)
def row_group(path: Path, group: int) -> Any:
    """The column of images of one row group."""
    return parquet_file(path).read_row_group(group, columns=["image"]).column(0)


def read_parquet(path: Path, group: int, row: int) -> bytes:
    """The bytes of an image."""
    with LOCK:  # else several threads would read the same group
        image = row_group(path, group)[row].as_py()
    content = image["bytes"] if isinstance(image, dict) else image
    if not isinstance(content, bytes):
        raise ValueError("an image without bytes")
    return content
