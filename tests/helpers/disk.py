"""A disk that may lose what was not synced: record the file-system calls of some code, then replay any prefix of them.

`record` notes every create, write, fsync, rename, link and unlink below a folder. `Disk` replays them on two levels,
as POSIX allows: a file's content is safe after its fsync, and a name in a folder after the folder's fsync. After a
crash, each change of a name that was not synced may or may not have reached the disk, as may each file's content.
"""

import builtins
import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

Call = tuple[Any, ...]


@contextlib.contextmanager
def record(folder: Path) -> Iterator[list[Call]]:
    """The calls below `folder` while the block runs: (kind, name, ...), all of files directly in it."""
    calls: list[Call] = []
    real = {"open": builtins.open, "fsync": os.fsync, "replace": os.replace, "link": os.link, "unlink": os.unlink}

    def inside(path: Any) -> bool:
        return Path(path).parent == folder

    def recorded_open(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        file = real["open"](path, mode, *arguments, **named)
        if not isinstance(path, int) and inside(path) and "w" in mode:
            calls.append(("create", Path(path).name))
            return RecordedFile(file, Path(path).name, calls)
        return file

    def recorded_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == folder or inside(path):
            calls.append(("fsync folder",) if path == folder else ("fsync", path.name))
        real["fsync"](descriptor)

    def recorded(kind: str) -> Any:
        def action(*paths: Any) -> None:
            real[kind](*paths)
            if inside(paths[0]):
                calls.append((kind, *(Path(path).name for path in paths)))
        return action

    with (patch("builtins.open", recorded_open), patch("os.fsync", recorded_fsync),
          patch("os.replace", recorded("replace")), patch("os.link", recorded("link")),
          patch("os.unlink", recorded("unlink"))):
        yield calls


class RecordedFile:
    """A file opened for writing that notes what is written when, as the kernel may see it at once."""

    def __init__(self, file: Any, name: str, calls: list[Call]) -> None:
        self._file, self._name, self._calls = file, name, calls

    def write(self, data: bytes) -> int:
        self._calls.append(("write", self._name, bytes(data)))
        return self._file.write(data)

    def __enter__(self) -> "RecordedFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Content:
    """A file apart from its names: what was written, and how much of that is safe."""

    def __init__(self, data: bytes = b"") -> None:
        self.written, self.synced = bytearray(data), len(data)

    def after_crash(self, kept: str) -> bytes:
        """`none`, `half` or `all` of what was not synced."""
        loose = len(self.written) - self.synced
        return bytes(self.written[: self.synced + {"none": 0, "half": loose // 2, "all": loose}[kept]])


class Disk:
    """Names and contents as the running system sees them, the names that are safe, and the changes that are not."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.names = {name: Content(data) for name, data in files.items()}
        self.safe = dict(self.names)
        self.pending: list[dict[str, Content | None]] = []

    def apply(self, call: Call) -> None:
        """Do one recorded call."""
        kind, *names = call
        if kind == "create":
            self._change({names[0]: Content()})
        elif kind == "write":
            self.names[names[0]].written += names[1]
        elif kind == "fsync":
            self.names[names[0]].synced = len(self.names[names[0]].written)
        elif kind == "replace":
            self._change({names[0]: None, names[1]: self.names[names[0]]})
        elif kind == "link":
            self._change({names[1]: self.names[names[0]]})
        elif kind == "unlink":
            self._change({names[0]: None})
        elif kind == "fsync folder":
            self.safe, self.pending = dict(self.names), []

    def _change(self, change: dict[str, Content | None]) -> None:
        self.names = changed(self.names, change)
        self.pending.append(change)

    def after_crash(self) -> Iterator[dict[str, bytes]]:
        """Every state that a crash now may leave: any subset of pending names, and three fates of unsynced content."""
        for chosen in itertools.product((False, True), repeat=len(self.pending)):
            names = self.safe
            for change, reached_disk in zip(self.pending, chosen, strict=True):
                names = changed(names, change) if reached_disk else names
            for kept in ("none", "half", "all"):
                yield {name: content.after_crash(kept) for name, content in names.items()}


def changed(names: dict[str, Content], change: dict[str, Content | None]) -> dict[str, Content]:
    """The names after one change of a folder; a rename's two parts reach the disk together."""
    merged: dict[str, Content | None] = {**names, **change}
    return {name: content for name, content in merged.items() if content is not None}
