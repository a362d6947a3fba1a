"""Ranks that die, hang, leave and come back: named everywhere, left out by all alike, and taken in again at one step."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import moe
from tests.moe.world import EXPERTS, Batch, World, batch, combined, compute, step, world

MESSY = {"delay": (1e-6, 1e-3), "split": 0.3}
RANKS = 4
LOCAL = EXPERTS // RANKS


def data(step_number: int, rank: int) -> Batch:
    return batch(np.random.default_rng(1000 * step_number + rank), 4)


def check(b: Batch, out: Any, dropped: Any, lost: tuple[int, ...]) -> None:
    """The sum of what was not dropped is exact, and only choices of lost ranks were dropped."""
    assert np.array_equal(out, combined(b, dropped))
    for t, k in np.argwhere(dropped):
        assert b.idx[t, k] // LOCAL in lost


async def run_steps(a2a: moe.AllToAll, first: int, last: int, reports: dict[Any, Any], pause: float = 0.0) -> None:
    """Steps first to last - 1, each checked; what was lost is reported."""
    for number in range(first, last):
        await asyncio.sleep(pause)
        b = data(number, a2a.rank)
        d = await a2a.dispatch(*b)
        assert d.handle.step == number
        out = await a2a.combine(compute(d, a2a.rank), d.handle)
        check(b, out, d.handle.dropped, d.handle.lost)
        reports[a2a.rank, number] = d.handle.lost


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("when", [x * 2e-4 for x in range(12)])
def test_a_killed_rank_is_left_out_by_all_and_named(when: float, direct: bool) -> None:
    reports: dict[Any, Any] = {}

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        tasks = [asyncio.create_task(run_steps(w.a2a[r], 0, 12, reports)) for r in range(RANKS)]
        await asyncio.sleep(0.005 + when)
        w.net.kill(w.engines[2])
        tasks[2].cancel()
        await asyncio.gather(*(tasks[r] for r in (0, 1, 3)))
        for r in (0, 1, 3):
            assert w.a2a[r].mask == (True, True, False, True)
            assert isinstance(w.a2a[r].lost[2], at.PeerLostError)
            assert "rank 2 (r2)" in str(w.a2a[r].lost[2])
            assert reports[r, 11] == (2,)
        for r in (0, 1, 3):
            await w.a2a[r].aclose()

    world(RANKS, script, net=MESSY, direct=direct)


def test_a_choice_of_a_lost_rank_is_dropped_and_reported() -> None:
    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        w.net.kill(w.engines[3])

        async def rank(a2a: moe.AllToAll) -> None:
            b = Batch(np.ones((2, 16), np.float32), np.array([[0, 6, 7], [1, 2, -1]]), np.ones((2, 3), np.float32))
            began = asyncio.get_running_loop().time()
            d, out = await step(a2a, b)
            assert asyncio.get_running_loop().time() - began < 3 * w.config.peer_timeout
            assert d.handle.lost == (3,)
            assert d.handle.dropped.tolist() == [[False, True, True], [False, False, False]]
            assert out[:, 0].tolist() == [1, 2 + 3]

        await w.every(rank, ranks=range(3))
        for a2a in w.a2a[:3]:
            await a2a.aclose()

    world(RANKS, script)


@pytest.mark.parametrize("seed", range(6))
def test_two_ranks_may_die_and_one_may_be_left(seed: int) -> None:
    reports: dict[Any, Any] = {}

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        tasks = [asyncio.create_task(run_steps(w.a2a[r], 0, 30, reports)) for r in range(RANKS)]
        for dead in (1, 3, 0):
            await asyncio.sleep(0.004 + 0.0007 * seed)
            w.net.kill(w.engines[dead])
            tasks[dead].cancel()
        await tasks[2]
        assert reports[2, 29] == (0, 1, 3)
        await w.a2a[2].aclose()

    world(RANKS, script, net=MESSY, seed=seed)


@pytest.mark.parametrize("seed", range(8))
def test_a_rank_comes_back_at_one_step_for_all(seed: int) -> None:
    reports: dict[Any, Any] = {}
    last = 60

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        tasks = [asyncio.create_task(run_steps(w.a2a[r], 0, last, reports, pause=0.05)) for r in range(RANKS)]
        await asyncio.sleep(0.2 + 0.01 * seed)
        w.net.kill(w.engines[2])
        tasks[2].cancel()
        await asyncio.sleep(0.001 * seed)
        again = await w.again(2)
        await again.ready()
        first = again.next_step
        assert first % 4 == 0
        tasks[2] = asyncio.create_task(run_steps(again, first, last, reports, pause=0.05))
        await asyncio.gather(*tasks)
        for r in (0, 1, 3):
            assert {n for n in range(last) if reports[r, n]} == set(range(min(n for n in range(last) if reports[r, n]), first))
            assert w.a2a[r].mask == (True,) * RANKS
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY, seed=seed, align=4)


def test_a_rank_that_hangs_can_be_given_up_and_is_told() -> None:
    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())

        async def rank(a2a: moe.AllToAll) -> None:
            b = data(0, a2a.rank)
            if a2a.rank == 3:
                await asyncio.sleep(0.5)
                with pytest.raises(moe.EvictedError, match=r"rank \d \(r\d\) gave this rank up|have lost this one"):
                    await step(a2a, b)
                return
            half = await a2a.dispatch_send(*b)
            with pytest.raises(at.TransferTimeout, match="rank 3"):
                await half.receive(timeout=0.2)
            if a2a.rank == 1:
                a2a.evict(3, "too slow")
            d = await half.receive(timeout=1)
            check(b, await a2a.combine(compute(d, a2a.rank), d.handle), d.handle.dropped, (3,))
            assert "too slow" in str(a2a.lost[3]) or "another rank" in str(a2a.lost[3])

        await w.every(rank)
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script)


def test_a_rank_that_leaves_after_its_last_step_spoils_nothing() -> None:
    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                for number in range(3):
                    b = data(number, a2a.rank)
                    d, out = await step(a2a, b)
                    assert np.array_equal(out, combined(b))
                    assert d.handle.lost == ()

        await w.every(rank)

    for seed in range(5):
        world(RANKS, script, net=MESSY, seed=seed)


@pytest.mark.parametrize("dp", [2])
@pytest.mark.parametrize("seed", range(6))
def test_in_a_dp_group_what_a_lost_member_sent_is_dropped_on_the_others(dp: int, seed: int) -> None:
    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())

        async def rank(a2a: moe.AllToAll) -> None:
            for number in range(12):
                b = data(number, a2a.rank // dp)
                d = await a2a.dispatch(*b)
                out = await a2a.combine(compute(d, a2a.rank), d.handle)
                assert np.array_equal(out, combined(b, d.handle.dropped))

        tasks = [asyncio.create_task(rank(a2a)) for a2a in w.a2a]
        await asyncio.sleep(0.004 + 0.0005 * seed)
        w.net.kill(w.engines[1])
        tasks[1].cancel()
        await asyncio.gather(*(tasks[r] for r in (0, 2, 3)))
        for r in (0, 2, 3):
            await w.a2a[r].aclose()

    world(RANKS, script, net=MESSY, seed=seed, dp_size=dp)


def test_a_rank_that_dies_while_they_meet_is_named() -> None:
    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            with pytest.raises((at.PeerLostError, at.TransferTimeout), match=r"rank 3"):
                await a2a.ready(timeout=3)
            await a2a.aclose()

        waiting = [asyncio.create_task(rank(w.a2a[r])) for r in range(3)]
        joining = asyncio.create_task(w.a2a[3].ready())
        await asyncio.sleep(0.0005)
        w.net.kill(w.engines[3])
        joining.cancel()
        with contextlib.suppress(asyncio.CancelledError, at.TransferError):
            await joining
        await w.a2a[3].aclose()
        await asyncio.gather(*waiting)

    world(RANKS, script)


@pytest.mark.parametrize("seed", range(12))
def test_a_rank_that_left_comes_back_on_the_same_engine(seed: int) -> None:
    reports: dict[Any, Any] = {}

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        others = [asyncio.create_task(run_steps(w.a2a[r], 0, 40, reports, pause=0.02)) for r in range(3)]
        mine = asyncio.create_task(run_steps(w.a2a[3], 0, 5, reports, pause=0.02))
        await mine
        await w.a2a[3].aclose()
        engine = w.engines[3]
        again = w.a2a[3] = moe.AllToAll(engine, engine.group(w.addresses), **w.sizes)
        await again.ready()
        assert 5 < again.next_step < 40
        await run_steps(again, again.next_step, 40, reports, pause=0.02)
        await asyncio.gather(*others)
        for a2a in w.a2a:
            assert a2a.mask == (True,) * RANKS
            await a2a.aclose()

    world(RANKS, script, net=MESSY, seed=seed)


@pytest.mark.parametrize("seed", range(6))
def test_an_evicted_rank_takes_nobody_with_it(seed: int) -> None:
    """Whose writes are refused before it hears why does not give up those that refuse them: others would believe it."""
    reports: dict[Any, Any] = {}

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        tasks = [asyncio.create_task(run_steps(w.a2a[r], 0, 20, reports)) for r in range(RANKS)]
        await asyncio.sleep(0.004 + 0.0006 * seed)
        w.a2a[0].evict(1, "too slow")
        with pytest.raises(moe.EvictedError):
            await tasks[1]
        await asyncio.gather(*(tasks[r] for r in (0, 2, 3)))
        assert [reports[r, 19] for r in (0, 2, 3)] == [(1,)] * 3
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY, seed=seed, private_tokens=0)


@pytest.mark.parametrize("when", [x * 1.5e-4 for x in range(10)])
def test_a_rank_that_dies_while_it_comes_back_holds_nobody_up(when: float) -> None:
    """The others wait for its view, and for nothing else of it."""
    reports: dict[Any, Any] = {}

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        tasks = [asyncio.create_task(run_steps(w.a2a[r], 0, 60, reports, pause=0.01)) for r in range(RANKS)]
        await asyncio.sleep(0.05)
        w.net.kill(w.engines[3])
        tasks[3].cancel()
        again = await w.again(3)
        coming = asyncio.create_task(again.ready())
        while again._ranks.membership is None and not coming.done():
            await asyncio.sleep(1e-5)
        await asyncio.sleep(when)
        w.net.kill(w.engines[3])
        coming.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks[:3]), 5)
        assert [reports[r, 59] for r in range(3)] == [(3,)] * 3
        for a2a in w.a2a[:3]:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


def test_a_rank_comes_back_where_another_is_lost_for_good() -> None:
    reports: dict[Any, Any] = {}

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        tasks = [asyncio.create_task(run_steps(w.a2a[r], 0, 60, reports, pause=0.05)) for r in range(RANKS)]
        await asyncio.sleep(0.1)
        for dead in (1, 2):
            w.net.kill(w.engines[dead])
            tasks[dead].cancel()
        await asyncio.sleep(0.3)
        again = await w.again(2)
        await again.ready(timeout=2)
        tasks[2] = asyncio.create_task(run_steps(again, again.next_step, 60, reports, pause=0.05))
        await asyncio.gather(*(tasks[r] for r in (0, 2, 3)))
        assert [reports[r, 59] for r in (0, 2, 3)] == [(1,)] * 3
        for r in (0, 2, 3):
            await w.a2a[r].aclose()

    world(RANKS, script, net=MESSY)


def test_a_rank_that_hangs_while_it_comes_back_is_named_by_the_deadline_of_a_dispatch() -> None:
    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        w.net.kill(w.engines[1])
        d, _ = await step(w.a2a[0], data(0, 0))
        assert d.handle.lost == (1,)
        again = await w.again(1)
        again._communicator.losses._tell = lambda: asyncio.sleep(3600)  # it says Hello, and then no more
        coming = asyncio.create_task(again.ready())
        while w.a2a[0]._ranks.membership.limit() is None:
            await asyncio.sleep(0.01)
        with pytest.raises(at.TransferTimeout, match=r"not heard of: rank 1 \(r1\)"):
            for number in range(1, 5):
                d = await w.a2a[0].dispatch(*data(number, 0), timeout=0.5)
                await w.a2a[0].combine(compute(d, 0), d.handle)
        w.a2a[0].evict(1, "it hangs")
        await step(w.a2a[0], data(9, 0))
        coming.cancel()
        for a2a in w.a2a:
            await a2a.aclose()

    world(2, script, private_tokens=2)


def test_rows_of_a_lost_rank_are_not_read_once_its_next_life_may_write_over_them() -> None:
    """Its first message had come, the ranges were not known yet: a header of the life that follows may land on those rows."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        one = Batch(np.full((1, 16), 5, np.float32), np.array([[0, 1, -1]]), np.ones((1, 3), np.float32))
        halves = [await w.a2a[r].dispatch_send(*one) for r in (0, 1, 2)]
        await asyncio.sleep(0.01)  # those are there; rank 3 has not sent
        w.net.kill(w.engines[2])
        w.a2a[0].evict(2)
        shape, buffers = w.a2a[0]._ranks.shape, w.a2a[0]._communicator.buffers
        begin = shape.first(0, 2)
        buffers.here[begin : begin + shape.first_bytes] = 0xFF
        halves.append(await w.a2a[3].dispatch_send(*one))

        async def finish(r: int) -> None:
            d = await halves[r].receive()
            if r == 0:
                assert d.counts.tolist() == [4, 4]
                assert d.x[:, 0].tolist() == [5, 5, 0, 5] * 2
            await w.a2a[r].combine(np.array(d.x), d.handle)

        await asyncio.gather(*(finish(r) for r in (0, 1, 3)))
        for r in (0, 1, 3):
            await w.a2a[r].aclose()

    world(RANKS, script)
