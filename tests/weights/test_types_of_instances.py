"""One version for instances that hold the model in different types, or fused for other numbers of ranks."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

import aiotransfer as at
from aiotransfer import weights
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.testing.fabric import Fabric, fabric
from aiotransfer.weights import Cast, Fuse, Layout, Piece, Plan, Quantise, Tensor, make_plan
from aiotransfer.weights.kernels import cast, numbers, quantise
from tests.weights.party import Party, Server
from tests.weights.replay import check, replay

ROWS, COLUMNS, BLOCK = 40, 24, (8, 8)
NORM = Tensor("norm", (COLUMNS,), "float32")
TRAINED = (Tensor("w", (ROWS, COLUMNS), "float32"), NORM)
PLAIN = (Tensor("w", (ROWS, COLUMNS), "bfloat16"), NORM)
SMALL = (Tensor("w", (ROWS, COLUMNS), "float8_e4m3fn"), Tensor("w_scale", (5, 3), "float32"), NORM)
RULES = (Cast("w"), Quantise("w", "w_scale", BLOCK))


def trainers(ranks: int = 2) -> Layout:
    """Rows over the ranks; the first rank's edge cuts a block."""
    edges = [0, *(13 + 9 * r for r in range(ranks - 1)), ROWS]
    rows = [Piece("w", r, (a, 0), (b - a, COLUMNS)) for r, (a, b) in enumerate(itertools.pairwise(edges))]
    return Layout(TRAINED, [*rows, *(Piece("norm", r) for r in range(ranks))], ranks=ranks)


def instance(tensors: Sequence[Tensor], ranks: int) -> Layout:
    """Every rank has all but `w`, of which it has some columns, or all where it has scales."""
    wide = COLUMNS // ranks if len(tensors) == 2 else COLUMNS
    pieces = [Piece("w", r, (0, r * wide % COLUMNS), (ROWS, wide)) for r in range(ranks)]
    return Layout(tensors, [*pieces, *(Piece(t.name, r) for t in tensors[1:] for r in range(ranks))], ranks=ranks)


