"""What a layout says, as its checks and the memory that is bound to it read it. Pure."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

Ints = npt.NDArray[Any]


class LayoutArrays(Protocol):
    """The names, numbers and arrays of a `Layout`, which describes each of them."""

    ranks: int
    names: tuple[str, ...]
    repeated: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    itemsizes: Ints
    buffer_names: tuple[str, ...]
    buffer_rank: Ints
    buffer_bytes: Ints
    piece_rank: Ints
    piece_tensor: Ints
    piece_buffer: Ints
    piece_start: Ints
    piece_extent: Ints
    piece_offset: Ints
    piece_strides: Ints

    @property
    def shape_array(self) -> Ints:
        """The shapes, with 1 in dimensions that a tensor lacks."""
        ...

    @property
    def piece_stop(self) -> Ints:
        """`piece_start + piece_extent`, for each piece and dimension."""
        ...

    @property
    def piece_span(self) -> Ints:
        """Bytes from the first byte of each piece to the end of its last element."""
        ...

    def buffers_of(self, rank: int) -> dict[str, int]:
        """{name: bytes} of the buffers of a rank."""
        ...
