"""Ranks that have given each other up: where one hears of the other side, or a rank comes back to both, one side goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aiotransfer import moe
from aiotransfer.moe.communicator.answers import Answers
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.membership import outweighs
from tests.moe.communicator.test_coming_back import all_are_together, anew, until
from tests.moe.communicator.test_faults import MESSY, RANKS, data
from tests.moe.world import Batch, World, batch, step, world


async def part(w: World, *sides: set[int]) -> None:
    """Ranks of different sides give each other up, and hear nothing of it."""
    sends = []
    for side in sides:
        for r in side:
            ranks = w.a2a[r]._ranks
            sends.append((ranks, ranks.send_to))
            names = {f"r{other}" for other in side}
            ranks.send_to = lambda peer, said, names=names, send=ranks.send_to: (  # type: ignore[method-assign,misc]
                send(peer, said) if peer.name in names else None
            )
    for side in sides:
        for r in side:
            for other in set[int]().union(*sides) - side:
                w.a2a[r].evict(other, "it is silent")
    for side in sides:
        for r in side:
            members = w.a2a[r]._ranks.membership
            await until(lambda members=members, side=side: {members.rank, *members.audience} == side and members.settled)
    for ranks, send in sends:
        ranks.send_to = send


def tell(w: World, rank: int, other: int) -> None:
    """`rank` says to `other` that it has given it up."""
    ranks = w.a2a[rank]._ranks
    ranks.send(other, ranks.leave(other, "it was silent", w.a2a[other]._ranks.incarnation))


def wide(rank: int) -> Batch:
    """What one of eight ranks dispatches."""
    return batch(np.random.default_rng(rank), 4)


async def ended(a2a: moe.AllToAll) -> None:
    """This rank is told that it takes no part any more, by its next call too."""
    await until(lambda: a2a._ranks.over is not None)
    assert isinstance(a2a._ranks.over, moe.EvictedError)
    assert not a2a.mask[a2a.rank]
    with pytest.raises(moe.EvictedError):
        await step(a2a, data(0, a2a.rank))


def test_of_two_sides_the_one_with_more_ranks_goes_on() -> None:
    assert outweighs({2, 3}, {1})
    assert not outweighs({1}, {2, 3})
    assert outweighs({0, 3}, {1, 2})
    assert not outweighs({1, 2}, {0, 3})
    assert not outweighs({0, 1, 2}, {0}), "they have not parted where one is on both sides"
    assert outweighs({5}, set())
    assert not outweighs(set(), {5})


def test_a_rank_that_two_sides_have_taken_in_meets_the_one_that_goes_on() -> None:
    answers = Answers((5, 1))
    answers.taken_in[1] = {1, 5}
    assert answers.needed(range(5)) == {1}
    answers.taken_in |= {0: {0, 3, 5}, 3: {3, 4, 5}}
    assert answers.needed(range(5)) == {0, 3, 4}
    answers.taken_in[2] = {1, 2, 5}
    assert answers.needed(range(5)) == {0, 3, 4}
    for rank in (0, 3):
        answers.not_at_work(rank)
    assert answers.needed(range(5)) == {1, 2}


@pytest.mark.parametrize("sides", [({0, 2, 3}, {1}), ({1, 2, 3}, {0}), ({0, 3}, {1, 2})])
def test_the_lesser_side_ends_where_it_hears_that_it_was_given_up(sides: tuple[set[int], set[int]]) -> None:
    greater, lesser = sides

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        await part(w, greater, lesser)
        for rank in lesser:
            for other in greater:
                tell(w, rank, other)
        await asyncio.sleep(0.1)
        await all_are_together(w, sorted(greater))  # these go on whatever they hear
        await all_are_together(w, sorted(lesser))
        for rank in lesser:
            tell(w, min(greater), rank)
        for rank in lesser:
            await ended(w.a2a[rank])
            await w.a2a[rank].aclose()
        await asyncio.gather(*(anew(w, rank).ready(timeout=5) for rank in lesser))
        await all_are_together(w, list(range(RANKS)))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


def test_a_rank_that_was_stopped_ends_where_the_others_went_on() -> None:
    """It finds first that its peers have gone, and reads afterwards what they had said."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        w.net.hold(w.engines[1], True)
        for _ in range(3):
            await asyncio.gather(*(step(w.a2a[r], data(0, r)) for r in (0, 2, 3)))
        late = [(w.a2a[r]._ranks, w.a2a[r]._ranks.leave(1, "it was silent", w.a2a[1]._ranks.incarnation)) for r in (0, 2, 3)]
        w.net.hold(w.engines[1], False)
        for other in (0, 2, 3):
            w.a2a[1].evict(other, "it has given this side up")
        listener = w.a2a[1]._communicator._listener
        for (ranks, leave), known in zip(late, [w.a2a[1]._ranks.known[r] for r in (0, 2, 3)], strict=True):
            assert ranks.rank in (0, 2, 3)
            listener.heard(known.peer, leave)
        await ended(w.a2a[1])
        await all_are_together(w, [0, 2, 3])
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


