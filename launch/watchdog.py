"""Two threads beside the training loop that see what the loop cannot while it waits for its peers.

Twice a second one of them tells the other ranks how far this one is, passes a stop request on, and looks for trouble:
a rank that has failed while this one does not notice, or a loop that has made no progress for the timeout (then the
rank that hangs is named, with its Python stack, and the job ends). The second never asks another machine, so that
nothing can hold it up: it sees that the launcher has died, or that the first still waits for an answer, as on a node
whose cable was pulled. How the process then ends is failure.py's.
"""

import contextlib
import faulthandler
import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from launch.failure import JobFailure, RunRecord
from launch.heartbeats import Heartbeats
from launch.launcher import Launch
from launch.stop import stop_request

TICK_SECONDS = 0.5
SILENT_SECONDS = 15.0  # beyond the timeout, for the store to answer: its connection itself gives up after 15 minutes
WAITING = ("backward", "reduce", "left")  # phases in which a rank may be waiting for another


class Watchdog:
    """Heartbeats and hang detection; a single process, which has no store, is only watched for its launcher's death."""

    def __init__(self, failure: JobFailure | None = None, *, timeout_seconds: float = 300) -> None:
        self.failure = failure or JobFailure(Launch())
        self.rank, self.world_size = self.failure.launch.rank, self.failure.launch.world_size
        self.timeout_seconds = timeout_seconds
        self.step, self.phase = 0, "start"
        self._changed_at = time.monotonic()
        self._before: dict[int, list[Any]] | None = None  # heartbeats at half of the timeout
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._answered_at = math.inf  # when the store last did; inf until there is one

    def mark(self, phase: str, step: int | None = None) -> None:
        """The training loop is alive, and in this phase of that step (by default the last one that was named)."""
        self.step = self.step if step is None else step
        self.phase, self._changed_at = phase, time.monotonic()

    def attend(self, run: RunRecord) -> None:
        """Keep `run` told that this process lives, and why it was ended if a thread here has to end it."""
        self.failure.run = run

    def start(self, store: dist.Store | None = None) -> None:
        """Begin to watch; again with a store when there is one. It is used through a connection of its own."""
        self.mark(self.phase)
        if not self._threads:
            self._start_thread(self._watch)
        if store is not None:
            heartbeats = self.failure.heartbeats = Heartbeats(store, rank=self.rank, world_size=self.world_size)
            with contextlib.suppress(RuntimeError):
                heartbeats.send(self.step, self.phase)  # at once: a rank that hangs within the first tick is known too
            self._answered_at = time.monotonic()
            self._start_thread(self._talk, heartbeats)

    def _start_thread(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def stop(self) -> None:
        """End the threads; the group is about to be taken down."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            if self.failure.launcher_died():
                self.failure.end_without_launcher(step=self.step)
            if self.failure.run is not None:
                self.failure.run.beat()
            seconds = time.monotonic() - self._answered_at
            if seconds > self.timeout_seconds + SILENT_SECONDS:
                line = (f"ERROR distributed: rank {self.rank} of {self.world_size}: the host of the rendezvous has not "
                        f"answered for {seconds:.0f} s at step {self.step}; look at the network, then start the same "
                        f"command again")
                self.failure.end(line, step=self.step, speaks=self.failure.claim_in_this_process())

    def _talk(self, heartbeats: Heartbeats) -> None:
        interval = TICK_SECONDS * max(1.0, self.world_size / 64)  # what the store must serve does not grow with W
        while not self._stopping.wait(interval):
            with contextlib.suppress(RuntimeError):  # a store that died with its host; the collectives will say so
                if not heartbeats.has_left:
                    self._beat(heartbeats)
            if self.world_size > 1:
                self._check_progress(heartbeats)
            self._answered_at = time.monotonic()

    def _beat(self, heartbeats: Heartbeats) -> None:
        """Send a heartbeat; pass a stop request on, or take it over; leave some time after another rank's error."""
        heartbeats.send(self.step, self.phase)
        request = stop_request()
        if request:
            heartbeats.ask_all_to_stop()
        elif heartbeats.asked_to_stop():
            request.ask("another rank was asked to stop")
        self.failure.follow(step=self.step)

    def _check_progress(self, heartbeats: Heartbeats) -> None:
        """Compare the heartbeats at half of the timeout with those at the timeout."""
        idle = time.monotonic() - self._changed_at
        if idle < self.timeout_seconds / 2:
            self._before = None
        elif self._before is None:
            self._before = heartbeats.last()
        elif idle > self.timeout_seconds:
            self._end_the_hang(heartbeats.last(), heartbeats.silent_since(self._before))

    def _end_the_hang(self, beats: dict[int, list[Any]], silent: list[int]) -> None:
        """Name the rank that all the others wait for: silent, or else not itself waiting, or else furthest behind."""
        last = {rank: (beat[1], beat[2]) for rank, beat in beats.items()}
        last[self.rank] = (self.step, self.phase)
        busy = [rank for rank, (_, phase) in last.items() if phase not in WAITING] or list(last)
        culprit = silent[0] if silent else min(busy, key=lambda rank: (last[rank][0], rank))
        step, phase = last.get(culprit, (self.step, "unknown"))
        if culprit == self.rank:
            with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # a closed stderr
                faulthandler.dump_traceback(file=sys.stderr)
        elif not silent:
            time.sleep(TICK_SECONDS)  # the culprit shows its stack and prints this line itself
        where = f"step {step}, phase {phase}"
        if silent and step < self.step:  # its last heartbeat is older than its hang: it is where this rank waits
            where = f"step {self.step}, last seen at {where}"
        line = (f"ERROR distributed: rank {culprit} of {self.world_size}: no progress for {self.timeout_seconds:.0f} s "
                f"at {where}; the others wait for it: look at that process, or raise --timeout if it was only slow")
        self.failure.end(line, step=self.step, speaks=self.failure.claim_error_line(), stuck=silent)
