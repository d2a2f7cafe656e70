"""How the ranks find each other: the key-value store at MASTER_ADDR:MASTER_PORT, and a path from each to the next."""

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from launch.errors import DistributedError, first_line
from launch.launcher import Launch
from launch.network import choose_interface, connect_problem, interface_address
from launch.stop import Stopped, stop_request

RENDEZVOUS_SECONDS = 60  # for all ranks to have started; torchrun or srun starts them together
PATHS_SECONDS = 20  # for all ranks to have tried their paths; they have all met a moment before
STOP_SECONDS = 5  # for which a rank that was asked to stop waits for the others, so that all stop together


def described(launch: Launch) -> str:
    """Who could not meet the others, where and on which interface: how the error lines of a rendezvous begin."""
    return (f"rank {launch.rank} of {launch.world_size} at {launch.address}:{launch.port} "
            f"(interface {os.environ.get('GLOO_SOCKET_IFNAME', 'default')})")


def meet(launch: Launch, timeout_seconds: float) -> dist.Store:
    """The key-value store that every rank can reach, once all have reached it; DistributedError after a minute."""
    choose_interface(launch)
    wait_seconds = min(RENDEZVOUS_SECONDS, timeout_seconds)
    try:
        if not launch.hosts_store:  # the process that hosts it may start later than this one
            wait_for_port(launch, wait_seconds)
        store = dist.TCPStore(launch.address, launch.port, is_master=launch.hosts_store, wait_for_workers=False,
                              timeout=timedelta(seconds=wait_seconds))
        return wait_for_all(store, launch, wait_seconds)
    except (RuntimeError, OSError) as error:  # torch's DistError and its kin
        raise DistributedError(
            f"{described(launch)}: not all ranks met within {wait_seconds:.0f} s ({first_line(error)}); check that "
            f"every rank was started, that the port is free (MASTER_PORT) and that every node can reach that host, or "
            f"set GLOO_SOCKET_IFNAME"
        ) from None


def wait_for_port(launch: Launch, wait_seconds: float) -> None:
    """Until something listens there. torch's own wait hears no signal, and ends with pages of C++ frames."""
    began = time.monotonic()
    while True:
        try:
            with socket.create_connection((launch.address, launch.port), timeout=STOP_SECONDS):
                time.sleep(0.2)  # without, torch's own connection of some of 16 ranks stalled for 5 s (5 of 5 starts)
                return
        except OSError:
            if time.monotonic() - began > wait_seconds:
                raise
        leave_if_stopped(time.monotonic() - began)
        time.sleep(0.1)


def wait_for_all(store: dist.Store, launch: Launch, wait_seconds: float) -> dist.Store:
    """The part of the store that belongs to this start of the job; RuntimeError names ranks that did not arrive."""
    # only torchrun's store outlives its ranks; each node counts its own restarts, so that one that joins late differs
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if launch.torchrun_hosts_store else "0"
    shared = dist.PrefixStore(f"trainers/{attempt}", store)
    shared.set(f"arrived/{launch.rank}", "")
    awaited = [f"arrived/{rank}" for rank in range(launch.world_size)] if launch.rank == 0 else ["all"]
    began = time.monotonic()
    while not shared.check(awaited):
        if time.monotonic() - began > wait_seconds:
            missing = [key.rpartition("/")[2] for key in awaited if not shared.check([key])]
            raise RuntimeError(f"missing: rank {', '.join(missing[:8])}" if launch.rank == 0 else "rank 0 gave up")
        leave_if_stopped(time.monotonic() - began)
        time.sleep(0.01 * max(1.0, launch.world_size / 16))  # what the store must serve does not grow with W
    if launch.rank == 0:
        shared.set("all", "")
    return shared


def leave_if_stopped(waited_seconds: float) -> None:
    """A stop while ranks are still awaited: there is nothing to save, and they may never come."""
    if stop_request() and waited_seconds > STOP_SECONDS:
        raise Stopped(stop_request().reason)


def check_paths(store: dist.Store, launch: Launch) -> None:
    """Let every rank open a port on its interface and connect to that of the next; all raise what one rank finds.

    Costs one connection and a few store entries per rank. One node needs no check.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if launch.local_world_size == launch.world_size or not name:
        return
    host, address = socket.gethostname(), interface_address(name)
    problem = path = ""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        if address is None:
            names = ", ".join(other for _, other in socket.if_nameindex())
            problem = f"{host} has no interface {name} with an IPv4 address (it has {names})"
        elif address.startswith("127."):
            problem = f"{host} cannot be reached by other nodes at {address}"
        else:
            listener.bind((address, 0))
            listener.listen(8)  # nothing accepts: that the kernel completes the connection is what is asked
            path = f"{host} {address} {listener.getsockname()[1]} {name}"
        store.set(f"path/{launch.rank}", path)
        problem = problem or problem_with_next(store, launch)
        if problem or store.add("reached", 1) == launch.world_size:
            store.set("paths", problem)  # what all wait for: the last rank says that all is well, any that it is not
        verdict = wait_for(store, "paths", PATHS_SECONDS + 5)
    if verdict:
        raise DistributedError(f"{launch.address}:{launch.port}, interface {name}: {verdict}; set GLOO_SOCKET_IFNAME "
                               f"to the interface that joins the nodes")


def problem_with_next(store: dist.Store, launch: Launch) -> str:
    """Why this rank cannot connect to the next; empty if it can."""
    told = wait_for(store, f"path/{(launch.rank + 1) % launch.world_size}", PATHS_SECONDS)
    with suppress(ValueError):
        host, address, port, name = told.split()
        reason = connect_problem(address, int(port))
        return reason and f"{socket.gethostname()} cannot connect to {host} at {address}:{port} ({name}): {reason}"
    return told  # that there is no answer; or nothing, from a rank that says itself what is wrong


def wait_for(store: dist.Store, key: str, seconds: float) -> str:
    """The value of a key once it is there; after too long, a sentence that it is not."""
    deadline = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > deadline:
            return f"no answer ({key}) within {seconds:.0f} s"
        time.sleep(0.02)
    return store.get(key).decode()
