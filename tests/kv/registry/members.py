"""Members, and a backend that fails on demand."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from aiotransfer.kv.registry import Member, MemoryBackend
from tests.kv.party import small

_numbers = itertools.count(1)


def member(name: str = "a", role: str = "prefill", **other: Any) -> Member:
    number = next(_numbers)
    fields: dict[str, Any] = {"address": f"10.0.0.1:{number}", "incarnation": number, "layout": small(), "labels": {"zone": "b"}}
    return Member(role=role, name=name, **(fields | other))


class Frail(MemoryBackend):
    """Raises while it is `down`, does not return while it `hangs`; `calls` names what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = self.hangs = False
        self.calls: list[str] = []

    async def _weather(self, what: str) -> None:
        self.calls.append(what)
        await asyncio.sleep(0)  # a point where a cancellation may come, as every real backend has
        if self.hangs:
            await asyncio.sleep(1000)
        if self.down:
            raise ConnectionRefusedError("nobody there")

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        await self._weather("put")
        await super().put(key, value, ttl)
        await self._weather("put, done")

    async def keep_alive(self, key: str, ttl: float) -> bool:
        await self._weather("keep_alive")
        return await super().keep_alive(key, ttl)

    async def delete(self, key: str) -> None:
        await self._weather("delete")
        await super().delete(key)

    async def entries(self) -> dict[str, bytes]:
        await self._weather("entries")
        return await super().entries()

    async def changed(self, seconds: float) -> None:
        await self._weather("changed")
        await super().changed(seconds)
