"""Requests of several decode ranks: of which instance they are, what they must agree in, and who may speak for a rank."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import kv
from tests.kv.party import Rank, cache_of, party, rank, small

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def ranks(*layouts: kv.KVLayout) -> AsyncIterator[list[Rank]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [rank(await stack.enter_async_context(at.open_engine()), layout) for layout in layouts]


async def serve(here: Rank, prefiller: kv.Prefiller, count: int) -> None:
    """Fill so many requests; the cache of each follows from its data."""
    for number in range(count):
        async with await prefiller.accept(timeout=20) as request:
            pages = [4 * number, 4 * number + 1, 4 * number + 2]
            here.fill(pages, cache_of(here.layout, request.tokens, request.data[0]), request.tokens)
            request.use(pages)
            for layer in request.layers:
                request.layer_ready(layer)
            await request.finish(b"of " + request.data)


async def ask(
    there: Rank, prefill: Rank | list[Rank], instance: str | None, id: str = "cmpl-42", *, data: bytes = b"A", tokens: int = 9,
    **other: Any,
) -> bytes:  # fmt: skip
    """One request of one decode rank; what it got is compared with what its data ask for."""
    sources = prefill if isinstance(prefill, list) else [prefill]
    async with kv.Decoder(there.engine, there.layout, there.region, instance=instance, checksums=True) as decoder:
        peers = [await there.engine.connect(one.engine.address, timeout=10) for one in sources]
        async with decoder.request(peers, id, [1, 2, 3], tokens=tokens, data=data, **other) as handle:
            arrival = await handle.arrived(timeout=20)
            assert there.holds([1, 2, 3], cache_of(there.layout, tokens, data[0]), 0, tokens)
    return arrival.tail


async def test_two_instances_with_one_id_get_each_its_own_cache() -> None:
    async with ranks(small(), *(small(tp=2, tp_rank=i) for i in (0, 1, 0, 1))) as (here, a0, a1, b0, b1):
        async with kv.Prefiller(here.engine, here.layout, here.region) as prefiller:
            serving = asyncio.create_task(serve(here, prefiller, 2))
            tails = await asyncio.gather(
                ask(a0, here, "A", data=b"A"), ask(b1, here, "B", data=b"B"), ask(a1, here, "A", data=b"A"),
                ask(b0, here, "B", data=b"B"),
            )  # fmt: skip
            assert tails == [b"of A", b"of B", b"of A", b"of B"]
            await serving


async def test_ranks_that_are_instances_of_their_own_may_use_one_id() -> None:
    async with ranks(small(), small(), small()) as (here, a, b):
        async with kv.Prefiller(here.engine, here.layout, here.region) as prefiller:
            serving = asyncio.create_task(serve(here, prefiller, 2))
            tails = await asyncio.gather(ask(a, here, None, data=b"A"), ask(b, here, None, data=b"B"))
            assert tails == [b"of A", b"of B"]
            await serving
            assert {record.instance for record in prefiller.records} == {f"{x.engine.incarnation:016x}" for x in (a, b)}


async def test_a_rank_that_shares_its_requests_must_say_of_which_instance_it_is() -> None:
    async with ranks(small(), small(tp=2, tp_rank=1)) as (here, there):
        async with kv.Prefiller(here.engine, here.layout, here.region) as prefiller:
            with pytest.raises(kv.RequestRefused, match=r"2 decode ranks .* rank \(0, 1\) .* Decoder\(instance=\)") as caught:
                await ask(there, here, None)
            assert caught.value.reason == "instance"
            assert not prefiller.requests


async def test_a_prefill_rank_that_sends_to_one_rank_needs_no_name() -> None:
    async with ranks(small(tp=2, tp_rank=1), small(tp=2, tp_rank=1)) as (here, there):
        async with kv.Prefiller(here.engine, here.layout, here.region) as prefiller:
            serving = asyncio.create_task(serve(here, prefiller, 1))
            assert await ask(there, here, None) == b"of A"
            await serving


@pytest.mark.parametrize(
    ("second", "word"),
    [
        ({"data": b"B"}, "data"), ({"tokens": 8}, "tokens was 9, and is 8 here"), ({"skip_tokens": 4}, "skip_tokens"),
        ({"priority": 3}, "priority"),
    ],
    ids=["data", "tokens", "skip", "priority"],
)  # fmt: skip
async def test_what_ranks_of_one_request_do_not_agree_in_is_refused(second: dict[str, Any], word: str) -> None:
    async with ranks(small(), small(tp=2, tp_rank=0), small(tp=2, tp_rank=1)) as (here, a0, a1):
        async with kv.Prefiller(here.engine, here.layout, here.region) as prefiller:
            first = asyncio.create_task(ask(a0, here, "A"))
            await asked(prefiller, 1)
            with pytest.raises(kv.RequestRefused, match=word) as caught:
                await ask(a1, here, "A", **second)
            assert caught.value.reason == "mismatch"
            serving = asyncio.create_task(serve(here, prefiller, 1))
            assert await asyncio.gather(ask(a1, here, "A"), first) == [b"of A", b"of A"]  # the request itself was not harmed
            await serving


@pytest.mark.parametrize(
    "other",
    [{"tp": 4, "tp_rank": 3}, {"pp": 2, "tp": 2, "tp_rank": 1}, {"page_tokens": 8}, {"kind": "together"}, {"order": "HND"}],
    ids=lambda other: next(iter(other)),
)
async def test_ranks_of_one_request_have_parts_of_one_layout(other: dict[str, Any]) -> None:
    model = {"kv_heads": 4}
    another = small(**(model | {"tp": 2, "tp_rank": 1} | other))
    async with ranks(small(**model), small(**model, tp=2, tp_rank=0), another) as (here, a0, a1):
        async with kv.Prefiller(here.engine, here.layout, here.region) as prefiller:
            first = asyncio.create_task(ask(a0, here, "A"))
            await asked(prefiller, 1)
            with pytest.raises(kv.RequestRefused) as caught:
                await ask(a1, here, "A")
            assert caught.value.reason in ("mismatch", "duplicate")
            first.cancel()
            await asyncio.wait([first])


async def test_pools_of_one_instance_may_have_their_own_size_and_place() -> None:
    async with ranks(small(), small(tp=2, tp_rank=0), small(tp=2, tp_rank=1, num_pages=7, offset=256)) as (here, a0, a1):
        async with kv.Prefiller(here.engine, here.layout, here.region) as prefiller:
            serving = asyncio.create_task(serve(here, prefiller, 1))
            assert await asyncio.gather(ask(a0, here, "A"), ask(a1, here, "A")) == [b"of A", b"of A"]
            await serving


async def test_a_second_engine_that_says_it_is_a_rank_of_an_instance_is_refused_while_the_first_is_there() -> None:
    async with ranks(small(), small(tp=2, tp_rank=0), small(tp=2, tp_rank=1), small(tp=2, tp_rank=1)) as (here, a0, a1, b1):
        async with kv.Prefiller(here.engine, here.layout, here.region) as prefiller:
            serving = asyncio.create_task(serve(here, prefiller, 2))
            await asyncio.gather(ask(a0, here, "A"), ask(a1, here, "A"))
            with pytest.raises(kv.RequestRefused, match=r"rank \(0, 1\) of the decode instance 'A' is .* already") as caught:
                await ask(b1, here, "A", "another")
            assert caught.value.reason == "instance"
            await a1.engine.aclose()
            async with asyncio.timeout(10):
                while len(here.engine.peers) > 2:
                    await asyncio.sleep(0.01)
            assert await asyncio.gather(ask(a0, here, "A", "third"), ask(b1, here, "A", "third")) == [b"of A", b"of A"]
            await serving


async def asked(prefiller: kv.Prefiller, count: int) -> None:
    """Until so many requests are known there."""
    async with asyncio.timeout(10):
        while len(prefiller.requests) < count:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("instance", ["", "x" * 257, 7])
async def test_an_instance_is_a_text_of_some_length(instance: Any) -> None:
    async with ranks(small()) as (there,):
        with pytest.raises((TypeError, ValueError), match="instance must"):
            kv.Decoder(there.engine, there.layout, there.region, instance=instance)
        async with kv.Decoder(there.engine, there.layout, there.region) as decoder:
            assert decoder.instance == f"{there.engine.incarnation:016x}"
        async with kv.Decoder(there.engine, there.layout, there.region, instance="x" * 256) as decoder:
            assert decoder.instance == "x" * 256


# ---- half a cache ----

HALVES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "half the heads": ([{"tp": 2, "tp_rank": 0}], r"layers 0 to 3, heads from 1 on \(this rank has 0 to 1\) come from none"),
    "the other half": ([{"tp": 2, "tp_rank": 1}], "layers 0 to 3, heads from 0 on .* come from none"),
    "half the layers": ([{"pp": 2, "pp_rank": 0}], "layers 2 to 3, heads from 0 on .* come from none"),
    "a quarter is missing": (
        [{"tp": 2, "pp": 2, "tp_rank": t, "pp_rank": p} for t, p in ((0, 0), (1, 0), (1, 1))],
        "layers 2 to 3, heads from 0 on",
    ),
    "two instances": ([{}, {}], "layers 0 to 3, heads 0 to 1 come from more than one"),
    "a whole and a half": ([{}, {"pp": 2, "pp_rank": 1}], "layers 2 to 3, heads 0 to 1 come from more than one"),
}


@pytest.mark.parametrize("name", HALVES)
async def test_a_decode_rank_that_would_get_a_part_of_its_cache_is_refused(name: str) -> None:
    sources, words = HALVES[name]
    async with ranks(small(), *(small(**source) for source in sources)) as (there, *here), contextlib.AsyncExitStack() as stack:
        prefillers = [kv.Prefiller(one.engine, one.layout, one.region) for one in here]
        for prefiller in prefillers:
            await stack.enter_async_context(prefiller)
        before = there.memory.copy()
        with pytest.raises(kv.RequestRefused, match=words) as caught:
            await ask(there, list(here), None)
        assert caught.value.reason == "coverage"
        async with asyncio.timeout(10):
            while any(prefiller.requests for prefiller in prefillers):  # they are told
                await asyncio.sleep(0.01)
        assert np.array_equal(there.memory, before)


async def test_all_the_prefill_ranks_that_hold_it_make_a_cache() -> None:
    sources = [small(tp=2, pp=2, tp_rank=t, pp_rank=p) for t in (0, 1) for p in (0, 1)]
    async with ranks(small(), *sources) as (there, *here), contextlib.AsyncExitStack() as stack:
        serving = []
        for one in here:
            prefiller = await stack.enter_async_context(kv.Prefiller(one.engine, one.layout, one.region))
            serving.append(asyncio.create_task(serve(one, prefiller, 1)))
        assert await ask(there, list(here), None) == b"of A"
        await asyncio.gather(*serving)


# ---- any cut ----

LAYERS: dict[str, Any] = {"layers": 8, "kv_heads": 4}


async def whole(prefill: list[kv.KVLayout], decode: list[kv.KVLayout], id: str = "cmpl-42") -> list[int]:
    """One request of one instance, of all these prefill ranks that have to do with it. Returns how many requests each served."""
    async with ranks(*prefill, *decode) as both, contextlib.AsyncExitStack() as stack:
        here, there = both[: len(prefill)], both[len(prefill) :]
        prefillers = [await stack.enter_async_context(kv.Prefiller(one.engine, one.layout, one.region)) for one in here]
        serving = [asyncio.create_task(serve(one, prefiller, 1)) for one, prefiller in zip(here, prefillers, strict=True)]
        asking = []
        for one in there:
            plans = [(rank, kv.plan_transfer(rank.layout, one.layout, request=id)) for rank in here]
            asking.append(ask(one, [rank for rank, plan in plans if plan.layers], "decode", id))
        assert set(await asyncio.gather(*asking)) == {b"of A"}
        for task in serving:
            task.cancel()
        await asyncio.wait(serving)
        return [sum(record.outcome == "delivered" for record in prefiller.records) for prefiller in prefillers]


@pytest.mark.parametrize(
    "cut", ["prefill by range", "prefill by partition", "decode by range", "decode by partition", "both by range"]
)
@pytest.mark.parametrize("other", [{"tp": 2}, {"pp": 2}, {"pp": 2, "tp": 2}], ids=str)
async def test_pipelines_are_cut_anywhere_with_several_ranks_on_the_other_side(cut: str, other: dict[str, int]) -> None:
    def by_range(*ends: int) -> list[kv.KVLayout]:
        cuts = zip((0, *ends), (*ends, 8), strict=True)
        return [small(**LAYERS, pp=len(ends) + 1, pp_rank=k, layer_range=each) for k, each in enumerate(cuts)]

    def by_partition(*sizes: int) -> list[kv.KVLayout]:
        return [small(**LAYERS, pp=len(sizes), pp_rank=k, partition=sizes) for k in range(len(sizes))]

    places = [(pp, tp) for pp in range(other.get("pp", 1)) for tp in range(other.get("tp", 1))]
    even = [small(**LAYERS, **other, pp_rank=pp, tp_rank=tp) for pp, tp in places]
    uneven = by_partition(5, 3) if cut.endswith("partition") else by_range(5)
    prefill, decode = (uneven, even) if cut.startswith("prefill") else (even, uneven)
    if cut == "both by range":
        prefill, decode = by_range(5), by_range(2, 3)
    assert await whole(prefill, decode) == [1] * len(prefill)


async def test_heads_that_decode_ranks_name_by_a_range_are_waited_for() -> None:
    model = {"kv_heads": 3}
    decode = [small(**model, tp=2, tp_rank=k, head_range=each) for k, each in enumerate([(0, 2), (2, 3)])]
    assert await whole([small(**model)], decode) == [1]


async def test_a_rank_that_is_missing_by_its_range_is_said_to_be_missing() -> None:
    decode = small(**LAYERS, pp=2, pp_rank=0, layer_range=(0, 5))
    async with ranks(small(**LAYERS), decode) as (here, there):
        async with kv.Prefiller(here.engine, here.layout, here.region):
            with pytest.raises(at.TransferTimeout, match="decode ranks for 3 of 8 parts of what is here have not asked"):
                await ask(there, here, "decode", timeout=4)
            with pytest.raises(kv.RequestRefused, match=r"sent to several decode ranks .* rank \(0, 0\) does not say"):
                await ask(there, here, None, id="b")


@pytest.mark.parametrize("decode", [1, 2])
async def test_replicas_share_the_load_by_request(decode: int) -> None:
    model: dict[str, Any] = {"kv_heads": 1, "kind": "mla"}
    prefill = [small(**model, tp=4, tp_rank=k) for k in range(4)]
    served = np.zeros(4, int)
    for k in range(6):
        served += await whole(prefill, [small(**model, tp=decode, tp_rank=rank) for rank in range(decode)], f"request {k}")
    assert served.sum() == 6 * decode
    assert (served > 0).sum() >= 3  # these six ids, in any run


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [((2, 4), (1, 1)), ((1, 1), (2, 1)), ((2, 4), (2, 4)), ((3, 1), (2, 4))],
    ids=["by blocks", "singly", "alike", "one way to another"],
)
async def test_tokens_are_dealt_to_context_ranks(prefill: tuple[int, int], decode: tuple[int, int]) -> None:
    here, there = ([small(cp=cp, cp_tokens=each, cp_rank=k) for k in range(cp)] for cp, each in (prefill, decode))
    assert await whole(here, there) == [1] * len(here)


async def test_padded_pages_of_any_order_and_opaque_pages_arrive() -> None:
    plain = small(kind="packed", order="HND")
    strides = plain.byte_strides
    padded = small(kind="packed", order="HND", strides=(strides.layer * 2, 0, strides.page + 48, *strides[3:]))
    assert await whole([padded], [plain]) == await whole([plain], [padded]) == [1]
    opaque: dict[str, Any] = {"kind": "packed", "order": "HND", "opaque": True}
    assert await whole([small(**opaque)], [small(**opaque, tp=2, tp_rank=k) for k in range(2)]) == [1]


# ---- memory of the program's own ----


@pytest.mark.parametrize("kind", ["array", "bytearray", "address", pytest.param("bfloat16 tensor", marks=pytest.mark.demo)])
async def test_checksums_are_made_and_compared_over_registered_memory(kind: str) -> None:
    layout = small()

    def memory(engine: at.Engine) -> at.Region:
        if kind == "bfloat16 tensor":
            torch = pytest.importorskip("torch")
            return engine.register(torch.zeros(layout.pool_bytes // 2, dtype=torch.bfloat16))
        if kind == "bytearray":
            return engine.register(bytearray(layout.pool_bytes))
        array = np.zeros(layout.pool_bytes, np.uint8)
        kept.append(array)
        return engine.register(array if kind == "array" else (array.ctypes.data, array.nbytes, "cpu"))

    kept: list[Any] = []
    async with at.open_engine() as left, at.open_engine() as right:
        here, there = Rank(left, layout, memory(left)), Rank(right, layout, memory(right))
        async with kv.Prefiller(left, layout, here.region) as prefiller:
            serving = asyncio.create_task(serve(here, prefiller, 1))
            assert await ask(there, here, None) == b"of A"
            await serving


async def test_a_wrong_page_is_found_in_registered_memory() -> None:
    layout = small()
    async with at.open_engine() as left, at.open_engine() as right:
        pool = np.zeros(layout.pool_bytes, np.uint8)
        here, there = rank(left, layout), Rank(right, layout, right.register(pool))
        async with (
            kv.Prefiller(left, layout, here.region) as prefiller,
            kv.Decoder(right, layout, there.region, checksums=True) as decoder,
        ):

            async def damage() -> None:
                async with await prefiller.accept(timeout=10) as request:
                    here.fill([0, 1, 2], cache_of(layout, 12), 12)
                    request.use([0, 1, 2])
                    for layer in request.layers:
                        request.layer_ready(layer)
                    async with asyncio.timeout(10):
                        while request._writes:
                            await asyncio.sleep(0.01)
                    pool[2 * layout.page_bytes] ^= 1  # page 2 of layer 0
                    await request.finish()

            serving = asyncio.create_task(damage())
            async with decoder.request(await right.connect(left.address, timeout=10), "a", [1, 2, 3]) as handle:
                with pytest.raises(kv.WrongPageError, match="page 2 of layer 0"):
                    await handle.arrived(timeout=10)
            await serving


async def test_checksums_that_the_prefill_side_cannot_make_are_refused_before_the_request_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with party(options={"checksums": True}) as both:
        monkeypatch.setattr(both.prefill.region, "_device", "cuda:0")
        with pytest.raises(kv.RequestRefused, match="are on cuda:0") as caught:
            async with both.decoder.request(both.peer, "a", [1, 2, 3]):
                pass
        assert caught.value.reason == "checksums"
        monkeypatch.undo()
