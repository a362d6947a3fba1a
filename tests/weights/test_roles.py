"""Publishers and subscribers: versions come whole, and only rise."""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.weights import Bound, Layout, Piece, Tensor
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.publisher.update import Update
from aiotransfer.weights.roles.watch import Watch
from tests.weights.party import Party, failures, inference_layout, shard, trainer_layout, values

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize(("trainers", "servers"), [(1, 1), (2, 2), (3, 1), (2, 4)])
async def test_every_rank_has_its_part_of_every_version(party: Party, trainers: int, servers: int) -> None:
    await party.train(trainers, timeout=20)
    ranks = await party.serve("a", servers)
    for number in (1, 2, 7):
        version = await party.publish(number)
        assert version == (1, number)
        for rank in ranks:
            assert await rank.subscriber.ready() == version
            assert rank.subscriber.version == version
            assert rank.holds() == number


async def test_a_trainer_rank_that_sends_nothing_takes_part(party: Party) -> None:
    tensors = [Tensor("w", (1, 4), "float32")]
    trainer = Layout(tensors, [Piece("w", 1)], ranks=3)
    engines = [await party.stack.enter_async_context(await party.open_engine()) for _ in range(4)]
    members = [str(engine.address) for engine in engines[:3]]
    source = np.arange(4, dtype=np.float32).reshape(1, 4)
    memory: list[dict[str, Any]] = [{}, {"w": source}, {}]
    publishers = []
    for rank, engine in enumerate(engines[:3]):
        publisher = weights.Publisher(engine, trainer.bind(rank, memory[rank]), group=engine.group(members))
        publishers.append(await party.stack.enter_async_context(publisher))
    await engines[3].connect(engines[0].address)
    layout = Layout(tensors, [Piece("w", 0)], ranks=1)
    subscriber = await party.stack.enter_async_context(weights.Subscriber(engines[3], layout, instance="a"))

    async def publish(publisher: weights.Publisher) -> None:
        async with publisher.publish(1):
            pass

    await asyncio.gather(*map(publish, publishers))
    np.testing.assert_array_equal(subscriber.tensors["w"], source)


async def test_a_model_without_a_byte_is_published(party: Party) -> None:
    left = await party.stack.enter_async_context(await party.open_engine())
    right = await party.stack.enter_async_context(await party.open_engine())
    await right.connect(left.address)
    nothing = weights.layout_of({"none": np.zeros((0, 3), np.float32)})
    async with weights.Publisher(left, nothing) as publisher, weights.Subscriber(right, nothing, instance="a") as subscriber:
        async with publisher.publish(1):
            pass
        assert subscriber.version == (1, 1)
        assert subscriber.tensors["none"].shape == (0, 3)


async def test_a_publisher_without_a_deadline_publishes(party: Party) -> None:
    await party.train(2, timeout=math.inf)
    (server,) = await party.serve("a", 1)
    assert await party.publish(1) == (1, 1)
    assert await server.subscriber.ready(timeout=math.inf) == (1, 1)


async def test_a_task_that_reads_may_read_again_while_the_next_version_waits_for_its_end(party: Party) -> None:
    await party.train(1, timeout=20)
    (server,) = await party.serve("a", 1)
    await party.publish(1)
    subscriber = server.subscriber
    async with subscriber.reading() as version:
        publishing = asyncio.ensure_future(party.publish(2))
        while subscriber.gate.is_open:
            await asyncio.sleep(0.001)
        async with subscriber.reading() as again:
            assert again == version == (1, 1)
        assert subscriber.gate.active == 1
        assert server.holds() == 1
    assert await publishing == (1, 2)
    assert subscriber.gate.active == 0


@pytest.mark.parametrize("who", ["trainer", "server"])
async def test_whoever_waits_when_the_engine_closes_is_told(party: Party, who: str) -> None:
    (trainer,) = await party.train(1, timeout=30)
    (server,) = await party.serve("a", 1, connect=False)
    subscriber = server.subscriber

    async def read() -> None:
        async with subscriber.reading(timeout=30):
            pass

    async def all_of() -> list[weights.Version]:
        return [version async for version in subscriber]

    tasks = [asyncio.ensure_future(trainer.publish(1))]
    if who == "server":
        tasks = [asyncio.ensure_future(each) for each in (subscriber.ready(timeout=30), read(), all_of())]  # type: ignore[misc]
    await asyncio.sleep(0.02)  # they begin to wait; what has not begun yet ends as well
    await (trainer if who == "trainer" else server).engine.aclose()
    _, waiting = await asyncio.wait(tasks, timeout=20)
    assert not waiting
    if who == "server":
        assert tasks.pop().result() == []
        with pytest.raises(at.ClosedError):
            subscriber._check()
    for task in tasks:
        assert isinstance(task.exception(), at.ClosedError | weights.UpdateError)


