"""Whatever goes wrong with a request: it is told by name on both sides, others go on, and its pages are provably free."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import kv
from aiotransfer.kv.protocol import messages
from tests.kv.party import Party, cache_of, party, small

pytestmark = pytest.mark.asyncio


async def until(condition: Any, seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


async def all_is_free(both: Party) -> None:
    """Nothing is left of any request, on either side, and the next one works."""
    await until(lambda: not both.prefiller.requests and not both.decoder.pool.holders)
    assert not both.decoder.held
    cache = cache_of(both.prefill.layout, 12, 99)
    serving = asyncio.create_task(both.serve(cache, [0, 1, 2]))
    async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
        await handle.arrived(timeout=10)
        assert both.decode.holds([1, 2, 3], cache, 0, 12)
    await serving


@pytest.mark.parametrize(
    ("field", "prefill"),
    [("layers", {"layers": 5}), ("kv_heads", {"kv_heads": 4}), ("head_dim", {"head_dim": 4}), ("dtype", {"dtype": "float16"})],
)
async def test_caches_that_do_not_match_are_refused_with_both_values(field: str, prefill: dict[str, Any]) -> None:
    async with party(small(**prefill)) as both:
        with pytest.raises(kv.LayoutMismatch, match=f"differ in {field}") as caught:
            async with both.decoder.request(both.peer, "a", [1]):
                pass
        assert caught.value.prefill == getattr(both.prefill.layout, field)
        assert caught.value.decode == getattr(both.decode.layout, field)
        assert not both.decoder.held
        assert both.decoder.records[-1].outcome == "refused"


async def test_an_id_that_is_under_way_is_refused() -> None:
    async with party() as both:
        async with both.decoder.request(both.peer, "a", [1]):
            with pytest.raises(kv.RequestRefused, match="under way already") as caught:
                async with both.decoder.request(both.peer, "a", [2]):
                    pass
            assert (caught.value.reason, caught.value.id) == ("duplicate", "a")
            assert both.decoder.held == {1}
        await all_is_free(both)


async def test_more_requests_than_are_taken_are_refused_on_either_side() -> None:
    async with party(options={"most_requests": 3}, prefill_options={"most_requests": 2}) as both:
        async with both.decoder.request(both.peer, "b", [1]), both.decoder.request(both.peer, "c", [2]):
            with pytest.raises(kv.RequestRefused, match="which is the most"):
                async with both.decoder.request(both.peer, "d", [3]):
                    pass
            both.decoder.pool.most_requests = 2
            with pytest.raises(at.BusyError, match="2 requests are under way"):
                both.decoder.request(both.peer, "d", [3])
        await all_is_free(both)


async def test_a_rank_that_has_nothing_to_send_refuses() -> None:
    async with party(small(pp=2, pp_rank=0), small(pp=2, pp_rank=1)) as both:
        with pytest.raises(kv.RequestRefused, match="has nothing that decode rank"):
            async with both.decoder.request(both.peer, "a", [1]):
                pass


async def test_pages_that_another_request_holds_are_refused_at_once() -> None:
    async with party() as both:
        async with both.decoder.request(both.peer, "x", [1, 2]):
            with pytest.raises(at.BusyError, match="page 2 is held"):
                both.decoder.request(both.peer, "y", [2, 3])
        waiting = both.decoder.request(both.peer, "y", [2, 3])
        async with both.decoder.request(both.peer, "x", [3]):
            with pytest.raises(at.BusyError, match="page 3 is held"):
                async with waiting:
                    pass
        await all_is_free(both)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"page_ids": [64]}, IndexError), ({"page_ids": [1, 1]}, ValueError), ({"page_ids": [0.5]}, TypeError),
        ({"page_ids": [1], "tokens": 5}, ValueError), ({"page_ids": [1], "skip_tokens": 5}, ValueError),
        ({"page_ids": [1], "tokens": -1}, ValueError), ({"id": ""}, ValueError), ({"id": "\ud800"}, ValueError),
        ({"id": 7}, ValueError),
        ({"peer": "prefill"}, TypeError), ({"peer": []}, ValueError), ({"priority": 1.5}, TypeError),
    ],
)  # fmt: skip
async def test_what_makes_no_sense_is_refused_before_anything_happens(arguments: dict[str, Any], error: type[Exception]) -> None:
    async with party() as both:
        given = {"peer": both.peer, "id": "a", "page_ids": [1]} | arguments
        with pytest.raises(error):
            both.decoder.request(**given)
        assert not both.decoder.held
        assert not both.prefiller.requests


async def test_a_request_has_a_most_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MOST_TOKENS", 11)
    async with party() as both:
        with pytest.raises(ValueError, match="at most 11 tokens, not 12"):
            both.decoder.request(both.peer, "a", [1, 2, 3], tokens=12)
        assert not both.decoder.held


@pytest.mark.parametrize("what", ["memory", "counters"])
async def test_a_shortage_on_the_decode_side_ends_the_request_before_anything_is_asked(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with party() as both:

        def refuse(*_: object) -> None:
            raise at.RegistrationError("no memory") if what == "memory" else at.BusyError("no counters")

        with monkeypatch.context() as patch:
            patch.setattr(*((both.decoder.tails, "take") if what == "memory" else (both.decoder.engine._values, "again")), refuse)
            with pytest.raises((at.RegistrationError, at.BusyError), match="no "):
                async with both.decoder.request(both.peer, "a", [1, 2, 3]):
                    pass
        assert not both.decoder.held
        assert not both.prefiller.requests
        await all_is_free(both)


async def test_too_much_data_for_a_message_is_an_error_and_not_a_wait() -> None:
    async with party() as both:
        with pytest.raises(ValueError, match="at most 16777216 bytes"):
            async with both.decoder.request(both.peer, "a", [1], data=b"x" * (1 << 24)):
                pass
        await all_is_free(both)


async def test_the_client_goes_away_at_every_step() -> None:
    async with party() as both:
        for turns in range(0, 40, 1):
            async def ask(turns: int = turns) -> None:
                async with both.decoder.request(both.peer, f"r{turns}", [1, 2, 3]) as handle:
                    await handle.arrived(timeout=10)

            serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2]))
            asking = asyncio.create_task(ask())
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            asking.cancel()
            await asyncio.wait([asking])
            assert not both.decoder.held
            serving.cancel()
            await asyncio.wait([serving])
            if not serving.cancelled() and serving.exception() is not None:
                assert isinstance(serving.exception(), (kv.RequestCancelled, at.StaleRegionError)), repr(serving.exception())
        await all_is_free(both)


async def test_the_prefill_side_hears_of_a_cancelled_request_while_it_computes() -> None:
    async with party() as both:
        async with both.decoder.request(both.peer, "a", [1, 2, 3]):
            request = await both.prefiller.accept(timeout=10)
            request.use([0, 1, 2])
            request.layer_ready(0)
        await request.ended_there(timeout=5)
        assert request.cancelled
        request.layer_ready(1)  # a hook that is called once more is not an error
        with pytest.raises(kv.RequestCancelled, match="is not wanted any more"):
            await request.finish()
        await all_is_free(both)


async def test_a_request_that_the_prefill_side_gives_up_says_why() -> None:
    async with party() as both:

        async def serve() -> None:
            with pytest.raises(ZeroDivisionError):
                async with await both.prefiller.accept(timeout=10) as request:
                    request.use([0, 1, 2])
                    request.layer_ready(0)
                    1 / 0  # noqa: B018

        serving = asyncio.create_task(serve())
        async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
            with pytest.raises(kv.RequestFailed, match="ZeroDivisionError: division by zero"):
                await handle.arrived(timeout=10)
        await serving
        await all_is_free(both)


async def test_finishing_before_all_layers_are_ready_is_refused_and_the_request_goes_on() -> None:
    async with party() as both:
        async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
            async with await both.prefiller.accept(timeout=10) as request:
                with pytest.raises(ValueError, match="call use"):
                    request.layer_ready(0)
                request.use([0, 1, 2])
                request.layer_ready(0)
                with pytest.raises(ValueError, match=r"layers \[1, 2, 3\] are not ready"):
                    await request.finish()
                with pytest.raises(ValueError, match="too long"):
                    for layer in request.layers:
                        request.layer_ready(layer)
                    await request.finish(b"x" * (1 << 20))
                with pytest.raises(IndexError, match="layer 4"):
                    request.layer_ready(4)
                with pytest.raises(ValueError, match="must not exceed"):
                    request.layer_ready(0, upto=13)
                await request.finish(np.arange(3, dtype=np.float32))
                with pytest.raises(ValueError, match="has been finished before"):
                    await request.finish()
            assert (await handle.arrived(timeout=10)).tail == np.arange(3, dtype=np.float32).tobytes()


async def test_a_deadline_ends_it_on_both_sides() -> None:
    async with party() as both:
        with pytest.raises(at.TransferTimeout, match=r"was not filled within 0\.1 s: 0 of 25 writes"):
            async with both.decoder.request(both.peer, "a", [1, 2, 3], timeout=0.1) as handle:
                await handle.arrived()
        assert both.decoder.records[-1].outcome == "late"
        await all_is_free(both)


async def test_waiting_for_less_long_than_the_deadline_leaves_the_request_under_way() -> None:
    async with party() as both:
        async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
            with pytest.raises(at.TransferTimeout, match="has not arrived after"):
                await handle.arrived(timeout=0.05)
            serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2]))
            await handle.arrived(timeout=10)
            await serving


async def test_a_wrong_page_fails_its_request_by_name_and_no_other() -> None:
    async with party(options={"checksums": True}) as both:
        cache = cache_of(both.prefill.layout, 12)

        async def serve_badly() -> None:
            async with await both.prefiller.accept(timeout=10) as request:
                both.prefill.fill([0, 1, 2], cache, 12)
                request.use([0, 1, 2])
                for layer in request.layers:
                    request.layer_ready(layer)
                await until(lambda: not request._writes)
                table = request.targets[0].plan.table(2, [0, 1, 2], [1, 2, 3])
                both.decode.memory[table.dst_offset + 2 * table.dst_stride + 5] ^= 1  # after it has landed: page 2 of layer 2
                await request.finish()

        serving = asyncio.create_task(serve_badly())
        async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
            with pytest.raises(kv.WrongPageError, match="page 2 of layer 2") as caught:
                await handle.arrived(timeout=10)
            assert (caught.value.id, caught.value.layer, caught.value.page) == ("a", 2, 2)
        await serving
        assert both.decoder.records[-1].outcome == "wrong"
        await all_is_free(both)


async def test_closing_either_side_ends_its_requests() -> None:
    async with party() as both:
        async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
            request = await both.prefiller.accept(timeout=10)
            await both.prefiller.aclose()
            with pytest.raises(kv.RequestFailed, match="its prefiller was closed"):
                await handle.arrived(timeout=10)
            assert request.cancelled
            with pytest.raises(at.ClosedError):
                await both.prefiller.accept()
            with pytest.raises(at.TransferTimeout, match="no answer of"):
                async with both.decoder.request(both.peer, "b", [5], timeout=0.3):
                    pass


async def test_a_decode_engine_that_closes_ends_its_requests_and_nothing_goes_on() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        async with party(engines=(left, right)) as both:
            with pytest.raises(at.ClosedError):
                async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
                    waiting = asyncio.create_task(handle.arrived(timeout=10))
                    await asyncio.sleep(0.01)
                    await right.aclose()
                    await waiting
            assert handle.state == "free"
            await until(lambda: not both.prefiller.requests)


async def test_a_layer_that_cannot_be_sent_for_a_thread_fails_the_request() -> None:
    async with party() as both:
        async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
            request = await both.prefiller.accept(timeout=10)
            request.use([0, 1, 2])
            request.targets[0].page_ids = np.array([1, 1, 1])  # what would be a mistake of ours
            await asyncio.to_thread(request.layer_ready, 0)
            with pytest.raises(kv.RequestFailed, match="layer 0 could not be sent"):
                await handle.arrived(timeout=10)
        await all_is_free(both)


async def test_a_cancel_that_comes_while_a_block_ends_is_not_lost() -> None:
    async with party() as both:
        ended = asyncio.Event()

        async def ask() -> None:
            async with both.decoder.request(both.peer, "a", [1, 2, 3]):
                ended.set()

        asking = asyncio.create_task(ask())
        await ended.wait()
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        await all_is_free(both)


async def test_an_engine_has_one_prefiller_at_a_time_and_roles_close_after_their_engine() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        async with party(engines=(left, right)) as both:
            with pytest.raises(at.ConfigurationError, match="has a Prefiller already"):
                kv.Prefiller(left, both.prefill.layout, both.prefill.region)
            await both.prefiller.aclose()
            kv.Prefiller(left, both.prefill.layout, both.prefill.region)
            await left.aclose()
            await right.aclose()


async def test_an_engine_that_closes_takes_its_requests_along() -> None:
    async with at.open_engine() as left, at.open_engine() as right:
        async with party(engines=(left, right)) as both:
            async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
                await both.prefiller.accept(timeout=10)
                await left.aclose()
                with pytest.raises(at.PeerLostError):
                    await handle.arrived(timeout=10)
            assert not both.decoder.held


async def test_messages_that_nobody_can_read_are_answered_and_hurt_nobody() -> None:
    async with party() as both:
        for data in (b"", b"\x00" * 8, b"\xff" * 40):
            for mark in (messages.TO_PREFILLER, messages.TO_DECODER):
                await both.peer.send(mark + data)
        await both.peer.send(messages.encode(messages.Cancel(77, "nobody")))
        await all_is_free(both)


async def test_a_forged_reservation_is_refused() -> None:
    async with party() as both:
        handle = both.decoder.request(both.peer, "a", [1, 2, 3])
        async with handle:
            part = handle._sources[0]
            pool, tail = (lease.descriptor for lease in part.leases)
            pages = np.arange(3, dtype=np.uint32)
            good = messages.Reserve(
                1 << 40, "b", both.decode.layout.to_dict(), [pool.encode()], tail.encode(), pages.tobytes(), 12, 0, 5, 0, 5.0,
                False, b"",
            )  # fmt: skip
            import msgspec

            for change in (
                {"pages": [b"nonsense"]}, {"pages": [pool[:64].encode()]}, {"pages": 2 * [pool.encode()]},
                {"page_ids": pages[:2].tobytes()}, {"page_ids": np.array([0, 1, 64], np.uint32).tobytes()},
                {"layout": {"layers": 3}}, {"layout": {"layers": "many"}},
            ):  # fmt: skip
                with pytest.raises(at.TransferError):
                    await _answer(both, msgspec.structs.replace(good, **change))


async def _answer(both: Party, message: messages.Reserve) -> None:
    answers: asyncio.Queue[Any] = asyncio.Queue()

    class Listener:
        def receive(self, peer: at.Peer, answer: Any) -> None:
            answers.put_nowait(answer)

    both.decoder.pool.expect(message.number, Listener())  # type: ignore[arg-type]
    try:
        await both.peer.send(messages.encode(message))
        async with asyncio.timeout(5):
            answer = await answers.get()
    finally:
        both.decoder.pool.forget([message.number])
    assert isinstance(answer, messages.Refused), answer
    raise at.DescriptorError(answer.text)
