"""Many ways to meet: oneself, twice at once, beside an attempt that is given up, with other settings than the other side's."""

from __future__ import annotations

import asyncio

import pytest

import aiotransfer as at
from aiotransfer.testing import payload
from tests.turns import give_up

pytestmark = pytest.mark.asyncio


async def test_an_engine_may_meet_itself_many_times_at_once() -> None:
    async with at.open_engine() as engine:
        peers = await asyncio.gather(*[engine.connect(engine.address, timeout=10) for _ in range(8)])
        assert len(set(peers)) == 1
        assert engine.peers == (peers[0],)
        region = engine.allocate(64)
        await engine.write(engine.register(payload(64)), region.descriptor)
        assert bytes(region.numpy()) == bytes(payload(64))


async def test_an_engine_meets_itself_again_after_it_left() -> None:
    async with at.open_engine() as engine:
        for _ in range(3):
            first = await engine.connect(engine.address, timeout=10)
            assert await engine.connect(engine.address, timeout=10) is first
            await first.ping(timeout=10)
            await first.aclose()
            assert engine.peers == ()
        second = await engine.connect(engine.address, timeout=10)
        await second.send(b"to myself")
        async for message in engine.messages():
            assert (message.peer, message.data) == (second, b"to myself")
            break


@pytest.mark.parametrize("step", [1, 3])
async def test_an_engine_meets_itself_after_attempts_that_were_given_up(step: int) -> None:
    async with at.open_engine() as engine:
        for turns in range(0, 30, step):
            await give_up(asyncio.create_task(engine.connect(engine.address, timeout=10)), turns)
        peer = await engine.connect(engine.address, timeout=10)
        await peer.ping(timeout=10)
        assert engine.peers == (peer,)


@pytest.mark.parametrize("turns", range(0, 30, 2))
async def test_whoever_gives_up_does_not_take_others_along(turns: int) -> None:
    async with at.open_engine() as engine, at.open_engine() as other:
        first = asyncio.create_task(engine.connect(other.address, timeout=10))
        second = asyncio.create_task(engine.connect(other.address, timeout=10))
        await give_up(first, turns)
        peer = await second
        await peer.ping(timeout=10)
        assert engine.peers == (peer,)


@pytest.mark.parametrize("turns", range(0, 30, 3))
async def test_crossing_dials_of_which_some_are_given_up(turns: int) -> None:
    async with at.open_engine() as a, at.open_engine() as b:
        tasks = [asyncio.create_task(x.connect(y.address, timeout=10)) for x, y in ((a, b), (b, a)) * 3]
        await give_up(tasks[0], turns)
        await give_up(tasks[1], 1)
        peers = await asyncio.gather(*tasks[2:])
        assert {peers[0], peers[2]} == set(a.peers)
        assert {peers[1], peers[3]} == set(b.peers)
        await asyncio.gather(a.peers[0].ping(timeout=10), b.peers[0].ping(timeout=10))


async def test_a_short_deadline_of_one_is_not_that_of_another() -> None:
    async with at.open_engine() as engine, at.open_engine() as other:
        results = await asyncio.gather(
            *[engine.connect(other.address, timeout=t) for t in (0.0005, 10, 0.001, 10)], return_exceptions=True
        )
        assert isinstance(results[1], at.Peer)
        assert results[1] is results[3]
        assert all(isinstance(r, (at.Peer, at.TransferTimeout)) for r in results)


async def test_a_sender_keeps_to_the_window_of_the_other_side() -> None:
    small = at.Config(message_window_count=3, message_window_bytes=1 << 20)
    async with at.open_engine() as left, at.open_engine(config=small) as right:
        there = await left.connect(right.address, timeout=10)
        sends = [asyncio.create_task(there.send(bytes([i]))) for i in range(40)]
        back = [asyncio.create_task(peer.send(bytes([i]))) for peer in right.peers for i in range(40)]
        await asyncio.sleep(0.05)
        assert sum(task.done() for task in sends) == 3
        assert all(task.done() for task in back), "and the other way it is the other window"
        seen = []
        async for message in right.messages():
            seen.append(message.data[0])
            if len(seen) == 40:
                break
        await asyncio.gather(*sends, *back)
        assert seen == list(range(40))
        assert there.state == "up"


async def test_senders_that_give_up_in_the_queue_hold_nobody_up() -> None:
    small = at.Config(message_window_count=2, message_window_bytes=1 << 20)
    async with at.open_engine() as left, at.open_engine(config=small) as right:
        there = await left.connect(right.address, timeout=10)
        sends = [asyncio.create_task(there.send(bytes([i]))) for i in range(30)]
        await asyncio.sleep(0.02)
        for task in sends[2::3]:
            task.cancel()
        kept = [i for i in range(30) if i % 3 != 2]
        seen = []
        async with asyncio.timeout(10):
            async for message in right.messages():
                seen.append(message.data[0])
                if len(seen) == len(kept):
                    break
        await asyncio.gather(*sends, return_exceptions=True)
        assert seen == kept


async def test_a_dial_that_is_up_on_its_own_side_only_is_not_given_up_for_a_crossing_one() -> None:
    async with at.open_engine() as a, at.open_engine() as b:
        small, great = sorted((a, b), key=lambda engine: engine.incarnation)
        connections = small._connections
        came_up = connections.came_up
        connections.came_up = lambda peer, inbound=True: None if inbound else came_up(peer, inbound)  # type: ignore[method-assign]
        there = await great.connect(small.address, timeout=10)
        crossing = asyncio.create_task(small.connect(great.address, timeout=10))
        await asyncio.sleep(0.05)
        (known,) = connections.peers.values()
        assert (known._state, there.state) == ("connecting", "up")
        connections.came_up = came_up  # type: ignore[method-assign]
        came_up(known)
        assert await crossing is known
        assert (there.state, great.peers) == ("up", (there,))
        await asyncio.gather(known.ping(timeout=10), there.ping(timeout=10))


async def test_a_dial_that_gave_way_while_its_path_came_up_returns_the_peer_that_won() -> None:
    async with at.open_engine() as a, at.open_engine() as b:
        small, great = sorted((a, b), key=lambda engine: engine.incarnation)
        set_up, won = great._paths.set_up, asyncio.Event()

        async def late(peer: at.Peer, require: str | None) -> None:
            path = await set_up(peer, require)
            if peer._link.dialed:
                winner = asyncio.create_task(small.connect(great.address, timeout=10))
                while great._connections.peers[small.incarnation] is peer:
                    await asyncio.sleep(0)
                won.set()
                await winner
            return path

        great._paths.set_up = late  # type: ignore[method-assign,assignment]
        there = await great.connect(small.address, timeout=10)
        assert there.state == "up"
        assert won.is_set()
        (known,) = great.peers
        assert there is known