async def test_a_tied_name_is_sent_once_and_seen_under_both(party: Party) -> None:
    await party.train(1, timeout=20)
    (server,) = await party.serve("a", 1)
    await party.publish(1)
    tensors = server.subscriber.tensors
    assert tensors["head"] is tensors["embed"]
    assert np.array_equal(tensors["head"], values(1)["embed"])


async def test_publishing_waits_for_a_subscriber_that_comes_and_a_subscriber_for_a_publisher(party: Party) -> None:
    await party.train(2, timeout=20)
    publishing = asyncio.ensure_future(party.publish(1))
    await asyncio.sleep(0.02)  # it begins to wait; it comes to the same when it has not
    (server,) = await party.serve("a", 1)
    assert await publishing == (1, 1)
    assert await server.subscriber.ready() == (1, 1)


async def test_subscribers_may_be_known_to_any_trainer_rank(party: Party) -> None:
    trainers = await party.train(2, timeout=20)
    servers = await party.serve("a", 2, connect=False)
    for server in servers:
        await trainers[1].engine.connect(server.engine.address)
    await party.publish(1)
    assert [server.holds() for server in servers] == [1, 1]


async def test_numbers_may_leave_gaps_and_never_fall(party: Party) -> None:
    await party.train(2, timeout=20)
    (server,) = await party.serve("a", 1)
    await party.publish(5)
    for number in (5, 4):
        for error in await failures(party, number):
            assert isinstance(error, weights.VersionError)
            assert (error.version, error.current) == ((1, number), (1, 5))
    await party.publish(50)
    assert server.subscriber.version == (1, 50)
    assert server.holds() == 50


async def test_the_lower_of_two_numbers_is_refused_and_the_higher_one_waits_for_its_rank(party: Party) -> None:
    trainers = await party.train(2, timeout=20)
    await party.serve("a", 1)
    high = asyncio.ensure_future(trainers[0].publish(6))
    with pytest.raises(weights.VersionError, match="number 5, another rank 6"):
        await trainers[1].publish(5)
    assert await trainers[1].publish(6) == await high == (1, 6)


async def test_a_restarted_trainer_takes_the_next_epoch_and_may_begin_lower(party: Party) -> None:
    await party.train(1, timeout=20)
    (server,) = await party.serve("a", 1)
    await party.publish(57)
    old = party.trainers[0]
    await party.train(2, timeout=20)
    await party.trainers[1].engine.connect(server.engine.address)
    assert await party.publish(1) == (2, 1)
    assert server.subscriber.version == (2, 1)
    assert server.holds() == 1
    with pytest.raises(weights.VersionError, match="epoch") as caught:
        await old.publish(58)
    assert (caught.value.version, caught.value.current) == ((1, 58), (2, 1))
    assert server.holds() == 1


async def test_two_trainers_cannot_claim_one_epoch(party: Party) -> None:
    await party.train(1, timeout=20, epoch=4)
    (server,) = await party.serve("a", 1)
    await party.publish(1)
    await party.train(1, timeout=20, epoch=4)
    await party.trainers[0].engine.connect(server.engine.address)
    (error,) = await failures(party, 2)
    assert isinstance(error, weights.VersionError)
    assert error.current == (4, 1)
    assert "subscriber a/0 knows 4.1 of other trainers, and epoch 4 is theirs" in str(error)
    assert server.holds() == 1


async def test_an_exception_inside_publish_abandons_the_version_everywhere(party: Party) -> None:
    trainers = await party.train(2, timeout=20)
    servers = await party.serve("a", 2)
    await party.publish(1)

    async def fails() -> None:
        async with trainers[1].publisher.publish(2):
            raise ArithmeticError("loss is nan")

    results = await asyncio.gather(trainers[0].publish(2), fails(), return_exceptions=True)
    assert isinstance(results[0], weights.UpdateError)
    assert "loss is nan" in str(results[0])
    assert isinstance(results[1], ArithmeticError)
    assert [server.subscriber.version for server in servers] == [(1, 1)] * 2
    assert [server.holds() for server in servers] == [1, 1]
    assert await party.publish(2) == (1, 2)
    assert [server.holds() for server in servers] == [2, 2]


