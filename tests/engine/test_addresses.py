"""Where engines listen, what they say of it, and how others find them: wildcards, advertised addresses, names with several."""

from __future__ import annotations

import asyncio
import socket
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer import config
from aiotransfer.control import network
from aiotransfer.model.address import Address
from aiotransfer.rendezvous import over_store
from aiotransfer.testing import payload

pytestmark = pytest.mark.asyncio
KEY = b"a key that both sides have"
ipv6 = pytest.mark.skipif(not socket.has_ipv6, reason="this system has no IPv6")


def names(monkeypatch: pytest.MonkeyPatch, **hosts: list[str]) -> None:
    """These names stand for these addresses. (Each event loop has a resolver of its own.)"""
    real = network._places

    async def places(loop: asyncio.AbstractEventLoop, address: Address) -> list[network.Place]:
        each = [Address(host, address.port) for host in hosts.get(address.host, [address.host])]
        return [place for one in each for place in await real(loop, one)]

    monkeypatch.setattr(network, "_places", places)


@contextmanager
def silent(host: str) -> Iterator[int]:
    """A port there at which connections begin and never come to anything: its queue is full."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as listener:
        listener.bind((host, 0))
        listener.listen(0)
        waiting = [socket.socket(family) for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname()[:2])
        yield listener.getsockname()[1]
        for one in waiting:
            one.close()


class Shelf(dict[str, bytes]):
    """A store."""

    def set(self, key: str, value: bytes) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", pytest.param("[::]:0", marks=ipv6)])
async def test_a_wildcard_is_never_dialled_listed_or_published(listen: str) -> None:
    async with at.open_engine(listen=listen, key=KEY) as engine:
        with pytest.raises(ValueError, match="advertise="):
            await engine.connect(engine.address)
        with pytest.raises(ValueError, match="advertise="):
            engine.group([engine.address, "127.0.0.1:7070"])
        with pytest.raises(at.ConfigurationError, match="no address that others could connect to"):
            await over_store(engine, Shelf(), 0, 1)  # type: ignore[arg-type]
        assert engine.peers == ()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", pytest.param("[::]:0", marks=ipv6), "localhost:0", "127.0.0.1:0"])
async def test_an_engine_knows_itself_by_each_of_its_addresses(listen: str) -> None:
    async with at.open_engine(listen=listen, key=KEY) as engine:
        port = engine.address.port
        with pytest.raises(ValueError, match="each member once"):
            engine.group([f"127.0.0.1:{port}", f"LOCALHOST:{port}"] if "localhost" not in listen else [f"localhost:{port}"] * 2)
        assert engine.group([f"10.255.0.1:{port}", f"LOCALHOST:{port}"]).rank == 1
        with pytest.raises(ValueError, match="not among the members"):
            engine.group([f"127.0.0.1:{port + 1 & 0xFFFF or 1}"])


async def test_a_member_that_listens_everywhere_is_found_by_its_own_address() -> None:
    async with at.open_engine(listen="0.0.0.0:0", key=KEY) as one, at.open_engine(key=KEY) as other:
        members = [f"127.0.0.1:{one.address.port}", other.address]
        await asyncio.gather(*(engine.group(members).barrier(timeout=20) for engine in (one, other)))


@ipv6
async def test_a_wildcard_of_ipv6_takes_ipv4_too() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this system does not let one socket take both")
    async with at.open_engine(listen="[::]:0", key=KEY) as engine, at.open_engine(key=KEY) as other:
        peer = await other.connect(f"127.0.0.1:{engine.address.port}", timeout=20)
        assert peer.remote_host == "127.0.0.1"
        await peer.ping(timeout=20)
        async for arrived in engine.arrivals():
            assert arrived.remote_host == "127.0.0.1"  # not ::ffff:127.0.0.1
            break


async def test_what_is_advertised_is_what_others_see(monkeypatch: pytest.MonkeyPatch) -> None:
    async with at.open_engine(advertise="127.0.0.2", key=KEY) as engine:  # the port is the real one
        assert engine.address.host == "127.0.0.2"
        assert engine.address.port > 0
    async with at.open_engine(listen="0.0.0.0:0", advertise="127.0.0.2", key=KEY) as one, at.open_engine(key=KEY) as other:
        peer = await one.connect(other.address, timeout=20)
        async for arrived in other.arrivals():
            assert arrived.address == one.address
            break
        assert one.group([one.address, other.address]).rank == 0
        await (await other.connect(one.address, timeout=20)).ping(timeout=20)
        await peer.ping(timeout=20)
    names(monkeypatch, **{"service.example": ["127.0.0.5"]})
    monkeypatch.setenv("AIOTRANSFER_ADVERTISE", "service.example:4711")
    async with at.open_engine(key=KEY) as engine:
        assert str(engine.address) == "service.example:4711"


async def test_a_name_that_only_others_know_may_be_advertised_and_is_warned_about() -> None:
    with pytest.warns(RuntimeWarning, match="advertise: outside.invalid has no address here"):
        engine = await at.open_engine(advertise="outside.invalid:4711", key=KEY)
    assert str(engine.address) == "outside.invalid:4711"
    await engine.aclose()


@pytest.mark.parametrize("advertise", ["0.0.0.0", "0.0.0.0:70", "a:b", "", 5])
async def test_an_address_that_cannot_be_advertised_is_refused(advertise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((ValueError, TypeError), match=r"address|advertise"):
        at.open_engine(advertise=advertise)
    if isinstance(advertise, str) and advertise:
        monkeypatch.setenv("AIOTRANSFER_ADVERTISE", advertise)
        with pytest.raises(at.ConfigurationError, match="AIOTRANSFER_ADVERTISE"):
            at.open_engine()


@pytest.mark.parametrize("dead", ["127.0.0.3", pytest.param("::1", marks=ipv6)])
async def test_of_a_name_with_several_addresses_one_that_is_silent_holds_nothing_up(
    dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with silent(dead) as port:
        names(monkeypatch, dual=[dead, "127.0.0.1"])
        async with at.open_engine(listen=f"127.0.0.1:{port}") as engine, at.open_engine() as other:
            peer = await other.connect(f"dual:{port}", timeout=20)
            assert peer.remote_host == "127.0.0.1"
            region = engine.allocate(64)
            engine.publish("there", region)
            await other.write(other.register(payload(64)), await peer.lookup("there"))
            assert bytes(region.numpy()) == bytes(payload(64))


async def test_of_a_name_with_several_addresses_one_with_another_service_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, dual=["127.0.0.3", "127.0.0.1"])

    async def other_service(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()

    async with at.open_engine() as engine, at.open_engine() as dialer:
        port = engine.address.port
        server = await asyncio.start_server(other_service, "127.0.0.3", port)
        async with server:
            assert (await dialer.connect(f"dual:{port}", timeout=20)).remote_host == "127.0.0.1"


async def test_the_error_names_each_address_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent("127.0.0.3") as port:
        names(monkeypatch, dual=["127.0.0.3", "127.0.0.1"])
        async with at.open_engine() as engine:
            with pytest.raises(at.TransferTimeout) as late:
                await engine.connect(f"dual:{port}", timeout=0.5)
    assert f"127.0.0.3:{port}: no answer" in str(late.value)
    assert f"127.0.0.1:{port}: " in str(late.value)


async def test_an_engine_listens_at_all_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, here=["127.0.0.4", "192.0.2.1", "127.0.0.1"])  # one of them is of another host
    async with at.open_engine(listen="here:0") as engine, at.open_engine() as other:
        for host in ("127.0.0.4", "127.0.0.1"):
            assert (await other.connect(f"{host}:{engine.address.port}", timeout=20)).incarnation == engine.incarnation


@pytest.mark.parametrize("name", ["\udcff-host", "n" * 256, "two\nlines", 7])
async def test_a_name_that_others_could_not_be_told_is_refused(name: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="name"):
        at.open_engine(name=name)


@pytest.mark.parametrize("name", ["n" * 255, "Rechner-7 ä 機械"])
async def test_a_name_within_the_bounds_arrives_whole(name: str) -> None:
    async with at.open_engine(name=name) as one, at.open_engine() as other:
        assert (await other.connect(one.address, timeout=20)).name == name


KUBERNETES = (
    "AIOTRANSFER_SERVICE_HOST", "AIOTRANSFER_SERVICE_PORT", "AIOTRANSFER_SERVICE_PORT_CONTROL", "AIOTRANSFER_PORT",
    "AIOTRANSFER_PORT_7070_TCP", "AIOTRANSFER_PORT_7070_TCP_PROTO", "AIOTRANSFER_PORT_7070_TCP_ADDR",
    "AIOTRANSFER_DECODE_SERVICE_HOST", "AIOTRANSFER_DECODE_PORT_80_UDP_PORT",
)  # fmt: skip


@pytest.mark.parametrize("variable", KUBERNETES)
async def test_variables_of_kubernetes_are_no_misspelt_settings(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "tcp://10.0.0.1:7070")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with at.open_engine() as engine:
            assert engine.address.port


async def test_a_warning_does_not_stop_an_engine_from_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setenv("AIOTRANSFER_PEER_TIMEOTU", "3")
    monkeypatch.setattr(config, "_warned", set())
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with at.open_engine() as engine:
            assert engine.address.port
    assert any("AIOTRANSFER_PEER_TIMEOUT" in text for text in shown)
