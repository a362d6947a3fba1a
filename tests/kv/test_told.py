"""Whatever is raised on one side of a request, the other side is told at once and why. Nothing here has a deadline that could end
a wait instead, but for the tests of what a deadline says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.kv.decode import handle
from aiotransfer.kv.decode.absence import say_absent
from aiotransfer.kv.prefill import gathering, request
from aiotransfer.kv.protocol import messages
from aiotransfer.kv.roles.tails import TailPool
from tests.kv.party import Rank, cache_of, party, rank, small
from tests.kv.test_failures import all_is_free, until

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]
FOREVER = 10_000.0


class Unspeakable(RuntimeError):
    """Has no text."""

    def __str__(self) -> str:
        raise ValueError("no")


class Odd:
    """Cannot be made bytes of."""

    def __bytes__(self) -> bytes:
        raise OSError("no memory")


RAISED = {
    "one": (lambda: ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    "no text for a wire": (lambda: ValueError("\ud800"), r"\\ud800"),
    "much text": (lambda: ValueError("x" * 9000), "x" * 100),
    "no text at all": (Unspeakable, "Unspeakable"),
    "one of ours": (lambda: at.BusyError("full"), "full"),
}
raised = pytest.mark.parametrize("what", RAISED)


@asynccontextmanager
async def two_ranks() -> AsyncIterator[tuple[kv.Prefiller, list[kv.Decoder], list[at.Peer]]]:
    """A prefill rank, and the two decode ranks of an instance; with their peers."""
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(at.open_engine()) for _ in range(3)]
        here: Rank = rank(engines[0], small())
        prefiller = await stack.enter_async_context(kv.Prefiller(here.engine, here.layout, here.region))
        decoders, peers = [], []
        for i, engine in enumerate(engines[1:]):
            there = rank(engine, small(tp=2, tp_rank=i))
            made = kv.Decoder(engine, there.layout, there.region, instance="A")
            decoders.append(await stack.enter_async_context(made))
            peers.append(await engine.connect(engines[0].address, timeout=10))
        yield prefiller, decoders, peers


async def waits(decoder: kv.Decoder, peer: at.Peer, timeout: float = FOREVER) -> None:
    async with decoder.request(peer, "a", [1, 2, 3], timeout=timeout) as request:
        await request.arrived()


async def whole(prefiller: kv.Prefiller, decoders: list[kv.Decoder], peers: list[at.Peer]) -> None:
    """Both ask again, and all is well."""

    async def serve() -> None:
        async with await prefiller.accept() as request:
            request.use([0, 1, 2])
            for layer in request.layers:
                request.layer_ready(layer)
            await request.finish()

    await asyncio.gather(serve(), *(waits(decoder, peer) for decoder, peer in zip(decoders, peers, strict=True)))


# ---- decode ranks of one request ----


async def test_a_decode_rank_that_never_asks_is_named_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "NOTICE_SECONDS", 0.01)
    async with two_ranks() as (prefiller, decoders, peers):
        with pytest.raises(at.TransferTimeout, match=r"0 of 97 writes .*; .* says: decode rank \(0, 1\) of 2 has not asked"):
            await waits(decoders[0], peers[0], timeout=3)
        await until(lambda: prefiller.records)
        assert "decode rank (0, 1) of 2 has not asked" in prefiller.records[-1].error


async def test_when_the_prefill_rank_gives_it_up_first_it_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotransfer.kv.prefill.request.GATHER_SECONDS", 0.1)
    async with two_ranks() as (_, decoders, peers):
        with pytest.raises(at.TransferTimeout, match=r"decode rank \(0, 0\) of 2 has not asked for this request"):
            await waits(decoders[1], peers[1])


async def test_a_rank_that_comes_after_all_is_not_named_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "NOTICE_SECONDS", 0.01)
    async with two_ranks() as (_, decoders, peers):
        async with decoders[0].request(peers[0], "a", [1, 2, 3], timeout=FOREVER) as first:
            await until(lambda: "(0, 1)" in first._progress())
            async with decoders[1].request(peers[1], "a", [1, 2, 3], timeout=FOREVER):
                await until(lambda: first._progress() == "0 of 97 writes have landed")


SHORT: dict[str, Any] = {
    "memory": lambda patch, decoder: patch.setattr(decoder.tails, "take", _raise(at.RegistrationError("no memory"))),
    "any": lambda patch, decoder: patch.setattr(decoder.tails, "take", _raise(MemoryError("no memory"))),
    "a lease": lambda patch, decoder: patch.setattr(type(decoder.pages), "lease", _raise(at.BusyError("no memory"))),
    "half asked": lambda patch, decoder: patch.setattr(decoder.dispatcher, "own", _raise(RuntimeError("no memory"))),
}


def _raise(error: BaseException) -> Any:
    def instead(*_: object, **__: object) -> Any:
        raise type(error)(*error.args)  # a fresh one: the first would keep all frames it passed

    return instead


@pytest.mark.parametrize("first", ["asks", "fails"])
@pytest.mark.parametrize("what", [*SHORT, "page_ids", "tokens", "timeout", "odd data"])
async def test_a_decode_rank_that_cannot_ask_is_named_with_its_reason(
    what: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: dict[str, Any] = {
        "page_ids": {"page_ids": [1, 1]}, "tokens": {"tokens": -1}, "timeout": {"timeout": -1},
        "odd data": {"data": Odd()},
    }  # fmt: skip
    text = {"page_ids": "a page twice", "tokens": "tokens must not be negative", "timeout": "-1"}.get(what, "no memory")
    async with two_ranks() as (prefiller, decoders, peers):

        async def fail() -> None:
            with monkeypatch.context() as patch:
                if what in SHORT:
                    if what == "half asked":  # what is told goes by the same way
                        own = decoders[1].dispatcher.own
                        calls = [RuntimeError("no memory")]

                        def once(work: Any) -> Any:
                            if not calls:
                                return own(work)
                            work.close()
                            raise calls.pop()

                        patch.setattr(decoders[1].dispatcher, "own", once)
                    else:
                        SHORT[what](patch, decoders[1])
                with pytest.raises(Exception, match=text):
                    async with decoders[1].request(**{"peer": peers[1], "id": "a", "page_ids": [1, 2, 3]} | wrong.get(what, {})):
                        pass
            assert not decoders[1].held

        for _ in range(2):
            if first == "asks":
                waiting = asyncio.create_task(waits(decoders[0], peers[0]))
                await until(lambda: prefiller.requests)
                await fail()
            else:
                await fail()
                await until(lambda: len(prefiller._absences))
                waiting = asyncio.create_task(waits(decoders[0], peers[0]))
            with pytest.raises(kv.KVRequestError, match=rf"decode rank \(0, 1\) at .* cannot take part: .*{text}"):
                await waiting
            await until(lambda: not prefiller.requests and not decoders[0].held)
            await whole(prefiller, decoders, peers)


async def test_nobody_is_absent_because_another_engine_says_so_nor_while_its_request_is_under_way() -> None:
    async with two_ranks() as (prefiller, decoders, peers), at.open_engine() as stranger:
        await whole(prefiller, decoders, peers)  # it is known who is which rank
        lies = await stranger.connect(prefiller.engine.address, timeout=10)
        first = asyncio.create_task(waits(decoders[0], peers[0]))
        await until(lambda: prefiller.requests)
        for decoder in decoders:
            await lies.send(messages.encode(messages.Absent(1, "a", decoder.layout.to_dict(), "a lie", "A")))
        await lies.send(messages.encode(messages.Reserve(2, "x", {}, b"", b"", b"", 0, 0, 0, 0, 1.0, False, b"")))
        async for _, data in stranger.messages(messages.TO_DECODER):
            assert isinstance(messages.decode(data), messages.Refused)  # so those before it were read
            break
        second = asyncio.create_task(waits(decoders[1], peers[1]))
        async with await prefiller.accept() as request:
            say_absent(decoders[1], decoders[1]._settings, (peers[1],), "a", ValueError("it asks twice"))
            request.use([0, 1, 2])
            for layer in request.layers:
                request.layer_ready(layer)
            await request.finish()
        await asyncio.gather(first, second)


# ---- one rank on either side ----


@raised
async def test_what_is_raised_in_the_block_of_the_decode_side_is_the_reason_on_the_prefill_side(what: str) -> None:
    make, text = RAISED[what]
    error = make()
    async with party() as both:
        with pytest.raises(type(error)):
            async with both.decoder.request(both.peer, "a", [1, 2, 3], timeout=FOREVER):
                request = await both.prefiller.accept()
                request.use([0, 1, 2])
                raise error
        with pytest.raises(kv.RequestCancelled, match=f"not wanted any more .*{text}"):
            await request.ended_there()
            await request.finish()
        await all_is_free(both)


@raised
async def test_what_is_raised_in_the_block_of_the_prefill_side_is_the_reason_on_the_decode_side(what: str) -> None:
    make, text = RAISED[what]
    error = make()
    async with party() as both:

        async def serve() -> None:
            async with await both.prefiller.accept():
                raise error

        serving = asyncio.create_task(serve())
        with pytest.raises(kv.RequestFailed, match=f"was given up: .*{text}"):
            await waits(both.decoder, both.peer)
        with pytest.raises(type(error)):
            await serving
        await all_is_free(both)


async def test_a_block_that_is_dropped_tells_the_other_side(recwarn: pytest.WarningsRecorder) -> None:
    """A coroutine that is closed gets GeneratorExit, after which it may await nothing."""
    async with party() as both:

        async def ask() -> None:
            async with both.decoder.request(both.peer, "a", [1, 2, 3], timeout=FOREVER):
                await forever

        forever: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        coroutine = ask()
        step = coroutine.send(None)
        while step is not forever:
            assert step is not None
            step._asyncio_future_blocking = False
            await asyncio.wait([step])
            step = coroutine.send(None)
        request = await both.prefiller.accept()
        coroutine.close()
        await request.ended_there()
        assert "GeneratorExit" in str(request._error)

        async def serve() -> None:
            async with await both.prefiller.accept():
                await forever

        waiting = asyncio.create_task(waits(both.decoder, both.peer))
        await until(lambda: both.prefiller._offers)
        coroutine = serve()
        forever._asyncio_future_blocking = False
        assert coroutine.send(None) is forever
        coroutine.close()
        with pytest.raises(kv.RequestFailed, match="GeneratorExit"):
            await waiting
        await all_is_free(both)


async def test_the_other_prefill_ranks_are_told_why_one_gave_up() -> None:
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(at.open_engine()) for _ in range(3)]
        sources = [rank(engine, small(tp=2, tp_rank=i)) for i, engine in enumerate(engines[:2])]
        prefillers = [
            await stack.enter_async_context(kv.Prefiller(one.engine, one.layout, one.region)) for one in sources
        ]  # fmt: skip
        there = rank(engines[2], small())
        decoder = await stack.enter_async_context(kv.Decoder(there.engine, there.layout, there.region))
        peers = [await engines[2].connect(one.engine.address, timeout=10) for one in sources]
        asking = asyncio.create_task(_ask_both(decoder, peers))
        requests = [await prefiller.accept() for prefiller in prefillers]
        requests[0].fail("the model diverged")
        with pytest.raises(kv.RequestFailed, match="the model diverged"):
            await asking
        await requests[1].ended_there()
        with pytest.raises(kv.RequestCancelled, match=r"\(failed\): .* the model diverged"):
            await requests[1].finish()


async def _ask_both(decoder: kv.Decoder, peers: list[at.Peer]) -> None:
    async with decoder.request(peers, "a", [1, 2, 3], timeout=FOREVER) as request:
        await request.arrived()


async def test_an_answer_that_cannot_be_dealt_with_ends_the_request_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with party() as both:
        with monkeypatch.context() as patch:
            patch.setattr(handle, "TransferPlan", _raise(MemoryError("no memory")))
            with pytest.raises(kv.RequestFailed, match=r"an answer of .* could not be handled: MemoryError: no memory"):
                await waits(both.decoder, both.peer)
        await until(lambda: both.prefiller.records)
        assert "MemoryError: no memory" in both.prefiller.records[-1].error
        await all_is_free(both)
    caplog.clear()  # a line of the log keeps the frames of its error


async def test_a_reservation_that_fails_half_way_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with two_ranks() as (prefiller, decoders, peers):
        waiting = asyncio.create_task(waits(decoders[0], peers[0]))
        await until(lambda: prefiller.requests)
        with monkeypatch.context() as patch:
            patch.setitem(request.ACTIONS, "answer", _raise(MemoryError("no memory")))
            with pytest.raises(kv.KVRequestError, match="MemoryError: no memory"):
                await waits(decoders[1], peers[1])
        with pytest.raises(kv.RequestFailed, match=r"decode rank \(0, 1\) could not be taken in: MemoryError: no memory"):
            await waiting
        assert not prefiller.requests
        assert prefiller._ledger.nbytes == 0
        await whole(prefiller, decoders, peers)
    caplog.clear()


async def test_a_tail_that_cannot_be_read_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """When everything has arrived the deadline counts no more, so nothing else would."""
    async with party() as both:
        serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2]))
        with monkeypatch.context() as patch:
            patch.setattr(handle.Handle, "_tail", _raise(MemoryError("no memory")))
            with pytest.raises(kv.RequestFailed, match="the tail of 'a' could not be read: MemoryError: no memory"):
                await waits(both.decoder, both.peer)
        await serving
        await all_is_free(both)


async def test_an_end_that_fails_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves a block waits for the end of its request without a deadline."""
    async with party() as both:
        found: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
        serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2]))
        with monkeypatch.context() as patch:
            patch.setattr(TailPool, "give", _raise(MemoryError("no memory")))
            await waits(both.decoder, both.peer)
            with contextlib.suppress(MemoryError):
                await serving
        assert not both.decoder.held
        assert not both.prefiller.requests
        await all_is_free(both)
