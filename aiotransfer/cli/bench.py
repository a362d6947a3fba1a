"""`bench`: bandwidth, rates, latency and idle CPU between two processes, each row beside its limit in the same run.

The limit of a copy is the better of memcpy and streaming stores with the same access pattern between two touched shared mappings;
that of a wake-up is an eventfd between the same two event loops. Both are measured alternately with ours; figures are medians of
rounds, the ratio is the median of the rounds' ratios with its spread.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from typing import Any

import aiotransfer as at
from aiotransfer.cli import _bench_cases as cases
from aiotransfer.cli._bench_rows import REGION
from aiotransfer.providers.limits import Limits, routine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    parser.add_argument("--provider", default="shm", help="the provider to measure (default shm)")
    parser.add_argument("--cases", default=",".join(cases.CASES), help=f"some of {','.join((*cases.CASES, *cases.MORE))}")
    parser.add_argument("--memory", choices=("allocated", "foreign"), default="allocated", help="the target's memory")
    parser.add_argument("--loop", choices=("auto", "uvloop", "asyncio"), default="auto")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per row (at least 5)")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--wake", help=argparse.SUPPRESS)
    parser.add_argument("--moe-rank", help=argparse.SUPPRESS)


def _runner(loop: str) -> tuple[str, Any]:
    if loop != "asyncio":
        try:
            import uvloop

            return f"uvloop {importlib.metadata.version('uvloop')}", uvloop.run
        except ImportError:
            if loop == "uvloop":
                raise
    return "asyncio", asyncio.run


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for and print it; the exit status."""
    wanted = [name for name in args.cases.split(",") if name]
    unknown = sorted(set(wanted) - {*cases.CASES, *cases.MORE})
    if unknown or args.rounds < 5:
        print(f"unknown cases: {unknown}" if unknown else "at least 5 rounds, please", file=sys.stderr)
        return 2
    name, runner = _runner(args.loop)
    if args.moe_rank:
        from aiotransfer.cli._bench_moe_rank import serve

        runner(serve(args.moe_rank))
        return 0
    if args.target:
        first, second = (int(x) for x in args.wake.split(","))
        runner(cases.serve(args.target, args.memory, args.provider, (first, second)))
        return 0
    rows = runner(_measure(args, wanted))
    result = {"machine": machine(name), "memory": args.memory, "provider": args.provider, "rows": rows}
    if args.json:
        print(json.dumps(result))
    else:
        print(markdown(result) if args.markdown else table(result))
    return 0


async def _measure(args: argparse.Namespace, wanted: list[str]) -> list[dict[str, Any]]:
    wake = (os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK))
    rows: list[dict[str, Any]] = []
    async with at.open_engine(name="bench", providers=args.provider, config=at.Config(spin_seconds=0)) as engine:
        process = subprocess.Popen(
            [sys.executable, "-m", "aiotransfer", "bench", "--target", str(engine.address), "--memory", args.memory,
             "--provider", args.provider, "--loop", args.loop, "--wake", f"{wake[0]},{wake[1]}"],
            pass_fds=wake,
        )  # fmt: skip
        try:
            peer = await anext(engine.arrivals())
            source = engine.allocate(REGION)
            source.numpy()[:] = 1
            remote = await peer.lookup("target")
            bench = cases.Bench(engine, peer, remote, source, Limits(REGION), args.rounds, wake, args.loop)
            await engine.write(source, remote)  # touch everything once
            for case in wanted:
                async for row in getattr(bench, case)():
                    rows.append(row.summary())
                    print(_line(rows[-1]), file=sys.stderr)
            await peer.send(b"leave")
            await asyncio.to_thread(process.wait, 20)
        finally:
            process.kill()
            process.wait()
            for fd in wake:
                os.close(fd)
    return rows


def machine(loop: str) -> str:
    """One line that names where the figures are from."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, {loop}, "
        f"aiotransfer {at.__version__}, streaming copies by {routine()}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    ours = f"{_number(row['ours'])} {row['unit']}"
    if "limit" not in row:
        return row["case"], ours, "", ""
    ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
    return row["case"], ours, f"{_number(row['limit'])} {row['unit']}", ratio


def _line(row: dict[str, Any]) -> str:
    case, ours, limit, ratio = _cells(row)
    return f"{case:<48} {ours:>16} {limit:>16}   {ratio}"


def table(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    head = f"{result['machine']}\n{'case':<48} {'ours':>16} {'limit':>16}   ratio (spread)"
    return "\n".join([head, *(_line(row) for row in result["rows"])])


def markdown(result: dict[str, Any]) -> str:
    """The result as a table in Markdown."""
    where = f"{result['machine']}; memory: {result['memory']}"
    lines = [where, "", "| case | ours | limit | ratio (spread) |", "|---|--:|--:|--:|"]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in result["rows"])])
