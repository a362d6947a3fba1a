"""verbs beside a C program on libibverbs, turn by turn in one run of the guest: `make bench-guest`.

    make bench-guest [ARGS="--rounds 15 --batch 256"]

Ours are two processes on uvloop, one on each end of a cable of soft-RoCE; the other is tests/native/verbs_reference.c, built
here. RDMA writes of 4 KiB with an immediate each; whoever is not measured is stopped (SIGSTOP). Medians of rounds, the ratio (of
the times, ours to C's) the median of the rounds' ratios with its spread; beside it that of the best rounds, which others on the
machine have disturbed least. The guest is emulated: the figures say nothing about NICs, the ratios
something about what is done for a work request beside what the kernel does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rivals.compare import ROOT, Contender

SOURCE, PROGRAM = ROOT / "tests" / "native" / "verbs_reference.c", ROOT / "build" / "verbs_reference"
REGION, PAGE = 4 << 20, 4096
SPAN = 0.1  # seconds of work per turn: short, so that some turns are undisturbed
CASES = {  # ours, C's, what it is
    "batch": ("batch", "in one native call"),
    "each": ("batch", "a transfer each, each awaited"),
    "single": ("single", "each after the one before, C as well"),
    "one": ("batch", "each after the one before, C in one call"),
}


def build() -> None:
    """The C program, from this source."""
    PROGRAM.parent.mkdir(exist_ok=True)
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wconversion"]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(PROGRAM), "-libverbs"], check=True)


def measure(contender: Contender, case: str, arguments: list[int], times: int) -> float:
    """Seconds of one batch."""
    seconds = contender.measure(case, arguments, times)
    if contender.error or seconds is None:
        raise SystemExit(f"{contender.name}: {contender.error or f'no {case}'}")
    return seconds


def compare(ours: Contender, theirs: Contender, case: str, batch: int, rounds: int) -> dict[str, Any]:
    """One row."""
    sides = [(ours, "single" if case == "one" else case), (theirs, CASES[case][0])]
    times, found = [1, 1], []
    for turn in range(-2, rounds):  # two to calibrate
        taken = [measure(side, what, [PAGE, batch], times[i]) for i, (side, what) in enumerate(sides)]
        if turn < 0:
            times = [max(1, int(SPAN / seconds)) for seconds in taken]
        else:
            found.append(taken)
    ratios = [a / b for a, b in found]
    columns = list(zip(*found, strict=True))
    middle, best = [statistics.median(column) * 1e3 for column in columns], [min(column) * 1e3 for column in columns]
    return {
        "case": CASES[case][1], "ours_ms": middle[0], "c_ms": middle[1], "best": best[0] / best[1],
        "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
    }  # fmt: skip


def inside(batch: int, rounds: int) -> None:
    """In the guest."""
    here = Path(__file__).parent
    ours = Contender("ours", [sys.executable, str(here / "guest_ours.py")], {"REGION": str(REGION)})
    theirs = Contender("C", [str(PROGRAM), "rxea0", "rxeb0", str(REGION)], {})
    for contender in (ours, theirs):
        if contender.error:
            raise SystemExit(f"{contender.name}: {contender.error}")
        print(contender.how)
    print(f"\n{batch} writes of 4 KiB, an immediate each, median of {rounds}:\n")
    print("| | ours, ms | C, ms | ratio (spread) | of the best rounds |\n|---|--:|--:|--:|--:|", flush=True)
    rows = []
    for case in CASES:
        rows.append(row := compare(ours, theirs, case, batch, rounds))
        print(
            f"| {row['case']} | {row['ours_ms']:.1f} | {row['c_ms']:.1f} | {row['ratio']:.2f} "
            f"({row['least']:.2f}-{row['most']:.2f}) | {row['best']:.2f} |",
            flush=True,
        )
    print(f"\n{json.dumps(rows)}")
    ours.close()
    theirs.close()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.batch, args.rounds)
        return 0
    build()
    begun = time.monotonic()
    command = [sys.executable, str(Path(__file__)), "--inside", "--batch", str(args.batch), "--rounds", str(args.rounds)]
    code = subprocess.run([sys.executable, "-m", "tests.guest.run", "--", *command], cwd=ROOT).returncode
    print(f"{time.monotonic() - begun:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
