"""Ranks that come back while others come, leave, are given up, or come back, too: none waits for a rank that has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.moe.communicator.answers import Answers
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.membership import View
from tests.moe.communicator.test_faults import MESSY, RANKS, check, data, run_steps
from tests.moe.world import World, compute, step, world


def anew(w: World, rank: int) -> moe.AllToAll:
    """Another all-to-all on the engine of a rank, whose last one is over."""
    engine = w.engines[rank]
    w.a2a[rank] = moe.AllToAll(engine, engine.group(w.addresses), **w.sizes)
    return w.a2a[rank]


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(1e-4)


async def all_are_together(w: World, ranks: list[int]) -> None:
    """These ranks make steps until all of them have made three together, and lose none of these."""
    last = max(w.a2a[r].next_step for r in ranks) + 3
    reports: dict[Any, Any] = {}
    await asyncio.gather(*(run_steps(w.a2a[r], w.a2a[r].next_step, last, reports) for r in ranks))
    lost = tuple(r for r in range(RANKS) if r not in ranks)
    assert [reports[r, last - 1] for r in ranks] == [lost] * len(ranks)


def drop(a2a: moe.AllToAll, kind: type[messages.Message]) -> Callable[[], None]:
    """From now on this rank sends no message of this kind. Returns what ends that."""
    ranks, send = a2a._ranks, a2a._ranks.send_to
    ranks.send_to = lambda peer, said: None if isinstance(said, kind) else send(peer, said)  # type: ignore[method-assign]
    return lambda: setattr(ranks, "send_to", send)


@pytest.mark.parametrize("seed", range(4))
def test_memory_that_was_offered_to_an_earlier_all_to_all_of_the_engine_is_not_used(seed: int) -> None:
    """It had left before the answer to its Hello came; the next one reads it."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        await w.a2a[0].aclose()
        earlier = anew(w, 0)
        coming = asyncio.ensure_future(earlier.ready())
        await until(lambda: all(known or r == 0 for r, known in enumerate(earlier._ranks.known)))  # it has said Hello
        await earlier.aclose()
        await asyncio.gather(coming, return_exceptions=True)
        await asyncio.sleep(0.2)
        await anew(w, 0).ready()
        await all_are_together(w, list(range(RANKS)))
        assert not any(a2a.lost for a2a in w.a2a)
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY, seed=seed)


