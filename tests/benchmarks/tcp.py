"""tcp beside a C program on the same libfabric provider, turn by turn in one run: `make bench-tcp`.

    make bench-tcp [ARGS="--rounds 7 --library FILE --cases stream,pages,latency,pingpong,quiet --json F --markdown F"]

Ours are two processes on uvloop, provider tcp, memory from `allocate`; the other is tests/native/fabric_reference.c, built
here with cc. Both write with delivery complete and an immediate each, have at most 64 work requests under way, and sleep on
the descriptor of the queue; whoever is not measured is stopped (SIGSTOP). Figures are medians of rounds, the ratio the median
of the rounds' ratios with its spread. `fi_pingpong` (it spins, and sends messages of its own) stands beside the round trip
where it is installed. What a quiet connection costs, and a write into a process whose loop is blocked, are rows of `python -m
aiotransfer bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rivals.compare import HERE, ROOT, SPAN, TABLE, Contender, size

from aiotransfer.bench.rows import REGION, Row
from aiotransfer.bench.session import machine, runner
from aiotransfer.cli import bench
from aiotransfer.providers.fabric import libfabric

SOURCE, PROGRAM = ROOT / "tests" / "native" / "fabric_reference.c", ROOT / "build" / "fabric_reference"
SIZES = {4 << 10: 4096, 64 << 10: 1024, 1 << 20: 64, 16 << 20: 16, 256 << 20: 2}  # bytes: so many of them at once
QUIET = "blocked,idle,crowd"


def build() -> None:
    """The C program, from this source."""
    PROGRAM.parent.mkdir(exist_ok=True)
    flags = ["-O2", "-Wall", "-Wextra", "-Wconversion"]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(PROGRAM), "-ldl"], check=True)


class Match:
    """Both contenders over one libfabric."""

    def __init__(self, library: str, rounds: int) -> None:
        self.library, self.rounds = library, rounds
        self.ours = Contender(
            "ours", [sys.executable, str(HERE / "run_ours.py")],
            {"PROVIDER": "tcp", "AIOTRANSFER_LIBFABRIC": library, "REGION": str(REGION)},
        )  # fmt: skip
        self._going(self.ours)
        found = re.search(r"\((.+):\w+\)", self.ours.how)
        self.provider = found[1] if found else "tcp"
        self.theirs = Contender("C", [str(PROGRAM), library, self.provider, str(REGION)], {})
        self._going(self.theirs)

    @staticmethod
    def _going(contender: Contender) -> None:
        if contender.error:
            raise SystemExit(f"{contender.name}: {contender.error}")

    def measure(self, contender: Contender, case: str, arguments: list[int], times: int) -> float:
        seconds = contender.measure(case, arguments, times)
        self._going(contender)
        if seconds is None:
            raise SystemExit(f"{contender.name} has no {case}")
        return seconds

    def row(self, label: str, unit: str, amount: float, ours: tuple[str, list[int]], theirs: list[tuple[str, list[int]]]) -> Row:
        """`amount` per second, or microseconds when it is 0. Of several ways of the other's the fastest in each round."""
        row = Row(label, unit, lower_is_better=not amount)
        sides = [(self.ours, *ours), *((self.theirs, *way) for way in theirs)]
        times = [1] * len(sides)
        for turn in range(-2, self.rounds):  # two to calibrate
            values = []
            for i, (contender, case, arguments) in enumerate(sides):
                seconds = self.measure(contender, case, arguments, times[i])
                if turn < 0 and amount:
                    times[i] = max(1, int(SPAN / seconds))
                values.append(amount / seconds if amount else seconds * 1e6)
            if turn >= 0:
                row.add(values[0], max(values[1:]) if amount else min(values[1:]))
        return row

    def stream(self) -> Iterator[Row]:
        for n, count in SIZES.items():
            way = ("stream", [n, count])
            yield self.row(f"writes of {size(n)}", "GB/s", n * count / 1e9, way, [way])

    def pages(self) -> Iterator[Row]:
        plain, vectors = ("pages", [4096, 1]), ("pages", [4096, 4])
        ours = ("counted", [4096])
        yield self.row("4-KiB pages, C: one at a time", "pages/s", TABLE, ours, [plain])
        yield self.row("4-KiB pages, C: the better of one and four in a work request", "pages/s", TABLE, ours, [plain, vectors])
        large = 64 << 10
        way = ("pages", [large, 1])
        yield self.row("64-KiB pages in one call, C: one at a time", "GB/s", TABLE * large / 1e9, ("counted", [large]), [way])

    def latency(self) -> Iterator[Row]:
        yield self.row("round trip of 64 bytes and an immediate, p50", "us", 0, ("latency", []), [("latency", [])])

    def pingpong(self) -> Iterator[Row]:
        """Beside our round trip."""
        program = shutil.which("fi_pingpong")
        if program is None:
            print("fi_pingpong is not installed (apt-get install libfabric-bin)", file=sys.stderr)
            return
        row = Row("round trip, limit: fi_pingpong", "us", lower_is_better=True)
        for _ in range(self.rounds):
            ours = self.measure(self.ours, "latency", [], 1) * 1e6
            theirs = pingpong(program, self.library, self.provider)
            if theirs is not None:
                row.add(ours, theirs)
        if row.ours:
            yield row

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


