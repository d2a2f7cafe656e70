"""Fetching a data set so that its folder is whole or absent, also when several nodes share it."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets.errors import DataError

SILENT_SECONDS = 60.0  # a server that says nothing for so long is given up; torchvision itself would wait without end


@contextlib.contextmanager
def silence_ends() -> Iterator[None]:
    """Let every connection that this process makes meanwhile give up a server that says nothing."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def fetch(download: Callable[[str], object], data_dir: Path, folder: str, *, load: Callable[[Path], object]) -> None:
    """Have `download` fill a temporary folder, then move what it wrote, called `folder`, into place; for one process
    per node. Does nothing if `load` can read what is there. DataError without network, or if damage arrives."""
    with contextlib.suppress(DataError):
        load(data_dir)
        return

    def fill(place: str) -> None:
        try:
            with silence_ends():
                download(place)
        except (OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"--download: {folder} could not be fetched ({reason}); put it into --data-dir {data_dir} "
                            f"by hand, or train on --dataset synthetic") from None

    install(fill, data_dir, folder)


def install(fill: Callable[[str], object], data_dir: Path, folder: str) -> None:
    """Have `fill` write to a temporary folder, then move `folder` of it to `data_dir`, whole or by file; DataError."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".new-", ignore_cleanup_errors=True) as temporary:
            fill(temporary)
            source, target = Path(temporary) / folder, data_dir / folder
            try:
                os.rename(source, target)
            except OSError:  # it is there: another node was faster, or some files were
                for path in [path for path in source.rglob("*") if path.is_file()]:
                    place = target / path.relative_to(source)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, place)
    except OSError as error:
        raise DataError(f"--data-dir {data_dir}: cannot be written ({error.strerror or error}); try another") from None
