"""A peer that has the key and misbehaves: its connection may end, the engine's work for others does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aiotransfer as at
from aiotransfer.control import frames
from aiotransfer.control.frames import PeerInfo
from aiotransfer.model.offer import ProviderOffer
from aiotransfer.providers.shm import messages

from .rawpeer import RawPeer

BIG = (1 << 64) - 1
DROPPED: dict[str, list[frames.Frame | bytes]] = {
    "a second handshake": [frames.Hello(1, 1, b"n" * 32, "file")],
    "a message beyond its credit": [frames.Message(bytes(1 << 20))] * 5,
    "more messages than its credit": [frames.Message(b"")] * 257,
    "garbage": [b"\xff" * 64],
    "a frame of 1 GiB": [(1 << 30).to_bytes(4, "little")],
    "nil": [b"\x01\x00\x00\x00\xc0"],
    "an unknown kind": [b"\x03\x00\x00\x00\x92\x7f\xc0"],
    "a body nested too deeply": [(100_000).to_bytes(4, "little") + b"\x91" * 100_000],
    "a goodbye": [frames.Goodbye("x" * 100_000)],
    "a merge": [frames.Merge()],
    "a group with a giant key": [frames.Join(bytes(1 << 19), 1, 1, (0, 0))],
    "a generation that nothing can follow": [frames.Join(bytes(16), 1, BIG, (0, 0))],
    "a rank out of this world": [frames.Join(bytes(16), BIG, 1, (0, 0))],
    "more groups than anybody makes": [frames.Join(n.to_bytes(16), 1, 1, (0, 0)) for n in range(1025)],
}
TOLERATED: dict[str, list[frames.Frame | bytes]] = {
    "up without a path": [frames.Up(), frames.Up()],
    "credit of all sizes": [frames.Credit(BIG, BIG), frames.Credit(-(1 << 62), -(1 << 62))],
    "answers nobody asked for": [frames.Found(9, b"zz"), frames.Answer(4, b""), frames.Pong(3), frames.Failed(1, "x", "y")],
    "questions to nobody": [frames.Ask(1, "carrier-pigeon", b"")],
    "questions that do not parse": [frames.Ask(n, name, b"\xff\xff") for n in range(3) for name in ("shm", "loopback")],
    "a flood of questions": [frames.Ask(n, "shm", b"\x90") for n in range(2000)],
    "a flood of lookups": [frames.Lookup(n, f"name {n}") for n in range(6000)],
    "one number for two lookups": [frames.Lookup(1, "a"), frames.Lookup(1, "b"), frames.LookupCancel(1), frames.LookupCancel(1)],
    "a giant name": [frames.Lookup(-1, "n" * (1 << 20))],
    "revocations of nothing": [frames.Revoked([0, -5, BIG], "x")],
    "half a million revocations": [frames.Revoked([1] * 500_000, "x" * 1000, [1] * 500_000)],
    "shm questions out of range": [
        frames.Ask(1, "shm", messages.encode(question))
        for question in (
            messages.Hello(b""), messages.Hello(bytes(1 << 19)), messages.Fetch(b"t" * 16, b"c" * 16, -1, 1, 1),
            messages.Fetch(b"t" * 16, b"c" * 16, 0, -1, 1), messages.Fetch(b"t" * 16, b"c" * 16, BIG, BIG, BIG),
        )
    ],
    "a loopback question that is none": [frames.Ask(1, "loopback", b"?")],
    "a giant provider": [frames.Ask(1, "p" * (1 << 20), b"")],
}


@pytest_asyncio.fixture
async def engine(caplog: pytest.LogCaptureFixture) -> AsyncIterator[at.Engine]:
    """It must go on serving, and have nothing to complain of."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    async with at.open_engine() as engine:
        yield engine
        async with at.open_engine() as friend:
            peer = await friend.connect(engine.address, timeout=10)
            await peer.ping(timeout=10)
        while engine.peers:
            await asyncio.sleep(0.001)
        assert not engine._connections.peers
        assert not engine._publications._wanted
    assert not complaints, complaints
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.asyncio
@pytest.mark.parametrize("what", DROPPED)
async def test_what_breaks_the_rules_ends_that_connection(engine: at.Engine, what: str) -> None:
    raw = await RawPeer.connect(engine)
    await raw.say(*DROPPED[what])
    assert await raw.hear(None) is None
    await raw.close()
    assert not engine._connections.peers


