"""Put all images of a data set into one folder of a few large files, which trainers/image_folder.py trains from.

    python datasets/pack.py --data-dir photos --out photos.pack --resize 256      # smaller JPEGs: several times faster
    python datasets/pack.py --data-dir photos --out photos.pack --raw 256         # pixels: nothing to decode"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets.errors import DataError
from datasets.image_folder import describe
from datasets.images import archives, packed, read
from launch import command_line, launcher
from launch.errors import AtLeast, UsageError, say, to_stderr
from launch.files import replace_file, sync_folder

LONGEST_JPEG = 65_500  # pixels of a side that libjpeg writes
Item = tuple[str, int, read.Stored, int]  # name, label, content, and 64 bits of the SHA-256 of the file's own bytes


class BeingPacked(DataError):
    """Another process writes the same pack."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Pack a folder of images, tar shards or Parquet files for trainers/image_folder.py."""
    data_dir: Path = Path("data")
    """Holds train/ and test/ (or val/), or train-*.tar and test-*.tar, or train-*.parquet and test-*.parquet."""
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


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What is packed, as what, and where to."""
    sources: Mapping[str, Any]  # ImageSource or ArchivedImages of each split
    out: Path
    convert: Callable[[read.Stored], read.Stored]  # a file's bytes to what is stored of it; BadImage for no image
    head: Mapping[str, Any]  # the beginning of pack.json
    workers: int = field(default_factory=launcher.usable_cores)
    is_cache: bool = False  # then what cannot be read has no bytes, and is named when it is trained on

    def write(self) -> Iterator[None]:
        """Pack, once per image not there from before; DataError for another packer, a bad source or a full disk."""
        lengths = {split: len(source) for split, source in self.sources.items()}
        head = {"format": packed.FORMAT, **self.head, "splits": lengths}
        size, known = head["images_per_part"], () if self.is_cache else self.sources.values()  # in a cache's name
        plan = json.dumps({**head, "sources": [source.fingerprint() for source in known]})
        try:
            with begun(self.out, plan) as folder:
                for split, source in self.sources.items():
                    labels = source.targets.tolist()
                    for number, start in enumerate(range(0, len(source), size)):
                        samples = range(start, min(start + size, len(source)))
                        name = packed.part_name(split, number)
                        entries = folder / f"{name}.entries"
                        yield from ((None for _ in samples) if entries.exists() else
                                    write_part(folder / "pack" / name, entries, self.items(source, samples, labels)))
                finish(folder, self.out, head)
        except OSError as error:
            flag = "--cache-dir" if self.is_cache else "--out"
            raise DataError(f"{flag} {self.out}: cannot be written ({error.strerror}); free some space or choose "
                            f"another folder, then the same command continues") from None

    def items(self, source: Any, samples: range, labels: list[int]) -> Iterator[Item]:
        """Some images of a split, in order."""
        with ThreadPoolExecutor(self.workers) as pool:  # what takes time is C code, which runs beside other threads
            for start in range(0, len(samples), 32 * self.workers):  # not all at once, which would fill the memory
                some = samples[start : start + 32 * self.workers]
                yield from pool.map(lambda sample: self.item(source, sample, labels[sample]), some)

    def item(self, source: Any, sample: int, label: int) -> Item:
        """One image as it is stored. One that cannot be decoded stays as it is, for --skip-bad of the trainer."""
        path = source.path(sample)
        try:
            own = source.read(sample)
        except read.BadImage as error:
            if not self.is_cache:
                raise DataError(f"{path}: cannot be read ({error}); repair or remove it") from None
            own = b""
        try:
            content = self.convert(own)
        except read.BadImage as error:
            content = own
            if not self.is_cache:
                to_stderr(f"WARNING data: {path}: not readable as an image ({error}); packed as it is")
        original = int.from_bytes(hashlib.sha256(own).digest()[:8], "little")
        return str(path.relative_to(source.folder)), label, content, original

    def fill(self) -> Generator[None]:
        """Write a cache that is not there, or wait for another process that does."""
        if not packed.is_whole(self.out):
            num_images = sum(map(len, self.sources.values()))
            to_stderr(f"decoding {num_images:,} images into {self.out} "
                      f"({3 * self.head['raw'] ** 2 * num_images / 2**20:.0f} MiB or more)")
        while not packed.is_whole(self.out):
            try:
                yield from self.write()
            except BeingPacked:
                time.sleep(0.2)
                yield


def smaller(own: read.Stored, *, side: int, quality: int | None) -> read.Stored:
    """An image shrunk to a shorter side: pixels, or a JPEG of a quality; its own if it is small, or too long."""
    image = read.pixels(own, shortest_side=2 * side)
    height, width = image.shape[:2]
    scale = min(1.0, side / min(height, width))
    if quality is not None and (scale == 1 or scale * max(height, width) > LONGEST_JPEG):
        return own
    if scale < 1:
        image = read.resize(image, round(scale * height), round(scale * width)).permute(1, 2, 0).contiguous().numpy()
    if quality is None:
        return image
    Image.fromarray(image).save(buffer := io.BytesIO(), "JPEG", quality=quality)
    return buffer.getvalue()


def write_part(path: Path, entries_path: Path, items: Iterable[Item]) -> Iterator[None]:
    """Write one part, once for each image, and, last, their entries: where these are, it is whole."""
    entries, digest, offset = [], hashlib.sha256(), 0
    with open(path, "wb") as file:
        for text, label, stored, original in items:
            name, content = os.fsencode(text), memoryview(stored).cast("B")  # pyright: ignore
            shape = stored.shape[:2] if isinstance(stored, np.ndarray) else (0, 0)
            for piece in (name, content):
                file.write(piece)
                digest.update(piece)
            entries.append((offset + len(name), len(content), len(name), zlib.crc32(content), label, *shape, original))
            offset += len(name) + len(content)
            yield
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    replace_file(entries_path, digest.digest() + np.array(entries, packed.ENTRY).tobytes(), durable=True)


def finish(folder: Path, out: Path, head: Mapping[str, Any]) -> None:
    """Add index, labels and record to the parts, and give the whole its name."""
    files: dict[str, dict[str, Any]] = {}
    for split, num_images in head["splits"].items():
        contents = []
        for number in range(-(-num_images // head["images_per_part"])):
            name = packed.part_name(split, number)
            contents.append((folder / f"{name}.entries").read_bytes())
            files[name] = {"bytes": (folder / "pack" / name).stat().st_size, "sha256": contents[-1][:32].hex()}
        index = np.frombuffer(b"".join(content[32:] for content in contents), packed.ENTRY)
        for name, array in ((f"{split}.index", index), (f"{split}.labels", index["label"].astype("<i8"))):
            replace_file(folder / "pack" / name, array.tobytes(), durable=True)
            files[name] = {"bytes": array.nbytes, "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
    replace_file(folder / "pack" / packed.RECORD, json.dumps({**head, "files": files}, indent=1).encode(), durable=True)
    for path in (folder / "pack").glob(".*.tmp"):  # of a process that was killed
        path.unlink()
    os.rename(folder / "pack", out)
    sync_folder(out.parent)
    shutil.rmtree(folder)


@contextlib.contextmanager
def begun(out: Path, plan: str) -> Iterator[Path]:
    """The folder of an unfinished pack, for this process alone; what is in it was begun by the same plan."""
    folder = out.with_name(out.name + packed.PARTIAL)
    (folder / "pack").mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BeingPacked(f"--out {out}: another process is packing it; wait for that one") from None
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
    sources = archives.open_sources(config.data_dir)
    for path, reason in [item for source in sources.values() for item in source.unreadable.items()]:
        raise DataError(f"{path}: cannot be read ({reason}); repair or remove it")
    if not all(map(len, sources.values())):
        raise DataError(f"--data-dir {config.data_dir}: has a split without images; add some, or remove it")
    if os.path.lexists(out):
        raise UsageError(f"--out {out}: is there already; remove it, or choose another")
    side, quality = config.raw or config.resize, config.resize and (config.quality or 90)
    convert = partial(smaller, side=side, quality=quality) if side is not None else lambda own: own
    head = {"resize": config.resize, "quality": quality, "raw": config.raw, "decoder": read.DECODER if side else None,
            "images_per_part": config.images_per_part, "class_names": sources["train"].class_names}
    packing = Packing(sources=sources, out=out, convert=convert, head=head,
                      workers=config.workers or launcher.usable_cores())
    for _ in tqdm(packing.write(), total=sum(map(len, sources.values())), unit=" images", disable=None):
        pass
    if "test" in sources:
        test, train = (np.fromfile(out / f"{split}.index", packed.ENTRY)["original"] for split in ("test", "train"))
        if len(twins := np.isin(test, train).nonzero()[0]):
            to_stderr(f"WARNING data: {len(twins):,} of {len(test):,} test images are byte for byte "
                      f"training images too, such as {sources['test'].path(int(twins[0]))}; they are no test")
    say(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 2**20:,.1f} MiB, {describe(sources)}")


if __name__ == "__main__":
    command_line.run(main, PackConfig)
