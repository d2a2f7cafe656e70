"""Faults of a download, which one rank does while the others wait: it outlasts --timeout, or a stop comes."""

import gzip
import hashlib
import http.server
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.hooks import Hook, download_mnist_from
from tests.helpers.processes import read_json
from tests.helpers.server import slack, start

FLAGS = ["--download", "--batch-size", "60", "--epochs", "1", "--threads", "1", "--no-pictures", "--run-name", "r"]
FILES = {"train-images-idx3": (300, 28, 28), "train-labels-idx1": (300,), "t10k-images-idx3": (60, 28, 28),
         "t10k-labels-idx1": (60,)}


def idx_file(shape: tuple[int, ...]) -> bytes:
    """A gzipped IDX file of random pixels, or of labels."""
    values = np.random.default_rng(0).integers(0, 10 if len(shape) == 1 else 256, shape, dtype=np.uint8)
    header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    return gzip.compress(header + values.tobytes())


class Mirror:
    """An HTTP server with the four files of MNIST's format, which come in pieces with pauses between."""

    def __init__(self, *, seconds: float) -> None:
        self.files = {f"{name}-ubyte.gz": idx_file(shape) for name, shape in FILES.items()}
        self.asked = threading.Event()
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = mirror.files[self.path.rpartition("/")[2]]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                mirror.asked.set()
                for first in range(0, len(content), size := len(content) // 10 + 1):
                    self.wfile.write(content[first : first + size])
                    time.sleep(seconds / 40)  # four files, each in ten pieces

            do_HEAD = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def hook(self) -> Hook:
        """Has torchvision fetch from here."""
        checksums = {name: hashlib.md5(content).hexdigest() for name, content in self.files.items()}
        return download_mnist_from(f"http://127.0.0.1:{self.server.server_port}/", checksums)


@pytest.fixture
def slow_mirror() -> Iterator[Mirror]:
    mirror = Mirror(seconds=8)
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_download_slower_than_the_timeout_is_no_hang(slow_mirror: Mirror, tmp_path: Path):
    flags = ["--data-dir", tmp_path / "data", "--output-dir", tmp_path, "--timeout", "3", *FLAGS]
    with start("mnist", *flags, folder=tmp_path, ranks=2, hook=slow_mirror.hook) as job:
        job.wait_until(slow_mirror.asked.is_set)
        began = time.monotonic()
        ended = job.wait(90)
    assert ended.codes == [0, 0], ended.err
    assert time.monotonic() - began > 6
    assert read_json(tmp_path / "r" / "result.json")["num_samples"] == 60
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_during_a_download_ends_all_ranks_within_seconds(rank: int, slow_mirror: Mirror, tmp_path: Path):
    flags = ["--data-dir", tmp_path / "data", "--output-dir", tmp_path, "--timeout", "60", *FLAGS]
    with start("mnist", *flags, folder=tmp_path, ranks=2, hook=slow_mirror.hook) as job:
        job.wait_until(slow_mirror.asked.is_set)
        job.signal(signal.SIGTERM, rank)
        began = time.monotonic()
        ended = job.wait(30)
        assert time.monotonic() - began < 4 * slack()
    assert ended.codes == [75, 75], ended.err
    assert not ended.errors
    assert read_json(tmp_path / "r" / "status.json")["state"] == "PREEMPTED"
    assert not list((tmp_path / "data").iterdir())
