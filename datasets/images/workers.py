"""Processes that decode images beside the training process, which stop signals do not reach.

They are forked from a new process (`forkserver`): a copy of the training process would hold the sockets to the other
ranks open, which then do not notice when it dies, and its threads' locks. A dead worker is an error of the loader."""

import contextlib
import functools
import math
import multiprocessing
import multiprocessing.context
import os
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import get_temp_dir
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import get_worker_info

from datasets.errors import DataError

# Imported once by the server, for all workers, where they are installed. Libraries only: it would look for our own
# packages in the wrong place.
PRELOADED = ["torch", "torch.utils.data", "torchvision.transforms.v2", "PIL.Image", "simplejpeg"]
MORE_ROOM = "give it more with docker run --shm-size=8g, or train with fewer --workers"
MOST_LOCKS = 64  # of a pool; each is a file in /dev/shm
HEADER = 64  # bytes of a slot before its batch
MOST_SLOTS = 8  # of a worker, which are kept; two batches wait for the training process, and it may hold others
slots: list["Slot"] = []  # of this worker
slots_of_workers: dict[tuple[int, int], np.ndarray] = {}  # in the training process, by process id and number
LONGEST_FOLDER = 60  # characters of TMPDIR; the whole path of a socket in it may have 107


def worker_context() -> multiprocessing.context.BaseContext:
    """Start the server, in a second or two, and return the context to start workers with; main thread only. Both have a
    mask that blocks the stop signals: workers must live until their rank has saved. DataError if /dev/shm is full."""
    try:
        _ = [multiprocessing.Lock() for _ in range(MOST_LOCKS)]
    except OSError as error:
        raise DataError(f"--workers: none can be started ({error.strerror}; {shared_memory()}); {MORE_ROOM}") from None
    if len(tempfile.gettempdir()) > LONGEST_FOLDER:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        get_temp_dir()  # for multiprocessing's sockets; made by the first call, and removed at exit
        tempfile.tempdir = before
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with blocked_signals():
        resource_tracker.ensure_running()
    with blocked_signals():  # again: starting the tracker has unblocked two of them
        forkserver.ensure_running()
    return context


def shared_memory() -> str:
    """How much room workers have for what they hand over, in words."""
    with contextlib.suppress(OSError):
        return f"/dev/shm has {shutil.disk_usage('/dev/shm').free / 2**20:.1f} MiB free"
    return "no /dev/shm"


def shared_or_whole(tensor: Tensor) -> tuple[Any, ...]:
    """How a worker pickles a tensor: as the slot it is in, in other shared memory or, without room, through a pipe.
    Left alone, DataLoader finds out in a thread, which drops the batch: the training process waits without end."""
    for number, slot in enumerate(slots):
        if tensor.data_ptr() == slot.memory[HEADER:].ctypes.data:
            first, slot.is_known, slot.memory[0] = not slot.is_known, True, 1
            return from_slot, ((os.getpid(), number), slot.whole if first else None, tensor.shape, tensor.stride())
    try:
        return reduce_tensor(tensor.share_memory_())
    except (RuntimeError, OSError):
        return from_pipe, (tensor.numpy(),)


def from_pipe(array: np.ndarray) -> Tensor:
    """In the training process: a tensor that came whole."""
    warn_of_pipes()
    return torch.from_numpy(array)


@functools.cache
def warn_of_pipes() -> None:
    """Once."""
    sys.stderr.write(f"WARNING --workers: no room for their batches ({shared_memory()}), so they go through pipes, "
                     f"which is slower; {MORE_ROOM}\n")


class Slot:
    """Shared memory for one batch after another: the first write to new pages costs a sixth of reading stored pixels.

    It is free once nobody holds a tensor in it, in the worker or in the training process, which says so in its first
    byte. Both know it by the garbage collector, so no batch is overwritten that somebody could still read."""

    def __init__(self, num_bytes: int) -> None:
        storage = torch.UntypedStorage._new_shared(HEADER + num_bytes)
        self.whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore
        self.memory = self.whole.numpy()
        self.is_known = False  # to the training process
        self.held: Callable[[], Any] = lambda: None  # what this worker holds of it, if that is still there

    def tensor(self, shape: Sequence[int]) -> Tensor:
        """Its memory, taken."""
        batch = self.memory[HEADER : HEADER + math.prod(shape)]
        self.held = weakref.ref(batch)
        return torch.from_numpy(batch).view(shape)

    def fits(self, num_bytes: int) -> bool:
        """Whether it is free, and large enough."""
        return not self.memory[0] and self.held() is None and HEADER + num_bytes <= len(self.memory)


def empty_batch(*shape: int) -> Tensor:
    """Room for uint8 images; of a worker in shared memory, if that has room, so that they are not copied there."""
    if get_worker_info() is not None:
        slot = next((slot for slot in slots if slot.fits(math.prod(shape))), None)
        with contextlib.suppress(RuntimeError):
            if slot is None:
                slot = Slot(math.prod(shape))
                if len(slots) < MOST_SLOTS:
                    slots.append(slot)
            return slot.tensor(shape)
    return torch.empty(shape, dtype=torch.uint8)


def from_slot(key: tuple[int, int], whole: Tensor | None, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """In the training process: a batch in a slot of a worker, which comes along the first time."""
    if whole is not None:
        slots_of_workers[key] = whole.numpy()
    memory = slots_of_workers[key]
    batch = memory[HEADER : HEADER + math.prod(shape)]
    weakref.finalize(batch, memory.__setitem__, 0, 0).atexit = False
    return torch.from_numpy(batch).as_strided(shape, stride)


class WorkerStart:
    """What a worker does first, in the form that DataLoader calls and can send to it.

    The workers' parent is the server, so they would outlive a killed training process. Each therefore waits on a pipe
    whose other end that process alone holds, and ends when it closes, however it died."""

    def __init__(self, prepare: Callable[[], None] | None, lifeline: Connection) -> None:
        self.prepare, self.lifeline = prepare, lifeline

    def __call__(self, worker: int) -> None:
        """Prepare this worker."""
        ForkingPickler.register(Tensor, shared_or_whole)
        if self.prepare is not None:
            self.prepare()

        def end_with_parent() -> None:
            with contextlib.suppress(EOFError, OSError):
                self.lifeline.recv_bytes()
            os._exit(1)

        threading.Thread(target=end_with_parent, name="lifeline", daemon=True).start()


def end_workers(processes: Sequence[BaseProcess], lifeline: Connection) -> None:
    """Also those that still start, and would miss the locks that this process takes along."""
    lifeline.close()
    for process in processes:
        process.kill()
    for key in [key for key in slots_of_workers if key[0] in {process.pid for process in processes}]:
        del slots_of_workers[key]


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Hold back from this thread the signals that this process has a handler for: those stop it, once it has saved.
    One that comes meanwhile is delivered at the end."""
    handled = [number for number in signal.valid_signals() if callable(signal.getsignal(number))]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
