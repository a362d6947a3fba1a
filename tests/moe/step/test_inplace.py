"""Results that are summed where the experts wrote them: the same sums, no bytes moved, and nothing read that is not meant."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.moe.communicator.losses import Losses
from aiotransfer.moe.protocol import messages
from tests.moe.world import EXPERTS, HIDDEN, SIZES, Batch, World, batch, combined, compute, world

MESSY = {"delay": (1e-6, 1e-3), "split": 0.3}
IN_PLACE: dict[str, Any] = {"direct": True, "results_in_place": True}
FULL = Batch(np.ones((2, HIDDEN), np.float32), np.array([[0], [EXPERTS - 1]]), np.ones((2, 1), np.float32))


async def steps(a2a: moe.AllToAll, n: int, seed: int = 0) -> None:
    for number in range(n):
        mine = batch(np.random.default_rng([seed, number, a2a.rank]))
        d = await a2a.dispatch(*mine)
        assert np.array_equal(await a2a.combine(compute(d, a2a.rank), d.handle), combined(mine))
        assert not d.handle.dropped.any()


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_sums_are_the_same(ranks: int, alignment: int) -> None:
    async def rank(a2a: moe.AllToAll) -> None:
        async with a2a:
            await steps(a2a, 7)  # every third has its results elsewhere, see `compute`

    async def script(w: World) -> None:
        await w.every(rank)

    world(ranks, script, net=MESSY, expert_alignment=alignment, **IN_PLACE)


@pytest.mark.parametrize("sizes", [{"dp_size": 2}, {"direct": False}], ids=str)
def test_whoever_cannot_read_there_is_sent_them(sizes: dict[str, Any]) -> None:
    async def rank(a2a: moe.AllToAll) -> None:
        async with a2a:
            for number in range(4):
                mine = batch(np.random.default_rng([number, a2a.rank // sizes.get("dp_size", 1)]))
                d = await a2a.dispatch(*mine)
                assert np.array_equal(await a2a.combine(compute(d, a2a.rank), d.handle), combined(mine))

    async def script(w: World) -> None:
        await w.every(rank)

    world(4, script, net=MESSY, **(IN_PLACE | sizes))


def test_some_ranks_may_hold_them_and_others_send() -> None:
    async def rank(a2a: moe.AllToAll) -> None:
        async with a2a:
            d = await a2a.dispatch(*FULL)
            assert (d.y is None) == (a2a.rank % 2 == 0)
            await a2a.combine(compute(d, a2a.rank), d.handle)
            await steps(a2a, 5)

    async def script(w: World) -> None:
        sizes = [w.sizes | {"results_in_place": r % 2 == 1} for r in range(4)]
        w.a2a = [moe.AllToAll(e, e.group(w.addresses), **sizes[r]) for r, e in enumerate(w.engines)]
        await w.every(rank)

    world(4, script, net=MESSY, direct=True)


@pytest.mark.asyncio
async def test_over_shared_memory_a_combine_moves_no_bytes() -> None:
    async with at.open_engine(providers="shm") as left, at.open_engine(providers="shm") as right:
        addresses = [str(left.address), str(right.address)]
        moved: list[int] = []

        async def rank(engine: at.Engine) -> None:
            async with moe.AllToAll(engine, engine.group(addresses), **(SIZES | {"results_in_place": True})) as a2a:
                for _ in range(4):
                    d = await a2a.dispatch(*FULL)
                    d.y[:] = d.x * 3
                    await asyncio.sleep(0.05)  # the rows of the dispatch are through
                    before = engine.statistics().bytes_written
                    assert (await a2a.combine(d.y, d.handle) == 3).all()
                    moved.append(engine.statistics().bytes_written - before)

        await asyncio.gather(rank(left), rank(right))
        assert moved == [0] * 8


def slowly(monkeypatch: pytest.MonkeyPatch, rank: int, seconds: float) -> None:
    """Rank `rank` takes long before it sums what is there."""
    whole = moe.step.handle.CombineHalf._weigh

    async def weigh(self: Any, *arguments: Any) -> None:
        if self.handle._step.ranks.rank == rank:
            await asyncio.sleep(seconds)
        await whole(self, *arguments)

    monkeypatch.setattr(moe.step.handle.CombineHalf, "_weigh", weigh)


def test_who_leaves_waits_for_those_that_read(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 1, 0.005)

    async def rank(a2a: moe.AllToAll) -> None:
        async with a2a:
            await steps(a2a, 3)  # nothing is dropped, of the last one either

    async def script(w: World) -> None:
        await w.every(rank)

    world(4, script, **IN_PLACE)


def test_who_leaves_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 1, 0.05)

    async def rank(a2a: moe.AllToAll) -> Any:
        d = await a2a.dispatch(*FULL)
        d.y[:] = d.x * 3
        out = await a2a.combine(d.y, d.handle)
        await a2a.aclose()
        return out, d.handle

    async def script(w: World) -> None:
        _, (out, handle) = await w.every(rank)
        assert w.net.now < 0.3
        assert handle.lost == (0,)
        assert handle.dropped.tolist() == [[True], [False]]
        assert (out == np.array([[0.0], [3.0]])).all()

    world(2, script, **IN_PLACE)  # drain_timeout is 0.01


@pytest.mark.parametrize("late", [0, 0.005, 0.05])
def test_results_that_were_taken_back_while_they_were_read_are_dropped_and_their_rank_is_named(
    late: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`late`: the right to read them ends only so long after its reader was given up."""
    slowly(monkeypatch, 1, 0.02)
    fence = Losses._fence

    async def fence_late(self: Losses, *arguments: Any) -> None:
        await asyncio.sleep(late)
        await fence(self, *arguments)

    monkeypatch.setattr(Losses, "_fence", fence_late)

    async def owner(a2a: moe.AllToAll) -> None:
        d = await a2a.dispatch(*FULL)
        d.y[:] = d.x * 3
        await a2a.combine(d.y, d.handle)
        a2a.evict(1)
        for _ in range(3):  # alone, in the same memory
            d = await a2a.dispatch(FULL.x, np.zeros_like(FULL.idx), FULL.weights)
            d.y[:] = -7
            await a2a.combine(d.y, d.handle)

    async def reader(a2a: moe.AllToAll) -> None:
        d = await a2a.dispatch(*FULL)
        d.y[:] = d.x * 3
        out = await a2a.combine(d.y, d.handle)
        dropped = late < 0.02  # before it was read
        assert out.tolist() == [[0.0 if dropped else 3.0] * HIDDEN, [3.0] * HIDDEN]
        assert d.handle.dropped.tolist() == [[dropped], [False]]
        assert d.handle.lost == (0,) or not dropped

    async def script(w: World) -> None:
        await asyncio.gather(owner(w.a2a[0]), reader(w.a2a[1]))

    world(2, script, **IN_PLACE)


