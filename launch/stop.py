"""A stop that loses nothing: a signal sets a flag, and all ranks agree on the step at which they stop.
SIGTERM, SIGUSR1 and SIGUSR2 are what Slurm, torchrun, Kubernetes and Grid Engine send, SIGXCPU comes at a limit on CPU
time, SIGHUP from a terminal that closes; SIGINT is Ctrl-C and SIGQUIT Ctrl-\\."""

import atexit
import contextlib
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGXCPU)  # all that ask for a stop, for ranks, launchers and tools alike
POLL_SECONDS = 0.5  # how long a stop may wait for the next agreement
MOST_STEPS = 64  # between two agreements, so that a step that becomes slow does not delay the next one much


class Stopped(BaseException):
    """All ranks have agreed to stop, and raise this at the same step. No Exception, as no handler may swallow it."""

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(reason or "another rank was asked to stop")


class StopRequest:
    """Whether this process was asked to stop, and by what. Set in a signal handler, or by another rank's request."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.launcher: int | None = None  # the process that started this one, known before it can have died unnoticed
        self.signals = -1  # where Python's own handler, which no call holds up, writes the numbers of signals
        self._interrupted_at = math.inf
        self._may_interrupt: Callable[[FrameType | None], bool] | None = None

    def __bool__(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Request a stop; the first reason is kept."""
        self.reason = self.reason or reason

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: it only sets the flag, unless this is a second Ctrl-C or `interrupt` has called it."""
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted_at > 1:  # a person's: torchrun passes the first on again at once
                os._exit(130)  # 128 + SIGINT; checkpoints on disk are whole, so nothing needs tidying
            self._interrupted_at = min(self._interrupted_at, time.monotonic())
        self.ask(signal.Signals(number).name)
        if self._may_interrupt is not None:
            allowed, self._may_interrupt = self._may_interrupt(frame), None
            if allowed:
                raise Stopped(self.reason)

    def hear(self) -> None:
        """From another thread: note the signals that the main one, in a call that does not return, has not handled."""
        with contextlib.suppress(OSError):  # there are none
            for number in os.read(self.signals, 64):
                if number in SIGNALS:
                    self.ask(signal.Signals(number).name)

    def interrupt(self, *, allowed: Callable[[FrameType | None], bool]) -> None:
        """From another thread: raise Stopped in the main one, which waits and hears no request, if `allowed` there."""
        if signal.getsignal(signal.SIGTERM) == self.handle:
            self._may_interrupt = allowed
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


_request = StopRequest()  # one a process, as signal handlers are


def stop_signals() -> list[signal.Signals]:
    """Those of SIGNALS that this process is to stop at: not SIGHUP where it is ignored, as under `nohup`."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def catch_signals() -> StopRequest:
    """Install the handlers (main thread only; again is harmless) and return this process's request."""
    if _request.launcher is None:
        _request.launcher = os.getppid()
        _request.signals, writing = ends = os.pipe()
        for end in ends:
            os.set_blocking(end, False)
        if (others := signal.set_wakeup_fd(writing, warn_on_full_buffer=False)) != -1:
            signal.set_wakeup_fd(others)  # as asyncio has one, in a notebook
        atexit.register(ignore_signals)  # first in, so last out: Python then gives back handlers that kill
    for number in stop_signals():
        signal.signal(number, _request.handle)
    return _request


def begin_script(module: str = "__main__") -> None:
    """What a script does before it imports torch: catch signals, and collect no garbage until `command_line.run`."""
    if module == "__main__" and not hasattr(sys, "ps1"):  # a notebook's %run keeps its handlers until the run itself
        catch_signals()
        gc.disable()  # imports leave none, and looking for it takes 1.2 of the 3.8 s of torch and torchvision


@contextlib.contextmanager
def signals_caught() -> Iterator[StopRequest]:
    """Catch signals for the length of a `with` block, then give the caller's handlers back."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it none: only other ranks can ask
        yield _request
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    try:
        yield catch_signals()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before[signal.SIGTERM] != _request.handle:  # of the caller's own, as a library's user has
            _request.hear()
            _request.reason = None


def stop_request() -> StopRequest:
    """This process's request, whether or not signals are caught."""
    return _request


def moments(seconds: float, *, pause: float = 0.1, patience: float = math.inf) -> Iterator[float]:
    """When to look for what is awaited: the seconds since the first look. Stopped once asked to, beyond `patience`."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) <= seconds:
        yield waited
        if _request and time.monotonic() - began > patience:
            raise Stopped(_request.reason)
        time.sleep(pause)


def ignore_signals() -> None:
    """For DataLoader workers, which must live until their rank has saved; and for a rank at its very end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def signals_flag() -> str:
    """What makes torchrun pass all on to its ranks: by default it dies of the last three, and they run on."""
    return f"--signals-to-handle={','.join(number.name for number in SIGNALS)}"


class StopAgreement:
    """Tells all ranks of a stop at the same step, by a small all_reduce about every half second: all agree when."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._steps_between, self._steps_since, self._since = 1, 0, time.monotonic()

    def due(self) -> bool:
        """Called after every step by every rank: True, on all of them at the same step, when it is time to vote."""
        self._steps_since += 1
        return self._steps_since >= self._steps_between

    def vote(self, request: StopRequest, bad_steps: int = 0) -> int:
        """The largest number of consecutive bad steps of any rank; Stopped on every rank, if any was asked to stop."""
        slowest = (time.monotonic() - self._since) / max(1, self._steps_since)  # seconds per step
        stop, worst = bool(request), bad_steps
        if self.world_size > 1:
            import torch.distributed  # not at the top: handlers are installed before torch is imported

            votes = torch.tensor([stop, slowest, worst], dtype=torch.float64)
            torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
            stop, slowest, worst = votes.tolist()
        scale = max(1.0, self.world_size / 64)  # gloo's all_reduce is a ring: its time grows with W, its share must not
        self._steps_between = max(1, int(scale * min(MOST_STEPS, POLL_SECONDS / max(slowest, 1e-6))))
        self._steps_since, self._since = 0, time.monotonic()
        if stop:
            raise Stopped(request.reason)
        return int(worst)
