"""Errors that the application sees, made from negative statuses of the lane."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from aiotransfer.errors import (
    BrokenError,
    BusyError,
    ClosedError,
    InternalError,
    PeerLostError,
    QuarantineError,
    RailBrokenError,
    RegionError,
    RegistrationError,
    RemoteAccessError,
    StaleRegionError,
    TransferError,
    TransferTimeout,
    again,
    shortage,
)
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import Grant, RemoteRegion


Refusal = tuple[type[TransferError], str, str]  # what is raised, its message, and what to do next


def lacking(engine: Runtime, status: int, what: str, **fields: Any) -> BusyError | None:
    """The error when the lane had no memory, or the operating system nothing left to give it; None when it
    was something else."""
    lib = native.lib
    number = errno.ENOMEM if status == lib.AT_ENOMEM else engine._lane.system_error()[0] if status == lib.AT_EIO else None
    return shortage(number, what, **{name: field for name, field in fields.items() if name != "code"})


def refusal(
    engine: Runtime,
    status: int,
    peer: Peer | None,
    dst: RemoteRegion | None = None,
    grant: Grant | None = None,
    local: RegionView | None = None,
) -> Exception:
    """The error for a negative status of the lane: with the peer, the path, the status and what to do
    next."""
    lib, text = native.lib, native.text(status)
    where: dict[str, Any] = {"code": (status, text)}
    if peer is not None:
        where["peer"] = str(peer.address)
        if peer._path is not None:
            where |= {"provider": peer._path.provider, "rail": 0}
        if status in (lib.AT_EPEER, lib.AT_ESHUT) and peer._error is not None:
            return again(peer._error)
    if status == lib.AT_ETHREAD:
        return RuntimeError("an engine belongs to the thread of its event loop; this is another thread")
    if status == lib.AT_ENOMEM:
        return lacking(engine, status, "the operation cannot be queued", **where) or InternalError(text)
    if status == lib.AT_EIO:
        where["code"] = engine._lane.system_error()
    kind, what, hint = _of_memory(engine, status, peer, dst, grant, local) or _of_engine(engine, status, peer, where["code"][1])
    return kind(what, hint=hint, **where)


def _of_memory(
    engine: Runtime, status: int, peer: Peer | None, dst: RemoteRegion | None, grant: Grant | None, local: RegionView | None
) -> Refusal | None:
    """What is wrong with memory, of ours or of the peer; None for another status."""
    lib = native.lib
    match status:
        case lib.AT_ESTALE:
            grant = dst._grant if dst is not None else grant
            known = grant and engine._revocations.get((grant.incarnation, grant.slot, grant.epoch))
            return (
                StaleRegionError,
                f"the peer's memory is no longer ours to use: {known or 'revoked or closed by its owner'}",
                "look it up again, or ask its owner for a new lease",
            )
        case lib.AT_ECLOSED:
            return RegionError, "the source region is closed", "keep it open until its operations have ended"
        case lib.AT_ESRC | lib.AT_EDST | lib.AT_EINDEX_SRC | lib.AT_EINDEX_DST | lib.AT_EGRANT:
            return RegionError, native.text(status), "compare it with .nbytes and .access of the two regions"
        case lib.AT_EMEMORY:
            which = "" if local is None else f", {local!r} at {local._root._address + local._start:#x},"
            return (
                RegistrationError,
                f"the local memory{which} is not there any more",
                "its file was shortened, or it was unmapped, while it was registered; only this operation has failed",
            )
        case lib.AT_EDEVICE:
            what = f"{peer} is reached by a path that does not take memory of a GPU"
            return RegistrationError, what, "register it with staging=True"
        case _:
            return None


def _of_engine(engine: Runtime, status: int, peer: Peer | None, words: str) -> Refusal:
    """What is wrong with the engine or with the way to the peer. `words`: of the status, or of the operating
    system."""
    lib = native.lib
    match status:
        case lib.AT_EFORK:
            return ClosedError, "the engine is abandoned in this forked child", "open one in the child"
        case lib.AT_ESHUT:
            return ClosedError, "the engine is closed", "open another one"
        case lib.AT_EBUSY:
            return (
                BusyError,
                f"{words}: the bounds are {engine.config.max_queued_operations} operations and "
                f"{engine.config.max_queued_bytes} bytes per peer",
                "await some transfers first, or raise Config.max_queued_operations / max_queued_bytes",
            )
        case lib.AT_EPEER:
            return PeerLostError, f"{peer} is lost", "connect again when it is back"
        case lib.AT_ERAIL:
            what = f"the path to {peer} broke"
            return RailBrokenError, what, "what this operation has landed is not known; connect again"
        case lib.AT_EPROTO:
            return BrokenError, f"{peer} broke the protocol", "do both sides run the same version?"
        case lib.AT_EIO:
            return (
                RemoteAccessError,
                f"the operating system refused a copy to or from memory of {peer}: {words}",
                "its memory may have been unmapped, or its file shortened, or this process lost the right to use it",
            )
        case lib.AT_ETIMEOUT:
            what = f"a transfer to {peer} did not finish in time"
            return TransferTimeout, what, "nothing is known to be broken: try again, or give it a longer timeout="
        case _:
            return InternalError, f"the lane answered {status} ({words})", "please report this"


def unflushed(peer: Peer) -> QuarantineError:
    """For a transfer that cannot be ended: a page holds it up, or its fabric cannot be made to forget it."""
    shm = peer.path.provider == "shm"
    why = "its memory or of ours" if shm else "ours"
    fabric = "" if shm else ", or its fabric cannot tell when it is over"
    return QuarantineError(
        f"a transfer to {peer} was given up, and a page of {why} is withheld{fabric}",
        peer=str(peer.address),
        provider=peer.path.provider,
        hint="do not reuse the source: it stays registered until what was posted of it has retired",
    )
