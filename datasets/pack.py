"""Put all images of a data set into one folder of a few large files, which trainers/image_folder.py trains from.

    python datasets/pack.py --data-dir photos --out photos.pack                   # the files' own bytes
    python datasets/pack.py --data-dir photos --out photos.pack --resize 256      # smaller JPEGs: several times faster
    python datasets/pack.py --data-dir photos --out photos.pack --raw 256         # pixels: nothing to decode

--data-dir holds train/ and test/ (or val/), or train-*.tar and test-*.tar, or train-*.parquet and test-*.parquet. A
command that was stopped or killed continues where it was when it is started again.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from datasets.errors import DataError
from datasets.image_folder import TEST_NAMES, ImageTree, scan
from datasets.images.archives import ArchivedImages, open_archives
from datasets.images.packed import ENTRY, FORMAT, RECORD, part_name, unfinished
from datasets.images.read import DECODER, BadImage, Stored, pixels, resize
from datasets.listing import describe_left_out
from launch.command_line import run
from launch.errors import UsageError, say, to_stderr
from launch.files import replace_file, sync_folder
from launch.launcher import usable_cores
from launch.rules import AtLeast

Sources = dict[str, ImageTree | ArchivedImages]


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Pack a folder of images, tar shards or Parquet files for trainers/image_folder.py."""

    data_dir: Path = Path("data")
    """What to pack: see above."""
    out: Path | None = None
    """The pack, a folder that is not there yet. Default: --data-dir with .pack behind it."""
    resize: Annotated[int | None, AtLeast(1, most=8192)] = None
    """Shrink images whose shorter side is longer than this, and store them as JPEG."""
    quality: Annotated[int | None, AtLeast(1, most=100)] = None
    """Of those JPEGs. Default: 90."""
    raw: Annotated[int | None, AtLeast(1, most=8192)] = None
    """Store pixels, the shorter side shrunk to this: large, and nothing to decode."""
    workers: Annotated[int | None, AtLeast(1, most=1024)] = None
    """Threads that read and shrink images. Default: one per usable core."""
    images_per_part: Annotated[int, AtLeast(1)] = 10_000
    """Images in each large file. A command that was stopped repeats at most one of them."""

    def check(self) -> None:
        """Find flags that do not go together."""
        if self.raw is not None and (self.resize or self.quality) is not None:
            raise UsageError(f"--raw {self.raw}: stores pixels, not JPEGs; leave --resize and --quality out")
        if self.quality is not None and self.resize is None:
            raise UsageError(f"--quality {self.quality}: without --resize files keep their own bytes; add --resize 256")


class Item(NamedTuple):
    """One image on its way into the pack."""

    name: str
    label: int
    content: Stored
    original: int
    """Of its own bytes, 64 bits of their SHA-256."""


def open_sources(data_dir: Path) -> Sources:
    """The splits to pack: `train`, and `test` if there is one under any of its names."""
    for pattern in ("{}", "{}-*.tar", "{}-*.parquet", "data/{}-*.parquet"):  # the last as Hugging Face has it
        train, *tests = (sorted(data_dir.glob(pattern.format(name))) for name in ("train", *TEST_NAMES))
        if train:
            opened = scan_first if pattern == "{}" else open_archives
            sources: Sources = {"train": opened(train)}
            test = next(filter(None, tests), [])
            return sources | ({"test": opened(test, sources["train"].class_names)} if test else {})
    raise DataError(f"--data-dir {data_dir}: holds no train/, train-*.tar or train-*.parquet; name another folder")


def scan_first(folders: list[Path], class_names: tuple[str, ...] | None = None) -> ImageTree:
    """The images of a folder."""
    return scan(folders[0], class_names=class_names, owner="the training split")


def item_of(source: ImageTree | ArchivedImages, sample: int, label: int, config: PackConfig) -> Item:
    """One image as it is stored. One that cannot be read stays as it is, for --skip-bad of the trainer."""
    path, root = source.path(sample), source.root if isinstance(source, ImageTree) else config.data_dir
    try:
        own = source.read(sample)
    except BadImage as error:
        raise DataError(f"{path}: cannot be read ({error}); repair or remove it") from None
    content, side = own, config.raw or config.resize
    if side is not None:
        try:
            content = smaller(own, side, config)
        except BadImage as error:
            to_stderr(f"WARNING data: {path}: not readable as an image ({error}); packed as it is")
    original = int.from_bytes(hashlib.sha256(own).digest()[:8], "little")
    return Item(str(path.relative_to(root)), label, content, original)


def smaller(own: bytes, side: int, config: PackConfig) -> Stored:
    """An image with its shorter side shrunk to `side`: pixels, or a JPEG; its own bytes if it was as small."""
    image = pixels(own, shortest_side=2 * side)
    height, width = image.shape[:2]
    scale = min(1.0, side / min(height, width))
    if scale < 1:
        image = resize(image, round(scale * height), round(scale * width)).permute(1, 2, 0).contiguous().numpy()
    if config.raw is not None:
        return image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=config.quality or 90)
    return buffer.getvalue() if scale < 1 else own


