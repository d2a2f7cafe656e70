"""Threads beside the training loop that see what the loop cannot while it waits. How the process ends is failure.py's.
`_talk` tells the other ranks how far this one is, and looks for one that has failed, was asked to stop, or hangs.
`_watch` never asks a machine or a disk, so that nothing can hold it up; alone, it ends waits for data only."""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from launch import files, launcher, machine
from launch.errors import EXIT_PREEMPTED, to_stderr
from launch.failure import JobFailure
from launch.heartbeats import Heartbeats
from launch.stop import StopRequest, stop_request

TICK_SECONDS = 0.5
MOST_TICK_SECONDS = 2.0  # that one tick counts for: after more, this process was itself stopped or asleep
SILENT_SECONDS = 15.0  # beyond the timeout, for the store to answer: its connection itself gives up after 15 minutes
HEARD_SECONDS = 2.0  # for which a stop waits for the next batch before it interrupts that wait
AGREED_SECONDS = 5.0  # the same where the steps since the last checkpoint are then lost
WAITING = ("backward", "reduce", "left")  # phases in which a rank may be waiting for another
READING = ("data", "evaluation data")  # phases in which it waits for its next batch
DUMP_PREFIXES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # torch's names, today's and the old
OURS = f"{files.ROOT}{os.sep}"
READERS = (f"{OURS}datasets", f"{OURS}trainers/engine/checkpoints/load", f"{OURS}trainers/engine/checkpoints/weight")
LIBRARIES = tuple({sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), "<frozen"})


