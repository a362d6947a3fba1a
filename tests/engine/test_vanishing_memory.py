"""Memory of ours that is taken away while it is registered: one operation fails and names it; its peer and all others go on."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.engine.memory import buffers
from aiotransfer.testing import Pair, engine_pair
from tests.needs import needs_tcp

N, PAGE = 4 << 20, 4096
SMALL = slice(N - 64, N)
PROVIDERS = ["shm", "loopback", pytest.param("tcp", marks=needs_tcp())]


class Mapping:
    """A mapping of a file, and how it loses all but its first page."""

    def __init__(self, fd: int, memory: Any) -> None:
        self.fd, self.memory = fd, memory

    def vanish(self) -> None:
        os.truncate(self.fd, PAGE)


def of_disk(path: Path) -> Any:
    path.write_bytes(bytes(N))
    fd = os.open(path, os.O_RDWR)
    return Mapping(fd, mmap.mmap(fd, N))


def of_memory(_: Path) -> Any:
    fd = os.memfd_create("test")
    os.truncate(fd, N)
    return Mapping(fd, np.frombuffer(mmap.mmap(fd, N), np.uint8))


def of_numpy(path: Path) -> Any:
    path.write_bytes(bytes(N))
    return Mapping(os.open(path, os.O_RDWR), np.memmap(path, np.uint8, "r+"))


def of_torch(path: Path) -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    path.write_bytes(bytes(N))
    return Mapping(os.open(path, os.O_RDWR), torch.from_file(str(path), shared=True, size=N, dtype=torch.uint8))


def of_address(path: Path) -> Any:
    it = of_disk(path)
    it.kept = it.memory
    it.memory = ctypes.addressof(ctypes.c_char.from_buffer(it.kept)), N, "cpu"
    return it


def write(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    return pair.left.write(local, remote)


def write_little(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    return pair.left.write(local[SMALL], remote[SMALL])


def read(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    return pair.left.read(remote, local)


def read_little(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    return pair.left.read(remote[SMALL], local[SMALL])


def prepared(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    return pair.left.prepare_write(local, remote).post()


def prepared_little(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    return pair.left.prepare_write(local[SMALL], remote[SMALL]).post()


def pages(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    order = np.random.default_rng(1).permutation(N // PAGE)
    return pair.left.write_pages(local, order, remote, order[::-1].copy(), page_bytes=PAGE)


def few_pages(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    return pair.left.write_pages(local, [0, 5, 1], remote, [0, 1, 2], page_bytes=PAGE)


def read_pages(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    order = np.random.default_rng(1).permutation(N // PAGE)
    return pair.left.read_pages(remote, order, local, order[::-1].copy(), page_bytes=PAGE)


def read_few_pages(pair: Pair, local: at.Region, remote: at.RemoteRegion) -> Any:
    return pair.left.read_pages(remote, [0, 1, 2], local, [0, 5, 1], page_bytes=PAGE)


ACTS = [write, write_little, read, read_little, prepared, prepared_little, pages, few_pages, read_pages, read_few_pages]


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("make", [of_disk, of_memory, of_numpy, pytest.param(of_torch, marks=pytest.mark.demo), of_address])
async def test_one_operation_fails_and_names_its_memory(provider: str, make: Callable[[Path], Any], tmp_path: Path) -> None:
    it = make(tmp_path / "file")
    async with engine_pair(provider, timeout=20) as pair:
        local = pair.left.register(it.memory)
        targets, spare = [pair.right.allocate(N), pair.right.register(bytearray(N))], pair.right.allocate(64)
        healthy = pair.left.allocate(64)
        healthy.numpy()[:] = 7
        for target in targets:
            for act in ACTS:
                await act(pair, local, target._grant("both"))
        await pair.left.write(healthy, spare.descriptor)
        it.vanish()
        for target in targets:
            for act in ACTS:
                failing = act(pair, local, target._grant("both"))
                other = pair.left.write(healthy, spare.descriptor)
                with pytest.raises(at.RegistrationError, match=r"the local memory, <Region.*is not there any more"):
                    await failing
                await other
                assert (spare.numpy() == 7).all()
                spare.numpy()[:] = 0
        remote = targets[0]._grant("both")
        with pytest.raises(at.ScatterError, match=r"the local memory.*is not there any more") as caught:
            await pair.left.scatter(local, [(0, 64, remote[:64]), (N - 64, 64, remote[64:128]), (64, 64, remote[128:192])])
        assert [type(one) for one in caught.value.results] == [type(None), at.RegistrationError, type(None)]
        await pair.left.write(local[:PAGE], remote[:PAGE])  # what is left of it
        assert pair.right_peer.state == "up"
        assert pair.left.statistics().pending_operations == 0
        del local
    os.close(it.fd)


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_other_transfers_of_the_same_peer_arrive_whole_and_once(provider: str, tmp_path: Path) -> None:
    it = of_disk(tmp_path / "file")
    async with engine_pair(provider, timeout=20) as pair:
        local, good, target = pair.left.register(it.memory), pair.left.allocate(N), pair.right.allocate(20 * N)
        good.numpy()[:] = np.arange(N) % 251
        remote = target._grant("both")
        await pair.left.write(local[:64], remote[:64])
        it.vanish()
        counter = pair.right.counter(imm=5)
        several = [pair.left.write(good if i % 2 else local, remote[i * N :][:N], imm=5) for i in range(20)]
        failed = 0
        for transfer in several:
            try:
                await transfer
            except at.RegistrationError:
                failed += 1
        assert failed == 10
        await counter.wait(10, timeout=20)
        assert counter.value == 0
        await pair.left.write(good, remote[:N])
        rows = target.numpy().reshape(20, N)
        assert (rows[0] == good.numpy()).all()
        assert (rows[1::2] == good.numpy()).all()
    os.close(it.fd)


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_what_vanishes_under_way_takes_nothing_along(provider: str, tmp_path: Path) -> None:
    large = 16 * N
    (tmp_path / "file").write_bytes(bytes(large))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    it = Mapping(fd, mmap.mmap(fd, large))
    async with engine_pair(provider, timeout=20) as pair:
        local, good, target = pair.left.register(it.memory), pair.left.allocate(N), pair.right.allocate(large + 6 * N)
        good.numpy()[:] = 9
        await pair.left.write(good[:64], target.descriptor[:64])
        failing, places = pair.left.write(local, target.descriptor[:large]), target.descriptor[large:]
        others = [pair.left.write(good, places[:N])]
        it.vanish()
        others += [pair.left.write(good, places[i * N :][:N], imm=3) for i in range(1, 6)]
        with pytest.raises(at.RegistrationError, match="is not there any more"):
            await failing
        await at.wait_all(others)
        await pair.right.counter(imm=3).wait(5, timeout=20)
        assert (target.numpy()[large:] == 9).all()
        assert pair.right_peer.state == "up"
    os.close(fd)


def test_memory_of_the_heap_is_known_without_asking_the_kernel(tmp_path: Path) -> None:
    for heap in (np.zeros(8), np.zeros((4, 4)).T, np.zeros(64)[3:9], bytearray(8), b"12345678", memoryview(bytearray(8))):
        assert buffers.describe(heap).heap
    (tmp_path / "file").write_bytes(bytes(64))
    for other in (mmap.mmap(-1, 8), np.frombuffer(mmap.mmap(-1, 8), np.uint8), np.memmap(tmp_path / "file", np.uint8)):
        assert not buffers.describe(other).heap
