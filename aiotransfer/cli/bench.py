"""`bench`: bandwidth, rates, latency and idle CPU between two processes, each row beside its limit in the
same run.

The limit of a copy is the better of memcpy and streaming stores with the same access pattern between two
touched shared mappings; that of a wake-up is an eventfd between the same two event loops. Both are measured
alternately with ours; figures are medians of rounds, the ratio is the median of the rounds' ratios with its
spread.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from aiotransfer.bench import cases
from aiotransfer.bench.session import Wanted, machine, measure, runner


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


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for and print it; the exit status."""
    wanted = [name for name in args.cases.split(",") if name]
    unknown = sorted(set(wanted) - {*cases.CASES, *cases.MORE})
    if unknown or args.rounds < 5:
        print(f"unknown cases: {unknown}" if unknown else "at least 5 rounds, please", file=sys.stderr)
        return 2
    name, on_loop = runner(args.loop)
    if args.moe_rank:
        from aiotransfer.bench.moe_rank import serve

        on_loop(serve(args.moe_rank))
        return 0
    if args.target:
        from aiotransfer.bench.target import serve as serve_target

        first, second = (int(x) for x in args.wake.split(","))
        on_loop(serve_target(args.target, args.memory, args.provider, (first, second)))
        return 0
    sought = Wanted(wanted, args.provider, args.memory, args.rounds, args.loop)
    rows = on_loop(measure(sought, lambda row: print(_line(row), file=sys.stderr)))
    result = {"machine": machine(name), "memory": args.memory, "provider": args.provider, "rows": rows}
    if args.json:
        print(json.dumps(result))
    else:
        print(markdown(result) if args.markdown else table(result))
    return 0


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
