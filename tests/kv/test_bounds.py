"""What a peer can make a rank pay for: every number has a bound, at which it is taken, and beyond which it is refused at once."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.kv.prefill import ledger, request
from aiotransfer.kv.protocol import fields, messages
from aiotransfer.kv.protocol.ranks import pairs, receivers
from aiotransfer.kv.roles.dispatcher import Dispatcher
from tests.kv.party import Party, cache_of, party, small
from tests.kv.raw import raw_decoder

pytestmark = pytest.mark.asyncio
LAYOUT = small().to_dict()


async def still_serves(both: Party, id: str = "afterwards") -> None:
    """Another decode rank is served."""
    async with both.decoder.request(both.peer, id, [1, 2, 3], tokens=12, timeout=10, priority=9) as handle:
        serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2]))
        await handle.arrived()
        await serving


# ---- layouts ----


@pytest.mark.parametrize("name", [name for name in fields.MOST if name != "strides"])
async def test_every_number_of_a_layout_has_a_bound(name: str) -> None:
    most = fields.MOST[name]
    roomy: dict[str, Any] = {"layers": 512, "kv_heads": 512, "tp_rank": 0, "pp_rank": 0, "num_pages": 1, "head_dim": 1}
    roomy |= {name.removesuffix("_rank"): 512} if name.endswith("_rank") else {}
    if name == "tp":
        roomy["kv_heads"] = 1
    assert getattr(kv.KVLayout(**(LAYOUT | {"page_tokens": 1} | roomy | {name: most})), name) == most
    for beyond in (most + 1, 1 << 60, -1):
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            kv.KVLayout(**(LAYOUT | roomy | {name: beyond}))


async def test_a_layout_as_a_whole_has_bounds() -> None:
    assert kv.KVLayout(**(LAYOUT | {"layers": 64, "kv_heads": 64, "tp": 64, "pp": 64})).tp == 64
    with pytest.raises(ValueError, match="4096 ranks"):
        kv.KVLayout(**(LAYOUT | {"layers": 128, "kv_heads": 64, "tp": 64, "pp": 65}))
    with pytest.raises(ValueError, match="more than there can be"):
        kv.KVLayout(**(LAYOUT | {"head_dim": 1 << 16, "page_tokens": 1 << 20, "num_pages": 1 << 31}))


async def test_ranks_that_have_something_to_say_to_each_other_are_found_at_once_in_the_largest_instances() -> None:
    model = {"layers": 64, "kv_heads": 64, "head_dim": 1, "dtype": "int8", "page_tokens": 1, "num_pages": 1}
    here, there = kv.KVLayout(**model), kv.KVLayout(**model, tp=64, pp=64)
    begun = time.process_time()
    assert len(receivers(here, there)) == 4096
    assert len(pairs(there, there)) == 4096
    assert time.process_time() - begun < 5  # a pair of layouts for each of 16 million took minutes


@pytest.mark.parametrize(
    "change",
    [
        {"tp": 1 << 28}, {"tp": 512, "pp": 512}, {"pp": 1 << 40}, {"layers": 1 << 40}, {"num_pages": 1 << 62},
        {"page_tokens": 1 << 40}, {"offset": 1 << 62}, {"windows": [1] * 100_000}, {"windows": [1 << 63] * 4},
        {"head_range": [0] * 100_000}, {"layer_range": [0, 1 << 62]}, {"head_dim": 1 << 47}, {"dtype": "x" * 500_000},
        {"x" * 500_000: 1}, {"order": "x" * 500_000}, {str(i): i for i in range(50_000)}, {"tp": True}, {"tp": 1.0}, {"tp": None},
    ],
    ids=lambda change: "-".join(list(change)[:2])[:20],
)  # fmt: skip
async def test_an_absurd_layout_is_refused_at_once_by_either_side(change: dict[str, Any]) -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        answer = await raw.ask(layout=LAYOUT | change)
        assert isinstance(answer, messages.Refused)
        assert len(answer.text) <= messages.MOST_TEXT
        assert not both.prefiller.requests
        await still_serves(both)

    async with at.open_engine() as prefill, party() as both:
        peer = await both.decode.engine.connect(prefill.address, timeout=10)
        with pytest.raises(kv.RequestFailed, match="makes no sense here"):
            asking = asyncio.create_task(both.decoder.request(peer, "a", [1]).__aenter__())
            inbound, data = await anext(prefill.messages(messages.TO_PREFILLER))
            await inbound.send(messages.encode(messages.Reserved(messages.number(data) or 0, LAYOUT | change)))
            await asking
        assert not both.decoder.held
        await still_serves(both)


# ---- reservations ----


def offered(region: at.Region, peer: at.Peer) -> bytes:
    return region.lease(peer).descriptor.encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_ids": np.arange(4, dtype=np.uint32).tobytes()}, "12 tokens take 3 pages, not 4"),
        ({"page_ids": np.array([5, 7, 5], np.uint32).tobytes()}, "names a page twice"),
        ({"page_ids": np.array([0, 1, 1 << 31], np.uint32).tobytes()}, "holds page"),
        ({"page_ids": np.array([0, 1, 64], np.uint32).tobytes()}, "holds page 64"),
        ({"pages": [b"", b""]}, "descriptor"),
        ({"tokens": messages.MOST_TOKENS}, "pages of 4, not 3"),
        ({"layout": LAYOUT | {"page_tokens": 1 << 20, "num_pages": 3}, "page_ids": bytes(4)}, "less than its layout"),
        ({"layout": LAYOUT | {"num_pages": 65}}, "less than its layout"),
        ({"layout": LAYOUT | {"offset": 1}}, "less than its layout"),
    ],
)
async def test_a_reservation_that_a_layer_would_stumble_over_is_refused_before_it_is_taken(
    change: dict[str, Any], words: str
) -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        answer = await raw.ask(**change)
        assert isinstance(answer, messages.Refused)
        assert words in answer.text
        assert not both.prefiller.requests
        await still_serves(both)


async def test_pages_before_the_first_token_that_is_written_may_be_named_twice() -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        answer = await raw.ask(page_ids=np.array([5, 5, 6], np.uint32).tobytes(), skip_tokens=8)
        assert isinstance(answer, messages.Reserved)


async def test_checksums_take_room_in_the_tail() -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        enough = 16 + 8 * 3 * 4
        tail = raw.tail[:enough].lease(raw.peer).descriptor
        assert isinstance(await raw.ask("a", tail=tail.encode(), checksums=True), messages.Reserved)
        answer = await raw.ask("b", tail=tail[: enough - 1].encode(), checksums=True)
        assert isinstance(answer, messages.Refused)
        assert isinstance(await raw.ask("b", tail=tail[: enough - 1].encode()), messages.Reserved)


@pytest.mark.parametrize("name", ["pages", "tail"])
async def test_memory_of_another_engine_cannot_be_offered(name: str) -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        foreign = both.decode.region.lease(both.peer)  # to the prefill rank, by another engine
        descriptor = foreign.descriptor.encode()
        answer = await raw.ask(**{name: [descriptor] if name == "pages" else descriptor})
        assert isinstance(answer, messages.Refused)
        assert "does not belong to the engine that offers it" in answer.text
        await foreign.revoke(timeout=10)


async def test_a_peer_cannot_cancel_the_request_of_another() -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        async with both.decoder.request(both.peer, "a", [1, 2, 3], tokens=12) as handle:
            number = handle._sources[0].number
            await raw.send(messages.Cancel(number, "cancelled"))
            assert isinstance(await raw.ask("b"), messages.Reserved)  # that was read before
            serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2]))
            await handle.arrived(timeout=10)
            await serving


# ---- room for what is reserved ----


async def test_what_reservations_take_is_bounded_and_the_peer_that_takes_the_most_makes_room() -> None:
    options = {"reserved_bytes": 1 << 20}
    async with party(prefill_options=options) as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        answers = [await raw.ask(str(i), data=bytes(100_000), seconds=math.inf) for i in range(12)]
        taken = [isinstance(answer, messages.Reserved) for answer in answers]
        assert taken == [True] * 10 + [False] * 2
        assert isinstance(answers[-1], messages.Refused)
        assert answers[-1].reason == "busy"
        assert both.prefiller._ledger.nbytes <= 1 << 20
        for turn in range(3):  # a friend has room, with a long prompt and with none
            async with both.decoder.request(both.peer, f"friend {turn}", [1], data=bytes(200_000 if turn else 0)) as handle:
                assert handle.state == "streaming"
        gave_way = await raw.answer()
        assert isinstance(gave_way, messages.Failed)
        assert "made room" in gave_way.text
        await raw.send(raw.reserve("long", data=bytes(1_045_000)))
        while isinstance(answer := await raw.answer(), messages.Failed):
            assert "made room" in answer.text
        assert isinstance(answer, messages.Refused)
    assert both.prefiller._ledger.nbytes == 0


async def test_one_peer_does_not_take_all_the_requests() -> None:
    options = {"most_requests": 6}
    async with party(prefill_options=options) as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        assert [type(await raw.ask(str(i))) for i in range(7)] == [messages.Reserved] * 6 + [messages.Refused]
        handles = [both.decoder.request(both.peer, str(i), [i], tokens=4, timeout=10) for i in range(4)]
        for handle in handles[:3]:
            await handle.__aenter__()
        assert len(both.prefiller.requests) == 6
        with pytest.raises(kv.RequestRefused, match="6 requests are under way") as caught:
            await handles[3].__aenter__()  # now both take the same
        assert caught.value.reason == "busy"
        for handle in handles[:3]:
            await handle.__aexit__(None, None, None)


async def test_requests_that_were_accepted_do_not_make_room() -> None:
    options = {"most_requests": 2}
    async with party(prefill_options=options) as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        await raw.ask("0")
        await raw.ask("1")
        accepted = [await both.prefiller.accept(timeout=10) for _ in range(2)]
        with pytest.raises(kv.RequestRefused, match="2 requests are under way"):
            async with both.decoder.request(both.peer, "a", [1]):
                pass
        assert not any(one.cancelled for one in accepted)


async def test_a_peer_that_goes_leaves_nothing() -> None:
    async with party() as both:
        async with raw_decoder(both.prefill.engine, both.decode.layout) as raw:
            for i in range(5):
                assert isinstance(await raw.ask(str(i), instance=f"i{i}", seconds=math.inf, data=bytes(1000)), messages.Reserved)
            book = both.prefiller._ledger
            assert (len(book.requests), len(book.asked), len(book._ranks)) == (5, 1, 5)
        async with asyncio.timeout(10):
            while both.prefiller.requests:
                await asyncio.sleep(0.01)
        assert (book.nbytes, len(book.asked), len(book._ranks)) == (0, 0, 0)


async def test_one_engine_speaks_for_so_many_ranks() -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        answers = [await raw.ask("a", instance=f"i{i}") for i in range(ledger.MOST_RANKS + 1)]
        assert [type(answer) for answer in answers] == [messages.Reserved] * ledger.MOST_RANKS + [messages.Refused]
        assert isinstance(await raw.ask("b", instance="i0"), messages.Reserved)


# ---- times ----


async def test_a_deadline_without_end_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MOST_SECONDS", 0.2)
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        assert isinstance(await raw.ask(seconds=math.inf), messages.Reserved)
        late = await raw.answer()
        assert isinstance(late, messages.Failed)
        assert late.late
        assert not both.prefiller.requests


async def test_ranks_that_never_ask_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "GATHER_SECONDS", 0.2)
    two = small(tp=2)
    async with party() as both, raw_decoder(both.prefill.engine, two) as raw:
        assert isinstance(await raw.ask(seconds=math.inf, instance="A"), messages.Reserved)
        late = await raw.answer()
        assert isinstance(late, messages.Failed)
        assert "decode rank (0, 1) of 2 has not asked" in late.text
        for rank in (0, 1):  # when all have asked it has its own time
            layout = small(tp=2, tp_rank=rank).to_dict()
            assert isinstance(await raw.ask("b", seconds=30.0, instance="A", layout=layout), messages.Reserved)
        await asyncio.sleep(0.4)
        assert [known.state for known in both.prefiller.requests.values()] == ["offered"]


# ---- priorities ----


async def test_any_number_of_priorities_makes_a_bounded_number_of_classes() -> None:
    async with party(small(num_pages=256), small(num_pages=256), prefill_options={"peer_bytes": 1}) as both:
        async with raw_decoder(both.prefill.engine, both.decode.layout) as raw:
            for i in range(600):
                await raw.ask(str(i), priority=i * 5_000_000 - (1 << 30))
            for _ in range(600):
                accepted = await both.prefiller.accept(timeout=10)
                accepted.use([0, 1, 2])
                accepted.layer_ready(0)
            assert len(both.prefiller._writer.schedule._classes) <= len(request.CLASSES)
    async with at.open_engine() as engine:
        region = engine.allocate(small().pool_bytes)
        with pytest.raises(ValueError, match="class_bytes: priorities from -128 to 127"):
            kv.Prefiller(engine, small(), region, class_bytes={128: 1})
        await kv.Prefiller(engine, small(), region, class_bytes={127: 1, -128: 1}).aclose()


# ---- tables of plans ----


async def test_tables_of_all_plans_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotransfer.kv.protocol.plan.MOST_ROWS", 200)
    async with party() as both, raw_decoder(both.prefill.engine, small(num_pages=128)) as raw:
        for i in range(20):
            await raw.ask(str(i), layout=small(num_pages=100 + i).to_dict())
            accepted = await both.prefiller.accept(timeout=10)
            accepted.use([i, i + 1, i + 2])
            accepted.layer_ready(0)
            tables = {id(plan._tables): plan._tables.rows for plan, _ in both.prefiller._plans.values()}
            assert 0 < sum(tables.values()) <= 200
        assert len(both.prefiller._plans) == 20


# ---- readers ----


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_reader_goes_on_after_any_exception_of_one_message(
    side: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        role = both.prefiller if side == "prefill" else both.decoder
        with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "aiotransfer"):
            patch.setattr(type(role), "receive", lambda *_: [][0])
            if side == "prefill":
                answer = await raw.ask()
                assert isinstance(answer, messages.Refused)
                assert "could not be handled" in answer.text
            else:
                with pytest.raises(kv.RequestFailed, match="could not be handled"):
                    async with both.decoder.request(both.peer, "a", [1], timeout=10):
                        pass
        assert "IndexError" in caplog.text
        caplog.clear()  # its frames hold what the test has opened
        assert role.dispatcher._reader is not None
        assert not role.dispatcher._reader.done()
        await still_serves(both)


@pytest.mark.parametrize("kind", [ZeroDivisionError, MemoryError, RecursionError, asyncio.InvalidStateError])
async def test_a_message_that_even_its_answer_cannot_bear_ends_no_reader(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:

        def fail(*_: object) -> bool:
            raise kind

        with monkeypatch.context() as patch:
            patch.setattr(kv.Prefiller, "receive", fail)
            patch.setattr(kv.Prefiller, "unreadable", fail)
            await raw.send(raw.reserve())
            await raw.peer.send(messages.TO_PREFILLER + b"\xff" * 30)
            await raw.peer.ping(timeout=10)
            await asyncio.sleep(0.05)
        assert caplog.text.count("could not be handled") == 2
        caplog.clear()
        assert isinstance(await raw.ask(), messages.Reserved)
        await still_serves(both)


async def test_what_the_host_does_with_a_record_ends_no_reader(caplog: pytest.LogCaptureFixture) -> None:
    def fail(record: kv.RequestRecord) -> None:
        raise KeyError("of the host")

    async with asyncio.timeout(30), party(options={"on_record": fail}, prefill_options={"on_record": fail}) as both:
        async with both.decoder.request(both.peer, "a", [1, 2, 3], timeout=10):
            pass  # its cancel ends it there
        await still_serves(both)
    assert "of the host" in caplog.text
    caplog.clear()


# ---- what a prefill rank says and writes ----


async def the_request(both: Party, prefill: at.Engine) -> tuple[kv.Handle, at.Peer, messages.Reserve, asyncio.Task[Any]]:
    """A request to an engine without a Prefiller, which speaks for one by hand."""
    peer = await both.decode.engine.connect(prefill.address, timeout=10)
    handle = both.decoder.request(peer, "a", [1, 2, 3], tokens=12, timeout=20)
    entering = asyncio.create_task(handle.__aenter__())
    inbound, data = await anext(prefill.messages(messages.TO_PREFILLER))
    message = messages.decode(data)
    assert isinstance(message, messages.Reserve)
    return handle, inbound, message, entering


@pytest.mark.parametrize("header", [(1 << 63, 0), (0, 1 << 63), ((1 << 64) - 1, (1 << 64) - 1), (1 << 17, 0), (0, 1 << 15)])
async def test_a_tail_that_says_absurd_lengths_fails_its_request(header: tuple[int, int]) -> None:
    async with at.open_engine() as prefill, party() as both:
        handle, inbound, message, entering = await the_request(both, prefill)
        await inbound.send(messages.encode(messages.Reserved(message.number, LAYOUT)))
        await entering
        tail = at.RemoteRegion.decode(message.tail)
        source = prefill.allocate(2, "uint64")
        source.numpy()[:] = header
        blocks = handle._blocks()
        for _ in range(blocks + 1):
            await prefill.write(source, tail[:16], imm=message.imm)
        with pytest.raises(kv.RequestFailed, match="longer than its place"):
            await handle.arrived(timeout=10)
        await handle.__aexit__(None, None, None)
        assert not both.decoder.held
        await still_serves(both)


async def test_what_a_prefill_rank_said_of_itself_stays_said() -> None:
    async with at.open_engine() as prefill, party() as both:
        handle, inbound, message, entering = await the_request(both, prefill)
        await inbound.send(messages.encode(messages.Reserved(message.number, LAYOUT)))
        await entering
        blocks = handle._blocks()
        await inbound.send(messages.encode(messages.Reserved(message.number, small(page_tokens=1, num_pages=256).to_dict())))
        await inbound.send(messages.encode(messages.Failed(message.number, "the end")))
        with pytest.raises(kv.RequestFailed, match="the end"):
            await handle.arrived(timeout=10)
        assert handle._blocks() == blocks
        await handle.__aexit__(None, None, None)


async def test_answers_of_another_peer_are_none() -> None:
    async with at.open_engine() as prefill, at.open_engine() as stranger, party() as both:
        handle, inbound, message, entering = await the_request(both, prefill)
        spy = await stranger.connect(both.decode.engine.address, timeout=10)
        for forged in (messages.Refused(message.number, "busy", "no"), messages.Failed(message.number, "no")):
            await spy.send(messages.encode(forged))
        await spy.send(messages.TO_DECODER + messages.encode(messages.Failed(message.number, "no"))[4:13])  # unreadable
        await spy.ping(timeout=10)
        await inbound.send(messages.encode(messages.Reserved(message.number, LAYOUT)))
        await entering
        assert handle.state == "streaming"
        await handle.__aexit__(None, None, None)


async def test_a_peer_that_reads_nothing_is_not_told_without_end() -> None:
    async with party() as both, raw_decoder(both.prefill.engine, both.decode.layout) as raw:
        await raw.ask()
        (inbound,) = [peer for peer in both.prefill.engine.peers if peer.incarnation == raw.engine.incarnation]
        dispatcher: Dispatcher = both.prefiller.dispatcher
        for number in range(30_000):
            dispatcher.tell(inbound, messages.Refused(number, "busy", "x" * 500), 5.0)
        assert 0 < dispatcher._waiting[inbound] <= 8 << 20
        assert len(dispatcher._telling) < 6000
        assert isinstance(await raw.answer(), messages.Refused)
        await still_serves(both)
