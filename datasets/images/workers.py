"""Processes that decode images beside the training process, which stop signals do not reach; a dead one is an error.
Forked from a new process (`forkserver`): copies of this one would hold its locks, and sockets that tell its death."""

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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, forkserver, process, reduction, resource_tracker, util
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import get_worker_info

from datasets.errors import DataError

# Imported once by the server, for all workers, where they are installed; not ours, which it would not find.
PRELOADED = ["torch", "torch.utils.data", "torchvision.transforms.v2", "PIL.Image", "simplejpeg"]
MORE_ROOM = "give it more with docker run --shm-size=8g, or train with fewer --workers"
MOST_LOCKS = 64  # of a pool; each is a file in /dev/shm
PREFETCHED = 2  # batches of a worker that wait for the training process
NUM_PLACES = PREFETCHED + 1  # one more is in use there, until it asks for the next: as floats it lies elsewhere
places: deque[Tensor] = deque()  # of this worker
mapped: deque[Tensor] = deque(maxlen=16 * NUM_PLACES)  # in the training process: the places of up to 16 workers
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
        util.get_temp_dir()  # for multiprocessing's sockets; made by the first call, and removed at exit
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
    """How a worker pickles a tensor: in shared memory or, where that has no room, whole, through a pipe.
    Left alone, DataLoader finds out in a thread, which drops the batch: the training process waits without end."""
    try:
        details = reduce_tensor(tensor.share_memory_())
        return (from_place, details) if any(tensor.data_ptr() == place.data_ptr() for place in places) else details
    except (RuntimeError, OSError):
        return from_pipe, (tensor.numpy(),)


def from_place(rebuild: Callable[..., Tensor], details: tuple[Any, ...]) -> Tensor:
    """In the training process: a batch whose memory stays mapped, for the next ones in it."""
    mapped.append(rebuild(*details))
    return mapped[-1]


def from_pipe(array: np.ndarray) -> Tensor:
    """In the training process: a tensor that came whole."""
    warn_of_pipes()
    return torch.from_numpy(array)


@functools.cache
def warn_of_pipes() -> None:
    """Once."""
    sys.stderr.write(f"WARNING --workers: no room for their batches ({shared_memory()}), so they go through pipes, "
                     f"which is slower; {MORE_ROOM}\n")


def empty_batch(*shape: int) -> Tensor:
    """Room for uint8 images; of a worker in shared memory, if that has room, so that they are not copied there.
    A worker writes in turn to the same places: the first write to new pages costs a sixth of reading stored pixels."""
    if get_worker_info() is not None:
        with contextlib.suppress(RuntimeError):
            place = places.popleft() if len(places) == NUM_PLACES else torch.empty(0, dtype=torch.uint8)
            if len(place) < math.prod(shape):
                place = torch.empty(math.prod(shape), dtype=torch.uint8).share_memory_()
            places.append(place)
            return place[: math.prod(shape)].view(shape)
    return torch.empty(shape, dtype=torch.uint8)


def start_worker(prepare: Callable[[], None] | None, lifeline: connection.Connection, worker: int) -> None:
    """What a worker does first: as the server's child, it watches a pipe, and ends when the training process has."""
    reduction.ForkingPickler.register(Tensor, shared_or_whole)
    if prepare is not None:
        prepare()

    def end_with_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="lifeline", daemon=True).start()


def end_workers(processes: Sequence[process.BaseProcess], lifeline: connection.Connection) -> None:
    """Also those that still start, and would miss the locks that this process takes along."""
    lifeline.close()
    for each in processes:
        each.kill()
    mapped.clear()


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Hold back, until the end, the signals that this process has a handler for: those stop it, once it has saved."""
    handled = [number for number in signal.valid_signals() if callable(signal.getsignal(number))]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
