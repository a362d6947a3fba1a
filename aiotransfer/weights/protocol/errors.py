"""How an update ends that does not reach all: `TransferError`s that pickle, and carry `.hint` and the other
fields of those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiotransfer.errors import TransferError


class VersionError(TransferError):
    """A version that may not be published: not above the present one, of an older epoch, or claimed by
    another trainer.

    `.version`: what was asked for, `.current`: what is known, each an (epoch, number) or None.
    """

    def __init__(
        self, message: str, *, version: tuple[int, int] | None = None, current: tuple[int, int] | None = None, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.version = version
        self.current = current


class UpdateError(TransferError):
    """An update did not reach all ranks. `.version`: (epoch, number); `.committed`: names of the ranks (or
    instances) that have it; `.missing`: {rank: reason} of those that do not."""

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
