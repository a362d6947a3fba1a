"""Ours beside NIXL and uvloop streams: the same bytes between the same two processes, turn by turn in one run.

    make bench-rivals [ARGS="--json --rounds 7"]

NIXL: UCX backend, requests prepared beforehand, progress thread off; its completion is polled, for it offers nothing to await.
Its target is looked after by a poll every millisecond while NIXL is measured (connecting needs that), and not otherwise.
Streams: a Unix socket on uvloop, length first, read into place at the target, one byte back. Ours: `await engine.write`, memory
from `allocate`. All three use memory of the same size, touched beforehand.
A rival that cannot be used is left out, with its reason.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

import aiotransfer as at
from aiotransfer.cli.bench import machine

REGION = 256 << 20
SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20)
PAGES = (4 << 10, 16 << 10, 64 << 10)
TABLE = 4096
SPAN = 0.1
HEAD = 8

os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")


def nixl_agent(name: str) -> Any:
    from nixl_cu12._api import nixl_agent as agent
    from nixl_cu12._api import nixl_agent_config

    return agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def touched() -> np.ndarray[Any, np.dtype[np.uint8]]:
    memory = np.empty(REGION, np.uint8)
    memory[:] = 1
    return memory


# ---- the target ----


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


async def target(address: str, path: str) -> None:
    async with at.open_engine(name="target") as engine:
        region = engine.allocate(REGION)
        region.numpy()[:] = 1
        engine.publish("target", region)
        sink = memoryview(touched())
        server = await asyncio.get_running_loop().create_unix_server(lambda: Sink(sink), path)
        peer = await engine.connect(address)
        agent, poller, memory = None, None, None
        async for message in engine.messages():
            if message.data == b"nixl":
                try:
                    memory, agent = touched(), nixl_agent("target")
                    agent.register_memory([(memory.ctypes.data, REGION, 0, "")], "DRAM")
                    await peer.send(memory.ctypes.data.to_bytes(8, "little") + agent.get_agent_metadata())
                except Exception as error:
                    await peer.send(b"\0" * 8 + f"{type(error).__name__}: {error}".encode())
            elif message.data == b"poll on" and agent is not None:
                poller = asyncio.create_task(poll(agent))
            elif message.data == b"poll off" and poller is not None:
                poller.cancel()
            elif message.data == b"leave":
                server.close()
                os._exit(0)  # NIXL's own threads would keep the process


async def poll(agent: Any) -> None:
    while True:
        agent.get_new_notifs()
        await asyncio.sleep(0.001)


# ---- the initiator: each way is a coroutine function for one write ----

Way = Callable[[], Awaitable[None]]


class Streams:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, memory: Any) -> None:
        self._reader, self._writer, self._memory = reader, writer, memoryview(memory)

    def write(self, n: int) -> Way:
        async def go() -> None:
            self._writer.write(n.to_bytes(HEAD, "little"))
            self._writer.write(self._memory[:n])
            await self._writer.drain()
            await self._reader.readexactly(1)

        return go


class Nixl:
    def __init__(self, agent: Any, name: str, here: int, there: int) -> None:
        self._agent, self._name, self._here, self._there = agent, name, here, there

    def _prepared(self, places: list[tuple[int, int]], n: int) -> Way:
        lists = [
            self._agent.get_xfer_descs([(base + place[i] * n, n, 0) for place in places], "DRAM")
            for i, base in ((0, self._here), (1, self._there))
        ]
        handle = self._agent.initialize_xfer("WRITE", lists[0], lists[1], self._name)
        agent = self._agent

        async def go() -> None:
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(state)

        return go

    def write(self, n: int) -> Way:
        return self._prepared([(0, 0)], n)

    def pages(self, here: Any, there: Any, page: int) -> Way:
        return self._prepared(list(zip(here.tolist(), there.tolist(), strict=True)), page)


async def seconds(way: Way, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        await way()
    return (time.perf_counter() - start) / repeats


async def compare(
    name: str, unit: str, amount: float, ways: dict[str, Way], rounds: int, seen: Callable[[bool], Awaitable[None]]
) -> Any:
    rates: dict[str, list[float]] = {who: [] for who in ways}
    repeats: dict[str, int] = {}
    for turn in range(rounds + 1):  # the first one warms up and calibrates
        for who, way in ways.items():
            await seen(who == "nixl")
            spent = await seconds(way, repeats.get(who, 2))
            if turn == 0:
                repeats[who] = max(1, min(20_000, int(SPAN / spent)))
            else:
                rates[who].append(amount / spent)
    row: dict[str, Any] = {"case": name, "unit": unit}
    for who, values in rates.items():
        row[who] = statistics.median(values)
        if who != "ours":
            ratios = [a / b for a, b in zip(rates["ours"], values, strict=True)]
            row[f"ours/{who}"] = [statistics.median(ratios), min(ratios), max(ratios)]
    print(line(row), file=sys.stderr)
    return row


async def measure(rounds: int) -> tuple[list[Any], dict[str, str]]:
    missing: dict[str, str] = {}
    path = str(Path(tempfile.mkdtemp()) / "sink")
    async with at.open_engine(name="rivals") as engine:
        command = [sys.executable, __file__, "--target", str(engine.address), "--path", path]
        process = subprocess.Popen(command)
        try:
            peer = await anext(engine.arrivals())
            remote, source = await peer.lookup("target"), engine.allocate(REGION)
            source.numpy()[:] = 2
            streams = Streams(*await asyncio.open_unix_connection(path), touched())
            nixl = await find_nixl(engine, peer, missing)
            state = False

            async def seen(on: bool) -> None:
                nonlocal state
                if nixl is not None and on != state:
                    state = on
                    await peer.send(b"poll on" if on else b"poll off")
                    await asyncio.sleep(0.005)

            rows = []
            for n in SIZES:
                here, there = source[:n], remote[:n]
                ways: dict[str, Way] = {"ours": lambda s=here, t=there: engine.write(s, t)}  # type: ignore[misc]
                if nixl is not None:
                    ways["nixl"] = nixl.write(n)
                ways["streams"] = streams.write(n)
                rows.append(await compare(f"write {size(n)}", "GB/s", n / 1e9, ways, rounds, seen))
            rng = np.random.default_rng(7)
            for page in PAGES:
                a, b = (rng.permutation(REGION // page)[:TABLE].astype(np.int64) for _ in range(2))
                ways = {"ours": lambda a=a, b=b, p=page: engine.write_pages(source, a, remote, b, page_bytes=p)}  # type: ignore[misc]
                if nixl is not None:
                    ways["nixl"] = nixl.pages(a, b, page)
                rows.append(await compare(f"{TABLE:,} pages of {size(page)}", "GB/s", TABLE * page / 1e9, ways, rounds, seen))
            await peer.send(b"leave")
            await asyncio.sleep(0.2)
            return rows, missing
        finally:
            process.kill()
            process.wait()


async def find_nixl(engine: at.Engine, peer: at.Peer, missing: dict[str, str]) -> Nixl | None:
    try:
        agent = nixl_agent("initiator")
        memory = touched()
        agent.register_memory([(memory.ctypes.data, REGION, 0, "")], "DRAM")
        await peer.send(b"nixl")
        answer = (await anext(engine.messages())).data
        there = int.from_bytes(answer[:8], "little")
        if there == 0:
            raise RuntimeError(answer[8:].decode())
        found = Nixl(agent, agent.add_remote_agent(answer[8:]), memory.ctypes.data, there)
        found.memory = memory  # type: ignore[attr-defined]
        return found
    except Exception as error:
        missing["nixl"] = f"{type(error).__name__}: {error}"
        return None


def size(n: int) -> str:
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"


def line(row: dict[str, Any]) -> str:
    cells = [row["case"]]
    for who in ("ours", "nixl", "streams"):
        cells.append(f"{row[who]:.3g} {row['unit']}" if who in row else "")
        if f"ours/{who}" in row:
            cells.append("{:.2f} ({:.2f}-{:.2f})".format(*row[f"ours/{who}"]))
        elif who != "ours":
            cells.append("")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="ours beside NIXL and uvloop streams")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.target:
        uvloop.run(target(args.target, args.path))
        return
    rows, missing = uvloop.run(measure(max(5, args.rounds)))
    name = machine(f"uvloop {uvloop.__version__}")
    if args.json:
        print(json.dumps({"machine": name, "rows": rows, "missing": missing}))
        return
    print(name, *(f"{who} is left out: {why}" for who, why in missing.items()), "", sep="\n")
    print("| case | ours | NIXL | ours / NIXL | uvloop streams | ours / streams |\n|---|--:|--:|--:|--:|--:|")
    print(*map(line, rows), sep="\n")
    sys.stdout.flush()
    os._exit(0)  # NIXL's threads


if __name__ == "__main__":
    main()
