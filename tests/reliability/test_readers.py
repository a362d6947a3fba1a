"""Each reader of what others send goes on after an exception that nobody foresaw, in the middle of one message."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.control import frames
from aiotransfer.control.handshake import Handshake
from aiotransfer.engine.peers.inbox import Inbox
from aiotransfer.engine.peers.peer import Peer
from aiotransfer.errors import RendezvousError
from aiotransfer.kv.registry import FileBackend, Fleet, Member, MemoryBackend, Registry
from aiotransfer.kv.registry import fleet as fleets
from aiotransfer.providers.shm import fd_listener
from aiotransfer.providers.shm import messages as shm_messages
from aiotransfer.rendezvous import roster
from tests.control.rawpeer import RawPeer
from tests.kv.registry.members import member

pytestmark = pytest.mark.asyncio
Breaks = Callable[[Any, str, Callable[..., bool]], None]


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Breaks:
    """Have a function raise what it never does, for the arguments that are chosen."""

    def arrange(owner: Any, name: str, chosen: Callable[..., bool]) -> None:
        whole = getattr(owner, name)

        def broken(*arguments: Any, **options: Any) -> Any:
            if chosen(*arguments):
                raise KeyError("nobody foresaw this")
            return whole(*arguments, **options)

        monkeypatch.setattr(owner, name, broken)

    return arrange


@asynccontextmanager
async def _served() -> AsyncIterator[at.Engine]:
    """An engine that a friend is connected to all the time."""
    async with at.open_engine() as engine, at.open_engine() as friend:
        peer = await friend.connect(engine.address, timeout=10)
        yield engine
        await peer.ping(timeout=10)
        async with at.open_engine() as another:
            assert (await another.connect(engine.address, timeout=10)).path.provider == "shm"


async def test_a_frame_ends_its_connection_alone(breaks: Breaks) -> None:
    breaks(Peer, "_receive", lambda peer, frame: isinstance(frame, frames.Lookup))
    async with _served() as engine:
        raw = await RawPeer.connect(engine)
        await raw.say(frames.Lookup(1, "x"))
        assert await raw.hear(None) is None
        await raw.close()


async def test_a_greeting_ends_its_connection_alone(breaks: Breaks) -> None:
    breaks(Handshake, "_greet", lambda handshake, frame: isinstance(frame, frames.Hello) and frame.nonce == b"13" * 16)
    async with _served() as engine:
        reader, writer = await asyncio.open_connection(engine.address.host, engine.address.port)
        writer.write(frames.PREAMBLE + frames.encode(frames.Hello(frames.VERSION, 0, b"13" * 16, "file")))
        while await reader.read(1 << 16):
            pass
        writer.close()


async def test_a_question_is_answered_all_the_same(breaks: Breaks, caplog: pytest.LogCaptureFixture) -> None:
    breaks(shm_messages, "question", lambda body: b"x" * 16 in body)
    async with _served() as engine:
        raw = await RawPeer.connect(engine)
        await raw.say(frames.Ask(1, "shm", shm_messages.encode(shm_messages.Hello(b"x" * 16))), frames.Ping(2))
        assert isinstance(await raw.hear(frames.Failed), frames.Failed)
        assert isinstance(await raw.hear(frames.Pong), frames.Pong)
        await raw.close()
    assert "could not be answered" in caplog.text


async def test_a_packet_of_the_descriptor_socket_ends_its_connection_alone(breaks: Breaks) -> None:
    breaks(fd_listener, "parse", lambda data, flags: data == b"y" * 16)
    async with _served() as engine:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(next(t.data for t in engine._offers() if t.provider == "shm"))
        sock.send(b"y" * 16)
        sock.setblocking(False)
        try:
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1), 10) == b""
        except ConnectionResetError:
            pass
        sock.close()


async def test_a_message_that_cannot_be_put_into_the_mailbox_ends_its_connection_alone(breaks: Breaks) -> None:
    """Those who read messages go on, and hear the others."""
    breaks(Inbox, "put", lambda inbox, message: message.data == b"bad")
    async with _served() as engine, at.open_engine() as bad, at.open_engine() as good:
        messages = engine.messages()
        ends, goes_on = await bad.connect(engine.address, timeout=10), await good.connect(engine.address, timeout=10)
        for i in range(3):
            await goes_on.send(b"good %d" % i)
            if i == 1:
                await ends.send(b"bad")
                await asyncio.wait_for(ends.closed(), 10)
        async with asyncio.timeout(10):
            assert [(await anext(messages)).data for _ in range(3)] == [b"good 0", b"good 1", b"good 2"]
        assert goes_on.state == "up"
        await messages.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [MemoryBackend, FileBackend])
async def test_an_entry_of_the_registry_hides_no_other(breaks: Breaks, kind: Any, tmp_path: Path) -> None:
    breaks(Member, "decode", lambda data: b"bad" in data)
    backend = kind(tmp_path) if kind is FileBackend else kind()
    bad, good = member("bad"), member("good")
    await backend.put(bad.key, bad.encode(), 60)
    async with Registry(backend, poll=0.02) as registry:
        await asyncio.sleep(0.05)
        await backend.put(good.key, good.encode(), 60)
        assert await registry.wait_for(None, 1, timeout=10) == (good,)
        assert registry.error is None


async def test_a_member_that_cannot_be_dialled_hides_no_other(breaks: Breaks, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = []

    async def connect(engine: at.Engine, who: Member, *, timeout: float) -> Peer:
        dialled.append(who.name)
        if who.name == "bad":
            raise KeyError("nobody foresaw this")
        return await engine.connect(who.address, timeout=timeout)

    monkeypatch.setattr(fleets, "connect", connect)
    monkeypatch.setattr(fleets, "FIRST_PAUSE", 0.01)
    backend = MemoryBackend()
    async with at.open_engine() as engine, at.open_engine() as other:
        bad = member("bad")
        good = member("good", address=str(other.address), incarnation=other.incarnation)
        await backend.put(bad.key, bad.encode(), 60)
        async with Registry(backend, poll=0.02) as registry, Fleet(registry, engine, "prefill") as fleet:
            async with asyncio.timeout(10):
                while dialled.count("bad") < 2:
                    await asyncio.sleep(0.01)
            await backend.put(good.key, good.encode(), 60)
            assert set(await fleet.wait_for(1, timeout=10)) == {good}


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'[1, 1, 2, 5, 6, "x"]', b"[1" + b" " * 5000 + b"]", b"nothing"],
    ids=["nested", "no text", "long", "no json"],
)  # fmt: skip
async def test_an_entry_in_the_store_is_refused_with_its_rank(data: bytes) -> None:
    own = roster.Entry(0, 2, "127.0.0.1:1", 5, "here")
    with pytest.raises(RendezvousError, match="rank 1"):
        roster.addresses(own, [own.encode(), data])
