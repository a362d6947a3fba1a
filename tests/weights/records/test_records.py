"""Each rank has a record of each update that is over: how it ended, what was moved, and how long its stages took."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.testing.fabric import Fabric
from aiotransfer.weights import Layout, Piece, Quantise, Tensor, UpdateRecord
from aiotransfer.weights.records.record import PUBLISHED, RECEIVED, STAGES
from aiotransfer.weights.subscriber.relaying import Relaying
from tests.weights.party import Party, Server, failures
from tests.weights.test_conversions import push
from tests.weights.test_faults import play


def published(party: Party) -> list[UpdateRecord]:
    """The last record of each trainer rank."""
    return [trainer.publisher.records[-1] for trainer in party.trainers]


def received(servers: list[Server]) -> list[UpdateRecord]:
    return [server.subscriber.records[-1] for server in servers]


@pytest.mark.asyncio
async def test_all_ranks_record_one_update_with_its_bytes_and_stages(party: Party) -> None:
    await party.train(2, timeout=20)
    servers = await party.serve("a", 2)
    await party.publish(3)
    await asyncio.gather(*(server.subscriber.ready() for server in servers))
    ours, theirs = published(party), received(servers)
    assert {(r.outcome, r.version, r.update, r.present) for r in (*ours, *theirs)} == {
        ("committed", (1, 3), ours[0].update, (1, 3))
    }
    assert [(r.role, r.rank, r.instance) for r in (*ours, *theirs)] == [
        ("publisher", 0, ""), ("publisher", 1, ""), ("subscriber", 0, "a"), ("subscriber", 1, "a"),
    ]  # fmt: skip
    for record in (*ours, *theirs):
        assert tuple(record.steps) == tuple(record.stages) == tuple(s for s in STAGES[record.role] if s != "relay")
        assert record.nbytes == record.total > 0
        assert (record.error, record.left_behind, record.source, record.converted) == ("", (), "", 0)
    assert sum(r.nbytes for r in ours) == sum(r.nbytes for r in theirs)
    assert {r.subscribers for r in ours} == {2}


@pytest.mark.asyncio
async def test_the_host_is_given_each_record_and_what_it_raises_disturbs_nothing(
    party: Party, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[UpdateRecord] = []

    def take(record: UpdateRecord) -> None:
        seen.append(record)
        raise KeyError("of the host")

    await party.train(1, timeout=20, on_record=take)
    (server,) = await party.serve("a", 1, on_record=take)
    assert await party.publish(1) == (1, 1)
    assert await party.publish(2) == (1, 2)
    assert server.holds() == 2
    assert [r for r in seen if r.role == "publisher"] == list(party.trainers[0].publisher.records)
    assert [r for r in seen if r.role == "subscriber"] == list(server.subscriber.records)
    assert "of the host" in caplog.text


@pytest.mark.asyncio
async def test_an_update_that_is_given_up_is_recorded_with_the_reason(party: Party) -> None:
    trainers = await party.train(2, timeout=20)
    servers = await party.serve("a", 1)
    await party.publish(5)
    await failures(party, 4)
    for record in published(party):
        assert (record.outcome, record.present) == ("version", None)
        assert "not higher" in record.error

    async def fails() -> None:
        async with trainers[1].publisher.publish(6):
            raise ArithmeticError("loss is nan")

    await asyncio.gather(trainers[0].publish(6), fails(), return_exceptions=True)
    assert [record.outcome for record in published(party)] == ["failed", "failed"]
    assert all("loss is nan" in record.error for record in published(party))
    assert published(party)[0].version == (1, 6)
    await servers[0].subscriber.aclose()
    (record,) = received(servers)
    assert (record.outcome, record.version, record.present) == ("abandoned", (1, 6), (1, 5))
    assert "loss is nan" in record.error


@pytest.mark.asyncio
async def test_an_update_that_does_not_begin_has_no_version(party: Party) -> None:
    trainers = await party.train(2, timeout=20)
    publishing = asyncio.ensure_future(trainers[0].publish(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    publishing.cancel()
    await asyncio.wait([publishing])
    (record,) = trainers[0].publisher.records
    assert (record.outcome, record.version, record.update, record.stages) == ("cancelled", None, "", {})
    assert not trainers[1].publisher.records


@pytest.mark.asyncio
async def test_what_is_converted_and_gathered_is_counted_beside_the_staging_memory(party: Party) -> None:
    source = np.random.default_rng(3).normal(size=(40, 24)).astype(np.float32)
    pieces = [Piece("w", 0, (0, 0), (13, 24)), Piece("w", 1, (13, 0), (27, 24))]
    trainer = Layout([Tensor("w", (40, 24), "float32")], pieces, ranks=2)
    tensors = [Tensor("w", (40, 24), "float8_e4m3fn"), Tensor("w_scale", (5, 3), "float32")]
    inference = Layout(tensors, [Piece("w", 0), Piece("w_scale", 0)], ranks=1)
    seen: list[UpdateRecord] = []
    rules = [Quantise("w", "w_scale", block=(8, 8))]
    memory = [{"w": source[:13].copy()}, {"w": source[13:].copy()}]
    await push(party, trainer, memory, inference, rules=rules, staging_bytes=4096, on_record=seen.append)
    assert sum(record.converted for record in seen) == source.nbytes
    assert sum(record.nbytes for record in seen) == 40 * 24 + 4 * 5 * 3
    assert any(record.gathered for record in seen), "a block is cut by the edge of a shard"
    for record in seen:
        assert record.staging_peak <= record.staging <= 4096
        assert bool(record.converted) == ("convert" in record.stages) == bool(record.staging_peak)


def test_an_instance_without_the_version_is_left_behind_by_name() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=1)
        (a,), (b,) = await party.serve("a", 1), await party.serve("b", 1)
        await party.publish(1)
        with net.held(a.engine):
            await failures(party, 2)
        for record in published(party):
            assert (record.outcome, record.left_behind, record.present) == ("partial", ("a",), (1, 2))
            assert "a/0" in record.error
        assert received([b])[0].outcome == "committed"

    play(scenario)


def test_what_instances_pass_on_to_each_other_is_counted_where_it_is_sent() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(2, timeout=2, fanout="relay")
        servers = [server for name in "abc" for server in await party.serve(name, 2)]
        await party.publish(1)
        await asyncio.sleep(0.1)
        ours, theirs = published(party), received(servers)
        assert sum(r.total for r in theirs) == 3 * sum(r.nbytes for r in ours)
        assert sum(r.relayed for r in theirs) == 2 * sum(r.nbytes for r in ours)
        for record in ours:
            assert tuple(record.stages) == STAGES["publisher"]
            assert (record.nbytes, record.instead) == (record.total, 0)

    play(scenario)


def test_what_trainers_write_in_the_place_of_a_relay_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(1, timeout=2, fanout="relay")
        servers = [server for name in "ab" for server in await party.serve(name, 1)]

        async def post(*_: Any) -> Any:
            raise at.BrokenError("this relay passes nothing on")

        monkeypatch.setattr(Relaying, "_post", post)
        await party.publish(1)
        await asyncio.sleep(0.1)
        (ours,), theirs = published(party), received(servers)
        assert (ours.outcome, ours.instead, sum(r.relayed for r in theirs)) == ("committed", ours.total, 0)
        assert ours.nbytes == ours.total + ours.instead == sum(r.nbytes for r in theirs)

    play(scenario)


def test_a_lost_trainer_is_a_lost_update_on_both_sides() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        trainers = await party.train(2, timeout=2)
        servers = await party.serve("a", 1)
        await party.publish(1)
        publishing = asyncio.ensure_future(trainers[1].publish(2))
        dying = asyncio.ensure_future(trainers[0].publish(2))
        while not servers[0].subscriber._sessions:
            await asyncio.sleep(1e-5)
        net.kill(trainers[0].engine)
        await asyncio.wait([publishing])
        dying.cancel()
        await asyncio.wait([dying])
        await asyncio.sleep(0.2)
        assert trainers[1].publisher.records[-1].outcome == "lost"
        (record,) = received(servers)
        assert (record.version, record.outcome, record.present) == ((1, 2), "lost", (1, 1))

    play(scenario)


def test_a_subscriber_that_catches_up_records_where_it_read() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(1, timeout=2)
        (a,) = await party.serve("a", 1)
        await party.publish(3)
        (b,) = await party.serve("b", 1)
        await b.subscriber.ready(timeout=5)
        await asyncio.sleep(0.1)
        (record,) = b.subscriber.records
        assert (record.outcome, record.version, record.source) == ("committed", (1, 3), str(a.engine.address))
        assert record.nbytes == record.total == b.subscriber.memory.nbytes_of(())

    play(scenario)


def test_a_pause_and_the_readings_that_it_held_up_are_measured() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        await party.train(1, timeout=5)
        (server,) = await party.serve("a", 1)
        subscriber = server.subscriber

        async def read(seconds: float) -> Any:
            async with subscriber.reading() as version:
                await asyncio.sleep(seconds)
                return version

        reading = asyncio.ensure_future(read(0.15))  # waits for the first version: that is no pause
        await asyncio.sleep(0.05)
        await party.publish(1)
        publishing = asyncio.ensure_future(party.publish(2))
        await asyncio.sleep(0.1)
        second_reading = asyncio.ensure_future(read(0))
        assert await reading == (1, 1)
        assert await second_reading == await publishing == (1, 2)
        await asyncio.sleep(0.01)
        first, second = subscriber.records
        assert (first.pause, first.waits) == (0.0, ())
        (waited,) = second.waits
        assert 0.02 < waited < second.pause < 0.2

    play(scenario)


def test_in_place_the_pause_is_that_of_the_host() -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        async def pause() -> None:
            await asyncio.sleep(0.3)

        async def resume() -> None:
            await asyncio.sleep(0.2)

        await party.train(1, timeout=5)
        (server,) = await party.serve("a", 1, mode="in_place", pause=pause, resume=resume)
        await party.publish(1)
        await asyncio.sleep(1)
        (record,) = received([server])
        assert 0.5 <= record.pause < 0.6

    play(scenario)


def test_every_outcome_that_a_record_has_is_listed() -> None:
    """Each way of ending an update on the simulator; `scripts` cancels and closes at many points."""

    async def scenario(party: Party, net: Fabric) -> None:
        trainers = await party.train(2, timeout=0.4)
        servers = await party.serve("a", 2)
        await party.publish(1)
        for number, turns in enumerate(range(0, 200, 20), 2):
            tasks = [asyncio.ensure_future(trainer.publish(number)) for trainer in trainers]
            net.at_turn(turns, tasks[0].cancel)
            await asyncio.gather(*tasks, return_exceptions=True)
        publishing = asyncio.ensure_future(failures(party, 50))
        await asyncio.sleep(4e-4)
        await servers[1].subscriber.aclose()
        await publishing
        await trainers[0].publisher.aclose()
        with pytest.raises(at.ClosedError):
            await trainers[0].publish(51)
        records = [*trainers[0].publisher.records, *trainers[1].publisher.records]
        assert {"committed", "cancelled"} <= {record.outcome for record in records} <= set(PUBLISHED)
        records = [record for server in servers for record in server.subscriber.records]
        assert {"committed", "closed"} <= {record.outcome for record in records} <= set(RECEIVED)
        for record in records:
            assert record.finished >= record.began
            assert (record.outcome == "committed") == (not record.error)

    play(scenario)


@pytest.mark.asyncio
async def test_what_cannot_be_called_is_refused_at_once(party: Party) -> None:
    engine = await party.stack.enter_async_context(await party.open_engine())
    layout = Layout([Tensor("w", (8,), "float32")], [Piece("w", 0)], ranks=1)
    for wrong in ({"on_record": "a file"}, {"progress": "yes"}, {"progress": asyncio.sleep}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            weights.Subscriber(engine, layout, instance="a", **wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=next(iter(wrong))):
            weights.Publisher(engine, layout.bind(0, {"w": np.zeros(8, np.float32)}), **wrong)  # type: ignore[arg-type]
