"""What the benchmark of weights says: its table, and the marked section and the plot of docs/design/weights.md."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "design" / "weights.md"
BEGIN, END = "<!-- made by make bench-weights ARGS=--report -->", "<!-- end -->"
NAMES = {"copy": "copy", "aiotransfer": "aiotransfer", "gloo": "broadcast over gloo", "files": "safetensors in tmpfs"}
SMALL = {"copy": "copy, beside float8", "aiotransfer": "aiotransfer, to float8 with scales"}
HEAD = "way", "ms, median (spread)", "GB/s", "of the copy", "times ours", "CPU ms", "of the copy, by CPU", "memory, MiB"
GOAL = 0.8  # of the copy, which the plot marks


class Taken(NamedTuple):
    """By one way, once: seconds from the first process that began to the last that ended, processor seconds of all four
    processes, and how many bytes the memory of a process that took part grew by at most."""

    wall: float
    cpu: float
    memory: int


class Figures(NamedTuple):
    """Of a run: `nbytes` of bfloat16 in all, the watermark `staging` in bytes, `machine` and its `load` at the beginning and at
    the end, and the rounds of each way: of everything in `large`, of the update to float8 in `small` (empty: not measured).
    `absent`: packages without which some ways were left out."""

    nbytes: int
    staging: int
    machine: str
    load: tuple[float, float]
    large: dict[str, list[Taken]]
    small: dict[str, list[Taken]]
    absent: list[str]

    def ways(self) -> Iterator[tuple[str, list[Taken], dict[str, list[Taken]]]]:
        """(name, rounds, all that was measured in the same rounds) of each row."""
        for names, found in ((NAMES, self.large), (SMALL, self.small)):
            for way, taken in found.items():
                yield names[way], taken, found


def ratios(these: list[Taken], those: list[Taken], what: str) -> list[float]:
    """`what` of each of `these` over that of `those`, round by round."""
    return [getattr(one, what) / getattr(other, what) for one, other in zip(these, those, strict=True)]


def row(name: str, nbytes: int, taken: list[Taken], found: dict[str, list[Taken]]) -> tuple[str, ...]:
    """Of the table."""
    copies, ours = found["copy"], found["aiotransfer"]
    wall = [one.wall for one in taken]
    middle = statistics.median(wall)
    return (
        name, f"{1e3 * middle:.0f} ({1e3 * min(wall):.0f}-{1e3 * max(wall):.0f})", f"{nbytes / middle / 1e9:.2f}",
        f"{statistics.median(ratios(copies, taken, 'wall')):.2f}", f"{statistics.median(ratios(taken, ours, 'wall')):.2f}",
        f"{1e3 * statistics.median(one.cpu for one in taken):.0f}", f"{statistics.median(ratios(copies, taken, 'cpu')):.2f}",
        f"{max(max(one.memory for one in taken), 0) / 2**20:.0f}",
    )  # fmt: skip


def text(figures: Figures) -> str:
    """Conditions and table."""
    before, after = figures.load
    day = time.strftime("%Y-%m-%d", time.gmtime())
    lines = [
        f"{figures.nbytes / 1e9:.2f} GB of bfloat16, {len(figures.large['copy'])} rounds, a watermark of "
        f"{figures.staging / 2**20:.0f} MiB; {day}. Load {before:.1f} when it began, {after:.1f} when it ended, its own "
        "processes included.",
        f"{figures.machine}.",
        "",
        f"| {' | '.join(HEAD)} |",
        "|---" + "|--:" * (len(HEAD) - 1) + "|",
    ]
    lines += [f"| {' | '.join(row(name, figures.nbytes, taken, found))} |" for name, taken, found in figures.ways()]
    lines += [f"\n{name} is not installed: what needs it was left out" for name in figures.absent]
    return "\n".join(lines)


def plot(figures: Figures, path: Path) -> None:
    """Left the time of each way with its spread, right the share of the copy, by the clock and by processor time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "aiotransfer"
    import matplotlib.pyplot as plt

    ways = list(figures.ways())
    names, at = [name for name, _, _ in ways], range(len(ways))
    colours = ["C0" if name.startswith("aiotransfer") else "C7" for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    walls = [[1e3 * one.wall for one in taken] for _, taken, _ in ways]
    middles = [statistics.median(wall) for wall in walls]
    spread = [[m - min(wall) for m, wall in zip(middles, walls, strict=True)],
              [max(wall) - m for m, wall in zip(middles, walls, strict=True)]]  # fmt: skip
    left.barh(at, middles, xerr=spread, color=colours, capsize=3)
    left.set(xlabel=f"ms for {figures.nbytes / 1e9:.2f} GB, median and spread")
    left.set_yticks(at, names)
    left.invert_yaxis()
    for offset, what, colour, label in ((-0.2, "wall", "C0", "by the clock"), (0.2, "cpu", "C1", "by processor time")):
        shares = [statistics.median(ratios(found["copy"], taken, what)) for _, taken, found in ways]
        right.barh([k + offset for k in at], shares, 0.4, color=colour, label=label)
    right.axvline(GOAL, color="C3", linestyle="--", linewidth=1, label=f"{GOAL} of the copy")
    right.set(xlabel="share of the copy's rate")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write(figures: Figures, page: Path = PAGE) -> None:
    """The marked section of the page, and the plot beside it. Raises `ValueError` for a page without the marks."""
    before, found, rest = page.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{page} has no section between {BEGIN} and {END}")
    plot(figures, page.with_name("weights-bench.svg"))
    page.write_text(
        f"{before}{BEGIN}\n\n{text(figures)}\n\n![time of each way, and its share of a copy](weights-bench.svg)\n\n{END}{after}"
    )


def told(figures: Figures) -> dict[str, Any]:
    """All figures as plain values, for JSON."""
    ways = {name: {way: [one._asdict() for one in taken] for way, taken in found.items()}
            for name, found in (("bfloat16", figures.large), ("float8", figures.small))}  # fmt: skip
    return {"bytes": figures.nbytes, "staging": figures.staging, "machine": figures.machine,
            "load": figures.load, "absent": figures.absent, **ways}  # fmt: skip


def read(values: dict[str, Any]) -> Figures:
    """What `told` gave."""
    large, small = (
        {way: [Taken(**one) for one in taken] for way, taken in values[name].items()} for name in ("bfloat16", "float8")
    )
    return Figures(values["bytes"], values["staging"], values["machine"], tuple(values["load"]), large, small, values["absent"])
