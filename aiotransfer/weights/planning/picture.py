"""A plan as a picture (SVG): how much each rank sends to each other. Pure; no dependencies."""

from __future__ import annotations

import itertools
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from aiotransfer.weights.planning import explain

if TYPE_CHECKING:
    from aiotransfer.weights.planning.schedule import Schedule

Ints = npt.NDArray[Any]
MOST_BARS = 64  # of a side: with more ranks neighbours share a bar
WIDTH, HEIGHT, TOP, BAR, LEFT, RIGHT = 900, 560, 70, 26, 150, 724
COLOURS = ("#9aa7b5", "#5b8def", "#e08a3c")  # copied, cast, quantised
KINDS = ("copied", "cast", "quantised")


def svg(plan: Schedule) -> str:
    """Trainers on the left, receivers on the right, a band for each pair as thick as its bytes; bars show
    what is made on the way."""
    direct, passed = explain.matrix(plan)
    senders, receivers = _groups(len(direct)), _groups(plan.receivers)
    flows = _sum(_sum(direct, senders, 0), receivers, 1)
    kinds = _sum(_by_kind(plan), senders, 0)
    total = max(int(flows.sum()), 1)
    scale = (HEIGHT - TOP - 30) / total / 1.25
    left, right = _stack(flows.sum(axis=1), scale), _stack(flows.sum(axis=0), scale)
    title = f"{explain.size(int(direct.sum()))} from {len(direct)} trainer ranks to {plan.receivers} inference ranks"
    if passed.size:
        title += f"; {explain.size(int(passed.sum()))} passed on between instances"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="20" y="26" font-size="16">{escape(title)}</text>',
    ]
    for k, (name, colour) in enumerate(zip(KINDS, COLOURS, strict=True)):
        share = int(kinds[:, k].sum())
        parts.append(f'<rect x="{20 + 200 * k}" y="38" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{38 + 200 * k}" y="48">{name}: {explain.size(share)}</text>')
    parts += _bands(flows, left, right, scale)
    for row, (first, last) in enumerate(senders):
        y = left[row]
        for k, colour in enumerate(COLOURS):
            high = float(kinds[row, k]) * scale
            parts.append(f'<rect x="{LEFT}" y="{y:.2f}" width="{BAR}" height="{high:.2f}" fill="{colour}"/>')
            y += high
        label = f"trainer {first}" if last == first + 1 else f"trainers {first} to {last - 1}"
        parts += _label(LEFT - 6, left[row], flows[row].sum() * scale, label, int(flows[row].sum()), "end", len(senders))
    for row, (first, last) in enumerate(receivers):
        amount = int(flows[:, row].sum())
        parts.append(f'<rect x="{RIGHT}" y="{right[row]:.2f}" width="{BAR}" height="{amount * scale:.2f}" fill="#4a5a6a"/>')
        label = "{} rank {}".format(*plan.who(first)) + ("" if last == first + 1 else f" to {plan.who(last - 1)[1]}")
        parts += _label(RIGHT + BAR + 6, right[row], amount * scale, label, amount, "start", len(receivers))
    return "\n".join([*parts, "</svg>"])


def _groups(count: int) -> list[tuple[int, int]]:
    edges = np.unique(np.linspace(0, count, min(count, MOST_BARS) + 1).astype(int)).tolist()
    return list(itertools.pairwise(edges))


def _sum(values: Ints, groups: list[tuple[int, int]], axis: int) -> Ints:
    return np.asarray(np.add.reduceat(values, [first for first, _ in groups], axis=axis))


def _by_kind(plan: Schedule) -> Ints:
    """Bytes of each trainer rank by what is done with them [ranks, 3]."""
    result = np.zeros((plan.trainer.ranks, 3), np.int64)
    for begin in range(0, len(plan.move_job), explain.STEP):
        moves = np.arange(begin, min(begin + explain.STEP, len(plan.move_job)))
        job = plan.move_job[moves]
        np.add.at(result, (plan.job_sender[job], plan.tensor_kind[plan.unit_tensor[plan.job_unit[job]]]), plan.move_bytes(moves))
    return result


def _stack(sizes: Ints, scale: float) -> list[float]:
    gap = (HEIGHT - TOP - 30 - float(sizes.sum()) * scale) / max(len(sizes), 1)
    starts = np.cumsum(sizes) - sizes
    return [TOP + float(start) * scale + gap * k for k, start in enumerate(starts)]


def _bands(flows: Ints, left: list[float], right: list[float], scale: float) -> list[str]:
    parts = []
    used_left, used_right = list(left), list(right)
    x1, x2 = LEFT + BAR, RIGHT
    middle = (x1 + x2) / 2
    for row, column in zip(*np.nonzero(flows), strict=True):
        high = float(flows[row, column]) * scale
        a, b = used_left[row], used_right[column]
        used_left[row] += high
        used_right[column] += high
        path = (
            f"M{x1},{a:.2f} C{middle},{a:.2f} {middle},{b:.2f} {x2},{b:.2f} "
            f"L{x2},{b + high:.2f} C{middle},{b + high:.2f} {middle},{a + high:.2f} {x1},{a + high:.2f} Z"
        )
        parts.append(f'<path d="{path}" fill="#5b8def" fill-opacity="0.25"/>')
    return parts


def _label(x: int, y: float, high: float, label: str, nbytes: int, anchor: str, many: int) -> list[str]:
    if many > 40 and high < 4:
        return []
    size = 11 if many <= 24 else 7
    words = f"{escape(label)}: {explain.size(nbytes)}"
    return [f'<text x="{x}" y="{y + high / 2 + size / 3:.2f}" text-anchor="{anchor}" font-size="{size}">{words}</text>']
