"""Writes, pages and signals between two engines: every byte where it belongs, every immediate counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, payload

pytestmark = pytest.mark.asyncio

KINDS = ["allocated", "foreign"]


def target(pair: Pair, kind: str, nbytes: int) -> tuple[at.Region, np.ndarray]:
    """Memory of `right` and a view of it."""
    if kind == "allocated":
        region = pair.right.allocate(nbytes)
        return region, region.numpy()
    array = np.zeros(nbytes, np.uint8)
    return pair.right.register(array), array


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nbytes", [0, 1, 7, 4096, 4097, 262_144, 262_145, 3_000_001, 16 << 20])
async def test_a_write_lands_whole_and_nothing_else_changes(pair: Pair, kind: str, nbytes: int) -> None:
    region, view = target(pair, kind, nbytes + 128)
    view[:] = 0xEE
    source = payload(nbytes)
    arrived = pair.right.counter(imm=3)
    dst = region.descriptor[64 : 64 + nbytes]
    transfer = pair.left.write(pair.left.register(source), dst, imm=3)
    await transfer
    assert transfer.done()
    assert transfer.bytes_done == nbytes
    await arrived.wait(1, timeout=5)
    assert np.array_equal(view[64 : 64 + nbytes], source)
    assert (view[:64] == 0xEE).all()
    assert (view[64 + nbytes :] == 0xEE).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("page", "count"), [(1, 300), (64, 5), (1024, 700), (4096, 2000), (65536, 90)])
async def test_pages_land_where_the_tables_say(pair: Pair, kind: str, page: int, count: int) -> None:
    region, view = target(pair, kind, page * count * 2)
    source = payload(page * count * 2, seed=5)
    rng = np.random.default_rng(page)
    here, there = rng.permutation(count * 2)[:count], rng.permutation(count * 2)[:count]
    arrived = pair.right.counter(imm=9)
    await pair.left.write_pages(pair.left.register(source), here, region.descriptor, there, page_bytes=page, imm=9)
    await arrived.wait(count, timeout=5)
    expected = np.zeros((count * 2, page), np.uint8)
    expected[there] = source.reshape(-1, page)[here]
    assert np.array_equal(view.reshape(-1, page), expected)
    assert arrived.value == 0


@pytest.mark.parametrize("table", [list, np.array])
async def test_strides_and_offsets_address_interleaved_pages(pair: Pair, table: Any) -> None:
    region, view = target(pair, "allocated", 4096)
    source, dst = payload(1024), region.descriptor
    await pair.left.write(pair.left.allocate(0), dst[:0])
    await pair.left.write_pages(
        pair.left.register(source), table([0, 1, 2]), dst, table([2, 0, 1]),
        page_bytes=16, src_stride=32, dst_stride=100, src_offset=8, dst_offset=50,
    )  # fmt: skip
    for src, dst in ((0, 2), (1, 0), (2, 1)):
        assert np.array_equal(view[50 + dst * 100 :][:16], source[8 + src * 32 :][:16])
    assert int(np.count_nonzero(view)) <= 48


async def test_a_source_stride_of_zero_repeats_one_page(pair: Pair) -> None:
    region, view = target(pair, "allocated", 64)
    source = payload(16)
    dst = region.descriptor
    for table in (list, np.array):
        view[:] = 0
        await pair.left.write_pages(
            pair.left.register(source), table([0, 5, 9]), dst, table([0, 1, 2]), page_bytes=16, src_stride=0
        )
        assert np.array_equal(view[:48], np.tile(source, 3))


async def test_an_empty_table_is_a_finished_transfer(pair: Pair) -> None:
    region, _ = target(pair, "allocated", 64)
    counter, dst, none = pair.right.counter(imm=1), region.descriptor, np.empty(0, np.int64)
    await pair.left.write_pages(pair.left.allocate(64), [], dst, [], page_bytes=16, imm=1)
    await pair.left.write_pages(pair.left.allocate(64), none, dst, none, page_bytes=16, imm=1)
    assert counter.total == 0


async def test_tables_may_be_lists_arrays_and_narrow_integers(pair: Pair) -> None:
    region, view = target(pair, "allocated", 256)
    source = pair.left.register(payload(256))
    for table in ([1, 0], np.array([1, 0], np.int32), np.array([1, 0], np.uint8), (1, 0), range(2)):
        view[:] = 0
        await pair.left.write_pages(source, table, region.descriptor, table, page_bytes=16)
        assert np.array_equal(view[:32], payload(256)[:32])


async def test_the_tables_are_copied_at_the_call(pair: Pair) -> None:
    pages = 4096
    region, view = target(pair, "allocated", pages * 4096)
    source = pair.left.register(payload(pages * 4096))
    table = np.arange(pages)
    transfer = pair.left.write_pages(source, table, region.descriptor, table, page_bytes=4096)
    table[:] = 0
    await transfer
    assert np.array_equal(view, payload(pages * 4096))


async def test_a_decoded_descriptor_works_like_the_original(pair: Pair) -> None:
    region, view = target(pair, "allocated", 8192)
    dst = at.RemoteRegion.decode(region.descriptor[4096:].encode())
    transfer = pair.left.write(pair.left.register(payload(4096)), dst)
    assert not transfer.done()  # it must first be mapped
    await transfer
    assert np.array_equal(view[4096:], payload(4096))


async def test_signals_count_without_bytes(pair: Pair) -> None:
    counter = pair.right.counter(imm=77)
    await pair.left.signal(pair.right_peer, 77)
    await pair.left.signal(pair.right.allocate(8).descriptor, 77)
    await counter.wait(2, timeout=5)
    assert counter.total == 2


async def test_many_transfers_in_flight_all_land(pair: Pair) -> None:
    n, size = 40, 2 << 20
    region, view = target(pair, "allocated", n * size)
    source = payload(n * size)
    registered = pair.left.register(source)
    counter = pair.right.counter(imm=4)
    dst = region.descriptor
    transfers = [
        pair.left.write(registered[i * size : (i + 1) * size], dst[i * size : (i + 1) * size], imm=4) for i in range(n)
    ]
    await at.wait_all(transfers)
    await counter.wait(n, timeout=10)
    assert np.array_equal(view, source)
    assert pair.left.statistics().pending_operations == 0


async def test_a_finished_await_gives_the_loop_its_turns(pair: Pair) -> None:
    import asyncio

    region, _ = target(pair, "allocated", 4096)
    source, dst = pair.left.allocate(4096), region.descriptor
    await pair.left.write(source, dst)
    ticks = 0

    async def ticker() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    task = asyncio.create_task(ticker())
    await asyncio.sleep(0)
    ticks = 0
    for _ in range(50_000):
        await pair.left.write(source, dst)
    task.cancel()
    assert ticks >= 5


async def test_connecting_to_oneself_works() -> None:
    async with at.open_engine() as engine:
        peer = await engine.connect(engine.address)
        region = engine.allocate(4096)
        counter = engine.counter(imm=1)
        await engine.write(engine.register(payload(4096)), region.descriptor, imm=1)
        await counter.wait(1, timeout=5)
        assert np.array_equal(region.numpy(), payload(4096))
        await peer.send(b"me")
        async for message in engine.messages():
            assert message.data == b"me"
            break
        assert await engine.connect(engine.address) is peer
