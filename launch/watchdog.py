"""A thread beside the training loop that sees what the loop cannot while it waits for its peers.

Twice a second it tells the other ranks how far this one is, passes a stop request on, and looks for trouble: a
launcher that has died (then this rank leaves too, so that no orphan keeps a GPU), or a loop that has made no
progress for the timeout (then the rank that hangs is named, with its Python stack, and the job ends).
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from launch.command_line import DistributedError, report
from launch.stop import stop_request

if TYPE_CHECKING:
    import torch.distributed as dist

TICK_SECONDS = 0.5
WAITING = ("backward", "reduce")  # phases in which a rank may be waiting for another
STALE_SECONDS = 1.3  # a live rank has sent another beat by then


class Watchdog:
    """Heartbeats, hang detection and the one-report-a-job rule. Without a store (one process) it does none of it."""

    def __init__(self, *, rank: int = 0, world_size: int = 1, timeout_seconds: float = 300,
                 has_launcher: bool = False) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout_seconds = timeout_seconds
        self.on_tick: list[Callable[[], None]] = []
        self.step, self.phase = 0, "start"
        self._changed_at = time.monotonic()
        self._parent = os.getppid() if has_launcher else None
        self._store: dist.Store | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._num_beats = 0

    def mark(self, step: int, phase: str) -> None:
        """Say that the training loop is alive and where: cheap enough for every phase of every step."""
        self.step, self.phase, self._changed_at = step, phase, time.monotonic()

    def start(self, store: "dist.Store | None" = None) -> None:
        """Begin to watch. `store` is used from this thread alone, through a connection of its own."""
        self._store = store.clone() if store is not None else None  # pyright: ignore[reportAttributeAccessIssue]
        if self._thread is None:
            self.mark(self.step, self.phase)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread; the group is about to be taken down."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def claim_report(self) -> bool:
        """Whether this rank is the first of the job to report an error, and so the one whose line is shown."""
        if self._store is None:
            return True
        try:
            return self._store.add("reported", 1) == 1
        except RuntimeError:  # the store died with its host, rank 0 or torchrun: the lowest rank left speaks
            return self.rank <= 1

    def lost_peer_line(self) -> str:
        """The line for a collective that failed because some rank is gone: names those without a heartbeat."""
        silent = self._silent_ranks()
        who = f"rank {', '.join(map(str, silent))}" if silent else "another rank"
        return (f"ERROR distributed: {who} of {self.world_size}: ended without a word at about step {self.step}; "
                f"see its output above or the system log (killed, out of memory?), then start the same command again")

    def _watch(self) -> None:
        interval = TICK_SECONDS * max(1.0, self.world_size / 64)  # what the store must serve does not grow with W
        while not self._stopping.wait(interval):
            if self._parent is not None and os.getppid() != self._parent:
                if self.rank == 0:
                    report(f"ERROR distributed: rank {self.rank}: its launcher died at step {self.step}; "
                           f"start the same command again")
                os._exit(DistributedError.exit_code)
            for action in self.on_tick:
                action()
            with contextlib.suppress(RuntimeError):  # a store that died with its host; the collectives will say so
                self._beat()
            if self.world_size > 1 and time.monotonic() - self._changed_at > self.timeout_seconds:
                self._end_the_hang()

    def _beat(self) -> None:
        if self._store is None:
            return
        self._num_beats += 1
        self._store.set(f"beat/{self.rank}", json.dumps([self._num_beats, self.step, self.phase]))
        request = stop_request()
        if request:
            self._store.set("stop", request.reason or "")
        elif self._store.check(["stop"]):
            request.ask("another rank was asked to stop")

    def _beats(self) -> dict[int, list[Any]]:
        """The last beat [count, step, phase] of every rank that has sent one."""
        assert self._store is not None
        ranks = [rank for rank in range(self.world_size) if self._store.check([f"beat/{rank}"])]
        return {rank: json.loads(self._store.get(f"beat/{rank}")) for rank in ranks}

    def _silent_ranks(self) -> list[int]:
        """Ranks whose heartbeat does not change for a while."""
        try:
            before = self._beats()
            time.sleep(STALE_SECONDS)
            after = self._beats()
        except RuntimeError:
            return [0]  # the store's host
        return [rank for rank in range(self.world_size)
                if rank != self.rank and (rank not in after or after[rank][0] == before.get(rank, [None])[0])]

    def _end_the_hang(self) -> None:
        """Name the rank that all the others wait for: silent, or else not itself waiting, or else furthest behind."""
        silent = self._silent_ranks() if self._store is not None else []
        beats = self._beats() if self._store is not None and 0 not in silent else {}
        beats[self.rank] = [0, self.step, self.phase]
        busy = [rank for rank, beat in beats.items() if beat[2] not in WAITING] or list(beats)
        culprit = silent[0] if silent else min(busy, key=lambda rank: (beats[rank][1], rank))
        _, step, phase = beats.get(culprit, [0, self.step, "unknown"])
        if culprit == self.rank:
            faulthandler.dump_traceback(file=sys.stderr)
        elif not silent:
            time.sleep(TICK_SECONDS)  # the culprit shows its stack and speaks for itself
        if self.claim_report():
            report(f"ERROR distributed: rank {culprit} of {self.world_size}: no progress for "
                   f"{self.timeout_seconds:.0f} s at step {step}, phase {phase}; the others wait for it: look at that "
                   f"process, or raise --timeout if it was only slow")
        os._exit(DistributedError.exit_code)
