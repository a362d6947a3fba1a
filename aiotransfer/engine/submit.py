"""Submitting operations: the synchronous path, and what leaves it.

This is the written exception to the layers: `write` is one native call over integers, with no planner, ledger or record on the
way. Everything that can be refused locally is refused by that call (bounds, closed, stale, lost), and only then does Python work
out which error to raise. Only operations that go on after the call enter the ledger.

A descriptor that has not been used here before must first be bound to its owner's memory, which takes a question to the owner.
Its operation waits for that in a task of the engine and is then submitted the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiotransfer.engine.arguments import RESERVED, check_imm
from aiotransfer.engine.base import seconds
from aiotransfer.engine.notes import Deed, noted
from aiotransfer.engine.outcomes import Outcomes
from aiotransfer.engine.peer import Peer
from aiotransfer.engine.refusals import refusal
from aiotransfer.engine.region import RegionView
from aiotransfer.engine.staged import Stager, stager
from aiotransfer.engine.transfer import DONE, PENDING, Transfer, blank
from aiotransfer.engine.unbound import Unbound
from aiotransfer.errors import (
    ProviderUnavailableError,
    RegionError,
    StaleRegionError,
    TransferError,
    again,
)
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.providers import native
from aiotransfer.providers.port import Binding

if TYPE_CHECKING:
    from aiotransfer.engine.connections import Connections
    from aiotransfer.engine.paths import Paths

_new: Callable[[type[Transfer]], Transfer] = object.__new__


class Submitter(Outcomes):
    """The part of `Engine` that moves bytes."""

    _connections: Connections
    _paths: Paths
    _binding: Unbound
    _gone: dict[int, TransferError]  # by incarnation: what peers that were here before ended in

    @property
    def peers(self) -> tuple[Peer, ...]:
        """Connected peers in order of arrival, inbound ones included."""
        return tuple(p for p in self._connections.peers.values() if p._state == "up") if self._state != "new" else ()

    # ---- write ----

    def write(
        self,
        src: RegionView,
        dst: RemoteRegion,
        *,
        imm: int | None = None,
        timeout: float | None = None,
        require: str | None = None,
    ) -> Transfer:
        """Copy `src` into `dst` (equal lengths in bytes); with `imm`, then count one arrival of that value at its owner.

        Returns at once with an awaitable `Transfer`. Raises `RegionError` (bounds, closed, access), `StaleRegionError`,
        `PeerLostError`, `BusyError`, `ClosedError`, `TypeError` or `ValueError` before anything is posted.
        """
        if timeout is not None:
            seconds(timeout)
        try:
            n = src.nbytes
            bound = dst._box.bound
            if src._engine is self and bound.engine is self and n == dst.nbytes and require is None:
                if imm is None:
                    value = -1
                elif type(imm) is int and 0 <= imm < RESERVED:
                    value = imm
                else:
                    value = check_imm(imm)
                result = native.lib.at_write(self._p, bound.remote, dst._start, src._id, src._start, n, value)
                if 0 <= result <= 1:
                    done = _new(Transfer)
                    done._engine = self
                    done._peer = bound.peer
                    done.nbytes = n
                    done._state = 0
                    if result:
                        self._turn_is_due()
                    return done
                if result > 1:
                    pending: Transfer = self._pending(result, n, (bound.peer,), timeout, (src._root, bound), ("write", value))
                    return pending
        except AttributeError:
            pass
        return self._write_slow(src, dst, imm, timeout, require)

    def _write_slow(
        self, src: RegionView, dst: RemoteRegion, imm: int | None, timeout: float | None, require: str | None
    ) -> Transfer:
        self._check_operands(src, dst)
        if src.nbytes != dst.nbytes:
            raise ValueError(f"the source has {src.nbytes} bytes, the destination {dst.nbytes}")
        value = -1 if imm is None else check_imm(imm)
        start, number, offset, n = src._start, src._root._number, dst._start, src.nbytes
        return self._submit(
            src, dst, n, timeout, require, ("write", value),
            lambda remote: native.lib.at_write(self._p, remote, offset, number, start, n, value), stager(src),
        )  # fmt: skip

    # ---- read ----

    def read(
        self, src: RemoteRegion, dst: RegionView, *, timeout: float | None = None, require: str | None = None
    ) -> Transfer:
        """Copy `src`, memory of a peer, into `dst` (equal lengths in bytes). Nothing tells the peer.

        The bytes are those of some moment during the transfer; a read of memory that is being written sees a mixture. Errors as
        for `write`; a read whose right was revoked before it ended raises `StaleRegionError`.
        """
        self._check_operands(dst, src, "read")
        if src.nbytes != dst.nbytes:
            raise ValueError(f"the source has {src.nbytes} bytes, the destination {dst.nbytes}")
        start, number, offset, n = dst._start, dst._root._number, src._start, src.nbytes
        return self._submit(
            dst, src, n, timeout, require, ("read", -1),
            lambda remote: native.lib.at_read(self._p, remote, offset, number, start, n), stager(dst, lands=True),
        )  # fmt: skip

    # ---- signal ----

    def signal(
        self, dst: RemoteRegion | Peer, imm: int, *, timeout: float | None = None, require: str | None = None
    ) -> Transfer:
        """An immediate with no bytes, to a peer or to the owner of a region."""
        self._check()
        value = check_imm(imm)
        if timeout is not None:
            seconds(timeout)
        peer = self._addressee(dst)
        self._check_required(peer, require)
        result = native.lib.at_signal(self._p, peer.path.lane_peer, value)
        return self._outcome(result, 0, peer, timeout, None, None, None, ("signal", value))

    # ---- common ----

    def _addressee(self, dst: RemoteRegion | Peer) -> Peer:
        peer = dst if isinstance(dst, Peer) else self._owner(dst) if isinstance(dst, RemoteRegion) else None
        if peer is None:
            raise TypeError(f"a signal goes to a Peer or a RemoteRegion, not to {type(dst).__name__}")
        if peer._engine is not self:
            raise ValueError(f"{peer} belongs to another engine")
        peer._check_up()
        return peer

    def _check_operands(self, local: RegionView, remote: RemoteRegion, access: str = "write") -> None:
        self._check()
        self._check_views(local, remote, access)

    def _check_views(self, local: RegionView, remote: RemoteRegion, access: str = "write") -> None:
        here, there = ("source", "destination") if access == "write" else ("destination", "source")
        self._check_local(local, here)
        if not isinstance(remote, RemoteRegion):
            raise TypeError(f"the {there} must be a RemoteRegion, not {type(remote).__name__}")
        if access == "read" and not local._root._writable:
            raise RegionError("the destination is read-only memory")
        if remote.access not in (access, "both"):
            doing = "writing" if access == "write" else "reading"
            raise RegionError(f"the {there} does not grant {doing} (its access is {remote.access!r})")

    def _check_local(self, local: RegionView, name: str) -> None:
        if not isinstance(local, RegionView):
            raise TypeError(f"the {name} must be a Region or a slice of one, not {type(local).__name__}")
        if local._engine is not self:
            raise RegionError(f"the {name} region belongs to another engine")
        if local._root._closed:
            raise RegionError(f"the {name} region is closed")

    def _check_required(self, peer: Peer, require: str | None, region: RemoteRegion | None = None) -> None:
        path = peer.path if region is None else peer.path_for(region)
        if require is not None and path.provider != require:
            raise ProviderUnavailableError(
                f"{peer} is reached by {path.provider}, not by {require!r}", attempts=list(path.reasons), peer=str(peer.address)
            )

    def _submit(
        self,
        src: RegionView,
        dst: RemoteRegion,
        nbytes: int,
        timeout: float | None,
        require: str | None,
        deed: Deed,
        post: Callable[[int], int],
        stage: Stager | None,
    ) -> Transfer:
        if timeout is not None:
            seconds(timeout)
        peer = self._owner(dst)
        self._check_required(peer, require, dst)
        bound: Binding | None = dst._box.bound
        if bound is None or not bound.good(self, peer) or stage is not None:
            return self._submit_later(src, dst, nbytes, timeout, require, peer, deed, post, stage)
        result = post(bound.remote)
        return self._outcome(result, nbytes, peer, timeout, src, dst, bound, deed)

    def _outcome(
        self,
        result: int,
        nbytes: int,
        peer: Peer,
        timeout: float | None,
        src: RegionView | None,
        dst: RemoteRegion | None,
        bound: object,
        deed: Deed,
    ) -> Transfer:
        if result > 1:
            return self._pending(result, nbytes, (peer,), timeout, (src, dst, bound), deed)
        if result == native.lib.AT_EMEMORY:  # part of it may have landed: no refusal, but how the operation ended
            failed: Transfer = blank(self, nbytes, (peer,), None, deed)
            failed._fail(0, refusal(self, result, peer, dst, local=src))
            return failed
        if result < 0:
            raise noted(refusal(self, result, peer, dst), deed, nbytes, (peer,))
        if result:
            self._turn_is_due()
        done = _new(Transfer)
        done._engine, done._peer, done.nbytes, done._state = self, peer, nbytes, DONE
        return done

    def _submit_later(
        self,
        src: RegionView,
        dst: RemoteRegion,
        nbytes: int,
        timeout: float | None,
        require: str | None,
        peer: Peer,
        deed: Deed,
        post: Callable[[int], int],
        stage: Stager | None,
    ) -> Transfer:
        transfer: Transfer = blank(self, nbytes, (peer,), (src, dst), deed)

        def bound() -> tuple[int, object]:
            return post(dst._box.bound.remote), (src, dst, dst._box.bound)

        def refused(result: int) -> Exception:
            return refusal(self, result, peer, dst, local=src)

        self._bind_then(transfer, [(dst, peer)], timeout, bound, refused, stage, require)
        return transfer

    def _bind_then(
        self,
        transfer: Transfer,
        regions: Sequence[tuple[RemoteRegion, Peer]],
        timeout: float | None,
        post: Callable[[], tuple[int, object]],
        refuse: Callable[[int], Exception],
        stager: Stager | None,
        require: str | None,
    ) -> None:
        """Ask the owners, fetch what is staged, then post: its result, and what the operation keeps alive.

        What waits here counts against the bounds of `Config` as what is queued does, but by itself. Bytes of a scatter to several
        peers belong to none of them. Raises `BusyError`.
        """
        left = self._seconds(timeout)
        peers = tuple(dict.fromkeys(peer for _, peer in regions))
        nbytes = transfer.nbytes if len(peers) == 1 else 0
        full = self._binding.take(peers, nbytes)
        if full is not None:
            raise refusal(self, native.lib.AT_EBUSY, full)
        deadline = self._loop.time() + left
        if stager is not None:
            transfer._stage = stager()

        async def go() -> None:
            try:
                for region, peer in regions:
                    await self._paths.bind_within(region, peer, deadline - self._loop.time())
                    self._check_required(peer, require, region)  # which memory takes which path is known only now
                if transfer._state == PENDING and transfer._stage is not None:
                    await self._fetch(transfer, transfer._stage, deadline)
                if transfer._state != PENDING:
                    return
                result, keep = post()
            except Exception as error:  # it belongs to the task that awaits the transfer
                result, keep = 0, again(error)  # several may have waited for one answer
            if transfer._state != PENDING:
                return
            if isinstance(keep, Exception):
                transfer._fail(0, keep)
            elif result > 1:
                transfer._keep = keep
                self._admit(transfer, result, deadline)
            elif result < 0:
                transfer._fail(0, refuse(result))
            elif transfer._stage is not None and transfer._stage.lands:
                await self._land(transfer, transfer._stage)
            else:
                transfer._end(DONE, transfer.nbytes, None)

        self._background(go(), transfer).add_done_callback(lambda _: self._binding.give(peers, nbytes))

    def _owner(self, dst: RemoteRegion) -> Peer:
        """The live peer that owns it. Raises `StaleRegionError`, `PeerLostError` or `RegionError`."""
        if dst._grant.holder not in (0, self.incarnation):
            raise RegionError("the descriptor is of a lease to another engine", peer=dst.owner)
        peer = self._connections.peers.get(dst.incarnation)
        if peer is not None and peer._state == "up":
            return peer
        gone = self._gone.get(dst.incarnation)
        successor = next((p for p in self.peers if str(p.address) == dst.owner), None)
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
