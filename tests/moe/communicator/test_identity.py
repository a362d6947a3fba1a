"""Who may speak for a rank, what it may say, and who is told when a rank cannot set up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.errors import DescriptorError
from aiotransfer.model.address import Address
from aiotransfer.moe.communicator import greetings, unmade
from aiotransfer.moe.communicator.buffers import Buffers
from aiotransfer.moe.communicator.ranks import Ranks
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.membership import Membership, View
from aiotransfer.moe.protocol.shape import Shape
from tests.moe.world import World, batch, combined, step, world

pytestmark = [pytest.mark.asyncio, pytest.mark.one_loop]
SIZES: dict[str, Any] = {"num_experts": 2, "hidden": 16, "dtype": "float32", "max_tokens": 4, "topk": 1, "timeout": 10}
SHAPE = Shape(ranks=2, num_experts=2, hidden=16, dtype="float32", combine_dtype="float32", max_tokens=4, topk=1)


@asynccontextmanager
async def engines(n: int) -> AsyncIterator[list[at.Engine]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(at.open_engine(providers="shm")) for _ in range(n)]


def made(of: list[at.Engine]) -> list[moe.AllToAll]:
    addresses = [str(engine.address) for engine in of]
    return [moe.AllToAll(engine, engine.group(addresses), **SIZES) for engine in of]


async def one_step(a2a: moe.AllToAll) -> None:
    d = await a2a.dispatch(np.ones((2, 16), np.float32), np.array([[0], [1]]), np.ones((2, 1), np.float32))
    assert (await a2a.combine(np.array(d.x), d.handle) == 1).all()
    assert d.handle.lost == ()


NOTHING = (np.empty((0, 16), np.float32), np.empty((0, 1), np.int64), np.empty((0, 1), np.float32))


def said(ranks: Any, about: Any) -> dict[str, Callable[[], messages.Message]]:
    """What an engine may say as rank 1 (`about`'s) to rank 0 (`ranks`)."""
    me = {"rank": 1, "incarnation": about.incarnation}
    none: View = View(about.incarnation, ((0, ranks.incarnation),), (), 0, (), (), ((1, about.incarnation, 0),))
    known = about.known[0]
    region = known.lease.descriptor.encode() if known is not None else b""
    hello = {"shape": SHAPE.agreed(), "direct": True, "reads": False, "computed": 0, "ask": True, "present": [], "to": 0}
    return {
        "it evicts": lambda: messages.Leave(who=0, of=ranks.incarnation, upto=0, reason="because", present=[], **me),
        "it leaves": lambda: messages.Leave(who=1, of=about.incarnation, upto=0, reason="bye", present=[], **me),
        "another one": lambda: messages.Hello(**(hello | {"region": region, "running": False, "rank": 1, "incarnation": 12345})),
        "none of it": lambda: messages.Hello(**(hello | {"region": b"", "running": False, "rank": 1, "incarnation": 12345})),
        "a view": lambda: messages.ViewUpdate(view=none, **me),
        "unable": lambda: messages.Unable(reason="no", to=ranks.incarnation, **me),
        "who": lambda: messages.WhoIsThere(present=[0], **me),
    }


NAMES = ("it evicts", "it leaves", "another one", "none of it", "a view", "unable", "who")


@pytest.mark.parametrize("claims", [True, False], ids=["says it is there", "says where it is"])
@pytest.mark.parametrize("what", NAMES)
async def test_an_engine_that_is_no_member_cannot_speak_for_a_rank(what: str, claims: bool, caplog: Any) -> None:
    async with engines(3) as (left, right, stranger):
        a2a = made([left, right])
        await asyncio.gather(*map(one_step, a2a))
        if claims:
            stranger.address = right.address
        peer = await stranger.connect(left.address)
        await peer.send(messages.encode(a2a[0]._ranks.key, said(a2a[0]._ranks, a2a[1]._ranks)[what]()))
        await peer.ping()
        await asyncio.sleep(0.3)  # a dial of rank 1's address
        await asyncio.gather(*map(one_step, a2a))
        assert "another engine is reached at" in caplog.text
        assert [task for task in a2a[0]._ranks.tasks if "Listener.listen" in repr(task)]
        await asyncio.gather(*(one.aclose() for one in a2a))


async def test_what_a_rank_says_before_it_is_known_is_heard_in_its_order_when_it_is() -> None:
    """Rank 0 dials; rank 1 dials back before it believes what comes. A stranger was there first."""
    async with engines(3) as (left, right, stranger):
        stranger.address = left.address
        addresses = [str(left.address), str(right.address)]
        second = moe.AllToAll(right, right.group(addresses), **SIZES)
        meets = asyncio.ensure_future(second.ready())
        peer = await stranger.connect(right.address)
        unable = messages.Unable(rank=0, incarnation=7, reason="never", to=second._ranks.incarnation)
        await peer.send(messages.encode(second._ranks.key, unable))
        await asyncio.sleep(0.1)
        assert not meets.done()
        first = moe.AllToAll(left, left.group(addresses), **SIZES)
        await asyncio.gather(first.ready(), meets)
        await asyncio.gather(one_step(first), one_step(second))
        assert second._ranks.known[0] is not None
        assert second._ranks.known[0].peer.incarnation == left.incarnation
        await asyncio.gather(first.aclose(), second.aclose())


async def test_ranks_that_are_connected_are_not_dialled_again(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.WARNING, "aiotransfer")
    async with engines(4) as of:
        addresses = [str(engine.address) for engine in of]
        await asyncio.gather(*(engine.group(addresses).barrier() for engine in of))
        for engine in of:
            monkeypatch.setattr(engine._connections, "_dial", None)
        for _ in range(3):
            a2a = [moe.AllToAll(e, e.group(addresses), **(SIZES | {"num_experts": 4})) for e in of]
            await asyncio.gather(*(one.ready() for one in a2a))
            await asyncio.gather(*(one.aclose() for one in a2a))
    assert not caplog.records


# ---- what a member may say ----


async def test_ranks_are_lost_and_come_back_by_messages_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "PIECE", 150)

    async def script(w: World) -> None:
        async def steps(a2a: moe.AllToAll, last: int) -> None:
            while a2a.next_step < last:
                await asyncio.sleep(0.02)
                b = batch(np.random.default_rng(a2a.rank), 4)
                d, out = await step(a2a, b)
                assert np.array_equal(out, combined(b, d.handle.dropped))

        await w.every(lambda a2a: a2a.ready())
        tasks = [asyncio.create_task(steps(w.a2a[r], 90)) for r in range(4)]
        await asyncio.sleep(0.1)
        w.net.kill(w.engines[2])
        tasks[2].cancel()
        again = await w.again(2)
        await again.ready()
        assert 0 < again.next_step < 90
        await asyncio.gather(*(tasks[r] for r in (0, 1, 3)), steps(again, 90))
        assert all(all(a2a.mask) for a2a in w.a2a)
        for a2a in w.a2a:
            await a2a.aclose()

    await asyncio.to_thread(world, 4, script)


