"""Losses, deadlines, late joiners and closing in the middle, on the simulator: old version or new, and nothing waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.testing.fabric import Fabric, fabric
from aiotransfer.weights import Layout, Piece, Tensor
from aiotransfer.weights.subscriber.filling import Filling
from tests.weights.party import Party, Server, failures

CONFIG = at.Config(peer_timeout=0.05, drain_timeout=0.01)
Scenario = Callable[[Party, Fabric], Awaitable[None]]


def play(scenario: Scenario, seed: int = 7) -> None:
    """Run it with a party on the simulator."""

    async def run(net: Fabric) -> None:
        async def open_engine(**options: Any) -> at.Engine:
            return await net.open_engine(config=CONFIG, **options)

        async with AsyncExitStack() as stack:
            await scenario(Party(stack, open_engine), net)

    fabric(seed=seed).run(run)


def holds(servers: list[Server]) -> list[int | None]:
    return [server.holds() for server in servers]


def versions(servers: list[Server]) -> list[Any]:
    return [server.subscriber.version for server in servers]


@pytest.mark.parametrize("lost", [0, 1])
def test_one_lost_rank_keeps_its_instance_at_the_old_version_and_others_go_on(lost: int) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2)
        a, b = await party.serve("a", 2), await party.serve("b", 2)
        await party.publish(1)
        publishing = asyncio.ensure_future(failures(party, 2))
        await asyncio.sleep(4e-4)
        net.kill(a[lost].engine)
        for error in await publishing:
            assert isinstance(error, weights.UpdateError)
            assert error.version == (1, 2)
            assert error.committed == ("b/0", "b/1")
            assert set(error.missing) == {"a/0", "a/1"}
            assert "2 of 4 ranks have version 1.2" in str(error)
        assert versions(b) == [(1, 2)] * 2
        assert holds(b) == [2, 2]
        other = a[1 - lost]
        assert other.subscriber.version == (1, 1)
        assert other.holds() == 1
        async with other.subscriber.reading() as version:
            assert version == (1, 1)

    play(scenario)


def test_a_stopped_rank_is_left_behind_at_the_deadline_by_name_and_the_next_version_reaches_it() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(1, timeout=1)
        (a,), (b,) = await party.serve("a", 1), await party.serve("b", 1)
        await party.publish(1)
        with net.held(a.engine):
            (error,) = await failures(party, 2)
        assert isinstance(error, weights.UpdateError)
        assert (error.committed, set(error.missing)) == (("b/0",), {"a/0"})
        assert b.holds() == 2
        assert a.subscriber.version == (1, 1)
        await party.trainers[0].engine.connect(a.engine.address)
        assert await party.publish(3) == (1, 3)
        assert (a.holds(), b.holds()) == (3, 3)

    play(scenario)


def test_a_lost_trainer_rank_abandons_the_version_for_all() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        trainers = await party.train(2, timeout=2)
        servers = await party.serve("a", 2)
        await party.publish(1)
        publishing = asyncio.ensure_future(trainers[0].publish(2))
        dying = asyncio.ensure_future(trainers[1].publish(2))
        await asyncio.sleep(4e-4)
        net.kill(trainers[1].engine)
        with pytest.raises(weights.UpdateError, match="publisher rank 1 was lost"):
            await publishing
        dying.cancel()
        await asyncio.wait([dying])
        await asyncio.sleep(0.2)
        assert versions(servers) == [(1, 1)] * 2
        assert holds(servers) == [1, 1]

    play(scenario)


@pytest.mark.parametrize("moment", [1e-4, 4e-4, 8e-4, 2e-3])
def test_the_loss_of_the_leading_trainer_leaves_all_ranks_with_one_version(moment: float) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        trainers = await party.train(2, timeout=1)
        servers = await party.serve("a", 4)
        for server in servers:
            await trainers[1].engine.connect(server.engine.address)
        await party.publish(1)
        publishing = [asyncio.ensure_future(trainer.publish(2)) for trainer in trainers]
        await asyncio.sleep(moment)
        net.kill(trainers[0].engine)
        results = await asyncio.gather(*publishing, return_exceptions=True)
        assert isinstance(results[1], weights.UpdateError) or results[1] == (1, 2)
        await asyncio.sleep(2)
        (one,) = set(versions(servers))
        assert one in ((1, 1), (1, 2))
        assert holds(servers) == [one.number] * 4
        await party.train(1, timeout=1)
        await party.trainers[0].engine.connect(servers[0].engine.address)
        for server in servers:
            await party.trainers[0].engine.connect(server.engine.address)
        assert await party.publish(1) == (2, 1)
        assert holds(servers) == [1] * 4

    play(scenario)


def test_a_late_instance_catches_up_from_another_and_disturbs_no_one() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2)
        a = await party.serve("a", 2)
        await party.publish(3)
        b = await party.serve("b", 2)
        assert b[0].subscriber.version is None
        for server in b:
            assert await server.subscriber.ready(timeout=5) == (1, 3)
        assert holds(b) == [3, 3]
        assert versions(a) == [(1, 3)] * 2
        assert await party.publish(4) == (1, 4)
        assert holds(a) == holds(b) == [4, 4]

    play(scenario)


def test_a_restarted_rank_is_not_ready_before_its_instance_is_whole_again() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(1, timeout=2)
        a = await party.serve("a", 2)
        await party.publish(1)
        await a[1].subscriber.aclose()
        await a[1].engine.aclose()
        engine = await party.stack.enter_async_context(await party.open_engine())
        await engine.connect(party.trainers[0].engine.address)
        layout = a[0].subscriber.layout
        again = await party.stack.enter_async_context(weights.Subscriber(engine, layout, instance="a", rank=1))
        with pytest.raises(at.TransferTimeout, match="no whole version"):
            await again.ready(timeout=0.2)
        assert again.version is None
        assert await party.publish(2) == (1, 2)
        assert await again.ready() == (1, 2)
        assert [a[0].holds(), Server(engine, again).holds()] == [2, 2]

    play(scenario)


def test_in_place_a_version_comes_between_two_fences_and_there_is_none_meanwhile() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(1, timeout=2)
        seen: list[Any] = []
        server: Server

        async def pause() -> None:
            seen.append(("pause", server.subscriber.version))
            await asyncio.sleep(0.01)

        def resume() -> None:
            seen.append(("resume", server.subscriber.version))

        (server,) = await party.serve("a", 1, mode="in_place", pause=pause, resume=resume)
        await party.publish(1)
        assert seen == [("pause", None), ("resume", (1, 1))]
        await party.publish(2)
        assert seen[2:] == [("pause", (1, 1)), ("resume", (1, 2))]
        assert server.holds() == 2

        async def fails() -> None:
            party.trainers[0].load(3)
            async with party.trainers[0].publisher.publish(3):
                await asyncio.sleep(0.02)
                assert server.subscriber.version is None
                raise ArithmeticError

        with pytest.raises(ArithmeticError):
            await fails()
        await asyncio.sleep(0.05)
        assert server.subscriber.version is None
        with pytest.raises(at.TransferTimeout):
            async with server.subscriber.reading(timeout=0.1):
                pass
        assert seen[4:] == [("pause", (1, 2))]
        await party.publish(4)
        assert seen[5:] == [("resume", (1, 4))]
        assert server.holds() == 4

    play(scenario)


@pytest.mark.parametrize("seconds", [0, 1e-4, 1e-3, 0.02])
def test_in_place_there_is_no_version_after_a_failure_until_one_comes_from_another_instance(seconds: float) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        (trainer,) = await party.train(1, timeout=2)
        hooks: list[str] = []
        in_place = {"mode": "in_place", "pause": lambda: hooks.append("pause"), "resume": lambda: hooks.append("resume")}
        servers = await party.serve("alone", 2, **in_place)  # type: ignore[arg-type]
        await party.publish(1)

        async def fails(number: int) -> None:
            trainer.load(number)
            async with trainer.publisher.publish(number):
                await asyncio.sleep(seconds)
                raise ArithmeticError

        hooks.clear()
        with pytest.raises(ArithmeticError):
            await fails(2)
        await asyncio.sleep(1)
        assert versions(servers) == [None, None]
        assert hooks == ["pause"] * 2
        await party.publish(3)
        assert holds(servers) == [3, 3]
        keeps = await party.serve("second buffer", 2)
        for server in keeps:
            await server.subscriber.ready(timeout=1)
        hooks.clear()
        with pytest.raises(ArithmeticError):
            await fails(4)
        for server in servers:  # the last version may come once more, and no other
            assert await server.subscriber.ready(timeout=1) == (1, 3)
        await asyncio.sleep(0.1)
        assert holds(servers) == holds(keeps) == [3, 3]
        assert hooks == ["pause"] * 2 + ["resume"] * 2
        await party.publish(4)
        assert holds(servers) == holds(keeps) == [4, 4]

    play(scenario)


@pytest.mark.parametrize("side", ["publisher", "subscriber"])
def test_closing_in_the_middle_ends_the_version_by_name_on_the_other_side(side: str) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        trainers = await party.train(2, timeout=2)
        servers = await party.serve("a", 2)
        await party.publish(1)
        publishing = asyncio.ensure_future(failures(party, 2))
        await asyncio.sleep(4e-4)
        await (trainers[1].publisher if side == "publisher" else servers[1].subscriber).aclose()
        errors = await publishing
        assert any(isinstance(error, weights.UpdateError) for error in errors)
        assert "closed" in " ".join(map(str, errors))
        await asyncio.sleep(0.1)
        assert versions(servers[:1]) == [(1, 1)]
        assert servers[0].holds() == 1

    play(scenario)


@pytest.mark.parametrize("how", ["cancelled", "closed", "lost"])
@pytest.mark.parametrize("who", [0, 1])
def test_a_trainer_rank_that_leaves_while_instances_change_ends_no_version(who: int, how: str) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        trainers = await party.train(2, timeout=2)
        a, b = await party.serve("a", 2), await party.serve("b", 2)
        await party.publish(1)
        async with a[1].subscriber.reading():  # "a" cannot change before this has ended
            tasks = [asyncio.ensure_future(trainer.publish(2)) for trainer in trainers]
            while versions(b) != [(1, 2)] * 2:
                await asyncio.sleep(1e-3)
            if how == "cancelled":
                tasks[who].cancel()
            elif how == "closed":
                await trainers[who].publisher.aclose()
            else:
                net.kill(trainers[who].engine)
            await asyncio.sleep(0.8)
            assert versions(a) == [(1, 1)] * 2
        (left,) = await asyncio.gather(tasks[1 - who], return_exceptions=True)
        if who == 1 or how == "cancelled":
            assert left == (1, 2), "all have it"
        else:
            assert isinstance(left, weights.UpdateError)
        if (who, how) == (0, "closed"):
            assert isinstance(left, weights.UpdateError)
            assert (left.committed, left.missing.keys()) == (("b/0", "b/1"), {"a/0", "a/1"})
            assert "2 of 4 ranks have version 1.2" in str(left)
        await asyncio.sleep(0.1)
        assert versions(a + b) == [(1, 2)] * 4
        assert holds(a + b) == [2] * 4
        tasks[who].cancel()
        await asyncio.gather(tasks[who], return_exceptions=True)
        if how == "cancelled":
            assert await party.publish(3) == (1, 3)
            assert holds(a + b) == [3] * 4

    play(scenario)


def test_a_version_that_is_abandoned_is_said_to_be_at_no_rank() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        trainers = await party.train(2, timeout=2)
        await party.serve("a", 2)

        async def fails() -> None:
            async with trainers[1].publisher.publish(1):
                raise ArithmeticError

        error, _ = await asyncio.gather(trainers[0].publish(1), fails(), return_exceptions=True)
        assert isinstance(error, weights.UpdateError)
        assert "; 0 of 2 ranks have version 1.1" in str(error)
        assert (error.committed, error.missing.keys()) == ((), {"a/0", "a/1"})

    play(scenario)


def test_publishing_may_be_cancelled_at_every_turn_and_the_next_version_comes() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        trainers = await party.train(2, timeout=2)
        servers = await party.serve("a", 2)
        await party.publish(1)
        number = 1
        for turns in range(0, 240, 12):
            number += 1
            tasks = [asyncio.ensure_future(trainer.publish(number)) for trainer in trainers]
            net.at_turn(turns, tasks[turns % 2].cancel)
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.05)
            assert len(set(versions(servers))) == 1
            assert holds(servers) == [versions(servers)[0].number] * 2
        number += 1
        assert await party.publish(number) == (1, number)
        assert holds(servers) == [number] * 2

    play(scenario)


def test_sources_that_do_not_rest_end_the_version() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        (trainer,) = await party.train(1, timeout=2, checksum=True)
        (server,) = await party.serve("a", 1)
        await party.publish(1)
        with pytest.raises(at.TransferError, match="norm was changed inside publish"):
            async with trainer.publisher.publish(2):
                trainer.memory["norm"][0] += 1
        await asyncio.sleep(0.05)
        assert server.subscriber.version == (1, 1)
        assert server.holds() == 1
        assert await party.publish(3) == (1, 3)
        assert server.holds() == 3

    play(scenario)


def test_bytes_that_are_not_those_that_were_sent_are_found_by_their_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2, checksum=True)
        servers = await party.serve("a", 2)
        await party.publish(1)
        damaged = memory_of(servers[1].subscriber.memory.shadow["norm"])
        whole = Filling.close

        async def close(self: Filling) -> None:
            await whole(self)
            if self._context.rank == 1:
                damaged[3] ^= 1

        monkeypatch.setattr(Filling, "close", close)
        for error in await failures(party, 2):
            assert isinstance(error, weights.UpdateError)
            assert "checksum" in error.missing["a/1"]
        monkeypatch.undo()
        assert versions(servers) == [(1, 1)] * 2
        assert holds(servers) == [1, 1]
        assert await party.publish(3) == (1, 3)

    play(scenario)


def test_what_a_rate_cannot_cut_is_waited_for_at_the_end() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        layout = Layout([Tensor("w", (1000,), "uint8")], [Piece("w", 0)], ranks=1)
        left, right = [await party.stack.enter_async_context(await party.open_engine()) for _ in range(2)]
        await right.connect(left.address)
        bound = layout.bind(0, {"w": np.ones(1000, np.uint8)})
        async with (
            weights.Publisher(left, bound, timeout=60, rate_limit=500.0) as publisher,
            weights.Subscriber(right, layout, instance="a"),
        ):
            began = net.now
            for number in (1, 2):
                async with publisher.publish(number):
                    pass
            assert 3.9 < net.now - began < 4.5
        async with (
            weights.Publisher(left, bound, timeout=4, rate_limit=10.0) as publisher,
            weights.Subscriber(right, layout, instance="b"),
        ):
            began = net.now
            async with publisher.publish(1):  # the deadline comes first
                pass
            assert net.now - began < 3

    play(scenario)


def test_a_rate_limit_is_kept() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(1, timeout=60, rate_limit=1000.0)
        (server,) = await party.serve("a", 1)
        nbytes = sum(server.subscriber.memory.sizes.values())
        began = net.now
        await party.publish(1)
        assert net.now - began >= nbytes / 1000.0 * 0.98
        assert net.now - began < 60
        assert np.isclose(server.holds() or 0, 1)

    play(scenario)


def test_without_any_subscriber_publishing_ends_at_its_deadline_by_name() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=0.3)
        began = net.now
        for error in await failures(party, 1):
            assert isinstance(error, weights.UpdateError)
            assert "no whole subscriber instance" in str(error)
        assert net.now - began < 1.5

    play(scenario)


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["double", "in_place"])
async def test_a_subscriber_that_is_closed_after_its_engine_holds_on_to_nothing(party: Party, mode: str) -> None:
    await party.train(1, timeout=20)
    (server,) = await party.serve("a", 1, mode=mode)
    await party.publish(1)
    assert server.subscriber.memory.sizes
    await server.engine.aclose()
    await server.subscriber.aclose()
    memory = server.subscriber.memory
    assert (memory.active, memory.shadow, memory._own, memory._views) == ({}, {}, {}, {}), "its mappings would stay with it"
