"""What anybody may throw at a control port: it is dropped, and the engine goes on serving those who have the key."""

from __future__ import annotations

import asyncio
import logging

import pytest

import aiotransfer as at
from aiotransfer.control import listener
from aiotransfer.control.frames import PREAMBLE
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
