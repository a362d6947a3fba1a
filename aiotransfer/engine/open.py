"""`open_engine`: the one way to get an engine, as a context manager or by await."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from aiotransfer.config import Config
from aiotransfer.engine.engine import Engine
from aiotransfer.engine.runtime.platform import REAL, Platform
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.providers import native
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.model.address import Address


OPEN = "write `async with open_engine(...) as engine:` or `engine = await open_engine(...)`"


class Opening(Unpicklable):
    """What `open_engine` returns: `async with` it, or await it and call `aclose` yourself."""

    _instead = "open an engine in the other process"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._awaited = False

    def __await__(self) -> Generator[Any, None, Engine]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Engine:
        self._awaited = True
        _need_asyncio()
        return await self._engine._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._engine.aclose()

    def __enter__(self) -> NoReturn:
        raise TypeError(f"an engine is opened by `async with`, not by `with`: {OPEN}")

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> NoReturn:
        kind = type(self).__name__
        if name.startswith("__"):
            raise AttributeError(f"{kind!r} object has no attribute {quote(name)}", name=name, obj=self)
        self._awaited = True  # said here, and not once more at the end
        raise AttributeError(f"open_engine() was not awaited, so there is no {quote(name)} yet: {OPEN}", name=name, obj=self)

    def __repr__(self) -> str:
        return "<open_engine(), not awaited yet>" if not self._awaited else "<open_engine()>"

    def __del__(self) -> None:
        if not self.__dict__.get("_awaited", True):
            warnings.warn(f"open_engine() was never awaited: {OPEN}", RuntimeWarning, stacklevel=2, source=self)


def _need_asyncio() -> None:
    """Raise `RuntimeError` under another library than asyncio."""
    known = "trio" in sys.modules
    try:
        other = asyncio.current_task() is None and known  # a task of trio, which is a guest of asyncio's loop
    except RuntimeError:
        other = True
    if other:
        library = "trio or another library" if known else "another library"
        raise RuntimeError(
            f"an engine needs asyncio, and this coroutine is run by {library}: use asyncio.run, uvloop or anyio with its backend "
            "asyncio; or aiotransfer.run_in_thread(), whose engine has an event loop of its own"
        )


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
    _platform: Platform = REAL,
) -> Opening:
    """An engine for the running event loop.

    `listen` is the control address (port 0: any); a name is listened on at all its addresses of this host,
    `[::]` takes IPv4 too where the system allows. `advertise` ("host" or "host:port", or
    `AIOTRANSFER_ADVERTISE`) is the address under which others reach this engine, where that differs from
    `listen`: behind NAT or a Kubernetes Service, or with a wildcard in `listen`. Then `engine.address` is
    this address, and tcp offers its data connections at that host too.

    `providers` is "auto", a name, or names in order of preference. `key` is a shared secret of at least 16
    bytes (or `AIOTRANSFER_KEY`); without one only processes of the same user on this host are accepted.
    `rails` names the interfaces, RDMA devices or local addresses by which peers are reached, one or several;
    None: all that lead to the peer. `progress` says who makes copies too large for the submitting call:
    "auto", a native thread, the caller beginning; "thread", the thread alone and also of smaller ones;
    "loop", the event loop in its own turns (a blocked loop then delays its own large writes, never those of
    others). `name` (at most 255 printable characters; None: the process id) is what logs and errors of others
    call this engine. `timeout` (seconds) is the default deadline of transfers, connect, lookup and ping.
    `config` has limits and times (None: the defaults of `Config`); a variable `AIOTRANSFER_<FIELD>` of the
    environment overrides its field. `_platform` is for tests: a simulated network, randomness and machine in
    the place of the real ones.

    Opening raises `RuntimeError` where no asyncio loop runs the caller (trio). Await the result or enter it
    by `async with`: before that its attributes raise an `AttributeError` that says so, and dropping it unused
    warns.

    Raises `ProviderUnavailableError` where there is no native extension or no provider, `ConfigurationError`,
    `TypeError` or `ValueError` for settings that make no sense, `BusyError` when this process has no
    descriptors or memory left.
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
            platform=_platform,
        )
    )
