"""What ranks tell each other by the job's key-value store: heartbeats, [count, step, phase, host, pid, parent's pid],
and the keys `stop` (asked to), `failed` (by the first) and `stuck` (the rank that cannot come to a stop's step)."""

import json
import os
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from launch import launcher, stop


class Heartbeats:
    """One rank's view. Every method may raise RuntimeError, when the store has died with its host."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int) -> None:
        self.store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]: a connection of its own
        self.rank, self.world_size = rank, world_size
        self._num_sent, self.has_left = 0, False  # has left: of its own will, after an error
        self._sending = threading.Lock()  # the main thread says that it leaves, while another sends heartbeats
        self._me = [socket.gethostname(), os.getpid(), os.getppid()]

    def send(self, step: int, phase: str) -> None:
        """Tell the others that this rank lives, and where it is; `left`, it ends of its own will, is the last."""
        with self._sending:
            if not self.has_left:
                self.has_left = phase == "left"
                self._num_sent += 1
                self.store.set(f"beat/{self.rank}", json.dumps([self._num_sent, step, phase, *self._me]))

    def wait_to_leave(self, seconds: float) -> None:
        """Until every rank has called this, or its host has gone, since it had seen them all; or for so long."""
        with suppress(RuntimeError):
            self.store.add("leaving", 1)
            for _ in stop.moments(seconds):
                if self.store.add("leaving", 0) >= self.world_size:
                    return

    def last(self) -> dict[int, list[Any]]:
        """The last heartbeat of every rank that has sent one; of none if the store is dead."""
        with suppress(RuntimeError):
            known = [rank for rank in range(self.world_size) if self.store.check([f"beat/{rank}"])]
            return {rank: json.loads(self.store.get(f"beat/{rank}")) for rank in known}
        return {}

    def silent_since(self, before: dict[int, list[Any]]) -> list[int]:
        """Other ranks that have sent nothing since `last` gave `before`, and did not leave of their own will."""
        if not (now := self.last()):
            return [0] if self.rank else []  # the store's host
        return [rank for rank in range(self.world_size) if rank != self.rank
                and (rank not in now or (now[rank] == before.get(rank) and now[rank][2] != "left"))]

    def kill_siblings(self, ranks: Sequence[int]) -> None:
        """SIGKILL those of the ranks that run on this host under the same launcher: they cannot end by themselves."""
        for rank, (_, _, _, host, pid, parent) in self.last().items():
            with suppress(ProcessLookupError, PermissionError):
                if rank in ranks and host == self._me[0] and parent == self._me[2] == launcher.parent_of(pid):
                    os.kill(pid, signal.SIGKILL)
