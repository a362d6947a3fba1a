"""Memory that was lent to a peer is taken away: its owner lives on, the peer's operation fails with a reason, others go on."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair
from tests.engine.test_vanishing_memory import ACTS, PAGE, PROVIDERS, Mapping, N, of_disk, of_memory, of_numpy, of_torch
from tests.needs import needs_tcp

LENDING = [provider for provider in PROVIDERS if isinstance(provider, str)]  # tcp does not lend a mapping of a file
MAPPINGS = pytest.mark.parametrize("make", [of_disk, of_memory, of_numpy, of_torch])


def of_shared(_: Path) -> Any:
    path = Path("/dev/shm") / f"test-{os.getpid()}"
    path.write_bytes(bytes(N))
    fd = os.open(path, os.O_RDWR)
    path.unlink()  # as torch does with what it shares
    return Mapping(fd, np.frombuffer(mmap.mmap(fd, N), np.uint8))


async def others_go_on(pair: Pair) -> None:
    source, target = pair.left.allocate(N), pair.right.allocate(N)
    source.numpy()[:] = 7
    await pair.left.write(source, target.descriptor, imm=1)
    await pair.right.counter(imm=1).wait(1, timeout=20)
    assert (target.numpy() == 7).all()
    assert pair.right_peer.state == pair.left_peer.state == "up"


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", LENDING)
@MAPPINGS
async def test_the_peers_operation_fails_and_the_owner_lives(
    provider: str, make: Callable[[Path], Any], tmp_path: Path
) -> None:
    it = make(tmp_path / "file")
    async with engine_pair(provider, timeout=20) as pair:
        lent = pair.right.register(it.memory)
        for local in (pair.left.allocate(N), pair.left.register(bytearray(N))):
            remote = lent._grant("both")
            for act in ACTS:
                await act(pair, local, remote)
        it.vanish()
        for local in (pair.left.allocate(N), pair.left.register(bytearray(N))):
            for act in ACTS[:-1]:
                with pytest.raises(at.RemoteAccessError, match=r"refused a copy .*: Bad address"):
                    await act(pair, local, remote)
            with pytest.raises(at.ScatterError, match="Bad address"):
                await pair.left.scatter(local, [(0, 64, remote[:64]), (64, 64, remote[N - 64 :])])
            await pair.left.write(local[:PAGE], remote[:PAGE])  # what is left of it
        await others_go_on(pair)
        assert pair.left.statistics().pending_operations == 0
        del lent
    os.close(it.fd)


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", LENDING)
async def test_where_both_sides_vanish_the_local_one_is_named(provider: str, tmp_path: Path) -> None:
    ours, theirs = of_disk(tmp_path / "ours"), of_disk(tmp_path / "theirs")
    async with engine_pair(provider, timeout=20) as pair:
        local, remote = pair.left.register(ours.memory), pair.right.register(theirs.memory)._grant("both")
        await pair.left.write(local, remote)
        ours.vanish()
        theirs.vanish()
        with pytest.raises(at.RegistrationError, match=r"the local memory, <Region.*is not there any more"):
            await pair.left.write(local, remote)
        await others_go_on(pair)
    os.close(ours.fd)
    os.close(theirs.fd)


@pytest.mark.asyncio
@needs_tcp()
@pytest.mark.parametrize("make", [of_memory, of_shared])
async def test_tcp_lends_shared_memory(make: Callable[[Path], Any], tmp_path: Path) -> None:
    it = make(tmp_path / "file")
    async with engine_pair("tcp", timeout=20) as pair:
        lent, local = pair.right.register(it.memory), pair.left.allocate(N)
        local.numpy()[:] = 5
        await pair.left.write(local, lent.descriptor, imm=1)
        await pair.right.counter(imm=1).wait(1, timeout=20)
        assert (np.frombuffer(it.memory, np.uint8) == 5).all()
        del lent
    os.close(it.fd)


@pytest.mark.asyncio
@pytest.mark.parametrize("provider", [pytest.param("tcp", marks=needs_tcp())])
@pytest.mark.parametrize("make", [of_disk, of_numpy, of_torch])
async def test_tcp_lends_no_mapping_of_a_file(provider: str, make: Callable[[Path], Any], tmp_path: Path) -> None:
    it = make(tmp_path / "file")
    async with engine_pair(provider, timeout=20) as pair:
        lent, local = pair.right.register(it.memory), pair.left.allocate(N)
        pair.right.publish("file", lent)
        lease = lent.lease(pair.left_peer)
        refused = pytest.raises(at.RegistrationError, match=r"tcp does not lend a mapping of a file.*engine\.allocate")
        with refused:
            await pair.right_peer.lookup("file")
        for remote in (lent.descriptor, lease.descriptor, lent._grant("read")):
            with refused:
                await pair.left.read(remote, local) if remote.access == "read" else await pair.left.write(local, remote)
        it.vanish()
        with refused:
            await pair.left.write(local, lent.descriptor)
        await lease.revoke()
        heap = pair.right.register(np.zeros(N, np.uint8))
        await pair.left.write(local, heap.descriptor)  # plain memory is lent as ever
        await others_go_on(pair)
        del lent
    os.close(it.fd)
