"""Processes that decode images beside the training process, out of the reach of a stop signal.

They are forked from a server that is started afresh (`forkserver`), not from the training process: a copy of that
would hold the sockets to the other ranks open, which then do not notice when it dies, and would copy its threads'
locks in whatever state they are. It also makes a dead worker an error in the loader and nowhere else.
"""

import contextlib
import multiprocessing
import multiprocessing.context
import signal
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

# Imported once by the server, for all workers. Libraries only: it would look for our own packages in the wrong place.
PRELOADED = ["torch", "torch.utils.data", "torchvision.transforms.v2", "PIL.Image"]
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def worker_context() -> multiprocessing.context.BaseContext:
    """Start the server, which needs a second or two, and return the context to start workers with; main thread only.

    Server and workers inherit a mask that blocks the stop signals: those reach the whole process group, and the
    workers must live until their rank has saved.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with blocked_signals():
        resource_tracker.ensure_running()
    with blocked_signals():  # anew: starting the tracker has unblocked two of them
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Hold stop signals back from this thread; one that comes meanwhile is delivered at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
