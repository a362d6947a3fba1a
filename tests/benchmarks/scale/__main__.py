"""Dispatch and combine for EP8 to EP512 by the model, beside what others have published.

    make bench-scale               (python -m tests.benchmarks.scale [--most 512] [--report])

Prints the constants, then every published figure with the model's three and their errors: one protocol, with the paper's cost
of a post, with our native one, and with all that our Python host does. Then the curve, what the size of the first write changes,
and what Python costs. Medians over ranks and repeats. `--report` writes docs/design/moe-scale.md and its plot.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.scale import constants as c
from tests.benchmarks.scale import published as p
from tests.benchmarks.scale.model import Combine, Dispatch, Setup, route

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "design" / "moe-scale.md"
BEGIN, END = "<!-- made by make bench-scale ARGS=--report -->", "<!-- end -->"
SIZES = (8, 16, 32, 64, 128, 256, 512)
MACHINES = {"CX7, H100": ("cx7", c.H100), "EFA, H200": ("efa", c.H200)}
HOSTS = {host.name: host for host in c.HOSTS}
PRIVATE = (0, 4, 8, 16, 24, 32, 64, 256)
STEPS = ("dispatch", "combine")


class Job(NamedTuple):
    """One point."""

    ranks: int
    fabric: str
    gpu: c.Gpu
    host: str
    tokens: int
    private: int | None = None

    @property
    def setup(self) -> Setup:
        """What it runs on."""
        return Setup(self.fabric, self.gpu, HOSTS[self.host], self.tokens, self.private)


class Point(NamedTuple):
    """Medians over ranks and repeats, in microseconds."""

    dispatch: float
    combine: float
    first_post: float


Points = dict[Job, Point]


def simulate(job: Job) -> Point:
    """As many repeats as make 64 ranks."""
    out, back, first = [], [], []
    for seed in range(max(1, 64 // job.ranks)):
        rows = route(job.ranks, job.setup.tokens, seed)
        one = Dispatch(rows, job.setup).run()
        out += one.done
        first += one.first_post
        if job.private is None:  # of which combine knows nothing
            back += Combine(rows, job.setup).run().done
    return Point(statistics.median(out), statistics.median(back or [0.0]), statistics.median(first))


def jobs(most: int) -> Iterator[Job]:
    """All that is needed."""
    for host in HOSTS:
        for table in p.TABLES:
            yield from (Job(ranks, table.fabric, table.gpu, host, table.tokens) for ranks in table.rows)
        for machine in MACHINES.values():
            yield from (Job(ranks, *machine, host, tokens) for tokens in (128, 4096) for ranks in SIZES if ranks <= most)
    for machine in MACHINES.values():
        for private in PRIVATE:
            yield from (Job(ranks, *machine, c.NATIVE.name, 128, private) for ranks in SIZES[1:] if ranks <= most)


def error(value: float, figure: float) -> float:
    """Signed, in per cent of the published figure."""
    return 100 * (value / figure - 1)


class Cell(NamedTuple):
    """A published figure and the model's, by host."""

    table: p.Table
    step: str
    ranks: int
    figure: float
    ours: tuple[float, ...]

    def errors(self) -> list[float]:
        """By host."""
        return [error(value, self.figure) for value in self.ours]


def compare(points: Points) -> list[Cell]:
    """Every published figure."""
    return [
        Cell(table, step, ranks, row[k], tuple(
            points[Job(ranks, table.fabric, table.gpu, host, table.tokens)][k] for host in HOSTS
        ))
        for table in p.TABLES for k, step in enumerate(STEPS) for ranks, row in table.rows.items()
    ]  # fmt: skip


