"""What a peer with the key can make an engine hold, or wait for: all of it has a bound."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.control import frames, listener
from aiotransfer.control.frames import PREAMBLE, PeerInfo
from aiotransfer.control.handshake import Handshake
from aiotransfer.control.key import load_key
from aiotransfer.engine.peers import connections, inbox
from aiotransfer.engine.peers.connections import Connections
from aiotransfer.engine.peers.peer import MOST_PATHS
from aiotransfer.model.address import Address
from aiotransfer.model.descriptor import Grant, RemoteRegion
from aiotransfer.providers.shm import messages
from aiotransfer.testing import engine_pair

from .rawpeer import RawPeer
from .rawshm import RawShm
from .test_hostile_peers import engine as _engine

engine = _engine
TINY = PeerInfo("raw", "127.0.0.1:1", 1, [])


async def until(condition: Any, seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.asyncio
async def test_questions_that_wait_are_bounded_and_end_with_the_peer(
    engine: at.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, answer = [0], Connections.answer

    def counted(self: Connections, peer: at.Peer, *question: Any) -> None:
        answer(self, peer, *question)
        waiting.append(len(peer._answers))

    monkeypatch.setattr(connections, "MOST_QUESTIONS", 8)
    monkeypatch.setattr(Connections, "answer", counted)
    raw = await RawPeer.connect(engine)
    hellos = [frames.Ask(n, "shm", messages.encode(messages.Hello(n.to_bytes(16)))) for n in range(1000)]
    await raw.say(*hellos, frames.Ping(1))
    await raw.hear(frames.Pong)
    assert max(waiting) == 8, "more came in one packet than may wait"
    assert any(isinstance(f, frames.Failed) and "too many questions" in f.text for f in raw.received)
    await raw.close()
    await until(lambda: not engine._connections._tasks, 3)  # long before they would have timed out


@pytest.mark.asyncio
async def test_long_questions_are_bounded_by_their_bytes(engine: at.Engine) -> None:
    raw = await RawPeer.connect(engine)
    await raw.say(*[frames.Ask(n, "shm", bytes(1 << 20)) for n in range(8)], frames.Ping(1))
    await raw.hear(frames.Pong)
    assert not engine._connections.peers or next(iter(engine._connections.peers.values()))._answer_bytes <= 1 << 20
    await raw.close()


@pytest.mark.asyncio
async def test_who_reads_nothing_is_lost_and_nobody_elses_call_fails(engine: at.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = await RawShm.open(engine)
    region = engine.allocate(64)
    lease = region.lease(engine.peers[0])
    await deaf.raw.say(*[frames.Lookup(n, "wanted") for n in range(4000)])
    peer = engine.peers[0]
    await until(lambda: len(peer._lookups) == 4000)
    await deaf.raw.say(frames.Message(b"x"))
    await until(lambda: engine._inbox.unread)
    monkeypatch.setattr(peer._link, "_transport", _Full(peer._link._transport))
    engine.publish("wanted", region)
    await lease.revoke(timeout=5)
    async for message in engine.messages():
        assert message.data == b"x"
        break
    await peer.closed(timeout=5)
    with pytest.raises(at.PeerLostError, match="does not read"):
        await peer.ping(timeout=5)
    assert peer.state == "lost"
    engine.unpublish("wanted")
    await deaf.close()


class _Full:
    """A transport whose other side reads nothing."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def get_write_buffer_size(self) -> int:
        return 1 << 30

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@pytest.mark.asyncio
async def test_pings_without_reading_end_in_a_lost_peer_and_no_traceback(engine: at.Engine) -> None:
    raw = await RawPeer.connect(engine)
    ping = frames.encode(frames.Ping((1 << 64) - 1)) * 4096
    async with asyncio.timeout(60):
        while engine._connections.peers:
            if not raw._writer.is_closing():
                raw._writer.write(ping)
            await asyncio.sleep(0)
    await raw.close()


