"""Files that are whole or absent: what every writer of a run folder uses; and where this checkout is."""

import contextlib
import errno
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launch.errors import CheckpointError, to_stderr

ROOT = Path(__file__).resolve().parents[1]  # of this checkout
warn_once = functools.cache(to_stderr)


def no_check() -> None:
    """In place of a `check_fence` where only one process writes."""


@contextlib.contextmanager
def replacing(path: Path, check_fence: Callable[[], None] = no_check) -> Iterator[Path]:
    """The path of a temporary beside a file, which it replaces after the block and `check_fence`, or no trace."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        check_fence()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: bytes, *, durable: bool = False,
                 check_fence: Callable[[], None] = no_check) -> None:
    """Write a file that is whole or absent; if `durable`, it and the folder's entry are then on the disk."""
    with replacing(path, check_fence) as temporary, open(temporary, "wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk. A file system that cannot, as of some networks, costs one WARNING."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        warn_once(f"WARNING checkpoint: this file system cannot sync folders ({error.strerror}): a power cut may lose "
                  f"new files")
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """Raises CheckpointError for what the file system refuses in the block, with what to do about it."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if str(place).startswith("--") else error.strerror or error
        raise CheckpointError(f"{place}: cannot be written ({reason}); {remedy(error)}, then start the same command "
                              f"again") from None


def remedy(error: OSError) -> str:
    """What a user can do about what a file system refused."""
    remedies = {"free some space": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
                "make it readable and writable": (errno.EACCES, errno.EPERM, errno.EROFS),
                "move away what has that name": (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
                "move it back if it was moved while in use": (errno.ENOENT,)}
    return next((text for text, numbers in remedies.items() if error.errno in numbers), "check the disk")


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if it is missing, damaged or something else."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text()) if path.is_file() else None  # to read a pipe may wait without end
        return content if isinstance(content, dict) else None
    return None


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a metrics.jsonl, as text and as read; without what a kill has cut off, or anything else."""
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            line = json.loads(text)
            if isinstance(line["split"], str) and isinstance(line["step"], int):
                yield text, line