OWNER = """
import asyncio, sys
import aiotransfer as at
from tests.moe.step.test_inplace import FULL, SIZES
from aiotransfer import moe

async def main():
    async with at.open_engine(providers="shm") as engine:
        print(engine.address, flush=True)
        addresses = [str(engine.address), sys.stdin.readline().strip()]
        a2a = await moe.AllToAll(engine, engine.group(addresses), **(SIZES | {"results_in_place": True}))
        d = await a2a.dispatch(*FULL)
        d.y[:] = d.x * 3
        await a2a.combine_send(d.y, d.handle)
        await asyncio.sleep(0.3)  # that it is told, too
        print("told", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.asyncio
async def test_who_is_killed_has_left_his_results() -> None:
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, **pipes)
    try:
        assert owner.stdin is not None
        assert owner.stdout is not None
        async with at.open_engine(providers="shm") as engine:
            addresses = [(await owner.stdout.readline()).decode().strip(), str(engine.address)]
            owner.stdin.write(f"{engine.address}\n".encode())
            a2a = await moe.AllToAll(engine, engine.group(addresses), **(SIZES | {"results_in_place": True}))
            d = await a2a.dispatch(*FULL)
            d.y[:] = d.x * 3
            half = await a2a.combine_send(d.y, d.handle)
            assert await owner.stdout.readline() == b"told\n"
            owner.kill()
            await owner.wait()
            assert (await half.receive(timeout=10) == 3).all()
            assert not d.handle.dropped.any()
            await a2a.aclose()
    finally:
        if owner.returncode is None:
            owner.kill()
            await owner.wait()


def test_a_combine_that_was_cut_off_goes_on() -> None:
    async def rank(a2a: moe.AllToAll) -> None:
        d = await a2a.dispatch(*FULL)
        d.y[:] = d.x * 3
        if a2a.rank == 1:
            await asyncio.sleep(0.02)
        with_deadline = a2a.combine(d.y, d.handle, timeout=1e-3 if a2a.rank == 0 else None)
        try:
            out = await with_deadline
            assert a2a.rank == 1
        except at.TransferTimeout:
            out = await a2a.resume(d.handle).receive()
        assert (out == 3).all()

    async def script(w: World) -> None:
        await w.every(rank)

    world(2, script, **IN_PLACE)


def test_a_goodbye_to_an_earlier_one_of_this_rank_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 1, 0.005)

    async def rank(a2a: moe.AllToAll) -> None:
        async with a2a:
            ranks = a2a._ranks
            if a2a.rank == 1:
                mine, of = ranks.incarnation, ranks.known[0].incarnation + 2
                late = messages.Leave(rank=1, incarnation=mine, who=0, of=of, upto=0, reason="late", present=[])
                ranks.send(0, late)
            d = await a2a.dispatch(*FULL)
            d.y[:] = d.x * 3
            assert (await a2a.combine(d.y, d.handle) == 3).all()
            assert not d.handle.dropped.any()

    async def script(w: World) -> None:
        await w.every(rank)

    world(2, script, **IN_PLACE)


def test_an_aclose_that_is_cancelled_leaves_the_name_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 1, 0.3)

    async def script(w: World) -> None:
        async def last(a2a: moe.AllToAll) -> None:
            d = await a2a.dispatch(*FULL)
            await a2a.combine(d.y, d.handle)

        reading = asyncio.create_task(last(w.a2a[1]))
        await last(w.a2a[0])
        closing = asyncio.create_task(w.a2a[0].aclose())
        second = asyncio.create_task(w.a2a[0].aclose())
        await asyncio.sleep(0.001)
        assert not closing.done()
        closing.cancel()
        await asyncio.wait([closing, second])
        assert closing.cancelled()
        assert second.exception() is None
        await reading
        await w.a2a[1].aclose()
        w.a2a = [moe.AllToAll(engine, engine.group(w.addresses), **w.sizes) for engine in w.engines]
        await w.every(lambda a2a: a2a.ready(timeout=0.5))

    world(2, script, **IN_PLACE)


def test_who_was_never_read_leaves_at_once() -> None:
    async def script(w: World) -> None:
        with pytest.raises(at.TransferTimeout):
            await w.a2a[0].ready(timeout=0.01)
        before = w.net.now
        await w.a2a[0].aclose()
        assert w.net.now - before < 0.001

    world(2, script, **IN_PLACE)


@pytest.mark.asyncio
async def test_whoever_finds_everything_there_gives_the_loop_its_turns() -> None:
    """Rank 1 computes in its loop, so the other one, in a thread, waits for it, and it for nobody."""
    ended: list[float] = []

    async def rank(engine: at.Engine, addresses: list[str], seconds: float) -> None:
        async with moe.AllToAll(engine, engine.group(addresses), **SIZES) as a2a:
            for _ in range(100):
                time.sleep(seconds)
                d = await a2a.dispatch(*FULL)
                time.sleep(seconds)
                await a2a.combine(d.x, d.handle)

    async def count() -> None:
        while True:
            await asyncio.sleep(0)
            ended.append(time.monotonic())

    async with at.open_engine(providers="shm") as engine:
        with at.run_in_thread(providers="shm") as thread:
            addresses = [str(thread.engine.address), str(engine.address)]
            other = asyncio.create_task(asyncio.to_thread(thread.run, rank(thread.engine, addresses, 0)))
            counting = asyncio.create_task(count())
            began = time.monotonic()
            await rank(engine, addresses, 0.005)
            counting.cancel()
            await other
    pauses = np.diff([began, *ended])
    assert pauses.max() < pauses.sum() / 2  # without them it is all but the whole


def test_results_in_memory_that_could_not_be_mapped_are_an_error_and_not_just_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotransfer.moe.step.inplace.mapped", lambda engine, region: None)

    async def rank(a2a: moe.AllToAll) -> None:
        d = await a2a.dispatch(*FULL)
        with pytest.raises(at.RegistrationError, match=r"results of rank \d .* could not be mapped"):
            await a2a.combine(d.y, d.handle)

    async def script(w: World) -> None:
        await w.every(rank)

    world(2, script, **IN_PLACE)


def test_where_results_lie_is_no_negative_number() -> None:
    hello = messages.Hello(1, 1, {}, b"", direct=True, reads=True, computed=-4096, running=False, ask=False, present=[], to=0)
    key = messages.prefix("", "")
    with pytest.raises(at.DescriptorError):
        messages.decode(key, messages.encode(key, hello))


def test_what_is_wrong_is_refused() -> None:
    async def script(w: World) -> None:
        with pytest.raises(TypeError, match="results_in_place is True or False, not 1"):
            moe.AllToAll(w.engines[0], w.engines[0].group(w.addresses), **(SIZES | {"results_in_place": 1}))
        (a2a,) = w.a2a
        many = Batch(np.ones((3, HIDDEN), np.float32), np.array([[0], [1], [2]]), np.ones((3, 1), np.float32))
        d = await a2a.dispatch(*many)
        shifted = np.lib.stride_tricks.as_strided(d.y[1:], d.y.shape, d.y.strides)
        with pytest.raises(ValueError, match="overlap"):
            await a2a.combine(shifted, d.handle)
        with pytest.raises(ValueError, match="out lies where other ranks read"):
            await a2a.combine(d.y, d.handle, out=d.y)
        d.y[:] = d.x
        assert (await a2a.combine(d.y, d.handle) == 1).all()

    world(1, script, **IN_PLACE)
