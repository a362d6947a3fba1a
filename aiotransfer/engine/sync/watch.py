"""Watching a 64-bit word that a kernel or another process increments.

No doorbell is rung for such a word, so the lane's native thread looks at it: every 50 us while it changes,
ever more rarely (down to every 4 ms) while it does not. The event loop sleeps until it has changed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiotransfer.engine.memory import buffers
from aiotransfer.engine.memory.region import Region, RegionView
from aiotransfer.engine.operations.refusals import lacking
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, InternalError, RegionError, RegistrationError
from aiotransfer.providers import native
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.runtime.runtime import Runtime

WORD = 8


class Watcher(Unpicklable):
    """`async for old, new in watcher`: ends when it is closed. Values may be skipped. Made by `Engine.watch`.

    Raises `RegistrationError` when the word lies in a mapping of a file that was shortened.
    """

    def __init__(self, engine: Runtime, watchers: dict[int, Watcher], word: Any) -> None:
        self._engine = engine
        self._watchers = watchers  # of the engine, by number, while they are open
        address, self._keep = _word(engine, word)  # what keeps the memory comes second
        self._out = native.ffi.new("uint64_t *")
        self._id = int(native.lib.at_watch_add(engine._p, native.ffi.cast("void *", address), self._out))
        if self._id < 0:
            raise self._refusal(self._id, "cannot watch")
        engine._lane.holdings.hold("watch", self._id, self._keep[1])
        self._last = int(self._out[0])
        self._waiter: asyncio.Future[int | None] | None = None
        self._closed = False
        watchers[self._id] = self

    @property
    def value(self) -> int:
        """The value of the word that was seen last."""
        return self._last

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> tuple[int, int]:
        if self._closed:
            raise StopAsyncIteration
        self._engine._check()
        if self._waiter is not None:
            raise RuntimeError("a watcher is iterated over by one task at a time")
        status = native.lib.at_watch_next(self._engine._p, self._id, self._out)
        if status < 0:
            raise self._refusal(status, "the word cannot be watched")
        value: int | None = int(self._out[0])
        # Not what the lane has told but what was yielded decides: a look that was cancelled may have been
        # told of a change.
        if value != self._last:
            await asyncio.sleep(0)  # a word that never rests starves no other task
        else:
            self._waiter = self._engine._loop.create_future()
            try:
                value = await self._waiter
            finally:
                self._waiter = None
        if value is None:
            raise StopAsyncIteration
        old, self._last = self._last, value
        return old, value

    def _changed(self, status: int, value: int) -> None:
        if self._waiter is None or self._waiter.done():
            return
        if status < 0:
            self._waiter.set_exception(self._refusal(status, "the word cannot be watched"))
        else:
            self._waiter.set_result(value)

    def _refusal(self, status: int, what: str) -> Exception:
        if status == native.lib.AT_EMEMORY:
            return RegistrationError(f"{what}: its memory is not there any more", hint="its file was shortened")
        return lacking(self._engine, status, what) or InternalError(f"{what}: {native.text(status)}")

    def close(self) -> None:
        """Look no more; the memory is the caller's again when this returns. Twice is silent."""
        if self._closed:
            return
        self._closed = True
        engine = self._engine
        if engine._lane.usable:
            native.lib.at_watch_close(engine._p, self._id)
            engine._lane.holdings.drop("watch", self._id)
        self._watchers.pop(self._id, None)
        self._keep = None, None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Watcher at {self._last}{', closed' if self._closed else ''}>"


def _word(engine: Runtime, word: Any) -> tuple[int, tuple[object, object]]:
    keep: tuple[object, object]
    if isinstance(word, RegionView):
        root: Region = word._root
        if word._engine is not engine:
            raise RegionError("the word's region belongs to another engine")
        if root._closed:
            raise ClosedError("the word's region is closed")
        address, nbytes, device, keep = root._address + word._start, word.nbytes, root._device, (root, root._keep)
    else:
        plain = buffers.describe(word)
        address, nbytes, device, keep = plain.address, plain.nbytes, plain.device, (None, plain.keep)
    if nbytes != WORD or address % WORD:
        raise ValueError(f"a watched word has {WORD} aligned bytes, not {nbytes} at {address:#x}")
    if device.partition(":")[0] != "cpu":
        raise RegistrationError(
            f"only words in host memory can be watched, not on {quote(device)}", hint="use pinned host memory"
        )
    return address, keep