async def test_readers_hold_a_version_until_their_block_ends(party: Party) -> None:
    await party.train(1, timeout=20)
    servers = await party.serve("a", 2)
    await party.publish(1)
    async with servers[0].subscriber.reading() as version:
        publishing = asyncio.ensure_future(party.publish(2))
        await asyncio.sleep(0.1)  # time in which it could go wrong: a slow machine sees less, and nothing that is not so
        assert version == servers[0].subscriber.version == servers[1].subscriber.version == (1, 1)
        assert servers[0].holds() == 1
        assert not publishing.done()
        async with servers[1].subscriber.reading() as other:  # a rank of the same step begins later
            assert other == (1, 1)
            assert servers[1].holds() == 1
    assert await publishing == (1, 2)
    async with servers[1].subscriber.reading() as version:
        assert version == (1, 2)
        assert servers[1].holds() == 2


async def test_all_versions_are_told_in_order_and_the_iteration_ends_with_the_subscriber(party: Party) -> None:
    await party.train(1, timeout=20)
    (server,) = await party.serve("a", 1)
    seen = []

    async def follow() -> None:
        async for version in server.subscriber:
            seen.append(version.number)

    following = asyncio.ensure_future(follow())
    for number in (1, 2, 3):
        await party.publish(number)
        await asyncio.sleep(0)
    await server.subscriber.aclose()
    await following
    assert seen == [1, 2, 3]
    with pytest.raises(at.ClosedError):
        await server.subscriber.ready()


async def test_a_subscriber_of_another_model_is_refused_and_the_others_have_the_version(party: Party) -> None:
    await party.train(2, timeout=20)
    (server,) = await party.serve("a", 1)
    other = Layout([Tensor("strange", (4,), "float32")], [Piece("strange", 0)], ranks=1)
    (stranger,) = await party.serve("b", 1, layout=other)
    for error in await failures(party, 1):
        assert isinstance(error, weights.UpdateError)
        assert error.version == (1, 1)
        assert error.committed == ("a/0",)
        assert set(error.missing) == {"b/0"}
        assert "strange" in error.missing["b/0"]
    assert server.holds() == 1
    with pytest.raises(weights.PlanError, match="strange") as caught:
        await stranger.subscriber.ready()
    assert caught.value.problems


async def test_when_nothing_fits_nothing_is_published(party: Party) -> None:
    await party.train(2, timeout=20)
    other = Layout([Tensor("strange", (4,), "float32")], [Piece("strange", 0)], ranks=1)
    await party.serve("b", 1, layout=other)
    for error in await failures(party, 1):
        assert isinstance(error, weights.PlanError)
        assert any("strange" in problem for problem in error.problems)


