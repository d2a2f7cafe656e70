"""Fetching a data set so that its folder is whole or absent, also when several nodes share it."""

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets.errors import DataError

SILENT_SECONDS = 60.0  # a server that says nothing for so long is given up; torchvision itself would wait without end


def fetch(download: Callable[[str], object], data_dir: Path, folder: str, *, name: str) -> None:
    """Have `download` fill a temporary folder, then move what it wrote, called `folder`, into place whole.

    For one process per node; others wait. Does nothing if the folder is there.

    Raises:
        DataError: without network, or if what arrives is damaged.
    """
    if (data_dir / folder).is_dir():
        return
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENT_SECONDS)  # of every connection that this process makes meanwhile
    try:
        with temporary_folder(data_dir, prefix=".download-") as temporary:
            download(str(temporary))
            move_in_place(temporary / folder, data_dir / folder)
    except (OSError, RuntimeError) as error:
        raise DataError(f"--download: {name} could not be fetched ({error}); put it into --data-dir {data_dir} by "
                        f"hand, or train on --dataset synthetic") from None
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def temporary_folder(parent: Path, *, prefix: str) -> Iterator[Path]:
    """A folder on the same file system as `parent`, which is made, and gone at the end or when this process exits."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True) as name:
        yield Path(name)


def move_in_place(source: Path, target: Path) -> None:
    """Rename, unless another node that shares the folder was faster."""
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(source, ignore_errors=True)
