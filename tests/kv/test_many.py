"""What many requests leave behind on the prefill side: nothing that grows, and mappings that are made once."""

from __future__ import annotations

import asyncio
import gc
from contextlib import AsyncExitStack

import pytest

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.engine.memory.lease import Lease
from aiotransfer.kv.protocol import messages
from tests.kv.party import Party, cache_of, party, small

pytestmark = pytest.mark.asyncio


async def filled(both: Party, id: str, pages: list[int], tokens: int = 12) -> None:
    serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, tokens), [0, 1, 2]))
    async with both.decoder.request(both.peer, id, pages, tokens=tokens) as handle:
        await handle.arrived(timeout=10)
    await serving


async def test_requests_that_are_cancelled_before_anybody_takes_them_do_not_pile_up() -> None:
    async with party() as both:
        for number in range(30):
            async with both.decoder.request(both.peer, str(number), [number]):
                pass
        async with asyncio.timeout(10):
            while both.prefiller.requests:
                await asyncio.sleep(0.01)
        assert len(both.prefiller._offers) <= 1
        await filled(both, "after", [1, 2, 3])
        assert [record.outcome for record in both.prefiller.records].count("cancelled") == 30


async def test_a_cancel_ends_its_own_request_and_no_other() -> None:
    async with party() as both:
        handles = [both.decoder.request(both.peer, str(number), [number], tokens=4) for number in range(6)]
        entered = [await handle.__aenter__() for handle in handles]
        await entered[2].__aexit__(None, None, None)
        async with asyncio.timeout(10):
            while (both.decoder.instance, "2") in both.prefiller.requests:
                await asyncio.sleep(0.01)
        assert set(both.prefiller.requests) == {(both.decoder.instance, id) for id in ("0", "1", "3", "4", "5")}
        order = [(await both.prefiller.accept(timeout=10)).id for _ in range(5)]
        assert order == ["0", "1", "3", "4", "5"]
        for handle in (*entered[:2], *entered[3:]):
            await handle.__aexit__(None, None, None)


async def test_requests_one_after_another_share_an_immediate_and_never_two_at_a_time() -> None:
    async with party() as both:
        used = set()
        for number in range(20):
            await filled(both, str(number), [1, 2, 3])
            async with both.decoder.request(both.peer, f"given up {number}", [4]) as handle:
                used.add(handle._counter.imm)
        assert len(used) <= 2, used
        async with AsyncExitStack() as stack:
            many = [both.decoder.request(both.peer, f"one of many {n}", [n]) for n in range(10)]
            handles = [await stack.enter_async_context(handle) for handle in many]
            assert len({handle._counter.imm for handle in handles}) == 10


async def test_the_immediate_of_a_request_whose_end_is_not_proved_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, unproved = Lease.revoke, True

    async def revoke(lease: Lease, **options: float) -> None:
        if unproved:
            await asyncio.sleep(0.01)
            raise at.QuarantineError("for this test")
        await real(lease, **options)

    async with party() as both:
        await filled(both, "before", [1, 2, 3])
        monkeypatch.setattr(Lease, "revoke", revoke)
        monkeypatch.setattr("aiotransfer.kv.decode.handle.LOOK_SECONDS", 0.01)
        handle = both.decoder.request(both.peer, "stuck", [4])
        with pytest.raises(at.QuarantineError):
            async with handle:
                stuck = handle._counter.imm
        values = both.decode.engine._values
        assert stuck not in values._proved
        other = values.again()
        assert other.imm != stuck
        values.give_back(other)
        unproved = False
        while handle._saga.state != "free":
            await asyncio.sleep(0.02)
        assert stuck in values._proved


async def test_a_number_that_is_under_way_is_refused() -> None:
    async with party() as both:
        await filled(both, "before", [1, 2, 3])
        sent: list[messages.ToDecoder] = []
        both.prefiller.dispatcher.tell = lambda peer, message, seconds: sent.append(message)  # type: ignore[assignment,misc]
        layout = both.decode.layout.to_dict()
        (inbound,) = both.prefill.engine.peers
        lease = both.decode.region.lease(both.peer)
        pool = tail = lease.descriptor.encode()

        def ask(number: int, id: str) -> None:
            reserve = messages.Reserve(number, id, layout, [pool], tail, bytes(4), 4, 0, 1, 0, 10.0, False, b"")
            both.prefiller.receive(inbound, reserve)

        ask(5, "a")
        ask(5, "b")
        ask(6, "b")
        assert [type(message) for message in sent] == [messages.Reserved, messages.Refused, messages.Reserved]
        assert isinstance(sent[1], messages.Refused)
        assert sent[1].reason == "protocol"
        await lease.revoke(timeout=10)


async def test_a_request_that_is_over_is_nobodys_garbage() -> None:
    """No cycle keeps it, and with it what was mapped for it, until the collector runs."""
    async with party() as both:
        await filled(both, "warm", [1, 2, 3])
        gc.collect()
        gc.disable()
        try:
            for number in range(5):
                await filled(both, str(number), [1, 2, 3])
            await asyncio.sleep(0.05)
            alive = [thing for thing in gc.get_objects() if isinstance(thing, kv.Handle | kv.PrefillRequest)]
        finally:
            gc.enable()
        assert len(alive) <= 1, alive


async def test_what_was_mapped_for_a_decode_rank_stays_so_between_requests() -> None:
    async with party(small(), small()) as both:
        await filled(both, "first", [1, 2, 3])
        gc.collect()
        ((inbound, asked),) = both.prefiller._ledger.asked.items()
        assert not asked.requests
        path = inbound.path
        mapped = {number: id(segment) for number, segment in path._maps.items()}  # type: ignore[attr-defined]
        await filled(both, "second", [4, 5, 6])
        gc.collect()
        again = {number: id(segment) for number, segment in path._maps.items()}  # type: ignore[attr-defined]
        assert mapped == again != {}
    assert not both.prefiller._ledger.asked