@pytest.mark.parametrize("when", ["it has answered a question", "it is said Hello", "it has said Hello", "it is named"])
@pytest.mark.parametrize("seed", range(4))
def test_a_rank_comes_back_while_another_leaves_whose_engine_stays(seed: int, when: str) -> None:
    """Rank 3 has said which ranks are at work, or others have named it. Rank 1 is lost for good."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        for dead in (1, 2):
            w.net.kill(w.engines[dead])
        await asyncio.gather(*(step(w.a2a[r], data(0, r)) for r in (0, 3)))
        ranks, listener, closing = w.a2a[3]._ranks, w.a2a[3]._communicator._listener, set[Any]()
        send, hello = ranks.send_to, listener.hello

        async def leave() -> None:
            if when == "it is named":
                await until(lambda: 3 in w.a2a[2]._communicator._answers.taken_in.get(0, ()))
            await w.a2a[3].aclose()

        def said(peer: Any, message: messages.Message) -> None:
            send(peer, message)
            if when == "it has answered a question" and isinstance(message, messages.WhoIsThere):
                closing.add(asyncio.ensure_future(leave()))

        def heard(rank: int, peer: Any, message: messages.Hello) -> None:
            if when == "it has said Hello":
                hello(rank, peer, message)
            closing.add(asyncio.ensure_future(leave()))

        ranks.send_to, listener.hello = said, heard  # type: ignore[method-assign]
        again = await w.again(2)
        await again.ready(timeout=3)
        await asyncio.gather(*closing)
        await all_are_together(w, [0, 2])
        for r in (0, 2):
            await w.a2a[r].aclose()

    world(RANKS, script, net=MESSY, seed=seed)


def test_a_rank_that_is_given_up_before_it_has_met_all_others_is_told() -> None:
    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        w.net.kill(w.engines[2])
        await asyncio.gather(*(step(w.a2a[r], data(0, r)) for r in (0, 1, 3)))
        w.a2a[3]._communicator._listener.hello = lambda *said: None  # type: ignore[method-assign]
        again = await w.again(2)
        coming = asyncio.ensure_future(again.ready(timeout=30))
        await until(lambda: w.a2a[0]._ranks.membership.incarnation(2) == again._ranks.incarnation)
        await until(lambda: again._communicator._answers.taken_in)
        w.a2a[0].evict(2, "too slow")
        with pytest.raises(moe.EvictedError, match="gave this rank up"):
            await asyncio.wait_for(coming, 5)
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


@pytest.mark.parametrize("seed", range(4))
def test_a_rank_that_starts_anew_on_its_engine_before_all_have_said_hello_is_met(seed: int) -> None:
    async def script(w: World) -> None:
        others = [asyncio.ensure_future(w.a2a[r].ready(timeout=30)) for r in (0, 1)]
        coming = asyncio.ensure_future(w.a2a[2].ready())
        await until(lambda: all(2 in w.a2a[r]._communicator._answers.hellos for r in (0, 1)))
        await w.a2a[2].aclose()
        await asyncio.gather(coming, return_exceptions=True)
        again = [asyncio.ensure_future(a2a.ready(timeout=30)) for a2a in (anew(w, 2), w.a2a[3])]
        await asyncio.wait_for(asyncio.gather(*others, *again), 5)
        await all_are_together(w, list(range(RANKS)))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY, seed=seed)


def test_a_rank_that_starts_anew_on_its_engine_before_all_are_ready_is_missed_and_met_by_the_next_try() -> None:
    async def script(w: World) -> None:
        heard = [drop(w.a2a[r], messages.Ready) for r in (1, 3)]
        waiting = [asyncio.ensure_future(a2a.ready(timeout=30)) for a2a in w.a2a]
        await until(lambda: all(2 in w.a2a[r]._communicator._answers.ready for r in (0, 1, 3)))
        await w.a2a[2].aclose()
        waiting.append(asyncio.ensure_future(anew(w, 2).ready(timeout=30)))
        with pytest.raises(at.PeerLostError, match=r"rank 2 .* was lost while the ranks met: it has started anew"):
            await asyncio.wait_for(waiting[0], 5)
        for hear in heard:
            hear()

        async def met(a2a: moe.AllToAll) -> None:
            while True:
                with contextlib.suppress(at.PeerLostError):
                    await a2a.ready(timeout=5)
                    return

        await w.every(met)
        await asyncio.gather(*waiting, return_exceptions=True)
        await all_are_together(w, list(range(RANKS)))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


@pytest.mark.parametrize("when", ["before the next try", "during the next try"])
def test_a_try_to_meet_that_failed_goes_on_where_others_have_begun(when: str) -> None:
    """Rank 0 has not heard that rank 3 is ready, and rank 2 is lost; the others had begun before. What rank 2 had sent does not
    count for its next incarnation."""

    async def script(w: World) -> None:
        ready = w.a2a[0]._communicator._answers.ready
        hold = drop(w.a2a[3], messages.ViewUpdate)
        later = drop(w.a2a[1], messages.ViewUpdate)
        w.a2a[0]._communicator._answers.ready = type("Deaf", (dict,), {"get": lambda *_: None})(ready)
        waiting = asyncio.ensure_future(w.a2a[0].ready(timeout=30))
        await w.every(lambda a2a: a2a.ready(), ranks=[1, 2, 3])
        await w.a2a[2].dispatch_send(*data(0, 2))
        await asyncio.sleep(0.01)
        w.net.kill(w.engines[2])
        with pytest.raises(at.PeerLostError, match=r"rank 2 .* was lost while the ranks met"):
            await asyncio.wait_for(waiting, 5)
        again = asyncio.ensure_future(w.a2a[0].ready(timeout=5)) if when == "during the next try" else None
        await asyncio.sleep(0.1)
        hold()
        later()
        w.a2a[1].evict(2, "its process has ended")
        await until(lambda: w.a2a[0]._ranks.running)
        await (again or w.a2a[0].ready(timeout=5))
        await all_are_together(w, [0, 1, 3])
        coming = asyncio.ensure_future((await w.again(2)).ready(timeout=5))
        await until(lambda: all(w.a2a[r].mask[2] for r in (0, 1, 3)))
        await coming
        await all_are_together(w, list(range(RANKS)))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


def test_a_rank_that_came_and_left_again_is_not_waited_for_by_another_that_comes() -> None:
    """Rank 2 has heard of rank 3 and of its end; those that are at work have heard of neither."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        for dead in (2, 3):
            w.net.kill(w.engines[dead])
        await asyncio.gather(*(step(w.a2a[r], data(0, r)) for r in (0, 1)))
        hellos: list[Any] = []
        for r in (0, 1):
            listener = w.a2a[r]._communicator._listener
            listener.hello = lambda *said, hear=listener.hello: hellos.append((hear, said))  # type: ignore[method-assign]
        coming = [await w.again(r) for r in (2, 3)]
        waiting = [asyncio.ensure_future(a2a.ready(timeout=30)) for a2a in coming]
        answers = coming[0]._communicator._answers
        await until(lambda: 3 in answers.hellos and len(hellos) == 4)
        await coming[1].aclose()
        await until(lambda: 3 not in answers.hellos)
        for hear, said in hellos:
            if said[0] == 2:
                hear(*said)
        await asyncio.wait_for(waiting[0], 5)
        await all_are_together(w, [0, 1, 2])
        await asyncio.gather(*waiting, return_exceptions=True)
        for r in (0, 1, 2):
            await w.a2a[r].aclose()

    world(RANKS, script, net=MESSY)


