"""Memory of a GPU that the NIC takes by itself, run by test_gpu.py in a process whose libfabric and CUDA driver are ours.

Whatever touched the GPU's addresses from the host would crash: nothing is mapped there (tests/native/fake_cuda.c).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.providers import native
from aiotransfer.providers.fabric.provider import Restrictions
from aiotransfer.testing import Pair, engine_pair
from tests.engine.gpu import Gpu

pytestmark = pytest.mark.asyncio
PLAIN, DMABUF, REFUSED, OPERATIONS = range(4)
ASKED = {"_platform": Platform(restrictions=Restrictions(device_memory=1))}
N = 1 << 16


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    gpu = Gpu(Path(os.environ["AIOTRANSFER_LIBCUDA"]))
    gpu.array(0)
    return gpu


def seen_by_libfabric(which: int) -> int:
    return int(ctypes.CDLL(os.environ["AIOTRANSFER_LIBFABRIC"]).fake_hmem_count(which))


@asynccontextmanager
async def two(gpu: Gpu) -> AsyncIterator[tuple[Pair, at.Region, np.ndarray, at.Region, np.ndarray]]:
    """A pair, and an array on the GPU of either side."""
    async with engine_pair("tcp", timeout=10, **ASKED) as pair:
        here, seen_here = gpu.array(N)
        there, seen_there = gpu.array(N)
        seen_here[:] = np.random.default_rng(4).integers(0, 256, N)
        async with pair.left.register(here) as source, pair.right.register(there, access="both") as target:
            assert "registered on cuda:1" in repr(source), "an open rail takes it: nothing is staged"
            yield pair, source, seen_here, target, seen_there


async def test_bytes_go_from_gpu_to_gpu_without_the_host(gpu: Gpu) -> None:
    copies, flushes, before = gpu.calls("cuStreamCreate"), gpu.calls("cuFlushGPUDirectRDMAWrites"), seen_by_libfabric(OPERATIONS)
    async with two(gpu) as (pair, source, here, target, there):
        counter = pair.right.counter(imm=1)
        pair.right.publish("gpu", target, access="both")
        remote = await pair.right_peer.lookup("gpu")
        await pair.left.write(source[:1000], remote[24:1024], imm=1)
        await counter.wait(1)
        assert np.array_equal(there[24:1024], here[:1000])
        await pair.left.write_pages(source, [3, 1], remote, [4, 9], page_bytes=4096, imm=1)
        await counter.wait(2)
        assert np.array_equal(there[4 * 4096 :][:4096], here[3 * 4096 :][:4096])
        assert np.array_equal(there[9 * 4096 :][:4096], here[4096:][:4096])
        await pair.left.read(remote[:64], source[:64])
        assert np.array_equal(here[:64], there[:64])
        await target.flush()
        pair.right.unpublish("gpu")
    assert gpu.calls("cuStreamCreate") == copies
    assert gpu.calls("cuFlushGPUDirectRDMAWrites") - flushes == 1
    assert seen_by_libfabric(OPERATIONS) - before == 3


async def test_it_is_registered_as_a_dma_buf_and_without_one_as_memory_of_the_device(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for refuse, kind in (("", DMABUF), ("dmabuf", PLAIN)):
        monkeypatch.setenv("FAKE_HMEM_REFUSE", refuse)
        before = seen_by_libfabric(kind)
        async with two(gpu) as (pair, source, here, target, there):
            pair.right.publish("gpu", target, access="both")
            await pair.left.write(source, await pair.right_peer.lookup("gpu"))
            assert np.array_equal(here, there)
            pair.right.unpublish("gpu")
        assert seen_by_libfabric(kind) - before == 2, "one for each side"


async def test_host_memory_goes_by_the_same_rail(gpu: Gpu) -> None:
    async with two(gpu) as (pair, source, here, _, _):
        target = pair.right.allocate(N)
        pair.right.publish("host", target)
        remote = await pair.right_peer.lookup("host")
        await pair.left.write(source, remote)
        assert np.array_equal(target.numpy(), here)
        ours = pair.left.allocate(N)
        ours.numpy()[:] = 5
        await pair.left.write(ours, remote)
        assert (target.numpy() == 5).all()


async def test_a_lease_of_it_ends_like_any_other(gpu: Gpu) -> None:
    async with two(gpu) as (pair, source, _, target, there):
        lease = target.lease(pair.left_peer)
        remote = at.RemoteRegion.decode(lease.descriptor.encode())
        await pair.left.write(source[:64], remote[:64])
        await lease.revoke()
        there[:] = 0
        with pytest.raises(at.StaleRegionError):
            await pair.left.write(source[:64], remote[:64])
        assert not there.any()


async def test_a_rail_that_was_not_given_it_refuses_and_staging_serves(gpu: Gpu) -> None:
    without = {"_platform": Platform(restrictions=Restrictions(native.lib.AT_FAB_DEVICE, device_memory=1))}
    async with engine_pair("tcp", timeout=10, **without) as pair:
        array, seen = gpu.array(N)
        seen[:] = 6
        target = pair.right.allocate(N)
        pair.right.publish("t", target)
        remote = await pair.right_peer.lookup("t")
        async with pair.left.register(array, staging=False) as direct:
            with pytest.raises(at.RegistrationError, match="does not take memory of a GPU"):
                await pair.left.write(direct, remote)
            pair.left.publish("direct", direct)
            with pytest.raises(at.RegistrationError, match="cannot reach memory on cuda:1"):
                await pair.left_peer.lookup("direct")
            pair.left.unpublish("direct")
        async with pair.left.register(array) as staged:
            await pair.left.write(staged, remote)
        assert (target.numpy() == 6).all()
