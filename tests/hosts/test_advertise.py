"""Engines that others reach at another address than their own, as behind NAT or a Service: what comes in is passed on by a
forwarder, which also hides where it came from."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

import aiotransfer as at
from aiotransfer.testing import payload
from tests.needs import needs_tcp

pytestmark = needs_tcp()
INSIDE, OUTSIDE, HIDDEN = "127.0.0.1", "127.0.0.77", "127.0.0.78"  # where it is, where it is reached, whence that seems to come
KEY = b"a key that both sides have"
PORTS = 8
NBYTES = 3 << 20


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


class Forwarder:
    """Listens at OUTSIDE and goes on to the same port INSIDE, coming from HIDDEN."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.passed: dict[int, int] = {}

    async def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = writer.get_extra_info("sockname")[1]
        try:
            there = await asyncio.open_connection(INSIDE, port, local_addr=(HIDDEN, 0))
        except OSError:
            writer.close()
            return
        self.passed[port] = self.passed.get(port, 0) + 1
        await asyncio.gather(_pass_on(reader, there[1]), _pass_on(there[0], writer))


@contextlib.asynccontextmanager
async def forwarded(ports: list[int]) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder()
    servers = [await asyncio.start_server(forwarder.accepted, OUTSIDE, port) for port in ports]
    try:
        yield forwarder
    finally:
        for server in servers:
            server.close()
        await asyncio.sleep(0)


def free_range(count: int) -> int:
    """The first of so many ports that are free at the moment, below those that the system gives out by itself."""
    for first in range(20000, 32000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    for host in (INSIDE, OUTSIDE):
                        sock = stack.enter_context(socket.socket())
                        sock.bind((host, port))
            except OSError:
                continue
            return first
    raise AssertionError("no ports are free")


@pytest.mark.asyncio
@pytest.mark.parametrize("dials", ["inside", "outside"])
async def test_bytes_come_and_go_by_the_address_that_is_advertised(dials: str) -> None:
    first = free_range(PORTS)
    ports = list(range(first, first + PORTS))
    config = at.Config(data_ports=f"{first + 1}-{first + PORTS - 1}")
    async with (
        forwarded(ports) as forwarder,
        at.open_engine(
            listen=f"{INSIDE}:{first}", advertise=OUTSIDE, providers="tcp", key=KEY, timeout=30, config=config
        ) as inner,
        at.open_engine(providers="tcp", key=KEY, timeout=30) as outer,
    ):
        assert str(inner.address) == f"{OUTSIDE}:{first}"
        if dials == "outside":
            to_inner = await outer.connect(inner.address)
            to_outer = await anext(inner.arrivals())
        else:
            to_outer = await inner.connect(outer.address)
            to_inner = await anext(outer.arrivals())
        assert to_inner.address == inner.address
        for engine, peer, other in ((outer, to_inner, inner), (inner, to_outer, outer)):
            region, counter = other.allocate(NBYTES), other.counter(imm=7)
            other.publish("there", region)
            source = engine.register(payload(NBYTES))
            await engine.write(source, await peer.lookup("there"), imm=7)
            await counter.wait(1, timeout=30)
            assert bytes(region.numpy()) == bytes(payload(NBYTES))
        data = [port for port in forwarder.passed if port != first]
        assert data, "no data connection went by the advertised address"
        assert set(data) <= set(ports)


@pytest.mark.asyncio
async def test_when_no_port_of_the_range_is_left_the_error_says_so() -> None:
    first = free_range(1)
    config = at.Config(data_ports=str(first))
    async with (
        at.open_engine(providers="tcp", timeout=10, config=config) as narrow,
        at.open_engine(providers="tcp", timeout=10) as one,
        at.open_engine(providers="tcp", timeout=10) as two,
    ):
        await narrow.connect(one.address)
        with pytest.raises(at.ProviderUnavailableError, match="data_ports"):
            await narrow.connect(two.address)
        for peer in narrow.peers:
            await peer.aclose()
        await narrow.connect(two.address)


@pytest.mark.parametrize("ports", ["0", "7100-7000", "a-b", "7100-70000", "-5", "7100-"])
def test_ports_that_make_no_sense_are_refused(ports: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="data_ports"):
        at.Config(data_ports=ports)
    monkeypatch.setenv("AIOTRANSFER_DATA_PORTS", ports)
    with pytest.raises(at.ConfigurationError, match="data_ports"):
        at.open_engine()
