"""Rows of the benchmark's table, and what its cases have in common."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

SIZES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 16 << 20, 256 << 20)
PAGES = (1 << 10, 4 << 10, 16 << 10, 64 << 10)
TABLE = 4096
PASSES = 5
REGION = 256 << 20
SPAN = 0.06  # seconds of work per round and side


@dataclass
class Row:
    """One line of the result. `limit` may be absent (nan)."""

    case: str
    unit: str
    ours: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    lower_is_better: bool = False
    note: str = ""

    def add(self, ours: float, limit: float | None) -> None:
        """Add what one round measured, and its limit where there is one."""
        self.ours.append(ours)
        if limit is not None:
            self.limit.append(limit)

    def summary(self) -> dict[str, Any]:
        """Median, least and greatest of all rounds, and of their ratios to the limit."""
        out: dict[str, Any] = {"case": self.case, "unit": self.unit, "ours": statistics.median(self.ours), "note": self.note}
        out["ours_min"], out["ours_max"] = min(self.ours), max(self.ours)
        if self.limit:
            ratios = [a / b for a, b in zip(self.ours, self.limit, strict=True) if b]
            out["limit"] = statistics.median(self.limit)
            out["ratio"], out["ratio_min"], out["ratio_max"] = statistics.median(ratios), min(ratios), max(ratios)
        return out


def size_name(n: int) -> str:
    """A number of bytes as people read it: 4 KiB, 16 MiB."""
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"
