"""One engine's lane, typed.

The engine's hot path calls the extension's functions directly with `Lane.pointer` (one attribute, one call);
everything less frequent goes through the methods here.
"""

from __future__ import annotations

import collections
import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aiotransfer.config import Config
from aiotransfer.errors import SHORTAGES, BusyError, InternalError, RegistrationError, shortage
from aiotransfer.providers import native
from aiotransfer.providers.elsewhere import Descriptors
from aiotransfer.providers.holdings import Holdings
from aiotransfer.providers.host.free_memory import LEAST, room

ACCESS = {"write": 1, "read": 2, "both": 3}
_REFUSED = "memfd_create, eventfd and epoll must be permitted here (a seccomp filter?)"
_OF_MEMORY = {
    errno.EMFILE: "raise `ulimit -n`: each allocation needs a descriptor",
    errno.EFBIG: "raise `ulimit -f`: it bounds shared memory as well",
    errno.EAGAIN: "raise `ulimit -l`: this process locks all its memory (mlockall)",
}
THREAD_INLINE = 64 << 10  # progress="thread": what is still copied inside the call


class Event(NamedTuple):
    """One thing that happened: an operation ended, arrivals came, a peer died, a region is free."""

    kind: int
    id: int
    status: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which is never called on an event


class Lane:
    """The C lane, with what it uses (`holdings`); `free` once, after all paths are closed. A forgotten one is
    ended like that."""

    __slots__ = (
        "__weakref__", "_closing", "_dropped", "_husk", "_thread", "cpus_for", "events", "fd", "holdings", "pointer", "waiting"
    )  # fmt: skip

    def __init__(self, incarnation: int, config: Config, *, progress: str = "auto", threadless: bool = False) -> None:
        native.require()
        lib = native.lib
        settings = native.ffi.new("at_lane_config *")
        settings.inline_bytes = min(config.inline_bytes, THREAD_INLINE) if progress == "thread" else config.inline_bytes
        settings.turn_ns = int(config.turn_seconds * 1e9)
        settings.spin_ns = int(config.spin_seconds * 1e9)
        settings.max_ops = config.max_queued_operations
        settings.max_bytes = config.max_queued_bytes
        settings.early_values = config.early_values
        settings.flags = {"auto": 0, "loop": lib.AT_LANE_LOOP, "thread": lib.AT_LANE_THREAD}[progress]
        settings.flags |= lib.AT_LANE_NO_THREAD if threadless else 0
        pointer = native.lib.at_lane_new(incarnation, settings)
        if pointer == native.ffi.NULL:
            number = native.ffi.errno
            raise shortage(number, "no engine can be opened") or BusyError(
                f"no engine can be opened: {os.strerror(number)}", code=(number, os.strerror(number)), hint=_REFUSED
            )
        self.pointer: Any = pointer
        self.holdings = Holdings(pointer, config.drain_timeout)
        self._husk = self.holdings.husk
        weakref.finalize(self, self.holdings.end).atexit = False  # at exit it is told all together
        self.events: Any = native.lib.at_lane_events(pointer)
        self.fd: int = native.lib.at_lane_fd(pointer)
        self.waiting: dict[int, Callable[[], None]] = {}  # by peer: for news of its connection
        self.cpus_for: Callable[[str], Sequence[int]] | None = None  # by the name of a NIC; empty: any
        self._thread = threading.get_ident()
        self._dropped: collections.deque[int] = collections.deque()  # remote regions whose last user was another thread's
        self._closing: list[int] = []  # remote regions that operations still used when they were closed

    def quiet(self) -> bool:
        """Refuse all work. Have the lane's threads left, and is no peer inside a write? Does not wait."""
        return not self.usable or self.holdings.stop(0.0) == (True, 0)

    def free(self, seconds: float | None = None) -> None:
        """Destroy the lane, after so many seconds at most (None: `drain_timeout`). What it uses is let go, or
        kept for ever with a warning. Later calls through this object do nothing."""
        self.pointer = None  # first: no call may begin while it is freed
        self.holdings.end(seconds)

    def abandon(self) -> None:
        """Another thread is still in a call, after it has been waited for: nothing is freed."""
        self.holdings.abandon()

    @property
    def usable(self) -> bool:
        """False once freed, and in a forked child."""
        return self.holdings.usable

    @property
    def forked(self) -> bool:
        """Whether the lane was made by a parent of this process."""
        return self.holdings.forked

    def poll(self) -> list[Event]:
        """Drain up to one batch of events; starts a new loop turn."""
        n = native.lib.at_poll(self.pointer)
        if n <= 0:
            return []
        e = self.events
        return [Event(e.kind[i], e.id[i], e.status[i], e.count[i]) for i in range(n)]

    def news(self, peer: int) -> None:
        """Bytes get through to a peer, or its connection broke."""
        if (call := self.waiting.pop(peer, None)) is not None:
            call()

    def place(self, rail: Any, nic: str) -> None:
        """Have the threads that serve a rail run near its NIC, where `cpus_for` says so. Reads files; any
        thread."""
        if self.cpus_for is not None and (cpus := self.cpus_for(nic)):
            native.lib.at_fab_pin(self.pointer, rail, cpus, len(cpus))

    def add_region(self, address: int, nbytes: int, keep: object = None) -> int:
        """Register local memory. `keep` is what keeps it alive, until `release_region`."""
        region = native.lib.at_region_add(self.pointer, native.ffi.cast("void *", address), nbytes)
        if region < 0:
            raise RegistrationError(
                f"cannot register {nbytes} bytes: {native.text(region)}",
                code=(errno.ENOMEM, os.strerror(errno.ENOMEM)),
                hint=SHORTAGES[errno.ENOMEM],
            )
        self.holdings.hold("region", int(region), keep)
        return int(region)

    def region_lazy(self, region: int) -> None:
        """Mark a region that we did not allocate: its pages may not be there yet, and the loop does not wait
        for them."""
        if native.lib.at_region_lazy(self.pointer, region) == native.lib.AT_ENOMEM:
            raise shortage(errno.ENOMEM, "cannot register") or BusyError("cannot register")

    def release_region(self, region: int) -> None:
        """Let go of memory that neither we nor a peer access any more."""
        self.holdings.drop("region", region)
        self.holdings.drop("descriptor", region)

    def hold_descriptor(self, region: int, fd: int) -> None:
        """The descriptor that a region on a device is known by is the lane's now."""
        self.holdings.hold("descriptor", region, Descriptors([fd]))

    def look_at_region(self, region: int) -> None:
        """Find out whether it is a mapping of a file, which another process may shorten."""
        native.lib.at_region_look(self.pointer, region)

    def region_on_device(self, region: int, cuda: int, dma_buf: tuple[int, int] | None) -> None:
        """Mark a region as memory of this GPU; `dma_buf`: the caller's descriptor, and the address where its
        range begins."""
        native.lib.at_region_on_device(self.pointer, region, cuda, *(dma_buf or (-1, 0)))

    def close_region(self, region: int) -> bool:
        """True when the region is free now; else an AT_EV_REGION event comes."""
        return not self.usable or int(native.lib.at_region_close(self.pointer, region)) <= 0

    def new_grant(self) -> tuple[int, int]:
        """A fresh epoch word: (slot, epoch)."""
        epoch = native.ffi.new("uint64_t *")
        slot = native.lib.at_grant_new(self.pointer, epoch)
        if slot < 0:
            raise BusyError("65,536 grants are in use", hint="close or revoke regions that are no longer shared")
        return int(slot), int(epoch[0])

    def revoke_grant(self, slot: int) -> int:
        """Make the grant stale; how many writers are inside a write under it now."""
        return int(native.lib.at_grant_revoke(self.pointer, slot)) if self.usable else 0

    def grant_active(self, slot: int) -> int:
        """How many writers are inside a write under a revoked grant; 0 is proof that nothing more lands."""
        return int(native.lib.at_grant_active(self.pointer, slot)) if self.usable else 0

    def expel_grant(self, slot: int) -> int:
        """Cut off peers that are still inside a write under a revoked grant, where their provider can fence
        one peer alone. Returns the number of peers that are left."""
        return int(native.lib.at_grant_expel(self.pointer, slot)) if self.usable else 0

    def free_grant(self, slot: int) -> None:
        """Let the slot be used again; only after `grant_active` was 0."""
        if self.usable:
            native.lib.at_grant_free(self.pointer, slot)

    def grant_valid(self, slot: int, epoch: int) -> bool:
        """Whether a descriptor with these values is still good."""
        return bool(native.lib.at_grant_valid(self.pointer, slot, epoch))

    def add_remote(self, peer: int, base: Any, va: int, nbytes: int, access: int, slot: int, epoch: int) -> int:
        """A remote region, or a negative status."""
        self._close_dropped()
        return int(native.lib.at_remote_add(self.pointer, peer, base, va, nbytes, access, slot, epoch))

    def hold_remote(self, remote: int, mapping: object) -> None:
        """`mapping` keeps the memory of a remote region mapped, until the region is closed and no operation
        uses it."""
        self.holdings.hold("remote", remote, mapping)

    def close_remote(self, remote: int) -> None:
        """Forget a remote region; the lane waits for operations that still use it.

        In any thread, as the end of an object may be: from another one it is put off, as the lane might be
        freed meanwhile."""
        self._dropped.append(remote)
        if threading.get_ident() == self._thread:
            self._close_dropped()

    def _close_dropped(self) -> None:
        while self._dropped and self.usable:
            self._closing.append(self._dropped.popleft())
        if self._closing and self.usable:
            self._closing = [remote for remote in self._closing if not self._closed(remote)]

    def _closed(self, remote: int) -> bool:
        if native.lib.at_remote_close(self.pointer, remote) > 0:
            return False
        self.holdings.drop("remote", remote)
        return True

    def statistics(self) -> dict[str, int]:
        """The lane's counters by name."""
        self._close_dropped()
        out = native.ffi.new("at_lane_stats *")
        native.lib.at_lane_stats_get(self.pointer, out)
        return {name: int(getattr(out, name)) for name, _ in native.ffi.typeof("at_lane_stats").fields}

    def system_error(self) -> tuple[int, str]:
        """(errno, its text) of the last AT_EIO."""
        number = int(native.lib.at_lane_errno(self.pointer))
        return number, os.strerror(number)


