"""`ping HOST:PORT`: an authenticated conversation with an engine over each way to it: latency and bandwidth,
or why not.

Any engine answers: then the round trip of the control connection is shown for each way that comes up. One
that was started by `ping --listen HOST:PORT` also lends memory, and real writes go both ways. Each way gets
an engine of its own on this side.

Exit status 0 when at least one way came up and no byte was wrong, 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
import warnings
from typing import Any

import numpy as np

import aiotransfer as at
from aiotransfer.providers.selection.availability import availability

SERVER = "aiotransfer ping"  # the name of an engine that serves `ping`
REGION = "aiotransfer ping"
BLOCK, BLOCKS = 4 << 20, 16
SMALL = 64
ROUNDS = 200
SESSION_SECONDS = 60.0
PING, BULK = 1, 2  # immediates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("address", nargs="?", metavar="HOST:PORT", help="the engine to ping")
    parser.add_argument("--listen", metavar="HOST:PORT", help="be the other side, until interrupted")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds for each way (default 10)")
    parser.add_argument("--json", action="store_true", help="print JSON objects")


def run(args: argparse.Namespace) -> int:
    """Run the side that the arguments name: `--listen`, or an address to measure."""
    if (args.address is None) == (args.listen is None):
        print("ping: give either HOST:PORT or --listen HOST:PORT")
        return 2
    if args.listen is not None:
        asyncio.run(serve(args.listen, args.json))
        return 0
    report = asyncio.run(ping(args.address, args.timeout))
    print(json.dumps(report) if args.json else text(report))
    return 0 if report["reachable"] and all(way.get("verified", True) for way in report["ways"].values()) else 1


# ---- the side that serves ----


async def serve(listen: str, as_json: bool = False) -> None:
    """Lend memory, echo small writes, take large ones and write them back; one peer at a time, until
    cancelled."""
    async with at.open_engine(listen=listen, name=SERVER) as engine:
        address = str(engine.address)
        print(json.dumps({"listening": address}) if as_json else f"listening on {address}", flush=True)
        lent = engine.allocate(BLOCK)
        engine.publish(REGION, lent)
        counters = engine.counter(imm=PING), engine.counter(imm=BULK)
        async for message in engine.messages():
            try:
                for counter in counters:  # what a peer that went away in the middle left behind
                    await counter.wait(counter.value)
                async with asyncio.timeout(SESSION_SECONDS):
                    await _session(engine, message, lent, *counters)
            except (at.TransferError, TimeoutError) as error:  # that peer's trouble; the next one is served all the same
                print(f"{message.peer}: {error or 'not done in time'}", file=sys.stderr, flush=True)


async def _session(engine: at.Engine, message: at.Message, lent: at.Region, pings: at.Counter, bulk: at.Counter) -> None:
    """One peer: its message is the memory it lends in turn."""
    peer, back = message.peer, at.RemoteRegion.decode(message.data)
    lent.numpy()[:] = 0
    await peer.send(b"go")
    for _ in range(ROUNDS):
        await pings.wait(1, peers=[peer])
        await engine.write(lent[:SMALL], back[:SMALL], imm=PING)
    await bulk.wait(BLOCKS, peers=[peer])
    start = time.perf_counter()
    for _ in range(BLOCKS):
        await engine.write(lent, back)  # what came goes back: the peer sees whether all of it went both ways
    await peer.send(json.dumps(time.perf_counter() - start).encode())


# ---- the side that asks ----


async def ping(address: str, timeout: float) -> dict[str, Any]:
    """Try every known provider, one after the other."""
    ways: dict[str, dict[str, Any]] = {}
    for name, reason in availability().items():
        ways[name] = {"refused": reason} if reason is not None else await _way(address, name, timeout)
    report: dict[str, Any] = {"address": address, "ways": ways, "reachable": any("refused" not in way for way in ways.values())}
    report["chosen"] = await _chosen(address, timeout) if report["reachable"] else None
    return report


async def _chosen(address: str, timeout: float) -> str | None:
    """What an engine takes that leaves the choice to us."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a slow way: the figures say it
            async with at.open_engine(timeout=timeout) as engine:
                return (await engine.connect(address)).path.provider
    except (at.TransferError, OSError):
        return None


async def _way(address: str, provider: str, timeout: float) -> dict[str, Any]:
    try:
        async with asyncio.timeout(2 * timeout), at.open_engine(providers=provider, timeout=timeout) as engine:
            peer = await engine.connect(address, require=provider)
            control = []
            for _ in range(10):
                start = time.perf_counter()  # finer than some event loops' own clocks
                await peer.ping()
                control.append(time.perf_counter() - start)
            way: dict[str, Any] = {"rails": list(peer.path.rails), "control_us": round(statistics.median(control) * 1e6, 1)}
            if peer.name == SERVER:
                way |= await _measure(engine, peer)
            return way
    except TimeoutError as error:
        return {"refused": f"TransferTimeout: {str(error) or f'not done within {2 * timeout:g} s'}".partition("\n")[0]}
    except at.ProviderUnavailableError as error:
        return {"refused": dict(error.attempts).get(provider, error.message)}
    except (at.TransferError, OSError) as error:
        return {"refused": f"{type(error).__name__}: {error}".partition("\n")[0]}


async def _measure(engine: at.Engine, peer: at.Peer) -> dict[str, Any]:
    """Latency and bandwidth of real writes, there and back."""
    theirs = await peer.lookup(REGION)
    mine, source = engine.allocate(BLOCK), engine.allocate(BLOCK)
    source.numpy()[:] = np.random.default_rng().integers(0, 256, BLOCK, np.uint8)
    echoed = engine.counter(imm=PING)
    messages = engine.messages()
    await peer.send(mine.descriptor.encode())
    await anext(messages)  # it may be busy with another peer

    trips = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        await engine.write(source[:SMALL], theirs[:SMALL], imm=PING)
        await echoed.wait(1, peers=[peer])
        trips.append(time.perf_counter() - start)

    start = time.perf_counter()
    for _ in range(BLOCKS):
        await engine.write(source, theirs, imm=BULK)
    there = time.perf_counter() - start
    back = float(json.loads((await anext(messages)).data))
    return {
        "round_trip_us": round(statistics.median(trips) * 1e6, 1),
        "round_trip_p99_us": round(sorted(trips)[int(0.99 * ROUNDS)] * 1e6, 1),
        "there_GBps": round(BLOCK * BLOCKS / there / 1e9, 3),
        "back_GBps": round(BLOCK * BLOCKS / back / 1e9, 3),
        "verified": bool(np.array_equal(mine.numpy(), source.numpy())),
    }


def text(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [report["address"]]
    for name, way in report["ways"].items():
        if "refused" in way:
            lines.append(f"  {name:<9} no: {way['refused']}")
            continue
        line = f"  {name:<9} control round trip {way['control_us']:g} us"
        if "round_trip_us" in way:
            line += f", writes {way['round_trip_us']:g} us there and back (p99 {way['round_trip_p99_us']:g}), "
            line += f"{way['there_GBps']:g} GB/s there, {way['back_GBps']:g} GB/s back, "
            line += f"bytes {'right' if way['verified'] else 'WRONG'}"
        else:
            line += " (start the other side by `ping --listen` to measure writes)"
        lines.append(line)
    lines.append(f"taken when nothing is required: {report['chosen']}" if report["reachable"] else "no way to it")
    return "\n".join(lines)
