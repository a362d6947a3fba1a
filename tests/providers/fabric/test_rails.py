"""Several tcp rails as one: each an address of the loopback interface."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.providers import native
from aiotransfer.providers.fabric.provider import FabricPath
from aiotransfer.testing import Pair, engine_pair
from aiotransfer.testing.contract import ProviderContract
from tests.needs import needs_tcp
from tests.providers.fabric.breaking import PAGE, PAGES, BreakingConnections, ready
from tests.providers.fabric.test_fabric import LIKE_EFA

pytestmark = [pytest.mark.asyncio, needs_tcp()]


def loopbacks(n: int, first: int = 1) -> list[str]:
    return [f"127.0.0.{i}" for i in range(first, first + n)]


@asynccontextmanager
async def joined(left: Sequence[str], right: Sequence[str], **options: Any) -> AsyncIterator[Pair]:
    """Two engines by these rails."""
    options = {"timeout": 20, **options}
    options = {"providers": "tcp", **options}
    async with (
        at.open_engine(name="left", rails=left, **options) as one,
        at.open_engine(name="right", rails=right, **options) as other,
    ):
        right_peer = await one.connect(other.address)
        arrivals = other.arrivals()
        left_peer = await anext(arrivals)
        await arrivals.aclose()  # type: ignore[attr-defined]
        yield Pair(one, other, right_peer, left_peer)


class TestTwoRails(ProviderContract, BreakingConnections):
    provider = "tcp"
    options = {"rails": loopbacks(2)}  # noqa: RUF012 - read only

    def engines(self) -> AbstractAsyncContextManager[Pair]:
        return engine_pair("tcp", timeout=20, **self.options)


class TestTwoRailsLikeEfa(ProviderContract):
    provider = "tcp"
    options = {"rails": loopbacks(2), "_platform": Platform(restrictions=LIKE_EFA)}  # noqa: RUF012 - read only


async def all_up(pair: Pair) -> None:
    async with asyncio.timeout(10):
        while any(one.broken for peer in (pair.left_peer, pair.right_peer) for one in peer.path.members):
            await asyncio.sleep(0.005)


def posted(pair: Pair) -> list[int]:
    """What each rail of the left side has had delivered, and letters."""
    return [one.signs() for one in pair.right_peer.path.members]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("here", "there"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 4)])
async def test_sides_with_different_numbers_of_rails_use_all_of_them(here: int, there: int) -> None:
    async with ready(joined(loopbacks(here), loopbacks(there, 11))) as (pair, target, remote, source):
        await all_up(pair)
        rails = pair.right_peer.path.rails
        assert len(rails) == max(here, there)
        for address in loopbacks(here) + loopbacks(there, 11):
            assert any(address in rail.split() for rail in rails)
        before = posted(pair)
        await pair.left.write(source, remote, imm=1)
        await pair.left.write_pages(source, np.arange(PAGES), remote, np.arange(PAGES), page_bytes=PAGE, imm=1)
        assert all(after > one for one, after in zip(before, posted(pair), strict=True)), "each has carried something"
        await pair.right.counter(imm=1).wait(1 + PAGES)
        await asyncio.sleep(0.02)
        assert pair.right.counter(imm=1).value == 0
        assert np.array_equal(target.numpy(), source.numpy())


async def test_small_writes_rotate() -> None:
    async with ready(joined(loopbacks(2), loopbacks(2))) as (pair, _, remote, source):
        await all_up(pair)
        before = posted(pair)
        for _ in range(20):
            await pair.left.write(source[:100], remote[:100])
        assert [after - one for one, after in zip(before, posted(pair), strict=True)] == pytest.approx([10, 10], abs=2)


async def test_one_rail_is_used_on_request_and_engines_say_what_they_have() -> None:
    async with joined(["127.0.0.5"], ["127.0.0.6"]) as pair:
        assert pair.left.rails == ("tcp:127.0.0.5 127.0.0.5",)
        assert len(pair.right_peer.path.rails) == 1
        assert pair.right_peer.path.members == (pair.right_peer.path,)
        await pair.left.signal(pair.right_peer, 1)
    async with engine_pair("tcp", timeout=10) as pair:
        assert len(pair.right_peer.path.rails) == 1, "the other addresses of this host lead nowhere else"


async def test_an_engine_that_names_no_rails_is_reached_by_those_that_the_other_names() -> None:
    async with engine_pair("tcp", timeout=10) as plain:
        async with at.open_engine(providers="tcp", rails="127.0.0.9", timeout=10) as engine:
            peer = await engine.connect(plain.left.address)
            await engine.signal(peer, 1)
            await plain.left.counter(imm=1).wait(1, timeout=5)
            assert len((await plain.left.connect(engine.address)).path.rails) == 1


async def test_rails_that_are_none_are_refused_by_name() -> None:
    with pytest.raises(at.ConfigurationError, match="nonsense0"):
        await at.open_engine(rails=["nonsense0"])
    with pytest.raises(ValueError, match="twice"):
        at.open_engine(rails=["lo", "lo"])
    with pytest.raises(ValueError, match="at least one"):
        at.open_engine(rails=[])
    with pytest.raises(TypeError, match="7"):
        at.open_engine(rails=[7])  # type: ignore[list-item]


@pytest.mark.parametrize("side", ["left", "right"])
async def test_what_is_left_carries_everything_and_the_rail_comes_back_by_itself(side: str) -> None:
    async with ready(joined(loopbacks(2), loopbacks(2))) as (pair, target, remote, source):
        await all_up(pair)
        peer = pair.right_peer if side == "left" else pair.left_peer
        for _ in range(10):
            transfers = [
                pair.left.write_pages(source, np.arange(PAGES), remote, np.arange(PAGES), page_bytes=PAGE, imm=1),
                pair.left.write(source, remote, imm=1),
            ]
            await asyncio.sleep(0.002)
            peer.path.members[0].strike()
            await at.wait_all(transfers)
            await all_up(pair)
        await asyncio.sleep(0.02)
        assert pair.right.counter(imm=1).total == 10 * (PAGES + 1)
        assert np.array_equal(target.numpy(), source.numpy())


async def test_a_rail_that_falls_silent_is_given_up_and_opened_again() -> None:
    config = at.Config(peer_timeout=0.8)
    async with ready(joined(loopbacks(2), loopbacks(2), config=config)) as (pair, target, remote, source):
        await all_up(pair)
        mute = pair.right_peer.path.members[1]
        assert native.lib.at_fab_mute(pair.left._p, mute.lane_peer) == 0
        assert native.lib.at_fab_mute(pair.right._p, pair.left_peer.path.members[1].lane_peer) == 0
        waiting = asyncio.ensure_future(pair.right_peer.lookup("later"))  # something that waits on the peer
        async with asyncio.timeout(5):
            while not mute.broken:
                await asyncio.sleep(0.01)
        await pair.left.write(source, remote, imm=1)
        assert np.array_equal(target.numpy(), source.numpy())
        waiting.cancel()


async def test_an_operation_that_a_fabric_cannot_settle_says_that_its_rail_broke() -> None:
    platform = Platform(restrictions=LIKE_EFA._replace(without=native.lib.AT_FAB_ORDERED))
    async with ready(joined(loopbacks(2), loopbacks(2), _platform=platform)) as (pair, _, remote, source):
        await all_up(pair)
        transfer = pair.left.write(source, remote, imm=1)
        pair.right_peer.path.members[0].strike()
        with pytest.raises(at.RailBrokenError):
            await transfer
        await all_up(pair)
        await pair.left.write(source, remote, imm=2)
        await pair.right.counter(imm=2).wait(1, timeout=5)


async def test_what_is_left_takes_over_without_the_control_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so without either event loop: letters say what was counted."""

    async def never(*_: object) -> None:
        await asyncio.sleep(3600)

    async with ready(joined(loopbacks(3), loopbacks(3))) as (pair, target, remote, source):
        await all_up(pair)
        monkeypatch.setattr(FabricPath, "reopen", never)
        for side, rail in (("left", 0), ("right", 1)):
            transfers = [
                pair.left.write_pages(source, np.arange(PAGES), remote, np.arange(PAGES), page_bytes=PAGE, imm=1),
                pair.left.write(source, remote, imm=1),
            ]
            await asyncio.sleep(0.002)
            (pair.right_peer if side == "left" else pair.left_peer).path.members[rail].strike()
            await at.wait_all(transfers)
        await asyncio.sleep(0.02)
        assert pair.right.counter(imm=1).total == 2 * (PAGES + 1)
        assert np.array_equal(target.numpy(), source.numpy())
        assert [one.broken for one in pair.right_peer.path.members] == [True, True, False]


