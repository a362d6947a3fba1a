"""The model of the benchmark of weights: how it lies on 2 trainers and on 2 inference ranks, and what is in it."""

from __future__ import annotations

from typing import Any

import numpy as np

from aiotransfer.weights import Layout, Piece, Tensor, replicated, sharded

RANKS = 2  # of each side
HIDDEN, WIDE, KEYS, VOCABULARY, BLOCK = 4096, 14336, 1024, 32000, 128
MATRICES = {  # rows, columns, the dimension that tensor parallelism cuts
    "q": (HIDDEN, HIDDEN, 0), "k": (KEYS, HIDDEN, 0), "v": (KEYS, HIDDEN, 0), "o": (HIDDEN, HIDDEN, 1),
    "gate": (WIDE, HIDDEN, 0), "up": (WIDE, HIDDEN, 0), "down": (HIDDEN, WIDE, 1),
}  # fmt: skip


def layers(gigabytes: float) -> int:
    """So many that all takes about so much."""
    each = 2 * sum(rows * columns for rows, columns, _ in MATRICES.values())
    return max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * HIDDEN) / each))


def trainer_layout(count: int) -> Layout:
    """Rows in halves."""
    tensors = [Tensor("embed", (VOCABULARY, HIDDEN), "bfloat16"), Tensor("norm", (HIDDEN,), "bfloat16")]
    tensors += [
        Tensor(f"layers.{i}.{name}", (rows, columns), "bfloat16")
        for i in range(count) for name, (rows, columns, _) in MATRICES.items()
    ]  # fmt: skip
    return Layout(tensors, [piece for tensor in tensors for piece in sharded(tensor, range(RANKS))], ranks=RANKS)


def inference_layout(count: int, *, small: bool) -> Layout:
    """Tensor parallelism; `small`: the matrices of the layers in float8, with scales."""
    tensors = [Tensor("embed", (VOCABULARY, HIDDEN), "bfloat16"), Tensor("norm", (HIDDEN,), "bfloat16")]
    pieces: list[Piece] = [*sharded(tensors[0], range(RANKS)), *replicated(tensors[1], range(RANKS))]
    for i in range(count):
        for name, (rows, columns, dim) in MATRICES.items():
            here = [Tensor(f"layers.{i}.{name}", (rows, columns), "float8_e4m3fn" if small else "bfloat16")]
            if small:
                here.append(Tensor(f"layers.{i}.{name}_scale", (rows // BLOCK, columns // BLOCK), "float32"))
            tensors += here
            pieces += [piece for tensor in here for piece in sharded(tensor, range(RANKS), dim)]
    return Layout(tensors, pieces, ranks=RANKS)


def shards(layout: Layout, rank: int) -> dict[str, Any]:
    """Memory of a rank, of 16-bit numbers; what each is can be told from where it lies."""
    return {name: numbers(k, *box) for k, (name, box) in boxes(layout, rank).items()}


def boxes(layout: Layout, rank: int) -> dict[int, tuple[str, tuple[Any, Any]]]:
    """{tensor: (name, (start, extent))} of a rank's pieces."""
    found = {}
    for piece in np.flatnonzero(layout.piece_rank == rank).tolist():
        tensor = int(layout.piece_tensor[piece])
        dims = len(layout.shapes[tensor])
        box = layout.piece_start[piece][:dims].tolist(), layout.piece_extent[piece][:dims].tolist()
        found[tensor] = layout.names[tensor], box
    return found


def numbers(tensor: int, start: list[int], extent: list[int]) -> Any:
    """bfloat16 from 1 to 1.5, as integers."""
    found = np.full(extent, tensor, np.uint16)
    for dim, (first, n) in enumerate(zip(start, extent, strict=True)):
        steps = (np.arange(first, first + n, dtype=np.uint32) * (7 if dim else 3)).astype(np.uint16)
        found += steps.reshape([-1 if d == dim else 1 for d in range(len(extent))])
    found &= 63
    found |= 0x3F80
    return found


def overlap(one: tuple[Any, Any], other: tuple[Any, Any]) -> tuple[Any, Any] | None:
    """Of two boxes: where it lies in each."""
    low = [max(a, b) for a, b in zip(one[0], other[0], strict=True)]
    high = [min(a + n, b + m) for a, n, b, m in zip(*one, *other, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    first, second = ([slice(a - s, b - s) for a, b, s in zip(low, high, box[0], strict=True)] for box in (one, other))
    return tuple(first), tuple(second)
