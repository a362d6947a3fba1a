"""Pieces of usual placements, for layouts by hand. Pure: lists of `Piece` for the ranks that hold a
tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from aiotransfer.model import dtypes
from aiotransfer.quote import quote
from aiotransfer.weights.layouts.layout import Piece, Tensor, dense


def chunk(size: int, parts: int, part: int) -> tuple[int, int]:
    """(start, stop) of a part of `size` rows as `torch.chunk` cuts them: all of ceil(size / parts), the last
    ones less or nothing."""
    step = -(-size // parts) if size else 0
    return min(part * step, size), min((part + 1) * step, size)


def replicated(tensor: Tensor, ranks: Iterable[int], *, buffer: str | None = None) -> list[Piece]:
    """All of `tensor` on each of `ranks`, in `buffer` (default: the tensor's name). Raises `TypeError`."""
    _are_tensors([tensor])
    return [Piece(tensor.name, rank, buffer=buffer) for rank in ranks]


def sharded(tensor: Tensor, ranks: Iterable[int], dim: int = 0, *, buffer: str | None = None) -> list[Piece]:
    """One part of `tensor` along `dim` (default: the first dimension) on each of `ranks` in order, cut as
    `torch.chunk` does; ranks without a row have no piece. `buffer`: the memory on each rank (default: the
    tensor's name). Raises `TypeError`, and `ValueError` for a dimension that the tensor has not."""
    _are_tensors([tensor])
    ranks, axis = list(ranks), _axis(tensor, dim)
    pieces = []
    for k, rank in enumerate(ranks):
        start, stop = chunk(tensor.shape[axis], len(ranks), k)
        if start < stop:
            pieces.append(Piece(tensor.name, rank, *_rows(tensor, axis, start, stop), buffer=buffer))
    return pieces


def fused(
    buffer: str, tensors: Iterable[Tensor], ranks: Iterable[int], dim: int = 0, *, units: Sequence[int] | None = None
) -> list[Piece]:
    """`tensors` that each of `ranks` keeps fused in one `buffer`: rank r holds [q_r; k_r; v_r] along `dim`
    (default: the first dimension), without gaps. They have one dtype, and the same sizes in all other
    dimensions.

    `units`: into how many parts each tensor may be divided at most (heads; default: as many as ranks). A
    tensor with fewer units than ranks is repeated: rank r holds unit r * units // ranks. Raises `ValueError`
    for sizes that cannot be divided so, `TypeError`.
    """
    ranks, tensors = list(ranks), list(tensors)
    _are_tensors(tensors)
    if not tensors:
        raise ValueError(f"nothing is fused in {quote(buffer)}: there are no tensors")
    many = [len(ranks)] * len(tensors) if units is None else list(units)
    if len(many) != len(tensors):
        raise ValueError(f"{len(many)} units for {len(tensors)} tensors")
    pieces = []
    for k, rank in enumerate(ranks):
        rows = []
        for tensor, unit in zip(tensors, many, strict=True):
            size = tensor.shape[_axis(tensor, dim)]
            if unit < 1 or size % unit or (unit % len(ranks) and len(ranks) % unit):
                raise ValueError(f"{tensor.name}: {size} rows in {unit} units do not go to {len(ranks)} ranks")
            first, count = k * unit // len(ranks), max(unit // len(ranks), 1)
            rows.append((first * (size // unit), (first + count) * (size // unit)))
        pieces += _side_by_side(buffer, tensors, rank, dim, rows)
    return pieces


def placed(tensor: Tensor, slots: Mapping[int, Sequence[int]], *, buffer: str | None = None) -> list[Piece]:
    """Entries of `tensor` along its first dimension (logical experts) in the slots of ranks: `slots` is
    {rank: [entry of slot 0, ...]}. An entry may be in several slots, on one rank or on several: all are
    written. A negative entry is a slot without one. `buffer`: the memory on each rank, in which the slots lie
    one after the other (default: the tensor's name). Raises `TypeError`."""
    _are_tensors([tensor])
    item = dtypes.lookup(tensor.dtype).itemsize
    step = dense(tensor.shape, item)[0] if tensor.shape else item
    inner = tuple(tensor.shape[1:])
    return [
        Piece(tensor.name, rank, (entry, *(0,) * len(inner)), (1, *inner), buffer, slot * step)
        for rank, entries in slots.items()
        for slot, entry in enumerate(entries)
        if entry >= 0
    ]


def _side_by_side(buffer: str, tensors: Sequence[Tensor], rank: int, dim: int, rows: Sequence[tuple[int, int]]) -> list[Piece]:
    item = dtypes.lookup(tensors[0].dtype).itemsize
    axis = _axis(tensors[0], dim)
    shape = list(tensors[0].shape)
    shape[axis] = sum(stop - start for start, stop in rows)
    strides = dense(shape, item)
    pieces, at = [], 0
    for tensor, (start, stop) in zip(tensors, rows, strict=True):
        others = [n for d, n in enumerate(tensor.shape) if d != axis]
        if others != [n for d, n in enumerate(shape) if d != axis] or tensor.dtype != tensors[0].dtype:
            raise ValueError(f"{tensor.name} cannot be fused with {tensors[0].name}: shape or type differ")
        pieces.append(Piece(tensor.name, rank, *_rows(tensor, axis, start, stop), buffer, at * strides[axis], strides))
        at += stop - start
    return pieces


def _are_tensors(values: Sequence[Tensor]) -> None:
    """Raise `TypeError` unless they are."""
    if wrong := [value for value in values if not isinstance(value, Tensor)]:
        raise TypeError(f"pieces are of a Tensor, not of {quote(wrong[0])}")


def _axis(tensor: Tensor, dim: int) -> int:
    if not -len(tensor.shape) <= dim < len(tensor.shape):
        raise ValueError(f"{tensor.name} has no dimension {dim}")
    return dim % len(tensor.shape)


def _rows(tensor: Tensor, axis: int, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    low = tuple(start if d == axis else 0 for d in range(len(tensor.shape)))
    return low, tuple(stop - start if d == axis else n for d, n in enumerate(tensor.shape))
