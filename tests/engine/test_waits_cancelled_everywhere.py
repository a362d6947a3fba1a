"""Waits that move no bytes, cancelled at every turn of the loop: nothing they would have had is lost, and they work again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

import aiotransfer as at
from aiotransfer.testing.fabric import Fabric, fabric

N = 1 << 12
CONFIG = at.Config(drain_timeout=0.01, peer_timeout=0.5, message_window_count=1)


class Stop:
    """Cancels what runs `under` it at one turn; `happened` says whether it did."""

    def __init__(self, net: Fabric, turn: int | None) -> None:
        self._net, self._turn = net, turn
        self.turns = 0
        self.happened = False

    async def under(self, work: object) -> object:
        """The result of `work`, or None when it was cancelled."""
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        begin = self._net.turns
        if self._turn is not None:
            self._net.at_turn(self._turn, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            self.happened = True
            return None
        finally:
            self.turns = self._net.turns - begin


@asynccontextmanager
async def two(net: Fabric) -> AsyncIterator[tuple[at.Engine, at.Engine, at.Peer, at.Peer]]:
    left, right = await net.open_engine(config=CONFIG), await net.open_engine(config=CONFIG)
    peer = await left.connect(right.address)
    yield left, right, peer, await anext(right.arrivals())


async def counter(net: Fabric, stop: Stop) -> None:
    async with two(net) as (left, right, peer, _):
        counter = right.counter(imm=1)
        waiting = asyncio.ensure_future(stop.under(counter.wait(3)))
        await asyncio.sleep(0)
        for _ in range(4):
            left.signal(peer, 1)
        await waiting
        await asyncio.sleep(0.1)
        assert (counter.total, counter.value) == (4, 4 if stop.happened else 1)
        await asyncio.wait_for(counter.wait(counter.value), 1)


async def lookup(net: Fabric, stop: Stop) -> None:
    async with two(net) as (left, right, peer, _):
        waiting = asyncio.ensure_future(stop.under(peer.lookup("late")))
        await asyncio.sleep(0.001)
        region = right.allocate(N)
        right.publish("late", region)
        await waiting
        await left.write(left.allocate(N), await peer.lookup("late"))


async def send(net: Fabric, stop: Stop) -> None:
    """A cancelled message was sent wholly or not at all, and the order of the others stays."""
    async with two(net) as (_, right, peer, _):

        def body(n: int) -> bytes:
            return bytes([n]) * 200

        await peer.send(body(0))
        first = asyncio.ensure_future(stop.under(peer.send(body(1))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it stands in the queue now
        second = asyncio.ensure_future(peer.send(body(2)))
        got = []

        async def receive() -> None:
            async for message in right.messages():
                got.append(message.data)

        receiving = asyncio.ensure_future(receive())
        await asyncio.gather(first, second)
        await asyncio.sleep(0.1)
        receiving.cancel()
        assert got in ([body(0), body(1), body(2)], [body(0), body(2)])
        assert stop.happened or len(got) == 3


async def receive(net: Fabric, stop: Stop) -> None:
    async with two(net) as (_, right, peer, _):
        got = []

        async def one() -> None:
            async for message in right.messages():
                got.append(message.data)
                return

        waiting = asyncio.ensure_future(stop.under(one()))
        await asyncio.sleep(0)
        await peer.send(b"a")
        await waiting
        while len(got) < 1:
            await asyncio.wait_for(one(), 1)
        await peer.send(b"b")
        await asyncio.wait_for(one(), 1)
        assert got == [b"a", b"b"]


async def connect(net: Fabric, stop: Stop) -> None:
    left, right = await net.open_engine(config=CONFIG), await net.open_engine(config=CONFIG)
    await stop.under(left.connect(right.address))
    peer = await left.connect(right.address)
    await peer.ping()
    assert left.peers == (peer,)
    await asyncio.sleep(1)
    assert len(right.peers) == 1


async def ping(net: Fabric, stop: Stop) -> None:
    async with two(net) as (_, _, peer, back):
        await stop.under(peer.ping())
        await peer.ping()
        await back.ping()


async def barrier(net: Fabric, stop: Stop) -> None:
    """A barrier that one member gave up breaks the group or ends; all of them can form it again."""
    engines = [await net.open_engine(config=CONFIG) for _ in range(3)]
    groups = [engine.group([str(one.address) for one in engines], name="g") for engine in engines]
    await asyncio.gather(*(group.barrier(timeout=1) for group in groups))
    others = [asyncio.ensure_future(group.barrier(timeout=1)) for group in groups[1:]]
    await stop.under(groups[0].barrier(timeout=1))
    results = await asyncio.gather(*others, return_exceptions=True)
    assert all(r is None or isinstance(r, at.TransferError) for r in results), results
    if stop.happened or any(results):
        await asyncio.gather(*(group.reform(timeout=5) for group in groups))
    await asyncio.gather(*(group.barrier(timeout=1) for group in groups))


async def revoke(net: Fabric, stop: Stop) -> None:
    async with two(net) as (left, right, _, back):
        region, source = right.allocate(N), left.allocate(N)
        lease = region.lease(back)
        source.numpy()[:] = 1
        remote = lease.descriptor
        await left.write(source[:8], remote[:8])
        writes = [left.write(source, remote) for _ in range(4)]
        await stop.under(lease.revoke())
        await lease.revoke()
        region.numpy()[:] = 9
        await asyncio.gather(*writes, return_exceptions=True)
        await asyncio.sleep(0.1)
        assert (region.numpy() == 9).all()


async def close_region(net: Fabric, stop: Stop) -> None:
    async with two(net) as (left, right, peer, _):
        region = right.allocate(N)
        right.publish("r", region)
        remote = await peer.lookup("r")
        source = left.allocate(N)
        writes = [left.write(source, remote) for _ in range(4)]
        right.unpublish("r")
        await stop.under(region.aclose())
        await region.aclose()
        await asyncio.gather(*writes, return_exceptions=True)
        assert right.statistics().grants == 0


async def close_engine(net: Fabric, stop: Stop) -> None:
    async with two(net) as (left, right, peer, back):
        region = right.allocate(N)
        right.publish("r", region)
        remote, source = await peer.lookup("r"), left.allocate(N)
        writes = [left.write(source, remote) for _ in range(4)]
        waiting = asyncio.ensure_future(left.counter(imm=5).wait(1))
        await stop.under(left.aclose())
        await left.aclose()
        results = await asyncio.gather(waiting, *writes, return_exceptions=True)
        assert isinstance(results[0], at.ClosedError)
        assert all(r is None or isinstance(r, at.TransferError) for r in results)
        with suppress(at.TransferError):
            await back.closed(timeout=5)
        assert back.state in ("closed", "lost")


TRIALS = {trial.__name__: trial for trial in (
    counter, lookup, send, receive, connect, ping, barrier, revoke, close_region, close_engine,
)}  # fmt: skip


def run(name: str, turn: int | None, seed: int) -> int:
    async def scenario(net: Fabric) -> int:
        stop = Stop(net, turn)
        await TRIALS[name](net, stop)
        return stop.turns

    try:
        return fabric(seed=seed, delay=(1e-6, 1e-4)).run(scenario)
    except BaseException as error:
        error.add_note(f"{name}, turn {turn}, seed {seed}")
        raise


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("name", TRIALS)
def test_a_wait_cancelled_at_every_turn(name: str, seed: int) -> None:
    for turn in range(run(name, None, seed) + 1):
        run(name, turn, seed)
