"""Memory for received tensors: when a block is used again, and how much is kept idle."""

from __future__ import annotations

import asyncio
import gc

import numpy as np
import pytest

from aiotransfer.integrations.ray import pool as pools
from aiotransfer.integrations.ray.pool import LEAST_BYTES, Pool, rounded
from aiotransfer.testing import Pair

MIB = 1 << 20


async def turns() -> None:
    """What was handed to the loop runs."""
    gc.collect()
    for _ in range(3):
        await asyncio.sleep(0)


def made(pair: Pair) -> Pool:
    return Pool(pair.left, asyncio.get_running_loop())


@pytest.mark.asyncio
async def test_a_block_is_used_again_when_the_last_array_over_it_is_gone(pair: Pair) -> None:
    pool = made(pair)
    first, second = pool.take(4 * MIB).arrays([(0, 100), (128, 2 * MIB)])
    address = first.__array_interface__["data"][0]
    part = second[5:10].view(np.uint8)
    del first, second
    await turns()
    assert (pool.used_bytes, pool.idle_bytes) == (4 * MIB, 0)
    del part
    await turns()
    assert (pool.used_bytes, pool.idle_bytes) == (0, 4 * MIB)
    (again,) = pool.take(4 * MIB).arrays([(0, 8)])
    assert again.__array_interface__["data"][0] == address
    assert (pool.used_bytes, pool.idle_bytes) == (4 * MIB, 0)
    del again
    await turns()
    pool.close()
    assert (pool.used_bytes, pool.idle_bytes) == (0, 0)


@pytest.mark.asyncio
async def test_two_arrays_never_share_memory(pair: Pair) -> None:
    pool = made(pair)
    kept = [pool.take(MIB).arrays([(0, MIB)])[0] for _ in range(5)]
    for number, array in enumerate(kept):
        array[:] = number
    assert [int(array.min()) == int(array.max()) == number for number, array in enumerate(kept)] == [True] * 5
    assert pool.used_bytes == 5 * MIB
    pool.close()


@pytest.mark.asyncio
async def test_small_memory_is_not_kept(pair: Pair) -> None:
    pool = made(pair)
    array = pool.take(LEAST_BYTES - 1).arrays([(0, 3)])[0]
    assert pool.used_bytes == LEAST_BYTES - 1
    del array
    await turns()
    assert (pool.used_bytes, pool.idle_bytes) == (0, 0)
    pool.close()


@pytest.mark.asyncio
async def test_idle_blocks_are_bounded_and_the_oldest_goes_first(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "IDLE_BYTES", 6 * MIB)
    pool = made(pair)
    taken = [pool.take(size * MIB).arrays([(0, 1)])[0] for size in (3, 2, 4, 7)]
    while taken:
        taken.pop(0)
        await turns()
    assert pool.used_bytes == 0
    assert pool.idle_bytes == 6 * MIB  # 2 and 4: 3 was the oldest, and 7 alone is more than may be kept
    pool.close()


@pytest.mark.asyncio
async def test_idle_blocks_are_let_go_after_a_while(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "IDLE_SECONDS", 0.01)
    pool = made(pair)
    regions = len(pair.left._regions)
    pool.take(2 * MIB)
    await turns()
    deadline = asyncio.get_running_loop().time() + 20
    while pool.idle_bytes and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.005)
    assert pool.idle_bytes == 0
    assert len(pair.left._regions) == regions
    pool.close()


@pytest.mark.asyncio
async def test_a_block_that_may_still_be_written_into_is_not_used_again(pair: Pair) -> None:
    pool = made(pair)
    pool.take(2 * MIB).end(in_use=True)
    await turns()
    assert (pool.used_bytes, pool.idle_bytes) == (0, 0)
    pool.take(2 * MIB).end(in_use=False)
    await turns()
    assert (pool.used_bytes, pool.idle_bytes) == (0, 2 * MIB)
    pool.close()


def test_sizes_of_blocks_are_few_and_not_much_larger() -> None:
    sizes = {rounded(nbytes) for nbytes in range(MIB, 64 * MIB, 4097)}
    assert len(sizes) < 80
    for nbytes in (MIB, MIB + 1, 5 * MIB - 1, 1 << 30, (1 << 30) + 1):
        assert nbytes <= rounded(nbytes) <= nbytes * 1.13
    assert rounded(1 << 30) == 1 << 30
