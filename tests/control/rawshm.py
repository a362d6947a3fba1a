"""The shm side of a peer by hand: it owns its end of a real path, maps what an honest peer maps, and writes what it likes."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer.control import frames
from aiotransfer.control.frames import Found
from aiotransfer.model.descriptor import Grant, RemoteRegion
from aiotransfer.providers.shm import fd_passing, messages

from .rawpeer import RawPeer

SEALS = 0x0001 | 0x0002 | 0x0004  # SEAL, SHRINK, GROW
ADD_SEALS = 1033
MAGIC = 0x41544348414E4E45
SLOTS = 65536
FULL = (1 << 64) - 2  # a counter that an eventfd cannot add 1 to
_SLOW = int(re.search(r"AT_SLOW_WORDS\s*=?\s*(\d+)", (Path(__file__).parents[2] / "ffi/lane/lane.h").read_text())[1])  # type: ignore[index]
ACTIVE = 64 * (5 + _SLOW + 1)  # one for each mover, one for counting
_AFTER = 64 + ACTIVE
WORDS = {  # of a channel, as ffi/shm/shm.h lays it out: offset and bytes
    "active": (64, ACTIVE),
    "ping": (_AFTER, 8),
    "dirty": (_AFTER + 64, 4),
    "summary": (_AFTER + 128, 128),
    "bitmap": (_AFTER + 256, SLOTS // 8),
    "imm": (_AFTER + 8448, SLOTS * 4),
    "count": (_AFTER + 270592, SLOTS * 8),
    "pong": (_AFTER + 794880, 16),
    "barred": (_AFTER + 794896, 8),
    "drained": (_AFTER + 794944, SLOTS * 8),
}
CHANNEL = WORDS["drained"][0] + SLOTS * 8
CONTROL = 128 + SLOTS * 8


class Segment:
    """Sealed shared memory of one side, as an array of bytes."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd = fd
        self.bytes = np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)

    @classmethod
    def new(cls, nbytes: int, head: bytes) -> Segment:
        fd = os.memfd_create("raw", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, ADD_SEALS, SEALS)
        segment = cls(fd, nbytes)
        segment.bytes[: len(head)] = np.frombuffer(head, np.uint8)
        return segment

    def word(self, at: int) -> Any:
        """The 64-bit word there, to be read and set as [0]."""
        return self.bytes[at : at + 8].view(np.uint64)


class RawShm:
    """Of a RawPeer. `inbound` is the engine's channel, which we may write; `outbound` is ours, which the engine writes."""

    def __init__(self, engine: at.Engine, raw: RawPeer, incarnation: int) -> None:
        def u64(*numbers: int) -> bytes:
            return b"".join(number.to_bytes(8, "little") for number in numbers)

        self.raw = raw
        self.incarnation = incarnation
        self.outbound = Segment.new(CHANNEL, u64(MAGIC, incarnation, engine.incarnation) + b"c" * 16)
        self.control = Segment.new(CONTROL, u64(0, incarnation) + b"d" * 16)
        self.doorbell, self.pulse = (os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2))
        self.offer = messages.encode(messages.Offer(b"d" * 16, b"c" * 16, 0))
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.connect(next(t.data for t in engine._offers() if t.provider == "shm"))
        self.theirs: list[int] = []

    @classmethod
    async def open(cls, engine: at.Engine, incarnation: int = 0) -> RawShm:
        """A peer that is up by shm."""
        self = await cls.begin(engine, incarnation)
        await self.introduce()
        assert isinstance(await self.raw.hear(frames.Answer), frames.Answer)
        self.accept()
        await self.raw.say(frames.Up(), frames.Ping(1))
        await self.raw.hear(frames.Pong)
        return self

    @classmethod
    async def begin(cls, engine: at.Engine, incarnation: int = 0) -> RawShm:
        """Authenticated, and connected to the descriptor socket; nothing said there yet."""
        incarnation = incarnation or int.from_bytes(os.urandom(8))
        return cls(engine, await RawPeer.connect(engine, incarnation=incarnation), incarnation)

    async def introduce(self, ticket: bytes = b"t" * 16) -> None:
        """Our packet, and the question that announces it."""
        fds = [self.control.fd, self.outbound.fd, self.doorbell, self.pulse]
        socket.send_fds(self._sock, [ticket + self.offer], fds)
        await self.raw.say(frames.Ask(1, "shm", messages.encode(messages.Hello(ticket))))

    def accept(self) -> None:
        """Map what the engine offers."""
        _, self.theirs, _, _ = socket.recv_fds(self._sock, fd_passing.MOST_BYTES, 4)
        assert os.fstat(self.theirs[1]).st_size == CHANNEL, "the layout above is that of ffi/shm/shm.h"
        self.inbound = Segment(self.theirs[1], CHANNEL)

    def region(self, target: np.ndarray[Any, Any], slot: int = 3, epoch: int = 1) -> RemoteRegion:
        """A descriptor of memory of ours, live."""
        self.control.word(128 + 8 * slot)[0] = epoch
        grant = Grant("127.0.0.1:1", self.incarnation, target.ctypes.data, target.nbytes, "write", "cpu", slot, epoch, 0, 0, ())
        return RemoteRegion.of(grant)

    async def answer_lookup(self, descriptor: RemoteRegion) -> None:
        """Whatever name the engine asks for."""
        asked = await self.raw.hear(frames.Lookup)
        assert isinstance(asked, frames.Lookup)
        await self.raw.say(Found(asked.id, descriptor.encode()))

    def send_descriptors(self, ticket: bytes, fds: list[int]) -> None:
        """One packet of the descriptor channel."""
        socket.send_fds(self._sock, [ticket], fds)

    def arrive(self, slot: int, imm: int, total: int) -> None:
        """Count as an honest peer does."""
        self.inbound.bytes[WORDS["imm"][0] + 4 * slot :][:4].view(np.uint32)[0] = imm
        self.inbound.word(WORDS["count"][0] + 8 * slot)[0] = total
        self.inbound.word(WORDS["bitmap"][0] + slot // 64 * 8)[0] |= np.uint64(1 << slot % 64)
        self.inbound.word(WORDS["summary"][0] + slot // 4096 * 8)[0] |= np.uint64(1 << slot // 64 % 64)
        self.inbound.bytes[WORDS["dirty"][0]] = 1
        self.ring()

    def ring(self, which: int = 2) -> None:
        """Ring the engine's doorbell (2) or pulse (3)."""
        os.write(self.theirs[which], bytes(8))

    async def close(self) -> None:
        """Hang up and give everything back."""
        await self.raw.close()
        self._sock.close()
        for fd in (self.control.fd, self.outbound.fd, self.doorbell, self.pulse, *self.theirs):
            os.close(fd)


def block(fd: int) -> None:
    """What somebody who shares an eventfd can do to it: clear O_NONBLOCK for all, and fill its counter."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    os.eventfd_write(fd, FULL - _count(fd))


def _count(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}") as f:
        return next(int(line.split()[1], 16) for line in f if line.startswith("eventfd-count"))
