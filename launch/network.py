"""Which network interface leads to the other nodes: gloo is told, and every rank tries its path to the next rank."""

import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from launch.errors import DistributedError
from launch.launcher import Launch

if TYPE_CHECKING:
    import torch.distributed as dist

PATHS_SECONDS = 20  # for all ranks to have tried; they have all met a moment before

SIOCGIFADDR = 0x8915  # linux/sockios.h: the address of an interface


def address_towards(host: str) -> str | None:
    """This machine's own address on the route to `host`, or None if there is no route or no such name.

    A connected UDP socket sends nothing: the kernel only looks up the route.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError:
        return None


def address_among(hosts: Iterable[str]) -> str | None:
    """This machine's address on the way to the first of `hosts` that is another machine; None if there is no way.

    A machine's own name often means 127.0.1.1 to itself, which no other machine can reach.
    """
    found = None
    for host in hosts:
        address = address_towards(host)
        if address is not None and not address.startswith("127."):
            return address
        found = found or address
    return found


def interface_of(address: str | None) -> str | None:
    """The name of the interface that holds an address, or None if none does (Linux only)."""
    for _, name in socket.if_nameindex():
        if address is not None and interface_address(name) == address:
            return name
    return None


def interface_address(name: str) -> str | None:
    """The IPv4 address of an interface, or None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            packed = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
        except OSError:
            return None
    return socket.inet_ntoa(packed[20:24])


def connect_problem(address: str, port: int, *, timeout_seconds: float = 5.0) -> str:
    """Why no connection to that address and port can be made; empty if it can."""
    try:
        socket.create_connection((address, port), timeout=timeout_seconds).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def choose_interface(launch: Launch) -> None:
    """Have gloo listen where its peers are: loopback on one node, else the interface that leads to the other nodes.

    Left alone, gloo takes the address its host name resolves to, which on many systems is 127.0.1.1.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or os.uname().sysname != "Linux":
        return
    if launch.local_world_size == launch.world_size:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    elif name := interface_of(address_among([launch.address, launch.peer or launch.address])):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def check_paths(store: "dist.Store", launch: Launch) -> None:
    """Let every rank open a port on its interface and connect to that of the next; all raise what one rank finds.

    Costs one connection and a few store entries per rank. One node needs no check.
    """
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if launch.local_world_size == launch.world_size or not name:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        problem, path = own_problem(name), ""
        if not problem:
            listener.bind((interface_address(name), 0))
            listener.listen(8)  # nothing accepts: that the kernel completes the connection is what is asked
            address, port = listener.getsockname()
            path = f"{socket.gethostname()} {address} {port} {name}"
        store.set(f"path/{launch.rank}", path)
        problem = problem or problem_with_next(store, launch)
        if problem or store.add("reached", 1) == launch.world_size:
            store.set("paths", problem)  # what all wait for: the last rank says that all is well, any that it is not
        verdict = wait_for(store, "paths", PATHS_SECONDS + 5)
    if verdict:
        raise DistributedError(f"{launch.address}:{launch.port}, interface {name}: {verdict}; set GLOO_SOCKET_IFNAME "
                               f"to the interface that joins the nodes")


def own_problem(name: str) -> str:
    """What is wrong with this rank's own interface; empty if nothing is."""
    host, address = socket.gethostname(), interface_address(name)
    if address is None:
        names = ", ".join(name for _, name in socket.if_nameindex())
        return f"{host} has no interface {name} with an IPv4 address (it has {names})"
    return f"{host} cannot be reached by other nodes at {address}" if address.startswith("127.") else ""


def problem_with_next(store: "dist.Store", launch: Launch) -> str:
    """Why this rank cannot connect to the next; empty if it can."""
    told = wait_for(store, f"path/{(launch.rank + 1) % launch.world_size}", PATHS_SECONDS)
    with suppress(ValueError):
        host, address, port, name = told.split()
        reason = connect_problem(address, int(port))
        return reason and f"{socket.gethostname()} cannot connect to {host} at {address}:{port} ({name}): {reason}"
    return told  # that there is no answer; or nothing, from a rank that says itself what is wrong


def wait_for(store: "dist.Store", key: str, seconds: float) -> str:
    """The value of a key once it is there; after too long, a sentence that it is not."""
    deadline = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > deadline:
            return f"no answer ({key}) within {seconds:.0f} s"
        time.sleep(0.02)
    return store.get(key).decode()
