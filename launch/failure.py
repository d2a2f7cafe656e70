"""How a job ends badly: torch's errors translated, one rank reports, all leave."""

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from launch.errors import DeviceError, DistributedError, is_users, to_stderr, user_line
from launch.watchdog import Watchdog

LEAVE_SECONDS = 15  # for the ranks to agree on who reports an error, and to show it; the store answers in milliseconds


@contextlib.contextmanager
def exit_after(seconds: float, code: int) -> Iterator[None]:
    """Exit if the block takes longer: NCCL, or the store of a node that is cut off, may be waited for without end."""
    last_resort = threading.Timer(seconds, os._exit, [code])
    last_resort.daemon = True
    last_resort.start()
    try:
        yield
    finally:
        last_resort.cancel()


def leave_together(watchdog: Watchdog, error: Exception) -> None:
    """Report an error from one rank and exit; a rank that is not the first to fail exits quietly.

    Returns only for an error that is our bug, on the rank that is to show its traceback.
    """
    known = translated(error)
    code = getattr(known, "exit_code", 1)
    with exit_after(LEAVE_SECONDS, code):
        first = watchdog.claim_report()
        if first and isinstance(known, LostPeer):
            to_stderr(watchdog.lost_peer_line())
        elif first and (line := user_line(known)) is not None:
            to_stderr(line)
        watchdog.leave()
    if not first or is_users(known):
        raise SystemExit(code) from None


class LostPeer(DistributedError):
    """A collective failed because another rank has ended, or did not come."""


def translated(error: Exception) -> Exception:
    """What torch raises for a lost rank or a lack of memory, as one of our errors; any other error unchanged."""
    if is_users(error):
        return error
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return DeviceError(f"memory: {str(error).splitlines()[0] if text else 'used up'}; lower --batch-size, raise "
                           f"--accumulation-steps, or use --precision bf16")
    return LostPeer("another rank was lost") if is_lost_peer(error) else error


def is_lost_peer(error: Exception) -> bool:
    """Whether this is how torch says that another rank went away or never came to a collective."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out waiting", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
