"""Values of callers and of peers inside the text of an error: short, whatever they are."""

from __future__ import annotations

import reprlib

MOST = 300  # characters of one value


class _Short(reprlib.Repr):
    """`repr` with bounds for all that may be long. What fits is shown as `repr` shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = MOST
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = self.maxarray = 16

    def repr_int(self, value: int, level: int) -> str:
        """Python words no integer of more than 4,300 digits: such a one is said by its length."""
        if value.bit_length() > 4 * MOST:
            return f"an int of {value.bit_length()} bits"
        return super().repr_int(value, level)

    def repr_bytes(self, value: bytes, level: int) -> str:
        """Only the beginning and the end are worded: a buffer may have gigabytes."""
        if len(value) <= MOST:
            return super().repr_instance(value, level)
        return f"{value[: MOST // 4]!r}...{value[-MOST // 4 :]!r} ({len(value)} bytes)"

    def repr_bytearray(self, value: bytearray, level: int) -> str:
        """As for bytes: only the beginning is worded."""
        if len(value) <= MOST:
            return super().repr_instance(value, level)
        return f"{value[: MOST // 4]!r}... ({len(value)} bytes)"


_short = _Short()


def quote(value: object) -> str:
    """`value` as an error or a log line shows it: its `repr`, with the middle left out where that has more
    than 300 characters. Never an error itself, also where the `repr` of the value is one."""
    try:
        text = _short.repr(value)
    except Exception:  # a class of the application that is called as a built-in one is, and is another
        return f"<{type(value).__name__} instance>"
    return text if len(text) <= MOST else f"{text[: MOST // 2]}...{text[-MOST // 2 :]}"
