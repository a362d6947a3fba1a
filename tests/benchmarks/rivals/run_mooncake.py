"""Mooncake's transfer engine over tcp, its only way without RDMA; pages as two batches of 2,048 (its queue's limit)."""

from __future__ import annotations

import os

os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
os.environ.setdefault("GLOG_minloglevel", "2")
from importlib.metadata import version
from typing import Any

from worker import REGION, Pipes, main, start_target, table, touched

BATCH = 2048


def new_engine() -> tuple[Any, str]:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError("initialize failed")
    return engine, f"127.0.0.1:{engine.get_rpc_port()}"


class Mooncake:
    how = f"Mooncake {version('mooncake-transfer-engine-non-cuda')}, tcp, transfer_sync_write and batch_transfer_sync_write"

    async def open(self) -> None:
        self.memory = touched()
        self.engine, _ = new_engine()
        self.engine.register_memory(self.memory.ctypes.data, REGION)
        self.target = start_target(__file__)
        answer = self.target.hear()
        self.name, self.there = answer["name"], answer["base"]

    async def write(self, n: int, times: int) -> None:
        for _ in range(times):
            if self.engine.transfer_sync_write(self.name, self.memory.ctypes.data, self.there, n):
                raise RuntimeError("a write failed")

    async def pages(self, page: int, times: int) -> None:
        here, there = table(page)
        sources = [self.memory.ctypes.data + i * page for i in here]
        targets = [self.there + i * page for i in there]
        for _ in range(times):
            for i in range(0, len(here), BATCH):
                sizes = [page] * len(sources[i : i + BATCH])
                if self.engine.batch_transfer_sync_write(self.name, sources[i : i + BATCH], targets[i : i + BATCH], sizes):
                    raise RuntimeError("a batch failed")

    async def serve(self, pipes: Pipes) -> None:
        memory = touched()
        engine, name = new_engine()
        engine.register_memory(memory.ctypes.data, REGION)
        pipes.say(name=name, base=memory.ctypes.data)
        pipes.hear()


if __name__ == "__main__":
    main(Mooncake)
