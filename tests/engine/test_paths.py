"""Which way bytes take, memory that needs another one, and paths that die with everything exact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer.errors import BrokenError, RegistrationError
from aiotransfer.providers import native
from aiotransfer.providers.fabric import libfabric
from aiotransfer.providers.fabric.provider import FabricPath, FabricProvider
from aiotransfer.providers.shm import provider
from aiotransfer.providers.shm.provider import ShmPath, ShmProvider
from aiotransfer.testing import Pair, engine_pair

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(libfabric.missing() is not None, reason=str(libfabric.missing())),
]
PAGE, PAGES = 4096, 2048


@asynccontextmanager
async def ready(providers: Any, **options: Any) -> AsyncIterator[tuple[Pair, at.Region, at.RemoteRegion, at.Region]]:
    async with engine_pair(providers, timeout=20, config=at.Config(peer_timeout=1.0), **options) as pair:
        target, source = pair.right.allocate(PAGE * PAGES), pair.left.allocate(PAGE * PAGES)
        source.numpy()[:] = np.random.default_rng(3).integers(0, 256, PAGE * PAGES, np.uint8)
        pair.right.publish("target", target)
        yield pair, target, await pair.right_peer.lookup("target"), source


async def never(self: object, conversation: object) -> None:
    raise BrokenError("it does not heal")


async def refused(self: object, conversation: object, theirs: object) -> ShmPath:
    raise BrokenError("not this time", provider="shm")


def cut(pair: Pair, path: FabricPath) -> None:
    """Its connection breaks on this side."""
    assert native.lib.at_fab_break(pair.left._p, path.lane_peer) == 0


async def test_the_best_common_way_is_taken_and_says_why_not_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ready(["shm", "tcp"]) as (pair, _, remote, _):
        assert pair.right_peer.path.provider == "shm"
        assert pair.right_peer.path_for(remote).provider == "shm"
    monkeypatch.setattr(ShmProvider, "dial", refused)
    async with ready(["shm", "tcp"]) as (pair, _, _, _):
        assert pair.right_peer.path.provider == "tcp"
        assert dict(pair.right_peer.path.reasons) == {"shm": "not this time"}


async def test_a_peer_that_cannot_tell_its_host_is_reached_more_slowly_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc in one of two containers of a host."""
    async with at.open_engine() as one:
        monkeypatch.setattr(provider, "_boot", lambda: b"")
        async with at.open_engine() as other:
            with pytest.warns(RuntimeWarning, match=r"reached by tcp, .*cannot tell which host"):
                peer = await other.connect(one.address)
            assert peer.path.provider == "tcp"


async def test_memory_that_falls_to_a_slower_way_is_one_warning_for_each_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_permitted(self: ShmPath) -> None:
        raise RegistrationError("not permitted")

    monkeypatch.setattr(ShmPath, "_check_foreign", not_permitted)
    async with ready("auto") as (pair, _, allocated, source):
        regions = [pair.right.register(np.zeros(PAGE, np.uint8)) for _ in range(2)]
        with pytest.warns(RuntimeWarning, match=r"is reached by tcp, .*not permitted.*require='shm'") as seen:
            await at.wait_all([pair.left.write(source[:PAGE], region.descriptor) for region in regions])
        assert len(seen) == 1
        await pair.left.write(source, allocated)


async def test_a_transfer_says_which_way_its_bytes_took_also_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_permitted(self: ShmPath) -> None:
        raise RegistrationError("not permitted")

    monkeypatch.setattr(ShmPath, "_check_foreign", not_permitted)
    async with ready(["shm", "tcp"]) as (pair, _, allocated, source):
        left, piece = pair.left, source[:PAGE]
        registered = pair.right.register(np.zeros(PAGE, np.uint8)).descriptor
        for target, way in ((registered, "tcp"), (allocated[:PAGE], "shm")):
            await left.write(piece, target)  # from here on it is known where the memory is
            plan = left.prepare_write(piece, target)
            for post in (
                lambda target=target: left.write(piece, target),
                lambda target=target: left.write_pages(piece, [0], target, [0], page_bytes=PAGE),
                lambda target=target: left.scatter(piece, [at.ScatterTarget(0, PAGE, target)]),
                plan.post,
            ):
                transfer = post()
                under_way = transfer.path
                await transfer
                assert (under_way.provider, transfer.path.provider) == (way, way)


