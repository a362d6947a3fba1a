"""Casts and blocks of 128 x 128, from any cut of the trainers to any cut of the inference side, beside the reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from aiotransfer.engine.memory.views import memory_of
from aiotransfer.weights import Cast, Layout, Piece, Quantise, Tensor, UpdateError
from tests.weights.kernels.reference import RAW, converted, quantised, some
from tests.weights.party import Party
from tests.weights.test_conversions import push

pytestmark = pytest.mark.asyncio
SHAPES = ((300, 200), (129, 127), (128, 256), (1, 1), (257, 129), (2, 130, 131), (64, 1), (5, 384))


def cuts(rng: Any, size: int, parts: int) -> list[tuple[int, int]]:
    edges = sorted({0, size, *rng.integers(0, size + 1, parts - 1).tolist()})
    return list(itertools.pairwise(edges))


def grid(rng: Any, tensor: Tensor, ranks: int) -> list[Piece]:
    """Any boxes that make up the tensor, each on one rank or two."""
    pieces = []
    for number, box in enumerate(itertools.product(*(cuts(rng, size, 3) for size in tensor.shape))):
        start, extent = tuple(a for a, _ in box), tuple(b - a for a, b in box)
        for rank in set(rng.integers(0, ranks, 2).tolist()):
            pieces.append(Piece(tensor.name, rank, start, extent, f"{tensor.name}/{number}"))
    return pieces


def part(layout: Layout, piece: int, values: Any) -> Any:
    dims = len(layout.shapes[layout.piece_tensor[piece]])
    return values[tuple(map(slice, layout.piece_start[piece, :dims], layout.piece_stop[piece, :dims]))]


def memory_of_rank(layout: Layout, rank: int, values: dict[str, Any]) -> dict[str, Any]:
    return {
        layout.buffer_names[layout.piece_buffer[piece]]: np.ascontiguousarray(
            part(layout, piece, values[layout.names[layout.piece_tensor[piece]]])
        ).view(np.uint8)
        for piece in np.flatnonzero(layout.piece_rank == rank).tolist()
    }


@pytest.mark.parametrize("seed", range(8))
async def test_any_cut_of_any_shape_is_what_the_reference_says(party: Party, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape, dtype = SHAPES[seed], ("bfloat16", "float32")[seed % 2]
    raw = some(shape, dtype, seed)
    raw[..., : min(128, shape[-2]), : min(128, shape[-1])] = 0  # a block of zeros, of which some are negative
    raw[..., 0, 0] = np.array(1 << (np.dtype(RAW[dtype]).itemsize * 8 - 1), RAW[dtype])
    codes, scales = quantised(raw, dtype)
    assert scales.reshape(-1)[0] == 1
    cast = some(shape, "float32", seed + 100)
    ranks = 1 + seed % 4
    sources = [Tensor("w", shape, dtype), Tensor("c", shape, "float32")]
    trainer = Layout(sources, [piece for tensor in sources for piece in grid(rng, tensor, ranks)], ranks=ranks)
    targets = [Tensor("w", shape, "float8_e4m3fn"), Tensor("s", scales.shape, "float32"), Tensor("c", shape, "bfloat16")]
    inference = Layout(targets, [piece for tensor in targets for piece in grid(rng, tensor, 2)], ranks=2)
    memory = [memory_of_rank(trainer, rank, {"w": raw, "c": cast}) for rank in range(ranks)]
    found = await push(party, trainer, memory, inference, rules=[Quantise("w", "s"), Cast("c")], staging_bytes=1 << 19)
    wanted = {"w": codes, "s": scales, "c": converted(cast, "float32", "bfloat16")}
    for rank, subscriber in enumerate(found):
        for name, values in memory_of_rank(inference, rank, wanted).items():
            here = memory_of(subscriber.memory.active[name])
            np.testing.assert_array_equal(here, values.reshape(-1), err_msg=f"{name} on rank {rank}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
async def test_what_is_not_finite_is_named_with_its_tensor_and_place(party: Party, bad: float) -> None:
    source = np.ones((300, 260), np.float32)
    source[290, 250] = bad
    trainer = Layout([Tensor("layers.3.w", source.shape, "float32")], [Piece("layers.3.w", 0)], ranks=1)
    tensors = [Tensor("layers.3.w", source.shape, "float8_e4m3fn"), Tensor("s", (3, 3), "float32")]
    inference = Layout(tensors, [Piece(tensor.name, 0) for tensor in tensors], ranks=1)
    with pytest.raises(UpdateError, match=rf"layers\.3\.w: {bad} at \(290, 250\)"):
        rules = [Quantise("layers.3.w", "s")]
        await push(party, trainer, [{"layers.3.w": source}], inference, rules=rules, staging_bytes=1 << 18)
