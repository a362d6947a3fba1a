"""The driver: every contender in turn, in every round of every case; medians of rounds and ratios with their spread.

    make bench-rivals [ARGS="--tcp --rounds 7 --cases write,pages --contenders ours,NIXL --json F --markdown F --plot PREFIX"]

Each contender is two processes in an environment of its own (`make rivals`), stopped (SIGSTOP) while the others are measured,
so that what polls while idle costs nobody else anything. All have memory of 256 MiB on both sides, touched beforehand, and
the same random pages. One that does not install or does not run is a row with its error. `--tcp` keeps those that can to TCP
over loopback, as between two hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
SPAN = 0.12  # seconds of work per turn
TIMEOUT = 60.0
CONTENDERS: dict[str, tuple[str, str, dict[str, str]]] = {  # name: environment, module, variables
    "ours": ("ours", "run_ours.py", {}),
    "ours, foreign memory": ("ours", "run_ours.py", {"FOREIGN": "1"}),
    "NIXL": ("nixl", "run_nixl.py", {}),
    "UCXX": ("ucxx", "run_ucxx.py", {}),
    "Mooncake": ("mooncake", "run_mooncake.py", {}),
    "Monarch": ("monarch", "run_monarch.py", {}),
    "gloo": ("gloo", "run_gloo.py", {}),
    "uvloop streams": ("streams", "run_streams.py", {"UVLOOP": "1"}),
    "asyncio streams": ("streams", "run_streams.py", {}),
}
TCP = ("ours", "NIXL", "UCXX", "Mooncake")
TCP_ONLY = {"PROVIDER": "tcp", "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20)
PAGES = (1 << 10, 4 << 10, 16 << 10, 64 << 10)
TABLE = 4096


def size(n: int) -> str:
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"


class Broken(Exception):
    """A contender cannot go on; says why."""


class Contender:
    """One pair of processes, started by `command`, that obeys lines as worker.py says, or `why` it cannot be had."""

    def __init__(self, name: str, command: list[str], variables: dict[str, str], why: str = "") -> None:
        self.name, self.how, self.error = name, "", why
        self.process: subprocess.Popen[bytes] | None = None
        if why:
            return
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # imports as an installation has them
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**environ, **variables},
            start_new_session=True,
        )  # fmt: skip
        try:
            self.how = self._hear()["how"]
            self.first_write = time.perf_counter() - self.start
            self.pause()
        except Broken as error:
            self.fail(str(error))

    def _hear(self) -> dict[str, Any]:
        process = self.process
        assert process is not None
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT):
                raise Broken(f"no answer within {TIMEOUT:g} s")
        line = process.stdout.readline()
        if not line:
            raise Broken("it ended without a word")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Broken(answer["error"])
        return answer

    def measure(self, case: str, arguments: list[int], times: int) -> float | None:
        """Seconds for one; None when it has no such thing."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        order = json.dumps({"case": case, "arguments": arguments, "times": times}) + "\n"
        try:
            os.killpg(process.pid, signal.SIGCONT)
            time.sleep(0.005)
            process.stdin.write(order.encode())
            process.stdin.flush()
            seconds = self._hear().get("seconds")
            self.pause()
            return seconds
        except (Broken, OSError) as error:
            self.fail(str(error))
            return None

    def pause(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def fail(self, why: str) -> None:
        self.error = why
        self.close()

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def rival(name: str, region: int = 256 << 20, variables: dict[str, str] | None = None) -> Contender:
    """One of CONTENDERS, in its own environment."""
    environment, module, own = CONTENDERS[name]
    python = ROOT / ".venv-rivals" / environment / "bin" / "python"
    why = ""
    if not python.exists():
        reason = python.parent.parent / "why"
        why = f"not installed: {reason.read_text().strip() if reason.exists() else 'run make rivals'}"
    return Contender(name, [str(python), str(HERE / module)], {**own, "REGION": str(region), **(variables or {})}, why)


def compare(
    contenders: list[Contender], label: str, unit: str, amount: float, case: str, arguments: list[int], rounds: int
) -> Any:
    """One case: `amount` per second of each contender, or seconds when it is 0."""
    taken: dict[str, list[float]] = {}
    times: dict[str, int] = {}
    for turn in range(-3, rounds):  # one to warm up, two to calibrate: the first of them is mostly the cost of a turn
        for contender in contenders:
            if contender.error or times.get(contender.name) == 0:
                continue
            seconds = contender.measure(case, arguments, times.get(contender.name, 1))
            if seconds is None:
                times[contender.name] = 0
            elif turn < 0:
                times[contender.name] = max(1, min(50_000, int(SPAN / (4 if turn < -1 else 1) / max(seconds, 1e-9))))
            else:
                taken.setdefault(contender.name, []).append(seconds)
    row: dict[str, Any] = {"case": label, "unit": unit, "values": {}, "ratios": {}}
    for name, values in taken.items():
        if len(values) < rounds:
            continue
        row["values"][name] = statistics.median(amount / v if amount else v * 1e6 for v in values)
        if name != "ours" and "ours" in taken:
            ratios = [theirs / ours for ours, theirs in zip(taken["ours"], values, strict=True)]
            row["ratios"][name] = [statistics.median(ratios), min(ratios), max(ratios)]
    print(line(row, [c.name for c in contenders]), file=sys.stderr, flush=True)
    return row


def cpu_seconds(group: int) -> float:
    """User and system time of a process group so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def waiting(contenders: list[Contender]) -> Any:
    """What waiting for a small write costs: CPU of both processes, with one ping every 50 ms."""
    row: dict[str, Any] = {"case": "CPU while waiting (a ping each 50 ms)", "unit": "% of a core", "values": {}, "ratios": {}}
    for contender in contenders:
        if contender.error:
            continue
        assert contender.process is not None
        before = cpu_seconds(contender.process.pid)
        seconds = contender.measure("waiting", [3], 1)
        if seconds is not None:
            row["values"][contender.name] = 100 * (cpu_seconds(contender.process.pid) - before) / (3 * seconds)
    print(line(row, [c.name for c in contenders]), file=sys.stderr, flush=True)
    return row


def line(row: Any, names: list[str]) -> str:
    cells = [f"{row['case']} ({row['unit']})"]
    for name in names:
        value, ratio = row["values"].get(name), row["ratios"].get(name)
        cells.append("" if value is None else f"{value:.3g}" + (f" ({ratio[0]:.3g})" if ratio else ""))
    return "| " + " | ".join(cells) + " |"


def first_writes(names: list[str], rounds: int, variables: dict[str, str]) -> Any:
    """From the start of a process to its first write, everything but large memory included, in fresh processes."""
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):  # the first compiles what is imported
        for name in names:
            contender = rival(name, 1 << 20, variables)
            if turn >= 0 and not contender.error:
                taken[name].append(contender.first_write)
            contender.close()
    values = {name: statistics.median(v) for name, v in taken.items() if len(v) == rounds}
    ratios = {name: [v / values["ours"]] * 3 for name, v in values.items() if name != "ours" and "ours" in values}
    return {"case": "start to first write", "unit": "s", "values": values, "ratios": ratios}


def markdown(result: Any) -> str:
    names = result["contenders"]
    lines = [result["machine"], "", "In brackets: how many times faster ours (allocated memory) is, median of the rounds.", ""]
    lines += ["| case | " + " | ".join(names) + " |", "|---" + "|--:" * len(names) + "|"]
    lines += [line(row, names) for row in result["rows"]]
    lines += ["", *(f"- {name}: {how}" for name, how in result["how"].items())]
    lines += [f"- {name} is missing: {why}" for name, why in result["missing"].items()]
    return "\n".join(lines) + "\n"


def plot(result: Any, prefix: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name in result["contenders"]:
        rows = zip(SIZES, result["rows"], strict=False)
        points = [(n, row["values"][name]) for n, row in rows if name in row["values"]]
        if points:
            axes[0].loglog(*zip(*points, strict=True), "o-", label=name)
            axes[1].loglog([n for n, _ in points], [rate * 1e9 / n for n, rate in points], "o-", label=name)
    axes[0].set(xlabel="bytes per write", ylabel="GB/s")
    axes[1].set(xlabel="bytes per write", ylabel="writes per second")
    axes[0].legend(fontsize=7)
    fig.tight_layout()
    for kind in ("png", "svg"):
        fig.savefig(f"{prefix}.{kind}", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="ours beside the others, turn by turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default="write,pages,ping,first")
    parser.add_argument("--contenders", help="some of: " + ", ".join(CONTENDERS))
    parser.add_argument("--tcp", action="store_true", help=f"by TCP only: {', '.join(TCP)}")
    for kind in ("json", "markdown", "plot"):
        parser.add_argument(f"--{kind}")
    args = parser.parse_args()
    names = list(TCP if args.tcp else CONTENDERS)
    if args.contenders:
        names = args.contenders.replace("ours, foreign", "ours; foreign").split(",")
        names = [name.strip().replace(";", ",") for name in names]
    variables = TCP_ONLY if args.tcp else {}
    cases, rounds = args.cases.split(","), max(5, args.rounds)
    from aiotransfer.bench.session import machine

    rows: list[Any] = []
    contenders = [rival(name, variables=variables) for name in names]
    try:
        if "write" in cases:
            rows += [compare(contenders, f"write {size(n)}", "GB/s", n / 1e9, "write", [n], rounds) for n in SIZES]
        if "pages" in cases:
            rows += [
                compare(contenders, f"{TABLE:,} pages of {size(p)}", "GB/s", TABLE * p / 1e9, "pages", [p], rounds) for p in PAGES
            ]
        if "ping" in cases:
            rows.append(compare(contenders, "small write to wake-up", "us", 0, "ping", [], rounds))
            rows.append(waiting(contenders))
    finally:
        for contender in contenders:
            contender.close()
    if "first" in cases:
        rows.append(first_writes([c.name for c in contenders if not c.error], rounds, variables))
    result = {
        "machine": machine("uvloop"), "contenders": names, "rows": rows,
        "how": {c.name: c.how for c in contenders if c.how}, "missing": {c.name: c.error for c in contenders if c.error},
    }  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    if args.markdown:
        Path(args.markdown).write_text(markdown(result))
    if args.plot:
        plot(result, args.plot)
    print(markdown(result))


if __name__ == "__main__":
    main()
