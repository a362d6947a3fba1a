"""The NIC of the control connection dies, and the peer does not; `tests.hosts.outage` measures it."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

import aiotransfer as at
from tests.hosts import outage
from tests.hosts.cables import Cables
from tests.needs import needs_hosts

pytestmark = [pytest.mark.asyncio, *needs_hosts()]


@pytest.mark.parametrize("strike", outage.STRIKES)
async def test_messages_lookups_and_writes_go_on_by_another_nic(strike: str) -> None:
    (run,) = await outage.outages(1, strike, "talking")
    print(f"{strike}: noticed after {run.noticed:.0f} ms, resumed after {run.resumed:.0f} ms")
    assert run.resumed < 3000, "of the default peer_timeout"


async def test_a_wait_that_says_nothing_by_itself_goes_on() -> None:
    (run,) = await outage.outages(1, "other", "waiting")
    assert run.resumed < 3000


async def test_without_any_traffic_the_kernel_notices() -> None:
    (run,) = await outage.outages(1, "silence", "idle")
    assert run.resumed < 6000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("cut", [False, True])
async def test_a_peer_that_dies_or_stops_is_lost_as_soon_as_ever(number: signal.Signals, cut: bool) -> None:
    """Also where there are further ways to it, and one of them has been lost."""
    with Cables(2) as cables:
        timeout = 10.0 if number == signal.SIGKILL else 1.0  # a death is noticed without the pulses
        async with outage.connected(cables, config=at.Config(peer_timeout=timeout)) as (engine, peer):
            assert peer._channel.resumable
            waiting = asyncio.ensure_future(peer.lookup("never"))
            await asyncio.sleep(0.2)
            if cut:
                outage.STRIKES["own"](cables)
                async with asyncio.timeout(5):
                    while not engine.statistics().control_resumed:
                        await asyncio.sleep(0.01)
            begun = time.monotonic()
            cables.right.signal(number)
            with pytest.raises(at.PeerLostError):
                await asyncio.wait_for(waiting, 10)
            assert time.monotonic() - begun < 5
            cables.right.signal(signal.SIGCONT)


async def test_a_blocked_loop_whose_buffers_are_full_is_busy_and_not_dialled_again() -> None:
    with Cables(1) as cables:
        async with outage.connected(cables, config=at.Config(peer_timeout=1.0)) as (engine, peer):
            await peer.send(b"block 5")
            await asyncio.sleep(0.1)
            for n in range(8):  # MiB
                await peer.send(b"say %d" % n + bytes(1 << 20)[:-10])
            begun = time.monotonic()
            asked = asyncio.ensure_future(peer.ping())
            states = set()
            while time.monotonic() - begun < 4:
                states.add(peer.state)
                await asyncio.sleep(0.01)
            assert peer._link._transport is not None
            assert peer._link._transport.get_write_buffer_size() > 0, "more than the sockets hold"
            assert states == {"up", "busy"}
            assert await asked > 3
            assert engine.statistics().control_resumed == 0


async def test_the_peer_is_lost_with_its_last_nic() -> None:
    with Cables(1) as cables:
        async with outage.connected(cables, config=at.Config(peer_timeout=1.0)) as (_, peer):
            waiting = asyncio.ensure_future(peer.lookup("never"))
            await asyncio.sleep(0.2)
            begun = time.monotonic()
            outage.STRIKES["other"](cables)
            cables.cut(0)
            with pytest.raises(at.PeerLostError):
                await asyncio.wait_for(waiting, 10)
            assert time.monotonic() - begun < 5


async def test_who_listens_everywhere_tells_where() -> None:
    with Cables(1) as cables, cables.right.inside():
        async with at.open_engine(listen="0.0.0.0:0", **outage.OPTIONS) as engine:
            port = engine.address.port
            assert engine._connections.further == [f"{cables.right.address}:{port}", f"{cables.right.rails[0]}:{port}"]
        async with at.open_engine(listen="127.0.0.1:0", **outage.OPTIONS) as engine:
            assert not engine._connections.further
        for rails in (None, cables.right.rails[0]):
            async with at.open_engine(listen=cables.right.listen, rails=rails, **outage.OPTIONS) as engine:
                (further,) = map(at.Address.parse, engine._connections.further)
                assert further.host == cables.right.rails[0]
                beside = f"{further.host}:{engine.address.port}"  # an engine for each NIC, all by one port
                async with at.open_engine(listen=beside, **outage.OPTIONS) as other:
                    assert str(other.address) == beside