@pytest.mark.parametrize("dying", ["reset", "silent"])
async def test_where_all_are_lost_another_provider_takes_over_with_every_count_exact(
    monkeypatch: pytest.MonkeyPatch, dying: str
) -> None:
    async def never(*_: object) -> None:
        raise at.BrokenError("it does not heal")

    options = {"providers": ["tcp", "shm"], "config": at.Config(peer_timeout=0.8)}
    async with ready(joined(loopbacks(2), loopbacks(2), **options)) as (pair, target, remote, source):
        await all_up(pair)
        assert pair.right_peer.path.provider == "tcp"
        monkeypatch.setattr(FabricPath, "reopen", never)
        transfers = [pair.left.write_pages(source, np.arange(PAGES), remote, np.arange(PAGES), page_bytes=PAGE, imm=1)]
        if dying == "silent":
            for one in pair.right_peer.path.members:
                native.lib.at_fab_mute(pair.left._p, one.lane_peer)
        transfers += [pair.left.write(source, remote, imm=1), *(pair.left.signal(pair.right_peer, 1) for _ in range(100))]
        if dying == "reset":
            for one in pair.right_peer.path.members:
                one.strike()
        await at.wait_all(transfers)
        async with asyncio.timeout(10):  # all may have arrived before it was struck
            while (pair.right_peer.path.provider, pair.left_peer.path.provider) != ("shm", "shm"):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert pair.right.counter(imm=1).total == PAGES + 101
        assert np.array_equal(target.numpy(), source.numpy())


async def test_an_engine_reaches_itself_by_several_rails() -> None:
    async with at.open_engine(providers="tcp", rails=loopbacks(2), timeout=10) as engine:
        me = await engine.connect(engine.address)
        assert len(me.path.rails) == 2
        region, source = engine.allocate(1 << 20), engine.allocate(1 << 20)
        source.numpy()[:] = 7
        engine.publish("mine", region)
        await engine.write(source, await me.lookup("mine"), imm=1)
        await engine.counter(imm=1).wait(1, timeout=5)
        assert (region.numpy() == 7).all()
