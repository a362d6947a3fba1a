"""shm: engines of one host that map each other's memory.

Setting a path up takes one question over the control connection (a ticket) and one packet in each direction
over a descriptor channel, which carries the control segment, the inbound channel, a doorbell and a pulse
eventfd of its sender. That both ends are on one host is proved by the channel existing at all and by the
cookies in the segments, which the authenticated session named; whose process it is comes from the socket's
credentials and is pinned by a pidfd.

Memory from `allocate` is mapped when a descriptor of it is first bound: its descriptor is handed out only to
a peer that presents a live grant. Other memory is written through the kernel (process_vm, or /proc/PID/mem).
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import random
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from aiotransfer.errors import (
    SHORTAGES,
    BrokenError,
    ClosedError,
    ConfigurationError,
    RegistrationError,
    StaleRegionError,
    TransferError,
    TransferTimeout,
    shortage,
)
from aiotransfer.model.descriptor import Grant
from aiotransfer.model.offer import ProviderOffer
from aiotransfer.providers import native
from aiotransfer.providers.elsewhere import close_elsewhere
from aiotransfer.providers.lane import ACCESS, Lane, Segment
from aiotransfer.providers.port import Binding, Conversation, Path
from aiotransfer.providers.shm import fd_passing, messages, pidfd
from aiotransfer.providers.shm.fd_listener import FdListener

SETUP_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.1  # before the peer's socket is tried again, which others crowd; within SETUP_SECONDS
REASON_SECONDS = 0.1  # for the reason why a peer closed the channel, which comes by another way
INLINE_TOUCH = 32 << 20
OFFERED = 4  # descriptors of an offer: control segment, channel, doorbell, pulse; a fifth may be of the process itself


def _failure(what: str, error: Exception) -> TransferError:
    """Our own want of descriptors or memory is not the other side's fault, and no reason to fall back on a
    slower path."""
    number = error.errno if isinstance(error, OSError) and not isinstance(error, ConnectionError) else None
    text = f"{what}: {str(error) or f'nothing came for {SETUP_SECONDS:g} s'}"  # a timeout says nothing itself
    return shortage(number, what, provider="shm") or BrokenError(text, provider="shm")


def _boot() -> bytes:
    """Which boot of which machine this is. Raises `OSError` when there is no descriptor to read it with."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as f:
            return f.read().strip()
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        return b""