def pingpong(program: str, library: str, provider: str) -> float | None:
    """Microseconds of a round trip of 64 bytes; None when it does not run on this library."""
    environ = {**os.environ, "LD_LIBRARY_PATH": str(Path(library).parent)}
    command = [program, "-p", provider, "-e", "rdm", "-I", "2000", "-S", "64"]
    server = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1.0)  # until it listens: Debian's takes half a second to look at the machine
        done = subprocess.run([*command, "127.0.0.1"], env=environ, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    finally:
        server.kill()
        server.wait()
    found = re.search(r"^64\s.*?([\d.]+)\s+[\d.]+\s*$", done.stdout, re.MULTILINE)  # ..., usec/xfer, Mxfers/sec
    return 2 * float(found[1]) if found else None


def quiet(library: str, rounds: int) -> list[dict[str, Any]]:
    """A blocked target and idle connections."""
    options = ["--provider", "tcp", "--cases", QUIET, "--rounds", str(rounds), "--json"]
    command = [sys.executable, "-m", "aiotransfer", "bench", *options]
    done = subprocess.run(
        command, env={**os.environ, "AIOTRANSFER_LIBFABRIC": library}, stdout=subprocess.PIPE, text=True, check=True
    )  # fmt: skip
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def one_library(library: str, cases: list[str], rounds: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    how: list[str] = []
    if set(cases) - {"quiet"}:
        match = Match(library, rounds)
        how = [match.ours.how, match.theirs.how]
        print(f"{library}\n{match.ours.how}\n{match.theirs.how}", file=sys.stderr)
        try:
            for case in cases:
                for row in getattr(match, case)() if case != "quiet" else ():
                    rows.append(row.summary())
                    print(bench.table({"machine": "", "rows": rows[-1:]}).splitlines()[-1], file=sys.stderr)
        finally:
            match.close()
    if "quiet" in cases:
        rows += quiet(library, rounds)
    return {"library": library, "how": how, "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    parts = [result["machine"]]
    for one in result["libraries"]:
        table = bench.markdown({"machine": "; ".join(one["how"]) or one["library"], "memory": "allocated", "rows": one["rows"]})
        parts.append(table.replace("| limit |", "| C |"))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="at least 5")
    parser.add_argument("--library", action="append", help="a libfabric.so.1; may be given several times")
    parser.add_argument("--cases", default="stream,pages,latency,pingpong,quiet")
    for kind in ("json", "markdown"):
        parser.add_argument(f"--{kind}", help="also write it there")
    args = parser.parse_args()
    chosen = libfabric.choose()
    libraries = args.library or [chosen.path if chosen is not None else ""]
    if "" in libraries:
        raise SystemExit(f"no libfabric: {libfabric.missing()}")
    build()
    result = {
        "machine": machine(runner("uvloop")[0]),
        "libraries": [one_library(library, args.cases.split(","), max(5, args.rounds)) for library in libraries],
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    if args.markdown:
        Path(args.markdown).write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