class Segment:
    """Shared memory of ours, or a mapping of a peer's. Unmapped when the last view of it is gone."""

    __slots__ = ("__weakref__", "address", "buffer", "fd", "nbytes")

    def __init__(self, address: int, nbytes: int, fd: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.fd = fd
        unmap = native.lib.at_segment_unmap  # here: at the end of the interpreter modules are gone before memory is
        pointer = native.ffi.gc(native.ffi.cast("uint8_t *", address), lambda p: unmap(p, nbytes), nbytes)
        self.buffer: Any = native.ffi.buffer(pointer, nbytes)

    @classmethod
    def allocate(cls, nbytes: int) -> Segment:
        """Sealed, zeroed, preallocated. Raises `RegistrationError`."""
        left = room() if nbytes >= LEAST else None
        if left is not None and nbytes > left:
            raise RegistrationError(
                f"cannot allocate {nbytes} bytes of shared memory: {left} are free here, swap included",
                code=(errno.ENOMEM, os.strerror(errno.ENOMEM)),
                hint=SHORTAGES[errno.ENOMEM],
            )
        base, fd = native.ffi.new("void **"), native.ffi.new("int *")
        rc = native.lib.at_segment_new(nbytes, base, fd)
        if rc != 0:
            number = -rc
            raise RegistrationError(
                f"cannot allocate {nbytes} bytes of shared memory: {os.strerror(number)}",
                code=(number, os.strerror(number)),
                hint={**SHORTAGES, **_OF_MEMORY}.get(number, _REFUSED),
            )
        return cls(int(native.ffi.cast("uintptr_t", base[0])), nbytes, int(fd[0]))

    @classmethod
    def map(cls, fd: int, nbytes: int) -> Segment:
        """Map a peer's segment after verifying seals and size. `fd` stays the caller's. Raises
        `RegistrationError`."""
        base = native.ffi.new("void **")
        rc = native.lib.at_segment_map(fd, nbytes, base)
        if rc != 0:
            number = -rc
            reason = {
                errno.EPERM: "it is not sealed memory",
                errno.ERANGE: "its size is not the promised one",
                errno.ENODATA: "its owner has not allocated it",
            }.get(number, os.strerror(number))
            raise RegistrationError(
                f"cannot map {nbytes} bytes of a peer: {reason}", code=(number, os.strerror(number)), hint=SHORTAGES.get(number)
            )
        return cls(int(native.ffi.cast("uintptr_t", base[0])), nbytes, -1)

    def touch(self) -> None:
        """Fault every page in (releases the GIL; slow for large segments)."""
        native.lib.at_segment_touch(native.ffi.cast("void *", self.address), self.nbytes)

    @property
    def pointer(self) -> Any:
        """The address as a `void *` for native calls."""
        return native.ffi.cast("void *", self.address)

    def close_fd(self) -> None:
        """Close the descriptor: from then on this memory cannot be shared with further peers."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close_fd()


def memory_is_mapped(address: int, nbytes: int) -> bool:
    """Whether [address, address + nbytes) lies in mapped memory of this process."""
    if not native.has_shm:
        return True
    return int(native.lib.at_memory_mapped(native.ffi.cast("void *", address), nbytes)) == 0


def check(condition: bool, message: str) -> None:
    """Raise `InternalError` when an invariant does not hold."""
    if not condition:
        raise InternalError(message, hint="please report this")
