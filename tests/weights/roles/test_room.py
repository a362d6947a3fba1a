"""Every plan passes with every legal configuration: what an engine may have queued for a peer cuts calls, writes and reads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.errors import BusyError, RegionError, ScatterError
from aiotransfer.testing.fabric import Fabric, fabric
from aiotransfer.weights import Bound, Cast, Layout, Piece, Quantise, Tensor
from aiotransfer.weights.roles import posting
from aiotransfer.weights.roles.posting import without_room
from aiotransfer.weights.roles.reads import Step, copy, cut, run, steps
from tests.weights.party import Party, Server

QUEUES = {
    "a byte and an operation": at.Config(max_queued_bytes=1, max_queued_operations=1, early_values=1, message_window_count=1),
    "less than a row": at.Config(max_queued_bytes=9),
    "two writes": at.Config(max_queued_operations=2),
    "three writes and 40 bytes": at.Config(max_queued_bytes=40, max_queued_operations=3),
}
Scenario = Callable[[Party], Awaitable[Any]]


def play(scenario: Scenario, config: at.Config, latest: float = 1e-4) -> None:
    """Run it on the simulator, which queues every write and read that is longer than nothing. `latest`: seconds until the last
    of them is delivered, in any order."""

    async def run_(net: Fabric) -> None:
        async def open_engine(**options: Any) -> at.Engine:
            return await net.open_engine(config=config, timeout=20, **options)

        async with AsyncExitStack() as stack:
            await scenario(Party(stack, open_engine))

    fabric(seed=3, delay=(1e-6, latest)).run(run_)


def check(servers: list[Server], number: int) -> None:
    for server in servers:
        assert server.subscriber.version == (1, number)
        assert server.holds() == number


@pytest.mark.parametrize("config", QUEUES.values(), ids=QUEUES)
@pytest.mark.parametrize("fanout", ["direct", "relay"])
def test_versions_come_whatever_may_be_queued(config: at.Config, fanout: str) -> None:
    async def scenario(party: Party) -> None:
        await party.train(2, timeout=20, fanout=fanout, checksum=True)
        servers = [*await party.serve("a", 2), *await party.serve("b", 1, mode="in_place")]
        for number in (1, 2):
            await party.publish(number)
            check(servers, number)

    play(scenario, config)


@pytest.mark.parametrize("fanout", ["direct", "relay"])
def test_a_write_in_pieces_is_counted_when_all_of_them_have_landed(fanout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece may arrive long after the next one."""
    pieces: dict[tuple[int, int], list[at.Transfer]] = {}
    whole = posting.Piece.post
    counted = 0

    def post(self: posting.Piece, regions: Any, *, imm: int | None, timeout: float) -> at.Transfer:
        nonlocal counted
        transfer = whole(self, regions, imm=imm, timeout=timeout)
        others = pieces.setdefault((id(regions), int(self._rows[0])), [])
        if imm is not None:
            assert others
            assert all(piece.done() for piece in others)
            others.clear()
            counted += 1
        else:
            others.append(transfer)
        return transfer

    monkeypatch.setattr(posting.Piece, "post", post)

    async def scenario(party: Party) -> None:
        await party.train(2, timeout=20, fanout=fanout, checksum=True)
        servers = [*await party.serve("a", 2), *await party.serve("b", 2), *await party.serve("c", 2)]
        for number in (1, 2, 3):
            await party.publish(number)
            check(servers, number)

    play(scenario, at.Config(max_queued_bytes=30), latest=0.01)
    assert counted


@pytest.mark.parametrize("config", QUEUES.values(), ids=QUEUES)
def test_one_that_is_late_reads_from_a_peer_whatever_may_be_queued(config: at.Config) -> None:
    async def scenario(party: Party) -> None:
        await party.train(1, timeout=20)
        first = await party.serve("a", 1)
        await party.publish(1)
        late = await party.serve("b", 1)
        await late[0].subscriber.ready(timeout=20)
        check([*first, *late], 1)

    play(scenario, config)


