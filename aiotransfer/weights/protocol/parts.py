"""Messages that are longer than one of the engine's: as parts, and put together again. Pure."""

from __future__ import annotations

from aiotransfer.errors import DescriptorError
from aiotransfer.weights.protocol import terms, wire


def parts(serial: int, data: bytes) -> list[bytes]:
    """An encoded message as what can be sent. Raises `ValueError` when it is too long."""
    if len(data) <= terms.PART:
        return [data]
    count = -(-len(data) // terms.PART)
    if count > terms.MOST_PARTS:
        raise ValueError(f"a message of {len(data)} bytes is longer than {terms.MOST_PARTS * terms.PART}")
    return [wire.encode(terms.Part(serial, k, count, data[k * terms.PART : (k + 1) * terms.PART])) for k in range(count)]


class Parts:
    """What has come of one long message."""

    def __init__(self) -> None:
        self._serial = -1
        self._data: list[bytes] = []

    def add(self, part: terms.Part) -> bytes | None:
        """The whole, when this was the last part. Raises `DescriptorError` for one that does not follow the
        one before."""
        if part.number == 0:
            self._serial, self._data = part.serial, []
        if part.serial != self._serial or part.number != len(self._data) or part.number >= part.of:
            self._serial, self._data = -1, []
            raise DescriptorError("a part of a message that does not follow the one before")
        self._data.append(part.data)
        if len(self._data) < part.of:
            return None
        data, self._data, self._serial = b"".join(self._data), [], -1
        return data
