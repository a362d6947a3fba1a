"""Calls of both roles are cancelled at any turn of the loop in an update, on the simulator.

Each call runs once to count the turns of an update, then once for each turn with a cancel there: for some turns, drawn by lot, or
with LONG_TESTS=1 for all. Wherever the cancel comes, the update ends in time on every rank, with an error that says who left. All
ranks that have a version have the same one, nothing is left behind, and the next version reaches all ranks.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.testing.fabric import Fabric, fabric
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.publisher.leader import Leader
from aiotransfer.weights.subscriber.filling import Filling
from tests.weights.party import Party, Server, Trainer, shard, values

ALL = os.environ.get("LONG_TESTS") == "1"
TURNS = 40  # of each call, unless ALL
CONFIG = at.Config(peer_timeout=0.05, drain_timeout=0.01)
SECONDS = 1.0  # of an update, after which a rank no longer waits for one that has left before it began
SOON = 2.5  # all times are those of the simulator
Stop = Callable[[], object]
Strike = Callable[[Stop], None]


class Stage:
    """Two trainer ranks and instances of two. What is left behind is found by comparing with the beginning."""

    def __init__(self, net: Fabric, party: Party, mode: str) -> None:
        self.net, self.party, self.mode = net, party, mode
        self.number = 1
        self.paused: dict[tuple[str, int], list[int]] = {}  # how often the host of a subscriber was paused and not resumed
        self.before: tuple[Any, ...] = ()

    @property
    def servers(self) -> list[Server]:
        return [server for servers in self.party.instances.values() for server in servers]

    @property
    def trainers(self) -> list[Trainer]:
        return self.party.trainers

    async def serve(self, rank: int, instance: str = "a") -> None:
        """A subscriber on the engine of a server."""
        server = self.party.instances[instance][rank]
        paused = self.paused[instance, rank] = [0]

        async def pause() -> None:
            paused[0] += 1
            await asyncio.sleep(1e-5)  # an update may end here

        async def resume() -> None:
            await asyncio.sleep(1e-5)
            paused[0] -= 1

        options: dict[str, Any] = {"instance": instance, "rank": rank, "mode": self.mode, "timeout": SECONDS}
        if self.mode == "in_place":
            options |= {"pause": pause, "resume": resume}
        subscriber = weights.Subscriber(server.engine, server.subscriber.layout, **options)
        server.subscriber = await self.party.stack.enter_async_context(subscriber)

    def left(self) -> tuple[Any, ...]:
        """Tasks, and of each engine: counters, regions, leases."""
        engines = [one.engine for one in self.trainers] + [one.engine for one in self.servers]
        each = [
            (len(engine._counters), len(engine._regions), sum(len(peer._leases) for peer in engine.peers)) for engine in engines
        ]
        tasks = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
        tasks.pop("Subscriber._look_on", None)  # of one without a version: it looks for publishers
        return tasks, *each

    async def settled(self) -> None:
        """Nothing is left of an update; every rank has one version, byte for byte, and those of an instance the same."""
        await asyncio.sleep(0.1)
        if self.before:
            assert self.left() == self.before
        having = [server for server in self.servers if server.subscriber.version is not None]
        for servers in self.party.instances.values():
            assert len({server.subscriber.version for server in servers} - {None}) <= 1
        for server in having:
            assert server.subscriber.version is not None
            assert server.holds() == server.subscriber.version.number
        if self.mode == "double":
            assert len(having) == len(self.servers)
        for instance, servers in self.party.instances.items():
            for rank, server in enumerate(servers):
                assert self.paused[instance, rank] == [int(server.subscriber.version is None)]

    async def next(self) -> None:
        """The next version comes to all."""
        self.number += 1
        version = await self.party.publish(self.number)
        assert [server.holds() for server in self.servers] == [self.number] * len(self.servers)
        assert {server.subscriber.version for server in self.servers} == {version}

    def begin(self) -> list[asyncio.Task[Any]]:
        """Both ranks publish."""
        self.number += 1
        return [asyncio.ensure_future(trainer.publish(self.number)) for trainer in self.trainers]

    async def ends(self, tasks: list[asyncio.Task[Any]]) -> list[BaseException | None]:
        """How they ended: in time, and by an error of the library."""
        _, late = await asyncio.wait(tasks, timeout=SOON)
        assert not late, "an update hangs"
        errors = [asyncio.CancelledError() if task.cancelled() else task.exception() for task in tasks]
        for error in errors:
            assert error is None or isinstance(error, at.TransferError | asyncio.CancelledError), error
        return errors


@asynccontextmanager
async def stage(net: Fabric, mode: str, instances: str = "a", **options: Any) -> AsyncIterator[Stage]:
    async def open_engine(**options: Any) -> at.Engine:
        return await net.open_engine(config=CONFIG, timeout=SECONDS, **options)

    async with AsyncExitStack() as stack:
        party = Party(stack, open_engine)
        it = Stage(net, party, mode)
        await party.train(2, timeout=SECONDS, **options)
        for instance in instances:
            for rank, server in enumerate(await party.serve(instance, 2)):
                await server.subscriber.aclose()
                await it.serve(rank, instance)
        await party.publish(1)
        await it.next()  # the first in which every trainer rank has heard of every subscriber
        await it.settled()
        it.before = it.left()
        yield it


async def publish_of(stage: Stage, ranks: tuple[int, ...], strike: Strike, *, often: bool = False) -> None:
    tasks = stage.begin()

    def stop() -> None:
        if sum(tasks[rank].cancel() for rank in ranks) and often:
            stage.net.at_turn(0, stop)

    strike(stop)
    errors = await stage.ends(tasks)
    for rank, error in enumerate(errors):
        if rank in ranks and isinstance(error, asyncio.CancelledError):
            continue
        if error is not None:
            gone = [str(other) for other in ranks if isinstance(errors[other], asyncio.CancelledError)]
            assert isinstance(error, weights.UpdateError)
            assert any(re.search(rf"publisher (rank {other}|ranks \[{other}\])", str(error)) for other in gone), error
            assert "did not plan" not in str(error)  # of one that has left nothing is waited for


async def publish_on_rank_0(stage: Stage, strike: Strike) -> None:
    await publish_of(stage, (0,), strike)


async def publish_on_rank_1(stage: Stage, strike: Strike) -> None:
    await publish_of(stage, (1,), strike)


async def publish_on_both_ranks(stage: Stage, strike: Strike) -> None:
    await publish_of(stage, (0, 1), strike)


async def publish_cancelled_again_and_again(stage: Stage, strike: Strike) -> None:
    await publish_of(stage, (1,), strike, often=True)


async def readers(stage: Stage, strike: Strike) -> None:
    """`ready`, `reading` and iteration on both ranks: the update does not notice."""

    async def read(server: Server) -> None:
        while True:
            async with server.subscriber.reading() as version:
                assert server.holds() == version.number
                await asyncio.sleep(1e-5)
            await asyncio.sleep(1e-5)

    async def iterate(server: Server) -> None:
        async for version in server.subscriber:
            assert version is not None

    async def wait(server: Server) -> None:
        while True:
            await server.subscriber.ready()
            await asyncio.sleep(1e-5)

    waiting = [asyncio.ensure_future(work(server)) for work in (read, iterate, wait) for server in stage.servers]
    tasks = stage.begin()
    strike(lambda: [task.cancel() for task in waiting[::2]])
    assert await stage.ends(tasks) == [None, None]
    for task in waiting:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    for server in stage.servers:
        assert server.subscriber.gate.active == server.subscriber.gate.waiting == 0


async def closing(stage: Stage, role: Any, strike: Strike) -> list[BaseException | None]:
    """The update, while a role closes and the call that closes it is cancelled, at once and again."""
    tasks, closed = stage.begin(), list[asyncio.Task[None]]()
    is_over = False

    def stop() -> None:
        if is_over:
            return
        closed.append(asyncio.ensure_future(role.aclose()))
        closed[0].cancel()
        stage.net.at_turn(3, closed[0].cancel)

    strike(stop)
    errors = await stage.ends(tasks)
    is_over = True
    if closed:
        await asyncio.wait(closed, timeout=SOON)
        assert closed[0].done()
        await role.aclose()
    return errors


async def subscriber_closes(stage: Stage, strike: Strike) -> None:
    server = stage.servers[1]
    errors = await closing(stage, server.subscriber, strike)
    for error in errors:
        assert error is None or (isinstance(error, weights.UpdateError) and "a/1" in error.missing)
        assert error is None or "closed" in str(error)
    if server.subscriber._closing is not None:
        await stage.serve(1)
        await asyncio.sleep(0.001)  # until all have heard of that: a version that begins before still counts on the one that left
        await stage.next()


async def publisher_closes(stage: Stage, strike: Strike) -> None:
    trainer = stage.trainers[1]
    errors = await closing(stage, trainer.publisher, strike)
    assert errors[1] is None or isinstance(errors[1], at.ClosedError)
    if errors[0] is not None:
        assert isinstance(errors[0], weights.UpdateError)
        assert re.search(r"publisher (rank 1|ranks \[1\])", str(errors[0])), errors[0]
    if trainer.publisher._closing is not None:
        await stage.trainers[0].publisher.aclose()
        members = [str(one.engine.address) for one in stage.trainers]
        layout = trainer.publisher.layout
        for rank, one in enumerate(stage.trainers):
            one.memory = shard(layout, rank, values(0))
            group = one.engine.group(members)
            publisher = weights.Publisher(one.engine, layout.bind(rank, one.memory), group=group, timeout=SECONDS)
            one.publisher = await stage.party.stack.enter_async_context(publisher)


def everywhere(
    call: Callable[[Stage, Strike], Awaitable[object]],
    make: Callable[[Fabric], AbstractAsyncContextManager[Stage]],
    some: int = TURNS,
) -> None:
    """`call` runs with a strike at `some` turns, drawn by lot, or at all. Behind each all is settled; the next version comes."""
    seed = random.randrange(1 << 31)
    print(f"seed {seed}")

    async def run(net: Fabric) -> None:
        async with make(net) as it:
            begin = net.turns
            await call(it, lambda stop: None)
            turns = range(net.turns - begin + 1)
            await it.settled()
            for turn in turns if ALL else sorted(random.Random(seed).sample(turns, min(some, len(turns)))):
                try:
                    await call(it, lambda stop, turn=turn: net.at_turn(turn, stop))  # type: ignore[misc]
                    await it.settled()
                    await it.next()
                    await it.settled()
                except BaseException as error:
                    error.add_note(f"seed {seed}, turn {turn} of {len(turns)}, {'all' if ALL else some} turns")
                    raise

    fabric(seed=seed, delay=(1e-6, 2e-5)).run(run)


CALLS = (
    publish_on_rank_0, publish_on_rank_1, publish_on_both_ranks, publish_cancelled_again_and_again, readers, subscriber_closes,
    publisher_closes,
)  # fmt: skip


@pytest.mark.parametrize("mode", ["double", "in_place"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_call_is_cancelled_at_any_turn_of_an_update(call: Callable[[Stage, Strike], Awaitable[None]], mode: str) -> None:
    everywhere(call, lambda net: stage(net, mode))


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_who_leaves_while_the_version_begins_is_not_waited_for(ranks: tuple[int, ...]) -> None:
    begin = Leader.begin

    async def run(net: Fabric) -> None:
        async with stage(net, "double") as it:
            tasks = list[asyncio.Task[Any]]()

            def leave(leader: Leader) -> None:
                begin(leader)
                if leader.conduct is not None:  # it has begun, and no rank knows of that yet
                    for rank in ranks:
                        tasks[rank].cancel()

            began = net.now
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Leader, "begin", leave)
                tasks += it.begin()
                errors = await it.ends(tasks)
            assert net.now - began < 0.1
            for rank, error in enumerate(errors):
                if rank in ranks:
                    assert isinstance(error, asyncio.CancelledError)
                else:
                    assert isinstance(error, weights.UpdateError)
                    assert f"publisher rank {1 - rank} left before it heard that the version had begun" in str(error)
            await it.settled()
            await it.next()
            await it.settled()

    fabric(seed=1, delay=(1e-6, 2e-5)).run(run)


def test_a_session_that_is_given_up_while_it_takes_rights_back_takes_all_back() -> None:
    close = Filling.close

    async def run(net: Fabric) -> None:
        async with stage(net, "double") as it:
            subscriber, leases, loop = it.servers[0].subscriber, list[Any](), asyncio.get_running_loop()

            async def give_up(filling: Filling) -> None:
                if filling._context is subscriber.context and not leases:
                    leases.extend(filling.arrivals._leases)
                    (session,) = subscriber._sessions.values()
                    loop.call_soon(session.fail, "given up")  # when `close` has begun to wait, before anything is taken back
                await close(filling)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Filling, "close", give_up)
                errors = await it.ends(it.begin())
            for error in errors:
                assert isinstance(error, weights.UpdateError)
                assert "given up" in error.missing["a/0"]
            await it.settled()
            assert [lease.state for lease in leases] == ["revoked"] * 2
            await it.next()
            await it.settled()

    fabric(seed=1, delay=(1e-6, 2e-5)).run(run)


def test_what_is_lent_is_taken_back_after_a_wait_for_that_was_cancelled() -> None:
    async def run(net: Fabric) -> None:
        async with stage(net, "double") as it:
            subscriber, loop = it.servers[0].subscriber, asyncio.get_running_loop()
            peer, version = next(iter(subscriber.engine.peers)), subscriber.version
            assert version is not None
            fetch = wire.Fetch(1, "a", 0, subscriber.digest, version.epoch, version.number)
            subscriber.lending.fetch(peer, fetch)
            (lease,) = peer._leases
            assert isinstance(lease, at.Lease)
            taking = asyncio.ensure_future(subscriber.lending.revoke(subscriber.memory.active))
            loop.call_soon(taking.cancel)  # when it has begun to wait, before anything is taken back
            with pytest.raises(asyncio.CancelledError):
                await taking
            assert lease.state == "active"
            await subscriber.lending.revoke(subscriber.memory.active)
            assert lease.state == "revoked"
            await it.settled()

    fabric(seed=1).run(run)
