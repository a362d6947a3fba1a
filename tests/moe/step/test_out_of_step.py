"""A step that cannot take place takes place nowhere: every rank is told, and no rank takes results of one step for another's."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.moe.protocol.header import Header, header, stamp
from aiotransfer.moe.protocol.routing import Route
from aiotransfer.moe.protocol.shape import HEAD, Shape
from aiotransfer.moe.protocol.tags import encoded
from aiotransfer.moe.step import step as step_module
from aiotransfer.moe.step.tensors import overlap, rows
from tests.moe.world import HIDDEN, TOKENS, TOPK, Batch, World, batch, combined, compute, step, world

SLOW = {"timeout": 2}


class Abrupt(BaseException):
    """No Exception at all."""


class Odd:
    """Whatever is asked of it raises."""

    def __init__(self, kind: type[BaseException], *given: Any) -> None:
        self.kind, self.given = kind, given

    def __getattr__(self, name: str) -> Any:
        raise self.kind(*self.given)


class Unspeakable(RuntimeError):
    """Has no text."""

    def __str__(self) -> str:
        raise ValueError("no")


NOT_GIVEN: Any = object()


def arguments(rank: int, **change: Any) -> dict[str, Any]:
    b = batch(np.random.default_rng(rank), 2)
    given = {"x": b.x, "topk_idx": b.idx, "topk_weights": b.weights} | change
    return {name: value for name, value in given.items() if value is not NOT_GIVEN}


@pytest.mark.parametrize("first_half", [False, True])
@pytest.mark.parametrize(("change", "raised", "text"), [
    ({"topk_weights": None}, TypeError, "topk_weights must be .* not NoneType"),
    ({"topk_idx": None}, TypeError, "topk_idx must be .* not NoneType"),
    ({"x": None}, TypeError, "x must be .* not NoneType"),
    ({"topk_weights": NOT_GIVEN}, TypeError, "missing 1 required positional argument: 'topk_weights'"),
    ({"bias": 1}, TypeError, "unexpected keyword argument 'bias'"),
    ({"x_scales": Odd(OSError, "odd")}, OSError, "OSError: odd"),
    ({"topk_weights": Odd(Abrupt, "abrupt")}, Abrupt, "Abrupt: abrupt"),
    ({"topk_weights": Odd(asyncio.CancelledError)}, asyncio.CancelledError, "CancelledError"),
    ({"topk_weights": Odd(Unspeakable)}, Unspeakable, "Unspeakable"),
    ({"topk_weights": Odd(ValueError, "\ud800")}, ValueError, r"\\ud800"),
    ({"topk_weights": Odd(ValueError, "x" * 5000)}, ValueError, "x" * 100),
    ({"tag": 1.5}, TypeError, "a tag is"),
    ({"tag": "x" * 64}, ValueError, "at most 63 bytes"),
    ({"tag": 1 << 64}, ValueError, "64 bits"),
    ({"timeout": -1}, ValueError, "-1"),
    ({"timeout": "soon"}, TypeError, "soon"),
])  # fmt: skip
def test_whatever_an_argument_raises_uses_up_the_step_on_every_rank(
    change: dict[str, Any], raised: Any, text: str, first_half: bool
) -> None:
    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                expected = raised if a2a.rank == 1 else moe.StepRefused
                with pytest.raises(expected) as caught:
                    if a2a.rank == 1 and first_half:
                        await a2a.dispatch_send(**arguments(1, **change))
                    else:
                        await a2a.dispatch(**arguments(a2a.rank, **(change if a2a.rank == 1 else {})))
                if a2a.rank != 1:
                    assert isinstance(caught.value, moe.StepRefused)
                    assert caught.value.ranks == (1,)
                    caught.match(text)
                mine = batch(np.random.default_rng(10 + a2a.rank), 3)
                d, out = await step(a2a, mine)
                assert d.handle.step == 1
                assert np.array_equal(out, combined(mine))

        await w.every(rank)

    world(4, script, **SLOW)


@pytest.mark.parametrize("where", ["planned", "copied"])
def test_a_rank_that_fails_before_its_first_write_refuses_the_step(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """No memory for the plan; or for the copy of the tokens, when the step is made already."""
    fails = [False]
    plan, rows_in = Route.__init__, step_module.Step._rows_in

    def planned(self: Any, shape: Any, rank: int, idx: Any) -> None:
        if fails[0] and rank == 1 and len(idx):
            raise MemoryError("none")
        plan(self, shape, rank, idx)

    async def copied(self: Any, *given: Any) -> None:
        if fails[0] and self.ranks.rank == 1:
            raise MemoryError("none")
        await rows_in(self, *given)

    if where == "planned":
        monkeypatch.setattr(Route, "__init__", planned)
    else:
        monkeypatch.setattr(step_module.Step, "_rows_in", copied)

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        fails[0] = True
        results = await asyncio.gather(*(a2a.dispatch(**arguments(r)) for r, a2a in enumerate(w.a2a)), return_exceptions=True)
        assert isinstance(results[1], MemoryError)
        for other in (results[0], results[2], results[3]):
            assert isinstance(other, moe.StepRefused)
            assert "MemoryError: none" in str(other)
        fails[0] = False
        for r, (_, out) in enumerate(await w.every(lambda a2a: step(a2a, batch(np.random.default_rng(a2a.rank), 3)))):
            assert np.array_equal(out, combined(batch(np.random.default_rng(r), 3)))
        assert {a2a.next_step for a2a in w.a2a} == {2}
        for a2a in w.a2a:
            await a2a.aclose()

    world(4, script, **SLOW)


def test_a_first_write_that_is_not_taken_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's bounds are full: nothing was sent, so the same step is made later."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        b = [batch(np.random.default_rng(r), 3) for r in range(2)]
        with monkeypatch.context() as patch:
            def full(*given: Any, **named: Any) -> Any:
                raise at.BusyError("full")

            patch.setattr(w.engines[0], "scatter", full)
            with pytest.raises(at.BusyError, match="full"):
                await w.a2a[0].dispatch(*b[0])
        assert w.a2a[0].next_step == 0
        assert w.a2a[0].in_flight == ()
        for r, (d, out) in enumerate(await w.every(lambda a2a: step(a2a, b[a2a.rank]))):
            assert d.handle.step == 0
            assert np.array_equal(out, combined(b[r]))
        for a2a in w.a2a:
            await a2a.aclose()

    world(2, script, **SLOW)


# ---- ranks that disagree ----


@pytest.mark.parametrize("direct", [True, False])
def test_ranks_of_a_dp_group_that_choose_other_experts_are_refused_by_name(direct: bool) -> None:
    """Their counts are equal: what is compared is the order of the choices."""

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                b = batch(np.random.default_rng(a2a.rank // 2), 4)
                idx = np.array([[0, 1, -1], [2, 3, 4], [5, 6, 7], [1, 0, 2]])
                for wrong in (idx[[1, 0, 2, 3]], idx[:, [1, 0, 2]], idx[::-1]):
                    mine = wrong if a2a.rank == 1 else idx
                    with pytest.raises(moe.StepRefused, match="choose the same experts") as caught:
                        await a2a.dispatch(b.x, mine, b.weights)
                    assert caught.value.ranks == (0, 1)
                _, out = await step(a2a, b)
                assert np.array_equal(out, combined(b))

        await w.every(rank)

    world(4, script, dp_size=2, direct=direct, **SLOW)


def test_tags_that_differ_are_refused_on_all_ranks_and_equal_ones_are_not() -> None:
    tags: list[tuple[Any, Any, tuple[int, ...], str]] = [  # of rank 1, of the others, who is named, how
        ("layer 4", "layer 3", (1,), r"rank 1.*'layer 4', where most ranks have tag 'layer 3'"),
        (4, 3, (1,), "tag 4, where most ranks have tag 3"),
        (None, 3, (1,), "no tag, where most ranks have tag 3"),
        (3, None, (1,), "tag 3, where most ranks have no tag"),
        ("3", 3, (1,), "tag '3', where most ranks have tag 3"),
        (-(1 << 63), (1 << 64) - 1, (1,), "tag -9223372036854775808"),
    ]

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                mine = batch(np.random.default_rng(a2a.rank), 3)
                for of_one, of_others, who, text in tags:
                    with pytest.raises(moe.StepRefused, match=text) as caught:
                        await a2a.dispatch(*mine, tag=of_one if a2a.rank == 1 else of_others)
                    assert caught.value.ranks == who
                for tag in (None, 0, "", "ü" * 31, "layer 3"):
                    d = await (await a2a.dispatch_send(*mine, tag=tag)).receive()
                    assert np.array_equal(await a2a.combine(compute(d, a2a.rank), d.handle), combined(mine))

        await w.every(rank)

    world(4, script, **SLOW)


def test_two_tasks_that_make_their_steps_in_different_orders_are_told_apart_by_tags() -> None:
    async def script(w: World) -> None:
        async def layer(a2a: moe.AllToAll, number: int, delay: float) -> Any:
            await asyncio.sleep(delay)
            mine = batch(np.random.default_rng(a2a.rank), 3)
            d = await a2a.dispatch(*mine, tag=number)
            return await a2a.combine(compute(d, a2a.rank), d.handle)

        async def rank(a2a: moe.AllToAll) -> list[Any]:
            delays = (0.0, 0.01) if a2a.rank == 0 else (0.01, 0.0)
            return await asyncio.gather(*(layer(a2a, i, delays[i]) for i in range(2)), return_exceptions=True)

        for results in await w.every(rank):
            assert [type(result) for result in results] == [moe.StepRefused] * 2
            assert all(result.ranks == (0, 1) for result in results)
        for a2a in w.a2a:
            await a2a.aclose()

    world(2, script, **SLOW)


# ---- numbers in a header ----

SHAPE = Shape(ranks=2, num_experts=4, hidden=8, dtype="float32", combine_dtype="float32", max_tokens=4, topk=2, scales=2)


@pytest.mark.parametrize(("tokens", "scales", "counts", "text"), [
    (4, 0, [2, 2, 2, 2], ""),
    (4, 2, [0, 0, 0, 8], ""),
    (0, 0, [0, 0, 0, 0], ""),
    (0, 0, [1, 0, 0, 0], "1 rows of 0 tokens"),
    (4, 0, [0, 0, 0, 9], "9 rows of 4 tokens"),
    (5, 0, [0, 0, 0, 0], "5 tokens, and max_tokens is 4"),
    (4, 3, [1, 0, 0, 0], "3 scales"),
    ((1 << 24) - 1, 255, [(1 << 32) - 1] * 4, "tokens"),
    (4, 0, [(1 << 32) - 1] * 4, "17,179,869,180 rows"),
])  # fmt: skip
def test_a_header_says_what_of_it_cannot_be(tokens: int, scales: int, counts: list[int], text: str) -> None:
    head = Header(SHAPE, header(SHAPE, 7, 1, tokens, scales, np.array(counts)).tobytes())
    found = head.impossible(SHAPE, sum(counts))
    assert text in found if text else not found


def test_a_header_holds_a_digest_and_a_tag_or_a_refusal() -> None:
    data = header(SHAPE, 7, 11, 4, 1, np.array([1, 2, 3, 0]))
    stamp(SHAPE, data, 0xFEDCBA98, encoded("layer"))
    head = Header(SHAPE, data.tobytes())
    assert (head.step, head.incarnation, head.tokens, head.scales, head.digest) == (7, 11, 4, 1, 0xFEDCBA98)
    assert (head.tag, head.text, head.counts.tolist()) == (b"slayer", "", [1, 2, 3, 0])
    refused = Header(SHAPE, header(SHAPE, 7, 11, 0, 0, None, "ü" * 200).tobytes())
    assert (refused.tag, refused.text) == (b"", "ü" * 128)
    wild = bytearray(data.tobytes())
    wild[HEAD.size - 20 :] = b"\xff" * (len(wild) - HEAD.size + 20)  # lengths beyond the end, and text that is none
    assert len(Header(SHAPE, bytes(wild)).text) <= 256


@pytest.mark.parametrize(("rows_of_one", "text"), [
    ((1 << 32) - 1, "4,294,967,295 rows"), (1 << 27, "134,217,728 rows"), (TOKENS * TOPK + 1, "19 rows"),
])  # fmt: skip
def test_counts_that_cannot_be_are_refused_everywhere_before_they_cost_anything(
    monkeypatch: pytest.MonkeyPatch, rows_of_one: int, text: str
) -> None:
    liar = [0]
    honest = step_module.header

    def lying(shape: Any, number: int, incarnation: int, tokens: int, scales: int, counts: Any, said: str = "") -> Any:
        if incarnation == liar[0]:
            counts = np.zeros(shape.num_experts, np.uint32)
            counts[0] = rows_of_one
        return honest(shape, number, incarnation, tokens, scales, counts, said)

    monkeypatch.setattr(step_module, "header", lying)
    limit = 1 << 20
    real = np.repeat

    def repeat(values: Any, times: Any, *given: Any) -> Any:
        assert int(np.sum(times)) < limit, "this is what the header said"
        return real(values, times, *given)

    monkeypatch.setattr(np, "repeat", repeat)

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        liar[0] = w.a2a[1]._ranks.incarnation
        found = await asyncio.gather(*(a2a.dispatch(**arguments(r)) for r, a2a in enumerate(w.a2a)), return_exceptions=True)
        for error in found:
            assert type(error) is moe.StepRefused
            assert error.ranks == (1,)
            assert text in str(error)
        liar[0] = 0
        b = [batch(np.random.default_rng(r), 3) for r in range(2)]
        for r, (_, out) in enumerate(await w.every(lambda a2a: step(a2a, b[a2a.rank]))):
            assert np.array_equal(out, combined(b[r]))
        for a2a in w.a2a:
            await a2a.aclose()

    world(2, script, **SLOW)


# ---- out and y ----

WIDE = np.zeros((8, 4 * HIDDEN), np.float32)


@pytest.mark.parametrize(("a", "b", "expected"), [
    (WIDE[:4, :HIDDEN], WIDE[4:, :HIDDEN], False),
    (WIDE[:4, :HIDDEN], WIDE[:4, HIDDEN : 2 * HIDDEN], False),
    (WIDE[:4, :HIDDEN], WIDE[3:, :HIDDEN], True),
    (WIDE[:4, :HIDDEN], WIDE[3:4, :HIDDEN], True),
    (WIDE[:4, :HIDDEN], WIDE[3:4, HIDDEN : 2 * HIDDEN], False),
    (WIDE[:5, :HIDDEN], WIDE[:5, HIDDEN - 1 : 2 * HIDDEN - 1], True),
    (WIDE[1:5, HIDDEN : 2 * HIDDEN], WIDE[1:5, 1 : HIDDEN + 1], True),
    (WIDE[:0, :HIDDEN], WIDE[:4, :HIDDEN], False),
    (WIDE[:4:2, :HIDDEN], WIDE[:4, :HIDDEN], True),
    (WIDE, WIDE, True),
])  # fmt: skip
def test_rows_overlap_where_they_have_a_byte_in_common(a: Any, b: Any, expected: bool) -> None:
    for one, other in ((a, b), (b, a)):
        assert overlap(*rows("a", one), *rows("b", other), a.shape[1] * 4) is expected


@pytest.mark.parametrize("in_place", [False, True])
def test_sums_that_would_overwrite_what_is_still_read_are_refused(in_place: bool) -> None:
    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            async with a2a:
                mine = Batch(np.ones((2, HIDDEN), np.float32), np.array([[0], [7]]), np.ones((2, 1), np.float32))
                d = await a2a.dispatch(*mine)
                memory = np.zeros((d.x.shape[0] + 4, 2 * HIDDEN), np.float32)
                y = memory[: len(d.x), :HIDDEN]
                y[:] = compute(d, a2a.rank)
                for place in (memory[:2, :HIDDEN], memory[:2, 1 : HIDDEN + 1], memory[len(y) - 1 : len(y) + 1, :HIDDEN]):
                    with pytest.raises(ValueError, match="overlaps y"):
                        await a2a.combine(y, d.handle, out=place)
                buffers = a2a._communicator.buffers
                for own in (buffers.here, buffers.out):
                    with pytest.raises(ValueError, match="own memory"):
                        await a2a.combine(y, d.handle, out=own[: 2 * HIDDEN * 4].view(np.float32).reshape(2, HIDDEN))
                beside = memory[:2, HIDDEN:]
                assert (await a2a.combine(y, d.handle, out=beside)) is beside
                assert np.array_equal(beside, combined(mine))

        await w.every(rank)

    world(2, script, direct=True, results_in_place=in_place, **SLOW)


def test_results_that_cannot_be_registered_are_refused_and_others_may_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        b = [batch(np.random.default_rng(r), 4) for r in range(2)]
        both = await asyncio.gather(*(a2a.dispatch(*b[r]) for r, a2a in enumerate(w.a2a)))
        register, wrong = w.engines[0].register, np.ones((len(both[0].x), HIDDEN), np.float32)

        def picky(memory: Any, **named: Any) -> Any:
            if np.shares_memory(memory, wrong):
                raise at.RegistrationError("not this one")
            return register(memory, **named)

        monkeypatch.setattr(w.engines[0], "register", picky)
        with pytest.raises(at.RegistrationError, match="not this one"):
            await w.a2a[0].combine(wrong, both[0].handle)
        sums = await asyncio.gather(*(a2a.combine(compute(both[r], r), both[r].handle) for r, a2a in enumerate(w.a2a)))
        for r, out in enumerate(sums):
            assert np.array_equal(out, combined(b[r]))
        for a2a in w.a2a:
            await a2a.aclose()

    world(2, script, direct=True, **SLOW)


# ---- who is missing ----


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("what", ["dispatch", "combine", "meeting"])
def test_a_deadline_names_those_that_are_missing_and_no_others(what: str, direct: bool) -> None:
    """Rank 1 is silent; ranks 2 to 4 are later than rank 0, and well."""

    async def script(w: World) -> None:
        async def rank(a2a: moe.AllToAll) -> None:
            r = a2a.rank
            b = batch(np.random.default_rng(r), 4)
            if what == "meeting":
                if r == 1:
                    await asyncio.sleep(1)
                    return
                with pytest.raises(at.TransferTimeout) as caught:
                    await asyncio.sleep(0.01 * r)
                    await a2a.ready(timeout=0.5)
            else:
                await a2a.ready()
                if what == "combine":
                    d = await a2a.dispatch(*b)
                if r == 1:
                    await asyncio.sleep(1)
                    return
                await asyncio.sleep(0.01 * r)
                late = a2a.dispatch(*b, timeout=0.5) if what == "dispatch" else a2a.combine(compute(d, r), d.handle, timeout=0.5)
                with pytest.raises(at.TransferTimeout) as caught:
                    await late
            assert caught.value.ranks == (1,)
            assert "rank 1" in str(caught.value)
            assert not any(f"rank {other}" in str(caught.value).partition("not heard of")[2] for other in (0, 2, 3))

        await w.every(rank)
        for a2a in w.a2a:
            await a2a.aclose()

    world(4, script, direct=direct)