def lines(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table, words to the left of the first column."""
    head = list(head)
    return [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1), *(f"| {' | '.join(row)} |" for row in rows), ""]


def constants() -> list[str]:
    """What is taken as given."""
    rows = ((k.what, f"{k.value:.4g}" if k.value < 1e5 else f"{k.value:.3e}", k.unit, k.source) for k in c.table())
    return ["### Constants", "", *lines(("what", "value", "unit", "source"), rows), *(f"{note}\n" for note in c.NOTES)]


def comparison(cells: list[Cell]) -> list[str]:
    """Every cell with its errors."""
    text = ["### Every published figure", ""]
    for table in p.TABLES:
        text += [f"**{table.system}**, {table.tokens} tokens: {table.note}. {table.source}.", ""]
        rows = (
            [f"{cell.step} EP{cell.ranks}", f"{cell.figure:g}"]
            + [f"{value:.0f} ({wrong:+.0f} %)" for value, wrong in zip(cell.ours, cell.errors(), strict=True)]
            for cell in cells
            if cell.table is table
        )
        text += lines(("us", "published", *HOSTS), rows)
    return text


def summary(cells: list[Cell]) -> list[str]:
    """How far off, by whose figures."""

    def row(name: str, some: list[Cell]) -> list[str]:
        found = [name, str(len(some))]
        for k in range(len(c.HOSTS)):
            wrong = [cell.errors()[k] for cell in some]
            worst = max(some, key=lambda cell: abs(cell.errors()[k]))
            spread = f"mean {statistics.mean(wrong):+.0f}; worst {worst.errors()[k]:+.0f}, {worst.step} EP{worst.ranks}"
            found.append(f"{statistics.median(map(abs, wrong)):.0f} % ({spread})")
        return found

    rows = [
        row(f"{system}, {tokens} tokens", [cell for cell in cells if (cell.table.system, cell.table.tokens) == (system, tokens)])
        for system in (p.THEIR_CODE, p.DEEPEP, p.UCCL_EP)
        for tokens in (128, 4096)
    ]
    text = ["### How far off", "", "Median of the absolute errors, mean of the signed ones, and the worst cell.", ""]
    text += lines(("published by", "cells", *HOSTS), [*rows, row("all", cells)])
    return text


def curve(points: Points, sizes: tuple[int, ...]) -> list[str]:
    """Dispatch and combine by ranks."""
    text = ["### The curve", "", "Dispatch / combine in us.", ""]
    for tokens in (128, 4096):
        rows = (
            [f"{tokens} tokens, {name}, {host}"]
            + [f"{one.dispatch:.0f} / {one.combine:.0f}" for one in (points[Job(n, *machine, host, tokens)] for n in sizes)]
            for name, machine in MACHINES.items()
            for host in HOSTS
        )
        text += lines(("", *(f"EP{n}" for n in sizes)), rows)
    return text


def private(points: Points, sizes: tuple[int, ...]) -> list[str]:
    """What the size of the first write changes."""
    text = ["### The first write", "", "Dispatch of 128 tokens in us, native post only, by the rows of the first write.", ""]
    for name, machine in MACHINES.items():
        rows = (
            [f"{name}, {most} rows", *(f"{points[Job(n, *machine, c.NATIVE.name, 128, most)].dispatch:.0f}" for n in sizes)]
            for most in PRIVATE
        )
        text += lines(("", *(f"EP{n}" for n in sizes)), rows)
    return text


def python(points: Points, sizes: tuple[int, ...]) -> list[str]:
    """What our Python host adds to one dispatch and one combine, by cause, and in the model."""
    host, less = c.PYTHON, c.NATIVE
    node = int(c.NODE.value)

    def row(n: int) -> list[str]:
        far = n - node
        scatter = (host.first.value + host.target.value * far) if far else 0.0
        parts = (
            host.notice.value + host.plan[128].value + host.notice.value - less.notice.value,
            scatter,
            (host.arrival.value - less.arrival.value) * (n - 1),
            host.ranges_call.value,
            host.wake.value,
        )
        ours, native = (points[Job(n, "cx7", c.H100, one.name, 128)] for one in (host, less))
        added = (ours.dispatch - native.dispatch, ours.combine - native.combine)
        return [f"EP{n}", *(f"{part:.0f}" for part in parts), *(f"{part:+.0f}" for part in added)]

    head = ("us", "plan and notices", "scatter before its first post", "counters", "ranges", "wake-up", "dispatch", "combine")
    text = ["### What Python costs", "", "128 tokens, CX7; the last two columns: by how much the model's time grows.", ""]
    return text + lines(head, (row(n) for n in sizes))


def first(points: Points) -> list[str]:
    """When the first write leaves."""
    ranks, figure, source = p.FIRST_TRANSFER
    rows = []
    for name, machine in MACHINES.items():
        found = [points[Job(ranks, *machine, host, 128)].first_post for host in HOSTS]
        rows.append([name, f"{figure:g}", *(f"{value:.1f} ({error(value, figure):+.0f} %)" for value in found)])
    text = ["### The first post", "", f"{source}.", ""]
    return text + lines((f"EP{ranks}, us", "published", *HOSTS), rows)


def plot(points: Points, path: Path) -> None:
    """128 tokens: the curve of each host, and what is published."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "aiotransfer"
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(9, 7), sharex=True)
    for line, (name, (fabric, gpu)) in zip(grid, MACHINES.items(), strict=True):
        for k, (axes, step) in enumerate(zip(line, STEPS, strict=True)):
            for host, style in zip(HOSTS, ("C0:", "C0-", "C3--"), strict=True):
                axes.plot(SIZES, [points[Job(n, fabric, gpu, host, 128)][k] for n in SIZES], style, label=host)
            seen = [table for table in p.TABLES if table.fabric == fabric and table.tokens == 128]
            for system, mark in ((p.THEIR_CODE, "C1o"), (p.DEEPEP, "C2s"), (p.UCCL_EP, "C4^")):
                dots = [(n, row[k]) for table in seen if table.system == system for n, row in table.rows.items()]
                if dots:
                    axes.plot(*zip(*dots, strict=True), mark, markersize=4, label=f"{system}, published")
            axes.set(title=f"{step}, {name}", xscale="log", ylim=(0, None), ylabel="us")
            axes.set_xticks(SIZES, [str(n) for n in SIZES], minor=False)
            axes.minorticks_off()
        line[0].legend(fontsize=7)
    for axes in grid[1]:
        axes.set_xlabel("ranks")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=512, choices=SIZES[3:], help="ranks of the largest")
    parser.add_argument("--report", action="store_true", help="write the page and the plot of the documentation")
    args = parser.parse_args()
    if args.report and args.most != SIZES[-1]:
        parser.error("the page has all sizes")
    sizes = tuple(n for n in SIZES if n <= args.most)
    print("\n".join(constants()), flush=True)
    todo = sorted(dict.fromkeys(jobs(args.most)), key=lambda job: -job.ranks)
    with ProcessPoolExecutor(initializer=gc.disable) as pool:  # collecting takes a third of the time, and finds nothing
        points = dict(zip(todo, pool.map(simulate, todo), strict=True))
    cells = compare(points)
    made = [
        *summary(cells), *comparison(cells), *first(points), *curve(points, sizes), *private(points, sizes[1:]),
        *python(points, sizes), "### Published, not compared", "", *(f"- {one}" for one in p.LEFT_OUT),
    ]  # fmt: skip
    print("\n".join(made))
    if args.report:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join([*made, "", *constants()]).rstrip() + f"\n\n{END}{after}")
        plot(points, PAGE.with_suffix(".svg"))


if __name__ == "__main__":
    main()