@pytest.mark.asyncio
async def test_impostors_with_our_own_incarnation_are_few_and_short_lived(
    engine: at.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "ACCEPT_SECONDS", 300)
    raws = [await RawPeer.connect(engine, incarnation=engine.incarnation) for _ in range(70)]
    await until(lambda: len(engine._connections._mirrors) >= 60)
    assert len(engine._connections._mirrors) <= connections.MOST_MIRRORS
    await raws[-1].say(*[frames.Message(bytes(100_000))] * 4)
    assert await raws[-1].hear(None) is None, "it said more than an engine says to itself before it is known"
    for raw in raws:
        await raw.close()
    await until(lambda: all(mirror.ended for mirror in engine._connections._mirrors.values()))
    monkeypatch.setattr(connections, "ACCEPT_SECONDS", 0.3)
    raw = await RawPeer.connect(engine, incarnation=engine.incarnation)
    assert await raw.hear(None) is None, "it may stay"
    await until(lambda: not engine._connections._mirrors)
    await raw.close()


@pytest.mark.asyncio
async def test_who_brings_no_path_up_is_dropped_in_time(engine: at.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "ACCEPT_SECONDS", 0.3)
    raw = await RawPeer.connect(engine)
    assert await raw.hear(None) is None
    await raw.close()


@pytest.mark.asyncio
async def test_unread_messages_of_peers_that_come_and_go_are_bounded(
    engine: at.Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inbox, "MOST_ORPHANED", 5 << 20)
    for n in range(8):
        raw = await RawPeer.connect(engine)
        await raw.say(*[frames.Message(bytes([n]) * (1 << 20))] * 3, frames.Ping(1))
        await raw.hear(frames.Pong)
        await raw.close()
        await until(lambda: not engine._connections.peers)
    held = [message.data[0] for message in engine._inbox.unread]
    assert held == [6, 7, 7, 7]
    assert "were dropped" in caplog.text
    caplog.clear()


