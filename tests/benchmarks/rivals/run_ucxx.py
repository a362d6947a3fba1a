"""UCXX: blocking progress, endpoint error handling off (else it takes tcp), send and receive, which is all its Python has."""

from __future__ import annotations

import asyncio
import base64
import os

os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
from importlib.metadata import version
from typing import Any

import libucx

libucx.load_library()
import ucxx as ucx
from worker import Pipes, main, start_target, table, touched


class End:
    """An endpoint made from worker addresses has no tags of its own: each direction gets a fixed one."""

    def __init__(self, endpoint: Any, send: int, receive: int) -> None:
        self._endpoint, self._send, self._receive = endpoint, send, receive

    def send(self, buffer: Any) -> Any:
        return self._endpoint.send(buffer, tag=self._send, force_tag=True)

    def recv(self, buffer: Any) -> Any:
        return self._endpoint.recv(buffer, tag=self._receive, force_tag=True)


async def end(pipes: Pipes, send: int, receive: int) -> End:
    ucx.init(progress_mode="blocking")
    pipes.say(address=base64.b64encode(bytes(ucx.get_worker_address())).decode())
    address = ucx.get_ucx_address_from_buffer(base64.b64decode(pipes.hear()["address"]))
    return End(await ucx.create_endpoint_from_worker_address(address, endpoint_error_handling=False), send, receive)


class Ucxx:
    how = f"UCXX {version('ucxx-cu12')}, blocking progress, error handling off, tagged send and receive, acknowledged per turn"

    async def open(self) -> None:
        self.memory = touched()
        self.target = start_target(__file__)
        self.end = await end(self.target, 1, 2)

    async def write(self, n: int, times: int) -> None:
        self.target.say(n=n, times=times, echo=False)
        for _ in range(times):
            await self.end.send(self.memory[:n])
        await self.end.recv(self.memory[:1])

    async def pages(self, page: int, times: int) -> None:
        here, _ = table(page)
        self.target.say(page=page, times=times)
        for _ in range(times):
            await asyncio.gather(*[self.end.send(self.memory[i * page : (i + 1) * page]) for i in here])
        await self.end.recv(self.memory[:1])

    async def ping(self, times: int) -> int:
        self.target.say(n=64, times=times, echo=True)
        for _ in range(times):
            await self.end.send(self.memory[:64])
            await self.end.recv(self.memory[:64])
        return 2

    async def serve(self, pipes: Pipes) -> None:
        memory = touched()
        far = await end(pipes, 2, 1)
        while True:
            order = await asyncio.to_thread(pipes.hear)
            for _ in range(order["times"]):
                if "page" in order:
                    page = order["page"]
                    await asyncio.gather(*[far.recv(memory[i * page : (i + 1) * page]) for i in table(page)[1]])
                else:
                    await far.recv(memory[: order["n"]])
                    if order["echo"]:
                        await far.send(memory[: order["n"]])
            if not order.get("echo"):
                await far.send(memory[:1])


if __name__ == "__main__":
    main(Ucxx)
