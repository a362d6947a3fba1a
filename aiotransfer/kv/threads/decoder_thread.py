"""The decode side of an engine that steps in a thread without a loop.

    with at.run_in_thread() as thread:
        with kv.DecoderThread(thread, thread.run(make_decoder(thread.engine))) as decoder:
            decoder.start("10.0.0.7:7070", "request 7", page_ids, tokens=513)
            ...                                      # the engine goes on stepping, and after each step:
            for one in decoder.take_finished():
                ...                                  # one.id: its pages are full, or one.error says why not
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.errors import TransferTimeout
from aiotransfer.kv.decode.decoder import Decoder
from aiotransfer.kv.threads.requests import Ends, RequestsThread, Work, checked_id, copied
from aiotransfer.model.address import Address
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.loop_thread import EngineThread
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.kv.decode.handle import Arrival, Handle

PROVED = ("new", "free")  # states of a handle that holds no page


class Ask(NamedTuple):
    """What `Decoder.request` is asked for."""

    peers: tuple[Peer | str | Address, ...]
    page_ids: Any
    tokens: int | None
    skip_tokens: int
    priority: int
    data: bytes
    ends: Ends


class Load(Work):
    """A request that fills pages here."""

    __slots__ = ("ask", "handle")

    def __init__(self, id: str, ask: Ask) -> None:
        super().__init__(id)
        self.ask = ask
        self.handle: Handle | None = None

    def is_held(self) -> bool:
        """See `Work`: the block has ended, and left its pages in quarantine."""
        return self.handle is not None and self.handle.state not in PROVED

    def forget(self) -> None:
        """See `Work`."""
        super().forget()
        self.handle = None


class DecoderThread(RequestsThread[Load]):
    """A `decoder` for an engine that steps in a thread without a loop. It closes the decoder.

    `thread`: the `EngineThread` whose engine the decoder belongs to; the decoder is made there
    (`thread.run`). Every method but `close` returns at once, also while the loop is blocked, and may be
    called from any thread. At most `decoder.most_requests` requests at a time, finished ones that were not
    taken included. Raises `TypeError`, `ValueError`.
    """

    def __init__(self, thread: EngineThread, decoder: Decoder) -> None:
        if not isinstance(decoder, Decoder):
            raise TypeError(f"decoder must be a Decoder, not {quote(decoder)}")
        super().__init__(thread, decoder, decoder.most_requests)
        self.decoder = decoder
        self._dials: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def start(
        self, peer: Peer | str | Address | Sequence[Peer | str | Address], id: str, page_ids: Any, *, tokens: int | None = None,
        skip_tokens: int = 0, priority: int = 0, data: bytes = b"", timeout: float | None = None,
    ) -> None:  # fmt: skip
        """Ask for a request, and return at once; `take_finished` names it. Call it from any thread.

        `peer`: the prefill rank, or all of those that are needed, each a `Peer` or the address of its engine,
        which is dialled unless it is connected. `id`, `page_ids` (copied now), `tokens`, `skip_tokens`,
        `priority` and `data` as with `Decoder.request`. `timeout`: seconds from now for all of it, the dial
        included (None: the engine's).

        Raises `TypeError` or `ValueError` (also for an id that has been started and not been taken),
        `BusyError`, `ClosedError`; what `Decoder.request` raises is in the `error` of the finished request.
        """
        peers = tuple(peer) if isinstance(peer, list | tuple) else (peer,)
        ends = Ends(timeout, self._thread.engine.timeout)
        data = bytes(data) if isinstance(data, bytearray | memoryview) else data  # others are checked by the decoder
        ask = Ask(peers, copied(page_ids), tokens, skip_tokens, priority, data, ends)
        self._begin(Load(checked_id(id), ask), self._load)

    async def _load(self, load: Load) -> Arrival:
        peers, page_ids, tokens, skip_tokens, priority, data, ends = load.ask
        found = await asyncio.gather(*(self._peer(one, load.id, ends) for one in peers))
        load.handle = self.decoder.request(
            found, load.id, page_ids, tokens=tokens, skip_tokens=skip_tokens, priority=priority, data=data, timeout=ends.left()
        )
        async with load.handle as handle:
            return await handle.arrived()

    async def _peer(self, one: Peer | str | Address, id: str, ends: Ends) -> Peer:
        if not isinstance(one, str | Address):
            return one
        dial = self._dials.setdefault(str(one), asyncio.Lock())  # one dial at a time: the others find its peer
        try:
            async with Timeout(ends.left()), dial:
                return await self.decoder.engine.connect(one, timeout=ends.left(), reuse=True, retry=False)
        except TimeoutError as error:
            if isinstance(error, TransferTimeout):
                raise
            raise TransferTimeout(f"request {id!r}: no connection to {one} within {ends.seconds:g} s") from None

    def cancel(self, ids: str | Iterable[str]) -> None:
        """Take these requests back; `ids`: one, or several. Returns at once; call it from any thread.

        `take_finished` names each when no other process can write to its pages any more: with
        `RequestCancelled`, or as it ended just before. Ids that are not under way are left alone.
        """
        super().cancel(ids)
