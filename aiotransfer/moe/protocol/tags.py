"""What a caller says a step is for, so that ranks that make their steps in different orders are told apart.
Pure."""

from __future__ import annotations

from aiotransfer.moe.protocol.shape import TAG_BYTES
from aiotransfer.quote import quote


def encoded(tag: int | str | None) -> bytes:
    """`tag` as it travels in a header; empty for None. Raises `TypeError` or `ValueError`."""
    if tag is None:
        return b""
    if type(tag) is int:
        if not -(1 << 63) <= tag < 1 << 64:
            raise ValueError(f"a tag that is an int has at most 64 bits, not {quote(tag)}")
        return b"i%d" % tag
    if not isinstance(tag, str):
        raise TypeError(f"a tag is an int, a str or None, not {type(tag).__name__}")
    data = b"s" + tag.encode("utf-8", "backslashreplace")
    if len(data) > TAG_BYTES:
        raise ValueError(f"a tag has at most {TAG_BYTES - 1} bytes as UTF-8, not {len(data) - 1}")
    return data


def shown(data: bytes) -> str:
    """An encoded tag as it is shown in messages."""
    if not data:
        return "no tag"
    text = data[1:].decode("utf-8", "replace")
    return f"tag {text}" if data[:1] == b"i" and text.lstrip("-").isdigit() else f"tag {text!r}"
