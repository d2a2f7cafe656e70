"""Which network interface leads to the other nodes: gloo is told. And whether another library finds its server."""

import fcntl
import os
import socket
import struct
from contextlib import suppress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from launch.launcher import Launch


def address_towards(host: str) -> str | None:
    """This machine's own address on the route to `host`, or None if there is no route or no such name."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # of UDP: nothing is sent, the kernel only looks up the route
        return probe.getsockname()[0]
    return None


def address_among(hosts: list[str]) -> str | None:
    """This machine's address on the way to the first of `hosts` that is another machine; None if there is no way."""
    found = [address for address in map(address_towards, hosts) if address is not None]
    found.sort(key=lambda address: address.startswith("127."))  # as a machine's own name often means to itself
    return found[0] if found else None


def interface_of(address: str | None) -> str | None:
    """The name of the interface that holds an address, or None if none does (Linux only)."""
    return next((name for _, name in socket.if_nameindex() if address and interface_address(name) == address), None)


def interface_address(name: str) -> str | None:
    """The IPv4 address of an interface, or None if it has none."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        packed = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name[:15].encode()))  # SIOCGIFADDR
        return socket.inet_ntoa(packed[20:24])
    return None


def connect_problem(address: str, port: int) -> str:
    """Why no connection to that address and port can be made; empty if it can."""
    try:
        socket.create_connection((address, port), timeout=5.0).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def choose_interface(launch: Launch) -> None:
    """Have gloo listen where its peers are; left alone, it would often take 127.0.1.1, as the host's name resolves."""
    if "GLOO_SOCKET_IFNAME" in os.environ or os.uname().sysname != "Linux":
        return
    if launch.local_world_size == launch.world_size:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    elif name := interface_of(address_among([launch.address, launch.peer or launch.address])):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def is_reachable(url: str) -> bool:
    """Whether a connection to the host of a URL can be made, or to the proxy that leads there."""
    parts = urlsplit(url)
    proxies = getproxies() if parts.hostname and not proxy_bypass(parts.hostname) else {}
    way = urlsplit(proxies.get(parts.scheme, url))
    return not connect_problem(way.hostname or "", way.port or (443 if way.scheme == "https" else 80))


def library_defaults(*, unless: str = "", **variables: str) -> None:
    """Set environment variables that another library reads, where the user has not, nor the one named `unless`."""
    for name, value in variables.items() if unless not in os.environ else ():
        os.environ.setdefault(name, value)