def write_part(path: Path, entries_path: Path, items: Iterable[Item]) -> None:
    """Write one part and, last, the entries of its images: where these are, it is whole. OSError as files say."""
    entries, digest, offset = [], hashlib.sha256(), 0
    with open(path, "wb") as file:
        for item in items:
            name, content = os.fsencode(item.name), memoryview(item.content).cast("B")  # pyright: ignore
            shape = item.content.shape[:2] if isinstance(item.content, np.ndarray) else (0, 0)
            for piece in (name, content):
                file.write(piece)
                digest.update(piece)
            entries.append((offset + len(name), len(content), len(name), zlib.crc32(content), item.label, *shape,
                            item.original))
            offset += len(name) + len(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    replace_file(entries_path, digest.digest() + np.array(entries, ENTRY).tobytes(), durable=True)


def write_parts(sources: Sources, folder: Path, config: PackConfig) -> None:
    """Write the parts that are not there yet, showing progress."""
    workers = config.workers or usable_cores()
    with (ThreadPoolExecutor(workers) as pool,  # what takes time is C code, which runs beside other threads
          tqdm(total=sum(map(len, sources.values())), unit=" images", disable=None) as bar):
        for split, source in sources.items():
            labels = source.targets.tolist()
            for number, samples in enumerate(chunks(range(len(source)), config.images_per_part)):
                def items(source: Any = source, samples: range = samples, labels: list[int] = labels) -> Iterator[Item]:
                    for some in chunks(samples, 32 * workers):
                        yield from pool.map(lambda sample: item_of(source, sample, labels[sample], config), some)
                        bar.update(len(some))

                name = part_name(split, number)
                if (folder / f"{name}.entries").exists():
                    bar.update(len(samples))
                else:
                    write_part(folder / "pack" / name, folder / f"{name}.entries", items())


def chunks(numbers: range, size: int) -> Iterator[range]:
    """The same numbers, so many at a time."""
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def finish(folder: Path, out: Path, head: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Add index, labels and record to the parts, and give the whole its name; returns the index of each split."""
    files: dict[str, dict[str, Any]] = {}
    indices = {}
    for split, num_images in head["splits"].items():
        contents = []
        for number in range(-(-num_images // head["images_per_part"])):
            name = part_name(split, number)
            contents.append((folder / f"{name}.entries").read_bytes())
            files[name] = {"bytes": (folder / "pack" / name).stat().st_size, "sha256": contents[-1][:32].hex()}
        indices[split] = index = np.frombuffer(b"".join(content[32:] for content in contents), ENTRY)
        for name, array in ((f"{split}.index", index), (f"{split}.labels", index["label"].astype("<i8"))):
            replace_file(folder / "pack" / name, array.tobytes(), durable=True)
            files[name] = {"bytes": array.nbytes, "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    replace_file(folder / "pack" / RECORD, json.dumps({**head, "files": files}, indent=1).encode(), durable=True)
    for path in (folder / "pack").glob(".*.tmp"):  # of a process that was killed
        path.unlink()
    os.rename(folder / "pack", out)
    sync_folder(out.parent)
    shutil.rmtree(folder)
    return indices


@contextlib.contextmanager
def begun(out: Path, plan: str) -> Iterator[Path]:
    """The folder of an unfinished pack, for this process alone; what is in it was begun by the same plan."""
    folder = unfinished(out)
    (folder / "pack").mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"--out {out}: another process is packing it; wait for that one") from None
        if not (folder / "plan.json").exists() or (folder / "plan.json").read_text() != plan:
            for path in (*folder.glob("*.entries"), *(folder / "pack").iterdir()):
                path.unlink()
            replace_file(folder / "plan.json", plan.encode(), durable=True)
        yield folder


def main(config: PackConfig) -> None:
    """Pack, or say that it is done."""
    config.check()
    out = config.out or Path(f"{os.path.abspath(config.data_dir)}.pack")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sources = open_sources(config.data_dir)
    for path, reason in [item for source in sources.values() for item in source.unreadable.items()]:
        raise DataError(f"{path}: cannot be read ({reason}); repair or remove it")
    if not all(map(len, sources.values())):
        raise DataError(f"--data-dir {config.data_dir}: has a split without images; add some, or remove it")
    kind = {"resize": config.resize, "quality": config.resize and (config.quality or 90), "raw": config.raw}
    head = {"format": FORMAT, **kind, "decoder": DECODER if config.raw or config.resize else None,
            "images_per_part": config.images_per_part, "class_names": sources["train"].class_names,
            "splits": {split: len(source) for split, source in sources.items()}}
    if os.path.lexists(out):
        raise UsageError(f"--out {out}: is there already; remove it, or choose another")
    plan = json.dumps({**head, "sources": [source.fingerprint() for source in sources.values()]})
    try:
        with begun(out, plan) as folder:
            write_parts(sources, folder, config)
            indices = finish(folder, out, head)
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({error.strerror}); free some space or choose another folder, "
                        f"then the same command continues") from None
    warn_of_twins(sources, indices)
    size = sum(path.stat().st_size for path in out.iterdir())
    say(f"{out}: {' + '.join(f'{len(source):,} {split}' for split, source in sources.items())} images in "
        f"{len(head['class_names'])} classes, {size / 2**20:,.1f} MiB"
        f"{describe_left_out(sum((source.left_out for source in sources.values()), Counter()))}")


def warn_of_twins(sources: Sources, indices: Mapping[str, NDArray[Any]]) -> None:
    """Count test images whose bytes are those of a training image."""
    if "test" in indices:
        twins = np.isin(indices["test"]["original"], indices["train"]["original"]).nonzero()[0]
        if len(twins):
            to_stderr(f"WARNING data: {len(twins):,} of {len(indices['test']):,} test images are byte for byte "
                      f"training images too, such as {sources['test'].path(int(twins[0]))}; they are no test")


if __name__ == "__main__":
    run(main, PackConfig)