def later(w: World, ranks: list[int], what: str, when: Callable[[], Any]) -> list[Any]:
    """What these ranks do when they hear a `Hello`, or all that they tell of their view, happens `when` that is so."""
    tasks: list[Any] = []

    async def wait(do: Callable[..., None], *said: Any) -> None:
        await until(when)
        do(*said)

    for r in ranks:
        if what == "hello":
            listener = w.a2a[r]._communicator._listener
            listener.hello = lambda *said, do=listener.hello: tasks.append(  # type: ignore[method-assign,misc]
                asyncio.ensure_future(wait(do, *said))
            )
        else:
            one = w.a2a[r]._ranks

            def send(peer: Any, said: messages.Message, do: Callable[..., None] = one.send_to) -> None:
                if isinstance(said, messages.ViewUpdate):
                    tasks.append(asyncio.ensure_future(wait(do, peer, said)))
                else:
                    do(peer, said)

            one.send_to = send  # type: ignore[method-assign]
    return tasks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "first", ["the greater side", "any", "the lesser side", "the view of the lesser side", "the lesser side, which begins"]
)
def test_a_rank_that_comes_back_to_two_sides_joins_the_one_that_goes_on(first: str, seed: int) -> None:
    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        w.net.kill(w.engines[2])
        await asyncio.gather(*(step(w.a2a[r], data(0, r)) for r in (0, 1, 3)))
        await part(w, {0, 3}, {1})
        again = await w.again(2)
        ranks, answers = again._ranks, again._communicator._answers
        tasks: list[Any] = []
        if first == "the greater side":
            tasks = later(w, [1], "hello", lambda: ranks.membership is not None and ranks.membership.start is not None)
        elif first == "the lesser side":
            tasks = later(w, [0, 3], "hello", lambda: ranks.membership is not None)
        elif first == "the lesser side, which begins":
            tasks = later(w, [0, 3], "hello", lambda: ranks.membership is not None and ranks.membership.start is not None)
        elif first == "the view of the lesser side":
            later(w, [1], "hello", lambda: answers.taken_in or {0, 3} <= answers.seen.keys())
            tasks = later(w, [0, 3], "view", lambda: 1 in answers.early or ranks.membership is not None)
        try:
            await again.ready(timeout=5)
            await until(lambda: all(task.done() for task in tasks))
            await until(lambda: ranks.over is not None or w.a2a[1]._ranks.over is not None)
        except moe.EvictedError:
            pass
        await ended(w.a2a[1])
        if ranks.over is not None:
            assert first != "the greater side"
            await ended(again)
            await again.aclose()
            await anew(w, 2).ready(timeout=5)
        assert all(w.a2a[r]._ranks.over is None for r in (0, 3))
        await w.a2a[1].aclose()
        await anew(w, 1).ready(timeout=5)
        await all_are_together(w, list(range(RANKS)))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY, seed=seed)


