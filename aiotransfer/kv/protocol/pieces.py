"""Messages that are larger than one message of an engine may be: cut into pieces, and put together again.
Pure.

A piece is the header of its message (mark, version, number), a byte with which no body of a message begins,
which piece of how many it is, and its bytes. The pieces of a message come in order, since messages of a peer
do. What is not whole yet is bounded: for one peer, for all, and in time; memory is taken as the bytes come,
never for what is announced.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeAlias

from aiotransfer.errors import DescriptorError
from aiotransfer.kv.protocol.messages import HEADER_BYTES, MOST_MESSAGE, MOST_PIECES, PIECE_BYTES, number

_PIECE = struct.Struct("<BHH")
MARK = 0xC1  # no value of msgpack begins with it
OVERHEAD = 1024  # bytes that a message takes here beside its pieces
MOST_OF_ONE = 2 * MOST_MESSAGE  # bytes of one peer that are not whole yet
MOST_OF_ALL = 8 * MOST_MESSAGE
STALE_SECONDS = 60.0  # in which the next piece comes

_Key: TypeAlias = tuple[Hashable, int]


def split(data: bytes) -> list[bytes]:
    """A message as it is sent: itself, or its pieces. Raises `ValueError` for what is larger than a message
    may be."""
    if len(data) <= PIECE_BYTES:
        return [data]
    if len(data) > MOST_MESSAGE:
        raise ValueError(f"a message holds at most {MOST_MESSAGE} bytes, not {len(data)}")
    firsts = range(0, len(data), PIECE_BYTES)
    return [
        data[:HEADER_BYTES] + _PIECE.pack(MARK, k, len(firsts)) + data[first : first + PIECE_BYTES]
        for k, first in enumerate(firsts)
    ]


def is_piece(data: bytes) -> bool:
    """Whether this is a piece of a message."""
    return len(data) >= HEADER_BYTES + _PIECE.size and data[HEADER_BYTES] == MARK


@dataclass(slots=True)
class _Part:
    """A message of which some pieces have come."""

    parts: int
    heard: float
    pieces: list[bytes] = field(default_factory=list)
    nbytes: int = OVERHEAD


class Pieces:
    """Messages that are not whole yet, by the peer and the number. The one that heard something last stands
    last."""

    def __init__(self) -> None:
        self._begun: dict[_Key, _Part] = {}
        self._taken: dict[Hashable, int] = {}  # bytes, by peer

    def __len__(self) -> int:
        return len(self._begun)

    @property
    def nbytes(self) -> int:
        """What all of these take."""
        return sum(self._taken.values())

    def add(self, peer: Hashable, data: bytes, now: float) -> bytes | None:
        """One more piece of a message of `peer`: the message when it is whole. Raises `DescriptorError`; then
        nothing of it is kept."""
        found = number(data)
        assert found is not None
        key = peer, found
        _, k, parts = _PIECE.unpack_from(data, HEADER_BYTES)
        body = data[HEADER_BYTES + _PIECE.size :]
        begun = self._begun.pop(key, None) or _Part(parts, now)
        self._taken[peer] = self._taken.get(peer, 0) - (begun.nbytes if begun.pieces else 0)
        try:
            if not 1 < parts <= MOST_PIECES or parts != begun.parts or k != len(begun.pieces):
                raise DescriptorError("no message of the KV protocol: its pieces do not follow each other")
            if not len(body) == PIECE_BYTES and not (0 < len(body) <= PIECE_BYTES and k == parts - 1):
                raise DescriptorError("no message of the KV protocol: a piece of another size")
            begun.pieces.append(body)
            begun.nbytes += len(body)
            begun.heard = now
            if k == parts - 1:
                return b"".join(begun.pieces)
            self._make_room(peer, begun.nbytes)
            self._begun[key] = begun
            self._taken[peer] += begun.nbytes
            return None
        finally:
            if not self._taken.get(peer):
                self._taken.pop(peer, None)

    def _make_room(self, peer: Hashable, nbytes: int) -> None:
        if self._taken[peer] + nbytes > MOST_OF_ONE:
            raise DescriptorError(f"messages of one peer that are not whole yet take at most {MOST_OF_ONE} bytes")
        while self.nbytes + nbytes > MOST_OF_ALL:
            most = max(self._taken, key=lambda each: self._taken[each])
            if self._taken[most] <= self._taken[peer] + nbytes:
                raise DescriptorError(f"messages that are not whole yet take at most {MOST_OF_ALL} bytes")
            self._drop(next(key for key in self._begun if key[0] == most))

    def drop(self, peer: Hashable, number: int) -> None:
        """The rest of this message does not come."""
        if (peer, number) in self._begun:
            self._drop((peer, number))

    def sweep(self, now: float) -> None:
        """Forget messages whose next piece did not come in time."""
        for key in [key for key, part in self._begun.items() if part.heard + STALE_SECONDS <= now]:
            self._drop(key)

    def _drop(self, key: _Key) -> None:
        self._taken[key[0]] -= self._begun.pop(key).nbytes
        if not self._taken[key[0]]:
            del self._taken[key[0]]
