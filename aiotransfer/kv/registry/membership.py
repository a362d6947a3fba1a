"""One member in the registry, for the length of a block: put there, kept alive, put there again after an
outage, taken out."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.aio.timeouts import Timeout, wait_shielded
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, TransferTimeout

if TYPE_CHECKING:
    from aiotransfer.kv.registry.backend import Backend
    from aiotransfer.kv.registry.member import Member

T = TypeVar("T")

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit(most=1)

PARTS = 3  # of a lease: it is renewed that often in its time
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # between tries while the registry does not answer
LEAST_CALL_SECONDS = 1.0


class Membership(Unpicklable):
    """Made by `Registry.join`. `registered`: whether the registry has confirmed the lease lately."""

    def __init__(self, backend: Backend, member: Member, ttl: float, call_timeout: float) -> None:
        self.member = member
        self.ttl = ttl
        self.registered = False
        self._value = member.encode()
        self._backend = backend
        self._call_timeout = call_timeout
        self._keeper: asyncio.Task[None] | None = None
        self._left: asyncio.Task[None] | None = None

    async def enter(self, timeout: float) -> None:
        """Put the entry there, trying again for `timeout` seconds. Raises `TransferTimeout`, with what the
        backend raised as its cause, or `ClosedError` when it was taken out meanwhile."""
        loop = asyncio.get_running_loop()
        self._keeper = loop.create_task(self._enter(timeout))
        await asyncio.wait([self._keeper])
        if not self._keeper.cancelled():
            self._keeper.result()  # raises
        if self._left is not None:
            raise ClosedError("the registry was closed")
        self._keeper = loop.create_task(self._keep())

    async def _enter(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        pause = FIRST_PAUSE
        while True:
            try:
                return await self._put(max(0.001, min(self._call_timeout, deadline - loop.time())))
            except Exception as error:
                if loop.time() + pause >= deadline:
                    raise TransferTimeout(
                        f"the registry did not take {self.member} within {timeout:g} s: {words_of(error)}",
                        hint="is it there, and may this process write to it?",
                    ) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def leave(self) -> None:
        """Take it out: bounded, done even if this is cancelled. The registry ends the lease where it cannot
        be told."""
        if self._left is None:
            self._left = asyncio.get_running_loop().create_task(self._leave())
        try:
            await asyncio.shield(self._left)
        except asyncio.CancelledError:
            await wait_shielded(self._left)
            raise

    async def _leave(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        self.registered = False
        try:
            await within(self._call_timeout, lambda: self._backend.delete(self.member.key))
        except Exception as error:
            self._complain("left, which the registry learns when its lease ends", error)

    async def _keep(self) -> None:
        timeout = min(self._call_timeout, max(self.ttl / PARTS, LEAST_CALL_SECONDS))
        tries = 0
        while True:
            often = self.ttl / PARTS * random.uniform(0.85, 1.0)  # so that not all ranks come at once
            await asyncio.sleep(min(often, FIRST_PAUSE * 2**tries, LONGEST_PAUSE) if tries else often)
            try:
                if not await within(timeout, lambda: self._backend.keep_alive(self.member.key, self.ttl)):
                    self.registered = False
                    await self._put(timeout)
            except Exception as error:
                tries = min(tries + 1, 30)
                self.registered = False
                self._complain("is not kept alive in the registry, which is tried again", error)
            else:
                tries = 0
                self.registered = True

    async def _put(self, seconds: float) -> None:
        await within(seconds, lambda: self._backend.put(self.member.key, self._value, self.ttl))
        self.registered = True

    def _complain(self, what: str, error: Exception) -> None:
        left_out = _limit.admit(what)
        if left_out is not None:
            _logger.warning("%s %s: %s%s", self.member, what, words_of(error), more(left_out))


async def within(seconds: float, call: Callable[[], Awaitable[T]]) -> T:
    """What the call returns, in time. Raises `TimeoutError` or what the call raises."""
    async with Timeout(seconds):
        return await call()


def words_of(error: BaseException) -> str:
    """An error in one line; the error itself holds frames, and is not kept."""
    text = str(error).partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
