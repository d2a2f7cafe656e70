"""Two threads beside the training loop that see what the loop cannot while it waits for its peers.

Twice a second one of them tells the other ranks how far this one is, passes a stop request on, and looks for trouble:
a rank that has reported an error while this one does not notice, or a loop that has made no progress for the timeout
(then the rank that hangs is named, with its Python stack, and the job ends). The second never asks another machine, so
that nothing can hold it up: it sees that the launcher has died (then this rank leaves too, so that no orphan keeps a
GPU), or that the first still waits for an answer, as on a node whose cable was pulled.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from launch.errors import DistributedError, to_stderr
from launch.heartbeats import STALE_SECONDS, Heartbeats
from launch.stop import stop_request

if TYPE_CHECKING:
    import torch.distributed as dist

TICK_SECONDS = 0.5
LEAVE_SECONDS = 10.0  # for a rank to notice by itself that another has reported an error, and to end a save
SILENT_SECONDS = 15.0  # beyond the timeout, for the store to answer: its connection itself gives up after 15 minutes
LINGER_SECONDS = 5.0  # for which the host of the store waits for the others, when all leave
WAITING = ("backward", "reduce", "left")  # phases in which a rank may be waiting for another


class Watchdog:
    """Heartbeats, hang detection and the one-report-a-job rule; without a store (one process) only the first."""

    def __init__(self, *, rank: int = 0, world_size: int = 1, timeout_seconds: float = 300,
                 has_launcher: bool = False, hosts_store: bool = False, first_without_store: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout_seconds = timeout_seconds
        self.hosts_store = hosts_store
        self.first_without_store = first_without_store
        """The rank that speaks when the store has died with its host: the first of those that live elsewhere."""
        self.on_tick: list[Callable[[], None]] = []
        self.on_end: list[Callable[[str], None]] = []
        """Called with the reason when this thread ends the process; each has two seconds."""
        self.step, self.phase = 0, "start"
        self._changed_at = time.monotonic()
        self._launcher = (stop_request().launcher or os.getppid()) if has_launcher else None
        self._heartbeats: Heartbeats | None = None
        self._before: dict[int, int] | None = None  # heartbeats counted at half of the timeout
        self._reported_at: float | None = None
        self._claimed = threading.Lock()  # taken once: this process reports at most one error
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._answered_at: float | None = None  # when the store last did

    def mark(self, phase: str, step: int | None = None) -> None:
        """The training loop is alive, and in this phase of that step (by default the last one that was named)."""
        self.step = self.step if step is None else step
        self.phase, self._changed_at = phase, time.monotonic()

    def start(self, store: "dist.Store | None" = None) -> None:
        """Begin to watch; again with a store when there is one. It is used through a connection of its own."""
        if store is not None:
            heartbeats = Heartbeats(store, rank=self.rank, world_size=self.world_size)
            with contextlib.suppress(RuntimeError):
                heartbeats.send(self.step, self.phase)  # at once: a rank that hangs within the first tick is known too
            self._heartbeats, self._answered_at = heartbeats, time.monotonic()
        self.mark(self.phase)
        if not self._threads:
            self._start_thread(self._watch, "watchdog")
        if store is not None:
            self._start_thread(self._talk, "heartbeats")

    def _start_thread(self, target: Callable[[], None], name: str) -> None:
        self._threads.append(threading.Thread(target=target, name=name, daemon=True))
        self._threads[-1].start()

    def stop(self) -> None:
        """End the threads; the group is about to be taken down."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def launcher_died(self) -> bool:
        """Whether the process that started this one is gone: it has then been given another parent."""
        return self._launcher is not None and os.getppid() != self._launcher

    def claim_report(self) -> bool:
        """Whether this rank is the first of the job to report an error, and so the one whose line is shown."""
        if not self._claimed.acquire(blocking=False):
            return False
        if self._heartbeats is None:
            return True
        try:
            return self._heartbeats.first_to_report()
        except RuntimeError:  # the store died with its host: with torchrun, or with rank 0
            speaker = 0 if self.launcher_died() else self.first_without_store
            return self.rank == speaker and self._reported_at is None

    def leave(self) -> None:
        """Tell the others that this rank ends of its own will, so that they do not take it for one that was lost."""
        self.phase = "left"
        if self._heartbeats is not None:
            with contextlib.suppress(RuntimeError):
                self._heartbeats.send(self.step, "left")

    def linger(self) -> None:
        """After an error, where this process hosts the store: keep it until the others know who reports the error."""
        if self._heartbeats is None or not self.hosts_store:
            return
        before, began = self._heartbeats.counts(), time.monotonic()
        while time.monotonic() - began < LINGER_SECONDS:
            last = self._heartbeats.last_known()
            silent = self._heartbeats.silent_since(before) if time.monotonic() - began > LINGER_SECONDS / 2 else []
            others = [rank for rank in range(self.world_size) if rank != self.rank and rank not in silent]
            if all(last.get(rank, (0, ""))[1] == "left" for rank in others):
                return
            time.sleep(0.1)

    def lost_peer_line(self) -> str:
        """The line for a collective that failed because some rank is gone: names those without a heartbeat."""
        if self.launcher_died():
            return self._launcher_line()
        silent = self._silent_after_a_while()
        who = f"rank {', '.join(map(str, silent))}" if silent else "another rank"
        return (f"ERROR distributed: {who} of {self.world_size}: ended without a word at about step {self.step}; "
                f"see its output above or the system log (killed, out of memory?), then start the same command again")

    def _launcher_line(self) -> str:
        return (f"ERROR distributed: rank {self.rank} of {self.world_size}: its launcher died at step {self.step}; "
                f"start the same command again")

    def _watch(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            if self.launcher_died():
                self._leave_with_the_launcher()
            for action in self.on_tick:
                action()
            if self._answered_at is not None:
                silent_seconds = time.monotonic() - self._answered_at
                if silent_seconds > self.timeout_seconds + SILENT_SECONDS:
                    self._leave_without_the_store(silent_seconds)

    def _talk(self) -> None:
        interval = TICK_SECONDS * max(1.0, self.world_size / 64)  # what the store must serve does not grow with W
        while not self._stopping.wait(interval):
            with contextlib.suppress(RuntimeError):  # a store that died with its host; the collectives will say so
                self._beat()
            if self.world_size > 1:
                self._check_progress()
            self._answered_at = time.monotonic()

    def _leave_with_the_launcher(self) -> None:
        if self.rank == 0 and self._claimed.acquire(blocking=False):
            to_stderr(self._launcher_line())
        self._end(self._launcher_line())

    def _leave_without_the_store(self, seconds: float) -> None:
        line = (f"ERROR distributed: rank {self.rank} of {self.world_size}: the host of the rendezvous has not "
                f"answered for {seconds:.0f} s at step {self.step}; look at the network, then start the same command "
                f"again")
        if self._claimed.acquire(blocking=False):
            to_stderr(line)
        self._end(line)

    def _beat(self) -> None:
        """Send a heartbeat; take over a stop request, and leave some time after another rank's error."""
        if self._heartbeats is None or self.phase == "left":
            return
        self._heartbeats.send(self.step, self.phase)
        request = stop_request()
        if request:
            self._heartbeats.ask_all_to_stop()
        elif self._heartbeats.asked_to_stop():
            request.ask("another rank was asked to stop")
        if self._heartbeats.anyone_reported() and not self._claimed.locked():
            self._reported_at = self._reported_at or time.monotonic()
            if time.monotonic() - self._reported_at > LEAVE_SECONDS + (LINGER_SECONDS if self.hosts_store else 0):
                self._end("ERROR distributed: another rank has failed")

    def _check_progress(self) -> None:
        """Compare the heartbeats at half of the timeout with those at the timeout."""
        assert self._heartbeats is not None
        idle = time.monotonic() - self._changed_at
        if idle < self.timeout_seconds / 2:
            self._before = None
        elif self._before is None:
            self._before = self._heartbeats.counts()
        elif idle > self.timeout_seconds:
            self._end_the_hang(self._heartbeats.silent_since(self._before))

    def _silent_after_a_while(self) -> list[int]:
        """Ranks whose heartbeat does not change for a while."""
        if self._heartbeats is None:
            return []
        before = self._heartbeats.counts()
        time.sleep(STALE_SECONDS)
        return self._heartbeats.silent_since(before)

    def _end_the_hang(self, silent: list[int]) -> None:
        """Name the rank that all the others wait for: silent, or else not itself waiting, or else furthest behind."""
        assert self._heartbeats is not None
        last = self._heartbeats.last_known()
        last[self.rank] = (self.step, self.phase)
        busy = [rank for rank, (_, phase) in last.items() if phase not in WAITING] or list(last)
        culprit = silent[0] if silent else min(busy, key=lambda rank: (last[rank][0], rank))
        step, phase = last.get(culprit, (self.step, "unknown"))
        if culprit == self.rank:
            with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # a closed stderr
                faulthandler.dump_traceback(file=sys.stderr)
        elif not silent:
            time.sleep(TICK_SECONDS)  # the culprit shows its stack and speaks for itself
        where = f"step {step}, phase {phase}"
        if silent and step < self.step:  # its last heartbeat is older than its hang: it is where this rank waits
            where = f"step {self.step}, last seen at {where}"
        line = (f"ERROR distributed: rank {culprit} of {self.world_size}: no progress for {self.timeout_seconds:.0f} s "
                f"at {where}; the others wait for it: look at that process, or raise --timeout if it was only slow")
        if self.claim_report():
            to_stderr(line)
        if silent:
            self._heartbeats.kill_siblings(silent)  # stopped processes cannot leave by themselves
        self._end(line)

    def _end(self, reason: str) -> NoReturn:
        """End the process from this thread: the main one waits for something that may never come."""
        for action in self.on_end:
            last_words = threading.Thread(target=action, args=[reason], daemon=True)
            last_words.start()
            last_words.join(2)  # a file system that hangs must not keep the process
        os._exit(DistributedError.exit_code)
