"""From a negative status of the lane to the error a user sees."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from aiotransfer.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    InternalError,
    PeerLostError,
    RailBrokenError,
    RegionError,
    RemoteAccessError,
    StaleRegionError,
    TransferTimeout,
    again,
    shortage,
)
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.base import EngineBase
    from aiotransfer.engine.peer import Peer
    from aiotransfer.engine.region import RegionView
    from aiotransfer.model.descriptor import Grant, RemoteRegion


def lacking(engine: EngineBase, status: int, what: str, **fields: Any) -> BusyError | None:
    """The error when the lane had no memory, or the operating system nothing left to give it; None when it was something else."""
    lib = native.lib
    number = errno.ENOMEM if status == lib.AT_ENOMEM else engine._lane.system_error()[0] if status == lib.AT_EIO else None
    return shortage(number, what, **fields)


def refusal(
    engine: EngineBase,
    status: int,
    peer: Peer | None,
    src: RegionView | None = None,
    dst: RemoteRegion | None = None,
    grant: Grant | None = None,
) -> Exception:
    """The error for a negative status of the lane."""
    lib = native.lib
    where: dict[str, Any] = {}
    if peer is not None:
        where = {"peer": str(peer.address), "provider": peer._path.provider if peer._path is not None else None}
        if status in (lib.AT_EPEER, lib.AT_ESHUT) and peer._error is not None:
            return again(peer._error)
    text = native.text(status)
    match status:
        case lib.AT_ETHREAD:
            return RuntimeError("an engine belongs to the thread of its event loop; this is another thread")
        case lib.AT_EFORK | lib.AT_ESHUT:
            return ClosedError(f"the engine is {'abandoned in this forked child' if status == lib.AT_EFORK else 'closed'}")
        case lib.AT_ESTALE:
            grant = dst._grant if dst is not None else grant
            known = grant and engine._revocations.get((grant.incarnation, grant.slot, grant.epoch))
            return StaleRegionError(
                f"the peer's memory is no longer ours to use: {known or 'revoked or closed by its owner'}",
                hint="look it up again, or ask its owner for a new lease",
                **where,
            )
        case lib.AT_ECLOSED:
            return RegionError("the source region is closed", **where)
        case lib.AT_ESRC | lib.AT_EDST | lib.AT_EINDEX_SRC | lib.AT_EINDEX_DST | lib.AT_EGRANT:
            return RegionError(text, **where)
        case lib.AT_ENOMEM:
            return lacking(engine, status, "the operation cannot be queued", **where) or InternalError(text)
        case lib.AT_EBUSY:
            return BusyError(
                f"{text}: the bounds are {engine.config.max_queued_operations} operations and "
                f"{engine.config.max_queued_bytes} bytes per peer",
                hint="await some transfers first, or raise Config.max_queued_operations / max_queued_bytes",
                **where,
            )
        case lib.AT_EPEER:
            return PeerLostError(f"{peer} is lost", **where)
        case lib.AT_ERAIL:
            return RailBrokenError(f"the path to {peer} broke", **where)
        case lib.AT_EPROTO:
            return BrokenError(f"{peer} broke the protocol", **where)
        case lib.AT_EIO:
            number, words = engine._lane.system_error()
            return RemoteAccessError(
                f"the operating system refused to write into {peer}: {words}",
                code=(number, words),
                hint="its memory may have been unmapped, or this process lost the right to write there",
                **where,
            )
        case lib.AT_ETIMEOUT:
            return TransferTimeout(f"a transfer to {peer} did not finish in time", **where)
        case _:
            return InternalError(f"the lane answered {status} ({text})", hint="please report this", **where)
