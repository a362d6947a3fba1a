"""A deadline names who has not come, and no rank that only waits for that one itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.errors import DescriptorError
from aiotransfer.moe.communicator.ranks import FIRST, REST, RESULTS
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.waits import BEGIN, Wait, culprits
from tests.moe.world import Batch, World, batch, compute, step, world

SLOW = {"timeout": 2}


@pytest.mark.parametrize(("wait", "others", "expected"), [
    (Wait(5, FIRST, [1]), {}, {1: (5, FIRST)}),
    (Wait(5, FIRST, [1, 2]), {1: [Wait(4, RESULTS, [2])]}, {2: (4, RESULTS)}),
    (Wait(5, RESULTS, [1]), {1: [Wait(5, FIRST, [2])], 2: [Wait(4, RESULTS, [3])]}, {3: (4, RESULTS)}),
    (Wait(5, REST, [1]), {1: [Wait(5, BEGIN, [2])]}, {2: (5, BEGIN)}),
    # It waits for nothing that comes before, and so owes what is waited for.
    (Wait(5, FIRST, [1]), {1: [Wait(5, FIRST, [2])]}, {1: (5, FIRST)}),
    (Wait(5, FIRST, [1]), {1: [Wait(6, FIRST, [2])]}, {1: (5, FIRST)}),
    (Wait(5, FIRST, [1]), {1: [Wait(4, RESULTS, [])]}, {1: (5, FIRST)}),
    # The rank that asks left something out.
    (Wait(5, FIRST, [1, 2]), {r: [Wait(4, RESULTS, [0])] for r in (1, 2)} | {0: [Wait(5, FIRST, [1, 2])]}, {0: (4, RESULTS)}),
    # Two who blame each other cannot both be right: who is waited for at the earlier place has not come.
    (Wait(9, FIRST, [1]), {1: [Wait(8, FIRST, [2])], 2: [Wait(8, RESULTS, [1])]}, {2: (8, FIRST)}),
])  # fmt: skip
def test_who_waits_for_an_earlier_part_is_not_to_blame(
    wait: Wait, others: dict[int, list[Wait]], expected: dict[int, tuple[int, int]]
) -> None:
    assert {rank: wait.place for rank, wait in culprits(0, wait, others).items()} == expected


def test_any_tangle_of_waits_has_an_end_and_somebody_to_blame() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        ranks = int(rng.integers(2, 20))

        def one(ranks: int = ranks) -> Wait:
            step, kind, some = rng.integers(0, 4), rng.integers(-1, 3), rng.integers(0, ranks, rng.integers(1, ranks + 1))
            return Wait(int(step), int(kind), sorted({int(rank) for rank in some}))

        others = {rank: [one() for _ in range(rng.integers(0, 4))] for rank in range(ranks)}
        wait = one()
        found = culprits(0, wait, others)
        assert found
        for rank, vain in found.items():
            assert vain.place <= wait.place
            assert not [other for other in others[rank] if other.place < vain.place]


Rank = Callable[[moe.AllToAll, Batch], Awaitable[tuple[int, ...]]]


async def _named(work: Awaitable[Any], ranks: int) -> tuple[int, ...]:
    """Whom the timeout of `work` names; the text names nobody else."""
    with pytest.raises(at.TransferTimeout) as caught:
        await work
    named: tuple[int, ...] = caught.value.ranks
    assert [rank for rank in range(ranks) if f"rank {rank}" in str(caught.value)] == sorted(named), str(caught.value)
    return named


def every(ranks: int, rank: Rank, **sizes: Any) -> list[tuple[int, ...]]:
    """Whom each rank names, after a step that went well."""

    async def script(w: World) -> list[tuple[int, ...]]:
        async def one(a2a: moe.AllToAll) -> tuple[int, ...]:
            b = batch(np.random.default_rng(a2a.rank), 4)
            await step(a2a, b)
            return await rank(a2a, b)

        found = await w.every(one)
        await asyncio.gather(*(a2a.aclose() for a2a in w.a2a))
        return found

    named: list[tuple[int, ...]] = world(ranks, script, **SLOW, **sizes)
    return named


@pytest.mark.parametrize("sizes", [{}, {"direct": False}, {"results_in_place": True}])
def test_a_rank_that_leaves_out_its_combine_is_named_by_all_and_by_itself(sizes: dict[str, Any]) -> None:
    async def rank(a2a: moe.AllToAll, b: Batch) -> tuple[int, ...]:
        d = await a2a.dispatch(*b)
        if a2a.rank == 1:
            return await _named(a2a.dispatch(*b), 4)
        return await _named(a2a.combine(compute(d, a2a.rank), d.handle), 4)

    assert every(4, rank, **sizes) == [(1,)] * 4


def test_its_own_hint_says_which_combine_is_missing() -> None:
    async def rank(a2a: moe.AllToAll, b: Batch) -> tuple[int, ...]:
        d = await a2a.dispatch(*b)
        with pytest.raises(at.TransferTimeout) as caught:
            await (a2a.dispatch(*b) if a2a.rank == 1 else a2a.combine(compute(d, a2a.rank), d.handle))
        if a2a.rank == 1:
            assert "not heard of: rank 1, which is this one with the results of step 1" in str(caught.value)
            assert "call combine for step 1 first" in str(caught.value)
        return ()

    every(4, rank)


def test_who_is_a_step_ahead_names_the_rank_for_which_the_others_wait() -> None:
    """Rank 2 has sent its part of the next step; rank 0 has not, because it still waits for rank 1."""

    async def rank(a2a: moe.AllToAll, b: Batch) -> tuple[int, ...]:
        d = await a2a.dispatch(*b)
        if a2a.rank == 1:
            await asyncio.sleep(5)
            return (1,)
        if a2a.rank != 2:
            return await _named(a2a.combine(compute(d, a2a.rank), d.handle), 4)
        await a2a.combine_send(compute(d, a2a.rank), d.handle)
        half = await a2a.dispatch_send(*b)
        return await _named(half.receive(), 4)

    assert every(4, rank) == [(1,)] * 4


def test_a_rank_that_sleeps_is_named_and_those_that_come_late_are_not() -> None:
    async def rank(a2a: moe.AllToAll, b: Batch) -> tuple[int, ...]:
        if a2a.rank == 1:
            await asyncio.sleep(5)
            return (1,)
        await asyncio.sleep(0.1 * a2a.rank)
        return await _named(a2a.dispatch(*b), 4)

    assert every(4, rank) == [(1,)] * 4


@pytest.mark.parametrize(
    "waits", [[(0, 3, [])], [(0, -2, [])], [(-1, 0, [])], [(0, 0, [-1])], [(0, 0, [])] * 65, [(0, 0, "x")], 7]
)
def test_waits_that_cannot_be_are_not_read(waits: Any) -> None:
    key = messages.prefix("", "")
    good = msgspec.msgpack.encode([9, 1, 5, True, [(0, 0, [0])]])
    assert messages.decode(key, key + good) == messages.Waits(rank=1, incarnation=5, ask=True, waits=[(0, 0, [0])])
    with pytest.raises(DescriptorError):
        messages.decode(key, key + msgspec.msgpack.encode([9, 1, 5, True, waits]))
