"""All that the ranks of an all-to-all do between them, apart from its steps: composed here, and ended
here."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import ClosedError, QuarantineError
from aiotransfer.moe.communicator import unmade
from aiotransfer.moe.communicator.answers import Answers
from aiotransfer.moe.communicator.bootstrap import Bootstrap
from aiotransfer.moe.communicator.greetings import Greetings
from aiotransfer.moe.communicator.listener import Listener
from aiotransfer.moe.communicator.losses import Losses
from aiotransfer.moe.communicator.ranks import Rank, Ranks
from aiotransfer.moe.communicator.waiting import Waiting

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.sync.group import PeerGroup
    from aiotransfer.moe.communicator.buffers import Buffers
    from aiotransfer.moe.protocol.shape import Shape

_open: WeakKeyDictionary[Engine, WeakSet[Communicator]] = WeakKeyDictionary()  # of each engine: those that use their immediates


class Communicator:
    """One rank's part of an all-to-all.

    `ranks`: all ranks; `losses`: missing ranks; `waiting`: which calls wait for which rank. `group`, `shape`
    and `name` are those of the `AllToAll`; `direct`, `gpu` and `in_place` are explained in `Greetings`.
    """

    def __init__(
        self, engine: Engine, group: PeerGroup, shape: Shape, name: str, *, direct: bool | None, gpu: bool, in_place: bool
    ) -> None:
        self.gpu = gpu
        self.ranks = Ranks(engine, group, shape, name)
        self.losses = Losses(self.ranks)
        self.waiting = Waiting(self.ranks)
        self._answers = Answers((self.ranks.rank, self.ranks.incarnation))
        self._greetings = Greetings(self.ranks, self._answers, direct, gpu=gpu, in_place=in_place)
        self._listener = Listener(self.ranks, self.losses, self.waiting, self._greetings, self._answers)
        self.bootstrap = Bootstrap(self.ranks, self.losses, self._greetings, self._answers, self._listener)
        self._closing: asyncio.Future[None] | None = None
        unmade.made(self.ranks)

    @property
    def buffers(self) -> Buffers:
        """The memory of this rank, which it has when all have met."""
        buffers = self._greetings.buffers
        assert buffers is not None, "steps begin when all have met"
        return buffers

    async def meet(self) -> None:
        """Returns when all ranks are there. Raises what `Bootstrap.meet` raises, and `ValueError` for a name
        that is taken."""
        await self._take_name()
        await self.bootstrap.meet()

    async def _take_name(self) -> None:
        """From now on the immediates and messages of this name are its own. Raises `ValueError` where another
        one of this engine has them; returns when one that is over has given them back."""
        mine = self.ranks.immediates()
        for other in list(_open.setdefault(self.ranks.engine, WeakSet())):
            theirs = other.ranks.immediates()
            if other is self or mine.stop <= theirs.start or theirs.stop <= mine.start:
                continue
            if other.ranks.over is None:
                raise ValueError(
                    f"{other.ranks!r} is open on this engine: give this all-to-all a name= of its own, or close that one"
                )
            await other.close()
        _open[self.ranks.engine].add(self)

    def _readers(self) -> list[tuple[int, Rank]]:
        """Ranks that may not have read all results yet that lie here: each answers a goodbye when it has."""
        ranks = self.ranks
        membership = ranks.membership
        if ranks.over is not None or membership is None or not ranks.results_are_read:
            return []
        readers = [(rank, known) for rank in membership.audience if (known := ranks.known[rank]) is not None]
        return [(rank, known) for rank, known in readers if known.hello is not None and known.hello.reads and not known.lost]

    def _reads_on(self, rank: int, known: Rank) -> bool:
        return self._listener.parted.get(rank) != known.incarnation and known.peer.state not in ("lost", "closed")

    async def close(self) -> None:
        """Say goodbye and give everything back. Cancelled, it waits for no other rank any more."""
        ranks = self.ranks
        if self._closing is not None:
            await asyncio.wait([self._closing])
            return
        self._closing = ranks.engine._loop.create_future()
        readers = self._readers()
        ranks.end(ClosedError(f"{ranks!r} was closed"))
        try:
            if ranks.posts:
                await asyncio.wait(ranks.posts, timeout=ranks.engine.config.drain_timeout)
            with contextlib.suppress(TimeoutError):  # what they have not read by then is missing there, and they see it
                async with Timeout(ranks.engine.config.drain_timeout):
                    while any(self._reads_on(rank, known) for rank, known in readers):
                        await ranks.soon()
        finally:
            try:
                await self._give_back()
            finally:
                self._closing.set_result(None)

    async def _give_back(self) -> None:
        ranks, buffers = self.ranks, self._greetings.buffers
        for task in list(ranks.tasks):
            task.cancel()
        await asyncio.gather(*ranks.tasks, return_exceptions=True)
        for handle in ranks.handles.values():
            handle.forget()
        if buffers is not None:
            with contextlib.suppress(QuarantineError):  # the engine keeps that memory until no rank can write there any more
                await buffers.aclose(ranks.engine.config.drain_timeout)
