"""The routes of one subscriber rank: tables of what it passes on, asked for once and kept for the versions
that follow."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

from aiotransfer.errors import DescriptorError
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.protocol.pieces import Pieces
from aiotransfer.weights.roles.mappings import Mappings

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.subscriber.context import Context

MOST_ROUTES = 4  # the latest are kept


class Routes:
    """The routes that one subscriber knows, by digest. `mappings`: memory of the ranks that it passes parts
    on to."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.mappings = Mappings()
        self._known: dict[bytes, bytes] = {}
        self._coming: dict[bytes, tuple[Peer, Pieces, asyncio.Future[bytes]]] = {}

    async def get(self, peer: Peer, digest: bytes, nbytes: int) -> bytes:
        """The route with this digest, of `nbytes` bytes: known, or asked of `peer`. Raises `DescriptorError`.
        Cancel it when the peer is gone."""
        if digest not in self._known:
            came = asyncio.get_running_loop().create_future()
            self._coming[digest] = peer, Pieces(nbytes), came
            self._context.tell(peer, wire.Want(digest))
            try:
                self._known[digest] = await came
            finally:
                self._coming.pop(digest, None)
        route = self._known[digest] = self._known.pop(digest)
        while len(self._known) > MOST_ROUTES:
            del self._known[next(iter(self._known))]
        return route

    def piece(self, peer: Peer, piece: wire.Piece) -> None:
        """Handle a piece of a route, of any peer."""
        holder, pieces, came = self._coming.get(piece.digest, (None, None, None))
        if holder is not peer or pieces is None or came is None or came.done():
            return
        try:
            data = pieces.add(piece)
            if data is None:
                return
            if hashlib.blake2b(data, digest_size=16).digest() != piece.digest:
                raise DescriptorError("a route is not the one that was announced")
            came.set_result(data)
        except DescriptorError as error:
            came.set_exception(error)