async def test_a_member_that_says_what_cannot_be_is_lost_by_name_and_the_others_go_on(caplog: Any) -> None:
    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        ranks = w.a2a[1]._ranks
        far = View(ranks.incarnation, (), (), 1 << 40, (), (), tuple((r, p._ranks.incarnation, 0) for r, p in enumerate(w.a2a)))
        for rank in (0, 2, 3):
            ranks.send(rank, messages.ViewUpdate(rank=1, incarnation=ranks.incarnation, view=far))

        async def rank(a2a: moe.AllToAll) -> None:
            await asyncio.sleep(0.01)
            b = batch(np.random.default_rng(a2a.rank), 4)
            d, out = await step(a2a, b)
            assert d.handle.lost == (1,)
            assert np.array_equal(out, combined(b, d.handle.dropped))
            await a2a.aclose()

        await w.every(rank, ranks=(0, 2, 3))
        assert any("speaks of step" in str(a2a.lost[1]) for a2a in w.a2a if a2a.rank != 1)
        with pytest.raises(moe.EvictedError):
            await w.a2a[1].ready()
            await w.a2a[1].dispatch(*batch(np.random.default_rng(1), 4))
        await w.a2a[1].aclose()

    await asyncio.to_thread(world, 4, script)


async def test_a_reader_goes_on_after_a_message_that_it_fails_at(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    async with engines(2) as of:
        a2a = made(of)
        await asyncio.gather(*map(one_step, a2a))
        ranks = a2a[0]._ranks
        with monkeypatch.context() as patch:
            def fail(*_: Any) -> None:
                raise ZeroDivisionError("ours")

            patch.setattr(a2a[0]._communicator._greetings, "taking_part", fail)
            await a2a[1]._ranks.known[0].peer.send(  # type: ignore[union-attr]
                messages.encode(ranks.key, messages.WhoIsThere(rank=1, incarnation=a2a[1]._ranks.incarnation, present=None))
            )
            async with asyncio.timeout(5):
                while not a2a[0].lost:
                    await asyncio.sleep(0.01)
        assert "ours" in str(a2a[0].lost[1])
        assert "could not be dealt with" in caplog.text
        assert [task for task in ranks.tasks if "Listener.listen" in repr(task)]
        again = moe.AllToAll(of[1], of[1].group([str(e.address) for e in of]), **SIZES)
        await a2a[1].aclose()
        await asyncio.wait_for(again.ready(), 5)  # it is read: the rank that was lost is taken in again
        while a2a[0].next_step < again.next_step:
            await a2a[0].combine((await a2a[0].dispatch(*NOTHING)).x, a2a[0].in_flight[0])
        await asyncio.gather(one_step(a2a[0]), one_step(again))
        await asyncio.gather(a2a[0].aclose(), again.aclose())
    caplog.clear()


async def test_a_reader_goes_on_after_a_message_that_it_cannot_even_sort(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    async with engines(2) as of:
        a2a = made(of)
        await asyncio.gather(*map(one_step, a2a))
        ranks, decode = a2a[0]._ranks, messages.decode

        def fails(key: bytes, data: bytes) -> Any:
            if data.endswith(b"bad"):
                raise ZeroDivisionError("ours")
            return decode(key, data)

        monkeypatch.setattr(messages, "decode", fails)
        peer = a2a[1]._ranks.known[0].peer  # type: ignore[union-attr]
        await peer.send(ranks.key + b"bad")
        async with asyncio.timeout(10):
            while "could not be dealt with" not in caplog.text:
                await asyncio.sleep(0.01)
        assert [task for task in ranks.tasks if "Listener.listen" in repr(task) and not task.done()]
        for _ in range(3):
            await asyncio.gather(*map(one_step, a2a))
        assert not a2a[0].lost
        await asyncio.gather(*(each.aclose() for each in a2a))
    caplog.clear()


async def test_an_all_to_all_that_has_lost_very_many_takes_in_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotransfer.moe.protocol.membership.MOST_GONE", 4)
    members = Membership(0, [1, 2], slots=2)
    for number in range(3, 5):
        assert not members.full
        assert members.join(1, number)
    assert members.full


# ---- a rank that cannot set up ----


@pytest.mark.parametrize("rank", [0, 2, 3])
@pytest.mark.parametrize("ends", [False, True], ids=["stays", "ends"])
@pytest.mark.parametrize("error", [MemoryError, at.RegistrationError, OSError])
async def test_a_rank_that_cannot_set_up_tells_the_others_at_once_and_why(
    monkeypatch: pytest.MonkeyPatch, error: Any, ends: bool, rank: int
) -> None:
    def buffers(engine: Any, *given: Any, **named: Any) -> Any:
        if engine is short[0]:
            raise error("none left\nat all")
        return Buffers(engine, *given, **named)

    monkeypatch.setattr(greetings, "Buffers", buffers)
    async with engines(4) as of:
        short = [of[rank]]
        addresses = [str(engine.address) for engine in of]
        sizes = SIZES | {"num_experts": 4, "timeout": 60}
        a2a = [moe.AllToAll(e, e.group(addresses), **sizes) for e in of]

        async def ready(one: moe.AllToAll) -> Any:
            try:
                await one.ready()
            except error:
                if ends:
                    await one.aclose()
                    await of[rank].aclose()
                raise

        async with asyncio.timeout(20):
            found = await asyncio.gather(*map(ready, a2a), return_exceptions=True)
        assert type(found.pop(rank)) is error
        for other in found:
            assert type(other) is at.PeerLostError
            assert other.message.startswith(f"rank {rank} (")
            assert f"could not set up: {error.__name__}: none left at all" in other.message
        if not ends:
            short[:] = [None]  # type: ignore[list-item]
            await asyncio.gather(*(one.ready() for one in a2a))  # all of them may try again
        await asyncio.gather(*(one.aclose() for one in a2a))


async def test_a_rank_that_cannot_set_up_waits_until_the_others_know_it_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bound is far away, and the others may have to dial it first."""

    def buffers(engine: Any, *given: Any, **named: Any) -> Any:
        if engine is of[2]:
            raise MemoryError("none left")
        return Buffers(engine, *given, **named)

    async with AsyncExitStack() as stack:
        config = at.Config(drain_timeout=300)
        of = [await stack.enter_async_context(at.open_engine(providers="shm", config=config)) for _ in range(3)]
        addresses = [str(engine.address) for engine in of]
        a2a = [moe.AllToAll(e, e.group(addresses), **(SIZES | {"num_experts": 3, "timeout": 600})) for e in of]
        with monkeypatch.context() as patch:
            patch.setattr(greetings, "Buffers", buffers)
            found = await asyncio.wait_for(asyncio.gather(*(one.ready() for one in a2a), return_exceptions=True), 60)
        assert [type(one) for one in found] == [at.PeerLostError, at.PeerLostError, MemoryError]
        assert all("none left" in str(one) for one in found)
        await asyncio.gather(*(one.ready() for one in a2a))
        await asyncio.gather(*(one.aclose() for one in a2a))


async def test_what_is_said_of_another_incarnation_does_not_count() -> None:
    async with engines(3) as of:
        a2a = made(of[:2])
        await asyncio.gather(*map(one_step, a2a))
        communicator, other = a2a[0]._communicator, a2a[1]._ranks
        known = communicator.ranks.known[1]
        assert known is not None
        assert known.hello is not None
        communicator._greetings.check(known.peer, known.hello)
        foreign = of[2].register(np.zeros(1 << 20, np.uint8))
        strange = msgspec.structs.replace(known.hello, region=foreign.descriptor.encode(), computed=0)
        with pytest.raises(DescriptorError, match="another engine"):
            communicator._greetings.check(known.peer, strange)
        earlier = messages.WhoIsThere(rank=1, incarnation=other.incarnation ^ 2, present=None)
        communicator._listener.wrong(earlier, ValueError("of an earlier one"))
        assert not a2a[0].lost
        this = messages.WhoIsThere(rank=1, incarnation=other.incarnation, present=None)
        communicator._listener.wrong(this, ValueError("of this one"))
        assert "of this one" in str(a2a[0].lost[1])
        await asyncio.gather(*(one.aclose() for one in a2a))


async def test_a_group_at_work_does_not_heed_a_rank_that_cannot_set_up_a_second_time() -> None:
    async with engines(2) as of:
        a2a = made(of)
        await asyncio.gather(*map(one_step, a2a))
        with pytest.raises(ValueError, match="is open on this engine"):
            await made(of)[1].ready()
        await asyncio.gather(*map(one_step, a2a))
        await asyncio.gather(*(one.aclose() for one in a2a))


async def test_addresses_are_compared_as_places() -> None:
    async with engines(2) as of:
        addresses = [f"localhost:{of[0].address.port}", f"[::ffff:127.0.0.1]:{of[1].address.port}"]
        assert Address.parse(addresses[1]) == of[1].address
        a2a = [moe.AllToAll(e, e.group(addresses), **SIZES) for e in of]
        await asyncio.gather(*map(one_step, a2a))
        await asyncio.gather(*(one.aclose() for one in a2a))


async def test_a_rank_that_has_not_begun_believes_a_group_that_is_far_ahead() -> None:
    """It was about to start anew with others, and is taken in by those that are at work."""
    async with engines(2) as of:
        a2a = made(of)
        await asyncio.gather(*map(one_step, a2a))
        ranks, other = a2a[0]._ranks, a2a[1]._ranks
        both = ((0, ranks.incarnation, 0), (1, other.incarnation, 0))
        view = View(other.incarnation, (), (), 1 << 40, (), (), both)
        far = messages.ViewUpdate(rank=1, incarnation=other.incarnation, view=view)
        for running in (True, False):
            ranks.running = running
            if running:
                with pytest.raises(DescriptorError, match="speaks of step"):
                    a2a[0]._communicator._listener.view_update(1, far)
            else:
                a2a[0]._communicator._listener.view_update(1, far)
        await asyncio.gather(*(one.aclose() for one in a2a))


# ---- an all-to-all that cannot be made ----


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("change", "raised", "text"), [
    ({"num_experts": 5}, ValueError, "5 experts cannot be divided"),
    ({"dtype": "nonsense"}, (TypeError, ValueError), "nonsense"),
    ({"hidden": "16"}, TypeError, "hidden"),
    ({"no_such_size": 1}, TypeError, "no_such_size"),
], ids=["sizes", "dtype", "type", "unknown"])  # fmt: skip
async def test_a_rank_whose_all_to_all_cannot_be_made_tells_the_others_at_once_and_why(
    change: dict[str, Any], raised: Any, text: str, rank: int
) -> None:
    async with engines(3) as of:
        addresses = [str(engine.address) for engine in of]
        groups = [engine.group(addresses) for engine in of]
        sizes = SIZES | {"num_experts": 3, "timeout": 300}
        wait = [moe.AllToAll(e, g, **sizes) for i, (e, g) in enumerate(zip(of, groups, strict=True)) if i != rank]
        waiting = [asyncio.ensure_future(one.ready()) for one in wait]
        with pytest.raises(raised, match=text):
            moe.AllToAll(of[rank], groups[rank], **(sizes | change))
        found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
        for other in found:
            assert type(other) is at.PeerLostError
            assert other.message.startswith(f"rank {rank} (")
            assert "could not set up: " in other.message
            assert text in other.message
        with pytest.raises(at.PeerLostError, match=text):  # nothing has changed
            await asyncio.wait_for(wait[0].ready(), 60)
        right = moe.AllToAll(of[rank], groups[rank], **sizes)
        await asyncio.wait_for(asyncio.gather(right.ready(), *(one.ready() for one in wait)), 60)
        await asyncio.gather(right.aclose(), *(one.aclose() for one in wait))


async def test_an_all_to_all_that_is_made_already_answers_for_itself() -> None:
    """A second one of its name, which cannot be made, changes nothing."""
    async with engines(2) as of:
        addresses = [str(engine.address) for engine in of]
        first = moe.AllToAll(of[0], of[0].group(addresses), **SIZES)
        with pytest.raises(ValueError, match="topk"):
            moe.AllToAll(of[0], of[0].group(addresses), **(SIZES | {"topk": 0}))
        second = moe.AllToAll(of[1], of[1].group(addresses), **SIZES)
        await asyncio.wait_for(asyncio.gather(first.ready(), second.ready()), 60)
        with pytest.raises(ValueError, match="topk"):
            moe.AllToAll(of[0], of[0].group(addresses), **(SIZES | {"topk": 0}))
        await asyncio.gather(one_step(first), one_step(second))
        await asyncio.gather(first.aclose(), second.aclose())


async def test_an_engine_answers_for_so_many_that_could_not_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiotransfer.moe.communicator.unmade.MOST", 2)
    async with engines(1) as of:
        group = of[0].group([str(of[0].address)])
        for name in "abca":
            with pytest.raises(ValueError, match="topk"):
                moe.AllToAll(of[0], group, **(SIZES | {"topk": 0, "name": name}))
        assert len(unmade._unmade[of[0]]) == 2
        assert not unmade._unmade[of[0]].keys() ^ {messages.key_of(name, group.members) for name in "ca"}


# ---- ranks that do not meet ----


def keep_back(monkeypatch: pytest.MonkeyPatch, of: list[at.Engine], kind: type[messages.Message]) -> None:
    """What the ranks of these engines say of one kind."""
    send, incarnations = Ranks.send_to, {engine.incarnation for engine in of}

    def some(ranks: Any, peer: Any, said: messages.Message) -> None:
        if ranks.engine.incarnation not in incarnations or not isinstance(said, kind):
            send(ranks, peer, said)

    monkeypatch.setattr(Ranks, "send_to", some)


@pytest.mark.parametrize("last", [False, True], ids=["hello", "ready"])
async def test_a_rank_that_leaves_while_the_ranks_meet_is_missed_at_once(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    """It has said Hello; it waits for another one's Hello, or for its Ready."""
    async with engines(3) as of:
        addresses = [str(engine.address) for engine in of]
        sizes = SIZES | {"num_experts": 3, "timeout": 300}
        a2a = [moe.AllToAll(e, e.group(addresses), **sizes) for e in of]
        keep_back(monkeypatch, [of[0], of[2]] if last else [of[2]], messages.Ready if last else messages.Hello)
        waiting = [asyncio.ensure_future(one.ready()) for one in a2a]
        async with asyncio.timeout(60):
            while 1 not in a2a[0]._communicator._answers.hellos or (last and 1 not in a2a[0]._communicator._answers.ready):
                await asyncio.sleep(0.01)
        earlier = messages.Leave(rank=1, incarnation=7, who=1, of=7, upto=0, reason="long ago", present=[])
        a2a[0]._communicator._listener.heard(a2a[0]._communicator._answers.hellos[1][0], earlier)
        await asyncio.sleep(1.2)
        assert not waiting[0].done()
        await a2a[1].aclose()
        with pytest.raises(at.PeerLostError, match=r"rank 1 .* could not set up: it has left again: .*closed"):
            await asyncio.wait_for(waiting[0], 60)
        await asyncio.gather(*(one.aclose() for one in a2a))
        await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize("third", ["has no engine", "makes no all-to-all", "is not ready"])
async def test_ranks_that_do_not_meet_in_time_name_exactly_who_is_missing(monkeypatch: pytest.MonkeyPatch, third: str) -> None:
    async with engines(3) as of:
        addresses = [str(engine.address) for engine in of]
        sizes = SIZES | {"num_experts": 3, "timeout": 4}
        if third == "has no engine":
            await of.pop().aclose()
        a2a = [moe.AllToAll(e, e.group(addresses), **sizes) for e in of]
        last = third == "is not ready"
        if last:
            keep_back(monkeypatch, [of[2]], messages.Ready)
        found = await asyncio.gather(*(one.ready() for one in a2a[: 2 + last]), return_exceptions=True)
        for one in found[:2]:  # each has found the other one, which waits for the third as well
            assert isinstance(one, at.TransferTimeout)
            assert one.ranks == (2,)
        await asyncio.gather(*(one.aclose() for one in a2a))


async def test_ranks_whose_lists_differ_are_told_at_once() -> None:
    async with engines(3) as of:
        addresses = [str(engine.address) for engine in of]
        lists = [addresses, [addresses[1], addresses[0], addresses[2]], addresses]
        sizes = SIZES | {"num_experts": 3, "timeout": 300}
        a2a = [moe.AllToAll(e, e.group(members), **sizes) for e, members in zip(of, lists, strict=True)]
        found = await asyncio.wait_for(asyncio.gather(*(one.ready() for one in a2a), return_exceptions=True), 60)
        assert any(type(one) is at.ConfigurationError for one in found)
        assert all("lists another member at place 0, 1" in str(one) for one in found)
        await asyncio.gather(*(one.aclose() for one in a2a))