def test_ranks_begin_anew_together_where_the_one_that_was_at_work_has_ended() -> None:
    """Rank 2 has heard from rank 1 that it is at work alone. Rank 1 ends, and starts anew: then all begin at the first step."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        for dead in (0, 2, 3):
            w.net.kill(w.engines[dead])
        await step(w.a2a[1], data(0, 1))
        w.a2a[1]._communicator._listener.hello = lambda *said: None  # type: ignore[method-assign]
        coming = [asyncio.ensure_future((await w.again(2)).ready(timeout=30))]
        answers = w.a2a[2]._communicator._answers
        await until(lambda: answers.seen == {1: {1}})
        await w.a2a[1].aclose()
        coming.append(asyncio.ensure_future(anew(w, 1).ready(timeout=30)))
        await asyncio.sleep(1)
        assert not any(task.done() for task in coming)
        coming += [asyncio.ensure_future((await w.again(r)).ready(timeout=30)) for r in (0, 3)]
        await asyncio.wait_for(asyncio.gather(*coming), 5)
        assert [(a2a.next_step, a2a.mask) for a2a in w.a2a] == [(0, (True,) * RANKS)] * RANKS
        await all_are_together(w, list(range(RANKS)))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


def test_a_hello_to_an_earlier_all_to_all_of_the_engine_is_answered_by_the_next_one() -> None:
    """Its sender may not know yet that there is another one: neither would greet the other."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        w.net.kill(w.engines[2])
        await asyncio.gather(*(step(w.a2a[r], data(0, r)) for r in (0, 1, 3)))
        again, communicator = await w.again(2), w.a2a[0]._communicator
        again._communicator._listener.start()
        peer = await w.engines[0].connect(w.addresses[2])
        hello = communicator.ranks.known[1].hello
        region = w.engines[2].allocate(1 << 20).lease(await w.engines[2].connect(w.addresses[0]))
        earlier = msgspec.structs.replace(
            hello, rank=2, incarnation=again._ranks.incarnation, region=region.descriptor.encode(), running=False, computed=0,
            to=7,
        )
        communicator.ranks.known[2] = None
        communicator._listener.hello(2, peer, earlier)
        await until(lambda: 0 in again._communicator._answers.hellos)
        assert communicator.ranks.known[2].hello is None
        await again.ready(timeout=5)
        await all_are_together(w, list(range(RANKS)))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


