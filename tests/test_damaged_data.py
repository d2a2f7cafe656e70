"""Files of MNIST and CIFAR-10 that are cut, flipped, boundless or incomplete: one line, in bounded memory."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from datasets import cifar, fashion_mnist, idx, mnist
from datasets.errors import DataError
from tests.helpers.images import write_idx
from tests.helpers.processes import ROOT

SHAPES = {"train-images": (20, 28, 28), "train-labels": (20,), "t10k-images": (10, 28, 28), "t10k-labels": (10,)}


def write_mnist(folder: Path, *, end: str = "") -> Path:
    """The four IDX files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape in SHAPES.items():
        values = np.random.default_rng(0).integers(0, 10 if len(shape) == 1 else 256, shape)
        write_idx(folder / f"{name}-idx{len(shape)}-ubyte{end}", values)
    return folder


def write_npz(path: Path, *, compressed: bool = False) -> Path:
    arrays = [np.random.default_rng(0).integers(0, 10 if len(shape) == 1 else 256, shape, dtype=np.uint8)
              for shape in SHAPES.values()]
    names = ("x_train", "y_train", "x_test", "y_test")
    (np.savez_compressed if compressed else np.savez)(path, **dict(zip(names, arrays, strict=True)))
    return path


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a part cut out or off, or filled with one byte."""
    place, length = rng.randrange(len(content)), rng.choice([1, 2, 4, 8, 300])
    kind = rng.choice(["flip", "flip", "flip", "cut", "remove", "fill"])
    if kind == "cut":
        return content[:place]
    if kind == "remove":
        return content[:place] + content[place + length :]
    if kind == "fill":
        return content[:place] + bytes([rng.choice([0, 127, 255])]) * length + content[place + length :]
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


@pytest.mark.parametrize("kind", ["idx", "gz", "npz", "npz-compressed"])
def test_random_damage_is_read_or_is_a_data_error(kind: str, tmp_path: Path):
    if kind.startswith("npz"):
        target = write_npz(tmp_path / "mnist.npz", compressed=kind != "npz")
    else:
        end = ".gz" if kind == "gz" else ""
        target = write_mnist(tmp_path, end=end) / f"train-images-idx3-ubyte{end}"
    content, rng, read = target.read_bytes(), random.Random(kind), 0
    regions = [content[:400], content[-700:]]  # headers and directories, where the claims are
    for number in range(600):
        whole = damaged(content, rng)
        if number % 2:
            part = rng.choice(regions)
            whole = content.replace(part, damaged(part, rng), 1)
        target.write_bytes(whole)
        with contextlib.suppress(DataError):
            mnist.load(tmp_path)
            read += 1
    assert read < 500


def header_of(shape: tuple[int, ...], num_dimensions: int = 3) -> bytes:
    return bytes([0, 0, 8, num_dimensions]) + b"".join(size.to_bytes(4, "big") for size in shape)


def npy_claiming(shape: tuple[int, ...]) -> bytes:
    """An .npy file whose header promises more than there is."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(100)


def claims_too_much(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(header_of((10**9, 28, 28)) + bytes(1000))


def claims_too_much_gzipped(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header_of((2**32 - 1, 2**32 - 1, 28))))


@functools.cache
def zeros_gzipped() -> bytes:
    """5 GiB of zeros, as members one after the other."""
    return 80 * gzip.compress(bytes(2**26), 1)


