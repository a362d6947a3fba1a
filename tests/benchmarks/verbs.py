"""What the native code costs a core for each work request over verbs, the driver's part taken away: `make bench-verbs`.

    make bench-verbs [ARGS="--rounds 9 --cases pages,peers --callgrind --json F --markdown F"]

tests/native/verbs_cost.c with our own C, compiled as in the extension, on a device that does nothing (tests/native/stub_verbs.c).
CPU time of the one thread, medians of rounds with their spread; the cases go round in turn. `--callgrind` adds instructions
(valgrind has to be installed). Prints figures, asserts none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "native"
PROGRAM = ROOT / "build" / "verbs_cost" / "verbs_cost"
CASES = {  # so many times in a round: about 0.1 s
    "pages": 300, "plain": 300, "writes": 5000, "arrivals": 600, "peers": 5000, "stub": 3000,
}  # fmt: skip
NAMES = {
    "pages": "page of one call, immediate each",
    "plain": "page of one call, no immediate",
    "writes": "write of a call of its own, immediate each",
    "arrivals": "immediate that arrives and is counted",
    "peers": "write of a prepared scatter to 56 peers, immediate each",
    "stub": "of these, the stub: a chain of 16 posted and polled",
}
COUNTED = 20  # rounds under callgrind


def build(program: Path, *extra: str) -> None:
    """The program, out of our C as the extension has it; `extra` for the compiler."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "ffi" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    program.parent.mkdir(parents=True, exist_ok=True)
    objects = hook.compile_own(program.parent, ["cc"], ["-g", *extra], hook.sources())
    own = [str(NATIVE / name) for name in ("verbs_cost.c", "stub_verbs.c")]
    flags = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wconversion", "-pthread", "-rdynamic"]
    subprocess.run(["cc", *flags, f"-I{ROOT / 'ffi'}", *own, *objects, "-o", str(program), "-ldl"], check=True)


def run(case: str, times: int, *before: str, program: Path = PROGRAM) -> dict[str, Any]:
    """One round."""
    done = subprocess.run([*before, str(program), case, str(times)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def instructions(case: str) -> float:
    """Of a work request, as callgrind counts them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        options = ["--tool=callgrind", "--toggle-collect=measured", f"--callgrind-out-file={out}"]
        requests = run(case, COUNTED, "valgrind", "-q", *options)["requests"]
        total = re.search(r"^(?:totals|summary): (\d+)", out.read_text(), re.MULTILINE)
    assert total is not None
    return float(int(total[1]) / requests)


def measure(cases: list[str], rounds: int, count: bool) -> list[dict[str, Any]]:
    """A row for each case."""
    seen: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            seen[case].append(run(case, CASES[case]))
    rows = []
    for case, found in seen.items():
        ns = [one["cpu"] / one["requests"] * 1e9 for one in found]
        row = {"case": case, "ns": statistics.median(ns), "least": min(ns), "most": max(ns)}
        row["chain"] = found[0]["posted"] / max(1, found[0]["calls"])
        if case == "peers":
            row["span_us"] = statistics.median(one["span"] for one in found) * 1e6
        if count:
            row["instructions"] = instructions(case)
        rows.append(row)
    return rows


def machine() -> str:
    """Where it was measured."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return f"{model[1].strip() if model else 'unknown processor'}, {compiler}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table."""
    text = ["| CPU for each | ns (spread) | instructions | M/s and core |", "|---|--:|--:|--:|"]
    for row in rows:
        counted = f"{row['instructions']:.0f}" if "instructions" in row else ""
        spread = f"{row['least']:.0f}-{row['most']:.0f}"
        text.append(f"| {NAMES[row['case']]} | {row['ns']:.0f} ({spread}) | {counted} | {1e3 / row['ns']:.1f} |")
    for row in rows:
        if "span_us" in row:
            text += ["", f"A scatter to 56 peers: the driver has the last of them after {row['span_us']:.1f} us."]
    return "\n".join(text) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--callgrind", action="store_true")
    for kind in ("json", "markdown"):
        parser.add_argument(f"--{kind}", help="also write it there")
    args = parser.parse_args()
    if args.callgrind and shutil.which("valgrind") is None:
        raise SystemExit("valgrind is not installed (apt-get install valgrind)")
    build(PROGRAM)
    rows = measure(args.cases.split(","), max(1, args.rounds), args.callgrind)
    text = f"{machine()}\n\n{markdown(rows)}"
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    if args.markdown:
        Path(args.markdown).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
