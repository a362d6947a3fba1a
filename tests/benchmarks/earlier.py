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


def unpack(commit: str, where: Path) -> None:
    """The files of a commit, and its extension."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x", "-C", str(where)], input=archive, check=True)
    environ = {**os.environ, "PYTHONPATH": str(where)}
    subprocess.run([sys.executable, "ffi/build.py"], cwd=where, env=environ, check=True, stdout=subprocess.DEVNULL)


def bench(tree: Path, cases: str) -> dict[str, tuple[float, bool]]:
    """Of each row its figure, and whether lower is better."""
    command = [sys.executable, "-m", "aiotransfer", "bench", "--cases", cases, "--rounds", "5", "--json"]
    environ = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return {row["case"]: (row["ours"], not row["unit"].endswith("/s")) for row in json.loads(done.stdout)["rows"]}


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
    with tempfile.TemporaryDirectory() as folder:
        unpack(args.commit, Path(folder))
        ratios = compare(Path(folder), args.cases, args.rounds)
    print(f"| case | this tree / {args.commit} (spread of {args.rounds} rounds) |\n|---|--:|")
    for case, values in ratios.items():
        print(f"| {case} | {statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f}) |")
    if args.json:
        Path(args.json).write_text(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
