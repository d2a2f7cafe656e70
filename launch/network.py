"""Which network interface of this machine leads to another host; standard library only."""

import fcntl
import socket
import struct

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


def interface_towards(host: str) -> str | None:
    """The name of the interface that holds that address, or None if none does (Linux only)."""
    address = address_towards(host)
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
