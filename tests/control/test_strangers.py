"""What anybody may throw at a control port: it is dropped, and the engine goes on serving those who have the key."""

from __future__ import annotations

import asyncio
import logging

import pytest

import aiotransfer as at
from aiotransfer.control import dialer, listener
from aiotransfer.control.dialer import dial
from aiotransfer.control.frames import PREAMBLE
from aiotransfer.control.network import Factory, Tcp
from tests.turns import give_up


async def say(address: at.Address, data: bytes) -> bytes:
    """Send it, return what comes until the engine hangs up."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(1 << 16), 10)
    except ConnectionError:
        return b""
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


async def still_serves(engine: at.Engine) -> None:
    async with at.open_engine() as friend:
        peer = await friend.connect(engine.address, timeout=10)
        await peer.ping()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        PREAMBLE + (1 << 30).to_bytes(4, "little"),
        PREAMBLE + b"\x05\x00\x00\x00\xff\xff\xff\xff\xff",
        PREAMBLE + b"\x01\x00\x00\x00\xc0",
        b"\x00" * 4096,
    ],
    ids=["http", "tls", "1 GiB frame", "no msgpack", "nil", "zeros"],
)
async def test_a_stranger_is_dropped_at_once(data: bytes) -> None:
    async with at.open_engine() as engine:
        await say(engine.address, data)
        assert engine.peers == ()
        await still_serves(engine)


@pytest.mark.asyncio
async def test_a_silent_stranger_is_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.2)
    async with at.open_engine() as engine:
        await say(engine.address, PREAMBLE[:5])  # returns when the engine hangs up


@pytest.mark.asyncio
async def test_many_strangers_cannot_shut_friends_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.3)
    async with at.open_engine() as engine:
        idle = [await asyncio.open_connection(engine.address.host, engine.address.port) for _ in range(100)]
        await still_serves(engine)
        for _, writer in idle:
            writer.close()


@pytest.mark.asyncio
async def test_a_wrong_key_is_an_error_with_a_hint_on_the_dialing_side(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with at.open_engine(key=b"one secret of many") as engine, at.open_engine(key=b"another secret!!") as stranger:
        with pytest.raises(at.RendezvousError) as caught:
            await stranger.connect(engine.address, timeout=5)
        assert caught.value.hint
        assert engine.peers == stranger.peers == ()
    assert not caplog.records


@pytest.mark.asyncio
async def test_a_dial_that_is_cancelled_leaves_nothing() -> None:
    async with at.open_engine() as engine, at.open_engine() as other:
        for turns in range(12):
            await give_up(asyncio.create_task(engine.connect(other.address, timeout=5)), turns)
        peer = await engine.connect(other.address, timeout=5)
        await peer.ping()
        assert engine.peers == (peer,)


class _Deaf(Tcp):
    """A network that drops the first packets of a few connections."""

    def __init__(self, dropped: int) -> None:
        self.dropped = dropped
        self.tried = 0

    async def connect(self, address: at.Address, factory: Factory) -> None:
        self.tried += 1
        if self.tried <= self.dropped:
            await asyncio.sleep(3600)
        await super().connect(address, factory)


@pytest.mark.asyncio
async def test_an_address_that_does_not_answer_is_tried_again_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialer, "STAGGER", 0.01)
    loop = asyncio.get_running_loop()
    async with at.open_engine() as engine, at.open_engine() as other:
        network = _Deaf(3)
        link = await dial(other.address, engine._key, engine._identity, network, deadline=loop.time() + 20)
        assert network.tried == 4
        link.close()
        deaf = _Deaf(1000)
        with pytest.raises(at.TransferTimeout, match="no answer"):
            await dial(other.address, engine._key, engine._identity, deaf, deadline=loop.time() + 0.5)
        assert deaf.tried == dialer.MOST_AT_ONCE, "and no more of them at a time"