@pytest.mark.asyncio
async def test_arrivals_that_nobody_looks_at_are_bounded_by_those_who_stay(
    engine: at.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_UNSEEN", 4)
    for _ in range(12):
        async with at.open_engine() as other:
            await other.connect(engine.address, timeout=10)
        await until(lambda: not engine.peers)
    assert engine._connections.arrivals.qsize() <= 5


@pytest.mark.asyncio
async def test_early_values_of_peers_that_come_and_go_share_one_bound() -> None:
    async with at.open_engine(config=at.Config(early_values=50), providers="shm") as engine:
        for n in range(10):
            async with at.open_engine(providers="shm") as other:
                peer = await other.connect(engine.address, timeout=10)
                for value in range(60):
                    await other.signal(peer, 1000 * n + value)
            await until(lambda: not engine.peers)
        held = engine.statistics()
        assert held.early_values == 50
        assert held.overflowed == 10 * 60 - 50
        assert engine.counter(imm=9000).value == 1, "those who went last are remembered"
        assert engine.counter(imm=1).value == 0
        assert engine.statistics().early_values == 49


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", ["shm", "loopback"])
async def test_a_flood_of_immediates_ends_the_connection_and_blinds_nobody(provider: str) -> None:
    async with engine_pair(provider=provider, config=at.Config(early_values=20)) as pair:
        for value in range(200):
            if pair.right_peer.state != "up":
                break
            try:
                await pair.left.signal(pair.right_peer, value)
            except at.TransferError:
                break
        pair.right.counter(imm=3)  # a look at what has arrived
        await until(lambda: pair.left_peer.state == "lost")
        held = pair.right.statistics()
        assert held.early_values == 19, "20, and one was opened"
        assert pair.right.counter(imm=100_000).value == 0, "others' values can still be counted"
        assert pair.right.counter(imm=3).value == 1


@pytest.mark.asyncio
async def test_a_forged_loopback_descriptor_opens_no_other_memory() -> None:
    """A peer that has an honest descriptor of ours changes the address in it."""
    async with engine_pair(provider="loopback") as pair:
        secret = np.zeros(64, np.uint8)
        honest = pair.right.allocate(64).descriptor._grant
        source = pair.left.register(np.full(64, 7, np.uint8))

        def forged(base: int, nbytes: int, epoch: int = honest.epoch) -> RemoteRegion:
            fields = (*honest.__struct_fields__,)
            values = {name: getattr(honest, name) for name in fields} | {"base": base, "nbytes": nbytes, "epoch": epoch}
            return RemoteRegion.of(Grant(**values))

        for region in (forged(secret.ctypes.data, 64), forged(honest.base, 1 << 40), forged(honest.base - 1, 64)):
            with pytest.raises(at.RegistrationError, match="never granted"):
                await pair.left.write(source, region[:64])
        with pytest.raises(at.TransferError):
            await pair.left.write(source, forged(honest.base, 64, honest.epoch + 1))
        await pair.left.write(source, forged(honest.base, 64))
        assert not secret.any()


@pytest.mark.asyncio
async def test_one_byte_a_second_gets_no_longer_than_anybody(engine: at.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.4)
    reader, writer = await asyncio.open_connection(engine.address.host, engine.address.port)
    hello = PREAMBLE + frames.encode(frames.Hello(1, 1, b"n" * 32, "file"))
    try:
        for byte in hello:
            if reader.at_eof() or writer.is_closing():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
        else:
            pytest.fail("it was listened to until the end")
    except ConnectionError:
        pass
    writer.close()


@pytest.mark.asyncio
async def test_one_stranger_at_random_makes_room(engine: at.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MOST_STRANGERS", 4)
    door = engine._connections._listener
    assert door is not None
    places, writers, order, before = set(), [], [], list[Any]()
    for _ in range(60):
        writers.append((await asyncio.open_connection(engine.address.host, engine.address.port))[1])
        await until(lambda: set(door._strangers) - set(order))
        here = list(door._strangers)
        assert len(here) <= 4
        places |= {before.index(link) for link in before if link not in here}
        order.append(here[-1])
        before = here
    assert places == {0, 1, 2, 3}, "neither always the oldest nor always the newest"
    for writer in writers:
        writer.close()


@pytest.mark.asyncio
async def test_who_has_shown_the_key_makes_room_for_no_stranger(engine: at.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MOST_STRANGERS", 1)
    handshake = Handshake("dialer", load_key(None, os.environ), 77, TINY, os.urandom(32))
    reader, writer = await asyncio.open_connection(engine.address.host, engine.address.port)
    while not handshake.established:
        writer.write(handshake.take_output())
        handshake.receive(await asyncio.wait_for(reader.read(1 << 16), 10))
    crowd = [(await asyncio.open_connection(engine.address.host, engine.address.port))[1] for _ in range(20)]
    await asyncio.sleep(0.1)
    writer.write(handshake.take_output() + frames.encode(frames.Ping(1)))  # its last word, after all of them
    heard: list[frames.Frame] = []
    while not heard:
        heard = handshake.receive(await asyncio.wait_for(reader.readexactly(1), 10))
    assert isinstance(heard[0], frames.Pong)
    for one in (writer, *crowd):
        one.close()


@pytest.mark.asyncio
async def test_slow_strangers_make_room_for_friends(engine: at.Engine) -> None:
    idle = [await asyncio.open_connection(engine.address.host, engine.address.port) for _ in range(200)]
    await asyncio.sleep(0.1)
    begun = asyncio.get_running_loop().time()
    async with at.open_engine() as friend:
        await friend.connect(engine.address, timeout=10)
    assert asyncio.get_running_loop().time() - begun < listener.HANDSHAKE_SECONDS / 2
    for _, writer in idle:
        writer.close()


async def recorded(engine: at.Engine) -> bytes:
    """All that an honest dialer says in a full handshake and after it."""
    said = b""
    info = PeerInfo("raw", "127.0.0.1:1", os.getpid(), engine._offers())
    handshake = Handshake("dialer", load_key(None, os.environ), 77, info, os.urandom(32))
    reader, writer = await asyncio.open_connection(engine.address.host, engine.address.port)
    while not handshake.established:
        said += (out := handshake.take_output())
        writer.write(out)
        handshake.receive(await asyncio.wait_for(reader.read(1 << 16), 10))
    said += (out := handshake.take_output() + frames.encode(frames.Ping(5)))
    writer.write(out)
    await reader.readexactly(1)
    writer.close()
    await until(lambda: not engine._connections.peers)
    return said


@pytest.mark.asyncio
async def test_a_handshake_that_was_recorded_opens_nothing(engine: at.Engine) -> None:
    tape = await recorded(engine)
    for pieces in (1, 7):
        reader, writer = await asyncio.open_connection(engine.address.host, engine.address.port)
        for i in range(pieces):
            if writer.is_closing():
                break
            writer.write(tape[len(tape) * i // pieces : len(tape) * (i + 1) // pieces])
            await asyncio.sleep(0.01)
        heard = b""
        try:
            while data := await asyncio.wait_for(reader.read(1 << 16), 10):
                heard += data
        except ConnectionError:
            pass
        assert b"raw" not in heard
        assert str(engine.address).encode() not in heard, "nothing about the engine before the proof"
        assert not engine._connections.peers
        writer.close()


class _Mirror(asyncio.Protocol):
    """Answers a dialer with its own bytes, or with its own proof in the acceptor's frame."""

    def __init__(self, echo: bool) -> None:
        self._echo = echo
        self._said = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        if self._echo:
            self._transport.write(data)
        elif not self._said:
            self._said = data
            self._transport.write(PREAMBLE + frames.encode(frames.Welcome(frames.VERSION, 0, b"n" * 32, "file")))
        else:
            self._transport.write(frames.encode(frames.Accepted(data[-32:], 5, TINY)))


@pytest.mark.asyncio
@pytest.mark.parametrize("echo", [True, False], ids=["its bytes", "its proof"])
async def test_a_dialer_is_not_taken_in_by_its_own_reflection(engine: at.Engine, echo: bool) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _Mirror(echo), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(at.RendezvousError):
        await engine.connect(Address("127.0.0.1", port), timeout=5)
    server.close()
    await server.wait_closed()


@pytest.mark.asyncio
async def test_words_of_a_peer_are_short_and_on_one_line(engine: at.Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shm = await RawShm.open(engine)
    peer = engine.peers[0]
    await shm.raw.say(frames.Goodbye("first\nsecond " + "x" * (1 << 19)))
    with pytest.raises(at.PeerLostError) as caught:
        await peer.ping(timeout=5)
        await peer.ping(timeout=5)
    assert len(str(caught.value)) < 2000
    assert "first\nsecond" not in str(caught.value)
    await shm.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", ["shm", "tcp"])
async def test_paths_of_one_peer_are_bounded(provider: str) -> None:
    async with at.open_engine() as engine, at.open_engine(providers=provider) as greedy:
        if provider not in engine._providers:
            pytest.skip("needs libfabric")
        peer = await greedy.connect(engine.address, timeout=10)
        offer = next(o for o in peer._link.info.offers if o.provider == provider)
        kept = []
        with pytest.raises(at.BrokenError, match="paths"):
            for _ in range(2 * MOST_PATHS):
                kept.append(await greedy._providers[provider].dial(peer, offer))
        assert len(kept) == MOST_PATHS - 1, "one was there before"
        assert peer.state == "up"
        async with at.open_engine() as friend:
            await (await friend.connect(engine.address, timeout=10)).ping()
        for path in kept:
            path.close()


@pytest.mark.asyncio
async def test_paths_that_are_being_set_up_count_too(engine: at.Engine) -> None:
    raw = await RawPeer.connect(engine)
    await raw.say(*[frames.Ask(n, "shm", messages.encode(messages.Hello(n.to_bytes(16)))) for n in range(3 * MOST_PATHS)])
    failures = [await raw.hear(frames.Failed) for _ in range(2 * MOST_PATHS)]
    assert all("paths" in failed.text for failed in failures if isinstance(failed, frames.Failed))
    await raw.close()
