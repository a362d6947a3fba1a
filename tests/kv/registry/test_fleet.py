"""Real engines find each other through a registry, and requests go to those who are there."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.aio.ratelimit import RateLimit
from aiotransfer.kv.registry import FileBackend, Fleet, Member, MemoryBackend, Registry, connect, member_of
from aiotransfer.kv.registry import fleet as fleet_module
from tests.kv.party import Rank, cache_of, rank, small
from tests.kv.registry.members import Frail, member
from tests.kv.registry.test_registry import QUICK, until
from tests.kv.worker import big

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def prefill_rank(registry: Registry, name: str, *, listen: str = "127.0.0.1:0", ttl: float = 10) -> AsyncIterator[Member]:
    """A rank that serves every request with the same cache, and is in the registry."""
    async with at.open_engine(name=name, listen=listen) as engine:
        here = rank(engine, small())
        here.fill([0, 1], cache_of(here.layout, 8), 8)
        async with kv.Prefiller(engine, here.layout, here.region) as prefiller:

            async def serve() -> None:
                while True:
                    async with await prefiller.accept() as request:
                        request.use([0, 1])
                        for layer in request.layers:
                            request.layer_ready(layer)
                        await request.finish(name.encode())

            serving = asyncio.create_task(serve())
            try:
                async with registry.join(entry := member_of(prefiller, labels={"model": "m"}), ttl=ttl):
                    yield entry
            finally:
                serving.cancel()
                await asyncio.wait([serving])


async def ask(decoder: kv.Decoder, peer: at.Peer, there: Rank, number: int) -> bytes:
    """Who served the request."""
    async with decoder.request(peer, f"request {number}", [3, 4], tokens=8) as handle:
        tail = bytes((await handle.arrived(timeout=20)).tail)
    assert there.holds([3, 4], cache_of(there.layout, 8), 0, 8)
    return tail


async def test_two_prefill_ranks_join_one_leaves_and_requests_go_to_the_other() -> None:
    backend = MemoryBackend()
    async with Registry(backend) as registry, at.open_engine(name="decode") as engine:
        there = rank(engine, small())
        async with kv.Decoder(engine, there.layout, there.region) as decoder:
            async with registry.join(member_of(decoder)), Fleet(registry, engine, "prefill", timeout=10) as fleet:
                assert registry.members() in ((), (member_of(decoder),))
                async with prefill_rank(registry, "one") as one:
                    async with prefill_rank(registry, "two") as two:
                        peers = await fleet.wait_for(2)
                        assert peers.keys() == {one, two}
                        assert one.layout == small()
                        assert {await ask(decoder, peer, there, n) for n, peer in enumerate(peers.values())} == {b"one", b"two"}
                    await until(lambda: fleet.peers.keys() == {one})
                    assert await ask(decoder, fleet.peers[one], there, 9) == b"one"
                    await until(lambda: registry.members("prefill") == (one,))
                await until(lambda: not fleet.peers)


@asynccontextmanager
async def process(directory: Path, name: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.kv.registry.worker", str(directory), name, "60"]
    running = await asyncio.to_thread(subprocess.Popen, command, cwd=Path(__file__).parents[3])
    try:
        yield running
    finally:
        running.kill()
        running.wait()


@pytest.mark.one_loop
async def test_a_killed_rank_is_not_asked_though_the_registry_still_has_it_and_is_gone_itself(tmp_path: Path) -> None:
    async with process(tmp_path / "ranks", "one") as one, process(tmp_path / "ranks", "two"), at.open_engine() as engine:
        there = rank(engine, big())
        async with Registry(FileBackend(tmp_path / "ranks"), **QUICK) as registry, Fleet(registry, engine, "prefill") as fleet:
            async with kv.Decoder(engine, there.layout, there.region) as decoder:
                await fleet.wait_for(2, timeout=60)
                (tmp_path / "ranks").rename(tmp_path / "away")
                await until(lambda: registry.error is not None)
                one.kill()
                await until(lambda: len(fleet.peers) == 1)
                assert len(registry.members()) == 2  # as it was known last
                ((left, peer),) = fleet.peers.items()
                assert left.name == "two"
                async with decoder.request(peer, "a", [7, 3], tokens=100) as handle:
                    assert (await handle.arrived(timeout=20)).tail == b"done"
                assert there.holds([7, 3], cache_of(there.layout, 100), 0, 100)
                (tmp_path / "away").rename(tmp_path / "ranks")


async def test_a_rank_that_came_back_at_its_address_is_another_one() -> None:
    backend = MemoryBackend()
    async with Registry(backend) as registry, at.open_engine() as engine, Fleet(registry, engine, "prefill") as fleet:
        async with prefill_rank(registry, "one") as old:
            await fleet.wait_for(1)
        await backend.put(old.key, old.encode(), 60)  # as if it had been killed
        async with prefill_rank(registry, "one", listen=old.address) as new:
            await until(lambda: fleet.peers.keys() == {new})
            with pytest.raises(at.PeerLostError, match="is gone: incarnation"):
                await connect(engine, old, timeout=5)
            assert (await connect(engine, new)).incarnation == new.incarnation


async def test_a_connection_that_breaks_is_made_again_while_the_member_is_there() -> None:
    async with Registry(MemoryBackend()) as registry, at.open_engine() as engine, Fleet(registry, engine, "prefill") as fleet:
        async with prefill_rank(registry, "one") as one:
            first = (await fleet.wait_for(1))[one]
            await first.aclose()
            await until(lambda: one in fleet.peers and fleet.peers[one] is not first)


async def test_members_that_cannot_be_reached_hold_nobody_up_and_waiting_ends(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "_limit", RateLimit())  # what earlier tests logged counts here, too
    backend = Frail()
    for address in ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", "no-such-host.invalid:4", "127.0.0.1:5"):
        await backend.put((dead := member(address=address)).key, dead.encode(), 60)
    async with Registry(backend) as registry, at.open_engine() as engine:
        async with Fleet(registry, engine, "prefill", timeout=0.3) as fleet:
            with pytest.raises(at.TransferTimeout, match=r"0 of 1 prefill ranks.*the registry has 5"):
                await fleet.wait_for(1, timeout=0.5)
            async with prefill_rank(registry, "one"):
                await fleet.wait_for(1)
            waiting = asyncio.create_task(fleet.wait_for(9))
            await asyncio.sleep(0.01)
        with pytest.raises(at.ClosedError):
            await waiting
        with pytest.raises(at.ClosedError):
            await fleet.wait_for(1)
        await fleet.aclose()
    assert any("127.0.0.1:" in line and "cannot be connected" in line for line in caplog.messages)


async def test_a_fleet_ends_with_its_registry_and_with_its_engine() -> None:
    registry = Registry(MemoryBackend())
    async with registry, at.open_engine() as engine, Fleet(registry, engine, "prefill") as fleet:
        async with prefill_rank(registry, "one"):
            await fleet.wait_for(1)
            await engine.aclose()
            await until(lambda: not fleet.peers)
        await registry.aclose()
        await until(lambda: fleet._task is not None and fleet._task.done())
        assert not fleet._keepers


async def test_an_engine_is_no_peer_of_itself_and_roles_are_checked() -> None:
    async with Registry(MemoryBackend()) as registry, at.open_engine() as engine:
        there = rank(engine, small())
        async with kv.Decoder(engine, there.layout, there.region) as decoder, registry.join(member_of(decoder, name="d")):
            async with Fleet(registry, engine, "decode") as fleet:
                await registry.wait_for("decode")
                await asyncio.sleep(0.1)
                assert not fleet.peers
        with pytest.raises(ValueError, match="role"):
            Fleet(registry, engine, "router")
        with pytest.raises(TypeError, match="rank must be"):
            member_of(engine)  # type: ignore[arg-type]
