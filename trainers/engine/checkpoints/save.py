"""Checkpoints that are whole or absent, written in the background; load.py reads them. A thread writes a snapshot of
the state to a temporary file, fsyncs it, reads it back, renames it, fsyncs the folder, and commits by its manifest."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from launch.errors import CheckpointError, NumericError
from launch.files import no_check, replace_file, replacing, sync_folder, writing
from trainers.engine.checkpoints.files import checkpoint_path, give_name, manifest_path, prune
from trainers.engine.checkpoints.snapshot import Snapshot, not_finite, tensors_in
from trainers.engine.run.folder import RunFolder

FORMAT = 1
LOWER_RATE = ("start again with a lower --learning-rate or with --clip-grad-norm, as another --run-name; the last good "
              "checkpoint is kept")


class Checkpointer:
    """Writes the checkpoints of one run, one at a time, and counts what training waited for them."""

    def __init__(self, folder: RunFolder, *, keep: int) -> None:
        self.folder, self.keep, self.num_saves, self.wait_seconds = folder, keep, 0, 0.0
        self._snapshot, self._thread = Snapshot(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._copied: Future[None] = Future()
        self._copied.set_result(None)
        self._under_way = self._copied

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Get the snapshot's memory in the background, so that the first save is as quick as the others."""
        self._under_way = self._thread.submit(self._snapshot.allocate, state)

    def save(self, state: Mapping[str, Any], *, is_best: bool = False) -> None:
        """Start to copy and write `state`; `finish_copy` must follow. Raises what the save before it did."""
        self.join()
        began = time.perf_counter()
        self.folder.ownership.check()
        place = self.folder.checkpoints
        needed = sum(tensor.nbytes for _, tensor in tensors_in(state)) * 1.02 + 2**20  # 1 % more at 100 kB per tensor
        with writing(place):
            free = shutil.disk_usage(place).free
        if free < needed:
            raise CheckpointError(f"{place}: a checkpoint needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB "
                                  f"are free; free some space, then start the same command again")
        self._snapshot.begin(state)
        self._copied = self._thread.submit(self._snapshot.copy_rest)
        self._under_way = self._thread.submit(self._write, is_best)
        self.num_saves += 1
        self.wait_seconds += time.perf_counter() - began

    def finish_copy(self) -> None:
        """Wait until parameters and optimizer state are copied, and so may change."""
        began = time.perf_counter()
        self._copied.exception()  # waits; what it was, the save raises
        self.wait_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Wait for the save under way, whether or not it fails."""
        self._under_way.exception()

    def join(self) -> None:
        """Wait for the save under way; raises as it did."""
        began = time.perf_counter()
        self.wait()
        self.wait_seconds += time.perf_counter() - began
        self._under_way.result()

    def _write(self, is_best: bool) -> None:
        self._copied.result()  # raises what the copy did
        if self._snapshot.queued is not None:
            self._snapshot.queued.synchronize()
        folder, place, fence = self.folder, self.folder.checkpoints, self.folder.ownership.check
        with writing(place):
            path = write_checkpoint(place, self._snapshot.tree, check_fence=fence, sync_metrics=folder.sync_metrics)
            if is_best:
                give_name(path, "best", check_fence=fence)
            prune(place, keep=self.keep, check_fence=fence)


def write_checkpoint(folder: Path, state: Mapping[str, Any], *, check_fence: Callable[[], None] = no_check,
                     sync_metrics: Callable[[], None] = lambda: None) -> Path:
    """Write a checkpoint durably; its path. CheckpointError if it reads back otherwise, NumericError if not finite."""
    if name := not_finite(state):
        raise NumericError(f"step {state['step']}: {name} is not finite, so it was not saved; {LOWER_RATE}")
    path = checkpoint_path(folder, state["step"])
    with replacing(path, check_fence) as temporary:
        with open(temporary, "wb") as file:
            writer = HashingWriter(file)
            try:
                torch.save(dict(state), writer)  # pyright: ignore[reportArgumentType]
            except RuntimeError as error:  # says only that a position is unexpected
                raise writer.error or error from None
            file.flush()
            os.fsync(file.fileno())
            forget_cached(file)
        digest = writer.sha256.hexdigest()
        if file_sha256(temporary) != digest:
            raise CheckpointError(f"{temporary}: differs from what was written; check the disk")
        if path.exists() and manifest_path(path).exists():  # saved before: that stays until the new one is committed
            give_name(path, f"{path.stem}-earlier", check_fence=check_fence)
        check_fence()
        manifest_path(path).unlink(missing_ok=True)
    sync_folder(folder)
    sync_metrics()
    replace_file(manifest_path(path), manifest(state, size=path.stat().st_size, sha256=digest), durable=True,
                 check_fence=check_fence)
    return path


def manifest(state: Mapping[str, Any], *, size: int, sha256: str) -> bytes:
    """The text that commits a checkpoint. Loading makes it again from the file and compares byte by byte."""
    facts = {"file": checkpoint_path(Path(), state["step"]).name, "size": size, "sha256": sha256,
             "step": state["step"], "epoch": state["epoch"], "format": FORMAT, "fingerprint": state["fingerprint"]}
    return (json.dumps(facts, indent=2) + "\n").encode()


class HashingWriter:
    """A file that torch.save writes to, hashing on the way; it only ever appends."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush, self.sha256 = file, file.flush, hashlib.sha256()
        self.error: OSError | None = None  # of the file system, which torch.save replaces by one of its own

    def write(self, data: bytes) -> int:
        """Append."""
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def forget_cached(file: BinaryIO) -> None:
    """Ask the kernel to drop its copy of a synced file, so that reading it back reads the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def file_sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()
