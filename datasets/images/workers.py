"""Processes that decode images beside the training process, which stop signals do not reach.

They are forked from a server that is a new process (`forkserver`), not from the training process: a copy of that
would hold the sockets to the other ranks open, which then do not notice when it dies, and would copy its threads'
locks in whatever state they are. It also makes a dead worker an error in the loader and nowhere else.
"""

import contextlib
import multiprocessing
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection

# Imported once by the server, for all workers. Libraries only: it would look for our own packages in the wrong place.
PRELOADED = ["torch", "torch.utils.data", "torchvision.transforms.v2", "PIL.Image"]


def worker_context() -> multiprocessing.context.BaseContext:
    """Start the server, which needs a second or two, and return the context to start workers with; main thread only.

    Server and workers inherit a mask that blocks the stop signals: those reach the whole process group, and the
    workers must live until their rank has saved.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with blocked_signals():
        resource_tracker.ensure_running()
    with blocked_signals():  # again: starting the tracker has unblocked two of them
        forkserver.ensure_running()
    return context


class WorkerStart:
    """What a worker does first, in the form that DataLoader calls and can send to it.

    The workers' parent is the server, so they would outlive a killed training process. Each therefore waits on a pipe
    whose other end that process alone holds, and ends when it closes, however it died.
    """

    def __init__(self, prepare: Callable[[], None] | None, lifeline: Connection) -> None:
        self.prepare, self.lifeline = prepare, lifeline

    def __call__(self, worker: int) -> None:
        """Prepare this worker."""
        if self.prepare is not None:
            self.prepare()
        threading.Thread(target=self.end_with_parent, name="lifeline", daemon=True).start()

    def end_with_parent(self) -> None:
        """Wait for the end of the pipe, and of this process."""
        with contextlib.suppress(EOFError, OSError):
            self.lifeline.recv_bytes()
        os._exit(1)


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Hold back from this thread the signals that this process has a handler for: those stop it, once it has saved.

    One that comes meanwhile is delivered at the end.
    """
    handled = [number for number in signal.valid_signals() if callable(signal.getsignal(number))]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handled)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