async def test_arguments_of_wrong_types_are_refused_with_their_value(party: Party) -> None:
    engine = await party.stack.enter_async_context(await party.open_engine())
    bound = Bound(trainer_layout(1), 0, shard(trainer_layout(1), 0, values(0)))
    for name, wrong in (
        ("checksum", "yes"), ("checksum", None), ("rate_limit", "fast"), ("rate_limit", True), ("staging_bytes", 1.5),
        ("group", "x"), ("rules", "x"), ("rules", [3]), ("names", 3), ("names", [None]), ("epoch", "1"), ("timeout", "1"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=re.escape(repr(wrong[0] if isinstance(wrong, list) else wrong))):
            weights.Publisher(engine, bound, **{name: wrong})  # type: ignore[arg-type]
    for name, wrong in (("instance", 3), ("rank", "0"), ("rank", True), ("pause", 3), ("timeout", "1")):
        with pytest.raises(TypeError, match=repr(wrong)):
            weights.Subscriber(engine, inference_layout(1), **{"instance": "a", name: wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="UTF-8"):
        weights.Subscriber(engine, inference_layout(1), instance="a\ud800")
    for nothing in (None, 3, "x"):
        with pytest.raises(TypeError, match=f"not {nothing!r}"):
            weights.Publisher(nothing, bound)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"not {nothing!r}"):
            weights.Subscriber(nothing, inference_layout(1), instance="a")  # type: ignore[arg-type]
    assert not engine._regions
    async with weights.Publisher(engine, bound, names="{any}", rules=[], rate_limit=np.float32(1e9)) as publisher:
        assert publisher.works._names == ("{any}",)


async def test_the_roles_refuse_what_cannot_be_at_once(party: Party) -> None:
    engine = await party.stack.enter_async_context(await party.open_engine())
    layout, memory = trainer_layout(1), shard(trainer_layout(1), 0, values(0))
    for wrong, text in (
        ({"rate_limit": 0}, "rate_limit"),
        ({"staging_bytes": 0}, "staging_bytes"),
        ({"epoch": 0}, "epoch"),
        ({"fanout": "broadcast"}, "fanout"),
    ):
        with pytest.raises(ValueError, match=text):
            weights.Publisher(engine, Bound(layout, 0, memory), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 ranks"):
        weights.Publisher(engine, Bound(trainer_layout(2), 0, shard(trainer_layout(2), 0, values(0))))
    with pytest.raises(ValueError, match="mode"):
        weights.Subscriber(engine, inference_layout(1), mode="sideways")
    with pytest.raises(ValueError, match="needs a name"):
        weights.Subscriber(engine, inference_layout(2))
    async with weights.Publisher(engine, Bound(layout, 0, memory)) as publisher:
        with pytest.raises(at.ConfigurationError, match="already"):
            weights.Publisher(engine, Bound(layout, 0, memory))
        for number, kind in ((-1, ValueError), ("1", TypeError), (True, TypeError)):
            with pytest.raises(kind, match="number"):
                publisher.publish(number)  # type: ignore[arg-type]
    with pytest.raises(at.ClosedError):
        async with publisher.publish(1):
            pass


async def test_experts_that_moved_are_written_where_they_are_now_with_every_replica(party: Party) -> None:
    tensors = [Tensor(f"expert.{e}", (2, 3), "float32") for e in range(3)]
    trainer = Layout(tensors, [Piece(f"expert.{e}", 0) for e in range(3)], ranks=1)
    memory = {f"expert.{e}": np.full((2, 3), e, np.float32) for e in range(3)}
    left = await party.stack.enter_async_context(await party.open_engine())
    publisher = await party.stack.enter_async_context(weights.Publisher(left, trainer.bind(0, memory), timeout=20))
    right = await party.stack.enter_async_context(await party.open_engine())
    await right.connect(left.address)
    for number, slots in enumerate(((0, 1, 2, 0), (2, 2, 0, 1)), 1):
        inference = Layout(
            tensors, [Piece(f"expert.{e}", 0, buffer="slots", offset=24 * s) for s, e in enumerate(slots)], ranks=1
        )
        stack = np.zeros((4, 2, 3), np.float32)
        bound = inference.bind(0, {"slots": stack})
        async with weights.Subscriber(right, bound, instance="a", mode="in_place") as subscriber:
            for array in memory.values():
                array += 10
            async with publisher.publish(number):
                pass
            assert subscriber.version == (1, number)
            assert [stack[s, 0, 0] - 10 * number for s in range(4)] == list(slots)


async def test_a_part_of_the_names_is_a_version_and_the_others_stay(party: Party) -> None:
    tensors = [Tensor("base", (4,), "float32"), Tensor("lora", (2,), "float32")]
    layout = Layout(tensors, [Piece("base", 0), Piece("lora", 0)], ranks=1)
    memory = {"base": np.ones(4, np.float32), "lora": np.ones(2, np.float32)}
    right = await party.stack.enter_async_context(await party.open_engine())
    subscriber = await party.stack.enter_async_context(weights.Subscriber(right, layout, instance="a"))

    async def push(number: int, names: list[str] | None) -> None:
        async with await party.open_engine() as left:
            await right.connect(left.address)
            async with weights.Publisher(left, layout.bind(0, memory), timeout=20, names=names) as publisher:
                async with publisher.publish(number):
                    pass

    with pytest.raises(weights.UpdateError, match="no whole version here"):
        await push(1, ["lora"])
    await push(1, None)
    for array in memory.values():
        array += 1
    await push(2, ["lora"])
    assert subscriber.tensors["lora"].tolist() == [2, 2]
    assert subscriber.tensors["base"].tolist() == [1, 1, 1, 1]


async def test_an_outcome_that_was_heard_stands_when_rank_0_leaves_at_once(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its goodbye may have come with the outcome: both are heard before the waiting rank runs again."""
    await party.train(2, timeout=20)
    (server,) = await party.serve("a", 1)
    losses: list[Any] = []
    watch, hear = Watch.add, Update.hear

    def add(self: Watch, peer: at.Peer, lost: Any) -> None:
        losses.append((peer, lost))
        watch(self, peer, lost)

    def heard(self: Update, message: Any) -> None:
        hear(self, message)
        if isinstance(message, wire.Outcome) and self.leader is not None:
            for lost in [lost for peer, lost in losses if peer is self.leader]:
                lost(self.leader, at.PeerLostError("it said goodbye"))
                told.append(self._context.rank)

    told: list[int] = []
    monkeypatch.setattr(Watch, "add", add)
    monkeypatch.setattr(Update, "hear", heard)
    assert await party.publish(1) == (1, 1)
    assert told == [1]
    assert server.holds() == 1
    losses.clear()
