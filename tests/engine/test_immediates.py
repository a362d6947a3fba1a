"""Immediates under races: whatever is cancelled, closed or timed out, no arrival is lost, given twice, or given to a stranger."""

from __future__ import annotations

import asyncio
import random
from collections import Counter as Bag
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair
from tests.turns import give_up

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture(params=["shm", "loopback"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with engine_pair(request.param, timeout=10) as pair:
        yield pair


async def test_each_kind_of_operation_counts_the_callers_units(ends: Pair) -> None:
    region = ends.right.allocate(1 << 16)
    ends.right.publish("memory", region)
    remote = await ends.right_peer.lookup("memory")
    source = ends.left.allocate(1 << 16)
    await ends.left.write(source, remote, imm=1)
    await ends.left.write(source[:0], remote[:0], imm=1)
    await ends.left.write_pages(source, [1, 2, 3], remote, [3, 2, 1], page_bytes=64, imm=1)
    await ends.left.write_pages(source, [], remote, [], page_bytes=64, imm=1)
    await ends.left.signal(remote, 1)
    await ends.left.scatter(source, [(0, 8, remote[:8]), (8, 0, remote[:0])], imm=1)
    counter = ends.right.counter(imm=1)
    await counter.wait(1 + 1 + 3 + 0 + 1 + 2, timeout=5)
    assert (counter.value, counter.total) == (0, 8)


async def test_a_cancel_around_an_arrival_loses_nothing(ends: Pair) -> None:
    counter = ends.right.counter(imm=3)
    taken = 0
    turns = 1500
    for i in range(turns):
        task = asyncio.ensure_future(counter.wait(1))
        if i % 3 == 0:
            await asyncio.sleep(0)
        ends.left.signal(ends.right_peer, 3)
        await give_up(task, i % 5)
        taken += task.done() and not task.cancelled() and task.exception() is None
    await counter.wait(turns - taken, timeout=5)
    assert (counter.value, counter.total) == (0, turns)


async def test_a_deadline_around_an_arrival_loses_nothing(ends: Pair) -> None:
    counter = ends.right.counter(imm=4)
    rng = random.Random(5)
    taken = 0
    turns = 300
    for _ in range(turns):
        sent = asyncio.Event()
        ends.left._loop.call_later(rng.uniform(0, 0.0006), _signal, ends, sent)
        try:
            if rng.random() < 0.5:
                await counter.wait(1, timeout=rng.uniform(0, 0.0006))
            else:
                async with asyncio.timeout(rng.uniform(0, 0.0006)):
                    await counter.wait(1)
            taken += 1
        except TimeoutError:
            pass
        await sent.wait()
    await counter.wait(turns - taken, timeout=5)
    assert (counter.value, counter.total) == (0, turns)


def _signal(ends: Pair, sent: asyncio.Event) -> None:
    ends.left.signal(ends.right_peer, 4)
    sent.set()


async def test_waits_of_many_sizes_are_served_in_turn_and_add_up(ends: Pair) -> None:
    counter = ends.right.counter(imm=5)
    rng = random.Random(7)
    for _ in range(40):
        sizes = [rng.randint(1, 5) for _ in range(6)]
        order: list[int] = []

        async def wait(i: int, n: int, order: list[int] = order) -> None:
            await counter.wait(n)
            order.append(i)

        tasks = [asyncio.ensure_future(wait(i, n)) for i, n in enumerate(sizes)]
        await asyncio.sleep(0)
        doomed = set(rng.sample(range(6), 2))
        sent = sum(sizes)
        for step in range(sent):
            ends.left.signal(ends.right_peer, 5)
            if step == sent // 3:
                for i in doomed:
                    tasks[i].cancel()
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        served = [i for i, end in enumerate(ended) if end is None]
        assert order == sorted(order) == served
        await counter.wait(sent - sum(sizes[i] for i in served), timeout=5)
        assert counter.value == 0


@pytest.mark.parametrize("everything", [False, True])
async def test_closing_around_an_arrival_ends_every_wait_once(ends: Pair, everything: bool) -> None:
    for turn in range(1 if everything else 200):
        counter = ends.right.counter(imm=6)
        tasks = [asyncio.ensure_future(counter.wait(1)) for _ in range(3)]
        for _ in range(turn % 4):
            await asyncio.sleep(0)
        ends.left.signal(ends.right_peer, 6)
        for _ in range(turn // 4 % 4):
            await asyncio.sleep(0)
        if everything:
            await ends.right.aclose()
        else:
            counter.close()
        bag = Bag(type(end).__name__ for end in await asyncio.gather(*tasks, return_exceptions=True))
        assert set(bag) <= {"NoneType", "ClosedError"}
        assert bag["NoneType"] <= 1


async def test_a_retired_value_takes_strays_until_it_is_opened_again(ends: Pair) -> None:
    counter = ends.right.counter(imm=8)
    await ends.left.signal(ends.right_peer, 8)
    await counter.wait(1, timeout=5)
    counter.close()
    before = ends.right.statistics().strays
    for _ in range(5):
        await ends.left.signal(ends.right_peer, 8)
    while ends.right.statistics().strays == before:
        await asyncio.sleep(0.001)
        ends.right.counter(imm=9).value  # noqa: B018 - a look at the arrivals
    assert ends.right.statistics().strays == before + 5
    again = ends.right.counter(imm=8)
    assert (again.value, again.total) == (0, 0)
    await ends.left.signal(ends.right_peer, 8)
    await again.wait(1, timeout=5)


async def test_an_open_value_is_the_same_counter_and_none_is_a_fresh_one(ends: Pair) -> None:
    assert ends.right.counter(imm=1) is ends.right.counter(imm=1)
    for _ in range(10):
        await ends.left.signal(ends.right_peer, 0xEFFF_FFFF)
        await ends.left.signal(ends.right_peer, 0xEFFF_FFF0)
    fresh = {ends.right.counter().imm for _ in range(30)}
    assert len(fresh) == 30
    assert not fresh & {0xEFFF_FFFF, 0xEFFF_FFF0}


async def test_iterating_yields_each_arrival(ends: Pair) -> None:
    counter = ends.right.counter(imm=2)
    seen = []

    async def read() -> None:
        async for n in counter:
            seen.append(n)

    task = asyncio.ensure_future(read())
    for _ in range(50):
        ends.left.signal(ends.right_peer, 2)
        await asyncio.sleep(0)
    while len(seen) < 50:
        await asyncio.sleep(0)
    counter.close()
    await asyncio.wait_for(task, 5)
    assert seen == list(range(1, 51))


async def test_two_senders_of_one_value_add_up() -> None:
    async with at.open_engine() as target, at.open_engine() as a, at.open_engine() as b:
        peers = [await engine.connect(target.address) for engine in (a, b)]
        counter = target.counter(imm=1)
        for _ in range(500):
            a.signal(peers[0], 1)
            b.signal(peers[1], 1)
        await counter.wait(1000, timeout=5)
        assert counter.value == 0


async def test_what_had_landed_before_a_peer_was_lost_is_taken_first() -> None:
    async with engine_pair(timeout=10) as pair:
        counter = pair.right.counter(imm=1)
        await pair.left.signal(pair.right_peer, 1)
        await pair.left.signal(pair.right_peer, 1)
        await pair.left.aclose()
        await pair.left_peer.closed(timeout=5)
        await counter.wait(2)
        with pytest.raises(at.PeerLostError):
            await counter.wait(1, peers=[pair.left_peer])


async def test_early_values_are_kept_up_to_a_bound_and_a_lost_one_says_so() -> None:
    async with engine_pair(config=at.Config(early_values=100)) as pair:
        for value in range(150):
            await pair.left.signal(pair.right_peer, value)
        await asyncio.sleep(0.01)
        kept = lost = 0
        for value in range(150):
            try:
                kept += pair.right.counter(imm=value).value
            except at.BusyError:
                lost += 1
        assert (kept, lost) == (100, 50)
        assert pair.right.statistics().overflowed == 50


@pytest.mark.long
async def test_every_one_of_65536_early_values_is_kept(ends: Pair) -> None:
    for value in range(65536):
        await ends.left.signal(ends.right_peer, value)
    assert all(ends.right.counter(imm=value).value == 1 for value in range(0, 65536, 7))
