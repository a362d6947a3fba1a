"""Peers: meeting, merging, names, messages, leaving."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair, payload

pytestmark = pytest.mark.asyncio


async def test_there_is_one_peer_per_incarnation_whoever_dials(pair: Pair) -> None:
    assert await pair.left.connect(pair.right.address) is pair.right_peer
    assert await pair.right.connect(str(pair.left.address)) is pair.left_peer
    assert pair.left.peers == (pair.right_peer,)
    assert pair.right_peer.state == "up"
    assert pair.right_peer.path.provider == "shm"
    assert pair.right_peer.incarnation == pair.right.incarnation


async def test_crossing_dials_end_in_one_peer_each() -> None:
    for _ in range(10):
        async with at.open_engine() as a, at.open_engine() as b:
            ab, ba = await asyncio.gather(a.connect(b.address, timeout=5), b.connect(a.address, timeout=5))
            assert a.peers == (ab,)
            assert b.peers == (ba,)
            region = b.allocate(64)
            await a.write(a.register(payload(64)), region.descriptor)
            assert np.array_equal(region.numpy(), payload(64))


async def test_many_connects_to_one_engine_share_the_peer() -> None:
    async with at.open_engine() as a, at.open_engine() as b:
        peers = await asyncio.gather(*[a.connect(b.address) for _ in range(10)])
        assert len(set(peers)) == 1


async def test_lookup_waits_for_the_name(pair: Pair) -> None:
    looking = asyncio.create_task(pair.left.connect(pair.right.address))
    peer = await looking
    lookup = asyncio.create_task(peer.lookup("later"))
    await asyncio.sleep(0.02)
    assert not lookup.done()
    region = pair.right.allocate(128)
    pair.right.publish("later", region)
    found = await asyncio.wait_for(lookup, 5)
    assert found.nbytes == 128


async def test_lookup_of_a_name_nobody_publishes_times_out(pair: Pair) -> None:
    with pytest.raises(at.TransferTimeout, match="'nothing'"):
        await pair.right_peer.lookup("nothing", timeout=0.05)
    await pair.right_peer.ping()  # behind the cancellation
    assert not pair.left_peer._lookups


async def test_messages_arrive_in_order(pair: Pair) -> None:
    count = 2000

    async def send() -> None:
        for i in range(count):
            await pair.right_peer.send(i.to_bytes(4, "little"))

    task = asyncio.create_task(send())
    seen = []
    async for message in pair.right.messages():
        assert message.peer is pair.left_peer
        seen.append(int.from_bytes(message.data, "little"))
        if len(seen) == count:
            break
    await task
    assert seen == list(range(count))


async def test_a_sender_waits_for_a_reader_and_the_control_connection_does_not(pair: Pair) -> None:
    async def flood() -> None:
        for _ in range(12):
            await pair.right_peer.send(bytes(1 << 20))

    task = asyncio.create_task(flood())
    await asyncio.sleep(0.2)
    assert not task.done()
    assert await pair.right_peer.ping(timeout=5) < 5
    n = 0
    async for message in pair.right.messages():
        n += len(message.data)
        if n == 12 << 20:
            break
    await asyncio.wait_for(task, 5)


async def test_a_message_too_long_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="1048576"):
        await pair.right_peer.send(bytes((1 << 20) + 1))
    with pytest.raises(TypeError):
        await pair.right_peer.send("text")  # type: ignore[arg-type]


async def test_a_goodbye_is_told_to_everything_that_waits(pair: Pair) -> None:
    lookup = asyncio.create_task(pair.right_peer.lookup("never"))
    closed = asyncio.create_task(pair.right_peer.closed())
    await asyncio.sleep(0)
    await pair.right.aclose()
    with pytest.raises(at.PeerLostError):
        await asyncio.wait_for(lookup, 5)
    await asyncio.wait_for(closed, 5)
    assert pair.right_peer.state == "closed"
    assert pair.left.peers == ()


async def test_an_old_descriptor_is_stale_after_a_restart() -> None:
    async with at.open_engine() as left:
        async with at.open_engine() as right:
            address = right.address
            await left.connect(address)
            dst = right.allocate(64).descriptor
            await left.write(left.allocate(64), dst)
        async with at.open_engine(listen=address):
            peer = await left.connect(address, timeout=5)
            with pytest.raises(at.StaleRegionError, match="restarted"):
                left.write(left.allocate(64), dst)
            assert peer.state == "up"


async def test_connect_retries_until_the_engine_is_up() -> None:
    async with at.open_engine() as probe:
        address = probe.address
    async with at.open_engine() as left:
        connecting = asyncio.create_task(left.connect(address, timeout=5))
        await asyncio.sleep(0.1)
        async with at.open_engine(listen=address):
            assert (await connecting).state == "up"


async def test_connect_to_nobody_says_so_in_time() -> None:
    async with at.open_engine() as probe:
        address = probe.address
    async with at.open_engine() as left:
        with pytest.raises(at.TransferTimeout, match=r"refused|Connect"):
            await left.connect(address, timeout=0.2)


async def test_different_keys_are_refused_on_both_sides() -> None:
    async with at.open_engine(key=b"a" * 32) as a, at.open_engine(key=b"b" * 32) as b:
        with pytest.raises(at.RendezvousError, match="different keys"):
            await a.connect(b.address, timeout=5)
    async with at.open_engine(key=b"a" * 32) as a, at.open_engine() as b:
        with pytest.raises(at.RendezvousError, match="key"):
            await a.connect(b.address, timeout=5)
        assert a.peers == b.peers == ()


async def test_the_same_key_connects() -> None:
    async with engine_pair(key=b"k" * 16) as pair:
        assert pair.right_peer.state == "up"


async def test_arrivals_and_messages_end_when_the_engine_closes() -> None:
    engine = await at.open_engine()

    async def drain() -> list[at.Peer]:
        return [peer async for peer in engine.arrivals()]

    async def read() -> list[at.Message]:
        return [message async for message in engine.messages()]

    tasks = [asyncio.create_task(drain()), asyncio.create_task(read())]
    await asyncio.sleep(0.01)
    await engine.aclose()
    assert await asyncio.wait_for(asyncio.gather(*tasks), 5) == [[], []]


async def test_both_forms_of_opening_and_a_repr() -> None:
    engine = await at.open_engine(name="solo")
    assert "solo" in repr(engine)
    assert "<table>" in engine._repr_html_()
    assert str(engine.address).startswith("127.0.0.1:")
    await engine.aclose()
    assert "closed" in repr(engine)
    async with at.open_engine() as other:
        assert other.statistics().peers == 0


async def test_a_component_reads_its_own_messages_and_leaves_the_application_its(pair: Pair) -> None:
    await pair.right_peer.send(b"kv 1")
    await pair.right_peer.send(b"mine")
    await pair.right_peer.ping(timeout=10)
    component = pair.right.messages(b"kv")
    assert (await anext(component)).data == b"kv 1"  # it came before anybody read by the prefix
    await pair.right_peer.send(b"kv 2")
    await pair.right_peer.send(b"kv 3")
    application = pair.right.messages()
    assert (await anext(application)).data == b"mine"
    assert (await anext(component)).data == b"kv 2"
    await component.aclose()  # type: ignore[attr-defined]
    assert (await anext(application)).data == b"kv 3", "what a reader leaves is the application's"
    await application.aclose()  # type: ignore[attr-defined]


async def test_messages_of_our_components_never_reach_the_application_and_do_not_use_up_its_credit(pair: Pair) -> None:
    for i in range(1500):
        await pair.right_peer.send(b"\x93ATp" + i.to_bytes(4, "little"))
    await pair.right_peer.send(b"mine")
    async for message in pair.right.messages():
        assert message.data == b"mine"
        break
    component = pair.right.messages(b"\x93ATp")
    assert (await anext(component)).data[4:] == (1500 - 64).to_bytes(4, "little"), "the latest are kept"
    await component.aclose()  # type: ignore[attr-defined]
