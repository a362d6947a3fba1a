"""loopback: engines of one process, over the simulator, in real time.

All engines of a process share one simulated network without delays or faults; a write is delivered inside the
call that submits it. The network is in C beneath the lane, so that everything above the port is what other
fabrics get. Networks with a seed, a virtual clock and faults are made by `aiotransfer.testing`.

An address is all that a write needs here, and any holder of the key can make a descriptor. So before the
first write the owner, found in this process by its incarnation, is asked whether it ever granted that memory.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from aiotransfer.errors import BrokenError, RegistrationError, TransferError, shortage
from aiotransfer.model.descriptor import Grant
from aiotransfer.model.offer import ProviderOffer
from aiotransfer.providers import native
from aiotransfer.providers.lane import ACCESS, Lane, Segment
from aiotransfer.providers.port import Binding, Conversation, Path

_PROCESS = os.urandom(16)


def _failure(what: str, status: int) -> TransferError:
    number = errno.ENOMEM if status == native.lib.AT_ENOMEM else None
    return shortage(number, what, provider="loopback") or BrokenError(f"{what}: {native.text(status)}", provider="loopback")
def question(body: bytes) -> None:
    """A peer's question, of which there is one. Raises `BrokenError` for any other."""
    if body:
        raise BrokenError(f"{len(body)} bytes are no question", provider="loopback")


class _Shared:
    """The network of this process: made with its first engine, gone with its last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._net: Any = None

    def join(self, lane: Lane) -> None:
        with self._lock:
            if self._users == 0:
                self._net = native.lib.at_net_new(native.ffi.new("at_net_config *"))
            if self._net == native.ffi.NULL:
                status = native.lib.AT_ENOMEM
            else:
                self._users += 1
                status = native.lib.at_net_join(self._net, lane.pointer)
                if status != 0:
                    self._left()
        if status != 0:
            raise _failure("cannot join the simulator", status)

    def leave(self) -> None:
        """The lane itself leaves when it is freed."""
        with self._lock:
            self._left()

    def _left(self) -> None:
        self._users -= 1
        if self._users == 0:
            native.lib.at_net_free(self._net)
            self._net = None


_shared = _Shared()
_owners: weakref.WeakValueDictionary[int, LoopbackProvider] = weakref.WeakValueDictionary()  # by incarnation


def _forget() -> None:
    global _PROCESS, _shared
    _PROCESS = os.urandom(16)  # a forked child is another process, with a network of its own
    _shared = _Shared()


os.register_at_fork(after_in_child=_forget)


class LoopbackPath(Path):
    """A connection to another engine of this process."""

    provider = "loopback"

    def __init__(self, lane: Lane, incarnation: int, mine: int) -> None:
        super().__init__()
        self.rails = ("loopback",)
        self._lane = lane
        self._mine = mine
        peer = int(native.lib.at_sim_connect(lane.pointer, incarnation))
        if peer < 0:
            raise _failure("no path to that engine of this process", peer)
        self.lane_peer = peer
        self._closed = False

    async def bind(self, grant: Grant, conversation: Conversation, peer: Any) -> Binding:
        """One address space: the descriptor's address is the memory."""
        self.refuse_device(grant)
        owner = _owners.get(conversation.incarnation)
        segment: Segment | None = None
        if owner is not None:
            if not owner.covers(grant):
                raise RegistrationError("the descriptor describes memory that was never granted", provider="loopback")
            segment = owner.segment_of(grant.slot, grant.epoch, grant.segment, self._mine) if grant.segment else None
        remote = self._lane.add_remote(
            self.lane_peer, native.ffi.NULL, grant.base, grant.nbytes, ACCESS[grant.access], grant.slot, grant.epoch
        )
        if remote < 0:
            raise _failure("cannot bind", remote)
        if owner is not None and segment is None and owner.is_file(grant, self._mine):
            native.lib.at_remote_is_file(self._lane.pointer, remote)
        return Binding(self._lane, remote, self, peer, segment, 0 if segment is None else grant.base)

    def close(self) -> None:
        """Free the peer of this path in the lane; twice is silent."""
        if not self._closed:
            self._closed = True
            if self._lane.usable:
                native.lib.at_peer_free(self._lane.pointer, self.lane_peer)


class LoopbackProvider:
    """The simulated network as one engine uses it: all lanes of one process are reached by it."""

    name = "loopback"

    def __init__(
        self, lane: Lane, incarnation: int, covers: Callable[[Grant], bool],
        segment_of: Callable[[int, int, int, int], Segment | None],
        lent: Callable[[int, int, int], tuple[Grant, int, int] | None], net: Any = None,
    ) -> None:  # fmt: skip
        self._lane = lane
        self._incarnation = incarnation
        self.covers = covers
        self.segment_of = segment_of
        self._lent = lent
        self._net = _shared if net is None else net
        self._net.join(lane)
        self._closed = False
        _owners[incarnation] = self

    rails = ("loopback",)
    hosts: tuple[str, ...] = ()
    chosen: Mapping[str, Any] = MappingProxyType({})

    def offer(self) -> ProviderOffer:
        """What this side tells: only engines of the same process can be reached."""
        return ProviderOffer("loopback", True, "", _PROCESS, b"")

    async def dial(self, conversation: Conversation, theirs: ProviderOffer) -> LoopbackPath:
        """The other side connects first, so that no packet is sent before its receiver is there."""
        await conversation.ask("loopback", b"")
        return LoopbackPath(self._lane, conversation.incarnation, self._incarnation)

    async def answer(self, conversation: Conversation, theirs: ProviderOffer, body: bytes) -> tuple[bytes, Path | None]:
        """The other side of `dial`."""
        question(body)
        if theirs.host != _PROCESS:
            raise BrokenError("loopback connects engines of one process only", provider="loopback")
        return b"", LoopbackPath(self._lane, conversation.incarnation, self._incarnation)

    def is_file(self, grant: Grant, who: int) -> bool:
        """Whether what this engine has granted is a mapping of a file, whose pages may be taken away."""
        lent = self._lent(grant.slot, grant.epoch, who)
        return lent is not None and int(native.lib.at_region_is_file(self._lane.pointer, lent[1])) == 1

    async def settle(self) -> None:
        """Return at once: nothing is under way without a poll."""

    def close(self) -> None:
        """Leave the network of this process."""
        if not self._closed and self._lane.usable:
            self._closed = True
            self._net.leave()