class Watchdog:
    """Heartbeats and hang detection; a single process has no store, and is watched as the module's text says."""

    def __init__(self, failure: JobFailure | None = None, *, timeout_seconds: float = 300) -> None:
        self.failure = failure or JobFailure(launcher.Launch())
        self.rank, self.world_size = self.failure.launch.rank, self.failure.launch.world_size
        self.timeout_seconds = timeout_seconds
        self.step, self.phase = 0, "start"
        self._seconds = self._changed_at = 0.0  # by a clock that stands still while the process is itself stopped
        self._before: dict[int, list[Any]] | None = None  # heartbeats at half of the timeout
        self._stopping, self._threads = threading.Event(), list[threading.Thread]()
        self._asked_at = self._answered_at = float("inf")  # when a stop was first seen, and the store last answered
        self._trainer = (threading.get_ident(), threading.get_native_id())  # the thread that trains
        self._switches, self._moved_at, self._has_warned, self._watched_at = "", 0.0, False, time.monotonic()

    def mark(self, phase: str, step: int | None = None) -> None:
        """The training loop is alive, and in this phase of that step (by default the last one that was named)."""
        self.step = self.failure.step = self.step if step is None else step
        self.phase, self._changed_at = phase, self._seconds

    def attend(self, run: Any, *, traces: Path | None = None) -> None:
        """Keep a run's folder told that this process lives, by `beat()`; `traces` is for NCCL's last collectives."""
        self.failure.run = run
        if traces is not None and not any(name in os.environ for name in DUMP_PREFIXES):
            os.environ[DUMP_PREFIXES[0]] = str(traces.absolute() / "nccl-trace-rank-")
        self._every(TICK_SECONDS, run.beat)

    def start(self, store: dist.Store | None = None) -> None:
        """Begin to watch; again with a store when there is one. It is used through a connection of its own."""
        self.mark(self.phase)
        if not self._threads:
            self._every(TICK_SECONDS, self._watch)
        if store is not None:
            heartbeats = self.failure.heartbeats = Heartbeats(store, rank=self.rank, world_size=self.world_size)
            with contextlib.suppress(RuntimeError):
                heartbeats.send(self.step, self.phase)  # at once: a rank that hangs within the first tick is known too
            self._answered_at = self._seconds
            scale = max(1.0, self.world_size / 64)  # what the store must serve does not grow with W
            self._every(scale * TICK_SECONDS, partial(self._talk, heartbeats))

    def _every(self, seconds: float, action: Callable[[], None]) -> None:
        def repeat() -> None:
            while not self._stopping.wait(seconds):
                action()

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        self._threads.append(thread)

    def stop(self) -> None:
        """End the threads; the group is about to be taken down."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _watch(self) -> None:
        before, self._watched_at = self._watched_at, time.monotonic()
        self._seconds += min(self._watched_at - before, MOST_TICK_SECONDS)
        stop_request().hear()
        if self.failure.launcher_died():
            self.failure.end_without_launcher()
        if self.world_size == 1:
            self._check_alone()
        seconds = self._seconds - self._answered_at
        if seconds > self.timeout_seconds + SILENT_SECONDS:
            self.failure.end(f"ERROR distributed: rank {self.rank} of {self.world_size}: the host of the rendezvous "
                             f"has not answered for {seconds:.0f} s at step {self.step}; look at the network, then "
                             f"start the same command again", speaks=self.failure.claim_in_this_process())

    def _talk(self, heartbeats: Heartbeats) -> None:
        """Send a heartbeat; pass a stop request on, or take it over; leave some time after another rank's error."""
        with contextlib.suppress(RuntimeError):  # a store that died with its host; the collectives will say so
            if not heartbeats.has_left:
                heartbeats.send(self.step, self.phase)
                request = stop_request()
                if request:
                    heartbeats.store.set("stop", "asked to")
                    if self.world_size > 1:
                        self._stop_without(heartbeats, request)
                elif heartbeats.store.check(["stop"]):
                    request.ask("another rank was asked to stop")
                self.failure.follow()
        idle = self._seconds - self._changed_at
        if self.world_size == 1 or idle < self.timeout_seconds / 2:
            self._before = None
        elif self._before is None:
            self._before = heartbeats.last()
        elif idle > self.timeout_seconds:
            self._end_the_hang(heartbeats.last(), heartbeats.silent_since(self._before))
        self._answered_at = self._seconds

    def _stop_without(self, heartbeats: Heartbeats, request: StopRequest) -> None:
        """End the process at the last checkpoint if some rank still waits for data so long after a stop."""
        self._asked_at = min(self._asked_at, self._seconds)
        waited = self._seconds - max(self._asked_at, self._changed_at)
        if waited > AGREED_SECONDS and self._reads(sys._current_frames().get(self._trainer[0])):
            heartbeats.store.set("stuck", str(self.rank))
        if heartbeats.store.check(["stuck"]):
            self.failure.claim_in_this_process()
            stuck = heartbeats.store.get("stuck").decode()
            self.failure.end(f"{request.reason}; rank {stuck} waited for data", code=EXIT_PREEMPTED)

    def _check_alone(self) -> None:
        """With one rank: end a wait for data at the timeout, or at once for a stop; warn once of another standstill."""
        since_mark = self._seconds - self._changed_at
        switches = context_switches(self._trainer[1])
        if switches != self._switches:  # it moves, and is no hang, though outside the loop nothing marks progress
            self._switches, self._moved_at = switches, self._seconds
        still = since_mark if self.phase in READING else min(since_mark, self._seconds - self._moved_at)
        frame = sys._current_frames().get(self._trainer[0])
        reads, place = self._reads(frame), place_of(frame)
        if still > HEARD_SECONDS and reads and (request := stop_request()):
            self._asked_at = min(self._asked_at, self._seconds)
            if min(still, self._seconds - self._asked_at) > AGREED_SECONDS:  # nor does it hear the interruption
                self.failure.end(str(request.reason), code=EXIT_PREEMPTED)
            request.interrupt(allowed=self._reads)
        elif still > self.timeout_seconds and reads and place.startswith(OURS):
            show_stacks()
            line = (f"ERROR data: --timeout {self.timeout_seconds:.0f}: no data for longer at step {self.step} "
                    f"({place}); {data_remedy()}")
            self.failure.end(line, speaks=self.failure.claim_in_this_process(), code=3)  # as datasets.errors.DataError
        elif since_mark > self.timeout_seconds and not self._has_warned:
            self._has_warned = True
            to_stderr(f"WARNING no progress for {self.timeout_seconds:.0f} s at step {self.step}, phase {self.phase} "
                      f"({place}); it is waited for")

    def _reads(self, frame: FrameType | None) -> bool:
        """Whether the thread that trains, at this frame, waits for data."""
        return self.phase in READING or any(each.f_code.co_filename.startswith(READERS)
                                            for each, _ in traceback.walk_stack(frame))

    def _end_the_hang(self, beats: dict[int, list[Any]], silent: list[int]) -> None:
        """Name the rank that all the others wait for: silent, or else not itself waiting, or else furthest behind."""
        last = {rank: (beat[1], beat[2]) for rank, beat in beats.items()}
        last[self.rank] = (self.step, self.phase)
        busy = [rank for rank, (_, phase) in last.items() if phase not in WAITING] or list(last)
        culprit = silent[0] if silent else min(busy, key=lambda rank: (last[rank][0], rank))
        step, phase = last.get(culprit, (self.step, "unknown"))
        if culprit == self.rank:
            show_stacks()
        elif not silent:
            time.sleep(TICK_SECONDS)  # the culprit shows its stack and prints this line itself
        where = f"step {step}, phase {phase}"
        if silent and step < self.step:  # its last heartbeat is older than its hang: it is where this rank waits
            where = f"step {self.step}, last seen at {where}"
        remedy = data_remedy() if phase in READING else "look at that process, or raise --timeout if it was only slow"
        line = (f"ERROR distributed: rank {culprit} of {self.world_size}: no progress for {self.timeout_seconds:.0f} s "
                f"at {where}; the others wait for it: {remedy}{dump_collectives(self.rank)}")
        self.failure.end(line, speaks=self.failure.claim_error_line(), stuck=silent)


