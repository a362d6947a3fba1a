"""Ranks started by torchrun, or by anything that sets its variables."""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.errors import ConfigurationError, RendezvousError
from aiotransfer.model.address import Address
from aiotransfer.rendezvous.connect import from_list, meet
from aiotransfer.rendezvous.roster import Launch
from aiotransfer.rendezvous.store import FIRST_PAUSE, LONGEST_PAUSE, Caller, Store

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.sync.group import PeerGroup


async def from_environment(
    engine: Engine, *, name: str = "", timeout: float | None = None, environ: Mapping[str, str] | None = None
) -> PeerGroup:
    """The group of all ranks of this job, connected; `group.rank` is the rank of `engine`. `name`: of the
    group, where a job has several; `environ`: the variables (None: `os.environ`).

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and meets over torch's TCPStore there: the one of
    torchrun's agent, or, without an agent, one that rank 0 makes (shared with torch.distributed in the same
    process). A restart by torchrun gets keys of its own. Ends within `timeout` seconds (None: the engine's).

    Raises `ConfigurationError` for missing variables or a missing torch, else as `over_store` and
    `from_list`. """
    launch = Launch.parse(os.environ if environ is None else environ)
    make = _tcp_store()
    loop = asyncio.get_running_loop()
    timeout = seconds(timeout, engine.timeout)
    deadline = loop.time() + timeout
    if not launch.hosts_store:
        await _answers(launch, deadline, timeout)
    caller = Caller(make(launch), deadline, timeout)  # the port is open, or ours to open: this takes no time
    addresses = await meet(engine, caller, launch.rank, launch.size, launch.prefix)
    # `caller` holds the store, which on rank 0 serves the others, until the barrier says that all ranks have
    # read it.
    return await from_list(engine, addresses, name=name, timeout=max(caller.left, 0.001))


def listen_address(environ: Mapping[str, str] | None = None, *, towards: str | Address | None = None) -> str:
    """Where an engine of this rank should listen: `open_engine(listen=listen_address())`. `environ`: the
    variables (None: `os.environ`). `towards`: without a launcher, the address of an engine that this one will
    meet (None: the variables say).

    Loopback when all ranks are on this host (or the variables say nothing), else the address by which this
    host reaches MASTER_ADDR, or `towards`, on any free port. Looks a name up, which may block: call it before
    there is much of an event loop to block. Raises `ConfigurationError` when there is no way there. """
    if towards is not None:
        address = Address.parse(towards)
        return _route_to(address.host, address.port, str(address))
    environ = os.environ if environ is None else environ
    if not environ.get("MASTER_ADDR"):
        return "127.0.0.1:0"
    launch = Launch.parse(environ)
    if launch.one_host:
        return "127.0.0.1:0"
    return _route_to(launch.host, launch.port, f"MASTER_ADDR={launch.host}")


def _route_to(host: str, port: int, said: str) -> str:
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: the kernel only picks the route
            return str(Address(probe.getsockname()[0], 0))
    except OSError as error:
        raise ConfigurationError(
            f"no way from here to {said}: {error}", hint="open_engine(listen='ADDRESS:0') with this host's address"
        ) from error


def _tcp_store() -> Any:
    """A function that opens the store of a launch. Raises `ConfigurationError` without torch."""
    try:
        tcp_store = importlib.import_module("torch.distributed").TCPStore
    except (ImportError, AttributeError) as error:  # torch is also built without torch.distributed
        raise ConfigurationError(
            f"torch's TCPStore cannot be had: {error}",
            hint="install torch, or use rendezvous.over_store with another store, or rendezvous.from_list",
        ) from error

    def open_store(launch: Launch) -> Store:
        try:
            store: Store = tcp_store(
                launch.host, launch.port, launch.size, launch.hosts_store, timeout=timedelta(seconds=10),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except Exception as error:
            raise RendezvousError(
                f"no store at {launch.host}:{launch.port}: {str(error).partition(chr(10))[0]}",
                hint="is MASTER_PORT free on rank 0?",
            ) from error
        return store

    return open_store


async def _answers(launch: Launch, deadline: float, seconds: float) -> None:
    """Wait until the store listens there: torch would block, and log, for as long."""
    loop = asyncio.get_running_loop()
    pause, turn = FIRST_PAUSE, 0
    reason: BaseException = TimeoutError()
    while (left := deadline - loop.time()) > 0:
        try:
            async with asyncio.timeout(None if left == float("inf") else left):
                # Resolved here: uvloop logs the error of a name whose connection was given up while it was
                # looked up.
                found = await loop.getaddrinfo(launch.host, launch.port, type=socket.SOCK_STREAM)
                where = found[turn % len(found)][4]
                turn += 1
                _, writer = await asyncio.open_connection(str(where[0]), int(where[1]))
                writer.close()
                await writer.wait_closed()
                return
        except OSError as error:
            reason = error
        await asyncio.sleep(min(pause, max(deadline - loop.time(), 0)))
        pause = min(2 * pause, LONGEST_PAUSE)
    raise RendezvousError(
        f"rank 0 of {launch.size} did not open its store at {launch.host}:{launch.port} within {seconds:g} s"
        f" ({str(reason) or type(reason).__name__})",
        hint="did rank 0 start, and can this host reach it?",
    )