def test_a_hello_that_is_said_twice_changes_nothing_under_a_step() -> None:
    """Two ranks ask each other at once, and answer: the last answer may come when steps are made."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())

        async def rank(a2a: moe.AllToAll) -> None:
            d = await a2a.dispatch(*data(0, a2a.rank))
            half = await a2a.combine_send(compute(d, a2a.rank), d.handle)
            for other in range(RANKS):
                if other != a2a.rank:
                    communicator = w.a2a[other]._communicator
                    communicator._greetings.greet(a2a.rank, communicator.ranks.known[a2a.rank].peer, ask=False)
            await asyncio.sleep(0.01)
            check(data(0, a2a.rank), await half.receive(), d.handle.dropped, d.handle.lost)
            await a2a.aclose()

        await w.every(rank)

    world(RANKS, script, net=MESSY, results_in_place=True, direct=True)


@pytest.mark.parametrize("to", ["an earlier one", "none"])
def test_that_a_rank_could_not_set_up_once_does_not_count_when_it_tries_again(to: str) -> None:
    """It said so to an earlier all-to-all of the engine, which had ended: the next one reads it."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        ranks, peer = w.a2a[0]._ranks, w.a2a[0]._ranks.known[1].peer
        await w.every(lambda a2a: a2a.aclose())
        earlier = w.a2a[1]._ranks.incarnation if to == "an earlier one" else 0
        unable = messages.Unable(rank=0, incarnation=7, reason="no memory", to=earlier)
        await peer.send(messages.encode(ranks.key, unable))
        await peer.ping()
        coming = asyncio.ensure_future(anew(w, 1).ready(timeout=5))
        await asyncio.sleep(0.5)
        assert not coming.done()
        await asyncio.gather(coming, *(anew(w, r).ready(timeout=5) for r in (0, 2, 3)))
        await all_are_together(w, list(range(RANKS)))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


@pytest.mark.parametrize("when", ["it tries", "it has failed", "it has failed, and was not heard"])
def test_a_rank_that_cannot_set_up_says_so_to_one_that_comes_later(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then it can."""

    async def script(w: World) -> None:
        def fail(*_: Any) -> None:
            raise MemoryError("none is left")

        w.a2a[0]._communicator._greetings.make_buffers = fail  # type: ignore[method-assign]
        hear = drop(w.a2a[0], messages.Unable) if when == "it has failed, and was not heard" else None
        trying = asyncio.ensure_future(w.a2a[0].ready(timeout=5))
        later = [1]
        if when == "it tries":
            await until(lambda: w.a2a[0]._communicator._answers.told)
        else:
            await asyncio.wait([trying])
        if hear is not None:  # it answers their Hello
            hear()
            later = [1, 2, 3]
        elif when == "it has failed":  # it answers a question: there is no Hello while a rank is missing
            w.net.kill(w.engines[3])
        found = await asyncio.gather(*(w.a2a[r].ready(timeout=2) for r in later), return_exceptions=True)
        for error in found:
            assert isinstance(error, at.PeerLostError)
            assert "could not set up: MemoryError: none is left" in str(error)
        with pytest.raises(MemoryError):
            await trying
        del w.a2a[0]._communicator._greetings.make_buffers
        if when == "it has failed":
            await w.again(3)
        await w.every(lambda a2a: a2a.ready(timeout=5))
        await all_are_together(w, list(range(RANKS)))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


def test_a_rank_that_takes_another_one_in_is_met_whatever_its_view_names() -> None:
    answers = Answers((0, 1))
    assert answers.needed([1, 2]) == {1, 2}
    answers.seen[2] = {2, 3}
    assert answers.needed([1, 2, 3]) == {2, 3}
    answers.view(1, messages.ViewUpdate(rank=1, incarnation=5, view=View(5, (), ((0, 1),), 0, (), (), ())))
    assert answers.needed([1, 2, 3]) == {1}
    answers.not_at_work(1)
    assert answers.needed([1, 2, 3]) == {2, 3}
