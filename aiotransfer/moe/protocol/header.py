"""What a rank says first in each step, as it lies in front of its first rows. Pure: values and bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from aiotransfer.moe.protocol.shape import HEAD, TAG_BYTES, TEXT_BYTES, Shape


class Header:
    """What a source says first: of which step it is, how many tokens it has and for which experts, or why
    there are none.

    `digest`: of its routing; `tag`: the caller's, as bytes, empty for none; `text`: why it refuses the step,
    empty where it does not. Nothing here is checked but for lengths: see `impossible`.
    """

    __slots__ = ("counts", "digest", "incarnation", "scales", "step", "tag", "text", "tokens")

    def __init__(self, shape: Shape, data: Any) -> None:
        self.step, packed, size, tag, self.incarnation, self.digest, _ = HEAD.unpack_from(data)
        self.tokens, self.scales = packed & 0xFFFFFF, packed >> 24
        begin = HEAD.size + 4 * shape.num_experts
        self.counts = np.frombuffer(data, np.uint32, shape.num_experts, HEAD.size)
        self.text = bytes(data[begin : begin + min(size, TEXT_BYTES)]).decode("utf-8", "replace") if size else ""
        self.tag = bytes(data[begin : begin + min(tag, TAG_BYTES)]) if tag and not size else b""

    def impossible(self, shape: Shape, rows: int) -> str:
        """What of its numbers cannot be, in words; empty where all can. `rows`: the sum of `counts`."""
        if self.tokens > shape.max_tokens:
            return f"it says that it has {self.tokens:,} tokens, and max_tokens is {shape.max_tokens:,}"
        if rows > self.tokens * shape.topk:
            return f"it says that it has {rows:,} rows of {self.tokens:,} tokens, and topk is {shape.topk}"
        if self.scales > shape.scales:
            return f"it says that it has {self.scales} scales for each token; the all-to-all was made for up to {shape.scales}"
        return ""


def header(shape: Shape, step: int, incarnation: int, tokens: int, scales: int, counts: Any, text: str = "") -> Any:
    """A header as uint8, without a tag."""
    words = text.encode("utf-8", "backslashreplace")[:TEXT_BYTES]
    data: Any = np.zeros(shape.header_bytes, np.uint8)
    HEAD.pack_into(data, 0, step, tokens | scales << 24, len(words), 0, incarnation, 0, 0)
    if counts is not None:
        data[HEAD.size : HEAD.size + 4 * shape.num_experts].view(np.uint32)[:] = counts
    begin = HEAD.size + 4 * shape.num_experts
    data[begin : begin + len(words)] = np.frombuffer(words, np.uint8)
    return data


def stamp(shape: Shape, data: Any, digest: int, tag: bytes) -> None:
    """Put the digest of the routing and the tag into a header that refuses nothing."""
    step, packed, text, _, incarnation, _, _ = HEAD.unpack_from(data)
    HEAD.pack_into(data, 0, step, packed, text, len(tag), incarnation, digest, 0)
    begin = HEAD.size + 4 * shape.num_experts
    data[begin : begin + len(tag)] = np.frombuffer(tag, np.uint8)
