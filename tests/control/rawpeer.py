"""A peer by hand: it has the key and then says whatever a test wants."""

from __future__ import annotations

import asyncio
import os

import aiotransfer as at
from aiotransfer.control import frames
from aiotransfer.control.frames import PeerInfo
from aiotransfer.control.handshake import Handshake
from aiotransfer.control.key import load_key


class RawPeer:
    """Authenticated over a plain stream."""

    def __init__(self, handshake: Handshake, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.handshake = handshake
        self._reader = reader
        self._writer = writer
        self.received: list[frames.Frame] = []

    @classmethod
    async def connect(
        cls, engine: at.Engine, info: PeerInfo | None = None, incarnation: int | None = None, key: bytes | None = None
    ) -> RawPeer:
        """Dial and shake hands; by default with the offers of an engine of this process."""
        info = info or PeerInfo("raw", "127.0.0.1:1", os.getpid(), engine._offers())
        number = int.from_bytes(os.urandom(8)) if incarnation is None else incarnation
        handshake = Handshake("dialer", load_key(key, os.environ), number, info, os.urandom(32))
        self = cls(handshake, *await asyncio.open_connection(engine.address.host, engine.address.port))
        while not handshake.established:
            await self.say(handshake.take_output())
            self.received += handshake.receive(await asyncio.wait_for(self._reader.read(1 << 16), 10))
        await self.say(handshake.take_output())
        if number != engine.incarnation:
            await self.say(frames.Ping(0))
            await self.hear(frames.Pong)  # from now on it is a known peer
        return self

    async def say(self, *what: frames.Frame | bytes) -> None:
        """Send frames, or bytes as they are."""
        for piece in what:
            self._writer.write(piece if isinstance(piece, bytes) else frames.encode(piece))
        try:
            await self._writer.drain()
        except ConnectionError:
            pass  # the engine has had enough

    async def hear(self, kind: type[frames.Frame] | None) -> frames.Frame | None:
        """The next frame of that kind; None when the engine hangs up, which is what `kind=None` waits for."""
        while True:
            for frame in self.received:
                if kind is not None and isinstance(frame, kind):
                    self.received.remove(frame)
                    return frame
            try:
                data = await asyncio.wait_for(self._reader.read(1 << 16), 10)
            except ConnectionError:
                return None
            if not data:
                return None
            self.received += self.handshake.receive(data)

    async def close(self) -> None:
        """Hang up."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass
