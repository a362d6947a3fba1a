"""Whether memory is dense: its elements fill one range of addresses, each byte once, in any order of its
dimensions."""

from __future__ import annotations

from collections.abc import Sequence


def is_dense(shape: Sequence[int], strides: Sequence[int] | None, item: int) -> bool:
    """Whether an array of this `shape` and these `strides` fills its memory without gaps and overlaps.

    `item` is the size of one element, in the units of `strides`. Strides of None are those of C order.
    Dimensions of one element may have any stride, and an array without elements is dense. A negative stride
    is refused: the array begins at its end.
    """
    if strides is None or 0 in shape:
        return True
    expected = item
    for stride, n in sorted((stride, n) for n, stride in zip(shape, strides, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= n
    return True
