"""Groups: who may speak for a member, and lists of members that differ."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

import aiotransfer as at
from aiotransfer.control.frames import Join, Roster
from aiotransfer.engine.sync import rosters as rosters_module
from aiotransfer.engine.sync.rosters import roster
from tests.engine.groups import engine_of, everyone, open_group

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture(params=["shm", "loopback"])
async def four(request: pytest.FixtureRequest) -> AsyncIterator[list[at.PeerGroup]]:
    async with AsyncExitStack() as stack:
        yield await open_group(stack, request.param, 4)


def join(groups: list[at.PeerGroup], rank: int, *, generation: int = 1, key: bytes | None = None) -> Join:
    """What the member of that rank may say."""
    return Join(key=key or groups[0]._key, rank=rank, generation=generation, imms=(0xF000_0000, 0xF000_0001))


@pytest.mark.parametrize("says", ["nothing", "the member's address"])
@pytest.mark.parametrize("when", ["before", "formed"])
@pytest.mark.parametrize("rank", [0, 1, 3])
async def test_an_engine_that_is_no_member_cannot_speak_for_one(rank: int, when: str, says: str, caplog: Any) -> None:
    async with AsyncExitStack() as stack:
        groups = await open_group(stack, "shm", 4)
        stranger = await stack.enter_async_context(at.open_engine(providers="shm"))
        if says != "nothing":
            stranger.address = groups[rank]._engine.address
        if when == "formed":
            await everyone(groups, timeout=5)
        others = [group for group in groups if group.rank != rank]
        peers = [await stranger.connect(group._engine.address) for group in others]
        for generation in (1, 2, 1 << 40):
            for peer in peers:
                peer._reply(join(groups, rank, generation=generation))
        for peer in peers:
            await peer.ping()
        for _ in range(3):
            await everyone(groups, timeout=5)
        await asyncio.sleep(0.2)
        await everyone(groups, timeout=5)
        for group in others:
            member = group.peers[rank]
            assert member is not None
            assert member.incarnation == groups[rank]._engine.incarnation
        assert "another engine is reached at" in caplog.text


async def test_a_join_that_came_early_does_not_take_the_place_of_the_members_own() -> None:
    """Both are kept until the group is made, whoever was first."""
    async with AsyncExitStack() as stack:
        left, right, stranger = [await stack.enter_async_context(at.open_engine(providers="shm")) for _ in range(3)]
        members = [str(left.address), str(right.address)]
        group = left.group(members)
        barrier = asyncio.create_task(group.barrier(timeout=5))
        peer = await stranger.connect(right.address)
        peer._reply(join([group], 0))
        await peer.ping()
        await asyncio.sleep(0.1)
        peer._reply(join([group], 0, generation=7))
        await peer.ping()
        await asyncio.gather(right.group(members).barrier(timeout=5), barrier)


async def test_what_is_said_for_members_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsyncExitStack() as stack:
        groups = await open_group(stack, "shm", 2)
        stranger = await stack.enter_async_context(at.open_engine(providers="shm"))
        claims = groups[0]._claims

        async def never(address: Any) -> Any:
            await asyncio.sleep(60)

        monkeypatch.setattr(engine_of(groups[0])._connections.reach, "dial", never)
        peer = await stranger.connect(groups[0]._engine.address)
        for generation in range(1, 1000):
            peer._reply(join(groups, 1, generation=generation))
        await peer.ping()
        assert sum(len(claim.held) for claim in claims._claims.values()) <= 64
        assert len(claims._claims) == 1
        groups[0].close()
        assert not claims._claims


@pytest.mark.parametrize("back", [True, False], ids=["restarted", "gone"])
async def test_a_member_that_has_dialled_and_ends_while_the_group_forms(monkeypatch: pytest.MonkeyPatch, back: bool) -> None:
    """Its successor at its address takes its place; where there is none, the wait ends at once."""
    monkeypatch.setattr("aiotransfer.engine.peers.reach.MISSED_SECONDS", 30 if back else 0.1)
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(at.open_engine(providers="shm"))
        there = await stack.enter_async_context(at.open_engine(providers="shm"))
        members = [str(there.address), str(here.address)]
        await there.connect(here.address)
        waits = asyncio.ensure_future(here.group(members).barrier(timeout=300))
        async with asyncio.timeout(30):
            while not any(peer._awaited_by.futures for peer in here.peers):
                await asyncio.sleep(0.005)
        await there.aclose()
        if back:
            there = await stack.enter_async_context(at.open_engine(providers="shm", listen=members[0]))
            await asyncio.wait_for(asyncio.gather(waits, there.group(members).barrier(timeout=60)), 60)
        else:
            with pytest.raises(at.PeerLostError):
                await asyncio.wait_for(waits, 60)


async def test_an_engine_that_is_reached_at_a_members_address_is_another_one() -> None:
    async with at.open_engine(providers="shm") as engine:
        peer = await engine.connect(engine.address)
        reach = engine._connections.reach
        reach.found(engine.address, peer)
        assert reach.at(engine.address) is None


# ---- lists that differ ----


async def mended(group: at.PeerGroup) -> None:
    await group.reform(timeout=30)
    await group.barrier(timeout=30)


@pytest.mark.parametrize("other", ["shorter", "longer", "another order", "another member"])
async def test_lists_that_contradict_each_other_end_the_wait_on_every_member_at_once(other: str) -> None:
    """The deadline is far away. The third member lists what the first does, and may not meet the second at all."""
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(at.open_engine(providers="shm", name=f"e{i}")) for i in range(4)]
        a, b, c, d = (str(engine.address) for engine in engines)
        groups = [engine.group([a, b, c]) for engine in (engines[0], engines[2])]
        theirs, text = {
            "shorter": ([a, b], "lists 2 members instead of 3"),
            "longer": ([a, b, c, d], "lists 4 members instead of 3"),
            "another order": ([b, a, c], "lists another member at place 0, 1"),
            "another member": ([a, b, d], "lists another member at place 2"),
        }[other]
        groups.append(engines[1].group(theirs))
        async with asyncio.timeout(30):
            found = await asyncio.gather(*(group.barrier(timeout=300) for group in groups), return_exceptions=True)
        assert type(found[0]) is at.ConfigurationError
        assert f"member 1 ('e1' at {b}) {text}" in str(found[0])
        assert "the same list" in found[0].hint
        assert f"member 1 ('e1' at {b}) {text}" in str(found[1])  # it compared itself, or was told by the first one
        assert type(found[2]) is at.ConfigurationError
        assert re.search(r"member \d \('e[02]' at [\d.:]+\) lists ", str(found[2]))
        with pytest.raises(at.BrokenError, match="broken"):
            await groups[0].barrier(timeout=300)
        right = engines[1].group([a, b, c])
        groups.pop().close()
        await asyncio.gather(right.barrier(timeout=30), *map(mended, groups))


class Behind:
    """An object whose clock runs a hair slower than its timers: a timer fires before the clock shows its time."""

    def __init__(self, of: Any, **instead: Any) -> None:
        self._of = of
        self._begun = time.monotonic()
        self.__dict__.update(instead)

    def time(self) -> float:
        return self._begun + 0.9 * (time.monotonic() - self._begun)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


async def test_lists_that_contradict_each_other_are_seen_by_a_timer_that_fires_a_hair_early() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(at.open_engine(providers="shm")) for _ in range(2)]
        members = [str(engine.address) for engine in engines]
        groups = [engines[0].group(members), engines[1].group(members[::-1])]
        for engine in engines:
            engine._groups.rosters._engine = Behind(engine, _loop=Behind(engine._loop))  # type: ignore[assignment]
        async with asyncio.timeout(30):
            found = await asyncio.gather(*(group.barrier(timeout=300) for group in groups), return_exceptions=True)
        assert [type(error) for error in found] == [at.ConfigurationError, at.ConfigurationError]


async def test_a_list_that_does_not_name_this_engine_is_told_of_by_the_deadline_alone() -> None:
    """The other engine may be about to make the group that is asked for."""
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(at.open_engine(providers="shm", name=f"e{i}")) for i in range(3)]
        a, b, c = (str(engine.address) for engine in engines)
        theirs, ours = engines[1].group([b, c]), engines[0].group([a, b])
        with pytest.raises(at.TransferTimeout, match=rf"member 1 \('e1' at {b}\) lists another member at place 0, 1") as caught:
            await ours.barrier(timeout=1)
        assert caught.value.ranks == (1,)
        assert "the same list" in caught.value.hint
        made = engines[1].group([a, b])
        await asyncio.gather(mended(ours), made.barrier(timeout=30))
        theirs.close()


async def test_a_group_that_is_made_while_lists_are_compared_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine has two tasks, and each makes its first group before it hears of the other one's."""
    monkeypatch.setattr("aiotransfer.engine.sync.rosters.GRACE", 5.0)
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(at.open_engine(providers="shm")) for _ in range(3)]
        a, b, c = (str(engine.address) for engine in engines)
        lists = [[a, b], [a, b, c]]
        first = [asyncio.ensure_future(engines[i].group(lists[i]).barrier(timeout=60)) for i in range(2)]
        rosters = engines[0]._groups.rosters
        async with asyncio.timeout(30):
            while not any(rosters._against.values()):
                await asyncio.sleep(0.01)
        then = [engines[i].group(lists[1 - i]).barrier(timeout=60) for i in range(2)]
        await asyncio.gather(*first, *then, engines[2].group(lists[1]).barrier(timeout=60))
        assert not any(rosters._against.values())


