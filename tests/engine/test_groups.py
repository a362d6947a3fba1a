"""Groups: barriers among several engines, what breaks them, and how they are mended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.control.frames import Join
from aiotransfer.engine.operations.plan import Plan
from aiotransfer.providers import native
from tests.engine.groups import engine_of, everyone, open_group

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture(params=["shm", "loopback"])
async def four(request: pytest.FixtureRequest) -> AsyncIterator[list[at.PeerGroup]]:
    async with AsyncExitStack() as stack:
        yield await open_group(stack, request.param, 4)


async def test_ranks_are_places_in_the_list(four: list[at.PeerGroup]) -> None:
    assert [group.rank for group in four] == [0, 1, 2, 3]
    assert len(four[0]) == 4
    engine = engine_of(four[0])
    assert engine.group([str(member) for member in four[0].members], name="all") is four[0]
    assert engine.group([str(member) for member in four[0].members]) is not four[0]


async def test_nobody_leaves_a_barrier_before_everybody_has_come(four: list[at.PeerGroup]) -> None:
    rng = random.Random(3)
    entered = [0] * 4
    orders = [[rng.randrange(4) for _ in range(30)] for _ in four]

    async def member(rank: int) -> None:
        for turn, pauses in enumerate(orders[rank]):
            for _ in range(pauses):
                await asyncio.sleep(0)
            entered[rank] = turn + 1
            await four[rank].barrier(timeout=5)
            assert min(entered) >= turn + 1

    await asyncio.gather(*map(member, range(4)))


async def test_groups_of_the_same_members_do_not_mix(four: list[at.PeerGroup]) -> None:
    members = [str(member) for member in four[0].members]
    others = [engine_of(group).group(members, name="other") for group in four]
    await everyone(four)
    waiting = [asyncio.ensure_future(group.barrier(timeout=5)) for group in four[:3]]
    await everyone(others)
    assert not any(task.done() for task in waiting)
    await four[3].barrier(timeout=5)
    await asyncio.gather(*waiting)


async def test_a_group_of_one_is_always_complete() -> None:
    async with at.open_engine() as engine:
        group = engine.group([str(engine.address)])
        for _ in range(3):
            await group.barrier(timeout=1)
        await group.reform(timeout=1)
        assert group.peers == (None,)


async def test_wrong_members_are_refused() -> None:
    async with at.open_engine() as engine:
        me = str(engine.address)
        for members, name, error in (
            ([], "", ValueError),
            (["127.0.0.1:1"], "", ValueError),
            ([me, me], "", ValueError),
            ([me, "nonsense"], "", ValueError),
            (me, "", TypeError),
            ([me, 7], "", TypeError),
            ([me], 7, TypeError),
        ):
            with pytest.raises(error):
                engine.group(members, name=name)  # type: ignore[arg-type]


async def test_a_member_that_does_not_come_breaks_the_barrier_for_all_at_once(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    waiting = [asyncio.ensure_future(group.barrier(timeout=300)) for group in four[:2]]
    await _signalled(four[2], {0, 1})
    with pytest.raises(at.TransferTimeout, match=r"did not come: member 3 \(127[^,]*\)$") as caught:
        await four[2].barrier(timeout=0.05)
    assert caught.value.ranks == (3,)
    for task in waiting:
        with pytest.raises(at.BrokenError, match=r"member 2 .* has given the group up: .* did not come: member 3 "):
            await asyncio.wait_for(task, 30)
    with pytest.raises(at.BrokenError, match="broken"):
        await four[0].barrier(timeout=1)


async def _signalled(group: at.PeerGroup, ranks: set[int]) -> None:
    """Returns when the signals of these for its next barrier have come."""
    turn = group._rounds % 2
    async with asyncio.timeout(30):
        while not all(group._counters[rank][turn].value for rank in ranks):
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("missing", [{1}, {2, 3}, {1, 3}, {1, 2, 3}])
async def test_a_deadline_names_exactly_the_members_that_have_not_come(four: list[at.PeerGroup], missing: set[int]) -> None:
    """In a round of either kind, and after `reform`. Nothing is left over for the barriers that follow."""
    await everyone(four)
    for _ in range(2):
        for passed in range(2):
            for _ in range(passed):
                await everyone(four)
            here = [group for group in four[1:] if group.rank not in missing]
            waiting = [asyncio.ensure_future(group.barrier(timeout=300)) for group in here]
            await _signalled(four[0], {group.rank for group in here})
            with pytest.raises(at.TransferTimeout) as caught:
                await four[0].barrier(timeout=0.02)
            assert set(caught.value.ranks) == missing
            assert all(f"member {rank} (" in caught.value.message for rank in missing)
            found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
            assert all(isinstance(error, at.BrokenError) for error in found)
            await everyone(four, "reform", timeout=30)
            await everyone(four)


async def test_signals_that_have_come_by_the_deadline_pass_the_barrier(
    four: list[at.PeerGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    await everyone(four)
    wait = at.Counter.wait

    async def deaf(counter: at.Counter, *given: Any, **named: Any) -> None:
        if counter._engine is four[0]._engine:
            await asyncio.sleep(3600)
        await wait(counter, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(at.Counter, "wait", deaf)
        others = [asyncio.ensure_future(group.barrier(timeout=300)) for group in four[1:]]
        await _signalled(four[0], {1, 2, 3})
        await four[0].barrier(timeout=0.02)
        await asyncio.gather(*others)
    for _ in range(3):
        await everyone(four)


async def test_a_reform_that_ends_late_names_who_has_not_joined(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    with pytest.raises(at.TransferTimeout):
        await four[0].barrier(timeout=0.02)
    waiting = [asyncio.ensure_future(group.reform(timeout=300)) for group in four[1:3]]
    group, generation = four[0], four[0]._generation
    async with asyncio.timeout(30):
        while not all(group._joins[r][1].generation > generation and group._joins[r][1].imms[0] for r in (1, 2)):
            await asyncio.sleep(0.005)
    with pytest.raises(at.TransferTimeout) as caught:
        await group.reform(timeout=0.05)
    assert caught.value.ranks == (3,)
    assert not any(task.done() for task in waiting)  # it may call reform again, and they wait as long as they like
    async with asyncio.timeout(30):
        while four[3]._joins[0][1].imms[0]:
            await asyncio.sleep(0.005)
    await asyncio.gather(*waiting, group.reform(timeout=30), four[3].reform(timeout=30))
    await everyone(four)


async def test_a_member_that_had_formed_by_a_join_that_is_taken_back_learns_of_it(
    four: list[at.PeerGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three members have formed, and wait in the barrier; the fourth gives up before it has heard of one of them."""
    late = four[3]
    has_joined = late._has_joined
    monkeypatch.setattr(late, "_has_joined", lambda rank: rank != 2 and has_joined(rank))
    others = [asyncio.ensure_future(group.barrier(timeout=300)) for group in four[:3]]
    last = asyncio.ensure_future(late.barrier(timeout=300))
    async with asyncio.timeout(30):
        while not all(group._formed for group in four[:3]):
            await asyncio.sleep(0.005)
    last.cancel()
    for end in await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 30):
        assert isinstance(end, at.BrokenError)
        assert "member 3 " in str(end)
        assert "has given the group up: a barrier was given up: CancelledError" in str(end)
    monkeypatch.undo()
    await everyone(four, "reform", timeout=30)
    await everyone(four)


