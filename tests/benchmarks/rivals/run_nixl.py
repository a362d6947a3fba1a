"""NIXL: UCX backend, requests prepared beforehand. Its completion is polled: it offers nothing to await.

Its target is looked after by a poll every millisecond, which connecting needs. The progress thread is off where shared memory
does without one; by tcp (UCX_TLS) nothing lands while the target does not come round, and it is on.
"""

from __future__ import annotations

import asyncio
import base64
import os
from importlib.metadata import version
from typing import Any

from worker import REGION, Pipes, main, start_target, table, touched

os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")


THREAD = os.environ.get("UCX_TLS") == "tcp"


def new_agent(name: str) -> Any:
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(enable_prog_thread=THREAD, backends=["UCX"]))


class Nixl:
    how = f"NIXL {version('nixl-cu12')}, UCX, prepared requests, progress thread {'on' if THREAD else 'off'}, completion polled"

    async def open(self) -> None:
        self.memory, self.agent = touched(), new_agent("initiator")
        self.agent.register_memory([(self.memory.ctypes.data, REGION, 0, "")], "DRAM")
        self.target = start_target(__file__)
        answer = self.target.hear()
        self.there: int = answer["base"]
        self.name = self.agent.add_remote_agent(base64.b64decode(answer["metadata"]))
        self.handles: dict[tuple[int, int], Any] = {}

    def _handle(self, key: tuple[int, int], places: list[tuple[int, int]], n: int) -> Any:
        if key not in self.handles:
            bases = (self.memory.ctypes.data, self.there)
            lists = [
                self.agent.get_xfer_descs([(bases[side] + place[side] * n, n, 0) for place in places], "DRAM") for side in (0, 1)
            ]
            self.handles[key] = self.agent.initialize_xfer("WRITE", lists[0], lists[1], self.name)
        return self.handles[key]

    def _run(self, handle: Any, times: int) -> None:
        agent = self.agent
        for _ in range(times):
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(state)

    async def write(self, n: int, times: int) -> None:
        self._run(self._handle((0, n), [(0, 0)], n), times)

    async def pages(self, page: int, times: int) -> None:
        self._run(self._handle((1, page), list(zip(*table(page), strict=True)), page), times)

    async def serve(self, pipes: Pipes) -> None:
        memory, agent = touched(), new_agent("target")
        agent.register_memory([(memory.ctypes.data, REGION, 0, "")], "DRAM")
        pipes.say(base=memory.ctypes.data, metadata=base64.b64encode(agent.get_agent_metadata()).decode())
        gone = asyncio.ensure_future(asyncio.to_thread(pipes.hear))
        while not gone.done():
            agent.get_new_notifs()
            await asyncio.sleep(0.001)


if __name__ == "__main__":
    main(Nixl)
