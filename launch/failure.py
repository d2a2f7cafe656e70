"""How a job ends badly: torch's errors translated, one rank prints the error's line, all leave."""

import multiprocessing
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from launch import errors, heartbeats, launcher, stop
from launch.errors import DeviceError, DistributedError, UsageError, is_users

AGREE_SECONDS = 15  # for the ranks to agree on who prints an error, and to print it; the store answers in milliseconds
LEAVE_SECONDS = 10.0  # for a rank to notice by itself that another has failed, and to end a save
STALE_SECONDS = 1.3  # a live rank has sent another heartbeat by then
LINGER_SECONDS = 5.0  # for which the host of the store waits for the others, when all leave


class JobFailure:
    """One rank prints the line of an error and every rank leaves: they agree through the store of the heartbeats."""

    def __init__(self, launch: launcher.Launch) -> None:
        self.launch = launch
        self.step = 0  # at which this rank is, as the watchdog is told
        self.heartbeats: heartbeats.Heartbeats | None = None  # until the ranks have met each prints its own
        self.run: Any = None  # the run's folder, to be told: `failed(cause, step=…)` or `preempted(reason)`
        self._launcher = (stop.stop_request().launcher or os.getppid()) if launch.is_grouped else None
        self._claimed = threading.Lock()  # taken once: this process prints at most one error
        self._another_failed_at: float | None = None
        self._node_token: socket.socket | None = None  # held until the process ends

    def launcher_died(self) -> bool:
        """Whether the process that started this one is gone: it has then been given another parent."""
        return self._launcher is not None and os.getppid() != self._launcher

    def claim_error_line(self) -> bool:
        """Whether this rank is the first of the job to fail, and so the one whose line is shown."""
        if not self.claim_in_this_process():
            return False
        try:
            return self.heartbeats is None or self.heartbeats.store.add("failed", 1) == 1
        except RuntimeError:  # the store died with its host, torchrun or rank 0: the first rank that lives elsewhere
            first_elsewhere = self.launch.local_world_size if self.launch.torchrun_hosts_store else 1
            speaker = 0 if self.launcher_died() else first_elsewhere
            return self.launch.rank == speaker and self._another_failed_at is None

    def claim_in_this_process(self) -> bool:
        """Whether this process has not printed an error yet, whatever the others do: they may be out of reach."""
        return self._claimed.acquire(blocking=False)

    def claim_on_this_node(self, port: int) -> bool:
        """Whether this rank speaks for its node, where no rank has reached the store."""
        self._node_token = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:  # an abstract Unix socket (Linux) can be bound once, until it is closed or its process ends
            self._node_token.bind(f"\0torchrun-trainers-{os.getuid()}-{port}")
        except OSError:
            return False
        time.sleep(1)  # the others, which wait just as long, find that it is taken
        return True

    def leave(self, error: Exception) -> None:
        """Exit after an error, with its line if this rank is the first to fail; return to show our bug's traceback."""
        known = translated(error)
        code = getattr(known, "exit_code", 1)
        with exit_after(AGREE_SECONDS, code):
            first = self.claim_error_line()
            line = self._lost_line() if first and isinstance(known, LostPeer) else errors.user_line(known)
            if first and line is not None:
                errors.report_error(line)
            if self.heartbeats is not None:
                with suppress(RuntimeError):
                    self.heartbeats.send(self.step, "left")  # so that the others do not take it for one that was lost
        if not first or is_users(known):
            raise SystemExit(code) from None

    def linger(self) -> None:
        """After an error, where this process hosts the store: keep it until the others know which rank failed first."""
        if self.heartbeats is None or not self.launch.hosts_store or not self.heartbeats.has_left:
            return
        before = self.heartbeats.last()
        for waited in stop.moments(LINGER_SECONDS):
            last = self.heartbeats.last()
            silent = self.heartbeats.silent_since(before) if waited > LINGER_SECONDS / 2 else []
            if {*range(1, self.launch.world_size)} <= {*silent, *(rank for rank in last if last[rank][2] == "left")}:
                return

    def follow(self) -> None:
        """Called with every heartbeat: end the process if another rank failed a while ago and this one still runs."""
        if self.heartbeats is None or not self.heartbeats.store.check(["failed"]) or self._claimed.locked():
            return
        self._another_failed_at = self._another_failed_at or time.monotonic()
        if time.monotonic() - self._another_failed_at > LEAVE_SECONDS + LINGER_SECONDS * self.launch.hosts_store:
            self.end("ERROR distributed: another rank has failed")

    def end_without_launcher(self) -> NoReturn:
        """End the process, whose launcher has died, so that no orphan keeps a GPU; rank 0 speaks."""
        speaks = self.launch.rank == 0 and self.claim_in_this_process()
        if self._claimed.locked() and not speaks:
            time.sleep(2)  # the main thread, whose peer has ended too, has claimed the line and is about to print it
        self.end(self._lost_line(), speaks=speaks)

    def end(self, line: str, *, speaks: bool = False, stuck: Sequence[int] = (),
            code: int = DistributedError.exit_code) -> NoReturn:
        """End the process from the watchdog's thread: the main one waits for something that may never come. `stuck`
        ranks on this host are killed. A stop (EXIT_PREEMPTED) waits for all: none is to take another for lost."""
        if speaks:
            errors.report_error(line)
        if stuck and self.heartbeats is not None:
            self.heartbeats.kill_siblings(stuck)
        if self.run is not None:
            write = self.run.preempted if code == errors.EXIT_PREEMPTED else partial(self.run.failed, step=self.step)
            writing = threading.Thread(target=write, args=[line], daemon=True)
            with suppress(RuntimeError):  # no more threads
                writing.start()
                writing.join(2)  # a file system that hangs must not keep the process
        if code == errors.EXIT_PREEMPTED and self.heartbeats is not None:
            self.heartbeats.wait_to_leave(LINGER_SECONDS)
        for child in multiprocessing.active_children():
            if child.daemon:  # as multiprocessing does at a usual exit
                child.kill()
        os._exit(code)

    def _lost_line(self) -> str:
        """What this rank has lost: its launcher, or else other ranks; names those without a heartbeat."""
        size = self.launch.world_size
        if self.launcher_died():
            return (f"ERROR distributed: rank {self.launch.rank} of {size}: its launcher died at step {self.step}; "
                    f"start the same command again")
        who = "another rank"
        if self.heartbeats is not None:
            before = self.heartbeats.last()
            time.sleep(STALE_SECONDS)
            if silent := self.heartbeats.silent_since(before):
                who = f"rank {', '.join(map(str, silent))}"
        return (f"ERROR distributed: {who} of {size}: exited silently at about step {self.step}; see its output above "
                f"or the system log (killed, out of memory?), then start the same command again")


