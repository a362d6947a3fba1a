"""Prepared operations: checked and resolved once, then posted by one native call each.

The native plan holds ids. Every post looks them up again natively, so a region closed, a grant revoked or a
peer lost in the meantime is refused as the plain call would refuse it. A plan over a region whose owner was
never asked yet cannot be resolved when it is made: its first post asks, in a task of the engine, and makes
the native plan then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.engine.operations.annotate import annotated, at_target
from aiotransfer.engine.operations.refusals import refusal
from aiotransfer.engine.operations.staged import Stager
from aiotransfer.engine.operations.transfer import Transfer, blank
from aiotransfer.engine.runtime.arguments import RESERVED, check_imm
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import TransferError
from aiotransfer.providers import native
from aiotransfer.providers.port import Binding

if TYPE_CHECKING:
    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.engine.operations.submit import Submitter
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.runtime.runtime import Runtime
    from aiotransfer.model.descriptor import RemoteRegion

_post: Any = getattr(native.lib, "at_plan_post", None)
_new: Callable[[type[Transfer]], Transfer] = object.__new__
Build = Callable[[Any], Any]  # (status out) -> native plan or NULL; all regions are bound


class Plan(Unpicklable):
    """A prepared operation. Made by `prepare_write`, `prepare_pages`, `prepare_scatter_pages` and
    `PeerGroup.scatter_plan`."""

    __slots__ = (
        "__weakref__", "_build", "_engine", "_keep", "_local", "_made", "_native", "_peer", "_peers", "_regions", "_require",
        "_stage", "_submitter", "_targets", "_what", "nbytes",
    )  # fmt: skip

    def __init__(
        self,
        submitter: Submitter,
        nbytes: int,
        regions: Sequence[RemoteRegion],
        targets: Sequence[Peer],
        build: Build,
        *,
        what: str,
        stage: Stager | None = None,
        require: str | None = None,
        local: RegionView | None = None,
    ) -> None:
        engine: Runtime = submitter.engine
        self._engine = engine
        self._submitter = submitter
        self._local = local
        self.nbytes = nbytes
        self._regions = regions
        self._build = build
        self._peers: tuple[Peer, ...] = tuple(dict.fromkeys(targets))
        self._peer = self._peers[0] if len(self._peers) == 1 else None
        self._what = what
        self._targets = targets if what in ("scatter", "barrier") else None
        self._stage = stage
        self._require = require
        self._made: Any = native.ffi.NULL
        self._native: Any = native.ffi.NULL  # the same, where nothing has to happen before it is posted
        self._keep: list[Binding] = []
        if all(_is_bound(engine, region) for region in regions):
            self._resolve()

    def post(self, *, imm: int | None = None, timeout: float | None = None) -> Transfer:
        """Post it once more; posts may overlap. Errors as of the plain call, at the same places.

        `imm`: the immediate that is counted as by the plain call (None: none). `timeout`: seconds (None: the
        engine's).
        """
        engine = self._engine
        if imm is None:
            value = -1
        elif type(imm) is int and 0 <= imm < RESERVED:
            value = imm
        else:
            value = check_imm(imm)
        if timeout is not None:
            seconds(timeout)
        result = _post(engine._p, self._native, value)
        if 0 <= result <= 1:
            done: Transfer = _new(Transfer)
            done._engine = engine
            done._peer = self._peer
            done.nbytes = self.nbytes
            done._state = 0
            if result:
                engine._spend_budget()
            return done
        return self._post_slow(result, value, timeout)

    def _post_slow(self, result: int, value: int, timeout: float | None) -> Transfer:
        engine = self._engine
        if result > 1:
            flight, label = self._submitter.flight, (self._what, value)
            return flight.pending(result, self.nbytes, self._peers, timeout, self, label, self._targets)
        engine._check()
        if result == native.lib.AT_EMEMORY:  # part of it may have landed: no refusal, but how the operation ended
            failed: Transfer = blank(engine, self.nbytes, self._peers, None, (self._what, value))
            failed._fail(0, self._refusal(result))
            return failed
        if self._native != native.ffi.NULL and not self._moved():
            raise annotated(self._refusal(result), (self._what, value), self.nbytes, self._peers)
        if self._stage is None or self._moved():
            self._native = self._made = native.ffi.NULL
        transfer: Transfer = blank(engine, self.nbytes, self._peers, self, (self._what, value), self._targets)

        def post() -> tuple[int, object]:
            self._resolve()
            return int(_post(engine._p, self._made, value)), self

        pairs = [(region, self._submitter.owners.of(region)) for region in self._regions]
        self._submitter.deferred.post_later(transfer, pairs, timeout, post, self._refusal, self._stage, self._require)
        return transfer

    def _moved(self) -> bool:
        """Whether a path that it was prepared for has been given up for another one."""
        return any(bound.path.dead and bound.peer._state == "up" for bound in self._keep)

    def _resolve(self) -> None:
        if self._made != native.ffi.NULL:
            return
        status = native.ffi.new("int *")
        pointer = self._build(status)
        if pointer == native.ffi.NULL:
            raise self._refusal(int(status[0]))
        self._keep = [region._box.bound for region in self._regions]
        self._made = native.ffi.gc(pointer, native.lib.at_plan_free)
        if self._stage is None:
            self._native = self._made

    def _refusal(self, status: int) -> Exception:
        engine = self._engine
        index = 0 if self._targets is None else int(native.lib.at_lane_detail(engine._p))
        peer = self._peers[0] if self._targets is None else self._targets[index]
        region = self._regions[index] if self._regions else None
        if region is not None:
            try:
                peer = self._submitter.owners.of(region)
            except TransferError as better:
                return better
        error = refusal(engine, status, peer, region, local=self._local)
        return error if self._targets is None else at_target(index, error)

    def __repr__(self) -> str:
        who = "several peers" if self._peer is None else self._peer.name or self._peer.address
        return f"<Plan {self.nbytes} bytes, {who}>"


def _is_bound(engine: object, region: RemoteRegion) -> bool:
    bound = region._box.bound
    return bound is not None and bound.peer._state == "up" and bound.good(engine, bound.peer)
