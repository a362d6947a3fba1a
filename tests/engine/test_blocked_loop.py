"""A loop that was blocked past deadlines: what had come by then wins; what has not is late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.testing import Pair, engine_pair

from .processes import other_process

pytestmark = pytest.mark.asyncio
SIZE = 48 << 20
POISON = 0xA5


async def test_a_transfer_that_completed_meanwhile_succeeds(pair: Pair) -> None:
    source, target = pair.left.allocate(SIZE), pair.right.allocate(SIZE)
    source.numpy()[:] = 1
    dst = target.descriptor
    await pair.left.write(source[:1], dst[:1])
    transfer = pair.left.write(source, dst, timeout=0.05)
    assert transfer._state == 1, "it must go on after the call"
    time.sleep(0.5)
    await transfer
    assert (target.numpy() == 1).all()


@pytest.mark.parametrize("provider", ["loopback", "tcp"])
async def test_completions_are_taken_before_a_deadline_is_judged(provider: str) -> None:
    """Nobody but the loop takes them here, and it comes round after the deadline."""
    try:
        pair_of = engine_pair(provider, progress="loop")
        pair = await pair_of.__aenter__()
    except at.ProviderUnavailableError as error:
        pytest.skip(str(error))
    try:
        source, target = pair.left.allocate(4096), pair.right.allocate(4096)
        source.numpy()[:] = 1
        dst = target.descriptor
        await pair.left.write(source[:1], dst[:1])
        transfer = pair.left.write(source, dst, timeout=0.05)
        time.sleep(0.2)
        await transfer
        assert (target.numpy() == 1).all()
    finally:
        await pair_of.__aexit__(None, None, None)


async def test_a_transfer_that_did_not_is_late() -> None:
    async with engine_pair(progress="loop") as pair:  # nothing is copied while the loop is blocked
        source, target = pair.left.allocate(SIZE), pair.right.allocate(SIZE)
        dst = target.descriptor
        await pair.left.write(source[:1], dst[:1])
        transfer = pair.left.write(source, dst, timeout=0.05)
        time.sleep(0.1)
        with pytest.raises(at.TransferTimeout):
            await transfer


WAITS: dict[str, Callable[[at.Engine, at.Peer, at.RemoteRegion], Awaitable[object]]] = {
    "lookup": lambda engine, peer, _: peer.lookup("little", timeout=0.1),
    "ping": lambda engine, peer, _: peer.ping(timeout=0.1),
    "counter": lambda engine, peer, _: engine.counter(imm=7).wait(1, timeout=0.1),
    "bind": lambda engine, peer, unbound: engine.write(engine.allocate(8), unbound[:8], timeout=0.1),
}


@pytest.mark.parametrize("name", WAITS)
async def test_an_answer_that_came_meanwhile_wins(name: str) -> None:
    async with at.open_engine() as engine, other_process(engine) as (_, peer):
        unbound = at.RemoteRegion.decode((await peer.lookup("little")).encode())
        region = engine.allocate(64)
        engine.publish("counted", region)
        if name == "counter":
            await peer.send(f"flood {region.descriptor.encode().hex()} 64 0 0.01".encode())
            await engine.counter(imm=7).wait(1)
        task = asyncio.ensure_future(WAITS[name](engine, peer, unbound))  # type: ignore[arg-type]
        for _ in range(3):
            await asyncio.sleep(0)  # the question has left
        time.sleep(0.4)  # the other process answers
        await task


async def test_cancelled_while_blocked_the_source_is_free_when_the_await_ends(pair: Pair) -> None:
    source, target = pair.left.allocate(SIZE), pair.right.allocate(SIZE)
    mine, theirs = source.numpy(), target.numpy()
    dst = target.descriptor
    await pair.left.write(source[:1], dst[:1])
    for pause in (0.0, 0.001, 0.002, 0.004, 0.05):
        mine[:] = 1

        async def wait() -> None:
            try:
                await pair.left.write(source, dst)
            finally:
                mine[:] = POISON

        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        time.sleep(pause)
        for _ in range(3):
            task.cancel()
        time.sleep(pause)
        try:
            await task
        except asyncio.CancelledError:
            pass
        await asyncio.sleep(0.005)
        assert not np.any(theirs == POISON)
