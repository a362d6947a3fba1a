"""One side of an operation under fire: it repeats the operation until it fails or is told to stop, and says how it went.

The matrix runs it in its own process beside the simulator, and as another process for the providers that need one:

    python -m tests.reliability.party ADDRESS [LISTEN]       commands on stdin, answers on stdout, one JSON value a line
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import aiotransfer as at
from aiotransfer.providers import native
from aiotransfer.testing.faults import block_loop

N = 256 << 10
PAGE = 4096
IMM = 1
POISON = 0xA5
UNITS = {"write": 1, "pages": N // PAGE, "scatter": 2, "signal": 1}
OPERATIONS = (*UNITS, "read", "message", "lookup", "barrier")
SLOWNESS = float(os.environ.get("TESTS_SLOWNESS", "1"))  # of an emulated machine
CONFIG = {"peer_timeout": 0.5 * SLOWNESS, "drain_timeout": 0.1 * SLOWNESS}


class Party:
    """An engine, its memory, and what it is doing."""

    def __init__(self, engine: at.Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine, self.clock = engine, clock
        self.region = engine.allocate(N)
        self.source = engine.allocate(N)
        self.source.numpy()[:] = 1
        self.lease: at.Lease | None = None
        self.peer: at.Peer
        self.remote: at.RemoteRegion
        self.group: at.PeerGroup
        self.deadline: float | None = None
        self.done = 0  # operations that ended well
        self.begun = 0
        self.counted_before = engine.counter(imm=IMM).total
        self.task: asyncio.Task[None]
        self.told = False
        self.error: BaseException | None = None
        self.ended = 0.0

    async def meet(self, address: str | None) -> None:
        """Find the other side; with an address, dial it."""
        self.peer = await (anext(self.engine.arrivals()) if address is None else self.engine.connect(address))
        self.lease = self.region.lease(self.peer, access="both")
        self.small = self.engine.allocate(64)
        self.engine.publish("counted", self.small)
        # Ports come again in a long run, and with them the group of a process that is gone, broken as that left it.
        both = sorted(f"{one:x}" for one in (self.engine.incarnation, self.peer.incarnation))
        self.group = self.engine.group(sorted([str(self.engine.address), str(self.peer.address)]), name="-".join(both))

    async def leave(self) -> None:
        """Give back what it has of the engine."""
        self.group.close()
        self.engine.unpublish("counted")
        counter = self.engine.counter(imm=IMM)
        if counter.value:
            await counter.wait(counter.value)
        for region in (self.region, self.source, self.small):
            await region.aclose()
        with contextlib.suppress(at.TransferError):
            await self.peer.aclose()

    def counted(self) -> int:
        """Arrivals since it began."""
        return self.engine.counter(imm=IMM).total - self.counted_before

    def begin(self, operation: str, role: str) -> None:
        """Start to repeat it."""
        self.task = asyncio.ensure_future(self._repeat(operation, role))

    async def _repeat(self, operation: str, role: str) -> None:
        one = getattr(self, f"_{operation if role == 'here' or operation == 'barrier' else f'take_{operation}'}", None)
        try:
            while not self.told:
                self.begun += 1
                if one is not None:
                    await one()
                elif operation in UNITS:
                    await self.engine.counter(imm=IMM).wait(UNITS[operation], peers=[self.peer])
                else:
                    await self._told_or_lost()
                self.done += 1
                await asyncio.sleep(0)
        except (at.TransferError, asyncio.CancelledError) as error:
            self.error = error
        finally:
            self.ended = self.clock()
            if role == "here" and self.engine._state == "open":
                self.source.numpy()[:] = POISON  # the await has ended: nobody may read it any more

    async def _write(self) -> None:
        await self.engine.write(self.source, self.remote, imm=IMM, timeout=self.deadline)

    async def _pages(self) -> None:
        pages = range(N // PAGE)
        await self.engine.write_pages(
            self.source, list(pages), self.remote, list(pages), page_bytes=PAGE, imm=IMM, timeout=self.deadline
        )

    async def _scatter(self) -> None:
        half = N // 2
        targets = [at.ScatterTarget(i * half, half, self.remote[i * half : (i + 1) * half]) for i in range(2)]
        await self.engine.scatter(self.source, targets, imm=IMM, timeout=self.deadline)

    async def _signal(self) -> None:
        await self.engine.signal(self.peer, IMM, timeout=self.deadline)

    async def _read(self) -> None:
        await self.engine.read(self.remote, self.source, timeout=self.deadline)

    async def _message(self) -> None:
        await self.peer.send(b"some words")

    async def _lookup(self) -> None:
        await self.peer.lookup("counted", timeout=self.deadline)

    async def _barrier(self) -> None:
        await self.group.barrier(timeout=self.deadline)

    async def _take_message(self) -> None:
        async def one() -> None:
            async for _ in self.engine.messages():
                return

        async def watch() -> None:
            while True:
                await self._told_or_lost()

        await self._first(one(), watch())

    async def _told_or_lost(self) -> None:
        """What a side does that has no part in the operation: it asks from time to time whether the other is there."""
        await self.peer.ping()
        await asyncio.sleep(0.01)

    async def _first(self, *works: Any) -> None:
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what may be done to it ----

    async def strike(self, fault: str, argument: float = 0.0) -> None:
        """The faults that a process does to itself."""
        if fault == "cancel":
            self.task.cancel()
        elif fault == "deadline":
            self.deadline = 0.0
        elif fault == "engine closed":
            await self.engine.aclose()
        elif fault == "peer closed":
            await self.peer.aclose()
        elif fault == "regions closed":
            self.source.close()
            with contextlib.suppress(at.QuarantineError):
                await self.region.aclose()
        elif fault == "lease revoked":
            assert self.lease is not None
            await self.lease.revoke()
        elif fault == "control cut":
            self.peer._link.abort()
        elif fault == "garbage":
            self.peer._link._transport.write(b"\xff" * 64)
        elif fault == "path broken":
            path = self.peer.path
            assert native.lib.at_fab_break(self.engine._p, path.lane_peer) == 0
        elif fault == "wrong arguments":
            self._wrong()
        elif fault == "loop blocked":
            block_loop(argument)
        else:
            raise ValueError(fault)

    def _wrong(self) -> None:
        for wrong in (
            lambda: self.engine.write(self.source, self.remote[: N - 1]),
            lambda: self.engine.write_pages(self.source, [0], self.remote, [N // PAGE], page_bytes=PAGE),
            lambda: self.engine.write(self.source, self.remote, imm=1 << 32),
            lambda: self.engine.write(self.source, self.remote, imm=0xF000_0000),
            lambda: self.remote[1 : N + 1],
            lambda: self.engine.scatter(self.source, [at.ScatterTarget(0, N, self.remote[:8])]),
            lambda: self.engine.signal(self.peer, -1),
        ):
            try:
                wrong()
            except (ValueError, TypeError, IndexError):
                continue
            raise AssertionError("something wrong was accepted")

    async def finish(self) -> None:
        """Stop repeating after the one under way."""
        self.told = True

    def result(self) -> dict[str, Any]:
        """How it went."""
        error = self.error
        errors = [e for e in error.results if e is not None] if isinstance(error, at.ScatterError) else [error] if error else []
        return {
            "begun": self.begun, "done": self.done, "over": self.task.done(), "errors": [type(e).__name__ for e in errors],
            "text": str(error) if error else "", "ended": self.ended,
        }  # fmt: skip


async def _main(address: str, listen: str = "127.0.0.1:0") -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    def say(value: Any) -> None:
        print(json.dumps(value), flush=True)

    async with at.open_engine(listen=listen, config=at.Config(**CONFIG), timeout=10, name="struck") as engine:
        party = Party(engine)
        await party.meet(address)
        say({"lease": party.lease.descriptor.encode().hex() if party.lease else "", "address": str(engine.address)})
        while line := await reader.readline():
            order = json.loads(line)
            what = order.pop("do")
            if what == "remote":
                party.remote = at.RemoteRegion.decode(bytes.fromhex(order["lease"]))
                say("ok")
            elif what == "begin":
                party.begin(order["operation"], order["role"])
                say("ok")
            elif what == "strike":
                say("ok")
                await party.strike(order["fault"], order["argument"])
            elif what == "finish":
                await party.finish()
                await asyncio.wait([party.task], timeout=5)
                say(party.result())
            else:
                return


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
