"""This process's rank and device, and the group it trains in: a World, by torchrun's variables, Slurm's, or neither."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launch import failure, launcher, network
from launch.errors import MOST_SECONDS, DistributedError, first_line, is_users
from launch.machine import choose_backend, choose_device, keep_freed_memory
from launch.rendezvous import RENDEZVOUS_SECONDS, check_paths, described, meet
from launch.watchdog import Watchdog

T = TypeVar("T")
NCCL_REMEDIES = {"Duplicate GPU": "start one rank per GPU, or use --backend gloo",
                 "shared memory": "enlarge /dev/shm (docker's --shm-size), or set NCCL_SHM_DISABLE=1"}


@dataclass(frozen=True, kw_only=True)
class World(launcher.Launch):
    """This process's place in the job, its device and its group. A world of one has no backend, needs no collective."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str | None = None  # gloo, nccl, or None where there is no process group
    threads: int = 1
    watchdog: Watchdog = field(default_factory=Watchdog)

    @property
    def shard(self) -> dict[str, Any]:
        """Which part of every batch is this rank's, and where it goes: what loaders are told."""
        return {"rank": self.rank, "world_size": self.world_size, "device": self.device}

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(backend: str = "auto", *, device: str = "auto", timeout_seconds: float = 300,
                  threads: int | None = None, deterministic: bool = False) -> Iterator[World]:
    """Join the other ranks for a `with` block, whose errors end all; DistributedError if not all come in a minute."""
    launch = launcher.read_launch()
    job = failure.JobFailure(launch)
    watchdog = Watchdog(job, timeout_seconds=timeout_seconds)
    try:
        try:
            watchdog.start()  # before the ranks meet: their launcher may die meanwhile
            store = meet(launch, timeout_seconds) if launch.is_grouped else None
        except DistributedError as error:
            error.speaks = job.claim_on_this_node(launch.port)
            raise
        except RuntimeError as error:
            raise failure.translated(error) from None
        watchdog.start(store)
        try:
            world = prepare(launch, watchdog, backend, device=device, threads=threads, deterministic=deterministic)
            if store is not None:
                join(world, store)
            yield world
        except Exception as error:
            job.leave(error)
            raise
    finally:
        if dist.is_initialized():
            with failure.exit_after(30, DistributedError.exit_code):  # gloo needs milliseconds
                dist.destroy_process_group()
        job.linger()
        watchdog.stop()


def prepare(launch: launcher.Launch, watchdog: Watchdog, backend: str, *, device: str, threads: int | None,
            deterministic: bool) -> World:
    """Choose this rank's device, threads and backend, and set torch up for them; DeviceError if one is not here."""
    chosen = choose_device(device, launch)
    num_threads = launcher.choose_threads(launch) if threads is None else threads
    torch.set_num_threads(num_threads)
    if deterministic:
        network.library_defaults(CUBLAS_WORKSPACE_CONFIG=":4096:8")  # cuBLAS reads it when CUDA is first used
        torch.use_deterministic_algorithms(True)
    if chosen.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("highest" if deterministic else "high")  # high: TF32
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = not deterministic
    return World(**vars(launch), device=chosen, threads=num_threads, watchdog=watchdog,
                 backend=choose_backend(backend, chosen) if launch.is_grouped else None)


def join(world: World, store: dist.Store) -> None:
    """init_process_group, and one collective, so that ranks that cannot talk find out now."""
    assert world.backend is not None
    backend = f"cpu:gloo,cuda:{world.backend}" if world.device.type == "cuda" else world.backend
    check_paths(store, world)
    if world.backend == "nccl":  # which then remembers its last collectives, unless the environment says otherwise
        network.library_defaults(TORCH_FR_BUFFER_SIZE="2000", unless="TORCH_NCCL_TRACE_BUFFER_SIZE")  # the old name
        network.library_defaults(TORCH_NCCL_DUMP_ON_TIMEOUT="1")
    try:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.world_size,
            timeout=timedelta(seconds=MOST_SECONDS),  # hangs are the watchdog's: torch would count a job's SIGSTOP too
            device_id=world.device if world.backend == "nccl" else None)
        barrier(world)
    except RuntimeError as error:
        last = str(error).partition("Last error:\n")[2].strip()  # NCCL's own, below a line of torch's
        remedy = next((remedy for words, remedy in NCCL_REMEDIES.items() if words in last), "set GLOO_SOCKET_IFNAME, "
                      "and for NCCL NCCL_SOCKET_IFNAME, to an interface that they can reach")
        raise DistributedError(f"{described(world)}: cannot connect to the other ranks "
                               f"({last or first_line(error)}); {remedy}") from None


def barrier(world: World) -> None:
    """Wait for every rank; nothing to do alone. On CPU tensors, so that the device need not be idle."""
    if world.backend is not None:
        dist.all_reduce(torch.zeros(1))


def from_main(world: World, action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, small and picklable, on every rank; if it raises there, each raises the same."""
    outcome: list[Any] = [None, None]
    world.watchdog.mark("main" if world.is_main else "reduce")
    if world.is_main:
        try:
            outcome[0] = action()
        except Exception as error:
            if world.backend is None or not is_users(error):
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
    """Seconds that an all_reduce of that size takes in a group of its own; a first one, which connects, is left out."""
    group: Any = dist.new_group(backend=backend, timeout=timedelta(seconds=RENDEZVOUS_SECONDS))
    start = 0.0
    for _ in range(2):
        values = torch.ones(num_bytes // 4, device=device)
        barrier(world)  # else it also times how late the slowest rank comes
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        if values.sum().item() != world.world_size * len(values):  # waits for a GPU, which works on meanwhile
            raise DistributedError(f"{backend} on {device}: all_reduce over {world.world_size} ranks gave a wrong sum")
    return time.perf_counter() - start
