"""What is too long for one message, in pieces: layouts, and what a subscriber rank passes on. Pure."""

from __future__ import annotations

from aiotransfer.errors import DescriptorError
from aiotransfer.weights.protocol.wire import MOST_LAYOUT, PIECE, Piece


def pieces(digest: bytes, data: bytes) -> list[Piece]:
    """A layout as messages. Raises `ValueError` when it is too long."""
    if len(data) > MOST_LAYOUT:
        raise ValueError(f"a layout of {len(data)} bytes is longer than {MOST_LAYOUT}")
    parts = [data[begin : begin + PIECE] for begin in range(0, len(data), PIECE)] or [b""]
    return [Piece(digest, number, len(parts), part) for number, part in enumerate(parts)]


class Pieces:
    """What has come of one layout. `nbytes`: what was announced of it."""

    def __init__(self, nbytes: int) -> None:
        self._most = nbytes
        self._data: list[bytes] = []
        self._size = 0
        self.over = False  # nothing more of it is taken

    def add(self, piece: Piece) -> bytes | None:
        """The whole, when this was the last piece. Raises `DescriptorError` for what does not follow or is
        too long."""
        self.over = True
        if piece.of == 0:
            raise DescriptorError("the sender does not have this layout any more")
        self._size += len(piece.data)
        if piece.number != len(self._data) or piece.number >= piece.of or self._size > self._most:
            raise DescriptorError("a piece of a layout that does not follow the one before, or is more than was announced")
        self._data.append(piece.data)
        self.over = len(self._data) == piece.of
        return b"".join(self._data) if self.over else None
