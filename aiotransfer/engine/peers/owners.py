"""Whose memory a descriptor names, and by which provider it must be reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiotransfer.errors import (
    ProviderUnavailableError,
    RegionError,
    StaleRegionError,
    TransferError,
    again,
)
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.peers.connections import Connections
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import RemoteRegion

MOST_GONE = 1024  # peers that have ended, of which the error is kept


class Owners:
    """One per engine, over the peers of its connections."""

    def __init__(self, engine: Runtime, connections: Connections) -> None:
        self._engine = engine
        self._peers = connections.peers
        self._gone: dict[int, TransferError] = {}  # by incarnation: what peers that were here before ended in

    def up(self) -> tuple[Peer, ...]:
        """Connected peers in order of arrival, inbound ones included."""
        return tuple(peer for peer in self._peers.values() if peer._state == "up")

    def of(self, dst: RemoteRegion) -> Peer:
        """The live peer that owns it. Raises `StaleRegionError`, `PeerLostError` or `RegionError`."""
        if dst._grant.holder not in (0, self._engine.incarnation):
            raise RegionError("the descriptor is of a lease to another engine", peer=dst.owner)
        peer = self._peers.get(dst.incarnation)
        if peer is not None and peer._state == "up":
            return peer
        gone = self._gone.get(dst.incarnation)
        successor = next((p for p in self.up() if str(p.address) == dst.owner), None)
        if successor is not None:
            raise StaleRegionError(
                f"the descriptor is of incarnation {dst.incarnation:016x} of {dst.owner}, which was restarted since",
                peer=dst.owner,
                hint="look the region up again",
            )
        if gone is not None:
            raise again(gone)
        raise RegionError(
            f"this engine is not connected to {dst.owner}, which owns the region", peer=dst.owner, hint="await connect() first"
        )

    def ended(self, peer: Peer) -> None:
        """The peer was lost or closed: what its memory is used for later fails with the same error."""
        if peer._error is not None:
            self._gone[peer.incarnation] = peer._error
            while len(self._gone) > MOST_GONE:
                del self._gone[next(iter(self._gone))]


def check_required(peer: Peer, require: str | None, region: RemoteRegion | None = None) -> None:
    """Raise `ProviderUnavailableError` where another provider than `require` reaches the peer, or this memory
    of it."""
    path = peer.path if region is None else peer.path_for(region)
    if require is not None and path.provider != require:
        raise ProviderUnavailableError(
            f"{peer} is reached by {path.provider}, not by {quote(require)}", attempts=list(path.reasons), peer=str(peer.address)
        )
