"""Many peers: a thousand in the simulator, groups of processes on one machine, and a member that is killed or stopped."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Fabric, fabric, stopped
from tests.engine.groups import engine_of

SIZE = 256
IMPATIENT = 0.8  # seconds


def test_a_scatter_reaches_a_thousand_peers() -> None:
    async def scenario(net: Fabric) -> None:
        engine, others = await net.open_engine(), [await net.open_engine() for _ in range(1000)]
        source = engine.allocate(1000 * 8)
        source.numpy()[:] = np.arange(1000, dtype=np.uint64).view(np.uint8)
        targets, regions = [], []
        for i, other in enumerate(others):
            regions.append(other.allocate(8))
            other.publish("memory", regions[-1])
            peer = await engine.connect(other.address)
            targets.append(at.ScatterTarget(i * 8, 8, await peer.lookup("memory")))
        await engine.scatter(source, targets, imm=1)
        for i, (other, region) in enumerate(zip(others, regions, strict=True)):
            assert int(region.numpy().view(np.uint64)[0]) == i
            await other.counter(imm=1).wait(1)
        net.kill(others[7])
        with pytest.raises((at.ScatterError, at.PeerLostError)):
            await engine.scatter(source, targets)

    fabric(5, split=0.1, refuse=0.1).run(scenario)


@contextlib.asynccontextmanager
async def members(
    n: int, peer_timeout: float = at.Config().peer_timeout
) -> AsyncIterator[tuple[list[subprocess.Popen[bytes]], at.PeerGroup]]:
    """`n` - 1 processes and this one, formed as a group. Each answers with one signal to the first after every barrier."""
    command = [sys.executable, str(Path(__file__)), str(peer_timeout)]
    async with at.open_engine(timeout=60, config=at.Config(peer_timeout=peer_timeout)) as engine:
        processes = [subprocess.Popen([*command, str(engine.address)]) for _ in range(n - 1)]
        try:
            peers = []
            arrivals = engine.arrivals()
            while len(peers) < n - 1:
                peers.append(await asyncio.wait_for(anext(arrivals), 60))
            await arrivals.aclose()  # type: ignore[attr-defined]
            addresses = [str(engine.address), *(str(peer.address) for peer in peers)]
            for peer in peers:
                await peer.send(" ".join(addresses).encode())
            group = engine.group(addresses)
            await group.barrier(timeout=60)
            order = {peer.pid: i for i, peer in enumerate(peers)}
            yield sorted(processes, key=lambda process: order[process.pid]), group
        finally:
            for process in processes:
                process.kill()
                process.wait()


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [2, 8, pytest.param(64, marks=pytest.mark.long)])
async def test_processes_form_a_group_and_a_plan_reaches_each(n: int) -> None:
    async with members(n) as (_, group):
        engine = engine_of(group)
        counter = engine.counter(imm=5)
        source = engine.allocate(SIZE * n)
        remotes = [await peer.lookup("memory") for peer in group.peers if peer is not None]
        plan = group.scatter_plan(source, [at.ScatterTarget(SIZE * i, SIZE, r) for i, r in enumerate(remotes)])
        for turn in range(1, 6):
            source.numpy()[:] = turn
            await plan.post(imm=3)
            await group.barrier(timeout=60)
            await counter.wait(n - 1, timeout=60)
        for remote in remotes:
            local = engine.allocate(SIZE)
            await engine.read(remote, local)
            assert (local.numpy() == 5).all()


@pytest.mark.asyncio
async def test_a_killed_member_ends_the_barrier_of_all_with_its_loss() -> None:
    async with members(4) as (processes, group):
        waiting = asyncio.ensure_future(group.barrier(timeout=30))
        await asyncio.sleep(0.2)
        processes[1].kill()
        with pytest.raises(at.PeerLostError):
            await waiting


@pytest.mark.asyncio
async def test_a_stopped_member_ends_the_barrier_within_the_peer_timeout() -> None:
    async with members(3, IMPATIENT) as (processes, group):
        with stopped(processes[0]):
            with pytest.raises(at.BrokenError):  # ... and not a TransferTimeout
                await group.barrier(timeout=30)


async def main(peer_timeout: str, address: str) -> None:
    async with at.open_engine(timeout=60, config=at.Config(peer_timeout=float(peer_timeout))) as engine:
        engine.publish("memory", engine.allocate(SIZE), access="both")
        first = await engine.connect(address)
        async for message in engine.messages():
            group = engine.group(message.data.decode().split())
            await group.barrier()
            counter = engine.counter(imm=3)
            while True:
                await counter.wait(1, peers=[first])
                await group.barrier()
                await engine.signal(first, 5)


if __name__ == "__main__":
    with contextlib.suppress(at.TransferError):
        asyncio.run(main(*sys.argv[1:]))
