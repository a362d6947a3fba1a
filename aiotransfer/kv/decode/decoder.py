"""The decode side: pages that wait for the cache of a request.

    decoder = kv.Decoder(engine, layout, pages)
    async with decoder.request(peer, "request 7", page_ids, tokens=513) as handle:
        arrival = await handle.arrived()
        ...                                      # the pages are full; decode from arrival.tail on
    # here no other process can write to the pages, however the block ended

Pages belong to the caller, who says which of them a request may fill. From then on until the block ends they
are *held*: no other request may name them. Their right to be written is leased to the prefill ranks of that
request alone, and taken back at the end.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.aio.timeouts import wait_shielded
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.errors import QuarantineError, TransferError
from aiotransfer.kv.decode.absence import say_absent
from aiotransfer.kv.decode.handle import Handle
from aiotransfer.kv.decode.pool import Pool, RequestSpec, Settings
from aiotransfer.kv.protocol import messages
from aiotransfer.kv.roles.arguments import is_twice, page_ids_of, whole
from aiotransfer.kv.roles.dispatcher import Dispatcher
from aiotransfer.kv.roles.role import Pages, Role
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.errors import DescriptorError
    from aiotransfer.kv.protocol.layout import KVLayout
    from aiotransfer.kv.protocol.record import RequestRecord


class Decoder(Role):
    """Receives KV caches into `pages`, a region of `engine` (or a part of one) that holds the pool of
    `layout`; a list of these, one for each layer of this rank, where `layout.outermost` is "tensors".

    `instance`: the name of the copy of the model that this rank belongs to, of 1 to 256 characters, the same
    at all of its ranks and at those of no other copy (vLLM: the `engine_id`). A prefill rank knows a request
    by its instance and its id. None: the incarnation of the engine, which is enough where no prefill rank
    sends to several ranks of the instance; else the request is refused.

    `tail_bytes`: the most bytes of a tail (what a prefill rank sends last: logits, a hidden state).
    `checksums`: have every page checked; `pages` must then be memory of the host, allocated or registered.
    `most_requests`: how many at a time, beyond which `request` raises `BusyError`. `revoke_timeout`: seconds
    in which the end of a request must be proved before its pages are quarantined. `on_record` is called with
    the `RequestRecord` of each request that is over; the last 1,000 are in `records`.

    Raises `RegionError` when the pool does not lie in the region, `ConfigurationError` (checksums of memory
    on a GPU), `ClosedError`, `TypeError`, `ValueError`. Call it where the engine's event loop runs.
    """

    def __init__(
        self, engine: Engine, layout: KVLayout, pages: Pages, *, instance: str | None = None, tail_bytes: int = 64 << 10,
        checksums: bool = False, most_requests: int = 4096, revoke_timeout: float = 5.0,
        on_record: Callable[[RequestRecord], object] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(engine, layout, pages, on_record, checksums=checksums)
        named = _checked(instance)
        if type(checksums) is not bool:
            raise TypeError(f"checksums is True or False, not {quote(checksums)}")
        self._settings = Settings(
            named, named or f"{engine.incarnation:016x}", checksums, whole("tail_bytes", tail_bytes),
            seconds(revoke_timeout, 5.0),
        )
        self.pool = Pool(layout.num_pages, whole("most_requests", most_requests))
        self.dispatcher = Dispatcher.enter(engine, messages.TO_DECODER, self)

    @property
    def instance(self) -> str:
        """The name by which prefill ranks know this decoder's requests: `instance`, or the incarnation of its
        engine."""
        return self._settings.instance

    @property
    def most_requests(self) -> int:
        """How many may be known at a time."""
        return self.pool.most_requests

    def request(
        self, peer: Peer | Sequence[Peer], id: str, page_ids: Any, *, tokens: int | None = None, skip_tokens: int = 0,
        priority: int = 0, data: bytes = b"", timeout: float | None = None,
    ) -> Handle:  # fmt: skip
        """Pages for one request: `async with` it.

        `peer`: the prefill rank, or all those that this decode rank gets something of (`kv.sources`). `id`:
        unique within the instance, and the same at all of its ranks. These must agree on the request in
        everything but their pages and `timeout`. `page_ids`: from the first token on; of them those before
        `skip_tokens` (a cached prefix) are neither written nor held. `tokens`: of the prompt; None: as many
        as the pages hold. `priority`: higher goes first. `data`: for the prefill application (the prompt,
        say; with it at most about 16 MiB). All of it, until the last page, within `timeout` seconds (None:
        the engine's).

        Raises `TypeError`, `ValueError`, `IndexError`, `BusyError` (a page that another request holds, too
        many requests), `PeerLostError` or `ClosedError`; entering the block raises what came of asking:
        `LayoutMismatch`, `RequestRefused` (also when the prefill ranks that were named do not bring every
        layer and head), `TransferTimeout`, `PeerLostError`. Where arguments are wrong, or this rank could not
        ask, the other ranks of a named instance are told by the prefill side.
        """
        peers = tuple(peer) if isinstance(peer, list | tuple) else (peer,)
        try:
            if not peers or len(set(peers)) != len(peers):
                raise ValueError(f"a request names each of its prefill ranks once, and at least one: {peers}")
            self.pool.check()
            if not isinstance(id, str) or not 0 < len(id) <= messages.MOST_ID:
                raise ValueError(f"id must be a str of 1 to {messages.MOST_ID} characters, not {quote(id)}")
            id.encode()  # raises for what is no text
            skip = whole("skip_tokens", skip_tokens)
            ids = page_ids_of(page_ids, self.layout, 0)
            most = self.layout.tokens_in(len(ids))
            count = most if tokens is None else whole("tokens", tokens)
            if not skip <= count <= most:
                raise ValueError(f"skip_tokens <= tokens <= {most} (what {len(ids)} pages hold) must be: {skip}, {count}")
            if count > messages.MOST_TOKENS:
                raise ValueError(f"a request has at most {messages.MOST_TOKENS} tokens, not {count}")
            if isinstance(priority, bool) or not isinstance(priority, int) or not -(1 << 31) <= priority < 1 << 31:
                raise TypeError(f"priority must be an int of 32 bits, not {quote(priority)}")
            self.layout.check_skip(skip)
            written = ids[self.layout.written(skip, count)]
            if is_twice(written):
                raise ValueError("page_ids names a page twice")
            seconds(timeout, self.engine.timeout)
            if not isinstance(data, bytearray | memoryview) and not hasattr(type(data), "__bytes__"):  # bytes(3) are zeros
                raise TypeError(f"data must be bytes, not {quote(data)}")
            ids = ids[: self.layout.pages_of(count)]
            spec = RequestSpec(peers, id, ids, written, count, skip, priority, bytes(data), timeout)
            self.pool.check_free(spec)
            for one in peers:
                self.dispatcher.check(one)
        except BaseException as error:  # checking an argument may raise anything
            if not isinstance(error, TransferError):  # these are no mistake, and it may be asked again
                say_absent(self, self._settings, peers, id, error)
            raise
        return Handle(self, self.pool, self._settings, spec)

    # ---- pages ----

    @property
    def held(self) -> frozenset[int]:
        """Pages that requests hold, those in quarantine included."""
        return frozenset(np.flatnonzero(self.pool.held).tolist())

    async def freed(self, page_ids: Iterable[int]) -> None:
        """Returns when no request holds any of `page_ids` any more: also the end of their quarantine. Raises
        `ClosedError`."""
        await self.pool.freed(page_ids)

    # ---- messages ----

    def receive(self, peer: Peer, message: messages.ToDecoder) -> bool:
        """See `Dispatcher`: an answer is for one of this decoder's requests, or for another decoder's."""
        return self.pool.deliver(peer, message)

    def unreadable(self, peer: Peer, number: int, error: DescriptorError) -> bool:
        """See `Dispatcher`: an answer that cannot be read ends its request."""
        return self.pool.unreadable(peer, number, error)

    # ---- the end ----

    async def aclose(self) -> None:
        """Cancel what is under way, wait for its end (bounded by `revoke_timeout`), free all. Twice is
        silent.

        Raises `QuarantineError` when pages stay quarantined: their memory must not be reused.
        """
        self.pool.close()
        ending = [holder.abandon() for holder in self.pool.holders]
        try:
            if ending:
                await wait_shielded(asyncio.ensure_future(asyncio.wait(ending)))
        finally:
            self.tails.close()
            await self.dispatcher.leave(self)
        if self.pool.holders:
            stuck = list(itertools.chain.from_iterable(holder.spec.written.tolist() for holder in self.pool.holders))
            raise QuarantineError(f"{len(stuck)} pages stay quarantined: {stuck[:8]}", hint="do not reuse them")

    def __repr__(self) -> str:
        return f"<Decoder of {self.engine.address}: {len(self.pool.holders)} requests, {int(self.pool.held.sum())} pages held>"


def _checked(instance: object) -> str:
    if instance is None:
        return ""
    if not isinstance(instance, str):
        raise TypeError(f"instance must be a str, not {quote(instance)}")
    if not 0 < len(instance) <= messages.MOST_INSTANCE:
        raise ValueError(f"instance must have 1 to {messages.MOST_INSTANCE} characters, not {len(instance)}")
    instance.encode()  # raises for what is no text
    return instance
