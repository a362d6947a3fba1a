"""Reads: bytes of a peer's memory into ours, refused like writes, ended by a revocation."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair, payload
from tests.turns import give_up

pytestmark = pytest.mark.asyncio
N = 1 << 16


async def readable(pair: Pair, nbytes: int = N, *, access: str = "read", foreign: bool = False) -> at.RemoteRegion:
    memory = payload(nbytes)
    if foreign:
        region = pair.right.register(memory)
    else:
        region = pair.right.allocate(nbytes)
        region.numpy()[:] = memory
    pair.right.publish("memory", region, access=access)
    return await pair.right_peer.lookup("memory")


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("nbytes", [0, 1, 4095, N, (5 << 20) + 3])
async def test_every_byte_comes_over_and_no_other_changes(pair: Pair, nbytes: int, foreign: bool) -> None:
    remote = await readable(pair, nbytes + 16, foreign=foreign)
    target = np.full(nbytes + 16, 0xEE, np.uint8)
    region = pair.left.register(target)
    transfer = pair.left.read(remote[8 : 8 + nbytes], region[8 : 8 + nbytes])
    await transfer
    assert (transfer.nbytes, transfer.bytes_done) == (nbytes, nbytes)
    assert (target[8 : 8 + nbytes] == payload(nbytes + 16)[8 : 8 + nbytes]).all()
    assert (target[:8] == 0xEE).all()
    assert (target[8 + nbytes :] == 0xEE).all()


async def test_what_may_only_be_written_is_not_read(pair: Pair) -> None:
    remote = await readable(pair, access="write")
    with pytest.raises(at.RegionError, match="does not grant reading"):
        pair.left.read(remote, pair.left.allocate(N))


async def test_wrong_operands_are_refused_and_nothing_changes(pair: Pair) -> None:
    remote = await readable(pair, access="both")
    target = pair.left.allocate(N)
    with pytest.raises(ValueError, match="65535 bytes"):
        pair.left.read(remote[1:], target)
    with pytest.raises(TypeError):
        pair.left.read(target, remote)  # type: ignore[arg-type]
    with pytest.raises(at.RegionError, match="read-only"):
        pair.left.read(remote[:4], pair.left.register(b"abcd"))
    with pytest.raises(at.RegionError, match="another engine"):
        pair.left.read(remote, pair.right.allocate(N))
    assert not target.numpy().any()


async def test_a_read_after_the_region_was_closed_is_stale(pair: Pair) -> None:
    region = pair.right.allocate(N)
    remote = at.RemoteRegion.decode(region._grant("read").encode())
    target = pair.left.allocate(N)
    await pair.left.read(remote, target)
    await region.aclose()
    with pytest.raises(at.StaleRegionError):
        await pair.left.read(remote, target)


async def test_a_read_that_was_revoked_before_it_ended_fails() -> None:
    async with engine_pair(progress="loop") as pair:  # copies only while the loop turns: never over by itself
        nbytes = 64 << 20
        region = pair.right.allocate(nbytes)
        pair.right.publish("large", region, access="read")
        remote = await pair.right_peer.lookup("large")
        read = pair.left.read(remote, pair.left.allocate(nbytes))
        await asyncio.sleep(0)
        assert not read.done()
        await region.aclose()
        with pytest.raises(at.StaleRegionError):
            await read


@pytest.mark.parametrize("progress", ["auto", "loop"])
async def test_a_cancelled_read_leaves_the_target_alone_afterwards(progress: str) -> None:
    async with engine_pair(progress=progress) as pair:
        nbytes = 64 << 20
        remote = await readable(pair, nbytes)
        target = pair.left.allocate(nbytes)
        for _ in range(5):
            task = asyncio.ensure_future(_read(pair, remote, target))
            await give_up(task, 1)
            assert task.cancelled() or progress == "auto", "a thread may have finished it before the cancel"
            target.numpy()[:] = 0x11
            await asyncio.sleep(0.005)
            assert (target.numpy() == 0x11).all()


async def _read(pair: Pair, remote: at.RemoteRegion, target: at.Region) -> None:
    await pair.left.read(remote, target)
