"""How much may wait for one peer: what is more is refused, but never one operation alone, and also while nothing is bound yet."""

from __future__ import annotations

from typing import Any

import pytest

import aiotransfer as at
from aiotransfer.testing import engine_pair

pytestmark = pytest.mark.asyncio
MOST = 1 << 20


def bounded() -> Any:
    return engine_pair("shm", timeout=30, progress="loop", config=at.Config(max_queued_operations=4, max_queued_bytes=MOST))


async def test_an_operation_larger_than_the_bound_is_taken_when_nothing_waits() -> None:
    async with bounded() as pair:
        source, target = pair.left.allocate(4 * MOST), pair.right.allocate(4 * MOST)
        source.numpy()[:] = 7
        pair.right.publish("target", target)
        remote = await pair.right_peer.lookup("target")
        await pair.left.write(source, remote)
        await pair.left.write_pages(source, [0, 1], remote, [0, 1], page_bytes=2 * MOST)
        assert (target.numpy() == 7).all()


async def test_operations_on_memory_that_is_not_bound_yet_are_bounded() -> None:
    async with bounded() as pair:
        source, remote = pair.left.allocate(64), pair.right.allocate(64).descriptor
        waiting = [pair.left.write(source, remote) for _ in range(4)]
        with pytest.raises(at.BusyError, match="4 operations"):
            pair.left.write(source, remote)
        waiting[0].cancel()
        await at.wait_all(waiting[1:])
        await pair.left.write(source, pair.right.allocate(64).descriptor)  # there is room again, also for what was cancelled


async def test_bytes_for_memory_that_is_not_bound_yet_are_bounded() -> None:
    async with bounded() as pair:
        source, remote = pair.left.allocate(2 * MOST), pair.right.allocate(2 * MOST).descriptor
        first = pair.left.write(source, remote)
        with pytest.raises(at.BusyError):
            pair.left.write(source, remote)
        await first
