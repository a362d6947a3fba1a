"""This tree beside an earlier commit, turn by turn: did the hot path become slower?

    make bench-earlier COMMIT=eda8231 [ARGS="--rounds 7 --cases rate,scatter --json F"]

The commit is unpacked and built in a temporary folder, with this interpreter and its packages. Each round runs `bench` on both,
the order changing from round to round; a row is the median of the rounds' ratios with its spread: above 1 this tree is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEAST = 0.97  # a row is slower when its median and its upper quartile are
ALONE = ("death", "moe")
ALL = "write,pages,foreign,rate,scatter,wakeup,blocked,idle,scale,startup,death,moe"


def unpack(commit: str, where: Path) -> None:
    """The files of a commit, and its extension."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x", "-C", str(where)], input=archive, check=True)
    environ = {**os.environ, "PYTHONPATH": str(where)}
    subprocess.run([sys.executable, "ffi/build.py"], cwd=where, env=environ, check=True, stdout=subprocess.DEVNULL)


def bench(tree: Path, cases: str) -> dict[str, tuple[float, bool]]:
    """Of each row its figure, and whether lower is better. `death` and `moe` have a process of their own:
    peers of other cases would be taken for theirs."""
    wanted = cases.split(",")
    runs = [[case for case in wanted if case not in ALONE], *([case] for case in wanted if case in ALONE)]
    found = {}
    for run in filter(None, runs):
        command = [sys.executable, "-m", "aiotransfer", "bench", "--cases", ",".join(run), "--rounds", "5", "--json"]
        environ = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        for row in json.loads(done.stdout)["rows"]:
            found[row["case"]] = (row["ours"], not row["unit"].endswith("/s"))
    return found


def quartile(values: list[float]) -> float:
    """The upper one."""
    return statistics.quantiles(values, n=4, method="inclusive")[2] if len(values) > 1 else values[0]


def compare(other: Path, cases: str, rounds: int) -> dict[str, list[float]]:
    """How many times faster this tree is, by row and round."""
    ratios: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds):
        trees = (ROOT, other) if turn % 2 == 0 else (other, ROOT)
        found = {tree: bench(tree, cases) for tree in trees}
        for case, (ours, lower) in found[ROOT].items():
            if case in found[other]:
                theirs = found[other][case][0]
                ratios[case].append(theirs / ours if lower else ours / theirs)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default="rate,scatter")
    parser.add_argument("--json", help="also write it there")
    args = parser.parse_args()
    if args.cases == "all":
        args.cases = ALL
    with tempfile.TemporaryDirectory() as folder:
        unpack(args.commit, Path(folder))
        ratios = compare(Path(folder), args.cases, args.rounds)
    print(f"| case | this tree / {args.commit} (spread of {args.rounds} rounds) | upper quartile |\n|---|--:|--:|")
    slower = []
    for case, values in ratios.items():
        middle, upper = statistics.median(values), quartile(values)
        print(f"| {case} | {middle:.2f} ({min(values):.2f}-{max(values):.2f}) | {upper:.2f} |")
        if max(middle, upper) < LEAST:
            slower.append(case)
    mean = statistics.geometric_mean(statistics.median(values) for values in ratios.values())
    print(f"\ngeometric mean of {len(ratios)} rows: {mean:.3f}")
    print(f"median and upper quartile below {LEAST}: {', '.join(slower) or 'none'}")
    if args.json:
        Path(args.json).write_text(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
