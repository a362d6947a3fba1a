"""The layouts of instances, asked of their ranks in pieces and remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotransfer.errors import DescriptorError
from aiotransfer.weights.layouts.layout import Layout
from aiotransfer.weights.protocol import wire
from aiotransfer.weights.protocol.pieces import Pieces
from aiotransfer.weights.roles.watch import Changes, reach

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.weights.publisher.context import Context

MOST_LAYOUTS = 256  # of instances, remembered


class Layouts:
    """Of one publisher rank, by digest."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: dict[bytes, Layout] = {}
        self._pieces: dict[bytes, tuple[Peer, Pieces]] = {}
        self._changes = Changes()

    async def of(self, entries: list[wire.Entry]) -> Layout:
        """Of the instance with these ranks: known, or asked of one of them. Raises `TransferError`. The
        deadline is the caller's."""
        context, digest = self._context, entries[0].digest
        while digest not in self._known:
            entry = entries[context.rank % len(entries)]
            peer = await reach(context.engine, entry.address, context.seconds)
            context.watch.add(peer, lambda _, error: self._changes.wake())
            if digest not in self._pieces:
                self._pieces[digest] = peer, Pieces(entry.layout_bytes)
                context.tell(peer, wire.Want(digest))

            def came(peer: Peer = peer) -> bool:
                if peer.error is not None:
                    raise peer.error
                return digest not in self._pieces or digest in self._known

            try:
                await self._changes.until(came)
            finally:
                self._pieces.pop(digest, None)
        return self._known[digest]

    def piece(self, peer: Peer, piece: wire.Piece) -> None:
        """A piece of a layout that was asked for. Raises `DescriptorError`."""
        holder, pieces = self._pieces.get(piece.digest, (None, None))
        if holder is not peer or pieces is None:
            return
        try:
            data = pieces.add(piece)
            if data is None:
                return
            layout = Layout.decode(data)
            if bytes.fromhex(layout.digest) != piece.digest:
                raise DescriptorError("a layout is not the one that was announced")
            self._known[piece.digest] = layout
            while len(self._known) > MOST_LAYOUTS:
                del self._known[next(iter(self._known))]
        finally:
            if pieces.over:
                self._pieces.pop(piece.digest, None)
                self._changes.wake()

    def wake(self) -> None:
        """Have those that wait look again, because the publisher is closed."""
        self._changes.wake()
