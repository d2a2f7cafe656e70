"""Who this process is among all those of its job: torchrun's variables, Slurm's, or neither, made into a World.

    with process_group("auto", timeout_seconds=300) as world:
        ...                                  # world.rank, world.world_size, world.device

One process needs no launcher and gets no process group. Under torchrun, or under plain `srun python`, the ranks
meet at MASTER_ADDR:MASTER_PORT, and the group is taken down again however the block ends.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch.command_line import DistributedError, one_line, report
from launch.launcher import Launch, read_launch
from launch.machine import (
    choose_backend,
    choose_device,
    choose_threads,
    keep_freed_memory,
    use_deterministic_kernels,
)
from launch.network import interface_towards
from launch.watchdog import Watchdog

T = TypeVar("T")
RENDEZVOUS_SECONDS = 60  # for all ranks to have started; torchrun or srun starts them together
GRACE_SECONDS = 10  # a collective gives up this long after the watchdog has named the rank that hangs


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place in the job. A world of one has no backend and needs no collective."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str | None = None
    """gloo, nccl, or None where there is no process group."""
    launcher: str = "none"
    threads: int = 1
    """Threads that this rank computes with."""
    watchdog: Watchdog = field(default_factory=Watchdog)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(backend: str = "auto", *, device: str = "auto", timeout_seconds: float = 300,
                  threads: int | None = None, deterministic: bool = False) -> Iterator[World]:
    """Join the other ranks for the length of a `with` block.

    An error inside the block ends every rank: the one that fails first reports it, in one line, and the others,
    which only lose their peer, leave with the same kind of exit code and say nothing.

    Raises:
        DeviceError: for a device or backend that is not here.
        DistributedError: if the ranks do not all arrive within a minute.
    """
    launch = read_launch()
    chosen = choose_device(device, launch)
    num_threads = choose_threads(threads, launch)
    torch.set_num_threads(num_threads)
    if deterministic:
        use_deterministic_kernels()
    if chosen.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(chosen)
    grouped = launch.launcher == "torchrun" or launch.world_size > 1
    world = World(
        rank=launch.rank, local_rank=launch.local_rank, world_size=launch.world_size,
        local_world_size=launch.local_world_size, device=chosen, launcher=launch.launcher, threads=num_threads,
        backend=choose_backend(backend, chosen) if grouped else None,
        watchdog=Watchdog(rank=launch.rank, world_size=launch.world_size, timeout_seconds=timeout_seconds,
                          has_launcher=grouped),
    )
    if grouped:
        store = meet(launch, timeout_seconds)
        join(world, launch, store, timeout_seconds)
        world.watchdog.start(store)
    try:
        yield world
    except Exception as error:
        leave_together(world, error)
        raise
    finally:
        world.watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def meet(launch: Launch, timeout_seconds: float) -> dist.Store:
    """The key-value store that every rank can reach: torchrun's agent hosts it, or else rank 0."""
    choose_interface(launch)
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    wait = timedelta(seconds=min(RENDEZVOUS_SECONDS, timeout_seconds))
    where = f"{launch.address}:{launch.port} (interface {os.environ.get('GLOO_SOCKET_IFNAME', 'default')})"
    try:
        store = dist.TCPStore(launch.address, launch.port, is_master=launch.rank == 0 and not hosted_by_agent,
                              timeout=wait, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the agent's store outlives its ranks
        shared = dist.PrefixStore(f"trainers/{attempt}", store)
        shared.add("arrived", 1)
        shared.set(f"arrived/{launch.rank}", "")
        shared.wait([f"arrived/{rank}" for rank in range(launch.world_size)], wait) if launch.rank == 0 else None
        return shared
    except RuntimeError as error:  # torch's DistError and its kin
        raise DistributedError(
            f"rank {launch.rank} of {launch.world_size} at {where}: not all ranks met within "
            f"{wait.total_seconds():.0f} s ({str(error).splitlines()[0][:120]}); check that every node can reach that "
            f"host and port, or set GLOO_SOCKET_IFNAME and MASTER_PORT"
        ) from None


def choose_interface(launch: Launch) -> None:
    """Have gloo listen where its peers are: loopback on one node, else the interface that leads to the meeting place.

    Left alone, gloo takes the address its host name resolves to, which on many systems is 127.0.1.1.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or sys.platform != "linux":
        return
    if launch.local_world_size == launch.world_size:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    elif name := interface_towards(launch.address):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def join(world: World, launch: Launch, store: dist.Store, timeout_seconds: float) -> None:
    """init_process_group, and one collective, so that ranks that cannot talk find out now."""
    assert world.backend is not None
    backend = f"cpu:gloo,cuda:{world.backend}" if world.device.type == "cuda" else world.backend
    try:
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_seconds + GRACE_SECONDS),
            device_id=world.device if world.backend == "nccl" else None,
        )
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        raise DistributedError(
            f"rank {launch.rank} of {launch.world_size} at {launch.address}:{launch.port} (interface "
            f"{os.environ.get('GLOO_SOCKET_IFNAME', 'default')}): cannot connect to the other ranks "
            f"({str(error).splitlines()[0][:120]}); set GLOO_SOCKET_IFNAME to an interface that they can reach"
        ) from None


def leave_together(world: World, error: Exception) -> None:
    """Report an error from one rank; a rank that is not the first to fail exits here, quietly."""
    lost_peer = world.world_size > 1 and one_line(error) is None and is_lost_peer(error)
    exit_code = DistributedError.exit_code if lost_peer else getattr(error, "exit_code", 1)
    if not world.watchdog.claim_report():
        raise SystemExit(exit_code) from None
    line = world.watchdog.lost_peer_line() if lost_peer else one_line(error)
    if line is not None:
        report(line)
        raise SystemExit(exit_code) from None


def is_lost_peer(error: Exception) -> bool:
    """Whether this is how torch says that another rank went away or never came to a collective."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out waiting", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def barrier(world: World) -> None:
    """Wait for every rank; nothing to do alone. On CPU tensors, so that the device need not be idle."""
    if world.backend is not None:
        dist.all_reduce(torch.zeros(1))


def from_main(world: World, action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; if it raises there, every rank raises the same error.

    The other ranks wait meanwhile, at most the collective timeout. The value must be picklable and small.
    """
    outcome: list[Any] = [None, None]
    if world.is_main:
        try:
            outcome[0] = action()
        except Exception as error:
            if world.backend is None or one_line(error) is None:
                raise
            outcome[1] = error
    if world.backend is not None:
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather(world: World, value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank. Picklable and small: the cost grows with their sum."""
    if world.backend is None:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def time_all_reduce(world: World, *, num_bytes: int, device: torch.device, backend: str) -> float:
    """Seconds that an all_reduce of that size takes in a group of its own; a first one, which connects, is left out.

    Raises:
        DistributedError: if the sum is wrong.
    """
    group = dist.new_group(backend=backend, timeout=timedelta(seconds=RENDEZVOUS_SECONDS))
    seconds = 0.0
    for _ in range(2):
        values = torch.ones(num_bytes // 4, device=device)
        barrier(world)  # else it also times how late the slowest rank comes
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        total = values.sum().item()  # waits for a GPU, which works on after all_reduce has returned
        seconds = time.perf_counter() - start
        if total != world.world_size * len(values):
            raise DistributedError(f"{backend} on {device}: all_reduce over {world.world_size} ranks gave a wrong sum")
    return seconds