@pytest.mark.parametrize("when", ["first", "reform"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("error", [MemoryError("none left"), at.BusyError("none left")])
async def test_a_member_that_cannot_form_the_group_tells_the_others_why(
    four: list[at.PeerGroup], monkeypatch: pytest.MonkeyPatch, rank: int, when: str, error: Exception
) -> None:
    what = "barrier" if when == "first" else "reform"
    if when == "reform":
        await everyone(four)
        with pytest.raises(at.TransferTimeout):
            await four[1].barrier(timeout=0.02)
    one = four[rank]

    async def joined(others: Any) -> None:
        await wait(others)
        raise error

    wait = one._all_joined
    monkeypatch.setattr(one, "_all_joined", joined)
    tasks = [asyncio.ensure_future(getattr(group, what)(timeout=300)) for group in four]
    found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
    assert type(found[rank]) is type(error)
    late = [group for group, end in zip(four, found, strict=True) if end is None]  # it had formed: its next barrier is told
    found += await asyncio.wait_for(asyncio.gather(*(g.barrier(timeout=300) for g in late), return_exceptions=True), 30)
    told = [end for end in found if end is not None and end is not found[rank]]
    assert len(told) == 3
    for end in told:
        assert type(end) is at.BrokenError
        assert "given the group up" in str(end)
        assert "none left" in str(end)
    monkeypatch.undo()
    await everyone(four, "reform", timeout=30)
    await everyone(four)


async def test_a_group_that_is_closed_while_others_wait_for_it_says_so(four: list[at.PeerGroup]) -> None:
    waiting = [asyncio.ensure_future(group.barrier(timeout=300)) for group in four[:3]]
    async with asyncio.timeout(30):
        while len(four[3]._joins) < 3:
            await asyncio.sleep(0.005)
    four[3].close()
    for end in await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30):
        assert isinstance(end, at.BrokenError)
        assert "the group was closed" in str(end)


async def test_a_barrier_that_cannot_form_names_who_is_missing(four: list[at.PeerGroup]) -> None:
    with pytest.raises(at.TransferTimeout, match=str(four[3].members[3])):
        await asyncio.gather(*(group.barrier(timeout=0.3) for group in four[:3]))


async def test_a_reformed_group_counts_nothing_of_the_broken_one(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    for turn in range(5):
        late = four[turn % 4]
        with pytest.raises((at.TransferTimeout, at.BrokenError)):
            await asyncio.gather(*(group.barrier(timeout=0.05) for group in four if group is not late))
        await everyone(four, "reform", timeout=5)
        waiting = [asyncio.ensure_future(group.barrier(timeout=5)) for group in four if group is not late]
        for _ in range(20):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await late.barrier(timeout=5)
        await asyncio.gather(*waiting)


async def test_members_may_reform_at_different_times(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    with pytest.raises((at.TransferTimeout, at.BrokenError)):
        await four[0].barrier(timeout=0.02)
    with pytest.raises(at.TransferTimeout):
        await four[0].reform(timeout=0.05)  # nobody else has come yet
    first = [asyncio.ensure_future(group.reform(timeout=5)) for group in four[:2]]
    await asyncio.sleep(0.05)
    await everyone(four[2:], "reform", timeout=5)
    await asyncio.gather(*first)
    await everyone(four)


async def test_a_lost_member_ends_the_barrier_and_its_successor_joins_by_reform() -> None:
    async with AsyncExitStack() as stack:
        groups = await open_group(stack, "shm", 3)
        await everyone(groups)
        address = str(groups[2].members[2])
        waiting = [asyncio.ensure_future(group.barrier(timeout=30)) for group in groups[:2]]
        await asyncio.sleep(0.01)
        await engine_of(groups[2]).aclose()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert any(isinstance(end, at.PeerLostError) for end in ends), ends
        assert all(isinstance(end, at.BrokenError) for end in ends), ends
        fresh = await stack.enter_async_context(at.open_engine(listen=address, providers="shm"))
        groups[2] = fresh.group([str(member) for member in groups[0].members], name="all")
        newcomer = asyncio.ensure_future(groups[2].barrier(timeout=5))
        await everyone(groups[:2], "reform", timeout=5)
        await everyone(groups[:2])
        await newcomer
        assert groups[0].peers[2] is not None


async def test_cancelling_a_barrier_breaks_the_group(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    task = asyncio.ensure_future(four[0].barrier())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(at.BrokenError):
        await four[0].barrier()
    await everyone(four, "reform", timeout=5)
    await everyone(four)


async def test_one_barrier_at_a_time(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    task = asyncio.ensure_future(four[0].barrier(timeout=5))
    await asyncio.sleep(0)
    with pytest.raises(at.BusyError):
        await four[0].barrier()
    await everyone(four[1:])
    await task


async def test_joins_that_came_before_their_group_do_not_add_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotransfer.engine.sync.groups.MOST_UNKNOWN", 8)
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(at.open_engine(timeout=10)) for _ in range(2)]
        members = [str(engine.address) for engine in engines]
        for i in range(30):
            first = asyncio.ensure_future(engines[0].group(members, name=f"{i}").barrier(timeout=5))
            await asyncio.sleep(0.01)  # its Join comes before the other side has made the group
            await engines[1].group(members, name=f"{i}").barrier(timeout=5)
            await first


async def test_a_join_with_impossible_numbers_loses_its_sender(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    sender = four[1].peers[0]
    assert sender is not None
    sender._post(Join(key=four[0]._key, rank=1, generation=2, imms=(1 << 40, -1)))
    waiting = four[0].peers[1]
    assert waiting is not None
    await waiting.closed(timeout=5)
    assert waiting.state == "lost"


async def test_a_member_that_has_passed_may_close_before_all_signals_have_come() -> None:
    """The last barrier of a program: rank 0 has passed and is gone while rank 2's signal is still on its way to rank 1."""
    async with AsyncExitStack() as stack:
        groups = await open_group(stack, "shm", 3)
        await everyone(groups)
        gone, slow = asyncio.Event(), groups[2]

        def signal(rank: int) -> Plan:
            peer, join = slow._joins[rank]
            imm = join.imms[slow._rounds % 2]
            return Plan(
                slow._engine._submitter, 0, (), (peer,), what="barrier",
                build=lambda status: native.lib.at_plan_signals(slow._engine._p, 1, [peer.path.lane_peer], [imm], status),
            )  # fmt: skip

        class Late:
            async def send(self, first: Plan, second: Plan) -> None:
                await first.post()
                await gone.wait()
                await second.post()

            def post(self, timeout: float) -> asyncio.Future[None]:
                return asyncio.ensure_future(self.send(*plans))

        plans = signal(0), signal(1)
        slow._plans = (Late(), Late())  # type: ignore[assignment]
        rest = [asyncio.ensure_future(group.barrier(timeout=5)) for group in groups[1:]]
        await groups[0].barrier(timeout=5)
        leaver = groups[1].peers[0]
        await engine_of(groups[0]).aclose()
        assert leaver is not None
        await leaver.closed(timeout=5)
        gone.set()
        await asyncio.gather(*rest)


async def test_a_member_that_left_before_the_wait_began_ends_the_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its goodbye may come while our own signals are being posted: the wait then names nobody who could still end it."""
    async with AsyncExitStack() as stack:
        groups = await open_group(stack, "shm", 2)
        await everyone(groups)
        posted = Plan.post

        async def post_and_hear_the_goodbye(plan: Plan, **options: Any) -> None:
            await posted(plan, **options)
            await engine_of(groups[1]).aclose()
            await groups[0]._peers[0].closed(timeout=5)

        monkeypatch.setattr(Plan, "post", post_and_hear_the_goodbye)
        with pytest.raises(at.PeerLostError):
            await asyncio.wait_for(groups[0].barrier(), 5)


async def test_closing_the_engine_ends_a_barrier(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    task = asyncio.ensure_future(four[0].barrier(timeout=30))
    await asyncio.sleep(0.01)
    await engine_of(four[0]).aclose()
    with pytest.raises(at.TransferError):
        await asyncio.wait_for(task, 5)


async def test_a_group_that_breaks_as_a_signal_comes_fails_its_barrier(
    four: list[at.PeerGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    await everyone(four)
    group, wait = four[0], at.Counter.wait

    async def wait_and_break(self: at.Counter, *arguments: Any, **options: Any) -> None:
        ours = any(self in pair for pair in group._counters.values())
        await wait(self, *arguments, **options)
        if ours:
            group._break(at.BrokenError("a member gave up"), tell=False)

    monkeypatch.setattr(at.Counter, "wait", wait_and_break)
    outcomes = await asyncio.gather(*(one.barrier(timeout=10) for one in four), return_exceptions=True)
    assert isinstance(outcomes[0], at.BrokenError), outcomes[0]
    assert "a member gave up" in str(outcomes[0])
    assert outcomes[1:] == [None, None, None]


async def test_others_learn_that_the_engine_of_a_member_was_closed_inside_a_barrier(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    tasks = [asyncio.ensure_future(group.barrier(timeout=30)) for group in four[:3]]
    await asyncio.sleep(0.01)
    await engine_of(four[0]).aclose()
    for task in tasks[1:]:
        with pytest.raises(at.PeerLostError):  # not that it gave the group up, which is only what follows
            await asyncio.wait_for(task, 5)
    with pytest.raises(at.ClosedError):
        await tasks[0]


@pytest.mark.parametrize("provider", ["shm", "loopback"])
async def test_a_member_told_of_a_closed_engine_by_another_member_raises_what_that_one_does(provider: str) -> None:
    """Both wait for late signals after the goodbye; the second is told by the first before its own time is over."""
    async with AsyncExitStack() as stack:
        first, second, closes, absent = [
            await stack.enter_async_context(at.open_engine(providers=provider, config=at.Config(drain_timeout=s)))
            for s in (0.2, 30, 1, 1)
        ]
        members = [str(engine.address) for engine in (first, second, closes, absent)]
        groups = [engine.group(members) for engine in (first, second, closes, absent)]
        await everyone(groups)
        tasks = [asyncio.ensure_future(group.barrier(timeout=60)) for group in groups[:2]]
        await asyncio.sleep(0.01)
        await closes.aclose()
        async with asyncio.timeout(20):
            found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in found] == [at.PeerLostError, at.PeerLostError]
        assert all(members[2] in (str(error.peer), str(error)) for error in found if isinstance(error, at.PeerLostError))


async def test_a_target_that_is_no_member_is_refused(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    async with at.open_engine(providers=four[0].peers[1].path.provider) as stranger:  # type: ignore[union-attr]
        stranger.publish("memory", stranger.allocate(64))
        peer = await engine_of(four[0]).connect(stranger.address)
        remote = await peer.lookup("memory")
        with pytest.raises(ValueError, match="no member"):
            four[0].scatter_plan(engine_of(four[0]).allocate(64), [(0, 64, remote)])