async def test_a_required_provider_holds_for_the_memory_not_only_for_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_permitted(self: ShmPath) -> None:
        raise RegistrationError("not permitted")

    monkeypatch.setattr(ShmPath, "_check_foreign", not_permitted)
    async with ready(["shm", "tcp"]) as (pair, _, _, source):
        left, piece, pages = pair.left, source[:PAGE], [0]
        group = left.group([left.address, pair.right.address])

        def fresh() -> at.RemoteRegion:
            return at.RemoteRegion.decode(region.descriptor.encode())

        for known in (False, True):  # where it goes is found out by the first operation
            memory = np.zeros(PAGE, np.uint8)
            region = pair.right.register(memory, access="both")
            there = fresh()
            if known:
                await left.write(piece, there)
                assert pair.right_peer.path_for(there).provider == "tcp"
            for call in (
                lambda to: left.write(piece, to, require="shm"),
                lambda to: left.read(to, piece, require="shm"),
                lambda to: left.write_pages(piece, pages, to, pages, page_bytes=PAGE, require="shm"),
                lambda to: left.scatter(piece, [at.ScatterTarget(0, PAGE, to)], require="shm"),
                lambda to: left.prepare_write(piece, to, require="shm").post(),
                lambda to: left.prepare_pages(piece, pages, to, pages, page_bytes=PAGE, require="shm").post(),
                lambda to: group.scatter_plan(piece, [at.ScatterTarget(0, PAGE, to)], require="shm").post(),
            ):
                with pytest.raises(at.ProviderUnavailableError, match="by tcp, not by 'shm'"):
                    await call(there if known else fresh())
            assert not memory.any() or known


async def test_a_slower_way_than_both_sides_have_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShmProvider, "dial", refused)
    async with at.open_engine() as right, at.open_engine() as left:
        with pytest.warns(RuntimeWarning, match="reached by tcp, a slower way.*not this time"):
            peer = await left.connect(right.address)
        await peer.aclose()
        await left.connect(right.address)  # and not another one
    async with at.open_engine() as right, at.open_engine() as left:
        with pytest.raises(at.ProviderUnavailableError, match="shm"):
            await left.connect(right.address, require="shm")


async def test_an_operation_that_requires_another_way_is_refused() -> None:
    async with ready(["shm", "tcp"]) as (pair, _, remote, source):
        await pair.left.write(source, remote, require="shm")
        with pytest.raises(at.ProviderUnavailableError):
            pair.left.write(source, remote, require="tcp")


async def test_memory_that_the_default_way_cannot_reach_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ShmPath) -> None:
        raise RegistrationError("this process may not write there", provider="shm")

    monkeypatch.setattr(ShmPath, "_check_foreign", refuse)
    async with ready(["shm", "tcp"]) as (pair, _, remote, source):
        memory = np.zeros(PAGE, np.uint8)
        pair.right.publish("foreign", pair.right.register(memory))
        foreign = await pair.right_peer.lookup("foreign")
        transfer = pair.left.write(source[:PAGE], foreign, imm=1)
        await transfer
        await pair.left.write(source, remote, imm=1)
        assert (pair.right_peer.path.provider, pair.right_peer.path_for(foreign).provider) == ("shm", "tcp")
        assert pair.left.write(source[:PAGE], foreign, imm=1).path is pair.right_peer.path_for(foreign)
        await pair.right.counter(imm=1).wait(3, timeout=5)
        assert np.array_equal(memory, source.numpy()[:PAGE])
    async with ready("shm") as (pair, _, _, source):
        pair.right.publish("foreign", pair.right.register(np.zeros(PAGE, np.uint8)))
        with pytest.raises(RegistrationError, match="may not write there"):
            await pair.right_peer.lookup("foreign")


async def test_two_engines_that_need_another_way_at_once_both_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ShmPath) -> None:
        raise RegistrationError("this process may not write there", provider="shm")

    monkeypatch.setattr(ShmPath, "_check_foreign", refuse)
    async with ready(["shm", "tcp"]) as (pair, _, _, source):
        memories = [np.zeros(PAGE, np.uint8) for _ in range(2)]
        for engine, memory in zip((pair.left, pair.right), memories, strict=True):
            engine.publish("mine", engine.register(memory))
        theirs, ours = await asyncio.gather(pair.right_peer.lookup("mine"), pair.left_peer.lookup("mine"))
        back = pair.right.allocate(PAGE)
        back.numpy()[:] = 7
        await at.wait_all([pair.left.write(source[:PAGE], theirs, imm=1), pair.right.write(back, ours, imm=1)])
        await pair.left.counter(imm=1).wait(1, timeout=5)
        await pair.right.counter(imm=1).wait(1, timeout=5)
        assert (memories[0] == 7).all()
        assert np.array_equal(memories[1], source.numpy()[:PAGE])


