"""Steps that a deadline or a cancel cuts off, and that go on."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import moe
from tests.moe.world import MESSY, World, batch, batches, combined, compute, world


def test_a_deadline_names_who_is_missing_and_the_step_goes_on_later() -> None:
    async def script(w: World) -> None:
        data = batches(4, 1)[0]

        async def rank(a2a: moe.AllToAll) -> None:
            mine = data[a2a.rank]
            await a2a.ready()
            if a2a.rank == 1:
                await asyncio.sleep(1)
                d = await a2a.dispatch(*mine)
            else:
                with pytest.raises(at.TransferTimeout, match=r"not heard of: rank 1 \(r1\)"):
                    await a2a.dispatch(*mine, timeout=0.2)
                (handle,) = a2a.in_flight
                d = await a2a.resume(handle).receive()
            assert np.array_equal(await a2a.combine(compute(d, a2a.rank), d.handle), combined(mine))
            assert a2a.in_flight == ()

        await w.every(rank)
        for a2a in w.a2a:
            await a2a.aclose()

    world(4, script)


@pytest.mark.parametrize("turns", range(0, 40, 3))
def test_a_cancelled_step_stays_in_flight_and_goes_on(turns: int) -> None:
    """Cancelled at any turn of the loop, by both halves: nothing is lost, and nothing is sent twice."""
    data = batches(4, 3)

    async def script(w: World) -> None:
        async def interrupted(a2a: moe.AllToAll, start: Any) -> Any:
            task = asyncio.ensure_future(start)
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            try:
                return await task
            except asyncio.CancelledError:
                return None

        async def rank(a2a: moe.AllToAll) -> None:
            await a2a.ready()
            for b in (b[a2a.rank] for b in data):
                before = a2a.next_step
                d = await interrupted(a2a, a2a.dispatch(*b)) if a2a.rank == 1 else await a2a.dispatch(*b)
                if d is None and a2a.next_step == before:
                    d = await a2a.dispatch(*b)  # nothing had been sent
                elif d is None:
                    d = await a2a.resume(a2a.in_flight[-1]).receive()
                y = compute(d, a2a.rank)
                out = await interrupted(a2a, a2a.combine(y, d.handle)) if a2a.rank == 1 else await a2a.combine(y, d.handle)
                if out is None:
                    out = await a2a.combine(y, d.handle)
                assert np.array_equal(out, combined(b))

        await w.every(rank)
        for a2a in w.a2a:
            await a2a.aclose()

    world(4, script, net=MESSY)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("turns", range(1, 12))
def test_a_combine_that_is_cancelled_while_it_packs_sends_the_rest_when_it_is_resumed(
    turns: int, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotransfer.moe.step.exchange.MOVED_AT_ONCE", 1)  # a turn of the loop after each row
    data = batches(2, 1)[0]

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            mine = data[a2a.rank]
            d = await a2a.dispatch(*mine)
            task = asyncio.ensure_future(a2a.combine(compute(d, a2a.rank), d.handle))
            for _ in range(turns if a2a.rank else 0):
                await asyncio.sleep(0)
            if a2a.rank and task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task
                task = asyncio.ensure_future(a2a.resume(d.handle).receive())
            assert np.array_equal(await task, combined(mine))

        await w.every(rank)
        for a2a in w.a2a:
            await a2a.aclose()

    world(2, script, direct=direct)


def test_a_first_half_goes_on_by_resume_while_it_is_at_work() -> None:
    """Both receive what they wait for: they would take each other's arrivals."""

    async def script(w: World) -> None:
        data = batches(2, 1)[0]

        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                mine = data[a2a.rank]
                if a2a.rank == 1:
                    await asyncio.sleep(0.5)
                half = await a2a.dispatch_send(*mine)
                if a2a.rank == 0:
                    with pytest.raises(at.TransferTimeout):
                        await half.receive(timeout=0.1)
                    d = await a2a.resume(a2a.in_flight[0]).receive(timeout=2)
                else:
                    d = await half.receive()
                assert np.array_equal(await a2a.combine(compute(d, a2a.rank), d.handle), combined(mine))

        await w.every(rank)

    world(2, script)


def test_one_deadline_covers_all_that_a_dispatch_waits_for() -> None:
    async def script(w: World) -> None:
        loop = asyncio.get_running_loop()

        async def rank(a2a: moe.AllToAll) -> None:
            if a2a.rank == 0:
                began = loop.time()
                with pytest.raises(at.TransferTimeout):
                    await a2a.dispatch(*batch(np.random.default_rng(0), 2), timeout=0.5)
                assert loop.time() - began < 0.55
            else:
                await asyncio.sleep(0.3)
                await a2a.ready()
                await asyncio.sleep(1)
            await a2a.aclose()

        await w.every(rank)

    world(2, script)
