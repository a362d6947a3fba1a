"""A control connection that is lost while its peer is not, simulated: it is dialled again, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.control.dialer import dial_first
from aiotransfer.control.frames import Acknowledge, Resume
from aiotransfer.control.link import Identity
from aiotransfer.control.resume import MOST_KEPT
from aiotransfer.errors import RendezvousError
from aiotransfer.testing.fabric import KEY, Fabric, fabric

CONFIG = at.Config(peer_timeout=3.0)


async def two(net: Fabric, ways: int = 2, **options: object) -> tuple[at.Engine, at.Engine, at.Peer, at.Peer]:
    """Engines, and each one's peer; the first has dialled."""
    one = await net.open_engine(name="one", ways=ways, config=CONFIG, **options)
    other = await net.open_engine(name="other", ways=ways, config=CONFIG, **options)
    peer = await one.connect(other.address)
    return one, other, peer, await anext(other.arrivals())


@contextmanager
def collected(engine: at.Engine) -> Iterator[list[bytes]]:
    """Messages of everybody, as they come."""
    got: list[bytes] = []

    async def read() -> None:
        async for message in engine.messages():
            got.append(message.data)

    task = asyncio.ensure_future(read())
    yield got
    task.cancel()


async def until(told: object, *, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not told():  # type: ignore[operator]
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("seed", range(30))
def test_messages_lookups_and_revocations_go_on_whenever_the_connection_is_cut(seed: int) -> None:
    async def scenario(net: Fabric) -> None:
        rng = random.Random(seed)
        one, other, peer, back = await two(net)
        region = other.allocate(64)
        other.publish("early", region)
        with collected(one) as by_one, collected(other) as by_other:
            sent: tuple[list[bytes], list[bytes]] = [], []
            states = set()

            async def talk(way: at.Peer, said: list[bytes]) -> None:
                for n in range(300):
                    said.append(b"%d" % n)
                    await way.send(said[-1])
                    if rng.random() < 0.3:
                        await asyncio.sleep(rng.random() * 0.01)
                    states.update((peer.state, back.state))

            async def look_up() -> None:
                for n in range(40):
                    later = other._loop.call_later(rng.random() * 0.02, other.publish, f"name {n}", region)
                    assert (await peer.lookup(f"name {n}")).nbytes == 64
                    assert (await peer.ping()) >= 0
                    del later

            cuts = 0

            async def strike() -> None:
                nonlocal cuts
                for _ in range(12):
                    await asyncio.sleep(rng.random() * 0.03)
                    for address in net.control_ways(other):
                        if rng.random() < 0.3:
                            net.reach(address, False)
                            net.loop.call_later(rng.random() * 0.3, net.reach, address, True)
                    cuts += net.cut_control(one, other)

            await asyncio.gather(talk(peer, sent[0]), talk(back, sent[1]), look_up(), strike())
            await until(lambda: len(by_other) >= 300 and len(by_one) >= 300)
            assert (by_other, by_one) == sent
            assert cuts
            assert other.statistics().control_resumed >= one.statistics().control_resumed > 0  # an answer may be cut, too
            assert states == {"up"}
            dst = await peer.lookup("early")
            await region.aclose()
            with pytest.raises(at.StaleRegionError):
                await one.write(one.register(np.zeros(64, np.uint8)), dst)
            assert not peer._channel._replay.keeps or await until(lambda: not peer._channel._replay.keeps) is None

    fabric(seed, delay=(1e-5, 3e-3)).run(scenario)


def test_it_goes_on_by_another_address_when_the_first_leads_nowhere() -> None:
    async def scenario(net: Fabric) -> None:
        one, other, peer, back = await two(net, ways=3)
        first, second, third = net.control_ways(other)
        net.reach(first, False)
        net.reach(second, False)
        asked = asyncio.ensure_future(peer.lookup("later"))
        await asyncio.sleep(0.01)
        net.cut_control(one, other)
        begun = net.loop.time()
        other.publish("later", other.allocate(64))
        await peer.send(b"meanwhile")
        await asked
        assert net.loop.time() - begun < 0.5
        assert peer._link.remote_address == third
        assert (await anext(other.messages())).data == b"meanwhile"
        assert (peer.state, back.state) == ("up", "up")

    fabric(1).run(scenario)


def test_with_no_way_left_the_peer_is_lost_in_time_and_says_why() -> None:
    async def scenario(net: Fabric) -> None:
        one, other, peer, back = await two(net)
        for address in net.control_ways(other):
            net.reach(address, False)
        waits = [asyncio.ensure_future(way.lookup("never")) for way in (peer, back)]
        await asyncio.sleep(0.01)
        begun = net.loop.time()
        net.cut_control(one, other)
        with pytest.raises(at.PeerLostError, match="not resumed within 3 s"):
            await waits[0]
        assert 2.9 < net.loop.time() - begun < 3.2
        with pytest.raises(at.PeerLostError):
            await waits[1]
        assert net.loop.time() - begun < 7.2

    fabric(2).run(scenario)


def test_without_further_ways_nothing_changes() -> None:
    async def scenario(net: Fabric) -> None:
        one, other, peer, back = await two(net, ways=1)
        before = peer._link.bytes_sent
        await peer.send(b"x")
        await asyncio.sleep(1)
        assert peer._link.bytes_sent - before < 20, "nothing is acknowledged"
        net.cut_control(one, other)
        await asyncio.sleep(0.001)
        assert (peer.state, back.state) == ("lost", "lost")

    fabric(3).run(scenario)


def test_a_killed_peer_is_lost_at_once_all_the_same() -> None:
    async def scenario(net: Fabric) -> None:
        _, other, peer, _ = await two(net)
        waiting = asyncio.ensure_future(peer.lookup("never"))
        await asyncio.sleep(0.01)
        begun = net.loop.time()
        net.kill(other)
        with pytest.raises(at.PeerLostError):
            await waiting
        assert net.loop.time() - begun < 0.05

    fabric(4).run(scenario)


@pytest.mark.parametrize("hold", [0.0, 0.5])
def test_a_stopped_peer_is_lost_within_its_timeout(hold: float) -> None:
    async def scenario(net: Fabric) -> None:
        one, other, peer, _ = await two(net)
        waiting = asyncio.ensure_future(peer.lookup("never"))
        await asyncio.sleep(0.01)
        begun = net.loop.time()
        if hold:
            net.cut_control(one, other)
        with net.held(other):
            with pytest.raises(at.PeerLostError):
                await waiting
            assert net.loop.time() - begun < 3.1

    fabric(5).run(scenario)


def test_who_was_given_up_meanwhile_is_refused() -> None:
    """The other side has lost this one for good: its session is not to be had again."""

    async def scenario(net: Fabric) -> None:
        one, other, peer, back = await two(net)
        back._finish("closed", at.ClosedError("test"), goodbye="closed")
        net.cut_control(one, other)  # before the goodbye has come
        with pytest.raises(at.PeerLostError, match="nothing to resume"):
            await peer.lookup("x")
        again = await one.connect(other.address)
        assert again.incarnation == other.incarnation
        assert await again.ping() >= 0

    fabric(6, delay=(1e-3, 2e-3)).run(scenario)


def test_the_key_alone_resumes_nothing() -> None:
    """Somebody has the key, and says that he is a peer that there is; the peer does not notice."""

    async def scenario(net: Fabric) -> None:
        one, other, peer, back = await two(net)
        from aiotransfer.control.key import load_key

        key = load_key(KEY, {})
        ends = []
        for frame in (Resume(1, 0, b"m" * 32), Resume(1, 0, b""), Acknowledge(0), Acknowledge(1 << 80)):
            identity = Identity(one.incarnation, one._info, net.random.randbytes)
            link = await dial_first([other.address], key, identity, net._wires[one], other.incarnation)
            ended: asyncio.Future[BaseException | None] = net.loop.create_future()
            link.on_closed = ended.set_result
            link.start()
            link.post(frame) if frame != Acknowledge(1 << 80) else link.write(b"\xff" * 64)
            ends.append(await asyncio.wait_for(ended, 10))
        silent = await dial_first([other.address], key, identity, net._wires[one], other.incarnation)
        await until(lambda: silent.ended)
        assert len(ends) == 4
        stranger = Identity(77, one._info, net.random.randbytes)
        link = await dial_first([other.address], key, stranger, net._wires[one], other.incarnation)
        link.start()
        link.post(Resume(1, 0, b"m" * 32))
        await until(lambda: link.ended)
        assert link.given_up
        assert link.goodbye == "there is nothing to resume"
        assert await peer.ping() >= 0
        assert (peer.state, back.state) == ("up", "up")
        assert other.statistics().control_resumed == 0

    fabric(7).run(scenario)


@pytest.mark.parametrize("fault", ["fails", "hangs"])
def test_a_name_that_cannot_be_looked_up_any_more_holds_up_no_other_address(fault: str) -> None:
    """The resolver may be cut off by what cut the connection."""

    async def scenario(net: Fabric) -> None:
        one, other, _, _ = await two(net)
        wire = net._wires[one]

        class Cut:
            async def resolve(self, address: at.Address) -> list[at.Address]:
                if address.host != "gone.example":
                    return await wire.resolve(address)
                if fault == "hangs":
                    await asyncio.sleep(1000)
                raise OSError(-3, "Temporary failure in name resolution")

            async def connect(self, address: at.Address, factory: Any) -> None:
                await wire.connect(address, factory)

        ways = [at.Address("gone.example", 1), other.address]
        link = await asyncio.wait_for(dial_first(ways, one._key, one._identity, Cut(), other.incarnation), 10)  # type: ignore[arg-type]
        assert link.incarnation == other.incarnation
        link.abort()

    fabric(9).run(scenario)


def test_another_incarnation_at_the_address_is_refused() -> None:
    async def scenario(net: Fabric) -> None:
        one, other, _, _ = await two(net)
        with pytest.raises(RendezvousError, match="another engine"):
            await dial_first([other.address], one._key, one._identity, net._wires[one], other.incarnation ^ 1)

    fabric(8).run(scenario)


def test_counts_that_cannot_be_end_the_connection_for_good() -> None:
    async def scenario(net: Fabric) -> None:
        _, _, peer, back = await two(net)
        peer._link.post(Acknowledge(1 << 40))
        await until(lambda: back.state == "lost")
        await until(lambda: peer.state == "lost")

    fabric(9).run(scenario)


def test_closing_in_an_outage_leaves_nothing() -> None:
    async def scenario(net: Fabric) -> None:
        one, other, peer, back = await two(net)
        for address in net.control_ways(other):
            net.reach(address, False)
        net.cut_control(one, other)
        await asyncio.sleep(0.1)
        await one.aclose()
        assert peer.state == "closed"
        await until(lambda: back.state == "lost")

    fabric(10).run(scenario)


@pytest.mark.parametrize("seed", range(20))
def test_a_false_alarm_costs_nothing(seed: int) -> None:
    """The old connection works all the while, and goes on to deliver what was under way."""

    async def scenario(net: Fabric) -> None:
        one, other, peer, back = await two(net)
        with collected(one) as by_one, collected(other) as by_other:
            sent = [b"%d" % n for n in range(200)]

            async def talk(way: at.Peer) -> None:
                for data in sent:
                    await way.send(data)
                    await asyncio.sleep(0.0005)

            async def alarm() -> None:
                for _ in range(5):
                    await asyncio.sleep(net.random.random() * 0.02)
                    peer._channel.silent = True
                    one._connections.reconnector.silent(peer)

            await asyncio.gather(talk(peer), talk(back), alarm())
            await until(lambda: len(by_one) >= 200 and len(by_other) >= 200)
            assert by_one == by_other == sent
            assert one.statistics().control_resumed == other.statistics().control_resumed > 0
            assert (peer.state, back.state) == ("up", "up")

    fabric(seed, delay=(1e-4, 5e-3)).run(scenario)


def test_a_peer_that_acknowledges_nothing_is_held_against_a_bound() -> None:
    async def scenario(net: Fabric) -> None:
        _, other, peer, back = await two(net)
        back._channel._acknowledge = lambda: None  # type: ignore[method-assign]
        with collected(other):
            with pytest.raises(at.BusyError, match="acknowledges nothing"):
                while True:
                    await peer.send(bytes(1 << 20))
            assert peer._channel._replay is not None
            assert (15 << 20) < peer._channel._replay.kept_bytes <= MOST_KEPT

    fabric(11).run(scenario)
