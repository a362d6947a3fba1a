"""Dispatch and combine through whole engines on the simulator: every row in its place, every sum exact."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import moe
from tests.moe.world import EXPERTS, HIDDEN, MESSY, TOKENS, Batch, World, batch, batches, combined, compute, received, step, world


def check_rows(d: moe.Dispatched, wanted: list[Any], alignment: int = 1) -> None:
    begin = 0
    for e, rows in enumerate(wanted):
        assert d.offsets[e] == begin
        assert d.counts[e] == len(rows)
        assert np.array_equal(d.x[begin : begin + len(rows)], np.array(rows).reshape(-1, HIDDEN))
        end = begin + len(rows)
        begin = end + -end % alignment if alignment == 1 else begin + len(rows) + -len(rows) % alignment
        assert not d.x[end:begin].any(), "padding is zero"
    assert begin == len(d.x)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("ranks", "private", "alignment"), [(1, 2, 1), (2, 0, 4), (4, 2, 1), (8, 100, 4)])
def test_every_row_comes_to_its_expert_and_every_sum_is_exact(ranks: int, private: int, alignment: int, direct: bool) -> None:
    steps = batches(ranks, 5)

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                for number, all_ranks in enumerate(steps):
                    mine = all_ranks[a2a.rank]
                    d = await a2a.dispatch(*mine)
                    assert d.handle.step == number
                    assert d.handle.lost == ()
                    check_rows(d, received(list(all_ranks), a2a.rank), alignment)
                    assert np.array_equal(await a2a.combine(compute(d, a2a.rank), d.handle), combined(mine))
                    assert not d.handle.dropped.any()

        await w.every(rank)

    world(ranks, script, net=MESSY, private_tokens=private, expert_alignment=alignment, direct=direct)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("dp", [2, 4])
def test_a_dp_group_sends_its_tokens_once_and_gets_them_back_on_every_rank(dp: int, direct: bool) -> None:
    steps = batches(4 // dp, 4)

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                for all_groups in steps:
                    mine = all_groups[a2a.rank // dp]
                    d = await a2a.dispatch(*mine)
                    padded = [b for b in all_groups for b in (b, *[None] * (dp - 1))]
                    check_rows(d, received(padded, a2a.rank))  # type: ignore[arg-type]
                    assert np.array_equal(await a2a.combine(compute(d, a2a.rank), d.handle), combined(mine))

        await w.every(rank)

    world(4, script, net=MESSY, dp_size=dp, direct=direct)


def test_two_micro_batches_overlap_by_halves() -> None:
    steps = batches(4, 2)

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                one, two = steps[0][a2a.rank], steps[1][a2a.rank]
                first = await a2a.dispatch_send(*one)
                second = await a2a.dispatch_send(*two)
                with pytest.raises(at.BusyError, match="step 0 is still in flight"):
                    await a2a.dispatch_send(*one)
                d1 = await first.receive()
                back1 = await a2a.combine_send(compute(d1, a2a.rank), d1.handle)
                d2 = await second.receive()
                assert np.array_equal(await back1.receive(), combined(one))
                third = await a2a.dispatch_send(*one)
                back2 = await a2a.combine_send(compute(d2, a2a.rank), d2.handle)
                assert np.array_equal(await back2.receive(), combined(two))
                d3 = await third.receive()
                assert np.array_equal(await a2a.combine(compute(d3, a2a.rank), d3.handle), combined(one))

        await w.every(rank)

    world(4, script, net=MESSY)


def test_sums_have_the_same_bits_whoever_was_faster() -> None:
    rng = np.random.default_rng(5)
    data = [
        Batch(rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32), rng.integers(0, EXPERTS, (TOKENS, 3)),
              rng.random((TOKENS, 3)).astype(np.float32))
        for _ in range(4)
    ]  # fmt: skip

    def run(seed: int) -> list[bytes]:
        async def script(w: World) -> list[bytes]:
            async def rank(a2a: moe.AllToAll) -> bytes:
                async with a2a:
                    return (await step(a2a, data[a2a.rank]))[1].tobytes()

            return await w.every(rank)

        result: list[bytes] = world(4, script, seed=seed, net=MESSY)
        return result

    assert len({tuple(run(seed)) for seed in range(5)}) == 1


def test_scales_travel_with_eight_bit_tokens() -> None:
    rng = np.random.default_rng(1)

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                r = a2a.rank
                x = np.full((3, HIDDEN), r + 1, np.uint8)
                scales = np.arange(6, dtype=np.float32).reshape(3, 2) + 10 * r
                idx = np.array([[0, 4], [4, -1], [0, 0]])
                d = await a2a.dispatch(x, idx, np.ones((3, 2), np.float32), x_scales=scales)
                if r == 0:
                    assert d.x[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
                    assert d.x_scales.tolist() == [[0, 1], [4, 5], [4, 5], [10, 11], [14, 15], [14, 15]]
                y = rng.integers(0, 1 << 14, d.x.shape).astype(np.uint16)
                assert (await a2a.combine(y, d.handle)).dtype == np.uint16

        await w.every(rank)

    world(2, script, dtype="float8_e4m3fn", scales=2, private_tokens=1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": np.zeros((2, HIDDEN + 1), np.float32)}, r"x must have the shape \(any, 16\), not \(2, 17\)"),
        ({"x": np.zeros((2, HIDDEN), np.float64)}, "x must be of float32, not float64"),
        ({"x": np.zeros((TOKENS + 1, HIDDEN), np.float32)}, "x has 7 tokens, and max_tokens is 6"),
        ({"x": np.zeros((HIDDEN, 2), np.float32).T}, "next to each other"),
        ({"idx": np.full((2, 3), EXPERTS)}, r"topk_idx\[0, 0\] is 8; experts are 0 to 7"),
        ({"idx": np.full((2, 3), -2)}, r"topk_idx\[0, 0\] is -2"),
        ({"idx": np.zeros((2, 4), np.int64)}, r"topk_idx must have the shape \(2, up to 3\)"),
        ({"idx": np.zeros((2, 3))}, "topk_idx must hold integers, not float64"),
        ({"weights": np.zeros((2, 2), np.float32)}, "topk_weights must have the shape of topk_idx"),
        ({"weights": np.zeros((2, 3))}, "topk_weights must be of float32"),
        ({"x": "tokens"}, "NumPy array or a torch tensor, not str"),
    ],
)  # fmt: skip
def test_a_bad_call_is_told_to_all_ranks_by_name_and_the_next_step_takes_place(change: dict[str, Any], text: str) -> None:
    good = {"x": np.ones((2, HIDDEN), np.float32), "idx": np.ones((2, 3), np.int64), "weights": np.ones((2, 3), np.float32)}

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                bad = a2a.rank == 2
                arguments = (good | change if bad else good).values()
                with pytest.raises((TypeError, ValueError) if bad else moe.StepRefused, match=text) as caught:  # type: ignore[arg-type]
                    await a2a.dispatch(*arguments)
                if not bad:
                    assert "rank 2 (r2)" in str(caught.value)
                    refused: Any = caught.value
                    assert refused.ranks == (2,)
                _, out = await step(a2a, Batch(*good.values()))
                assert np.array_equal(out, combined(Batch(*good.values())))
                assert a2a.in_flight == ()

        await w.every(rank)

    world(4, script)


def test_wrong_results_are_refused_and_the_right_ones_may_follow() -> None:
    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                mine = batch(np.random.default_rng(a2a.rank), 4)
                d = await a2a.dispatch(*mine)
                y = compute(d, a2a.rank)
                with pytest.raises(ValueError, match="y must have the shape"):
                    await a2a.combine(np.concatenate([y, y[:1], y[:1]]), d.handle)
                with pytest.raises(TypeError, match="y must be of float32"):
                    await a2a.combine(y.astype(np.float64), d.handle)
                with pytest.raises(TypeError, match="handle"):
                    await a2a.combine(y, None)  # type: ignore[arg-type]
                assert np.array_equal(await a2a.combine(y, d.handle), combined(mine))
                with pytest.raises(at.ClosedError, match="step 0 is over"):
                    await a2a.combine(y, d.handle)

        await w.every(rank)

    world(2, script)


def test_sums_go_where_the_caller_says_and_to_nothing_that_cannot_hold_them() -> None:
    steps = batches(2, 2, n=TOKENS)

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                wide = np.full((TOKENS, HIDDEN + 3), 9, np.float32)
                for all_ranks in steps:
                    mine = all_ranks[a2a.rank]
                    d = await a2a.dispatch(*mine)
                    y, out = compute(d, a2a.rank), wide[:, :HIDDEN]
                    fixed = np.zeros((TOKENS, HIDDEN), np.float32)
                    fixed.flags.writeable = False
                    for wrong in (wide, out[1:], out.astype(np.float64), out[:, ::-1], fixed):
                        with pytest.raises((TypeError, ValueError), match="out"):
                            await a2a.combine(y, d.handle, out=wrong)
                    assert await a2a.combine(y, d.handle, out=out) is out
                    assert np.array_equal(out, combined(mine))
                    assert np.all(wide[:, HIDDEN:] == 9)

        await w.every(rank)

    world(2, script)


def test_more_rows_than_a_rank_takes_are_refused_everywhere_and_by_name() -> None:
    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                x, weights = np.ones((4, HIDDEN), np.float32), np.ones((4, 3), np.float32)
                with pytest.raises(moe.RoutingOverflow, match=r"rank 1 would get 48 rows and takes 20") as caught:
                    await a2a.dispatch(x, np.full((4, 3), 2), weights)
                assert caught.value.ranks == (1,)
                mine = Batch(x[:1], np.array([[0, 2, 4]]), weights[:1])
                assert np.array_equal((await step(a2a, mine))[1], combined(mine))

        await w.every(rank)

    world(4, script, max_recv_tokens=20)


def test_ranks_that_disagree_on_a_size_are_refused_everywhere_by_name() -> None:
    async def script(w: World) -> None:
        odd = w.engines[2]
        w.a2a[2] = moe.AllToAll(odd, odd.group(w.addresses), **(w.sizes | {"hidden": 32}))

        async def rank(a2a: moe.AllToAll) -> None:
            with pytest.raises(moe.ShapeMismatch, match="hidden") as caught:
                await a2a.ready()
            assert caught.value.ranks == ((0, 1, 3) if a2a.rank == 2 else (2,))
            assert "rank 2 (r2) has hidden 32 there and 16 here" in str(caught.value) or a2a.rank == 2
            await a2a.aclose()

        await w.every(rank)

    world(4, script)


def test_who_does_not_come_is_named() -> None:
    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            with pytest.raises(at.TransferTimeout, match=r"not heard of: rank 3"):
                await a2a.ready(timeout=0.5)
            await a2a.aclose()

        await w.every(rank, ranks=range(3))
        await w.a2a[3].aclose()

    world(4, script)


def test_two_all_to_alls_of_one_group_do_not_mix() -> None:
    async def script(w: World) -> None:
        others = [moe.AllToAll(e, e.group(w.addresses), **(w.sizes | {"name": "second"})) for e in w.engines]

        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a, others[a2a.rank] as other:
                one, two = batch(np.random.default_rng(a2a.rank), 5), batch(np.random.default_rng(a2a.rank + 9), 3)
                results = await asyncio.gather(step(a2a, one), step(other, two))
                assert np.array_equal(results[0][1], combined(one))
                assert np.array_equal(results[1][1], combined(two))

        await w.every(rank)

    world(4, script, net=MESSY)


@pytest.mark.parametrize("ranks", [16, pytest.param(64, marks=pytest.mark.long)])
def test_many_ranks(ranks: int) -> None:
    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                for number in range(2):
                    everyone = [batch(np.random.default_rng(100 * number + r), 3, experts=ranks) for r in range(ranks)]
                    mine = everyone[a2a.rank]
                    d = await a2a.dispatch(*mine)
                    check_rows(d, received(list(everyone), a2a.rank, ranks))
                    assert np.array_equal(await a2a.combine(compute(d, a2a.rank), d.handle), combined(mine))

        await w.every(rank)

    world(ranks, script, num_experts=ranks, private_tokens=1)


def test_some_ranks_may_take_rows_directly_and_others_in_one_piece() -> None:
    steps = batches(4, 3)

    async def script(w: World) -> None:
        w.a2a = [moe.AllToAll(e, e.group(w.addresses), **(w.sizes | {"direct": r % 2 == 0})) for r, e in enumerate(w.engines)]

        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                for all_ranks in steps:
                    mine = all_ranks[a2a.rank]
                    d = await a2a.dispatch(*mine)
                    check_rows(d, received(list(all_ranks), a2a.rank))
                    assert np.array_equal(await a2a.combine(compute(d, a2a.rank), d.handle), combined(mine))

        await w.every(rank)

    world(4, script, net=MESSY, private_tokens=1)


def test_memory_of_results_is_the_callers_again_when_a_rank_leaves_in_a_step() -> None:
    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        half, _ = [await a2a.dispatch_send(*batch(np.random.default_rng(3), 4)) for a2a in w.a2a]
        d = await half.receive()
        await w.a2a[0].combine_send(compute(d, 0), d.handle)
        await w.a2a[0].aclose()
        await asyncio.sleep(0.1)  # what is under way still reads it
        assert not w.engines[0]._regions
        await w.a2a[1].aclose()

    world(2, script, direct=True)


def test_a_bad_first_half_is_refused_at_once_also_while_others_wait_for_an_earlier_step() -> None:
    async def script(w: World) -> None:
        data = batches(2, 3)

        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                if a2a.rank == 1:
                    assert np.array_equal((await step(a2a, data[0][1]))[1], combined(data[0][1]))
                    with pytest.raises(moe.StepRefused, match=r"hidden|shape"):
                        await a2a.dispatch(*data[1][1])
                else:
                    half = await a2a.dispatch_send(*data[0][0])
                    with pytest.raises(ValueError, match="shape"):
                        await a2a.dispatch_send(np.zeros((1, HIDDEN + 1), np.float32), *data[1][0][1:])
                    d = await half.receive()
                    assert np.array_equal(await a2a.combine(compute(d, 0), d.handle), combined(data[0][0]))
                mine = data[2][a2a.rank]
                assert np.array_equal((await step(a2a, mine))[1], combined(mine))

        await w.every(rank)

    for slots in (2, 3):
        world(2, script, slots=slots)


@pytest.mark.parametrize("kept", [(), (0,), (1,), (0, 1)], ids=str)
def test_an_open_name_is_taken_and_free_again_when_it_is_closed(kept: tuple[int, ...]) -> None:
    """`kept`: ranks whose closed one is still referred to, so that one of them is a turn later than the other the next time."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        engine = w.engines[0]
        twice = moe.AllToAll(engine, engine.group(w.addresses), **w.sizes)
        with pytest.raises(ValueError, match="name="):
            await twice.ready()
        data = batches(2, 1)[0]

        async def rank(a2a: moe.AllToAll) -> None:
            assert np.array_equal((await step(a2a, data[a2a.rank]))[1], combined(data[a2a.rank]))
            await a2a.aclose()

        await w.every(rank)
        old = [w.a2a[r] for r in kept]
        for r, one in enumerate(w.engines):
            w.a2a[r] = moe.AllToAll(one, one.group(w.addresses), **w.sizes)
        gc.collect()
        await w.every(rank)
        assert [repr(one) for one in old] == [repr(w.a2a[r]) for r in kept]

    world(2, script)


def test_an_all_to_all_and_its_steps_are_neither_pickled_nor_copied() -> None:
    async def script(w: World) -> None:
        a2a = w.a2a[0]
        half = await a2a.dispatch_send(*batch(np.random.default_rng(0), 2))
        d = await half.receive()
        for thing in (a2a, d.handle, half):
            for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match=f"{type(thing).__name__} cannot be pickled or copied"):
                    attempt(thing)
        await a2a.combine(compute(d, 0), d.handle)
        await a2a.aclose()

    world(1, script)
