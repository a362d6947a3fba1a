"""Regions: registered local memory, slices of it, and the grants that peers hold.

A region is open until it is closed; the memory beneath it is given back when three things have happened: no
operation of ours uses it (the lane says so), no peer is inside a write under one of its grants (the active
words say so), and nothing keeps it (a published name). Closing starts all of that and returns; `aclose` waits
for it.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.engine.memory.lease import Lease
from aiotransfer.engine.memory.staging import flush
from aiotransfer.engine.memory.typed import as_numpy, as_torch
from aiotransfer.engine.peers.peer import Peer
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, QuarantineError, RegionError
from aiotransfer.model.descriptor import Grant, RemoteRegion
from aiotransfer.providers.lane import Segment
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.memory.grants import Grants
    from aiotransfer.engine.memory.staging import Staging
    from aiotransfer.engine.runtime.runtime import Runtime

ACCESSES = ("write", "read", "both")
UNSTAGED = 0  # no region of a lane has this number: what names it is refused


class RegionView(Unpicklable):
    """Some bytes of a region: what the local side of an operation names. Slicing is free of copies."""

    _instead = "send region.descriptor.encode()"

    __slots__ = ("_engine", "_id", "_root", "_start", "nbytes")

    _engine: Runtime
    _id: int
    _root: Region
    _start: int
    nbytes: int

    def __getitem__(self, key: slice) -> RegionView:
        """Bytes `[a:b]` of it. Never clamps (`RegionError`); steps and single indexes are a `TypeError`."""
        if type(key) is not slice or key.step is not None:
            raise TypeError(f"a region takes byte ranges [a:b] without a step, not {quote(key)}")
        n = self.nbytes
        start = 0 if key.start is None else index(key.start)
        stop = n if key.stop is None else index(key.stop)
        if not 0 <= start <= stop <= n:
            raise RegionError(f"[{key.start}:{key.stop}] does not lie in a region of {n} bytes")
        view = _new_view(RegionView)
        view._engine = self._engine
        view._id = self._id
        view._root = self._root
        view._start = self._start + start
        view.nbytes = stop - start
        return view

    def __len__(self) -> int:
        return self.nbytes

    def lease(self, peer: Peer, *, access: str = "write") -> Lease:
        """Give `peer` alone the right to write, read or do "both" here, until `await lease.revoke()`.

        Raises `ClosedError` (closed region), `PeerLostError`, `RegionError` (access; a peer of another
        engine) or `TypeError`.
        """
        engine, root = self._engine, self._root
        engine._check()
        if not isinstance(peer, Peer):
            raise TypeError(f"a lease is given to a Peer, not to {type(peer).__name__}")
        if peer._engine is not engine:
            raise RegionError(f"{peer} belongs to another engine")
        peer._check_up()
        root._check_grantable(access)
        return root._lend(self, peer, access)

    @property
    def device(self) -> str:
        """Where the memory is, as torch writes it."""
        return self._root._device

    async def flush(self) -> None:
        """Have kernels that start from now on see what peers have written here and counters have counted.

        Nothing to do for host memory. Staged memory of a GPU (see `Engine.register`) is copied there from the
        host memory that peers write into. Raises `ClosedError` (closed region) or `RegistrationError`
        (refused by the driver).
        """
        root = self._root
        root._engine._check()
        if root._closed:
            raise ClosedError("the region is closed")
        if root._staging is not None:
            root._add_keeper()
            try:
                await root._staging.copy([(self._start, self.nbytes)], to_host=False)
            finally:
                root._release_keeper()
        elif root._device != "cpu":
            await flush(root._device)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.nbytes} bytes at +{self._start} of region {self._root._number & 0xFFFFFFFF}>"


_new_view = object.__new__


class Region(RegionView):
    """Registered local memory. Made by `Engine.register` and `Engine.allocate`."""

    __slots__ = (
        "__weakref__",
        "_access",
        "_address",
        "_closed",
        "_device",
        "_dma_buf",
        "_dtype",
        "_freed",
        "_grants",
        "_home",
        "_keep",
        "_keepers",
        "_leases",
        "_native_busy",
        "_number",
        "_segment",
        "_shape",
        "_staging",
        "_waiters",
        "_writable",
    )

    def __init__(
        self,
        home: Regions,
        address: int,
        nbytes: int,
        *,
        device: str,
        writable: bool,
        keep: object,
        access: str,
        segment: Segment | None = None,
        shape: tuple[int, ...] = (),
        dtype: str = "uint8",
        staging: Staging | None = None,
    ) -> None:
        self._home = home
        self._engine = engine = home.engine
        self._number = engine._lane.add_region(address, nbytes, keep)
        if segment is None and device == "cpu":
            engine._lane.region_lazy(self._number)
        self._id = self._number if staging is None else UNSTAGED
        self._staging = staging
        self._dma_buf: tuple[int, int] | None = None  # of memory on a GPU that is not staged: a descriptor, and where it begins
        self._root = self
        self._start = 0
        self.nbytes = nbytes
        self._address = address
        self._device = device
        self._writable = writable
        self._keep = keep
        self._access = access
        self._segment = segment
        self._shape = shape
        self._dtype = dtype
        self._grants: dict[str, Grant] = {}
        self._leases: dict[Lease, None] = {}
        self._keepers = 0
        self._closed = False
        self._native_busy = False
        self._freed = False
        self._waiters: list[asyncio.Future[None]] = []

    def _on_device(self, ordinal: int, dma_buf: tuple[int, int] | None) -> None:
        lane = self._engine._lane
        self._dma_buf = dma_buf
        if dma_buf is not None:
            lane.hold_descriptor(self._number, dma_buf[0])
        lane.region_on_device(self._number, ordinal, dma_buf)

    # ---- what peers may hold ----

    @property
    def descriptor(self) -> RemoteRegion:
        """A descriptor of the whole region that any connected peer may use (with `access`, default
        "write")."""
        return self._grant("write" if self._access == "auto" else self._access)

    def _grant(self, access: str) -> RemoteRegion:
        self._check_grantable(access)
        grant = self._grants.get(access)
        if grant is None:
            grant = self._grants[access] = self._new_grant(access, 0, self.nbytes, 0)
            self._home.grants.granted[grant.slot] = self, grant
        return RemoteRegion.of(grant)

    def _check_grantable(self, access: str) -> None:
        self._engine._check()
        if self._closed:
            raise ClosedError("the region is closed")
        if access not in ACCESSES:
            raise ValueError(f"access must be one of {ACCESSES}, not {quote(access)}")
        if self._access != "auto" and access not in (self._access, *(("write", "read") if self._access == "both" else ())):
            raise RegionError(f"the region was registered for {self._access!r}, not for {quote(access)}")
        if access != "read" and not self._writable:
            raise RegionError("read-only memory cannot be granted for writing")
        if access != "write" and self._staging is not None:
            raise RegionError(
                f"memory on {self._device} that is staged through host memory cannot be granted for reading",
                hint="a peer cannot fetch its bytes from the GPU: write them to the peer instead",
            )

    def _new_grant(self, access: str, start: int, nbytes: int, holder: int) -> Grant:
        engine = self._engine
        slot, epoch = engine._lane.new_grant()
        return Grant(
            owner=str(engine.address),
            incarnation=engine.incarnation,
            base=self._address + start,
            nbytes=nbytes,
            access=access,
            device=self._device if self._staging is None else "cpu",
            slot=slot,
            epoch=epoch,
            segment=self._number if self._segment is not None else 0,
            segment_offset=start if self._segment is not None else 0,
            keys=(),
            holder=holder,
        )

    def _lend(self, view: RegionView, peer: Peer, access: str) -> Lease:
        grants = self._home.grants
        grant = self._new_grant(access, view._start, view.nbytes, peer.incarnation)
        lease = Lease(self._engine, grants, grant, view.nbytes, peer, self._lease_over)
        self._leases[lease] = None
        grants.granted[grant.slot] = self, grant
        return lease

    # ---- views ----

    def numpy(self) -> Any:
        """The memory as a NumPy array of the shape and dtype it was allocated with; valid as long as it
        lives.

        For dtypes that NumPy lacks (bfloat16, float8) the array is of bytes with one more dimension.
        """
        return as_numpy(self._buffer, self.nbytes, self._shape, self._dtype)

    def torch(self) -> Any:
        """The memory as a torch tensor; valid as long as it lives, also after close."""
        return as_torch(self._buffer, self.nbytes, self._shape, self._dtype)

    def _buffer(self) -> Any:
        if self._staging is not None:
            raise RegionError(f"this region is memory of yours on {self.device}", hint="use the tensor that it was made from")
        if self._segment is None:
            raise RegionError(
                "this region was registered from memory of yours",
                hint="use that object; only memory from engine.allocate() has views",
            )
        return self._segment.buffer

    # ---- the end ----

    @property
    def closed(self) -> bool:
        """Whether new use is refused."""
        return self._closed

    def close(self) -> None:
        """Forbid new use at once and make every descriptor stale; the memory is released when nothing uses it
        any more.

        Until then (see `aclose`) what peers hold may still change it. Twice is silent. A published region
        stays usable by peers until `unpublish`.
        """
        if self._closed:
            return
        self._closed = True
        if not self._keepers:
            self._end()

    def _add_keeper(self) -> None:
        self._keepers += 1

    def _release_keeper(self) -> None:
        self._keepers -= 1
        if self._closed and not self._keepers:
            self._end()

    def _end(self) -> None:
        engine = self._engine
        if not engine._lane.usable:
            return
        self._native_busy = not engine._lane.close_region(self._number)
        if self._native_busy:
            self._home.closing[self._number] = self
        for grant in self._grants.values():
            engine._lane.revoke_grant(grant.slot)
        if self._segment is not None:
            self._segment.close_fd()
        self._home.grants.tell_all(self._grants.values(), "closed by its owner")
        for lease in list(self._leases):
            lease._withdraw("the region was closed by its owner")
            lease._settle()
        self._settle()

    def _abandon(self) -> None:
        """The engine ends: no name keeps it any more."""
        self._keepers = 0
        if not self._closed:
            self.close()
        elif not self._freed:
            self._end()

    def _lease_over(self, lease: Lease) -> None:
        self._leases.pop(lease, None)
        if self._closed and not self._keepers:
            self._settle()

    def _settle(self) -> bool:
        """Look whether everything has let go; True when the memory is free."""
        if self._freed:
            return True
        if self._native_busy:
            return False
        lane, grants = self._engine._lane, self._home.grants
        for access, grant in list(self._grants.items()):
            if lane.grant_active(grant.slot) == 0:
                lane.free_grant(grant.slot)
                grants.granted.pop(grant.slot, None)
                del self._grants[access]
        if self._grants:
            grants.quarantine.add(self)
            return False
        if self._leases:
            return False
        self._let_go()
        return True

    def _let_go(self) -> None:
        """Nothing uses the memory any more, or the lane has ended, and keeps itself what something still
        does."""
        self._closed = self._freed = True
        engine, home = self._engine, self._home
        engine._lane.release_region(self._number)
        while self._grants:  # none, unless the lane has ended
            home.grants.granted.pop(self._grants.popitem()[1].slot, None)
        home.grants.quarantine.discard(self)
        if self._staging is not None:
            self._staging.close()
        if self._segment is not None:
            self._segment.close_fd()
        self._dma_buf = None  # the lane's to close
        self._keep = None
        home.closing.pop(self._number, None)
        home.by_number.pop(self._number, None)
        for waiter in self._waiters:
            if not waiter.done() and not engine._loop.is_closed():
                waiter.set_result(None)
        self._waiters.clear()

    def _fence(self) -> None:
        for lease in list(self._leases):
            lease._fence()
            lease._settle()
        for grant in list(self._grants.values()):
            self._engine._lane.expel_grant(grant.slot)

    async def aclose(self, timeout: float | None = None) -> None:
        """Revoke every descriptor, also published ones, and wait until nothing can change the memory any
        more. A peer that does not confirm this within `drain_timeout` is fenced, where its provider can do
        that.

        Raises `QuarantineError` when that cannot be proved within `timeout` seconds (default: the engine's);
        the memory then stays quarantined until it can.
        """
        engine = self._engine
        self._home.unpublish(self)
        self.close()
        if self._settle() or not engine._lane.usable:
            return
        loop = engine._loop
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append(waiter)
        seconds = engine._seconds(timeout)
        try:
            async with Timeout(seconds):
                await waiter
        except TimeoutError:
            self._fence()
            if self._settle():
                return
            raise QuarantineError(
                f"a peer may still be writing into this region of {self.nbytes} bytes",
                hint="the memory stays quarantined and is released when the peer moves on or dies",
            ) from None

    def __enter__(self) -> Region:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._closed and not self._freed and self._engine._lane.usable and not self._settle() and kind is None:
            warnings.warn(
                f"{self!r} left its `with` while still in use; use `async with` to wait", ResourceWarning, stacklevel=2
            )

    async def __aenter__(self) -> Region:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        kind = "staged" if self._staging is not None else "allocated" if self._segment is not None else "registered"
        return f"<Region {self.nbytes} bytes {kind} on {self._device}, {state}>"


class Regions:
    """The regions of one engine. `unpublish` has every name of a region forgotten."""

    def __init__(self, engine: Runtime, grants: Grants, unpublish: Callable[[Region], None]) -> None:
        self.engine = engine
        self.grants = grants
        self.unpublish = unpublish
        self.by_number: dict[int, Region] = {}
        self.closing: dict[int, Region] = {}  # those that operations of ours still use

    def add(self, region: Region) -> Region:
        """Keep a region by its number until its memory is given back."""
        self.by_number[region._number] = region
        return region

    def unused(self, number: int) -> None:
        """The lane says that no operation of ours uses a closed region any more."""
        region = self.closing.pop(number, None)
        if region is not None:
            region._native_busy = False
            region._settle()


class Spot(NamedTuple):
    """Where a region or a slice of one lies: `start` bytes into `region`, whose first byte is at the address
    `begin`. `is_open`, `is_writable`, `shape` (empty: bytes without one) and `dtype` are the whole
    region's."""

    region: Region
    start: int
    begin: int
    is_open: bool
    is_writable: bool
    shape: tuple[int, ...]
    dtype: str

    @property
    def address(self) -> int:
        """The address of the first byte."""
        return self.begin + self.start


def spot_of(view: RegionView) -> Spot:
    """Where it lies, for components; of closed memory, where it lay."""
    root = view._root
    return Spot(root, view._start, root._address, not root._closed, root._writable, root._shape, root._dtype)
