"""Reading by pages: as `read` and `write_pages` do, by every provider."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.testing import Pair, engine_pair, payload
from tests.engine.test_scatter import Counting
from tests.needs import needs_tcp
from tests.turns import give_up

pytestmark = pytest.mark.asyncio
N = 1 << 20
PROVIDERS = ["shm", "loopback", pytest.param("tcp", marks=needs_tcp())]


@pytest_asyncio.fixture(params=PROVIDERS)
async def any_pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with engine_pair(request.param, timeout=20) as engines:
        yield engines


async def readable(pair: Pair, nbytes: int = N, *, access: str = "read", foreign: bool = False) -> at.RemoteRegion:
    memory = payload(nbytes)
    if foreign:
        region = pair.right.register(memory)
    else:
        region = pair.right.allocate(nbytes)
        region.numpy()[:] = memory
    pair.right.publish("memory", region, access=access)
    return await pair.right_peer.lookup("memory")


@pytest.mark.parametrize("foreign", [False, True], ids=["allocated", "registered"])
@pytest.mark.parametrize(("page", "n"), [(1, 9), (100, 700), (4096, 250), (100_000, 9), (N, 1)])
async def test_every_page_comes_to_its_place_and_no_other_byte_changes(any_pair: Pair, page: int, n: int, foreign: bool) -> None:
    pair, rng, edge = any_pair, np.random.default_rng(page), 64 if page < N else 0
    remote = await readable(pair, foreign=foreign)
    for src_gap, dst_gap in ((0, 0), (13, 7)) if page < N else ((0, 0),):
        slots = (N - edge - page) // (page + max(src_gap, dst_gap)) + 1
        here, there = rng.integers(0, slots, n), rng.permutation(slots)[:n]
        here = here[: len(there)]
        target = np.full(N, 0xEE, np.uint8)
        with pair.left.register(target) as region:
            transfer = pair.left.read_pages(
                remote, here, region, there, page_bytes=page, src_stride=page + src_gap, dst_stride=page + dst_gap,
                src_offset=edge // 2, dst_offset=edge // 4,
            )  # fmt: skip
            await transfer
            assert transfer.nbytes == transfer.bytes_done == page * len(there)
            assert transfer.peer is pair.right_peer
            expected, source = np.full(N, 0xEE, np.uint8), payload(N)
            for a, b in zip(here, there, strict=True):
                expected[edge // 4 + b * (page + dst_gap) :][:page] = source[edge // 2 + a * (page + src_gap) :][:page]
            assert np.array_equal(target, expected)


@pytest.mark.parametrize("foreign", [False, True], ids=["allocated", "registered"])
async def test_slices_lists_and_a_stride_of_nothing_are_legal(any_pair: Pair, foreign: bool) -> None:
    pair = any_pair
    remote, target = (await readable(pair, foreign=foreign))[1000:9000], pair.left.allocate(5000)
    await pair.left.read_pages(remote, [3, 3, 0], target[500:4500], [1, 0, 7], page_bytes=500)
    await pair.left.read_pages(remote, [5, 9], target[4500:], [0, 1], page_bytes=250, src_stride=0, src_offset=7)
    expected, source = np.zeros(5000, np.uint8), payload(N)[1000:9000]
    for b, a in ((1, 1500), (0, 1500), (7, 0)):
        expected[500 + 500 * b :][:500] = source[a : a + 500]
    expected[4500:4750] = expected[4750:] = source[7:257]
    assert np.array_equal(target.numpy(), expected)


@pytest.mark.parametrize("kind", ["mapped file", "file in memory", "memory not yet touched"])
@pytest.mark.parametrize(("page", "nbytes"), [(4096, 1 << 20), (1 << 16, 20 << 20)])
@pytest.mark.parametrize("foreign", [False, True], ids=["allocated", "registered"])
async def test_memory_that_is_not_plain_gets_its_pages_too(
    any_pair: Pair, foreign: bool, page: int, nbytes: int, kind: str, tmp_path: Path
) -> None:
    pair, rows = any_pair, np.random.default_rng(3).permutation(nbytes // page)
    remote = await readable(pair, nbytes, foreign=foreign)
    fd = -1
    if kind == "mapped file":
        (tmp_path / "file").write_bytes(bytes(nbytes))
        target: Any = np.memmap(tmp_path / "file", np.uint8, "r+")
    elif kind == "file in memory":
        fd = os.memfd_create("test")
        os.truncate(fd, nbytes)
        target = np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)
    else:
        target = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    with pair.left.register(target) as region:
        await pair.left.read_pages(remote, rows, region, rows[::-1], page_bytes=page)
        assert np.array_equal(target.reshape(-1, page)[rows[::-1]], payload(nbytes).reshape(-1, page)[rows])
        await pair.left.read_pages(remote, [2, 0], region, [0, 1], page_bytes=page)
        assert np.array_equal(target[: 2 * page].reshape(2, page), payload(nbytes).reshape(-1, page)[[2, 0]])
    del region
    if fd >= 0:
        os.close(fd)


async def test_an_empty_table_is_read_at_once(any_pair: Pair) -> None:
    remote, target = await readable(any_pair), any_pair.left.allocate(64)
    transfer = any_pair.left.read_pages(remote, [], target, [], page_bytes=64)
    assert transfer.nbytes == 0
    await transfer


async def test_it_is_one_native_call_whatever_the_number_of_pages(any_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = any_pair
    remote, target = await readable(pair), pair.left.allocate(N)
    await pair.left.read(remote[:8], target[:8])
    counting, rows = Counting(), np.arange(N // 256)
    with monkeypatch.context() as patched:
        patched.setattr(native, "lib", counting)
        transfer = pair.left.read_pages(remote, rows, target, rows[::-1], page_bytes=256)
        posted = Counter(counting.calls)
    await transfer
    assert posted.pop("at_read_pages") == 1
    assert set(posted) <= {"at_poll", "at_turn", "at_peer_pong"}  # the last where a second passes meanwhile
    assert np.array_equal(target.numpy().reshape(-1, 256), payload(N).reshape(-1, 256)[::-1])


async def test_what_cannot_be_read_is_refused_and_nothing_changes(any_pair: Pair) -> None:
    pair = any_pair
    remote, target = await readable(pair, access="both"), pair.left.allocate(N)
    await pair.left.read(remote[:8], target[:8])
    target.numpy()[:8] = 0
    last = N // 4096
    bad: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        ([last], [0], {}, at.RegionError, "src_pages"),
        ([0], [last], {}, at.RegionError, "dst_pages"),
        ([-1], [0], {}, at.RegionError, "src_pages"),
        ([0], [-1], {}, at.RegionError, "dst_pages"),
        ([0], [1 << 62], {}, at.RegionError, "dst_pages"),
        ([0, 1], [0], {}, ValueError, "tables"),
        ([0.5], [0], {}, TypeError, "integers"),
        ([0], [0], {"page_bytes": 0}, ValueError, "page_bytes"),
        ([0], [0], {"dst_stride": 0}, ValueError, "strides"),
        ([0], [0], {"dst_stride": 4095}, ValueError, "strides"),
        ([0], [0], {"src_stride": 4095}, ValueError, "strides"),
        ([0], [0], {"src_offset": -1}, ValueError, "src_offset"),
        ([0], [0], {"src_offset": N - 4095}, at.RegionError, "src_pages"),
        ([0], [0], {"dst_offset": N - 4095}, at.RegionError, "dst_pages"),
        ([0], [0], {"timeout": -1}, ValueError, "timeout"),
    ]  # fmt: skip
    for here, there, options, error, words in bad:
        for tables in ((here, there), (np.array(here), np.array(there))):
            with pytest.raises(error, match=words):
                pair.left.read_pages(remote, tables[0], target, tables[1], **{"page_bytes": 4096, **options})
    for part in (remote[: N - 1], remote):
        with pytest.raises(at.RegionError, match="dst_pages"):
            pair.left.read_pages(part, [0], target[4096:], [last - 1], page_bytes=4096)
    with pytest.raises(TypeError):
        pair.left.read_pages(target, [0], remote, [0], page_bytes=8)  # type: ignore[arg-type]
    with pytest.raises(at.RegionError, match="read-only"):
        pair.left.read_pages(remote, [0], pair.left.register(b"12345678"), [0], page_bytes=8)
    with pytest.raises(at.RegionError, match="another engine"):
        pair.left.read_pages(remote, [0], pair.right.allocate(N), [0], page_bytes=8)
    with pytest.raises(at.ProviderUnavailableError):
        pair.left.read_pages(remote, [0], target, [0], page_bytes=8, require="verbs")
    assert not target.numpy().any()
    pair.right.unpublish("memory")
    pair.right.publish("writable", pair.right.allocate(64), access="write")
    with pytest.raises(at.RegionError, match="does not grant reading"):
        pair.left.read_pages(await pair.right_peer.lookup("writable"), [0], target, [0], page_bytes=8)
    assert not target.numpy().any()
    assert pair.left.statistics().pending_operations == 0


async def test_a_descriptor_that_was_never_used_is_bound_first(any_pair: Pair) -> None:
    remote, target = await readable(any_pair), any_pair.left.allocate(16)
    await any_pair.left.read_pages(at.RemoteRegion.decode(remote.encode()), [5], target, [0], page_bytes=16)
    assert np.array_equal(target.numpy(), payload(N)[80:96])


@pytest.mark.parametrize("foreign", [False, True], ids=["allocated", "registered"])
async def test_after_the_region_was_closed_it_is_stale(any_pair: Pair, foreign: bool) -> None:
    pair = any_pair
    memory = np.ones(N, np.uint8)
    region = pair.right.register(memory) if foreign else pair.right.allocate(N)
    remote = at.RemoteRegion.decode(region._grant("read").encode())
    target = pair.left.allocate(64)
    await pair.left.read_pages(remote, [1], target, [0], page_bytes=64)
    await region.aclose()
    with pytest.raises(at.StaleRegionError):
        await pair.left.read_pages(remote, [1], target, [0], page_bytes=64)


@pytest.mark.parametrize("foreign", [False, True], ids=["allocated", "registered"])
async def test_a_right_that_was_revoked_before_the_last_page_had_come_is_no_success(foreign: bool) -> None:
    nbytes = 1 << 18 if foreign else 64 << 20  # the copier is inside its last part, or the loop has begun none
    async with engine_pair("shm", progress="loop", timeout=20) as pair:  # copies only while the loop turns
        region = pair.right.register(np.zeros(nbytes, np.uint8)) if foreign else pair.right.allocate(nbytes)
        pair.right.publish("large", region, access="read")
        remote, target, rows = await pair.right_peer.lookup("large"), pair.left.allocate(nbytes), np.arange(nbytes // 4096)
        if foreign:
            native.lib.at_shm_hold(2)  # the copier stands still inside the first part
        try:
            read = pair.left.read_pages(remote, rows, target, rows[::-1], page_bytes=4096)
            while foreign and not native.lib.at_shm_held():
                await asyncio.sleep(0.001)
            assert not read.done()
            closing = asyncio.ensure_future(region.aclose())
            await asyncio.sleep(0)
        finally:
            native.lib.at_shm_hold(0)
        with pytest.raises(at.StaleRegionError) as stale:
            await read
        assert any(f"reading {nbytes:,} bytes in pages" in note for note in stale.value.__notes__)
        await closing


@pytest.mark.parametrize("progress", ["auto", "loop"])
async def test_a_cancelled_one_leaves_the_target_alone_afterwards(progress: str) -> None:
    async with engine_pair(progress=progress, timeout=20) as pair:
        nbytes = 64 << 20
        remote, target = await readable(pair, nbytes), pair.left.allocate(nbytes)
        rows = np.arange(nbytes // 4096)
        for _ in range(3):
            task = asyncio.ensure_future(_await(pair.left.read_pages(remote, rows, target, rows[::-1], page_bytes=4096)))
            await give_up(task, 1)
            assert task.cancelled() or progress == "auto", "a thread may have finished it before the cancel"
            target.numpy()[:] = 0x11
            await asyncio.sleep(0.005)
            assert (target.numpy() == 0x11).all()


@pytest.mark.parametrize("end", ["deadline", "cancel", "peer gone"])
async def test_every_end_of_one_under_way_is_that_of_a_read(any_pair: Pair, end: str) -> None:
    """One that the loop has not begun to move, or that is on its way: whichever comes first, nothing lands afterwards."""
    pair, nbytes = any_pair, 32 << 20
    remote, target, rows = await readable(pair, nbytes), pair.left.allocate(nbytes), np.arange(nbytes // 65536)
    await pair.left.read(remote[:8], target[:8])
    transfer = pair.left.read_pages(remote, rows, target, rows, page_bytes=65536, timeout=0 if end == "deadline" else 20)
    if end == "cancel":
        transfer.cancel()
    elif end == "peer gone":
        await pair.right_peer.aclose()
    expected: dict[str, Any] = {"deadline": at.TransferTimeout, "cancel": asyncio.CancelledError, "peer gone": at.TransferError}
    try:
        await transfer
    except expected[end]:
        target.numpy()[:] = 0x11
        await asyncio.sleep(0.005)
        assert (target.numpy() == 0x11).all()
    else:
        assert np.array_equal(target.numpy(), payload(nbytes))
    assert transfer.done()


async def _await(transfer: at.Transfer) -> None:
    await transfer
