"""What weight transfers raise. All are `TransferError`s, pickle, and carry `.hint` and the other fields of those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiotransfer.errors import TransferError

MOST_LISTED = 20  # problems in the text of a PlanError; `.problems` has all


class PlanError(TransferError):
    """The two sides do not fit; nothing was moved. `.problems`: a tuple of texts, one for each fault that was found."""

    def __init__(self, message: str = "", *, problems: Sequence[str] = (), **fields: Any) -> None:
        listed = [f"\n  - {problem}" for problem in problems[:MOST_LISTED]]
        if len(problems) > MOST_LISTED:
            listed.append(f"\n  - and {len(problems) - MOST_LISTED} more (see .problems)")
        super().__init__((message or "the weights of the two sides do not fit") + "".join(listed), **fields)
        self.problems = tuple(problems)


class VersionError(TransferError):
    """A version that may not be published: not above the present one, of an older epoch, or claimed by another trainer.

    `.version`: what was asked for, `.current`: what is known, each an (epoch, number) or None.
    """

    def __init__(
        self, message: str, *, version: tuple[int, int] | None = None, current: tuple[int, int] | None = None, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.version = version
        self.current = current


class UpdateError(TransferError):
    """An update did not reach all ranks. `.version`: (epoch, number); `.committed`: names of the ranks (or instances) that have
    it; `.missing`: {rank: reason} of those that do not."""

    def __init__(
        self,
        message: str,
        *,
        version: tuple[int, int] | None = None,
        committed: Sequence[Any] = (),
        missing: Mapping[Any, str] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.version = version
        self.committed = tuple(committed)
        self.missing = dict(missing or {})