def test_a_rank_that_joins_one_side_takes_nothing_from_a_newcomer_of_the_other() -> None:
    """The side that it joins does not know of that one, so no view of it says that it is gone."""
    more = [0, 3, 4, 5, 7]

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        for dead in (2, 6):
            w.net.kill(w.engines[dead])
        await asyncio.gather(*(step(w.a2a[r], wide(r)) for r in (1, *more)))
        await part(w, {*more}, {1})
        for r in more:
            listener = w.a2a[r]._communicator._listener
            listener.hello = lambda *said, do=listener.hello: do(*said) if said[0] != 2 else None  # type: ignore[method-assign,misc]
        await (await w.again(2)).ready(timeout=5)
        w.a2a[1]._communicator._listener.hello = lambda *said: None  # type: ignore[method-assign]
        again = await w.again(6)
        later(w, more, "hello", lambda: 2 in again._communicator._answers.early)
        await again.ready(timeout=5)
        await until(lambda: w.a2a[2]._ranks.over is not None)
        assert all(w.a2a[r]._ranks.over is None for r in (*more, 6))
        assert {r for r, there in enumerate(again.mask) if there} == {*more, 6}
        for a2a in w.a2a:
            await a2a.aclose()

    world(8, script, net=MESSY)


def test_a_rank_that_ends_tells_the_ranks_that_it_does_not_know_of_yet() -> None:
    """Rank 0 has taken rank 2 in, and its Hello is not read there when rank 1 gives rank 2 up."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        w.net.kill(w.engines[2])
        await asyncio.gather(*(step(w.a2a[r], data(0, r)) for r in (0, 1, 3)))
        await part(w, {1, 3}, {0})
        again = await w.again(2)
        listener = again._communicator._listener
        unread = lambda rank, *said, hear=listener.hello: None if rank == 0 else hear(rank, *said)  # noqa: E731
        listener.hello = unread  # type: ignore[method-assign,assignment]
        await again.ready(timeout=5)
        await until(lambda: w.a2a[0].mask[2])
        w.a2a[1].evict(2, "too slow")
        await ended(again)
        await until(lambda: not w.a2a[0].mask[2])
        await step(w.a2a[0], data(0, 0))
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)


@pytest.mark.parametrize("noticed", [False, True])
def test_a_rank_whose_connection_was_lost_while_it_came_back_is_told(noticed: bool) -> None:
    """It tries again to meet the others. One of them has taken it in by the earlier connection, where its view was lost."""

    async def script(w: World) -> None:
        await w.every(lambda a2a: a2a.ready())
        earlier = w.a2a[0]._ranks.known[2].peer
        w.net.kill(w.engines[2])
        await asyncio.gather(*(step(w.a2a[r], data(0, r)) for r in (0, 1, 3)))
        for r in (1, 3):
            w.a2a[r]._communicator._listener.hello = lambda *said: None  # type: ignore[method-assign]
        again = await w.again(2)
        coming = asyncio.ensure_future(again.ready(timeout=30))
        members, communicator = w.a2a[0]._ranks.membership, again._communicator
        await until(lambda: members.incarnation(2) == again._ranks.incarnation)
        await until(lambda: 0 in communicator._answers.hellos)
        known = w.a2a[0]._ranks.known[2]
        peer, known.peer = known.peer, earlier  # nothing that is sent there arrives
        if noticed:
            w.a2a[0].evict(2, "its connection is lost")
            known.peer = peer
        communicator._greetings.greet(0, communicator.ranks.known[0].peer, ask=True)
        with pytest.raises(moe.EvictedError, match="others have lost it"):
            await asyncio.wait_for(coming, 5)
        assert not w.a2a[0].mask[2]
        for a2a in w.a2a:
            await a2a.aclose()

    world(RANKS, script, net=MESSY)
