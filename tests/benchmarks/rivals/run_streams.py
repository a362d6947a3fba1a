"""asyncio over a Unix socket: length first, read into place at the target by a protocol, one byte back. UVLOOP=1: on uvloop.

Pings go from coroutine to coroutine by a second connection with streams at both ends.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from typing import Any

from worker import Pipes, main, start_target, touched

UVLOOP = os.environ.get("UVLOOP") == "1"
HEAD = 8


class Sink(asyncio.BufferedProtocol):
    """Reads a length and then so many bytes into the memory; answers one byte."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._head = memory, bytearray(HEAD)
        self._at = self._want = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def get_buffer(self, hint: int) -> Any:
        return self._memory[self._at : self._want] if self._want else memoryview(self._head)[self._at :]

    def buffer_updated(self, n: int) -> None:
        self._at += n
        if not self._want and self._at == HEAD:
            self._want, self._at = int.from_bytes(self._head, "little"), 0
        elif self._want and self._at == self._want:
            self._want = self._at = 0
            self._transport.write(b".")


class Streams:
    how = f"{'uvloop' if UVLOOP else 'asyncio'} streams over a Unix socket, acknowledged"
    uvloop = UVLOOP

    async def open(self) -> None:
        self.memory = memoryview(touched())
        self.target = start_target(__file__)
        path = self.target.hear()["path"]
        self.reader, self.writer = await asyncio.open_unix_connection(path)
        self.pong, self.ping_writer = await asyncio.open_unix_connection(path + ".ping")

    async def write(self, n: int, times: int) -> None:
        for _ in range(times):
            self.writer.write(n.to_bytes(HEAD, "little"))
            self.writer.write(self.memory[:n])
            await self.writer.drain()
            await self.reader.readexactly(1)

    async def ping(self, times: int) -> int:
        for _ in range(times):
            self.ping_writer.write(bytes(64))
            await self.pong.readexactly(64)
        return 2

    async def serve(self, pipes: Pipes) -> None:
        memory, path = memoryview(touched()), os.path.join(tempfile.mkdtemp(), "sink")
        await asyncio.get_running_loop().create_unix_server(lambda: Sink(memory), path)

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                writer.write(await reader.readexactly(64))

        await asyncio.start_unix_server(echo, path + ".ping")
        pipes.say(path=path)
        await asyncio.to_thread(pipes.hear)


if __name__ == "__main__":
    main(Streams)