def trained(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {"w": rng.normal(size=(ROWS, COLUMNS)).astype(np.float32), "norm": rng.normal(size=COLUMNS).astype(np.float32)}


def reference(tensors: Sequence[Tensor], number: int) -> dict[str, Any]:
    """The bits that an instance must have of a version."""
    values = trained(number)
    if len(tensors) == 2:
        plain = np.empty((ROWS, COLUMNS), np.uint16)
        cast(numbers(plain, "bfloat16"), values["w"])
        return {"w": plain, "norm": values["norm"]}
    codes, scales = np.empty((ROWS, COLUMNS), np.uint8), np.empty((5, 3), np.float32)
    quantise(numbers(codes, "float8_e4m3fn"), scales, values["w"], BLOCK)
    return {"w": codes, "w_scale": scales, "norm": values["norm"]}


async def train(party: Party, **options: Any) -> list[tuple[weights.Publisher, dict[str, Any]]]:
    layout = trainers()
    engines = [await party.stack.enter_async_context(await party.open_engine(name=f"trainer {r}")) for r in range(2)]
    members = [str(engine.address) for engine in engines]
    found = []
    for rank, engine in enumerate(engines):
        memory = {"w": np.zeros((13 if rank == 0 else ROWS - 13, COLUMNS), np.float32), "norm": np.zeros(COLUMNS, np.float32)}
        publisher = weights.Publisher(
            engine, layout.bind(rank, memory), group=engine.group(members), staging_bytes=8192, **{"rules": RULES, **options}
        )
        found.append((await party.stack.enter_async_context(publisher), memory))
    return found


async def publish(ranks: Sequence[tuple[weights.Publisher, dict[str, Any]]], number: int) -> list[Any]:
    """What came of it on each rank: None, or what was raised."""
    values = trained(number)

    async def one(publisher: weights.Publisher, memory: dict[str, Any]) -> None:
        memory["w"][...] = values["w"][:13] if publisher.rank == 0 else values["w"][13:]
        memory["norm"][...] = values["norm"]
        async with publisher.publish(number):
            pass

    return await asyncio.gather(*(one(*rank) for rank in ranks), return_exceptions=True)


async def serve(party: Party, leader: at.Engine, name: str, tensors: Sequence[Tensor], ranks: int) -> list[Server]:
    servers = []
    for rank in range(ranks):
        engine = await party.stack.enter_async_context(await party.open_engine(name=f"{name}/{rank}"))
        await engine.connect(leader.address)
        subscriber = weights.Subscriber(engine, instance(tensors, ranks), instance=name, rank=rank)
        servers.append(Server(engine, await party.stack.enter_async_context(subscriber)))
    return servers


def has(server: Server, tensors: Sequence[Tensor], number: int) -> bool:
    """Whether it has the bits of a version."""
    subscriber = server.subscriber
    layout, active, right = subscriber.layout, subscriber.memory.active, reference(tensors, number)
    found = []
    for piece in np.flatnonzero(layout.piece_rank == subscriber.rank).tolist():
        name, dims = layout.names[layout.piece_tensor[piece]], right[layout.names[layout.piece_tensor[piece]]].ndim
        low, high = layout.piece_start[piece, :dims].tolist(), layout.piece_stop[piece, :dims].tolist()
        wanted = np.ascontiguousarray(right[name][tuple(map(slice, low, high))])
        found.append(np.array_equal(memory_of(active[name]), wanted.reshape(-1).view(np.uint8)))
    return all(found)


@pytest.mark.asyncio
@pytest.mark.parametrize("fanout", ["direct", "relay"])
async def test_each_instance_has_every_version_in_its_own_types(party: Party, fanout: str) -> None:
    ranks = await train(party, timeout=20, fanout=fanout, checksum=True)
    leader = ranks[0][0].engine
    plain, small = await serve(party, leader, "plain", PLAIN, 2), await serve(party, leader, "small", SMALL, 1)
    again = await serve(party, leader, "again", PLAIN, 2)
    for number in (1, 2, 5):
        assert await publish(ranks, number) == [None, None]
        for servers, tensors in ((plain, PLAIN), (small, SMALL), (again, PLAIN)):
            for server in servers:
                assert server.subscriber.version == (1, number)
                assert has(server, tensors, number)
    sent = sum(publisher.records[-1].nbytes for publisher, _ in ranks)
    arrived = sum(server.subscriber.records[-1].nbytes for server in (*plain, *small, *again))
    assert arrived == 2 * 2 * ROWS * COLUMNS + ROWS * COLUMNS + 15 * 4 + 5 * 4 * COLUMNS
    saved = 2 * ROWS * COLUMNS + 2 * 4 * COLUMNS  # what instances of one type pass on
    assert sent == arrived if fanout == "direct" else sent <= arrived - saved


@pytest.mark.asyncio
async def test_a_part_of_the_names_comes_with_the_scales_of_those_that_have_some(party: Party) -> None:
    ranks = await train(party, timeout=20)
    leader = ranks[0][0].engine
    (plain,), (small,) = await serve(party, leader, "plain", PLAIN, 1), await serve(party, leader, "small", SMALL, 1)
    assert await publish(ranks, 1) == [None, None]
    for publisher, _ in ranks:
        await publisher.aclose()
    parts = []
    for publisher, memory in ranks:
        engine, members = publisher.engine, publisher.members
        new = weights.Publisher(
            engine,
            publisher.layout.bind(publisher.rank, memory),
            group=engine.group(members),
            rules=RULES,
            names=["w"],
            timeout=20,
        )
        parts.append((await party.stack.enter_async_context(new), memory))
    assert await publish(parts, 2) == [None, None]
    for server, tensors in ((plain, PLAIN), (small, SMALL)):
        assert server.subscriber.version == (2, 2)
        assert not has(server, tensors, 2)
        both = reference(tensors, 2) | {"norm": reference(tensors, 1)["norm"]}
        for name, wanted in both.items():
            assert np.array_equal(memory_of(server.subscriber.memory.active[name]), wanted.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("lost", ["plain", "small"])
def test_where_one_of_two_is_lost_in_the_middle_the_other_has_the_version(lost: str) -> None:
    async def scenario(party: Party, net: Fabric) -> None:
        ranks = await train(party, timeout=2)
        leader = ranks[0][0].engine
        forms = {"plain": PLAIN, "small": SMALL}
        servers = {name: (await serve(party, leader, name, tensors, 1))[0] for name, tensors in forms.items()}
        assert await publish(ranks, 1) == [None, None]
        going = asyncio.ensure_future(publish(ranks, 2))
        await asyncio.sleep(4e-4)
        net.kill(servers[lost].engine)
        (other,) = forms.keys() - {lost}
        for error in await going:
            assert isinstance(error, weights.UpdateError)
            assert error.committed == (f"{other}/0",)
            assert list(error.missing) == [f"{lost}/0"]
        assert servers[other].subscriber.version == (1, 2)
        assert has(servers[other], forms[other], 2)
        assert await publish(ranks, 3) == [None, None]
        assert servers[other].subscriber.version == (1, 3)
        assert has(servers[other], forms[other], 3)

    async def run(net: Fabric) -> None:
        async def open_engine(**options: Any) -> at.Engine:
            return await net.open_engine(config=at.Config(peer_timeout=0.05, drain_timeout=0.01), **options)

        async with AsyncExitStack() as stack:
            await scenario(Party(stack, open_engine), net)

    fabric(seed=7).run(run)


def test_what_is_the_same_for_several_instances_is_made_once() -> None:
    forms = {"plain": instance(PLAIN, 2), "small": instance(SMALL, 1), "again": instance(PLAIN, 1)}
    plan = make_plan(trainers(), forms, RULES, staging_bytes=8192)
    assert plan.names == ("w", "norm", "w", "w_scale")
    assert [plan.dtypes[k] for k in plan.catalog.numbers("small")] == ["float8_e4m3fn", "float32", "float32"]
    assert plan.catalog.numbers("again").tolist() == plan.catalog.numbers("plain").tolist() == [0, 1]
    text = plan.explain()
    assert "cast w for plain and again: float32 to bfloat16" in text
    assert "quantise w for small: float32 to float8_e4m3fn, of w, scales in w_scale" in text
    assert Plan.decode(plan.encode()) == plan
    assert make_plan(trainers(), {"small": forms["small"]}, RULES).diff(plan)


@pytest.mark.parametrize("fanout", ["direct", "relay"])
def test_rules_may_differ_for_instances_whose_tensors_look_alike(fanout: str) -> None:
    sources = [Tensor("q", (8, 4), "float32"), Tensor("k", (4, 4), "float32")]
    rows = {"q": [Piece("q", r, (4 * r, 0), (4, 4)) for r in range(2)], "k": [Piece("k", 0), Piece("k", 1)]}
    trainer = Layout(sources, [*rows["q"], *rows["k"]], ranks=2)

    def fused(ranks: int) -> Layout:
        wide = 12 // ranks
        return Layout([Tensor("qk", (12, 4), "float32")], [Piece("qk", r, (wide * r, 0), (wide, 4)) for r in range(ranks)],
                      ranks=ranks)  # fmt: skip

    rules = {f"tp{n}": [Fuse(("q", "k"), "qk", ranks=n)] for n in (2, 4)} | {"": [Fuse(("q", "k"), "qk")]}
    values = {"q": np.arange(32, dtype=np.float32).reshape(8, 4), "k": -np.arange(16, dtype=np.float32).reshape(4, 4)}
    plan = make_plan(trainer, {"tp2": fused(2), "tp4": fused(4), "one": fused(1)}, rules, fanout=fanout)
    for name, (memory, counts) in replay(plan, values).items():
        n = {"tp2": 2, "tp4": 4, "one": 1}[name]
        parts = [x for r in range(n) for x in (np.split(values["q"], n)[r], np.split(values["k"], n)[r])]
        check(plan.instances[name], memory, counts, {"qk": np.concatenate(parts)})


def test_instances_may_have_other_numbers_of_dimensions() -> None:
    one = [Tensor("v", (6,), "float32")]
    trainer = Layout([*one, Tensor("x", (2, 3, 2), "float32")], [Piece("v", 0), Piece("x", 0)], ranks=1)
    flat = Layout([*one, Tensor("x", (2, 3, 2), "float32")], [Piece("v", 0), Piece("x", 0)], ranks=1)
    less = Layout(one, [Piece("v", 0)], ranks=1)
    values = {"v": np.arange(6, dtype=np.float32), "x": np.arange(12, dtype=np.float32).reshape(2, 3, 2)}
    for order in ({"less": less, "flat": flat}, {"flat": flat, "less": less}):
        plan = make_plan(trainer, order, names=["v"])
        assert Plan.decode(plan.encode()) == plan
        for name, (memory, counts) in replay(plan, values).items():
            check(plan.instances[name], memory, counts, {"v": values["v"]})