def dump_collectives(rank: int) -> str:
    """Write down this rank's last collectives, which torch would do at its own timeout only; what to say of it."""
    prefix = next((os.environ[name] for name in DUMP_PREFIXES if name in os.environ), None)
    if prefix is None or not dist.is_initialized() or "nccl" not in str(dist.get_backend_config()):
        return ""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        faulthandler.dump_traceback_later(10, exit=True)  # NCCL may hold Python's lock, and not answer
        Path(f"{prefix}{rank}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # pyright: ignore
    faulthandler.cancel_dump_traceback_later()
    return f"; NCCL's last collectives are in {prefix}*, for torchfrtrace to compare"


def show_stacks() -> None:
    """The Python stack of every thread, on stderr. By way of a file, as faulthandler would wait for a full pipe."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file)
        file.seek(0)
        for line in file.read().decode(errors="replace").splitlines():
            to_stderr(line)


def place_of(frame: FrameType | None) -> str:
    """`FILE:LINE function` of the innermost code that is in no library: ours, or a user's own function."""
    places = ((each.f_code, line) for each, line in traceback.walk_stack(frame))
    return next((f"{code.co_filename}:{line} {code.co_name}" for code, line in places
                 if not code.co_filename.startswith(LIBRARIES)), "unknown")


def data_remedy() -> str:
    """What to do where no data comes."""
    return (f"see whether --data-dir, or what is read there, can still be read, and the --workers (/dev/shm has "
            f"{(machine.free_shared_memory() or 0) / 2**20:.0f} MiB free), or raise --timeout if it was only slow")


def context_switches(thread: int) -> str:
    """How often the kernel has switched to a thread, which is constant as long as that waits; empty if unknown."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/task/{thread}/status").read_text().partition("voluntary_ctxt_switches")[2]
    return ""
