"""Memory for tensors that are received: blocks that are used again when the tensors over them are gone.

The first touch of fresh memory costs several times the copy into it, so a block whose tensors are gone is
kept for a while and stays registered. What is idle is bounded in bytes and in time. All of this runs on the
engine's loop but for `Lease.__del__`, which may run in any thread, in the middle of anything: it only hands
the block over.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import asyncio

    import aiotransfer as at

LEAST_BYTES = 1 << 20  # of a block; what is smaller comes from the allocator, which uses its memory again by itself
IDLE_BYTES = 2 << 30  # kept idle, at most
IDLE_SECONDS = 10.0  # kept idle, at most
HUGE_BYTES = 4 << 20  # from here on the kernel is asked for huge pages


def rounded(nbytes: int) -> int:
    """The size of the block for so many bytes: sizes are few, so that blocks fit again, and at most an eighth
    is left over."""
    step = max(1 << 16, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step


class Block:
    """Memory with its registration. `idle_since`: on the loop's clock."""

    __slots__ = ("idle_since", "memory", "nbytes", "region")

    def __init__(self, engine: at.Engine, nbytes: int, *, pooled: bool) -> None:
        self.nbytes = nbytes
        self.memory: Any
        if pooled:
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if nbytes >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    pages.madvise(mmap.MADV_HUGEPAGE)
            self.memory = np.frombuffer(pages, np.uint8)
        else:
            self.memory = np.empty(nbytes, np.uint8)
        self.region = engine.register(self.memory)
        self.idle_since = 0.0


class Lease:
    """The use of a block. Arrays over its memory keep it; when the last is gone, the block is the pool's
    again."""

    def __init__(self, pool: Pool, block: Block) -> None:
        self._pool = pool
        self._block: Block | None = block
        self.region = block.region
        self.__array_interface__ = block.memory.__array_interface__

    def arrays(self, spans: list[tuple[int, int]]) -> list[Any]:
        """Arrays of bytes over `spans`, (offset, length) in the block; they keep the lease."""
        whole = np.asarray(self)
        return [whole[start : start + nbytes] for start, nbytes in spans]

    def end(self, *, in_use: bool) -> None:
        """Give the block back before the lease itself is gone; no array was made over it. On the loop.

        `in_use`: the engine may still write into it. Then it is not used again, and its memory lives as long
        as that lasts.
        """
        block, self._block = self._block, None
        if block is not None:
            (self._pool.lose if in_use else self._pool.give_back)(block)

    def __del__(self) -> None:
        if self._block is not None:
            self._pool.give_back(self._block)


class Pool:
    """The blocks of one engine."""

    def __init__(self, engine: at.Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._returned: collections.deque[Block] = collections.deque()
        self._idle: dict[int, list[Block]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.used_bytes = 0
        self.idle_bytes = 0

    def take(self, nbytes: int) -> Lease:
        """The use of a block of at least `nbytes`. Raises `MemoryError` or `OSError` where there is no
        memory."""
        self._collect()
        pooled = nbytes >= LEAST_BYTES
        size = rounded(nbytes) if pooled else nbytes
        fitting = self._idle.get(size)
        if fitting:
            block = fitting.pop()
            self.idle_bytes -= size
        else:
            block = Block(self._engine, size, pooled=pooled)
        self.used_bytes += size
        return Lease(self, block)

    def give_back(self, block: Block) -> None:
        """Take a block that nothing uses any more. From any thread, also in the middle of a collection of
        garbage."""
        self._returned.append(block)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process lets go of the memory
            self._loop.call_soon_threadsafe(self._collect)

    def lose(self, block: Block) -> None:
        """Forget a block that the engine may still write into. On the loop."""
        self.used_bytes -= block.nbytes
        block.region.close()

    def _collect(self) -> None:
        now = self._loop.time()
        while self._returned:
            block = self._returned.popleft()
            self.used_bytes -= block.nbytes
            if self._closed or block.nbytes < LEAST_BYTES or block.nbytes > IDLE_BYTES:
                block.region.close()
                continue
            block.idle_since = now
            self._idle.setdefault(block.nbytes, []).append(block)
            self.idle_bytes += block.nbytes
        while self.idle_bytes > IDLE_BYTES:
            self._drop_oldest()
        self._arm()

    def _drop_oldest(self) -> None:
        size = min((size for size, blocks in self._idle.items() if blocks), key=lambda size: self._idle[size][0].idle_since)
        self._idle[size].pop(0).region.close()
        self.idle_bytes -= size

    def _arm(self) -> None:
        if self._timer is None and self.idle_bytes and not self._closed:
            self._timer = self._loop.call_later(IDLE_SECONDS, self._expire)

    def _expire(self) -> None:
        self._timer = None
        latest = self._loop.time() - IDLE_SECONDS / 2  # the timer is not armed anew for each block
        while any(blocks and blocks[0].idle_since <= latest for blocks in self._idle.values()):
            self._drop_oldest()
        self._arm()

    def close(self) -> None:
        """Let go of all that is idle, and keep nothing from now on."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._collect()
        while self.idle_bytes:
            self._drop_oldest()
