"""Fetching a data set so that its folder is whole or absent, also when several nodes share it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from datasets.errors import DataError, first_line


def fetch(download: Callable[[str], object], data_dir: Path, folder: str, *, name: str) -> None:
    """Have `download` fill a temporary folder, then move what it made, called `folder`, in place whole.

    For one process a node; others wait. Does nothing if the folder is there.

    Raises:
        DataError: without network, or if what arrives is damaged.
    """
    if (data_dir / folder).is_dir():
        return
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as temporary:
            download(temporary)
            move_in_place(Path(temporary) / folder, data_dir / folder)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"--download: {name} could not be fetched ({first_line(error)}); put it into --data-dir {data_dir} by "
            f"hand, or train on --dataset synthetic"
        ) from None


def move_in_place(source: Path, target: Path) -> None:
    """Rename, unless another node that shares the folder was faster."""
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(source, ignore_errors=True)