async def test_an_engine_that_is_no_member_cannot_contradict_a_list() -> None:
    async with AsyncExitStack() as stack:
        left, right, stranger = [await stack.enter_async_context(at.open_engine(providers="shm")) for _ in range(3)]
        members = [str(left.address), str(right.address)]
        stranger.address = right.address
        group = left.group(members)
        waits = asyncio.ensure_future(group.barrier(timeout=60))
        peer = await stranger.connect(left.address)
        other = roster("", [right.address, left.address])
        peer._reply(Roster(other.name, other.members, rosters_module._of(group.roster)))
        await peer.ping()
        await asyncio.sleep(2 * rosters_module.GRACE)
        assert not waits.done()
        await asyncio.gather(waits, right.group(members).barrier(timeout=60))


async def test_two_engines_do_not_answer_each_other_for_ever(four: list[at.PeerGroup]) -> None:
    await everyone(four)
    engine, peer = engine_of(four[0]), four[0].peers[1]
    assert peer is not None
    theirs = Roster(four[0].roster.name, b"abcd", b"12345678")
    answers: list[Any] = []
    peer._reply = answers.append  # type: ignore[method-assign]
    for _ in range(3):
        engine._groups.listed(peer, theirs)
    assert len(answers) == 1
    for i in range(200):
        engine._groups.listed(peer, Roster(theirs.name, i.to_bytes(4, "big"), theirs.answers))
    assert len(answers) == 64
    del peer._reply


async def test_groups_of_one_name_and_other_members_are_no_mistake(four: list[at.PeerGroup]) -> None:
    engines = [engine_of(group) for group in four]
    halves = [engine.group([str(e.address) for e in engines[i // 2 * 2 :][:2]], name="all") for i, engine in enumerate(engines)]
    await asyncio.gather(*(group.barrier(timeout=5) for group in (*four, *halves)))


async def test_a_list_of_members_that_cannot_be_loses_its_sender(four: list[at.PeerGroup]) -> None:
    lists = (b"short", b"1234"), (b"n" * 8, b"123"), (b"n" * 8, bytes(4 * 4097)), (b"n" * 8, b"1234", b"5")
    for wrong in (Roster(*fields) for fields in lists):
        async with at.open_engine(providers=["shm", "loopback"]) as stranger:
            peer = await stranger.connect(four[0]._engine.address)
            peer._reply(wrong)
            await peer.closed(timeout=5)
            assert peer.state == "lost"
    await everyone(four, timeout=5)
