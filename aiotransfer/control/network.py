"""Where control connections run: TCP, unless a test puts something else in its place."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Protocol

from aiotransfer.model.address import Address
from aiotransfer.quote import quote

BACKLOG = 1024
MOST_RESOLVED = 16  # addresses of one name that are tried
PORT_TRIES = 8  # for one free port that all addresses of a name have
Factory = Callable[[], asyncio.Protocol]


class Server(Protocol):
    """What `Network.listen` gives: it listens until it is closed."""

    def close(self) -> None:
        """Stop listening. Twice is silent."""
        ...


class Network(Protocol):
    """Where streams of bytes between addresses come from: TCP, or a simulated network in tests."""

    async def listen(self, address: Address, factory: Factory) -> tuple[Server, Address]:
        """Accept streams; the address with its real port. Raises `OSError` or `OverflowError`."""
        ...

    async def resolve(self, address: Address) -> list[Address]:
        """What the host stands for, in the order to try: never empty, no wildcard. Raises `OSError`."""
        ...

    async def connect(self, address: Address, factory: Factory) -> None:
        """Open one stream to an address that `resolve` gave. Raises `OSError`."""
        ...

    async def further(self, address: Address, hosts: Iterable[str]) -> list[str]:
        """Which of these addresses of this host may be listened on beside that one."""
        ...


class _Servers:
    """One for each address of a name."""

    def __init__(self) -> None:
        self._each: list[Server] = []

    def add(self, server: Server) -> None:
        self._each.append(server)

    def close(self) -> None:
        for server in self._each:
            server.close()


class Tcp:
    """TCP over the running event loop."""

    async def listen(self, address: Address, factory: Factory) -> tuple[Server, Address]:
        """See `Network`. A name is listened on at all its addresses that are this host's, by one port."""
        loop = asyncio.get_running_loop()
        sockets = _bind(await _places(loop, address), address.port)
        port = int(sockets[0].getsockname()[1])
        servers = _Servers()
        try:
            for sock in sockets:
                # asyncio accepts `backlog` times in a row, and with no descriptor left it fails, logs and
                # sets a timer as often
                servers.add(await loop.create_server(factory, sock=sock, backlog=1))
                sock.listen(BACKLOG)
        except BaseException:  # the sockets are known here only
            servers.close()
            for sock in sockets:
                sock.close()
            raise
        return servers, Address(address.host, port)

    async def resolve(self, address: Address) -> list[Address]:
        """See `Network`. Families alternate, beginning with the resolver's choice (RFC 8305, section 4)."""
        places = await _places(asyncio.get_running_loop(), address)
        found = [place for place in dict.fromkeys(Address(host, address.port) for _, host in places) if not place.is_wildcard]
        if not found:
            raise OSError(errno.EADDRNOTAVAIL, f"the name {quote(address.host)} stands for no address that can be dialled")
        first = ":" in found[0].host
        these, others = ([place for place in found if (":" in place.host) is (first is same)] for same in (True, False))
        mixed: list[Address] = []
        while these or others:
            mixed += these[:1] + others[:1]
            these, others = these[1:], others[1:]
        return mixed[:MOST_RESOLVED]

    async def connect(self, address: Address, factory: Factory) -> None:
        """See `Network`."""
        await asyncio.get_running_loop().create_connection(factory, address.host, address.port)

    async def further(self, address: Address, hosts: Iterable[str]) -> list[str]:
        """See `Network`. None beside a loopback address: an engine that listens there is for this host
        alone."""
        places = await _places(asyncio.get_running_loop(), address)
        firsts = {ipaddress.ip_address(host.partition("%")[0]) for _, host in places}
        if any(first.is_loopback for first in firsts):
            return []
        others = {host: ipaddress.ip_address(host) for host in hosts}
        return [host for host, other in others.items() if other not in firsts and not (other.is_loopback or other.is_link_local)]


Place = tuple[socket.AddressFamily, str]


async def _places(loop: asyncio.AbstractEventLoop, address: Address) -> list[Place]:
    """The addresses that a host stands for; a number needs no resolver."""
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(address.host).version
        return [(socket.AF_INET6 if version == 6 else socket.AF_INET, address.host)]
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return [(family, str(where[0])) for family, _, _, _, where in found if family in (socket.AF_INET, socket.AF_INET6)]


def _bind(places: list[Place], port: int) -> list[socket.socket]:
    """Sockets bound to all of these that are of this host, by one port. Raises `OSError`, also when none
    is."""
    for left in reversed(range(PORT_TRIES)):
        sockets: list[socket.socket] = []
        absent: OSError | None = None
        try:
            for family, host in places:
                try:
                    sockets.append(_socket(family, host, sockets[0].getsockname()[1] if sockets else port))
                except OSError as error:
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                    absent = error  # a name may have addresses of other hosts too
            if sockets:
                return sockets
            raise absent or OSError(errno.EADDRNOTAVAIL, "the name has no address")
        except OSError as error:
            for sock in sockets:
                sock.close()
            if port or not sockets or error.errno != errno.EADDRINUSE or not left:
                raise
    raise AssertionError("the last attempt returns or raises")


def _socket(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    # SO_REUSEADDR but not SO_REUSEPORT: a restarted engine gets its port back, two engines never share one.
    both = host == "::" and socket.has_dualstack_ipv6()  # IPv4 too: `[::]` means every address
    return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
