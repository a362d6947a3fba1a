"""Counters: early arrivals, turns, cancellation, retirement."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.engine.sync.counter import take_each
from aiotransfer.providers import native
from aiotransfer.testing import Pair, engine_pair

pytestmark = pytest.mark.asyncio


async def test_arrivals_before_the_counter_exists_are_kept(pair: Pair) -> None:
    for _ in range(3):
        await pair.left.signal(pair.right_peer, 5)
    counter = pair.right.counter(imm=5)
    assert counter.value == counter.total == 3
    await counter.wait(3, timeout=1)
    assert (counter.value, counter.total) == (0, 3)


async def test_an_open_value_gives_the_same_counter(pair: Pair) -> None:
    assert pair.right.counter(imm=5) is pair.right.counter(imm=5)
    fresh = {pair.right.counter().imm for _ in range(100)}
    assert len(fresh) == 100


async def test_waits_are_served_first_come_first_served(pair: Pair) -> None:
    counter = pair.right.counter(imm=1)
    order: list[str] = []

    async def wait(n: int, name: str) -> None:
        await counter.wait(n, timeout=5)
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(wait(5, "many"))
        await asyncio.sleep(0)
        group.create_task(wait(1, "one"))
        await asyncio.sleep(0)
        for _ in range(4):
            await pair.left.signal(pair.right_peer, 1)
        await asyncio.sleep(0.02)
        assert order == []  # the wait for many blocks the later one
        for _ in range(2):
            await pair.left.signal(pair.right_peer, 1)
    assert order == ["many", "one"]
    assert counter.value == 0


async def test_many_counters_are_taken_from_at_once_but_from_none_that_somebody_waits_for(pair: Pair) -> None:
    counters = [pair.right.counter(imm=i) for i in range(4)]
    for imm, n in ((0, 3), (1, 1), (3, 1)):
        for _ in range(n):
            await pair.left.signal(pair.right_peer, imm)
    await counters[1].wait(1)
    waiting = asyncio.create_task(counters[3].wait(2))
    await asyncio.sleep(0.01)
    assert take_each(counters, [2, 1, 0, 1]) == ([True, False, True, False], False)
    assert [counter.value for counter in counters] == [1, 0, 0, 1]
    await pair.left.signal(pair.right_peer, 3)
    await waiting
    assert take_each([], []) == ([], False)


async def test_a_cancelled_wait_loses_no_arrival(pair: Pair) -> None:
    counter = pair.right.counter(imm=1)
    sent = taken = 0
    rng = np.random.default_rng(3)
    for _ in range(500):
        task = asyncio.create_task(counter.wait(2))
        for _ in range(int(rng.integers(0, 3))):
            await asyncio.sleep(0)
        for _ in range(2):
            await pair.left.signal(pair.right_peer, 1)
            sent += 1
        for _ in range(int(rng.integers(0, 4))):
            await asyncio.sleep(0)
        task.cancel()
        try:
            await task
            taken += 2
        except asyncio.CancelledError:
            pass
        assert counter.value == sent - taken
    assert 0 < taken < sent
    await counter.wait(sent - taken, timeout=1)


async def test_the_second_in_the_queue_gets_what_the_first_gave_up(pair: Pair) -> None:
    counter = pair.right.counter(imm=1)
    first = asyncio.create_task(counter.wait(10))
    second = asyncio.create_task(counter.wait(1))
    await asyncio.sleep(0)
    await pair.left.signal(pair.right_peer, 1)
    await asyncio.sleep(0.02)
    assert not second.done()
    first.cancel()
    await asyncio.wait_for(second, 1)
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_timeout_names_what_is_there(pair: Pair) -> None:
    counter = pair.right.counter(imm=1)
    await pair.left.signal(pair.right_peer, 1)
    with pytest.raises(at.TransferTimeout, match="2 arrivals of immediate 1; 1 are there"):
        await counter.wait(2, timeout=0.01)
    assert counter.value == 1


async def test_a_retired_value_makes_strays_until_it_is_reopened(pair: Pair) -> None:
    counter = pair.right.counter(imm=1)
    waiting = asyncio.create_task(counter.wait(1))
    await asyncio.sleep(0)
    counter.close()
    counter.close()
    with pytest.raises(at.ClosedError):
        await waiting
    await pair.left.signal(pair.right_peer, 1)
    await asyncio.sleep(0.01)
    again = pair.right.counter(imm=1)
    assert again.total == 0
    assert pair.right.statistics().strays == 1
    await pair.left.signal(pair.right_peer, 1)
    await again.wait(1, timeout=1)


async def test_async_for_yields_each_arrival(pair: Pair) -> None:
    counter = pair.right.counter(imm=1)
    for _ in range(3):
        await pair.left.signal(pair.right_peer, 1)
    seen = []
    async for n in counter:
        seen.append(n)
        if n == 3:
            break
    assert seen == [1, 2, 3]


async def test_many_distinct_values_are_counted_apart(pair: Pair) -> None:
    values = 5000
    for imm in range(values):
        await pair.left.signal(pair.right_peer, imm)
        if imm % 3 == 0:
            await pair.left.signal(pair.right_peer, imm)
    for imm in range(values):
        with pair.right.counter(imm=imm) as counter:
            assert counter.value == (2 if imm % 3 == 0 else 1)


async def test_early_values_beyond_the_bound_are_reported_when_opened() -> None:
    from aiotransfer.testing import engine_pair

    async with engine_pair(config=at.Config(early_values=10)) as pair:
        for imm in range(12):
            await pair.left.signal(pair.right_peer, imm)
        assert pair.right.counter(imm=3).value == 1
        with pytest.raises(at.BusyError, match="immediate 11"):
            pair.right.counter(imm=11)
        assert pair.right.statistics().overflowed == 2


async def test_a_wait_that_names_a_peer_ends_with_it(pair: Pair) -> None:
    counter = pair.right.counter(imm=1)
    await pair.left.signal(pair.right_peer, 1)
    waiting = asyncio.create_task(counter.wait(2, peers=[pair.left_peer]))
    await asyncio.sleep(0)
    await pair.left.aclose()
    with pytest.raises(at.PeerLostError):
        await asyncio.wait_for(waiting, 5)
    assert counter.value == 1


@pytest.mark.asyncio
async def test_a_wait_that_finds_only_some_of_its_arrivals_is_still_woken(pair: Pair) -> None:
    counter = pair.right.counter(imm=1)
    await pair.left.signal(pair.right_peer, 1)
    assert native.lib.at_imm_take(pair.right._p, counter._record, 2, 1) == 0, "the last look found one of two"
    await pair.left.signal(pair.right_peer, 1)
    assert pair.left.statistics().doorbells_rung == 1


@pytest.mark.parametrize("progress", ["auto", "loop"])
async def test_a_count_that_finds_the_table_full_waits_without_spinning(progress: str) -> None:
    async with engine_pair("shm", progress=progress) as pair:
        nbytes = 4 << 20
        target, source = pair.right.allocate(nbytes), pair.left.allocate(nbytes)
        counter = pair.right.counter(imm=70_000)
        pair.right.publish("target", target)
        remote = await pair.right_peer.lookup("target")
        await pair.left.write(source, remote)
        for imm in range(65_536):  # every slot that a writer has, and nobody looks
            pair.left.signal(pair.right_peer, imm)
        transfer = pair.left.write(source, remote, imm=70_000)
        await asyncio.sleep(0.05)
        before, start = pair.left.statistics().polls, time.thread_time()
        await asyncio.sleep(0.3)
        assert not transfer.done()
        assert pair.left.statistics().polls - before < 600
        assert time.thread_time() - start < 0.1
        assert counter.total == 0  # looking makes room
        await asyncio.wait_for(transfer, 5)
        assert counter.total == 1


async def test_a_value_that_was_given_back_counts_from_zero_again_and_is_nobody_elses(pair: Pair) -> None:
    values = pair.right._values
    first = values.again()
    pair.left.signal(pair.right_peer, first.imm)
    await first.wait(1)
    values.give_back(first)
    values.give_back(first)
    assert pair.right.counter().imm != first.imm, "a value never used before"
    second = values.again()
    assert (second.imm, second.total) == (first.imm, 0)
    assert second._record != first._record
    third = values.again()
    assert third.imm != second.imm
    values.give_back(second)
    user = pair.right.counter(imm=second.imm)  # from here on a user says what may arrive for it
    user.close()
    assert values.again().imm not in (second.imm, third.imm)


async def test_an_engine_that_has_used_every_value_says_so(pair: Pair) -> None:
    pair.right._values._next = 1
    assert [pair.right.counter().imm, pair.right.counter().imm] == [1, 0]
    for _ in range(2):
        with pytest.raises(at.BusyError, match="every immediate"):
            pair.right.counter()
    assert pair.right.counter(imm=0).total == 0