def bomb(folder: Path) -> None:
    """5 GB of zeros in 5 MB, behind an honest header."""
    (folder / "train-images-idx3-ubyte").unlink()
    header = gzip.compress(header_of((5 * 2**30 // 784, 28, 28)))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(header + zeros_gzipped())


def bomb_behind_a_small_header(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").unlink()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header_of((20,), 1)) + zeros_gzipped())


def npz_that_claims(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    with zipfile.ZipFile(folder / "mnist.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", npy_claiming((10**12, 28, 28)))


def npz_bomb(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    with zipfile.ZipFile(folder / "mnist.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", npy_claiming((2 * 2**30,)) + bytes(2**24))
        for member in archive.infolist():
            member.file_size = 2 * 2**30  # what the directory at the end will say


READ = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from datasets import mnist
from datasets.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    mnist.load(Path(sys.argv[2]))
except DataError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("spoil", [bomb, npz_that_claims, *(pytest.param(each, marks=pytest.mark.slow) for each in (
    claims_too_much, claims_too_much_gzipped, bomb_behind_a_small_header, npz_bomb))])
def test_claims_and_bombs_are_refused_in_bounded_memory(spoil: Callable[[Path], None], tmp_path: Path):
    folder = write_mnist(tmp_path / "data")
    spoil(folder)
    done = subprocess.run([sys.executable, "-c", READ, str(ROOT), str(folder)], capture_output=True, text=True,
                          timeout=150, check=True)
    kilobytes, _, message = done.stdout.partition(" ")
    assert message.count("\n") == 1, done
    assert str(folder) in message
    assert int(kilobytes) < 2**18  # 256 MiB


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small archive in the place of the published one: torchvision and we take its sums for the right ones."""
    source = tmp_path / "source" / CIFAR10.base_folder
    source.mkdir(parents=True)
    rng, sums = np.random.default_rng(1), {}
    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    for name in names:
        batch = {"data": rng.integers(0, 256, (6, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3, 4, 5]}
        (source / name).write_bytes(pickle.dumps(batch))
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {label}" for label in range(10)]}))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in source.iterdir()}
    archive = tmp_path / "published.tar.gz"
    with tarfile.open(archive, "w:gz") as content:
        content.add(source, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[5], sums[names[5]]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        yield archive
        server.shutdown()


def assert_loads(data_dir: Path) -> None:
    train, test = cifar.load(data_dir)
    assert (len(train), len(test)) == (30, 6)
    assert not [path for path in data_dir.iterdir() if path.name.startswith(".")]


def test_the_published_archive_alone_is_unpacked_and_checked(published: Path, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    cifar.prepare(data, download=False)
    with pytest.raises(DataError, match=f"is not there; add --download, put {CIFAR10.filename} there"):
        cifar.load(data)
    shutil.copy(published, data / CIFAR10.filename)
    cifar.prepare(data, download=False)
    assert_loads(data)
    (data / CIFAR10.base_folder / "data_batch_3").unlink()  # some of its files went missing
    cifar.prepare(data, download=False)
    assert_loads(data)


def test_a_damaged_archive_is_named_and_replaced_by_a_download(published: Path, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    (data / CIFAR10.filename).write_bytes(published.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{CIFAR10.filename}: is damaged.* or add --download"):
        cifar.prepare(data, download=False)
    cifar.prepare(data, download=True)
    assert_loads(data)


@pytest.mark.parametrize("spoil", [lambda folder: (folder / "data_batch_2").unlink(),
                                   lambda folder: (folder / "test_batch").write_bytes(b"half"),
                                   lambda folder: [path.unlink() for path in folder.iterdir()]])
def test_half_a_folder_is_completed_by_a_download(spoil: Callable[[Path], object], published: Path, tmp_path: Path):
    data = tmp_path / "data"
    cifar.prepare(data, download=True)
    spoil(data / CIFAR10.base_folder)
    with pytest.raises(DataError, match="--download"):
        cifar.load(data)
    cifar.prepare(data, download=True)
    assert_loads(data)


@pytest.mark.parametrize(("dataset", "folder"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST")])
def test_half_of_mnists_files_are_completed_by_a_download(dataset: object, folder: str, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch):
    raw = write_mnist(tmp_path / "data" / folder / "raw")
    whole = write_mnist(tmp_path / "whole")
    (raw / "train-labels-idx1-ubyte").unlink()
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"cut")
    fetched: list[str] = []

    class Fetched:
        def __init__(self, place: str, *, download: bool) -> None:
            fetched.append(place)
            shutil.copytree(whole, Path(place) / folder / "raw")

    monkeypatch.setattr(dataset, folder, Fetched)
    for _ in range(2):  # the second time it is all there
        dataset.prepare(tmp_path / "data", download=True)  # pyright: ignore[reportAttributeAccessIssue]
    assert len(fetched) == 1
    train, _ = dataset.load(tmp_path / "data")  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(train.targets, idx.load(whole, tuple("0123456789"))[0].targets)
