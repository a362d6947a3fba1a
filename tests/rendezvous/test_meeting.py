"""Engines meet over a store: who is missing is named, what is old is told apart, and no thread stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator

import pytest

import aiotransfer as at
from aiotransfer import rendezvous
from tests.rendezvous.stores import CheckedStore, DictStore, StuckStore


@contextlib.asynccontextmanager
async def engines(count: int, **options: object) -> AsyncIterator[list[at.Engine]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(at.open_engine(timeout=10, **options)) for _ in range(count)]  # type: ignore[arg-type]


async def meet(members: list[at.Engine], store: rendezvous.Store, **options: float) -> list[list[str]]:
    meetings = (rendezvous.over_store(engine, store, rank, len(members), **options) for rank, engine in enumerate(members))  # type: ignore[arg-type]
    return await asyncio.gather(*meetings)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [DictStore, CheckedStore])
async def test_every_rank_gets_all_addresses_in_order_and_a_group(kind: type[DictStore]) -> None:
    async with engines(3) as members:
        found = await meet(members, kind())
        assert found == [[str(engine.address) for engine in members]] * 3
        groups = await asyncio.gather(*(rendezvous.from_list(engine, found[0]) for engine in members))
        assert [group.rank for group in groups] == [0, 1, 2]
        assert all(peer is not None and peer.state == "up" for peer in groups[0].peers[1:])


@pytest.mark.asyncio
async def test_a_rank_that_does_not_come_is_named_within_the_deadline() -> None:
    async with engines(2) as members:
        store = CheckedStore()
        start = asyncio.get_running_loop().time()
        found = await asyncio.gather(
            *(rendezvous.over_store(engine, store, rank, 4, timeout=0.3) for engine, rank in zip(members, (0, 2), strict=True)),
            return_exceptions=True,
        )
        assert asyncio.get_running_loop().time() - start < 10, "the engine's deadline, and not the one that was given"
        for error in found:
            assert isinstance(error, at.RendezvousError)
            assert "ranks 1, 3 of 4 did not come within 0.3 s" in str(error)


@pytest.mark.asyncio
async def test_entries_of_an_earlier_start_are_not_taken_for_members() -> None:
    store = CheckedStore()
    async with engines(3) as old:
        before = await meet(old, store)
    async with engines(3) as new:
        first = [asyncio.create_task(rendezvous.over_store(new[rank], store, rank, 3)) for rank in (0, 2)]
        await asyncio.sleep(0.1)  # all three keys are there, one of them old
        assert not any(task.done() for task in first)
        last = await rendezvous.over_store(new[1], store, 1, 3)
        assert [await task for task in first] == [last, last]
        assert last == [str(engine.address) for engine in new] != before[0]


@pytest.mark.asyncio
async def test_the_same_engines_meet_again_in_the_same_store() -> None:
    async with engines(2) as members:
        store = CheckedStore()
        assert await meet(members, store) == await meet(members, store)


@pytest.mark.asyncio
async def test_a_rank_that_left_only_an_old_entry_is_named() -> None:
    store = CheckedStore()
    async with engines(2) as old:
        await meet(old, store)
    async with engines(1) as (new,):
        with pytest.raises(at.RendezvousError, match="rank 1 of 2 did not come, or did not agree"):
            await rendezvous.over_store(new, store, 0, 2, timeout=0.2)


@pytest.mark.parametrize("kind", [DictStore, CheckedStore])
@pytest.mark.parametrize("first", ["refused", "waiting"])
@pytest.mark.asyncio
async def test_a_rank_that_cannot_be_reached_is_refused_at_once_and_the_others_are_told(
    kind: type[DictStore], first: str
) -> None:
    """Without a deadline: who waited for it would hang. The mended rank meets the others in the same store."""
    store = kind()
    async with engines(2) as (zero, two), at.open_engine(listen="0.0.0.0:0") as everywhere:

        async def wait_for_it() -> None:
            async def one(engine: at.Engine, rank: int) -> None:
                with pytest.raises(at.RendezvousError, match=r"rank 1 cannot take part: .*0\.0\.0\.0:\d+ is where"):
                    await rendezvous.over_store(engine, store, rank, 3, timeout=math.inf)

            await asyncio.gather(one(zero, 0), one(two, 2))

        async def refused() -> None:
            with pytest.raises(at.ConfigurationError, match="no address that others could connect to"):
                await rendezvous.over_store(everywhere, store, 1, 3, timeout=math.inf)

        for _ in range(2):  # the second time the store holds what was said before
            if first == "refused":
                await refused()
                await wait_for_it()
            else:
                waiting = asyncio.create_task(wait_for_it())
                await asyncio.sleep(0.05)
                assert not waiting.done()
                await refused()
                await waiting
        async with engines(1) as (one,):
            early = [asyncio.create_task(rendezvous.over_store(e, store, r, 3)) for e, r in ((zero, 0), (two, 2))]
            await asyncio.sleep(0.05)  # the refusal of before is still there, and stands for nothing any more
            there = await rendezvous.over_store(one, store, 1, 3)
            assert [await task for task in early] == [there, there]


@pytest.mark.asyncio
async def test_what_somebody_else_wrote_where_refusals_stand_is_not_one() -> None:
    store = CheckedStore()
    async with engines(2) as members:
        for junk in (b"", b"1", b"7", b"-1", b"9" * 100, b"\xff"):
            store.set("aiotransfer/refused", junk)
            assert len(await meet(members, store)) == 2


@pytest.mark.asyncio
async def test_a_cancelled_rank_leaves_no_thread_in_the_store_and_may_come_again() -> None:
    async with engines(2) as members:
        store = DictStore()
        task = asyncio.create_task(rendezvous.over_store(members[0], store, 0, 2))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(30):  # it may be inside a call of the store
            while any(thread.name == "aiotransfer-rendezvous" and thread.is_alive() for thread in threading.enumerate()):
                await asyncio.sleep(0.01)
        assert len(await meet(members, store)) == 2


@pytest.mark.asyncio
async def test_a_store_that_never_answers_blocks_neither_the_loop_nor_the_deadline() -> None:
    async with engines(1) as (engine,):
        store = StuckStore()
        try:
            task = asyncio.create_task(rendezvous.over_store(engine, store, 0, 1, timeout=0.1))
            await asyncio.to_thread(store.inside.wait)
            turns = 0
            while not task.done():
                await asyncio.sleep(0.01)
                turns += 1
            assert turns > 10
            with pytest.raises(at.RendezvousError, match="does not answer"):
                await task
        finally:
            store.release.set()
            for thread in threading.enumerate():
                if thread.name == "aiotransfer-rendezvous":
                    thread.join()


@pytest.mark.asyncio
async def test_a_broken_store_is_an_error_with_its_words() -> None:
    class Broken(CheckedStore):
        def set(self, key: str, value: object) -> None:
            raise ConnectionResetError("gone")

    async with engines(1) as (engine,):
        with pytest.raises(at.RendezvousError, match="ConnectionResetError: gone"):
            await rendezvous.over_store(engine, Broken(), 0, 1)


@pytest.mark.asyncio
async def test_a_list_that_does_not_name_this_engine_is_refused() -> None:
    async with engines(1) as (engine,):
        with pytest.raises(ValueError, match="not among the members"):
            await rendezvous.from_list(engine, ["127.0.0.1:1"])
        assert len(await rendezvous.from_list(engine, [engine.address])) == 1


def test_a_rank_alone_on_its_host_listens_on_loopback_and_a_far_master_is_reached_by_a_route() -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert rendezvous.listen_address({}) == rendezvous.listen_address(torchrun) == "127.0.0.1:0"
    assert rendezvous.listen_address(torchrun | {"MASTER_ADDR": "127.0.0.2"}) == "127.0.0.1:0"
    with pytest.raises(at.ConfigurationError, match="MASTER_ADDR"):
        rendezvous.listen_address(torchrun | {"MASTER_ADDR": "no-such-host.invalid"})