@pytest.mark.parametrize("config", QUEUES.values(), ids=QUEUES)
def test_what_is_gathered_from_other_ranks_and_made_on_the_way_passes(config: at.Config) -> None:
    """Blocks of 2 x 2 that the edge between the two trainers cuts, and a matrix as another type."""
    source = {"q": np.arange(30, dtype=np.float32).reshape(5, 6), "c": np.arange(30, dtype=np.float32).reshape(5, 6)}
    tensors = [Tensor(name, (5, 6), "float32") for name in source]
    pieces = [Piece(name, r, (3 * r, 0), (3 - r, 6)) for name in source for r in range(2)]
    trainer = Layout(tensors, pieces, ranks=2)
    targets = [Tensor("q", (5, 6), "float8_e4m3fn"), Tensor("s", (3, 3), "float32"), Tensor("c", (5, 6), "float16")]
    inference = Layout(targets, [Piece(tensor.name, 0) for tensor in targets], ranks=1)
    rules = (Quantise("q", "s", (2, 2)), Cast("c"))

    async def scenario(party: Party) -> None:
        engines = [await party.stack.enter_async_context(await party.open_engine()) for _ in range(2)]
        members = [str(engine.address) for engine in engines]
        publishers = []
        for rank, engine in enumerate(engines):
            held = {name: np.ascontiguousarray(array[3 * rank :][: 3 - rank]) for name, array in source.items()}
            memory = {trainer.buffer_names[b]: held[trainer.buffer_names[b]] for b in np.flatnonzero(trainer.buffer_rank == rank)}
            publisher = weights.Publisher(
                engine, Bound(trainer, rank, memory), group=engine.group(members), rules=rules, staging_bytes=128, timeout=20
            )
            publishers.append(await party.stack.enter_async_context(publisher))
        reader = await party.stack.enter_async_context(await party.open_engine())
        await reader.connect(engines[0].address)
        subscriber = await party.stack.enter_async_context(weights.Subscriber(reader, inference, instance="a"))

        async def publish(publisher: weights.Publisher) -> None:
            async with publisher.publish(1):
                pass

        await asyncio.gather(*map(publish, publishers))
        np.testing.assert_array_equal(subscriber.tensors["c"], source["c"].astype(np.float16))
        scales = subscriber.tensors["s"]
        blocks = [[source["q"][2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max() / np.float32(448) for j in range(3)] for i in range(3)]
        np.testing.assert_array_equal(scales, np.array(blocks, np.float32))

    play(scenario, config)


def test_what_others_of_the_engine_have_queued_is_waited_for() -> None:
    """A user's own writes to the same peer fill most of the queue all the while."""

    async def scenario(party: Party) -> None:
        (trainer,) = await party.train(1, timeout=20)
        (server,) = await party.serve("a", 1)
        engine, other = trainer.engine, server.engine
        await engine.connect(other.address, reuse=True)
        source, target = engine.allocate(64), other.allocate(64)
        writing = True

        async def write() -> None:
            while writing:
                try:
                    await engine.write(source, target.descriptor)
                except at.BusyError:
                    await asyncio.sleep(1e-5)

        writers = [asyncio.ensure_future(write()) for _ in range(3)]
        for number in (1, 2, 3):
            await party.publish(number)
            check([server], number)
        writing = False
        await asyncio.gather(*writers)

    play(scenario, at.Config(max_queued_operations=4))


@pytest.mark.asyncio
async def test_rows_that_are_longer_than_the_queue_pass_on_shared_memory() -> None:
    """Everything is queued there: a copy inside the call has at most one byte."""
    config = at.Config(max_queued_bytes=100, max_queued_operations=3, inline_bytes=1)

    async def open_engine(**options: Any) -> at.Engine:
        return at.open_engine(providers="shm", config=config, timeout=20, **options)  # type: ignore[return-value]

    async with AsyncExitStack() as stack:
        party = Party(stack, open_engine)
        await party.train(2, timeout=20)
        servers = await party.serve("a", 1)
        for number in (1, 2):
            await party.publish(number)
            check(servers, number)


def test_without_room_are_only_targets_that_nothing_else_is_wrong_with() -> None:
    assert without_room(BusyError("full")) == [0]
    assert without_room(ScatterError("some", results=[None, BusyError("full"), None, BusyError("full")])) == [1, 3]
    assert without_room(ScatterError("some", results=[None, BusyError("full"), RegionError("bad")])) == []
    assert without_room(RegionError("bad")) == []


rows = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(0, 9)), max_size=40)


@given(rows, st.integers(1, 12))
def test_steps_are_the_rows_in_their_order_and_cuts_are_the_steps(given_: list[tuple[int, int, int]], most: int) -> None:
    source, target, found = [], [], []
    here = there = 0
    for nbytes, gap, other in given_:
        source.append(here)
        target.append(there)
        here, there = here + nbytes + gap, there + nbytes + other
    sizes = [nbytes for nbytes, _, _ in given_]
    parts = list(steps(np.array(source, np.int64), np.array(target, np.int64), np.array(sizes, np.int64)))
    for step in parts:
        assert step.rows == 1 or min(step.source_step, step.target_step) >= step.nbytes
        found += [(step.source + k * step.source_step, step.target + k * step.target_step, step.nbytes) for k in range(step.rows)]
    assert found == [row for row in zip(source, target, sizes, strict=True) if row[2]]
    data = np.random.default_rng(1).integers(0, 255, here + 1, np.uint8)
    whole, pieces = np.zeros(there + 1, np.uint8), np.zeros(there + 1, np.uint8)
    for step in parts:
        copy(step, data, whole)
        for part in cut(step, most):
            assert part.nbytes * part.rows <= most
            copy(part, data, pieces)
    np.testing.assert_array_equal(pieces, whole)
    for at_, to, n in found:
        np.testing.assert_array_equal(whole[to : to + n], data[at_ : at_ + n])


def test_rows_of_a_matrix_are_one_step() -> None:
    at_ = np.arange(100, dtype=np.int64)
    assert list(steps(7 + 40 * at_, 20 * at_, np.full(100, 20))) == [Step(7, 0, 20, 100, 40, 20)]
    assert list(cut(run(0, 5, 10), 4)) == [run(0, 5, 4), run(4, 9, 4), run(8, 13, 2)]
