"""One update on one publisher rank, as what makes and writes its bytes knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiotransfer.weights.publisher.borrowing import Borrowing
    from aiotransfer.weights.publisher.context import Context
    from aiotransfer.weights.publisher.work import Work, Works
    from aiotransfer.weights.records.observer import Journal


@dataclass(eq=False)
class Run:
    """`update`: its number; `work`: what this rank does; `journal`: what is noted of it.
    `tell_failed(failed)` tells publisher rank 0 which subscriber ranks cannot be written to; `wake()` is
    called when the writes have ended."""

    context: Context
    works: Works
    borrowing: Borrowing
    update: int
    work: Work
    journal: Journal
    tell_failed: Callable[[list[tuple[str, int, str]]], object]
    wake: Callable[[], object]
