"""What a peer that has the key says over the control connection, to a living engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

import aiotransfer as at
from aiotransfer.control import frames
from aiotransfer.control.frames import PeerInfo
from aiotransfer.control.handshake import Handshake
from aiotransfer.control.key import load_key
from aiotransfer.model.offer import ProviderOffer
from aiotransfer.providers.fabric import messages as fabric_messages
from aiotransfer.providers.shm import messages as shm_messages
from tests.control.rawpeer import RawPeer
from tests.reliability.absurd import Take, Target, Tree
from tests.reliability.decoders import FRAMES, INFO

KEY = b"k" * 32
QUESTIONS: tuple[tuple[str, Any], ...] = (
    ("shm", shm_messages.Hello(b"t" * 16)),
    ("shm", shm_messages.Fetch(b"t" * 16, b"c" * 16, 1, 1, 3)),
    ("tcp", fabric_messages.Offer(0, 1, b"a" * 28, 1, 2, 3, 4, 1, 0, "")),
    ("tcp", fabric_messages.KeyRequest(1, 2, 3)),
    ("tcp", fabric_messages.Retire(1, 2)),
    ("tcp", fabric_messages.Gather(1, [(2, "lo"), (3, "lo")])),
    ("tcp", fabric_messages.MemberFailed(2, 1, 70)),
    ("tcp", fabric_messages.RetireEach(1, [(2, 70), (3, 0)])),
)


def _framed(tree: Tree) -> bytes:
    body = msgspec.msgpack.encode(tree)
    if len(body) > frames.MAX_FRAME:
        raise ValueError("refused by its length alone")
    return len(body).to_bytes(4, "little") + body


def _bodies(said: tuple[frames.Greeting | frames.Frame, ...]) -> list[Tree]:
    return [msgspec.msgpack.decode(frames.encode(frame)[4:]) for frame in said]


def _after_the_handshake() -> list[Tree]:
    asked = tuple(frames.Ask(n, name, msgspec.msgpack.encode(body)) for n, (name, body) in enumerate(QUESTIONS))
    return _bodies((*FRAMES[7:], *asked))


@asynccontextmanager
async def _engine() -> AsyncIterator[Take]:
    async with at.open_engine(key=KEY, config=at.Config(early_values=100)) as engine:
        raw: RawPeer | None = None

        async def take(data: bytes) -> bool:
            nonlocal raw
            if raw is None:
                raw = await RawPeer.connect(engine, key=KEY)
            raw.received.clear()
            await raw.say(data, frames.Ping(1))
            if await raw.hear(frames.Pong) is not None:
                return True
            await raw.close()
            raw = None
            return False

        try:
            yield take
        finally:
            if raw is not None:
                await raw.close()


MAC = b"m" * 32  # stands for the proof of this very handshake
NUMBER = 7  # and this for the incarnation of the one who speaks


class _Odd(Handshake):
    """It has the key, and says one frame of the handshake its own way."""

    odd: dict[type, bytes]

    def _send(self, frame: frames.Greeting) -> None:
        said = self.odd.pop(type(frame), None)
        if said is not None and isinstance(frame, frames.Accepted | frames.Info):
            said = self._proved(said, frame)
        self._output += said or frames.encode(frame)

    def _proved(self, said: bytes, frame: frames.Accepted | frames.Info) -> bytes:
        """It has the key: the proof covers the incarnation that this frame tells, whatever that is."""
        told = msgspec.msgpack.decode(said[4:])
        if len(told) > 2 and told[2] == NUMBER:
            told[2] = self._mine[1]  # another one for each connection
        if len(told) > 2 and told[1] == MAC and isinstance(told[2], int) and 0 <= told[2] < 1 << 64:
            self._mine = (self._mine[0], told[2], self._mine[2])
            told[1] = self._prove("acceptor" if isinstance(frame, frames.Accepted) else "dialer tells")
        body = msgspec.msgpack.encode(told)
        return len(body).to_bytes(4, "little") + body


_GREETINGS = {1: frames.Hello, 4: frames.Accepted, 5: frames.Info}


def _odd(role: Any, data: bytes) -> _Odd | None:
    """None: the frame is not of a kind that is said here."""
    kind = _GREETINGS.get(data[5]) if len(data) > 5 and data[4] & 0xF0 == 0x90 else None  # a short list that begins with a tag
    if kind is None:
        return None
    info = PeerInfo("odd", "127.0.0.1:1", os.getpid(), [])
    handshake = _Odd.__new__(_Odd)
    handshake.odd = {kind: data}
    handshake.__init__(role, load_key(KEY, {}), int.from_bytes(os.urandom(8)), info, b"n" * 32)  # type: ignore[misc]
    return handshake


@asynccontextmanager
async def _acceptor() -> AsyncIterator[Take]:
    """An engine that is dialled by such a side."""
    async with at.open_engine(key=KEY, config=at.Config(early_values=100)) as engine:

        async def take(data: bytes) -> bool:
            handshake = _odd("dialer", data)
            if handshake is None:
                return False
            raw = RawPeer(handshake, *await asyncio.open_connection(engine.address.host, engine.address.port))
            try:
                while not handshake.established:
                    await raw.say(handshake.take_output())
                    if not (more := await raw._reader.read(1 << 16)):
                        return False
                    handshake.receive(more)
                await raw.say(handshake.take_output(), frames.Ping(1))
                return await raw.hear(frames.Pong) is not None
            except (ConnectionError, at.RendezvousError):
                return False
            finally:
                await raw.close()

        yield take
        async with at.open_engine(key=KEY) as friend:
            await (await friend.connect(engine.address, timeout=10)).ping()


@asynccontextmanager
async def _dialer() -> AsyncIterator[Take]:
    """An engine that dials such a side, which has no way to offer."""
    async with at.open_engine(key=KEY) as engine:

        async def take(data: bytes) -> bool:
            handshake = _odd("acceptor", data)
            if handshake is None:
                return False

            over = asyncio.Event()

            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                raw = RawPeer(handshake, reader, writer)
                try:
                    while more := await reader.read(1 << 16):
                        for frame in handshake.receive(more):
                            if isinstance(frame, frames.Ask):
                                await raw.say(frames.Failed(frame.id, "broken", "no"))
                        await raw.say(handshake.take_output())
                except (ConnectionError, at.RendezvousError):
                    pass
                finally:
                    writer.close()
                    over.set()

            server = await asyncio.start_server(answer, "127.0.0.1", 0)
            try:
                await engine.connect(at.Address(*server.sockets[0].getsockname()), timeout=0.5)
            except at.TransferError:
                pass
            finally:
                server.close()
            await over.wait()
            return handshake.established

        yield take


def _dialled() -> list[Tree]:
    return _bodies((frames.Hello(frames.VERSION, 0, b"n" * 32, "shared"), frames.Info(MAC, NUMBER, INFO)))


def _accepted() -> list[Tree]:
    info = PeerInfo("x", "127.0.0.1:1", 1, [ProviderOffer("loopback", True, "", b"boot", b"")], (256, 1 << 22), ["10.0.0.1:1"])
    return _bodies((frames.Accepted(MAC, NUMBER, info),))


TARGETS = (
    Target("control", "frames and questions of a peer that is connected", _after_the_handshake, _framed, _engine),
    Target("greeting of a dialer", "the handshake, by a dialer that has the key", _dialled, _framed, _acceptor),
    Target("greeting of an acceptor", "the same, by the side that was dialled", _accepted, _framed, _dialer),
)  # fmt: skip
