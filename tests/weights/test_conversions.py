"""What is cast, quantised, gathered or turned on its way, within the staging memory, and part by part."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from aiotransfer import weights
from aiotransfer.engine.memory.views import memory_of
from aiotransfer.weights import Cast, Layout, Piece, Quantise, Tensor, Transpose
from aiotransfer.weights.kernels import numbers, quantise
from tests.weights.party import Party

pytestmark = pytest.mark.asyncio


async def push(
    party: Party, trainer: Layout, memory: list[dict[str, Any]], inference: Layout, **options: Any
) -> list[weights.Subscriber]:
    """One version from the trainers to the ranks of an instance."""
    stack = party.stack
    engines = [await stack.enter_async_context(await party.open_engine()) for _ in range(trainer.ranks)]
    members = [str(engine.address) for engine in engines]
    publishers = []
    for rank, engine in enumerate(engines):
        bound, group = trainer.bind(rank, memory[rank]), engine.group(members)
        publisher = weights.Publisher(engine, bound, group=group, timeout=20, **options)
        publishers.append(await stack.enter_async_context(publisher))
    subscribers = []
    for rank in range(inference.ranks):
        engine = await stack.enter_async_context(await party.open_engine())
        await engine.connect(engines[0].address)
        subscriber = weights.Subscriber(engine, inference, instance="a", rank=rank)
        subscribers.append(await stack.enter_async_context(subscriber))

    async def publish(publisher: weights.Publisher) -> None:
        async with publisher.publish(1):
            pass

    await asyncio.gather(*map(publish, publishers))
    for publisher in publishers:
        used = publisher.staging_held
        assert used <= publisher.works.staging_bytes
    return subscribers


@pytest.mark.parametrize("staging_bytes", [4096, 1 << 20])
async def test_a_tensor_larger_than_the_staging_memory_is_cast_in_parts(party: Party, staging_bytes: int) -> None:
    source = np.random.default_rng(7).normal(size=(96, 40)).astype(np.float32)
    trainer = Layout(
        [Tensor("w", (96, 40), "float32")], [Piece("w", 0, (0, 0), (50, 40)), Piece("w", 1, (50, 0), (46, 40))], ranks=2
    )
    inference = Layout([Tensor("w", (96, 40), "float16")], [Piece("w", r, (0, 20 * r), (96, 20)) for r in range(2)], ranks=2)
    memory = [{"w": source[:50].copy()}, {"w": source[50:].copy()}]
    found = await push(party, trainer, memory, inference, rules=[Cast("w")], staging_bytes=staging_bytes)
    for rank, subscriber in enumerate(found):
        assert np.array_equal(subscriber.tensors["w"], source[:, 20 * rank : 20 * rank + 20].astype(np.float16))


async def test_a_dtype_without_a_rule_is_refused_before_a_byte_moves(party: Party) -> None:
    trainer = Layout([Tensor("w", (8,), "float32")], [Piece("w", 0)], ranks=1)
    inference = Layout([Tensor("w", (8,), "float16")], [Piece("w", 0)], ranks=1)
    with pytest.raises(weights.PlanError, match="float16"):
        await push(party, trainer, [{"w": np.zeros(8, np.float32)}], inference)


async def test_dimensions_change_places_by_a_rule(party: Party) -> None:
    source = np.arange(24, dtype=np.float32).reshape(4, 6)
    trainer = Layout([Tensor("w", (4, 6), "float32")], [Piece("w", 0)], ranks=1)
    inference = Layout([Tensor("w", (6, 4), "float32")], [Piece("w", 0)], ranks=1)
    (found,) = await push(party, trainer, [{"w": source}], inference, rules=[Transpose("w")])
    assert np.array_equal(found.tensors["w"], source.T)


async def test_a_block_that_a_shards_edge_cuts_is_quantised_by_one_rank_that_reads_the_rest(party: Party) -> None:
    source = np.random.default_rng(3).normal(size=(40, 24)).astype(np.float32)
    trainer = Layout(
        [Tensor("w", (40, 24), "float32")], [Piece("w", 0, (0, 0), (13, 24)), Piece("w", 1, (13, 0), (27, 24))], ranks=2
    )
    tensors = [Tensor("w", (40, 24), "float8_e4m3fn"), Tensor("w_scale", (5, 3), "float32")]
    inference = Layout(tensors, [Piece("w", 0), Piece("w_scale", 0)], ranks=1)
    memory = [{"w": source[:13].copy()}, {"w": source[13:].copy()}]
    (found,) = await push(party, trainer, memory, inference, rules=[Quantise("w", "w_scale", block=(8, 8))])
    codes, scales = np.empty((40, 24), np.uint8), np.empty((5, 3), np.float32)
    quantise(numbers(codes, "float8_e4m3fn"), scales, source, (8, 8))
    assert np.array_equal(memory_of(found.memory.active["w"]).reshape(40, 24), codes)
    assert np.array_equal(memory_of(found.memory.active["w_scale"]).view(np.float32).reshape(5, 3), scales)


async def test_what_is_no_number_cannot_be_quantised_and_ends_the_version(party: Party) -> None:
    source = np.ones((8, 8), np.float32)
    source[3, 4] = np.nan
    trainer = Layout([Tensor("w", (8, 8), "float32")], [Piece("w", 0)], ranks=1)
    tensors = [Tensor("w", (8, 8), "float8_e4m3fn"), Tensor("w_scale", (1, 1), "float32")]
    inference = Layout(tensors, [Piece("w", 0), Piece("w_scale", 0)], ranks=1)
    with pytest.raises(weights.UpdateError, match=r"version 1\.1 was abandoned: w: nan at \(3, 4\)"):
        await push(party, trainer, [{"w": source}], inference, rules=[Quantise("w", "w_scale", block=(8, 8))])
