"""Checkpoints that are whole or absent, written in the background; see restore.py for the way back.

A save copies the state into memory kept for it (all that training waits for), and a thread writes a temporary file,
fsyncs it, reads it back, renames it, fsyncs the folder, and then commits it by writing its manifest the same way.
A file without a manifest was never finished. Only rank 0 writes; every rank calls, for the parts that are collective.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from launch.command_line import CheckpointError, RunError
from launch.run_folder import RunFolder, replace_file, sync_folder

FORMAT = 1
READ_BYTES = 1 << 22


class Checkpointer:
    """Writes the checkpoints of one run, one at a time."""

    def __init__(self, folder: RunFolder, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.last_step: int | None = None
        self.num_saves, self.wait_seconds = 0, 0.0
        self._snapshot: Any = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: dict[str, Any], *, is_best: bool = False) -> None:
        """Copy `state` now and write it in the background; waits first for a save still under way. Rank 0 only.

        Raises:
            CheckpointError: if the disk is too full, or an earlier save failed.
        """
        began = time.perf_counter()
        self.join()
        self.folder.check_fence()
        check_free_space(self.folder.checkpoints, state)
        self._snapshot = copy_tree(state, self._snapshot)
        self._thread = threading.Thread(target=self._write, args=(self._snapshot, is_best), name="checkpoint")
        self._thread.start()
        self.last_step = state["step"]
        self.num_saves += 1
        self.wait_seconds += time.perf_counter() - began

    def join(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, state: dict[str, Any], is_best: bool) -> None:
        try:
            path = write_checkpoint(self.folder.checkpoints, state, check_fence=self.folder.check_fence)
            if is_best:
                link_best(path)
            prune(self.folder.checkpoints, keep=self.keep)
        except RunError as error:
            self._error = error
        except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
            self._error = CheckpointError(f"{self.folder.checkpoints}: cannot be written ({error}); free some space, "
                                          f"then start the same command again")


def write_checkpoint(folder: Path, state: dict[str, Any], *, check_fence: Callable[[], None] = lambda: None) -> Path:
    """Write one checkpoint durably and return its path. The manifest, written last, is the commit point.

    Raises:
        CheckpointError: if what was read back differs from what was written, or `check_fence` says so.
        OSError: as the file system says. The temporary file is removed.
    """
    path = checkpoint_path(folder, state["step"])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            writer = HashingWriter(file)
            torch.save(state, writer)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        if file_sha256(temporary) != writer.sha256.hexdigest():
            raise CheckpointError(f"{temporary}: differs from what was written; check the disk")
        check_fence()
        manifest_path(path).unlink(missing_ok=True)  # of an earlier file of this step, about to be replaced
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)
    manifest = {"file": path.name, "size": writer.size, "sha256": writer.sha256.hexdigest(), "step": state["step"],
                "epoch": state["epoch"], "format": FORMAT, "fingerprint": state["fingerprint"]}
    check_fence()
    replace_file(manifest_path(path), (json.dumps(manifest, indent=2) + "\n").encode(), durable=True)
    return path


class HashingWriter:
    """A file that torch.save writes to, hashing and counting on the way; it only ever appends."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Append."""
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Pass on to the file."""
        self.file.flush()


def checkpoint_path(folder: Path, step: int) -> Path:
    """`step-00000400.pt`: sorts by step."""
    return folder / f"step-{step:08d}.pt"


def manifest_path(path: Path) -> Path:
    """The manifest beside a checkpoint."""
    return path.with_suffix(".json")


def file_sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def link_best(path: Path) -> None:
    """Make best.pt and best.json this checkpoint: a second name for the same bytes, or a copy where links fail."""
    for source, name in ((path, "best.pt"), (manifest_path(path), "best.json")):
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path.with_name(name))
    sync_folder(path.parent)


def prune(folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` committed checkpoints; best.pt is a name of its own and stays."""
    for manifest in sorted(folder.glob("step-*.json"))[:-keep]:
        manifest.unlink(missing_ok=True)  # first: a checkpoint without a manifest does not count
        manifest.with_suffix(".pt").unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed saves left behind: temporaries, and checkpoints that were never committed."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob("step-*.pt"):
        if not manifest_path(path).exists():
            path.unlink(missing_ok=True)


def check_free_space(folder: Path, state: Any) -> None:
    """Raise CheckpointError if the file would not fit, before anything is copied."""
    needed = tree_bytes(state) * 1.02 + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder}: a checkpoint needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are "
                              f"free; free some space, then start the same command again")


def tree_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(tree_bytes(child) for child in children)


def copy_tree(tree: Any, into: Any = None) -> Any:
    """A copy of nested dicts and lists whose tensors lie in CPU memory, reusing the tensors of an earlier copy.

    Allocating anew would cost a page fault for every 4 KiB: several times the copy itself.
    """
    if isinstance(tree, Tensor):
        fits = isinstance(into, Tensor) and into.shape == tree.shape and into.dtype == tree.dtype
        target = into if fits else torch.empty(tree.shape, dtype=tree.dtype, pin_memory=tree.is_cuda)
        return target.copy_(tree.detach())
    if isinstance(tree, dict):
        known = into if isinstance(into, dict) else {}
        return {name: copy_tree(child, known.get(name)) for name, child in tree.items()}
    if isinstance(tree, list | tuple):
        known = into if isinstance(into, list | tuple) and len(into) == len(tree) else [None] * len(tree)
        return type(tree)(copy_tree(child, old) for child, old in zip(tree, known, strict=True))
    return tree
