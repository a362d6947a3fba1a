"""torch.distributed's gloo: send and receive over TCP; pages by isend and irecv."""

from __future__ import annotations

import os
import socket

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
import torch
import torch.distributed as dist
from worker import Pipes, main, start_target, table, touched


def join(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)


class Gloo:
    how = f"torch {torch.__version__} gloo, send and recv, acknowledged per turn"

    async def open(self) -> None:
        self.memory = torch.from_numpy(touched())
        self.target = start_target(__file__)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.target.say(port=port)
        join(0, port)

    async def write(self, n: int, times: int) -> None:
        self.target.say(n=n, times=times, echo=False)
        for _ in range(times):
            dist.send(self.memory[:n], 1)
        dist.recv(self.memory[:1], 1)

    async def pages(self, page: int, times: int) -> None:
        self.target.say(page=page, times=times)
        parts = [self.memory[i * page : (i + 1) * page] for i in table(page)[0]]
        for _ in range(times):
            for work in [dist.isend(part, 1) for part in parts]:
                work.wait()
        dist.recv(self.memory[:1], 1)

    async def ping(self, times: int) -> int:
        self.target.say(n=64, times=times, echo=True)
        for _ in range(times):
            dist.send(self.memory[:64], 1)
            dist.recv(self.memory[:64], 1)
        return 2

    async def serve(self, pipes: Pipes) -> None:
        memory = torch.from_numpy(touched())
        join(1, pipes.hear()["port"])
        while True:
            order = pipes.hear()
            for _ in range(order["times"]):
                if "page" in order:
                    page = order["page"]
                    for work in [dist.irecv(memory[i * page : (i + 1) * page], 0) for i in table(page)[1]]:
                        work.wait()
                else:
                    dist.recv(memory[: order["n"]], 0)
                    if order["echo"]:
                        dist.send(memory[: order["n"]], 0)
            if not order.get("echo"):
                dist.send(memory[:1], 0)


if __name__ == "__main__":
    main(Gloo)
