"""What layouts and plans raise: a `TransferError` that pickles, and carries `.hint` and the other fields of
those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiotransfer.errors import TransferError

MOST_LISTED = 20  # problems in the text of a PlanError; `.problems` has all


class PlanError(TransferError):
    """The two sides do not fit; nothing was moved. `.problems`: a tuple of texts, one for each fault that was
    found."""

    def __init__(self, message: str = "", *, problems: Sequence[str] = (), **fields: Any) -> None:
        listed = [f"\n  - {problem}" for problem in problems[:MOST_LISTED]]
        if len(problems) > MOST_LISTED:
            listed.append(f"\n  - and {len(problems) - MOST_LISTED} more (see .problems)")
        super().__init__((message or "the weights of the two sides do not fit") + "".join(listed), **fields)
        self.problems = tuple(problems)