async def test_of_two_ways_that_were_set_up_at_once_each_brings_segments_by_its_own_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aiotransfer.providers.shm.provider.SETUP_SECONDS", 0.5)
    async with ready(["tcp", "shm"]) as (pair, _, remote, _):
        back = pair.left.allocate(PAGE)
        pair.left.publish("back", back)
        ours = await pair.left_peer.lookup("back")
        await asyncio.gather(pair.left._paths._dial(pair.right_peer, "shm"), pair.right._paths._dial(pair.left_peer, "shm"))
        for peer, region in ((pair.right_peer, remote), (pair.left_peer, ours)):
            ways = [path for path in peer._paths if path.provider == "shm"]
            assert len(ways) == 2
            for way in ways:
                await way.bind(region._grant, peer, peer)


@pytest.mark.parametrize("dying", ["reset", "silent"])
async def test_a_path_that_dies_gives_way_to_the_next_with_every_count_exact(
    monkeypatch: pytest.MonkeyPatch, dying: str
) -> None:
    async with ready(["tcp", "shm"]) as (pair, target, remote, source):
        path = pair.right_peer.path
        assert isinstance(path, FabricPath)
        back = pair.left.allocate(PAGE * PAGES)
        pair.left.publish("back", back)
        ours = await pair.left_peer.lookup("back")
        there = np.random.default_rng(5).permutation(PAGES)
        plan = pair.left.prepare_write(source[:PAGE], remote[:PAGE])
        await plan.post(imm=3)
        if dying == "reset":
            monkeypatch.setattr(FabricPath, "reopen", never)
        transfers = [pair.left.write_pages(source, np.arange(PAGES), remote, there, page_bytes=PAGE, imm=1)]
        transfers += [pair.left.signal(pair.right_peer, 1) for _ in range(100)]
        transfers += [pair.right.write(target, ours, imm=2), plan.post(imm=3)]
        await asyncio.sleep(0.001)
        if dying == "reset":
            cut(pair, path)
        else:
            native.lib.at_fab_mute(pair.left._p, path.lane_peer)
        await at.wait_all(transfers)
        await plan.post(imm=3)
        assert (pair.right_peer.path.provider, pair.left_peer.path.provider) == ("shm", "shm")
        assert dict(pair.right_peer.path.reasons)["tcp"] == "it broke, and did not heal"
        await asyncio.sleep(0.05)
        counts = pair.right.counter(imm=1).total, pair.left.counter(imm=2).total, pair.right.counter(imm=3).total
        assert counts == (PAGES + 100, 1, 3)
        expected = np.empty((PAGES, PAGE), np.uint8)
        expected[there] = source.numpy().reshape(PAGES, PAGE)
        found = target.numpy().reshape(PAGES, PAGE)
        assert np.array_equal(found[1:], expected[1:])
        await pair.left.write(source, remote)
        assert np.array_equal(target.numpy(), source.numpy())


async def test_without_another_way_a_path_that_does_not_heal_ends_as_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FabricPath, "reopen", never)
    async with ready("tcp") as (pair, _, remote, source):
        await pair.left.write(source, remote)
        path = pair.right_peer.path
        assert isinstance(path, FabricPath)
        cut(pair, path)
        with pytest.raises(at.PeerLostError):
            await pair.left.write(source, remote)


async def test_nobody_answering_on_the_data_port_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(self: FabricPath, seconds: float) -> None:
        raise BrokenError("nothing got through", provider="tcp")

    monkeypatch.setattr(FabricPath, "heard", deaf)
    async with at.open_engine(providers="tcp") as right, at.open_engine(providers="tcp") as left:
        with pytest.raises(at.ProviderUnavailableError) as caught:
            await left.connect(right.address)
        assert caught.value.attempts == [("tcp", "nothing got through")]
    async with at.open_engine(providers=["tcp", "shm"]) as right, at.open_engine(providers=["tcp", "shm"]) as left:
        peer = await left.connect(right.address)
        assert peer.path.provider == "shm"
        assert (await anext(right.arrivals())).path.provider == "shm"
        assert FabricProvider.dial is not None
