"""Where control connections run: TCP, unless a test puts something else in its place."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Protocol

from aiotransfer.model.address import Address

BACKLOG = 256
Factory = Callable[[], asyncio.Protocol]


class Server(Protocol):
    """Something that listens."""

    def close(self) -> None:
        """Stop listening. Twice is silent."""
        ...


class Network(Protocol):
    """Byte streams between addresses."""

    async def listen(self, address: Address, factory: Factory) -> tuple[Server, Address]:
        """Accept streams; the address with its real port. Raises `OSError` or `OverflowError`."""
        ...

    async def connect(self, address: Address, factory: Factory) -> None:
        """Open one stream. Raises `OSError`."""
        ...

    async def further(self, address: Address, hosts: Iterable[str]) -> list[str]:
        """Which of these addresses of this host may be listened on beside that one."""
        ...


class Tcp:
    """TCP over the running event loop."""

    async def listen(self, address: Address, factory: Factory) -> tuple[Server, Address]:
        """See `Network`."""
        loop = asyncio.get_running_loop()
        family, place = await _place(loop, address)
        # SO_REUSEADDR but not SO_REUSEPORT: a restarted engine gets its port back, two engines never share one.
        sock = socket.create_server(place, family=family, backlog=BACKLOG)
        try:
            # asyncio accepts `backlog` times in a row, and with no descriptor left it fails, logs and sets a timer as often
            server = await loop.create_server(factory, sock=sock, backlog=1)
            sock.listen(BACKLOG)
        except BaseException:  # nobody else knows the socket
            sock.close()
            raise
        return server, Address(address.host, int(server.sockets[0].getsockname()[1]))

    async def connect(self, address: Address, factory: Factory) -> None:
        """See `Network`."""
        await asyncio.get_running_loop().create_connection(factory, address.host, address.port)


    async def further(self, address: Address, hosts: Iterable[str]) -> list[str]:
        """See `Network`. None beside a loopback address: who listens there means to be reached from this host alone."""
        first = ipaddress.ip_address((await _place(asyncio.get_running_loop(), address))[1][0])
        if first.is_loopback:
            return []
        others = {host: ipaddress.ip_address(host) for host in hosts}
        return [host for host, other in others.items() if other != first and not (other.is_loopback or other.is_link_local)]


async def _place(loop: asyncio.AbstractEventLoop, address: Address) -> tuple[socket.AddressFamily, tuple[str, int]]:
    host, port = address.host, address.port
    if ":" in host:
        return socket.AF_INET6, (host, port)
    try:
        socket.inet_pton(socket.AF_INET, host)
    except OSError:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return found[0][0], (str(found[0][4][0]), port)
    return socket.AF_INET, (host, port)
