"""Memory of a GPU on paths that cannot reach it: what is there arrives, what arrives is there, and nothing else moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.engine.operations.staged import merged
from aiotransfer.providers import native
from aiotransfer.testing import Pair, engine_pair
from tests.engine.gpu import DEVICE, Gpu, build

pytestmark = pytest.mark.asyncio
N = 1 << 16


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build("fake_cuda", tmp_path_factory.mktemp("cuda"))
    Gpu(library).array(0)  # its memory lives as long as the process: before anything is counted
    return library


@pytest.fixture
def gpu(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    monkeypatch.setenv("AIOTRANSFER_LIBCUDA", str(library))
    gpu = Gpu(library)
    pins = gpu.calls("cuMemHostRegister") - gpu.calls("cuMemHostUnregister")
    yield gpu
    gpu.slow_us = 0
    assert gpu.calls("cuMemHostRegister") - gpu.calls("cuMemHostUnregister") == pins, "memory stayed pinned"


@dataclass
class Scene:
    """`source`: on the GPU of the left engine, random bytes in `seen`. `remote`: memory of the right one, behind `target`."""

    pair: Pair
    gpu: Gpu
    source: at.Region
    seen: np.ndarray[Any, Any]
    target: np.ndarray[Any, Any]
    remote: at.RemoteRegion


@pytest_asyncio.fixture(params=["shm", "loopback"])
async def scene(request: pytest.FixtureRequest, gpu: Gpu) -> AsyncIterator[Scene]:
    async with engine_pair(request.param, timeout=10) as pair:
        array, seen = gpu.array(N)
        seen[:] = np.random.default_rng(1).integers(0, 256, N)
        target = pair.right.allocate(N)
        pair.right.publish("target", target)
        source = pair.left.register(array)
        made = Scene(pair, gpu, source, seen, target.numpy(), await pair.right_peer.lookup("target"))
        yield made
        await source.aclose()
    vars(made).clear()  # pytest keeps it until after the look for leaks


async def test_a_write_takes_what_is_on_the_gpu_now_and_no_more(scene: Scene) -> None:
    counter = scene.pair.right.counter(imm=1)
    assert (scene.source.device, scene.source.nbytes) == (DEVICE, N)
    for start, stop in ((0, N), (5, 77), (N - 1, N), (9, 9)):
        scene.seen[start:stop] ^= 0x5A
        scene.target[:] = 0
        await scene.pair.left.write(scene.source[start:stop], scene.remote[start:stop], imm=1)
        await counter.wait(1)
        assert np.array_equal(scene.target[start:stop], scene.seen[start:stop])
        assert not scene.target[:start].any()
        assert not scene.target[stop:].any()


async def test_pages_are_fetched_each_once_and_neighbours_together(scene: Scene) -> None:
    page, here, there = 1024, [3, 4, 5, 9, 3, 20], [0, 1, 2, 3, 4, 7]
    before = scene.gpu.calls("cuMemcpyDtoHAsync")
    await scene.pair.left.write_pages(
        scene.source[64:], here, scene.remote, there, page_bytes=page, src_stride=1500, src_offset=10
    )
    for a, b in zip(here, there, strict=True):
        start = 64 + 10 + a * 1500
        assert np.array_equal(scene.target[b * page :][:page], scene.seen[start:][:page])
    assert scene.gpu.calls("cuMemcpyDtoHAsync") - before == 5
    await scene.pair.left.write_pages(scene.source, range(16), scene.remote, range(16), page_bytes=page)
    assert scene.gpu.calls("cuMemcpyDtoHAsync") - before == 6
    assert np.array_equal(scene.target[: 16 * page], scene.seen[: 16 * page])


async def test_scatters_and_plans_fetch_at_every_post(scene: Scene) -> None:
    left, source, remote = scene.pair.left, scene.source, scene.remote
    targets = [at.ScatterTarget(0, 100, remote[500:600]), at.ScatterTarget(7000, 50, remote[:50])]
    plans = [
        left.prepare_write(source[:300], remote[1000:1300]),
        left.prepare_pages(source, [7, 2], remote, [50, 60], page_bytes=512),
    ]
    for round_ in (1, 2):
        scene.seen += round_
        scene.target[:] = 0
        await left.scatter(source, targets)
        await at.wait_all([plan.post() for plan in plans])
        assert np.array_equal(scene.target[500:600], scene.seen[:100])
        assert np.array_equal(scene.target[:50], scene.seen[7000:7050])
        assert np.array_equal(scene.target[1000:1300], scene.seen[:300])
        assert np.array_equal(scene.target[50 * 512 :][:512], scene.seen[7 * 512 :][:512])
        assert np.array_equal(scene.target[60 * 512 :][:512], scene.seen[2 * 512 :][:512])


async def test_a_read_ends_when_the_bytes_are_on_the_gpu(scene: Scene) -> None:
    scene.pair.right.publish("readable", region := scene.pair.right.allocate(N), access="read")
    region.numpy()[:] = 77
    scene.gpu.slow_us = 20_000
    before = scene.seen.copy()
    await scene.pair.left.read((await scene.pair.right_peer.lookup("readable"))[:1000], scene.source[8:1008])
    before[8:1008] = 77
    assert np.array_equal(scene.seen, before)


async def test_pages_that_are_read_are_on_the_gpu_at_the_end_and_nothing_else_is_touched(scene: Scene) -> None:
    scene.pair.right.publish("readable", region := scene.pair.right.allocate(N), access="read")
    region.numpy()[:] = np.arange(N) % 251
    scene.gpu.slow_us = 20_000
    expected, calls = scene.seen.copy(), scene.gpu.calls("cuMemcpyHtoDAsync")
    remote, here, there = await scene.pair.right_peer.lookup("readable"), [9, 9, 0, 3], [3, 4, 9, 20]
    await scene.pair.left.read_pages(
        remote, here, scene.source[64:], there, page_bytes=1000, src_offset=5, dst_stride=1000, dst_offset=10
    )
    for a, b in zip(here, there, strict=True):
        expected[64 + 10 + b * 1000 :][:1000] = (np.arange(N) % 251)[5 + a * 1000 :][:1000]
    assert np.array_equal(scene.seen, expected)
    assert scene.gpu.calls("cuMemcpyHtoDAsync") - calls == 3


async def test_a_scatter_of_pages_fetches_the_pages_of_all_targets_once(scene: Scene) -> None:
    remote, calls = scene.remote, scene.gpu.calls("cuMemcpyDtoHAsync")
    targets = [
        at.PagesTarget(remote[:8192], [3, 4], [0, 1]), at.PagesTarget(remote[8192:], [4, 20], [7, 0]),
        at.PagesTarget(remote[32768:], [1], [1], src_offset=3584), at.PagesTarget(remote, [], []),
    ]  # fmt: skip
    for posted in (scene.pair.left.scatter_pages, scene.pair.left.prepare_scatter_pages):
        scene.seen ^= 0x5A
        made = posted(scene.source, targets, page_bytes=1024)
        await (made.post() if isinstance(made, at.Plan) else made)
        for start, stop, page in ((0, 1024, 3072), (1024, 2048, 4096), (8192 + 7168, 16384, 4096), (8192, 9216, 20480),
                                  (32768 + 1024, 32768 + 2048, 4608)):  # fmt: skip
            assert np.array_equal(scene.target[start:stop], scene.seen[page : page + 1024])
    assert scene.gpu.calls("cuMemcpyDtoHAsync") - calls == 2 * 2


async def test_what_a_peer_writes_is_on_the_gpu_after_a_flush(scene: Scene) -> None:
    right, left = scene.pair.right, scene.pair.left
    array, seen = scene.gpu.array(N)
    async with left.register(array) as there:
        arrived = left.counter(imm=5)
        left.publish("gpu", there)
        here = right.allocate(N)
        here.numpy()[:] = 9
        await right.write(here[:600], (await scene.pair.left_peer.lookup("gpu"))[100:700], imm=5)
        await arrived.wait(1)
        await there[100:400].flush()
        assert (seen[100:400] == 9).all()
        assert not seen[400:].any()
        assert not seen[:100].any()
        await there.flush()
        assert (seen[100:700] == 9).all()
        left.unpublish("gpu")


async def test_a_cancel_waits_for_the_copy_and_then_nothing_is_posted(scene: Scene) -> None:
    scene.gpu.slow_us = 100_000
    transfer = scene.pair.left.write(scene.source, scene.remote, imm=1)

    async def wait() -> None:
        await transfer

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.sleep(0.02)
    task.cancel()
    assert not task.done(), "the GPU's memory is still being read"
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transfer.elapsed >= 0.09
    await asyncio.sleep(0.02)
    assert not scene.target.any()
    assert scene.pair.right.counter(imm=1).total == 0


async def test_a_deadline_that_passes_meanwhile_is_a_timeout_and_nothing_lands(scene: Scene) -> None:
    scene.gpu.slow_us = 50_000
    with pytest.raises(at.TransferTimeout, match="fetched from the GPU"):
        await scene.pair.left.write(scene.source, scene.remote, timeout=0.01)
    assert not scene.target.any()


async def test_an_operation_keeps_its_region_open(scene: Scene) -> None:
    array, seen = scene.gpu.array(256)
    seen[:] = 3
    scene.gpu.slow_us = 30_000
    region = scene.pair.left.register(array)
    transfer = scene.pair.left.write(region, scene.remote[:256])
    region.close()
    with pytest.raises(at.RegionError, match="closed"):
        scene.pair.left.write(region, scene.remote[:256])
    await transfer
    assert (scene.target[:256] == 3).all()


@pytest.mark.parametrize("call", ["cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuCtxPushCurrent", "cuStreamCreate"])
async def test_what_the_driver_refuses_leaves_the_await(scene: Scene, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", call)
    transfer = scene.pair.left.write(scene.source, scene.remote)
    with pytest.raises(at.RegistrationError) as caught:
        await transfer
    assert caught.value.code == (999, "CUDA_ERROR_UNKNOWN")
    assert not scene.target.any()
    monkeypatch.delenv("FAKE_CUDA_FAIL")
    await scene.pair.left.write(scene.source, scene.remote)
    assert np.array_equal(scene.target, scene.seen)


async def test_a_refusal_of_the_pages_comes_before_anything_is_fetched(scene: Scene) -> None:
    before = scene.gpu.calls("cuStreamCreate")
    with pytest.raises(at.RegionError, match="index 64"):
        scene.pair.left.write_pages(scene.source, [0, 64], scene.remote, [0, 1], page_bytes=1024)
    with pytest.raises(ValueError, match="bytes"):
        scene.pair.left.write(scene.source, scene.remote[:5])
    assert scene.gpu.calls("cuStreamCreate") == before


async def test_the_lane_refuses_what_was_not_staged(scene: Scene) -> None:
    assert native.lib.at_write(
        scene.pair.left._p, scene.remote._box.bound.remote if scene.remote._box.bound else 0, 0, scene.source._id, 0, 8, -1
    ) == native.lib.AT_ECLOSED  # fmt: skip
    with pytest.raises(at.RegistrationError, match="event loop"):
        scene.pair.left.from_thread().write(scene.source, scene.remote)


async def test_there_is_no_view_of_it_and_no_right_to_read_it(scene: Scene) -> None:
    with pytest.raises(at.RegionError, match="memory of yours on cuda:1"):
        scene.source.numpy()
    with pytest.raises(at.RegionError, match="cannot be granted for reading"):
        scene.pair.left.publish("x", scene.source, access="both")
    with pytest.raises(at.RegionError, match="cannot be granted for reading"):
        scene.source.lease(scene.pair.right_peer, access="read")
    assert "staged on cuda:1" in repr(scene.source)


async def test_without_pinned_memory_copies_take_the_longer_way(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemHostRegister")
    array, seen = scene.gpu.array(64)
    async with scene.pair.left.register(array) as region:
        seen[:] = 8
        await scene.pair.left.write(region, scene.remote[:64])
    assert (scene.target[:64] == 8).all()


async def test_closing_the_engine_ends_what_is_being_fetched(gpu: Gpu) -> None:
    async with engine_pair("loopback") as pair:
        array, _ = gpu.array(N)
        target = pair.right.allocate(N)
        source = pair.left.register(array)
        pair.right.publish("t", target)
        gpu.slow_us = 50_000
        transfer = pair.left.write(source, await pair.right_peer.lookup("t"))
        await asyncio.sleep(0.01)
    with pytest.raises((at.ClosedError, asyncio.CancelledError)):
        await transfer
    assert not target.numpy().any()


async def test_direct_memory_is_refused_by_paths_that_do_not_take_it(scene: Scene) -> None:
    array, _ = scene.gpu.array(64)
    async with scene.pair.left.register(array, staging=False) as direct:
        with pytest.raises(at.RegistrationError, match="does not take memory of a GPU"):
            await scene.pair.left.write(direct, scene.remote[:64])
        scene.pair.left.publish("direct", direct)
        with pytest.raises(at.RegistrationError, match="cannot reach memory on cuda:1"):
            await scene.pair.left_peer.lookup("direct")
        scene.pair.left.unpublish("direct")


@pytest.mark.parametrize("seed", range(20))
async def test_merged_pieces_are_the_same_bytes(seed: int) -> None:
    random = np.random.default_rng(seed)
    n, apart = int(random.integers(1, 5)), bool(seed % 2)
    starts = np.unique(random.integers(0, 20, 8)) * (n if apart else 1)
    whole = np.zeros(200, bool)
    for start in starts:
        whole[start : start + n] = True
    found = np.zeros(200, int)
    spans = merged(starts.astype(np.int64), n)
    for start, length in spans:
        found[start : start + length] += 1
    assert np.array_equal(found, whole.astype(int))
    assert len(spans) == np.count_nonzero(np.diff(whole.astype(int), prepend=0) == 1)