@contextmanager
def exit_after(seconds: float, code: int) -> Iterator[None]:
    """Exit if the block takes longer: NCCL, or the store of a node that is cut off, may be waited for without end."""
    last_resort = threading.Timer(seconds, os._exit, [code])
    last_resort.daemon = True
    with suppress(RuntimeError):  # where no thread can be started, what is to be said comes all the same
        last_resort.start()
    try:
        yield
    finally:
        last_resort.cancel()


class LostPeer(DistributedError):
    """A collective failed because another rank has ended, or did not come."""


def translated(error: Exception) -> Exception:
    """What torch raises for a lost rank or a lack of memory, as one of our errors; any other error unchanged."""
    text = str(error).lower()
    if is_users(error):
        return error
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return DeviceError("threads: no more can be started here; raise `ulimit -u` or the container's limit of "
                           "processes (pids), or use fewer ranks, --workers and --threads")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return DeviceError(f"memory: {str(error).splitlines()[0] if text else 'used up'}; lower --batch-size, raise "
                           f"--accumulation-steps, or use --precision bf16")
    if isinstance(error, torch.AcceleratorError):
        return DeviceError(f"GPU: {errors.first_line(error)}; look at nvidia-smi and the system log; "
                           f"CUDA_LAUNCH_BLOCKING=1 shows the line that caused it")
    if "finished reduction in the prior iteration" in text:
        indices = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
        which = f" (numbers {indices[1].strip()})" if indices else ""
        return UsageError(f"--find-unused-parameters: parameters of the model{which} had no part in the loss of a "
                          f"step, and DDP waits for their gradients; give this flag, or --freeze them")
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out waiting", "broken pipe")
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in text for word in words)):
        return LostPeer("another rank was lost")
    return error
