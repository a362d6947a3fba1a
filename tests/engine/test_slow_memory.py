"""Local memory on a file system that may take its time: every byte arrives, and every unit is counted once."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.errors import BrokenError
from aiotransfer.providers import native
from aiotransfer.providers.fabric.provider import FabricPath, Restrictions
from aiotransfer.testing import Pair, engine_pair
from tests.needs import needs_tcp

N = (20 << 20) + 4321
SMALL_PIECES = Restrictions(most_bytes=1 << 20)
NO_ORDER = Restrictions(most_bytes=1 << 20, without=native.lib.AT_FAB_ORDERED) if native.lib is not None else Restrictions()
WAYS: list[Any] = [
    pytest.param({"provider": "shm"}, id="shm"),
    pytest.param({"provider": "loopback"}, id="loopback"),
    pytest.param({"provider": "tcp"}, id="tcp", marks=needs_tcp()),
    pytest.param({"provider": "tcp", "_platform": Platform(restrictions=SMALL_PIECES)}, id="tcp-small", marks=needs_tcp()),
    pytest.param({"provider": "tcp", "_platform": Platform(restrictions=NO_ORDER)}, id="tcp-no-order", marks=needs_tcp()),
    pytest.param({"provider": "tcp", "rails": ["127.0.0.1", "127.0.0.2"]}, id="two-rails", marks=needs_tcp()),
]
pytestmark = [pytest.mark.asyncio, pytest.mark.one_loop, pytest.mark.parametrize("way", WAYS)]


def mapping(path: Path) -> np.ndarray[Any, Any]:
    path.write_bytes(bytes(N))
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), N), np.uint8)


@asynccontextmanager
async def ready(way: dict[str, Any], path: Path) -> AsyncIterator[tuple[Pair, np.ndarray[Any, Any], at.Region, at.Region]]:
    """The memory on a file, its region, and a target as large that may be read and written."""
    memory = mapping(path / "file")
    memory[:] = np.random.default_rng(4).integers(0, 256, N, np.uint8)
    async with engine_pair(timeout=60, **way) as pair:
        yield pair, memory, pair.left.register(memory), pair.right.allocate(N)


async def counted(pair: Pair, imm: int, n: int) -> None:
    counter = pair.right.counter(imm=imm)
    await counter.wait(n, timeout=30)
    assert counter.value == 0


async def test_writes_and_reads_of_every_size(way: dict[str, Any], tmp_path: Path) -> None:
    async with ready(way, tmp_path) as (pair, memory, local, target):
        remote, original = target._grant("both"), memory.copy()
        units = 0
        for start, nbytes in ((0, N), (1, 1), (4095, 4097), (7, (8 << 20) + 1), (3, 8 << 20), (5, (16 << 20) + 2)):
            target.numpy()[:] = 0
            part, there = slice(start, start + nbytes), slice(N - nbytes, N)
            await pair.left.write(local[part], remote[there], imm=1)
            units += 1
            assert np.array_equal(target.numpy()[there], original[part])
            assert not target.numpy()[: N - nbytes].any()
            memory[:] = 0
            await pair.left.read(remote[there], local[part])
            assert np.array_equal(memory[part], original[part])
            assert not memory[:start].any()
            assert not memory[start + nbytes :].any()
            memory[:] = original
        await counted(pair, 1, units)


@pytest.mark.parametrize(("page", "stride"), [(3000, 3000), (4096, 5000), (3 << 20, (3 << 20) + 1)])
async def test_pages(way: dict[str, Any], page: int, stride: int, tmp_path: Path) -> None:
    async with ready(way, tmp_path) as (pair, memory, local, target):
        count = N // stride
        here, there = (np.random.default_rng(seed).permutation(count) for seed in (5, 6))
        await pair.left.write_pages(
            local, here, target._grant("both"), there, page_bytes=page, src_stride=stride, dst_stride=page, imm=2
        )
        await counted(pair, 2, count)
        rows = np.lib.stride_tricks.as_strided(memory, (count, page), (stride, 1))
        expected = np.empty((count, page), np.uint8)
        expected[there] = rows[here]
        assert np.array_equal(target.numpy()[: count * page].reshape(count, page), expected)


async def test_many_at_once_and_plans_and_scatters(way: dict[str, Any], tmp_path: Path) -> None:
    async with ready(way, tmp_path) as (pair, memory, local, target):
        remote, step = target._grant("both"), N // 16
        parts = [slice(i * step, (i + 1) * step) for i in range(16)]
        plan = pair.left.prepare_write(local[parts[0]], remote[parts[0]])
        transfers = [pair.left.write(local[part], remote[part], imm=3) for part in parts[1:8]]
        transfers.append(plan.post(imm=3))
        transfers.append(pair.left.scatter(local, [(part.start, step, remote[part]) for part in parts[8:]], imm=3))
        await at.wait_all(transfers)
        await counted(pair, 3, 16)
        assert np.array_equal(target.numpy()[: 16 * step], memory[: 16 * step])
        assert pair.left.statistics().pending_operations == 0


async def test_a_cancelled_one_leaves_the_others_whole(way: dict[str, Any], tmp_path: Path) -> None:
    async with ready(way, tmp_path) as (pair, memory, local, target):
        remote = target._grant("both")
        for pause in (0, 0.001, 0.004):
            tasks = [asyncio.ensure_future(_awaited(pair.left.write(local, remote))) for _ in range(2)]
            reading = asyncio.ensure_future(_awaited(pair.left.read(pair.right.allocate(N)._grant("both"), local)))
            await asyncio.sleep(pause)
            for task in (tasks[0], reading):
                task.cancel()
            await asyncio.gather(*tasks, reading, return_exceptions=True)
            assert tasks[1].exception() is None
        memory[:] = 9
        await pair.left.write(local, remote)
        assert (target.numpy() == 9).all()


async def test_broken_connections_cost_nothing(way: dict[str, Any], tmp_path: Path) -> None:
    if way["provider"] != "tcp":
        pytest.skip("it has no connection that breaks")
    async with ready(way, tmp_path) as (pair, memory, local, target):
        remote = target._grant("both")
        order = np.random.default_rng(7).permutation(N // 4096)
        for round_ in range(4):
            target.numpy()[:] = 0
            transfers = [
                pair.left.write_pages(local, order, remote, order, page_bytes=4096),
                pair.left.write(local, remote),
            ]
            await asyncio.sleep(0.002 * round_)
            path = pair.right_peer.path.members[0]
            assert isinstance(path, FabricPath)
            assert native.lib.at_fab_break(pair.left._p, path.lane_peer) == 0
            await at.wait_all(transfers)
            assert np.array_equal(target.numpy(), memory)


async def test_it_moves_to_another_path(way: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != {"provider": "tcp"}:
        pytest.skip("from tcp to shm")

    async def never(self: object, conversation: object) -> None:
        raise BrokenError("it does not heal")

    monkeypatch.setattr(FabricPath, "reopen", never)
    options = {"provider": ["tcp", "shm"], "config": at.Config(peer_timeout=1.0)}
    for pause in (0.002, 0.005, 0.01):
        async with ready(options, tmp_path) as (pair, memory, local, target):
            remote, path = target._grant("both"), pair.right_peer.path
            await pair.left.write(local[:64], remote[:64])
            order = np.random.default_rng(8).permutation(N // 4096)
            transfers = [
                pair.left.write(local[4096:], remote[4096:], imm=1),
                pair.left.write_pages(local, order, remote, order, page_bytes=4096, imm=1),
            ]
            await asyncio.sleep(pause)
            assert isinstance(path, FabricPath)
            assert native.lib.at_fab_break(pair.left._p, path.lane_peer) == 0
            await at.wait_all(transfers)
            assert np.array_equal(target.numpy()[4096:], memory[4096:])
            await counted(pair, 1, 1 + N // 4096)
            assert pair.right_peer.path.provider == "shm"


async def _awaited(transfer: at.Transfer) -> None:
    await transfer
