"""The other side is another process, and it is killed, or stopped."""

from __future__ import annotations

import asyncio
import signal

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import kv
from tests.kv.party import cache_of, rank
from tests.kv.worker import big, worker

pytestmark = pytest.mark.asyncio
ALL = list(range(512))


async def test_a_prefill_rank_that_is_killed_while_it_writes_leaves_its_pages_free() -> None:
    async with at.open_engine() as engine, worker("prefill") as (process, address):
        there = rank(engine, big())
        async with kv.Decoder(engine, there.layout, there.region) as decoder:
            peer = await engine.connect(address, timeout=20)
            with pytest.raises(at.PeerLostError):
                async with decoder.request(peer, "a", ALL, data=b"stall") as handle:
                    await asyncio.sleep(0.1)
                    process.send_signal(signal.SIGKILL)
                    await handle.arrived(timeout=10)
            await asyncio.wait_for(decoder.freed(ALL), 10)
            assert decoder.records[-1].outcome in ("lost", "quarantined")
            before = there.memory.copy()
            await asyncio.sleep(0.05)
            assert np.array_equal(before, there.memory)


async def test_a_prefill_rank_that_is_stopped_while_it_writes_writes_nothing_after_the_end() -> None:
    config = at.Config(peer_timeout=0.5)
    async with at.open_engine(config=config) as engine, worker("prefill") as (process, address):
        there = rank(engine, big())
        async with kv.Decoder(engine, there.layout, there.region, revoke_timeout=0.5) as decoder:
            peer = await engine.connect(address, timeout=20)
            try:
                with pytest.raises((at.PeerLostError, at.QuarantineError)):
                    async with decoder.request(peer, "a", ALL, data=b"stall") as handle:
                        await asyncio.sleep(0.1)
                        process.send_signal(signal.SIGSTOP)
                        await handle.arrived(timeout=10)
                if decoder.held:  # it was stopped inside a page: that is not free until it moves on, and nobody gets it
                    assert decoder.records[-1].outcome == "quarantined"
                    with pytest.raises(at.BusyError, match="is held by another request"):
                        decoder.request(peer, "b", [int(next(iter(decoder.held)))])
            finally:
                process.send_signal(signal.SIGCONT)
            await asyncio.wait_for(decoder.freed(ALL), 10)
            there.memory[:] = 0xEE
            await asyncio.sleep(0.1)
            assert (there.memory == 0xEE).all()


async def test_a_decode_rank_that_is_killed_ends_its_request_and_no_other() -> None:
    async with at.open_engine() as engine, at.open_engine() as other:
        here, there = rank(engine, big()), rank(other, big())
        async with kv.Prefiller(engine, here.layout, here.region) as prefiller:
            async with worker("decode", str(engine.address)) as (process, _):
                theirs = await prefiller.accept(timeout=20)
                theirs.use(ALL)
                theirs.layer_ready(0)
                process.send_signal(signal.SIGKILL)
                await theirs.ended_there(timeout=10)
                with pytest.raises((at.PeerLostError, kv.RequestCancelled)):
                    await theirs.finish()
                assert prefiller.records[-1].outcome == "lost"
            async with kv.Decoder(other, there.layout, there.region) as decoder:
                peer = await other.connect(engine.address, timeout=10)
                cache = cache_of(here.layout, 100)
                async with decoder.request(peer, "mine", [3, 4], tokens=100) as handle:
                    async with await prefiller.accept(timeout=10) as request:
                        here.fill([0, 1], cache, 100)
                        request.use([0, 1])
                        for layer in request.layers:
                            request.layer_ready(layer)
                        await request.finish()
                    await handle.arrived(timeout=10)
                    assert there.holds([3, 4], cache, 0, 100)


async def test_after_a_prefill_rank_came_back_requests_go_to_the_new_one() -> None:
    async with at.open_engine() as engine:
        there = rank(engine, big())
        cache = cache_of(there.layout, 100)
        async with kv.Decoder(engine, there.layout, there.region) as decoder:
            for _ in range(2):
                async with worker("prefill") as (_process, address):
                    peer = await engine.connect(address, timeout=20)
                    async with decoder.request(peer, "a", [7, 3], tokens=100) as handle:
                        assert (await handle.arrived(timeout=20)).tail == b"done"
                        assert there.holds([7, 3], cache, 0, 100)