@pytest.mark.asyncio
@pytest.mark.parametrize("what", TOLERATED)
async def test_what_is_only_odd_changes_nothing(engine: at.Engine, what: str) -> None:
    raw = await RawPeer.connect(engine)
    await raw.say(*TOLERATED[what], frames.Ping(77))
    assert await raw.hear(frames.Pong) == frames.Pong(77)
    await raw.close()
    while engine._connections.peers:
        await asyncio.sleep(0.001)


@pytest.mark.asyncio
async def test_unanswered_lookups_of_one_peer_are_bounded(engine: at.Engine) -> None:
    raw = await RawPeer.connect(engine)
    await raw.say(*[frames.Lookup(n, "wanted by many") for n in range(5000)], frames.Ping(1))
    await raw.hear(frames.Pong)
    assert sum(isinstance(f, frames.Failed) for f in raw.received) == 5000 - 4096
    await raw.close()


@pytest.mark.asyncio
async def test_one_number_for_two_lookups_is_forgotten_with_both(engine: at.Engine) -> None:
    raw = await RawPeer.connect(engine)
    await raw.say(*[frames.Lookup(1, f"name {n}") for n in range(100)], frames.Ping(1))
    await raw.hear(frames.Pong)
    assert sum(len(wanted) for wanted in engine._publications._wanted.values()) <= 1, "counted by number, so held by number"
    await raw.close()
    while engine._connections.peers:
        await asyncio.sleep(0.001)


@pytest.mark.asyncio
@pytest.mark.parametrize("pid", [0, -5, 1, BIG])
@pytest.mark.parametrize("data", [b"", b"\xff" * 200, b"\0no such socket"])
async def test_what_a_peer_says_of_itself_is_not_believed(engine: at.Engine, pid: int, data: bytes) -> None:
    offers = [ProviderOffer(t.provider, True, "", t.host, data) for t in engine._offers()] * 3
    raw = await RawPeer.connect(engine, PeerInfo("n" * 3000, "\0nowhere:-1", pid, offers, (BIG, -1)))
    await raw.say(frames.Ask(1, "loopback", b""))
    assert isinstance(await raw.hear(frames.Failed), frames.Failed)
    await raw.close()


@pytest.mark.asyncio
async def test_an_impostor_with_the_engines_own_incarnation_is_not_taken_for_its_mirror(engine: at.Engine) -> None:
    impostor = await RawPeer.connect(engine, incarnation=engine.incarnation)
    peer = await engine.connect(engine.address, timeout=10)
    await peer.ping(timeout=10)
    await peer.aclose()
    await impostor.close()


numbers = st.one_of(st.integers(-(1 << 63), BIG), st.integers(-2, 9))
blobs = st.one_of(st.binary(max_size=80), st.sampled_from([b"\x90", b"\x92\x01\xc4\x00"]))
texts = st.sampled_from(["", "shm", "loopback", "name", "\0"])
any_frame = st.one_of(
    st.builds(frames.Lookup, numbers, texts),
    st.builds(frames.LookupCancel, numbers),
    st.builds(frames.Found, numbers, blobs),
    st.builds(frames.Failed, numbers, texts, texts),
    st.builds(frames.Ask, numbers, texts, blobs),
    st.builds(frames.Answer, numbers, blobs),
    st.builds(frames.Message, blobs),
    st.builds(frames.Credit, numbers, numbers),
    st.builds(frames.Ping, numbers),
    st.builds(frames.Pong, numbers),
    st.builds(frames.Revoked, st.lists(numbers, max_size=4), texts),
    st.builds(frames.Goodbye, texts),
    st.builds(frames.Up),
    st.builds(frames.Merge),
    blobs,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.lists(any_frame, max_size=12), min_size=1, max_size=4))
def test_any_conversation_leaves_the_engine_as_it_was(talks: list[list[frames.Frame | bytes]]) -> None:
    complaints: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        async with at.open_engine() as engine:
            raws = [await RawPeer.connect(engine) for _ in talks]
            await asyncio.gather(*[raw.say(*talk) for raw, talk in zip(raws, talks, strict=True)])
            async with at.open_engine() as friend:
                await (await friend.connect(engine.address, timeout=10)).ping(timeout=10)
            for raw in raws:
                await raw.close()
            for _ in range(2000):
                if not engine._connections.peers:
                    break
                await asyncio.sleep(0.001)
            assert not engine._connections.peers
            assert not engine._publications._wanted

    asyncio.run(main())
    assert not complaints, complaints
