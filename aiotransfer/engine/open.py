"""`open_engine`: the one way to get an engine, as a context manager or by await."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.config import Config
from aiotransfer.engine.engine import Engine
from aiotransfer.engine.world import REAL, World
from aiotransfer.providers import native

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.model.address import Address


class Opening:
    """What `open_engine` returns: `async with` it, or await it and call `aclose` yourself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __await__(self) -> Generator[Any, None, Engine]:
        return self._engine._open().__await__()

    async def __aenter__(self) -> Engine:
        return await self._engine._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._engine.aclose()


def open_engine(
    *,
    listen: str | Address = "127.0.0.1:0",
    advertise: str | Address | None = None,
    providers: str | Sequence[str] = "auto",
    rails: str | Sequence[str] | None = None,
    name: str | None = None,
    key: bytes | None = None,
    progress: str = "auto",
    timeout: float = 30.0,
    config: Config | None = None,
    _world: World = REAL,
) -> Opening:
    """An engine for the running event loop.

    `listen` is the control address (port 0: any); a name is listened on at all its addresses of this host, `[::]` takes IPv4
    too where the system allows. `advertise` ("host" or "host:port", or `AIOTRANSFER_ADVERTISE`) is the address under which others
    reach this engine, where that is another one: behind NAT or a Kubernetes Service, or with a wildcard in `listen`.
    `engine.address` says it, and tcp offers its data connections at that host too.

    `providers` is "auto", a name, or names in order of preference. `key` is a shared secret of at least 16 bytes (or
    `AIOTRANSFER_KEY`); without one only processes of the same user on this host are accepted. `rails` names the interfaces, RDMA
    devices or local addresses by which peers are reached, one or several; None: all that lead to the peer. `progress` says who
    makes copies too large for the submitting call: "auto", a native thread, the caller beginning; "thread", the thread alone and
    also of smaller ones; "loop", the event loop in its own turns (a blocked loop then delays its own large writes, never those of
    others). `name` (at most 255 printable characters; None: the process id) is what logs and errors of others call this engine.
    `timeout` (seconds) is the default deadline of transfers, connect, lookup and ping.

    Raises `ProviderUnavailableError` where there is no native extension or no provider, `ConfigurationError`, `TypeError` or
    `ValueError` for settings that make no sense, `BusyError` when this process has no descriptors or memory left.
    """
    native.require()
    return Opening(
        Engine(
            listen=listen,
            advertise=advertise,
            providers=providers,
            rails=rails,
            name=name,
            key=key,
            progress=progress,
            timeout=timeout,
            config=config,
            environ=os.environ,
            world=_world,
        )
    )
