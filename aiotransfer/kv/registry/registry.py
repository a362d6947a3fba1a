"""The registry as one process sees it: joins it, and knows its members without asking."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiotransfer.aio.ratelimit import RateLimit, more
from aiotransfer.aio.timeouts import Timeout, wait_shielded
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import BusyError, ClosedError, TransferError, TransferTimeout
from aiotransfer.kv.registry.cache import Cache
from aiotransfer.kv.registry.changes import Change, differences
from aiotransfer.kv.registry.member import ROLES, Member
from aiotransfer.kv.registry.membership import LONGEST_PAUSE, Membership, within, words_of
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.kv.registry.backend import Backend

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()

BREATH = 0.02  # seconds between two looks, however often the backend says that there is something new
MOST_SECONDS = 1e9


class Registry(Unpicklable):
    """The members of a serving system, by `backend`: `async with` it, where the event loop runs.

    `poll`: seconds between looks at a backend that does not tell of changes. `call_timeout`: after so long a
    call of the backend is given up, and counts as an outage. `grace`: after an outage members whose lease has
    ended meanwhile have so many seconds to come back before they count as gone. The backend is closed at the
    end.

    Raises `TypeError` or `ValueError`.
    """

    def __init__(self, backend: Backend, *, poll: float = 0.5, call_timeout: float = 5.0, grace: float = 5.0) -> None:
        self._backend = backend
        self._poll = seconds("poll", poll, BREATH)
        self._call_timeout = seconds("call_timeout", call_timeout)
        self._cache = Cache(0.0 if grace == 0 else seconds("grace", grace))
        self._state = "new"
        self._error: str | None = None
        self._looking = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._memberships: dict[str, Membership] = {}
        self._waiters: dict[asyncio.Future[None], None] = {}

    # ---- members ----

    def members(self, role: str | None = None) -> tuple[Member, ...]:
        """The members that are known now, of `role` ("prefill", "decode"; None: of both). The backend is not
        asked: during an outage these are the last that were known."""
        _check_role(role)
        return tuple(member for member in self._cache.members.values() if role in (None, member.role))

    @property
    def stale_seconds(self) -> float:
        """How old `members` is: seconds since the registry answered last; infinity before it ever did."""
        seen = self._cache.seen
        return math.inf if seen is None else max(0.0, self._loop.time() - seen)

    @property
    def error(self) -> str | None:
        """What the last look at the registry ended in, in words; None: it answered."""
        return self._error

    async def changes(self) -> AsyncGenerator[Change, None]:
        """Members that are there already, as "joined", then every change. Ends when the registry is closed.

        A slow reader misses changes that were undone meanwhile and nothing else. Raises `ClosedError` when
        the registry is not open.
        """
        self._check()
        told: dict[str, Member] = {}
        while self._state == "open":
            now = self._cache.members
            for change in differences(told, now):
                yield change
            told = now
            if told is self._cache.members:
                await self._next()

    async def wait_for(self, role: str | None, count: int = 1, *, timeout: float = 30.0) -> tuple[Member, ...]:
        """The members of `role` (None: of both), as soon as there are `count` or more; `TransferTimeout`
        after `timeout` seconds. Raises `ClosedError`, `ValueError`."""
        timeout = seconds("timeout", timeout)
        self._check()
        try:
            async with Timeout(timeout):
                while len(found := self.members(role)) < count:
                    await self._next()
                    self._check()
                return found
        except TimeoutError:
            what = "" if self._error is None else f"; the registry does not answer: {self._error}"
            raise TransferTimeout(
                f"{len(self.members(role))} of {count} {role or ''} members were there within {timeout:g} s{what}"
            ) from None

    # ---- joining ----

    @asynccontextmanager
    async def join(self, member: Member, *, ttl: float = 10.0, timeout: float = 10.0) -> AsyncIterator[Membership]:
        """Be a member for the length of the block: `async with registry.join(member):`.

        The lease of `ttl` seconds is renewed three times in its time. An outage does not end the block: when
        the registry is back, the member is put there again. Leaving (also by cancellation) takes at most
        `call_timeout`; where the registry cannot be told, the lease ends by itself. Entries of earlier
        incarnations at the same address are removed.

        Raises `TransferTimeout` when the registry does not take it within `timeout`, `BusyError` when it is a
        member already, `ClosedError`, `ValueError`.
        """
        ttl, timeout = seconds("ttl", ttl), seconds("timeout", timeout)
        self._check()
        if member.key in self._memberships:
            raise BusyError(f"{member} is a member already")
        membership = self._memberships[member.key] = Membership(self._backend, member, ttl, self._call_timeout)
        try:
            await membership.enter(timeout)
            self._check()
            await self._replace(member)
            yield membership
        finally:
            try:
                await membership.leave()
            finally:
                self._memberships.pop(member.key, None)

    async def _replace(self, member: Member) -> None:
        """Drop an earlier member of this address: only one engine listens there, and it is this one."""
        try:
            await within(self._call_timeout, self._look)  # others may be looking: in time, or not at all
            for other in self.members():
                if other.address == member.address and other.incarnation != member.incarnation:
                    await within(self._call_timeout, lambda key=other.key: self._backend.delete(key))  # type: ignore[misc]
        except Exception:  # then its lease ends it
            pass

    # ---- looking ----

    async def _watch(self) -> None:
        pause = BREATH
        while True:
            if await self._look():
                pause = BREATH
                try:
                    await within(self._poll + self._call_timeout, lambda: self._backend.changed(self._poll))
                except Exception as error:
                    self._failed(error)
            else:
                pause = min(2 * pause, max(LONGEST_PAUSE, self._poll))
            await asyncio.sleep(pause)

    async def _look(self) -> bool:
        """Ask the registry; False: it does not answer, and the cache stays."""
        async with self._looking:
            before = self._cache.members
            try:
                unreadable = self._cache.take(await within(self._call_timeout, self._backend.entries), self._loop.time())
            except Exception as error:
                self._failed(error)
                return False
            self._error = None
            if self._cache.members == before:
                self._cache.members = before
            else:
                self._wake()
        for why in unreadable:
            left_out = _limit.admit("unreadable")
            if left_out is not None:
                _logger.warning("an entry of the registry cannot be read: %s%s", why, more(left_out))
        return True

    def _failed(self, error: Exception) -> None:
        first, self._error = self._error is None, words_of(error)
        self._cache.failed()
        left_out = _limit.admit("outage") if first else None
        if left_out is not None:
            _logger.warning("the registry does not answer: %s; the members stay as they were%s", self._error, more(left_out))

    # ---- waiting ----

    async def _next(self) -> None:
        """Returns when the members are others, or the registry is closed."""
        if self._state != "open":
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await waiter
        finally:
            del self._waiters[waiter]

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _check(self) -> None:
        if self._state != "open":
            raise ClosedError("the registry is closed" if self._state == "closed" else "a registry is opened by `async with`")

    # ---- life ----

    async def aclose(self) -> None:
        """Leave, stop looking, and close the backend: bounded, done even if this is cancelled. Twice is
        silent."""
        if self._state == "closed":
            return
        self._state = "closed"
        closing = asyncio.get_running_loop().create_task(self._close())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await wait_shielded(closing)
            raise

    async def _close(self) -> None:
        self._wake()
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        await asyncio.gather(*(membership.leave() for membership in list(self._memberships.values())))
        try:
            await within(self._call_timeout, self._backend.aclose)
        except (TransferError, OSError, TimeoutError):
            pass  # nothing is lost with it

    async def __aenter__(self) -> Registry:
        if self._state != "new":
            raise ClosedError("a registry is opened once")
        self._state = "open"
        self._loop = asyncio.get_running_loop()
        self._watcher = self._loop.create_task(self._watch())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Registry by {type(self._backend).__name__}: {len(self._cache.members)} members>"


def seconds(name: str, value: object, least: float = 0.0) -> float:
    """A number of seconds that makes sense. Raises `TypeError` or `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {quote(value)}")
    if not least <= value <= MOST_SECONDS or value == 0:
        raise ValueError(f"{name} must be a number of seconds above {least:g}, not {quote(value)}")
    return float(value)


def _check_role(role: str | None) -> None:
    if role is not None and role not in ROLES:
        raise ValueError(f"role must be one of {ROLES} or None, not {quote(role)}")
