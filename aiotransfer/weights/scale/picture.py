"""A large model's plan as a picture (SVG): the load of every rank beside its bound, and the predicted stages.
Pure."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from aiotransfer.weights.planning.explain import size
from aiotransfer.weights.scale.predict import Row
from aiotransfer.weights.scale.report import Report, title

WIDTH, HEIGHT = 940, 520
COLOURS = ("#5b8def", "#e08a3c", "#7bb662", "#b07cc6", "#d9c14a", "#9aa7b5", "#cf5b5b")


def svg(report: Report) -> str:
    """Above the bytes of each sender and receiver, sorted; below the stages as bars."""
    b = report.balance
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="20" y="24" font-size="15">{escape(title(report.model, report.placement))}</text>',
        *_loads(20, "bytes sent by each trainer rank (line: the bound)", b.sent, b.sender_bound, COLOURS[0]),
        *_loads(490, "bytes received by each inference rank", b.received, 0, COLOURS[2]),
    ]
    bars = [("the paper's table, ms", [Row(r.name, r.published) for r in report.paper[:-1] if r.published is not None])]
    bars.append(("predicted by the paper's way", report.paper[:-1]))
    rows = [(text, stages) for text, stages in bars if stages]
    longest = max([sum(r.ms for r in stages) for _, stages in rows] + [row.ms for row in report.own])
    scale, y = (WIDTH - 340) / max(longest, 1e-9), 290.0
    parts.append(f'<text x="20" y="{y - 14}" font-size="14">Milliseconds of an update</text>')
    for text, stages in rows:
        parts += _stacked(y, text, stages, scale)
        y += 30
    for k, row in enumerate(report.own):
        parts += _stacked(y + 8, ("this plan: " if not k else "") + row.name, [row], scale, thin=True)
        y += 20
    for k, row in enumerate(report.paper[:-1]):
        x, line = 20 + 150 * k, HEIGHT - 16
        parts.append(f'<rect x="{x}" y="{line - 10}" width="10" height="10" fill="{COLOURS[k % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 14}" y="{line}">{escape(row.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _loads(x: int, text: str, values: Any, bound: int, colour: str) -> list[str]:
    top, high, wide = 66, 170, 420
    most = max(int(values.max(initial=0)), bound, 1)
    step = wide / max(len(values), 1)
    heights = (np.sort(values)[::-1] / most * high).tolist()
    points = [f"{x},{top + high}"]
    for k, tall in enumerate(heights):
        points += [f"{x + k * step:.2f},{top + high - tall:.2f}", f"{x + (k + 1) * step:.2f},{top + high - tall:.2f}"]
    points.append(f"{x + wide},{top + high}")
    parts = [
        f'<text x="{x}" y="{top - 14}">{escape(text)}: at most {size(most)}</text>',
        f'<polygon points="{" ".join(points)}" fill="{colour}"/>',
    ]
    if bound:
        y = top + high - bound / most * high
        parts.append(f'<line x1="{x}" y1="{y:.2f}" x2="{x + wide}" y2="{y:.2f}" stroke="#cf2020" stroke-dasharray="4 3"/>')
    return parts


def _stacked(y: float, text: str, stages: list[Row], scale: float, *, thin: bool = False) -> list[str]:
    left, high = 290.0, 14 if thin else 22
    total = sum(row.ms for row in stages)
    parts = [f'<text x="{left - 8}" y="{y + high - 4}" text-anchor="end">{escape(text[:46])}</text>']
    at = left
    for k, row in enumerate(stages):
        colour = "#4a5a6a" if thin else COLOURS[k % len(COLOURS)]
        parts.append(f'<rect x="{at:.2f}" y="{y}" width="{row.ms * scale:.2f}" height="{high}" fill="{colour}"/>')
        at += row.ms * scale
    return [*parts, f'<text x="{at + 6:.2f}" y="{y + high - 4}">{total:.0f}</text>']
