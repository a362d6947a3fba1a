"""Memory for tails: shared regions, used again, given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aiotransfer as at
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.kv.roles.tails import HEADER_BYTES, MOST_KEPT, TailPool
from tests.kv.party import cache_of, party

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def slots() -> AsyncIterator[TailPool]:
    async with at.open_engine() as engine:
        found = TailPool(engine)
        yield found
        found.close()


def regions(slots: TailPool) -> set[at.Region]:
    return {region for shelves in slots._shelves.values() for region in shelves}


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 65536 + 16, 40 << 20])
async def test_a_slot_is_large_enough_and_its_header_is_zero(slots: TailPool, nbytes: int) -> None:
    for _ in range(2):
        slot = slots.take(nbytes)
        assert slot.nbytes >= nbytes
        memory = memory_of(slot)
        assert len(memory) == slot.nbytes
        assert not memory[:HEADER_BYTES].any()
        memory[:] = 0xFF
        slots.give(slot)


async def test_slots_that_are_taken_do_not_overlap(slots: TailPool) -> None:
    taken = [slots.take(5000) for _ in range(300)]
    for number, slot in enumerate(taken):
        memory_of(slot).view("u4")[:] = number
    assert all((memory_of(slot).view("u4") == number).all() for number, slot in enumerate(taken))
    for slot in taken:
        slots.give(slot)


async def test_a_thousand_take_a_few_regions_and_most_of_those_are_given_back(slots: TailPool) -> None:
    taken = [slots.take((64 << 10) + 16) for _ in range(1000)]
    assert len(regions(slots)) <= 16
    used = regions(slots)
    for slot in taken:
        slots.give(slot)
    kept = regions(slots)
    assert kept
    assert sum(region.nbytes for region in kept) <= 2 * MOST_KEPT * (128 << 10) + (16 << 20)
    assert all(region.closed for region in used - kept)


async def test_the_next_request_gets_memory_that_is_there(slots: TailPool) -> None:
    for _ in range(50):
        slots.give(slots.take(100))
    assert len(regions(slots)) == 1


async def test_at_the_end_what_is_taken_stays_until_it_is_given(slots: TailPool) -> None:
    held, other = slots.take(100), slots.take(1 << 20)
    (small, large) = (held._root, other._root)
    slots.give(other)
    slots.close()
    assert large.closed
    assert not small.closed
    slots.give(held)
    assert small.closed


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(turns=st.lists(st.tuples(st.booleans(), st.sampled_from([1, 5000, 300_000]), st.integers(0, 99)), max_size=120))
async def test_any_row_of_taking_and_giving_keeps_account(slots: TailPool, turns: list[tuple[bool, int, int]]) -> None:
    taken: list[Any] = []
    for take, nbytes, which in turns:
        if take or not taken:
            taken.append(slots.take(nbytes))
        else:
            slots.give(taken.pop(which % len(taken)))
        free = sum(len(shelf.free) for shelves in slots._shelves.values() for shelf in shelves.values())
        count = sum(shelf.count for shelves in slots._shelves.values() for shelf in shelves.values())
        assert count - free == len(taken)
    for slot in taken:
        slots.give(slot)


async def test_a_tail_may_be_as_long_as_the_decoder_says_and_belongs_to_its_request() -> None:
    async with party(options={"tail_bytes": 100_000}) as both:
        for number, length in enumerate((100_000, 0, 1, 4080, 99_999)):
            tail = bytes([number + 1]) * length
            serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2], tail))
            async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
                assert (await handle.arrived(timeout=10)).tail == tail
            await serving
        assert len(regions(both.decoder.tails)) == 1
