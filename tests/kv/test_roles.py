"""Requests that go well: in one process and over shared memory; layer by layer, in chunks, many at once."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import kv
from tests.kv.party import cache_of, party, rank, small
from tests.needs import needs_tcp

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("tokens", [1, 12, 13])
async def test_a_request_is_filled_and_its_tail_delivered(tokens: int, checksums: bool) -> None:
    async with party(options={"checksums": checksums}) as both:
        cache, mine, theirs = cache_of(both.prefill.layout, tokens), [7, 3, 5, 1], [40, 2, 63, 9]
        serving = asyncio.create_task(both.serve(cache, mine, b"tail of it"))
        async with both.decoder.request(both.peer, "a", theirs, tokens=tokens, data=b"prompt") as handle:
            arrival = await handle.arrived(timeout=10)
            assert arrival.tail == b"tail of it"
            assert both.decode.holds(theirs, cache, 0, tokens)
            assert both.decoder.held
        request = await serving
        assert (request.data, request.tokens, request.state, handle.state) == (b"prompt", tokens, "over", "free")
        assert not both.decoder.held


async def test_layouts_may_differ_in_everything_but_the_model() -> None:
    prefill = small(order="HND", kind="together", num_pages=32)
    async with party(prefill, small(page_tokens=16, num_pages=9, outermost="pages")) as both:
        cache = cache_of(both.prefill.layout, 33)
        serving = asyncio.create_task(both.serve(cache, list(range(9, 0, -1))))
        async with both.decoder.request(both.peer, "a", [8, 2, 0], tokens=33) as handle:
            await handle.arrived(timeout=10)
            assert both.decode.holds([8, 2, 0], cache, 0, 33)
        await serving


async def test_a_cached_prefix_is_neither_written_nor_held() -> None:
    async with party(options={"checksums": True}) as both:
        cache = cache_of(both.prefill.layout, 16)
        before = both.decode.memory.copy()
        serving = asyncio.create_task(both.serve(cache, [0, 1, 2, 3]))
        async with both.decoder.request(both.peer, "a", [10, 11, 12, 13], tokens=16, skip_tokens=8) as handle:
            assert both.decoder.held == {12, 13}
            await handle.arrived(timeout=10)
            assert both.decode.holds([10, 11, 12, 13], cache, 8, 16)
            changed = np.flatnonzero(both.decode.memory != before)
            assert len(changed) <= both.decode.layout.page_bytes * 2 * 2 * both.decode.layout.layers
        await serving


@pytest.mark.parametrize("chunk", [1, 3, 4, 10])
async def test_a_prompt_in_chunks_arrives_whole_and_counts_exactly(chunk: int) -> None:
    async with party(options={"checksums": True}) as both:
        cache = cache_of(both.prefill.layout, 23)
        serving = asyncio.create_task(both.serve(cache, [0, 1, 2, 3, 4, 5], chunk=chunk))
        async with both.decoder.request(both.peer, "a", [10, 11, 12, 13, 14, 15], tokens=23) as handle:
            await handle.arrived(timeout=10)
            assert both.decode.holds([10, 11, 12, 13, 14, 15], cache, 0, 23)
        await serving


async def test_two_prefill_ranks_fill_one_decode_rank() -> None:
    async with at.open_engine() as a, at.open_engine() as b, at.open_engine() as target:
        decode = rank(target, small())
        ranks = [rank(engine, small(tp=2, tp_rank=i, num_pages=16)) for i, engine in enumerate((a, b))]
        cache = cache_of(decode.layout, 10)
        async with kv.Decoder(target, decode.layout, decode.region) as decoder:
            prefillers = [kv.Prefiller(one.engine, one.layout, one.region) for one in ranks]
            peers = [await target.connect(one.engine.address, timeout=10) for one in ranks]

            async def serve(i: int) -> None:
                async with await prefillers[i].accept(timeout=10) as request:
                    ranks[i].fill([4, 5, 6], cache, 10)
                    request.use([4, 5, 6])
                    for layer in request.layers:
                        request.layer_ready(layer)
                    await request.finish(b"logits" if i == 1 else b"")

            async with asyncio.TaskGroup() as group:
                serving = [group.create_task(serve(i)) for i in (0, 1)]
                async with decoder.request(peers, "a", [1, 2, 3], tokens=10) as handle:
                    arrival = await handle.arrived(timeout=10)
                    assert (arrival.tail, arrival.tails) == (b"logits", (b"", b"logits"))
                    assert decode.holds([1, 2, 3], cache, 0, 10)
                await asyncio.gather(*serving)
            for prefiller in prefillers:
                await prefiller.aclose()


async def test_a_request_of_two_decode_ranks_is_accepted_when_both_have_asked() -> None:
    async with at.open_engine() as source, at.open_engine() as a, at.open_engine() as b:
        here = rank(source, small())
        ranks = [rank(engine, small(tp=2, tp_rank=i)) for i, engine in enumerate((a, b))]
        cache = cache_of(here.layout, 9)
        async with kv.Prefiller(source, here.layout, here.region) as prefiller:
            decoders = [kv.Decoder(one.engine, one.layout, one.region, instance="decode 1") for one in ranks]
            peers = [await one.engine.connect(source.address, timeout=10) for one in ranks]

            async def decode(i: int) -> None:
                async with decoders[i].request(peers[i], "a", [5, 6, 7], tokens=9) as handle:
                    await handle.arrived(timeout=10)
                    assert ranks[i].holds([5, 6, 7], cache, 0, 9)

            first = asyncio.create_task(decode(0))
            with pytest.raises(at.TransferTimeout, match="no request came"):
                await prefiller.accept(timeout=0.1)
            second = asyncio.create_task(decode(1))
            async with await prefiller.accept(timeout=10) as request:
                assert (request.instance, request.id) == ("decode 1", "a")
                here.fill([0, 1, 2], cache, 9)
                request.use([0, 1, 2])
                for layer in request.layers:
                    request.layer_ready(layer)
                await request.finish()
            await asyncio.gather(first, second)
            for decoder in decoders:
                await decoder.aclose()


async def test_many_requests_at_once_each_get_their_own_pages() -> None:
    async with party(small(num_pages=256), small(num_pages=256)) as both:
        caches = [cache_of(both.prefill.layout, 9, seed) for seed in range(60)]

        async def serve_all() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in caches:
                    request = await both.prefiller.accept(timeout=10)
                    group.create_task(fill(request))

        async def fill(request: kv.PrefillRequest) -> None:
            number = int(request.id)
            pages = list(range(4 * number, 4 * number + 3))
            async with request:
                both.prefill.fill(pages, caches[number], 9)
                request.use(pages)
                for layer in request.layers:
                    request.layer_ready(layer)
                    await asyncio.sleep(0)
                await request.finish(request.id.encode())

        async def ask(number: int) -> None:
            pages = [255 - 4 * number, 254 - 4 * number, 253 - 4 * number]
            async with both.decoder.request(both.peer, str(number), pages, tokens=9) as handle:
                arrival = await handle.arrived(timeout=10)
                assert arrival.tail == str(number).encode()
                assert both.decode.holds(pages, caches[number], 0, 9)

        async with asyncio.TaskGroup() as group:
            group.create_task(serve_all())
            for number in range(60):
                group.create_task(ask(number))
        assert not both.decoder.held
        assert [record.outcome for record in both.decoder.records] == ["delivered"] * 60
        assert [record.outcome for record in both.prefiller.records] == ["delivered"] * 60


async def test_layers_may_be_called_ready_from_the_thread_of_a_model() -> None:
    async with party() as both:
        cache = cache_of(both.prefill.layout, 12)

        async def serve() -> None:
            async with await both.prefiller.accept(timeout=10) as request:
                both.prefill.fill([0, 1, 2], cache, 12)
                request.use([0, 1, 2])
                thread = threading.Thread(target=lambda: [request.layer_ready(layer) for layer in request.layers])
                thread.start()
                await asyncio.to_thread(thread.join)
                await request.finish()

        serving = asyncio.create_task(serve())
        async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
            await handle.arrived(timeout=10)
            assert both.decode.holds([1, 2, 3], cache, 0, 12)
        await serving


async def test_a_kernel_may_count_its_layers_in_a_word() -> None:
    async with party() as both:
        cache, word = cache_of(both.prefill.layout, 12), np.zeros(1, np.uint64)

        async def serve() -> None:
            async with await both.prefiller.accept(timeout=10) as request:
                both.prefill.fill([0, 1, 2], cache, 12)
                request.use([0, 1, 2])
                following = asyncio.create_task(request.follow(word))
                for _ in request.layers:
                    await asyncio.sleep(0.005)
                    word[0] += 1
                await following
                await request.finish()

        serving = asyncio.create_task(serve())
        async with both.decoder.request(both.peer, "a", [1, 2, 3]) as handle:
            await handle.arrived(timeout=10)
            assert both.decode.holds([1, 2, 3], cache, 0, 12)
        await serving


async def test_the_record_of_a_request_says_what_happened_when() -> None:
    seen: list[kv.RequestRecord] = []
    async with party(options={"on_record": seen.append}) as both:
        serving = asyncio.create_task(both.serve(cache_of(both.prefill.layout, 12), [0, 1, 2]))
        async with both.decoder.request(both.peer, "a", [1, 2, 3], priority=3) as handle:
            await handle.arrived(timeout=10)
        await serving
        (there,), (here,) = seen, both.prefiller.records
        assert (there.role, there.outcome, there.tokens, there.priority, there.path) == ("decode", "delivered", 12, 3, "shm")
        assert there.nbytes == here.nbytes == 12 * 4 * 2 * 2 * 8 * 2
        assert there.pages == here.pages == 3 * 2 * 4
        for record in (there, here):
            assert record.reserved is not None
            assert record.first_page is not None
            assert record.last_page is not None
            assert record.queued <= record.reserved <= record.first_page <= record.last_page <= record.finished


@pytest.mark.parametrize("provider", ["loopback", pytest.param("tcp", marks=needs_tcp())])
async def test_it_is_the_same_by_other_paths(provider: str) -> None:
    async with at.open_engine(providers=provider) as left, at.open_engine(providers=provider) as right:
        async with party(engines=(left, right), options={"checksums": True}) as both:
            for tokens in (5, 60):
                cache = cache_of(both.prefill.layout, tokens)
                mine, theirs = list(range(15)), list(range(40, 55))
                serving = asyncio.create_task(both.serve(cache, mine, chunk=7))
                async with both.decoder.request(both.peer, str(tokens), theirs, tokens=tokens) as handle:
                    await handle.arrived(timeout=20)
                    assert both.decode.holds(theirs, cache, 0, tokens)
                await serving
            assert both.decoder.records[-1].path == provider
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), both.decoder.request(both.peer, "left", [1, 2]) as handle:
                    await handle.arrived()
            assert not both.decoder.held


async def test_the_more_urgent_request_is_accepted_first() -> None:
    async with party() as both:
        async with (
            both.decoder.request(both.peer, "low", [1], priority=-1),
            both.decoder.request(both.peer, "first", [2]),
            both.decoder.request(both.peer, "second", [3]),
            both.decoder.request(both.peer, "high", [4], priority=5),
        ):
            order = [await both.prefiller.accept(timeout=10) for _ in range(4)]
            assert [request.id for request in order] == ["high", "first", "second", "low"]


async def test_roles_and_requests_are_neither_pickled_nor_copied() -> None:
    async with party() as both:
        waiting = both.decoder.request(both.peer, "a", [1], tokens=4)
        for thing in (both.prefiller, both.decoder, waiting):
            for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match=f"{type(thing).__name__} cannot be pickled or copied"):
                    attempt(thing)
