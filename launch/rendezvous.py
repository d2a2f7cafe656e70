"""How the ranks find each other: the key-value store at MASTER_ADDR:MASTER_PORT, and a path from each to the next."""

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from launch import launcher, network, stop
from launch.errors import DistributedError, first_line

RENDEZVOUS_SECONDS = 60  # for all ranks to have started; torchrun or srun starts them together
STOP_SECONDS = 5  # for which a rank that was asked to stop waits for the others, so that all stop together


def described(launch: launcher.Launch) -> str:
    """Who could not meet the others, where and on which interface: how the error lines of a rendezvous begin."""
    return (f"rank {launch.rank} of {launch.world_size} at {launch.address}:{launch.port} "
            f"(interface {os.environ.get('GLOO_SOCKET_IFNAME', 'default')})")


def meet(launch: launcher.Launch, timeout_seconds: float) -> dist.Store:
    """The key-value store that every rank can reach, once all have reached it; DistributedError as `take_place`."""
    network.choose_interface(launch)
    wait_seconds = min(RENDEZVOUS_SECONDS, timeout_seconds)
    try:
        if not launch.hosts_store:  # the process that hosts it may start later than this one
            wait_for_port(launch, wait_seconds)
        store = dist.TCPStore(launch.address, launch.port, is_master=launch.hosts_store, wait_for_workers=False,
                              timeout=timedelta(seconds=wait_seconds))
        return take_place(store, launch, wait_seconds)
    except (RuntimeError, OSError) as error:  # torch's DistError and its kin
        raise DistributedError(f"{described(launch)}: not all ranks met within {wait_seconds:.0f} s "
                               f"({first_line(error)}); check that every rank was started, that the port is free "
                               f"(MASTER_PORT) and that every node can reach that host, or set GLOO_SOCKET_IFNAME"
                               ) from None


def wait_for_port(launch: launcher.Launch, wait_seconds: float) -> None:
    """Until something listens there. torch's own wait hears no signal, and ends with pages of C++ frames."""
    refused = "no answer"
    for _ in stop.moments(wait_seconds, patience=STOP_SECONDS):
        refused = network.connect_problem(launch.address, launch.port)
        if not refused:
            time.sleep(0.2)  # without, torch's own connection of some of 16 ranks stalled for 5 s (5 of 5 starts)
            return
    raise OSError(refused)


def take_place(store: dist.Store, launch: launcher.Launch, wait_seconds: float) -> dist.Store:
    """This job's part of the store, by rank 0's token, once its round's roll is full; RuntimeError if it is not."""
    rolls = dist.PrefixStore("trainers", store)
    step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}" if launch.launcher == "slurm" else ""
    job = json.dumps([launch.world_size, os.environ.get("TORCHELASTIC_RUN_ID", step)])  # the same on all of its ranks
    pause = 0.01 * max(1.0, launch.world_size / 16)  # what the store must serve does not grow with W
    looks = stop.moments(wait_seconds, pause=pause, patience=STOP_SECONDS)
    if launch.rank > 0:
        return dist.PrefixStore(enter_roll(rolls, launch, job, looks), rolls)
    roll = dist.PrefixStore(str(rolls.add("open", 1)), rolls)
    roll.set("job", job)
    roll.add("place/0", 1)
    places = [f"place/{rank}" for rank in range(launch.world_size)]
    for _ in looks:
        if roll.check(places):
            roll.set("token", token := secrets.token_hex(8))
            return dist.PrefixStore(token, rolls)
    missing = [place.rpartition("/")[2] for place in places if not roll.check([place])]
    raise RuntimeError(f"missing: rank {', '.join(missing[:8])}")


def enter_roll(rolls: dist.Store, launch: launcher.Launch, job: str, looks: Iterator[float]) -> str:
    """The token that rank 0 sets, once the roll in which this rank has a place is full."""
    number, refused = b"", "rank 0 did not come"
    for _ in looks:
        if rolls.check(["open"]) and (latest := rolls.get("open")) != number:
            number, roll = latest, dist.PrefixStore(latest.decode(), rolls)
            theirs, refused = roll.get("job").decode(), ""
            if theirs != job:
                refused = f"the {json.loads(theirs)[0]} ranks of another job meet there"
            elif roll.check(["token"]):
                refused = f"{launch.world_size} ranks have met there already"
            elif roll.add(f"place/{launch.rank}", 1) > 1:
                refused = f"another rank {launch.rank} has come before"
            if refused and not launch.torchrun_hosts_store:  # torchrun's may still hold the roll of an earlier round
                raise DistributedError(f"{described(launch)}: {refused}; start each rank once, and give each job a "
                                       f"port of its own (MASTER_PORT)")
        if number and not refused and roll.check(["token"]):
            return roll.get("token").decode()
    raise RuntimeError(refused or "rank 0 gave up")


def check_paths(store: dist.Store, launch: launcher.Launch) -> None:
    """Let every rank open a port on its interface and connect to that of the next; all raise what one rank finds."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if launch.local_world_size == launch.world_size or not name:
        return
    host, address = socket.gethostname(), network.interface_address(name)
    with socket.create_server((address or "", 0), backlog=8) as listener:  # nothing accepts: the kernel alone is asked
        store.set(f"path/{launch.rank}", f"{host} {address} {listener.getsockname()[1]} {name}" if address else "")
        names = ", ".join(other for _, other in socket.if_nameindex())
        problem = (problem_with_next(store, launch) if address else
                   f"{host} has no interface {name} with an IPv4 address (it has {names})")
        if problem or store.add("reached", 1) == launch.world_size:
            store.set("paths", problem)  # what all wait for: the last rank says that all is well, any that it is not
        if verdict := store.get("paths").decode():
            raise DistributedError(f"{launch.address}:{launch.port}, interface {name}: {verdict}; set "
                                   f"GLOO_SOCKET_IFNAME to the interface that joins the nodes")


def problem_with_next(store: dist.Store, launch: launcher.Launch) -> str:
    """Why this rank cannot connect to the next; empty if it can, or if that one says itself what is wrong."""
    told = store.get(f"path/{(launch.rank + 1) % launch.world_size}").decode()
    if not told:
        return ""
    host, address, port, name = told.split()
    if address.startswith("127.") and host != socket.gethostname():
        return f"{host} cannot be reached by other nodes at {address}"
    reason = network.connect_problem(address, int(port))
    return reason and f"{socket.gethostname()} cannot connect to {host} at {address}:{port} ({name}): {reason}"
