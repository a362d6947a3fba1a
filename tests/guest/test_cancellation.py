"""Cancellation and deadlines over verbs: when the await has ended the source is ours, whatever the NIC still had to read."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

import aiotransfer as at
from tests.guest.test_verbs import cable
from tests.needs import needs_verbs

pytestmark = [pytest.mark.asyncio, *needs_verbs()]
N, PAGE, IMM, POISON = 2 << 20, 4096, 7, 0xA5
ROUNDS = 4
PAGES = list(range(N // PAGE))
Operation = Callable[[at.Engine, at.Region, at.RemoteRegion, float | None], at.Transfer]
OPERATIONS: dict[str, tuple[Operation, int]] = {  # and how many it counts
    "write": (lambda e, s, r, t: e.write(s, r, imm=IMM, timeout=t), 1),
    "pages": (lambda e, s, r, t: e.write_pages(s, PAGES, r, PAGES[::-1], page_bytes=PAGE, imm=IMM, timeout=t), len(PAGES)),
    "scatter": (lambda e, s, r, t: e.scatter(s, [_eighth(r, i) for i in range(8)], imm=IMM, timeout=t), 8),
}


def _eighth(remote: at.RemoteRegion, i: int) -> at.ScatterTarget:
    return at.ScatterTarget(i * N // 8, N // 8, remote[i * N // 8 : (i + 1) * N // 8])


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_the_source_is_free_when_the_await_has_ended(operation: str, how: str) -> None:
    begin, units = OPERATIONS[operation]
    async with cable() as pair:
        target, source, counter = pair.right.allocate(N), pair.left.allocate(N), pair.right.counter(imm=IMM)
        pair.right.publish("target", target)
        remote = await pair.right_peer.lookup("target")
        source.numpy()[:] = 1
        await pair.left.write(source, remote)
        whole = 0
        for _ in range(ROUNDS):
            source.numpy()[:] = 1
            delay = random.uniform(0, 0.1)
            transfer = asyncio.ensure_future(_awaited(begin(pair.left, source, remote, delay if how == "deadline" else None)))
            if how == "cancelled":
                await asyncio.sleep(delay)
                transfer.cancel()
            with suppress(asyncio.CancelledError, at.TransferError):
                await transfer
                whole += 1
            source.numpy()[:] = POISON
            await asyncio.sleep(0.05)
            assert (target.numpy() == 1).all(), "it was read after its await had ended"
        assert whole * units <= counter.total <= ROUNDS * units
        before = counter.total
        source.numpy()[:] = 2
        await begin(pair.left, source, remote, None)
        async with asyncio.timeout(20):
            while counter.total < before + units:
                await asyncio.sleep(0.01)
        assert counter.total == before + units
        assert np.array_equal(target.numpy(), source.numpy())
        assert pair.left.statistics().pending_operations == 0


async def _awaited(transfer: at.Transfer) -> None:
    await transfer
