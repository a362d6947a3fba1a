"""A peer that is gone ends everything that names it, on both sides, with the reason; a busy one is none of these."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable

import pytest

import aiotransfer as at

from .processes import NBYTES, other_process

pytestmark = pytest.mark.asyncio
PEER_TIMEOUT = 0.6


async def send_on(engine: at.Engine, peer: at.Peer) -> None:
    while True:  # until its credit is used up
        await peer.send(bytes(1 << 20))


async def writes(engine: at.Engine, peer: at.Peer) -> None:
    dst, source = await peer.lookup("foreign"), engine.allocate(NBYTES)
    while True:
        await engine.write(source, dst)


async def reads(engine: at.Engine, peer: at.Peer) -> None:
    region = await peer.lookup("readable")
    while True:
        await engine.read(region, engine.allocate(region.nbytes))


async def scatters(engine: at.Engine, peer: at.Peer) -> None:
    dst, source = await peer.lookup("allocated"), engine.allocate(NBYTES)
    while True:
        await engine.scatter(source, [at.ScatterTarget(0, NBYTES, dst)])


async def signals(engine: at.Engine, peer: at.Peer) -> None:
    while True:
        await engine.signal(peer, 3)


async def barrier(engine: at.Engine, peer: at.Peer) -> None:
    await engine.group([engine.address, peer.address]).barrier()


WAITS: dict[str, Callable[[at.Engine, at.Peer], Awaitable[object]]] = {
    "counter": lambda engine, peer: engine.counter(imm=5).wait(1, peers=[peer]),
    "lookup": lambda engine, peer: peer.lookup("never"),
    "ping": lambda engine, peer: pings(peer),
    "send": send_on,
    "barrier": barrier,
}
ONE_SIDED = {"write": writes, "read": reads, "scatter": scatters, "signal": signals}  # of a stopped process its memory is there


async def pings(peer: at.Peer) -> None:
    while True:
        await peer.ping()


@pytest.mark.parametrize("name", [*WAITS, *ONE_SIDED])
async def test_what_waits_for_a_killed_peer_ends(name: str) -> None:
    async with at.open_engine(config=at.Config(peer_timeout=PEER_TIMEOUT)) as engine, other_process(engine) as (process, peer):
        lease = engine.allocate(64).lease(peer)
        task = asyncio.ensure_future({**WAITS, **ONE_SIDED}[name](engine, peer))
        await asyncio.sleep(0.1)
        assert not task.done()
        process.kill()
        with pytest.raises((at.PeerLostError, at.ScatterError)) as caught:
            await asyncio.wait_for(task, 5)
        error = caught.value.results[0] if isinstance(caught.value, at.ScatterError) else caught.value
        assert isinstance(error, at.PeerLostError)
        assert str(peer.address) in str(error)
        assert error.peer == str(peer.address)
        assert error.hint
        assert name in ONE_SIDED or error.__notes__, "what was being done"  # (the next of several may be refused at the call)
        await asyncio.wait_for(peer.closed(), 5)
        await asyncio.wait_for(lease.revoke(), 5)
        assert (peer.state, lease.state, engine.peers) == ("lost", "revoked", ())


@pytest.mark.parametrize("name", WAITS)
async def test_what_waits_for_a_stopped_peer_ends(name: str) -> None:
    async with at.open_engine(config=at.Config(peer_timeout=PEER_TIMEOUT)) as engine, other_process(engine) as (process, peer):
        lease = engine.allocate(64).lease(peer)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(at.PeerLostError, match="no sign of life") as caught:
            await asyncio.wait_for(WAITS[name](engine, peer), 10)
        assert caught.value.__notes__
        assert (peer.state, lease.state) == ("lost", "revoked")


async def test_death_is_noticed_by_itself_while_the_connection_stays_open() -> None:
    """Neither silence nor the end of the control connection can be the news here: only the process is gone."""
    async with at.open_engine(config=at.Config(peer_timeout=60)) as engine, other_process(engine) as (process, peer):
        messages = engine.messages()
        await peer.send(b"fork")
        child = int((await anext(messages)).data)
        try:
            process.kill()
            with pytest.raises(at.PeerLostError, match="its process has ended"):
                await asyncio.wait_for(peer.lookup("never"), 5)
        finally:
            os.kill(child, signal.SIGKILL)


async def test_who_is_given_up_is_told_why() -> None:
    config = at.Config(peer_timeout=PEER_TIMEOUT)
    async with at.open_engine(config=config) as engine, at.open_engine() as third, other_process(engine) as (process, peer):
        messages, told = engine.messages(), third.messages()
        await peer.send(f"tell {third.address}".encode())
        await anext(messages)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(at.PeerLostError):
            await peer.lookup("never")
        os.kill(process.pid, signal.SIGCONT)
        words = (await asyncio.wait_for(anext(told), 5)).data.decode()
        assert words.startswith("lost PeerLostError")
        assert "given this side up (no sign of life for" in words


async def test_a_peer_that_stops_is_lost_within_its_timeout() -> None:
    """By the number of signs it missed: what it may take is counted in rounds, not in time that others take from us."""
    async with at.open_engine(config=at.Config(peer_timeout=1.6)) as engine, other_process(engine) as (process, peer):
        waiting = asyncio.ensure_future(peer.lookup("never"))
        await asyncio.sleep(0.5)  # signs have been asked for and given
        rounds = 0
        look = engine._liveness._look

        def counted(*arguments: object) -> None:
            nonlocal rounds
            rounds += 1
            look(*arguments)  # type: ignore[arg-type]

        os.kill(process.pid, signal.SIGSTOP)
        engine._liveness._look = counted  # type: ignore[method-assign]
        with pytest.raises(at.PeerLostError):
            await waiting
        assert rounds <= 8, "eight rounds are peer_timeout"


async def test_a_restarted_peer_is_somebody_else_and_connects_at_once() -> None:
    async with at.open_engine() as engine, other_process(engine) as (process, peer):
        old, source = await peer.lookup("allocated"), engine.allocate(64)
        await engine.write(source, old[:64])
        process.kill()
        await asyncio.wait_for(peer.closed(), 5)
        await asyncio.to_thread(process.wait)  # its port is free then; that it dies is known earlier
        async with at.open_engine(listen=peer.address):
            again = await engine.connect(peer.address, timeout=5)
            assert again.incarnation != peer.incarnation
            with pytest.raises(at.StaleRegionError, match="restarted"):
                engine.write(source, old[:64])
            assert (peer.state, again.state) == ("lost", "up")


@pytest.mark.long
@pytest.mark.timeout(120)
async def test_a_loop_blocked_for_half_a_minute_is_busy_and_comes_back() -> None:
    """With the defaults, the interpreter's lock held in C; `test_processes` has the short one."""
    async with at.open_engine(timeout=60) as engine, other_process(engine) as (_, peer):
        messages, states = engine.messages(), set()
        lease = engine.allocate(64).lease(peer)
        await peer.send(b"block 30")
        await anext(messages)
        waiting = asyncio.ensure_future(engine.counter(imm=5).wait(1, peers=[peer]))
        until = time.monotonic() + 29
        while time.monotonic() < until:
            await asyncio.sleep(0.25)
            states.add(peer.state)
        assert states == {"up", "busy"}
        assert not waiting.done()
        assert lease.state == "active"
        await asyncio.wait_for(anext(messages), 20)
        assert await peer.ping() < 5
        await asyncio.sleep(1.0)
        assert peer.state == "up"
        waiting.cancel()
