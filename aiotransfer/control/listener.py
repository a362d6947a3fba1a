"""Accepting control connections.

Strangers cost little: at most 128 unauthenticated connections at a time, five seconds each, a few KiB of
input. When there are more, one of them at random makes room for the newcomer: friends and strangers may come
from one address (loopback, NAT). If it were always the oldest, the newest or the slowest, strangers could
arrange that this is the friend. So a friend gets in after a few attempts, even if strangers keep coming. What
goes wrong with them is logged at most once a second and never leaves this module.

An engine that is reached by several NICs listens on an address of each, so that peers find another way when
one dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.control.frames import MOST_FURTHER
from aiotransfer.control.key import Key
from aiotransfer.control.link import Identity, Link
from aiotransfer.control.network import Network, Server
from aiotransfer.errors import ConfigurationError, shortage
from aiotransfer.model.address import Address

MOST_STRANGERS = 128
HANDSHAKE_SECONDS = 5.0
_logger = logging.getLogger("aiotransfer")


class Listener:
    """A control port. `on_link` gets every authenticated link, not yet started."""

    def __init__(
        self, address: Address, key: Key, identity: Identity, network: Network, on_link: Callable[[Link], None]
    ) -> None:
        self.address = address
        self._key = key
        self._identity = identity
        self._network = network
        self._on_link = on_link
        self._servers: list[Server] = []
        self._strangers: dict[Link, asyncio.TimerHandle] = {}
        self._limit = RateLimit(most=1)

    async def start(self) -> None:
        """Listen. Raises `ConfigurationError` when the address cannot be bound, `BusyError` when no
        descriptor is free."""
        self.address = await self._listen(self.address)

    async def start_further(self, hosts: Iterable[str]) -> list[Address]:
        """Listen on these hosts too, on any port. Returns the addresses. Raises `BusyError`. The port that
        was asked for may be wanted there by another process, an engine for each NIC, say."""
        found: list[Address] = []
        try:
            others = await self._network.further(self.address, hosts)
        except OSError as error:
            raise shortage(error.errno, "cannot look at this host's addresses") or error from None
        for host in others:
            if len(found) == MOST_FURTHER:
                break
            if self.address.is_wildcard and (":" not in host or self.address.host == "::"):  # which is all of them
                found.append(Address(host, self.address.port))
                continue
            try:
                found.append(await self._listen(Address(host, 0)))
            except ConfigurationError:  # the address has gone
                continue
        return found

    async def _listen(self, address: Address) -> Address:
        try:
            server, there = await self._network.listen(address, self._connected)
        except (OSError, OverflowError) as error:
            what = f"cannot listen on {address}"
            raise shortage(getattr(error, "errno", None), what) or ConfigurationError(
                f"{what}: {error}", hint="choose another port (0: any) or address"
            ) from error
        self._servers.append(server)
        return there

    def _connected(self) -> Link:
        link = Link("acceptor", self._key, self._identity)
        if len(self._strangers) >= MOST_STRANGERS:
            self._make_room()
        timer = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self._late, link)
        self._strangers[link] = timer
        link.established.add_done_callback(lambda future: self._known(link, future))
        return link

    def _make_room(self) -> None:
        strangers = [link for link in self._strangers if not link.proven]  # others have all but told who they are
        if strangers:
            one = strangers[int(self._identity.chance() * len(strangers))]
            self._strangers.pop(one).cancel()
            one.abort()

    def _late(self, link: Link) -> None:
        self._log(link, f"no handshake within {HANDSHAKE_SECONDS:g} s")
        link.abort()

    def _known(self, link: Link, future: asyncio.Future[None]) -> None:
        timer = self._strangers.pop(link, None)
        if timer is not None:
            timer.cancel()
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self._log(link, str(error).partition("\n")[0])
        elif not self._servers:
            link.abort()
        else:
            self._on_link(link)

    def _log(self, link: Link, text: str) -> None:
        left_out = self._limit.admit("refused")
        if left_out is not None:
            _logger.warning("a connection from %s was refused: %s%s", link.remote_address, text, more(left_out))

    async def close(self) -> None:
        """Stop listening and drop strangers, and let the loop see to it. Twice is silent."""
        self.stop()
        await asyncio.sleep(0)

    def stop(self) -> None:
        """Stop listening and drop strangers. Twice is silent."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        for link in list(self._strangers):
            link.abort()

    def abandon(self) -> None:
        """The loop is closed: sockets are closed without it."""
        servers, self._servers = self._servers, []
        for server in servers:
            with contextlib.suppress(RuntimeError):  # uvloop's: it has closed them itself
                server.close()
        for link in list(self._strangers):
            link.abandon()
