"""Submitting one operation: its operands are checked, then it is posted at once, or later.

Every call that moves bytes between one local and one remote region comes here, unless it was posted by one
native call over integers (`operations`). A descriptor that has not been used here before must first be bound
to its owner's memory, which takes a question to the owner: its operation waits for that (`deferred`) and is
then posted the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiotransfer.engine.memory.region import RegionView
from aiotransfer.engine.operations.annotate import Label, annotated
from aiotransfer.engine.operations.refusals import refusal
from aiotransfer.engine.operations.staged import Stager
from aiotransfer.engine.operations.transfer import Transfer, blank, finished
from aiotransfer.engine.peers.owners import check_required
from aiotransfer.engine.peers.peer import Peer
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.errors import RegionError
from aiotransfer.model.descriptor import RemoteRegion
from aiotransfer.providers import native
from aiotransfer.providers.port import Binding

if TYPE_CHECKING:
    from aiotransfer.engine.operations.deferred import Deferred
    from aiotransfer.engine.operations.inflight import InFlight
    from aiotransfer.engine.peers.owners import Owners
    from aiotransfer.engine.runtime.runtime import Runtime


Ends = tuple[RegionView, RemoteRegion]  # memory of ours and of the peer, in whichever direction bytes go
Used = tuple[RegionView | None, RemoteRegion | None, object]  # the same and the binding that was used; a signal has none of them
Post = Callable[[int], int]


class Submitter:
    """One per engine. `owners` says whose memory it is, `deferred` takes what cannot be posted yet, `flight`
    what goes on."""

    def __init__(self, engine: Runtime, owners: Owners, deferred: Deferred, flight: InFlight) -> None:
        self.engine = engine
        self.owners = owners
        self.deferred = deferred
        self.flight = flight

    def addressee(self, dst: RemoteRegion | Peer) -> Peer:
        """The live peer that a signal goes to. Raises `TypeError`, `ValueError`, or what ended the peer."""
        peer = dst if isinstance(dst, Peer) else self.owners.of(dst) if isinstance(dst, RemoteRegion) else None
        if peer is None:
            raise TypeError(f"a signal goes to a Peer or a RemoteRegion, not to {type(dst).__name__}")
        if peer._engine is not self.engine:
            raise ValueError(f"{peer} belongs to another engine")
        peer._check_up()
        return peer

    def check_views(self, local: RegionView, remote: RemoteRegion, access: str = "write") -> None:
        """Raise `TypeError` or `RegionError` unless `local` is open memory of ours and `remote` grants
        `access` ("write" or "read"). In any thread."""
        here, there = ("source", "destination") if access == "write" else ("destination", "source")
        self.check_local(local, here)
        if not isinstance(remote, RemoteRegion):
            raise TypeError(f"the {there} must be a RemoteRegion, not {type(remote).__name__}")
        if access == "read" and not local._root._writable:
            raise RegionError("the destination is read-only memory")
        if remote.access not in (access, "both"):
            doing = "writing" if access == "write" else "reading"
            raise RegionError(f"the {there} does not grant {doing} (its access is {remote.access!r})")

    def check_local(self, local: RegionView, name: str) -> None:
        """Raise `TypeError` or `RegionError`, which call it by this name, unless it is open memory of this
        engine."""
        if not isinstance(local, RegionView):
            raise TypeError(f"the {name} must be a Region or a slice of one, not {type(local).__name__}")
        if local._engine is not self.engine:
            raise RegionError(f"the {name} region belongs to another engine")
        if local._root._closed:
            raise RegionError(f"the {name} region is closed")

    def owners_of(self, regions: Sequence[RemoteRegion], require: str | None) -> list[Peer]:
        """The live peer that owns each. Raises as `Owners.of` does, and `ProviderUnavailableError` as
        `require` says."""
        owners = [self.owners.of(region) for region in regions]
        if require is not None:
            for region, peer in zip(regions, owners, strict=True):
                check_required(peer, require, region)
        return owners

    def submit(
        self, ends: Ends, nbytes: int, timeout: float | None, require: str | None, label: Label, post: Post, stage: Stager | None
    ) -> Transfer:
        """Post it by `post`, which takes the number of the remote region; later, where that is not known or
        there is a stage."""
        src: RegionView = ends[0]
        dst: RemoteRegion = ends[1]
        if timeout is not None:
            seconds(timeout)
        peer = self.owners.of(dst)
        if require is not None:
            check_required(peer, require, dst)
        bound: Binding | None = dst._box.bound
        if bound is None or not bound.good(self.engine, peer) or stage is not None:
            return self._later(blank(self.engine, nbytes, (peer,), ends, label), ends, peer, timeout, require, post, stage)
        result = post(bound.remote)
        return self.outcome(result, nbytes, peer, timeout, (src, dst, bound), label)

    def outcome(self, result: int, nbytes: int, peer: Peer, timeout: float | None, held: Used, label: Label) -> Transfer:
        """The transfer of an operation that was posted with this result, and holds `held` until it ends.
        Raises the error of a refusal."""
        engine = self.engine
        if result > 1:
            return self.flight.pending(result, nbytes, (peer,), timeout, held, label)
        if result == native.lib.AT_EMEMORY:  # part of it may have landed: no refusal, but how the operation ended
            failed: Transfer = blank(engine, nbytes, (peer,), None, label)
            failed._fail(0, refusal(engine, result, peer, held[1], local=held[0]))
            return failed
        if result < 0:
            raise annotated(refusal(engine, result, peer, held[1]), label, nbytes, (peer,))
        if result:
            engine._spend_budget()
        return finished(engine, peer, nbytes)

    def _later(
        self, transfer: Transfer, ends: Ends, peer: Peer, timeout: float | None, require: str | None, post: Post,
        stage: Stager | None,
    ) -> Transfer:  # fmt: skip
        src: RegionView = ends[0]
        dst: RemoteRegion = ends[1]

        def bound() -> tuple[int, object]:
            return post(dst._box.bound.remote), (src, dst, dst._box.bound)

        def refused(result: int) -> Exception:
            return refusal(self.engine, result, peer, dst, local=src)

        self.deferred.post_later(transfer, [(dst, peer)], timeout, bound, refused, stage, require)
        return transfer
