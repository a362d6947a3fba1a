"""What a rank of an all-to-all says to another: messages of set-up and loss to a living one, and headers of steps."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import numpy as np

import aiotransfer as at
from aiotransfer import moe
from aiotransfer.errors import DescriptorError
from aiotransfer.moe.protocol import messages
from aiotransfer.moe.protocol.header import Header
from aiotransfer.moe.protocol.membership import View
from aiotransfer.moe.protocol.routing import Arrivals, Ranges
from aiotransfer.moe.protocol.shape import HEAD, Shape
from tests.reliability.absurd import Take, Target, Tree, alone

SIZES: dict[str, Any] = {"num_experts": 4, "hidden": 8, "dtype": "float32", "max_tokens": 4, "topk": 2, "timeout": 10}
SHAPE = Shape(ranks=2, num_experts=4, hidden=8, dtype="float32", combine_dtype="float32", max_tokens=4, topk=2)
LISTENER, SPEAKER = 0x4000_0000_0000_0A11, 0x4000_0000_0000_0B22  # stand for the incarnations of rank 0, who hears, and rank 1
GONE = 0x4000_0000_0000_0C33
REGION, HEADER = b"the region of rank 1", b"a header of rank 1"  # stand for what is longer, and known only then


def _said() -> list[messages.Message]:
    me: dict[str, Any] = {"rank": 1, "incarnation": SPEAKER}
    present = ((0, LISTENER, 0), (1, SPEAKER, 0))
    full = View(SPEAKER, ((1, GONE),), (), 1, ((0, 1, HEADER),), ((0, 1, HEADER),), present)
    return [
        messages.WhoIsThere(present=None, **me),
        messages.WhoIsThere(present=[0, 1], **me),
        messages.Unable(reason="no memory", to=LISTENER, **me),
        messages.Heard(**me),
        messages.Ready(incarnations=[LISTENER, SPEAKER], **me),
        messages.ViewUpdate(view=View(SPEAKER, (), (), 0, (), (), present), **me),
        messages.ViewUpdate(view=full, **me),
        messages.Hello(
            shape=SHAPE.agreed(), region=REGION, direct=True, reads=False, computed=0, running=True, ask=True, present=[0, 1],
            to=LISTENER, **me,
        ),
        messages.Leave(who=1, of=GONE, upto=3, reason="bye", present=[], **me),
        messages.Piece(number=0, of=2, data=b"half", **me),
    ]  # fmt: skip


def _messages() -> list[Tree]:
    return [msgspec.msgpack.decode(msgspec.msgpack.encode(message)) for message in _said()]


def _encode(tree: Tree) -> bytes:
    data = msgspec.msgpack.encode(tree)
    if len(data) > 1 << 20 or data.count(HEADER) > 100:
        raise ValueError("refused by its length alone")
    return data


def _replaced(tree: Tree, known: dict[Any, Any]) -> Tree:
    if isinstance(tree, list):
        return [_replaced(value, known) for value in tree]
    if isinstance(tree, dict):
        return {key: _replaced(value, known) for key, value in tree.items()}
    return known.get(tree, tree) if isinstance(tree, (int, bytes)) and not isinstance(tree, bool) else tree


class _Ranks:
    """Two ranks that make steps; rank 1 may say anything. When that parted them, they meet again."""

    def __init__(self, engines: list[at.Engine]) -> None:
        self.engines = engines
        self.a2a: list[moe.AllToAll] = []

    async def meet(self) -> None:
        await asyncio.gather(*(a2a.aclose() for a2a in self.a2a))
        addresses = [str(engine.address) for engine in self.engines]
        self.a2a = [moe.AllToAll(engine, engine.group(addresses), **SIZES) for engine in self.engines]
        await asyncio.gather(*(a2a.ready() for a2a in self.a2a))

    async def step(self, a2a: moe.AllToAll) -> None:
        """One that is right, unless the ranks have parted."""
        x, idx, weights = np.ones((2, 8), np.float32), np.array([[0, 3], [2, 1]]), np.ones((2, 2), np.float32)
        d = await a2a.dispatch(x, idx, weights)
        out = await a2a.combine(np.array(d.x), d.handle)
        assert (out == 2).all() or d.handle.dropped.any()

    async def take(self, data: bytes) -> bool:
        listener, speaker = (a2a._ranks for a2a in self.a2a)
        known = {LISTENER: listener.incarnation, SPEAKER: speaker.incarnation, HEADER: bytes(SHAPE.header_bytes)}
        rank = speaker.known[0]
        assert rank is not None
        known[REGION] = rank.lease.descriptor.encode()
        body = data
        try:
            body = msgspec.msgpack.encode(_replaced(msgspec.msgpack.decode(data), known))
            messages.decode(listener.key, listener.key + body)
            valid = True
        except (msgspec.MsgspecError, ValueError, RecursionError, DescriptorError):
            valid = False
        whole = listener.key + body
        parts = [whole[begin : begin + messages.PIECE] for begin in range(0, len(whole), messages.PIECE)]
        me = {"rank": 1, "incarnation": speaker.incarnation, "of": len(parts)}
        for i, part in enumerate(parts):
            piece = messages.encode(listener.key, messages.Piece(number=i, data=part, **me)) if len(parts) > 1 else whole
            await rank.peer.send(piece)
        await rank.peer.ping()  # it was read
        found = await asyncio.gather(*map(self.step, self.a2a), return_exceptions=True)
        for error in found:
            if error is not None and not isinstance(error, at.TransferError):
                raise error
        assert any(not task.done() and "Listener.listen" in repr(task) for task in listener.tasks) or listener.over is not None
        parted = any(error is not None for error in found) or any(a2a.lost for a2a in self.a2a)
        if parted or self.a2a[0]._communicator._listener._pieces:
            await self.meet()
        return valid


@asynccontextmanager
async def _ranks() -> AsyncIterator[Take]:
    async with AsyncExitStack() as stack:
        ranks = _Ranks([await stack.enter_async_context(at.open_engine(providers="shm")) for _ in range(2)])
        try:
            await ranks.meet()
            yield ranks.take
        finally:
            await asyncio.gather(*(a2a.aclose() for a2a in ranks.a2a))


# ---- headers ----

FIELDS = ("step", "tokens", "text", "tag", "incarnation", "digest", "zero")


def _header(tree: Tree) -> bytes:
    """Values as they would lie there; what has no place in its field is cut as the field cuts it."""
    sizes = (64, 32, 16, 16, 64, 32, 32)
    numbers = [int(tree[name] or 0) & ((1 << bits) - 1) for name, bits in zip(FIELDS, sizes, strict=True)]
    counts = np.array([int(n) & 0xFFFFFFFF for n in tree["counts"]][: SHAPE.num_experts], np.uint32).tobytes()
    data = HEAD.pack(*numbers) + counts.ljust(4 * SHAPE.num_experts, b"\0") + bytes(tree["rest"])
    return data[: SHAPE.header_bytes].ljust(SHAPE.header_bytes, b"\0")


def _plans(data: bytes) -> bool:
    """The header of rank 1, as rank 0 goes by it."""
    head = Header(SHAPE, data)
    counts = np.zeros((2, SHAPE.num_experts), np.uint32)
    counts[1] = head.counts
    ranges = Ranges(SHAPE, 0, counts)
    if head.text or head.impossible(SHAPE, int(ranges.sums[1])) or ranges.overfull():
        return False
    assert Arrivals(ranges).total <= SHAPE.recv_rows
    return True


HEADERS: list[Tree] = [
    dict(zip((*FIELDS, "counts", "rest"), values, strict=True))
    for values in (
        (7, 4, 0, 3, SPEAKER, 5, 0, [1, 2, 3, 2], b"s12"),
        (7, 0, 5, 0, SPEAKER, 0, 0, [0, 0, 0, 0], b"wrong"),
    )
]
TARGETS = (
    Target("moe", "a rank, to another that is at work", _messages, _encode, _ranks,
           most_peak=32 << 20),  # what stands for a header is longer when it is sent
    Target("moe header", "what a rank says of its rows", functools.partial(list, HEADERS), _header, alone(_plans)),
)