class ShmPath(Path):
    """An established connection to one peer of this host."""

    provider = "shm"
    watches_process = True  # by a pidfd: the death of the peer's process is an event of the lane

    def __init__(
        self, lane: Lane, peer: int, channel: fd_passing.FdChannel, ticket: bytes,
        own: Callable[[int, int, int, int], Segment | None] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._ticket = ticket  # names the channel: two that dial each other at once have two of them
        self._own = own  # finds segments without asking, when the peer is this very engine
        self.rails = ("shm",)
        self.lane_peer = peer
        self._lane = lane
        self.channel = channel
        self._maps: weakref.WeakValueDictionary[int, Segment] = weakref.WeakValueDictionary()
        self._mapping: dict[int, asyncio.Future[Segment]] = {}
        self._wanted: dict[asyncio.Future[Segment], int] = {}
        self._closed = False

    async def bind(self, grant: Grant, conversation: Conversation, peer: Any) -> Binding:
        """Map the grant's segment, or name its address when it is foreign memory."""
        self.refuse_device(grant)
        segment: Segment | None = None
        address = 0
        if grant.segment:
            if self._own is not None:
                segment = self._own(grant.slot, grant.epoch, grant.segment, conversation.incarnation)
                if segment is None:
                    raise StaleRegionError("the descriptor names no live region of this engine", provider="shm")
            else:
                segment = self._maps.get(grant.segment) or await self._fetch(grant, conversation)
            if grant.segment_offset + grant.nbytes > segment.nbytes:
                raise RegistrationError("the descriptor reaches past its segment")
            address = segment.address + grant.segment_offset
        else:
            await self._check_foreign()
        remote = self._lane.add_remote(
            self.lane_peer, native.ffi.cast("void *", address), grant.base, grant.nbytes, ACCESS[grant.access], grant.slot,
            grant.epoch,
        )  # fmt: skip
        if remote < 0:
            number = errno.ENOMEM if remote == native.lib.AT_ENOMEM else None
            raise shortage(number, "cannot bind", provider="shm") or BrokenError(
                f"cannot bind: {native.text(remote)}", provider="shm"
            )
        if segment is not None and self._own is None:
            native.lib.at_remote_guard(self._lane.pointer, remote, segment.fd, segment.nbytes)
        return Binding(self._lane, remote, self, peer, segment, address)

    async def _check_foreign(self) -> None:
        """Ask a native thread to read a known word of the peer's memory, once: the peer may withhold that
        page."""
        lib, why = native.lib, native.ffi.new("int *")
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + SETUP_SECONDS, 0.0
        while (how := lib.at_shm_foreign(self._lane.pointer, self.lane_peer, why)) == lib.AT_FOREIGN_UNKNOWN:
            if loop.time() >= deadline:
                raise RegistrationError("the peer withholds the page that shows how its memory is reached", provider="shm")
            await asyncio.sleep(pause)
            pause = min(pause + 0.0002, 0.005)
            if self._closed or not self._lane.usable:
                raise BrokenError("the path was closed", provider="shm")
        if how == lib.AT_EIO:
            raise _failure("no thread can be started", OSError(*self._lane.system_error()))
        if how < 0:
            raise BrokenError(f"cannot bind: {native.text(how)}", provider="shm")
        if how == 0:
            raise RegistrationError(
                "the peer's memory was not made by allocate(), and this process may not write into it "
                f"({os.strerror(why[0])})",
                provider="shm",
                code=(why[0], os.strerror(why[0])),
                hint="let the owner use engine.allocate(), or permit process_vm_writev "
                "(same user, ptrace_scope 0 or CAP_SYS_PTRACE, no seccomp filter)",
            )

    async def _fetch(self, grant: Grant, conversation: Conversation) -> Segment:
        """Once for all operations that wait for it; each has a deadline of its own, and it ends with the last
        that waits."""
        number = grant.segment
        future = self._mapping.get(number)
        if future is None:
            future = self._mapping[number] = asyncio.ensure_future(self._fetch_once(grant, conversation))
        self._wanted[future] = self._wanted.get(future, 0) + 1
        try:
            return await asyncio.shield(future)
        finally:
            self._wanted[future] -= 1
            if not self._wanted[future]:
                del self._wanted[future], self._mapping[number]
                future.cancel()

    async def _fetch_once(self, grant: Grant, conversation: Conversation) -> Segment:
        ticket = fd_passing.ticket()
        question = messages.Fetch(ticket, self._ticket, grant.slot, grant.epoch, grant.segment)
        packet = asyncio.ensure_future(self.channel.expect(ticket, None))
        try:
            await asyncio.sleep(0)  # the expectation stands before the question leaves
            answer = await conversation.ask("shm", messages.encode(question), math.inf)
            nbytes = messages.size(answer)
            async with asyncio.timeout(SETUP_SECONDS):  # from the answer on, before which the packet was sent
                _, fds = await packet
        except BaseException as error:  # also cancellation: what is expected must not arrive unowned
            fd_passing.discard(packet)
            if isinstance(error, TimeoutError) and not isinstance(error, TransferError):
                raise TransferTimeout(_failure("no segment from the peer", error).message, provider="shm") from error
            if isinstance(error, OSError) and not isinstance(error, TransferError):
                raise _failure("no segment from the peer", error) from error
            raise
        try:
            if len(fds) != 1:
                raise BrokenError(f"the peer sent {len(fds)} descriptors instead of one", provider="shm")
            segment = Segment.map(fds[0], nbytes)
        except BaseException:
            close_elsewhere(fds)
            raise
        segment.fd = fds.pop()  # to count its pages with
        if segment.nbytes <= INLINE_TOUCH:
            segment.touch()
        else:
            await asyncio.get_running_loop().run_in_executor(None, segment.touch)
        self._maps[grant.segment] = segment
        return segment

    def close(self) -> None:
        """Free the lane's peer and the descriptor channel."""
        if self._closed:
            return
        self._closed = True
        self.channel.close()
        if self._lane.usable:
            native.lib.at_peer_free(self._lane.pointer, self.lane_peer)


class ShmProvider:
    """shm for one engine. `segment_of` finds the engine's own live segment behind a presented grant.
    `same_user`: only processes of this user are let in."""

    name = "shm"

    def __init__(
        self, lane: Lane, incarnation: int, segment_of: Callable[[int, int, int, int], Segment | None], *, same_user: bool = False
    ) -> None:
        if not native.has_shm:
            raise ConfigurationError("shared memory between processes needs Linux")
        self._lane = lane
        self._incarnation = incarnation
        self._loop = asyncio.get_running_loop()
        self._boot = _boot()
        self._itself = pidfd.for_peers()
        try:
            self._listener = FdListener(self._loop, os.getuid() if same_user else None)
        except OSError:
            fd_passing.close_all(self._itself)
            raise
        self._segment_of = segment_of
        self._paths: weakref.WeakValueDictionary[tuple[int, bytes], ShmPath] = weakref.WeakValueDictionary()

    rails = ("shm",)
    hosts: tuple[str, ...] = ()
    chosen: Mapping[str, Any] = MappingProxyType({})

    def offer(self) -> ProviderOffer:
        """The socket's name and which boot of which machine this is."""
        return ProviderOffer("shm", True, "", self._boot, self._listener.name.encode())

    def _begin(self, incarnation: int) -> tuple[Any, Any]:
        self._check_open()
        offer = native.ffi.new("at_shm_offer *")
        half = native.lib.at_shm_begin(self._lane.pointer, incarnation, offer)
        if half == native.ffi.NULL:
            raise _failure("cannot prepare shared memory", OSError(*self._lane.system_error()))
        abort, nothing = native.lib.at_shm_abort, native.ffi.NULL
        return native.ffi.gc(half, lambda forgotten: abort(nothing, forgotten)), offer

    def _check_open(self) -> None:
        """The engine may have been closed while a connection was being set up: there is no lane any more."""
        if not self._lane.usable:
            raise ClosedError("the engine was closed while the connection was being set up")

    def _packet(self, offer: Any) -> tuple[bytes, list[int]]:
        body = messages.Offer(bytes(offer.control_cookie), bytes(offer.channel_cookie), offer.probe_va)
        return messages.encode(body), [offer.control_fd, offer.channel_fd, offer.doorbell_fd, offer.pulse_fd, *self._itself]

    @staticmethod
    def _check_user(channel: fd_passing.FdChannel, who: Conversation) -> None:
        if who.trusted_user and channel.uid != os.getuid():
            raise BrokenError(f"the peer runs as uid {channel.uid}, not {os.getuid()}", provider="shm")

    def _finish(
        self, half: Any, channel: fd_passing.FdChannel, ticket: bytes, who: Conversation, body: bytes, fds: list[int]
    ) -> ShmPath:
        """Verify the other side's packet and make the lane's peer. Takes over `half`, `channel` and `fds`."""
        try:
            self._check_open()
            theirs = messages.offer(body)
            if len(fds) not in (OFFERED, OFFERED + 1):
                raise BrokenError("the peer's offer is malformed", provider="shm")
            self._check_user(channel, who)
            mem = self._open_memory(channel.pid)
            try:
                process = channel.process(fds[OFFERED] if len(fds) > OFFERED else -1)
            except OSError:
                fd_passing.close_all([mem] if mem >= 0 else [])
                raise
        except (OSError, TransferError) as error:
            native.ffi.release(half)
            close_elsewhere(fds)
            channel.close()
            if isinstance(error, BrokenError | ClosedError):
                raise
            raise _failure("the peer's offer cannot be used", error) from error
        close_elsewhere(fds[OFFERED:])
        del fds[OFFERED:]
        offer = native.ffi.new("at_shm_offer *")
        offer.control_fd, offer.channel_fd, offer.doorbell_fd, offer.pulse_fd = fds[:OFFERED]
        native.ffi.memmove(offer.control_cookie, theirs.control_cookie, 16)
        native.ffi.memmove(offer.channel_cookie, theirs.channel_cookie, 16)
        offer.probe_va = theirs.probe_va
        native.ffi.gc(half, None)  # the lane's now
        taken = native.ffi.new("int *")
        peer = native.lib.at_shm_finish(
            self._lane.pointer, half, offer, who.incarnation, process, channel.pid, mem, int(channel.pid > 0), taken
        )
        if not taken[0]:
            close_elsewhere([*fds, *(fd for fd in (process, mem) if fd >= 0)])
        fds.clear()  # the lane's, or being closed
        if peer < 0:
            channel.close()
            raise self._refused(peer)
        own = self._segment_of if who.incarnation == self._incarnation else None
        path = self._paths[who.incarnation, ticket] = ShmPath(self._lane, peer, channel, ticket, own)
        return path

    def _refused(self, status: int) -> TransferError:
        what = "the peer's shared memory was refused"
        if status == native.lib.AT_EIO:
            return _failure(what, OSError(*self._lane.system_error()))
        number = errno.ENOMEM if status == native.lib.AT_ENOMEM else None
        return shortage(number, what, provider="shm") or BrokenError(f"{what}: {native.text(status)}", provider="shm")

    @staticmethod
    def _open_memory(pid: int) -> int:
        """The peer's memory as a file, if it may be had; -1."""
        try:
            return os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in SHORTAGES:
                raise
            return -1

    async def dial(self, conversation: Conversation, theirs: ProviderOffer) -> ShmPath:
        """Offer our memory, take theirs. Where others crowd the peer's socket it is tried again, for
        `SETUP_SECONDS` in all."""
        name = messages.socket_name(theirs.data)
        until, pause = self._loop.time() + SETUP_SECONDS, FIRST_PAUSE
        while True:
            try:
                return await self._dial(conversation, name, until)
            except ConnectionError as error:
                left = until - self._loop.time() - pause
                if isinstance(error, ConnectionRefusedError):  # another network namespace, where nothing listens by this name
                    raise _failure("the peer's socket is not reachable", error) from error
                if left <= 0:
                    raise _failure("shared memory could not be set up", error) from error
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _dial(self, conversation: Conversation, name: str, until: float) -> ShmPath:
        """Dial once. Raises `ConnectionError` when the connection ended too soon or its socket was full, else
        as `dial`."""
        try:
            channel = await fd_passing.connect(name, self._loop, until - self._loop.time())
        except ConnectionError:
            raise
        except OSError as error:
            raise _failure("the peer's socket is not reachable", error) from error
        try:
            self._check_user(channel, conversation)  # before it is sent anything
            half, offer = self._begin(conversation.incarnation)
        except TransferError:
            channel.close()
            raise
        ticket = fd_passing.ticket()
        reply = asyncio.ensure_future(channel.expect(ticket, None))
        asked = asyncio.ensure_future(conversation.ask("shm", messages.encode(messages.Hello(ticket))))
        try:
            await asyncio.sleep(0)  # the question leaves first: whose ticket is known is no stranger
            body, fds = self._packet(offer)
            channel.send(ticket, body, fds)
            await asyncio.wait([asked, reply], return_when=asyncio.FIRST_COMPLETED)
            if not asked.done() and reply.exception() is not None:
                await asyncio.wait([asked], timeout=REASON_SECONDS)
            if asked.done():
                asked.result()  # raises what the peer said
            async with asyncio.timeout(SETUP_SECONDS):  # from the answer on: before that the peer's loop may be busy
                their_body, their_fds = await reply
            await asked
        except BaseException as error:  # also cancellation: half a channel is of no use
            asked.cancel()
            asked.add_done_callback(lambda done: done.cancelled() or done.exception())
            fd_passing.discard(reply)
            native.ffi.release(half)
            channel.close()
            if isinstance(error, OSError) and not isinstance(error, ConnectionError | TransferError):
                raise _failure("shared memory could not be set up", error) from error
            raise
        return self._finish(half, channel, ticket, conversation, their_body, their_fds)

    async def answer(self, conversation: Conversation, theirs: ProviderOffer, body: bytes) -> tuple[bytes, Path | None]:
        """The other side of `dial`, and of binding a segment."""
        question = messages.question(body)
        if isinstance(question, messages.Fetch):
            return self._hand_out(conversation, question), None
        with conversation.opening():
            return await self._accept(conversation, question.ticket)

    async def _accept(self, conversation: Conversation, ticket: bytes) -> tuple[bytes, Path]:
        try:
            channel, their_body, their_fds = await self._listener.accept(ticket, SETUP_SECONDS)
        except TimeoutError as error:
            raise BrokenError("the descriptor channel was not opened", provider="shm") from error
        except OSError as error:
            raise _failure("the descriptor channel was not opened", error) from error
        try:
            half, offer = self._begin(conversation.incarnation)
        except TransferError:
            close_elsewhere(their_fds)
            channel.close()
            raise
        our_body, our_fds = self._packet(offer)
        try:
            channel.send(ticket, our_body, our_fds)
        except OSError as error:
            native.ffi.release(half)
            close_elsewhere(their_fds)
            channel.close()
            raise _failure("the descriptor channel broke", error) from error
        return b"", self._finish(half, channel, ticket, conversation, their_body, their_fds)

    def _hand_out(self, conversation: Conversation, question: messages.Fetch) -> bytes:
        path = self._paths.get((conversation.incarnation, question.channel))
        segment = self._segment_of(question.slot, question.epoch, question.segment, conversation.incarnation)
        if path is None:
            raise BrokenError("that descriptor channel is closed", provider="shm")
        if segment is None or segment.fd < 0:
            raise StaleRegionError("the descriptor names no live region of this engine", provider="shm")
        try:
            path.channel.send(question.ticket, b"", [segment.fd])
        except OSError as error:
            raise _failure("the descriptor channel broke", error) from error
        return messages.encode(messages.Size(segment.nbytes))

    async def settle(self) -> None:
        """Returns at once: this provider does nothing but answer questions."""

    def close(self) -> None:
        """Stop listening for descriptor channels of other processes."""
        self._listener.close()
        fd_passing.close_all(self._itself)
        self._itself = []
