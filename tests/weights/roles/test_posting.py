"""Where a rank's writes are cut into native calls, and when they are prepared anew."""

from __future__ import annotations

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.weights.planning.tasks import Writes
from aiotransfer.weights.roles import posting
from aiotransfer.weights.roles.posting import MOST_SMALL, SMALL, Posting, Prepared, _edges

N = 1 << 12


def writes(sources: list[int], nbytes: int = 64) -> Writes:
    """One call: row i goes to byte 64 * i of buffer i % 2."""
    n = len(sources)
    zero, numbers = np.zeros(n, np.int64), np.arange(n)
    return Writes(zero, zero, zero - 1, zero, np.array(sources), numbers * 64, numbers % 2 + 5, numbers * 64, zero + nbytes)


@pytest.mark.parametrize(("sizes", "most", "edges"), [
    ([1] * 10, 1e9, [0, 4, 8, 10]), ([100, 100, 100], 200, [0, 2, 3]), ([500, 1, 500], 10, [0, 1, 2, 3]),
    ([SMALL] * 3, 1e9, [0, 3]), ([MOST_SMALL * 9] * 3, 1e18, [0, 3]), ([], 5, [0]), ([0] * 9, 1, [0, 4, 8, 9]),
])  # fmt: skip
def test_calls_are_cut_by_writes_and_bytes_and_no_write_is(sizes: list[int], most: float, edges: list[int]) -> None:
    assert _edges(np.array(sizes, np.int64), 4, most) == edges


def test_many_small_writes_which_hold_the_loop_are_cut_sooner() -> None:
    n = MOST_SMALL // SMALL
    assert _edges(np.full(2 * n + 1, SMALL), 1 << 30, 1e18) == [0, n, 2 * n, 2 * n + 1]


@pytest.mark.asyncio
async def test_what_was_prepared_is_kept_until_its_memory_is_replaced() -> None:
    async with at.open_engine(providers="loopback") as engine, at.open_engine(providers="loopback") as other:
        memory = {k: engine.allocate(N) for k in (0, 3)}
        for k, region in memory.items():
            region.numpy()[:] = k + 1
        targets = [other.allocate(N) for _ in range(2)]
        peer = await other.connect(engine.address)
        leases = [target.lease(peer) for target in targets]
        await engine.connect(other.address)
        rows = writes([0, 0, 3, 3, 3])
        post = Posting(engine, rows)
        (call,) = rows.calls()
        (batch,) = post.batches(call.begin, call.end, memory.__getitem__)
        assert isinstance(batch, Prepared)
        assert post.batches(call.begin, call.end, memory.__getitem__) == [batch]
        assert [(region, a, b) for region, a, b in batch.by_source()] == [(memory[0], 0, 2), (memory[3], 2, 5)]
        await batch.post({5 + k: lease.descriptor for k, lease in enumerate(leases)}, imm=1, timeout=5)
        for row, source in enumerate([0, 0, 3, 3, 3]):
            assert (targets[row % 2].numpy()[64 * row : 64 * row + 64] == source + 1).all()
        memory[3] = engine.allocate(N)
        memory[3].numpy()[:] = 9
        (anew,) = post.batches(call.begin, call.end, memory.__getitem__)
        await anew.post({5 + k: lease.descriptor for k, lease in enumerate(leases)}, imm=1, timeout=5)
        assert (targets[0].numpy()[128:192] == 9).all()
        await other.counter(1).wait(10, timeout=5)


@pytest.mark.asyncio
async def test_the_bounds_of_an_engine_on_what_is_queued_bound_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    config = at.Config(max_queued_operations=6, max_queued_bytes=1 << 20)
    async with at.open_engine(providers="loopback", config=config) as engine:
        memory = engine.allocate(N)
        rows = writes([0] * 10)
        (call,) = rows.calls()
        found = Posting(engine, rows).batches(call.begin, call.end, lambda _: memory)
        assert [batch.count for batch in found] == [3, 3, 3, 1]
        monkeypatch.setattr(posting, "MOST_WRITES", 2)
        assert len(Posting(engine, rows).batches(call.begin, call.end, lambda _: memory)) == 5
        assert len(Posting(engine, rows, most_bytes=256).batches(call.begin, call.end, lambda _: memory)) == 5
        assert len(Posting(engine, rows, most_bytes=64).batches(call.begin, call.end, lambda _: memory)) == 10
