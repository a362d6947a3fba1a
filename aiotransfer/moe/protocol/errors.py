"""What dispatch and combine raise besides the errors of the engine. Ranks are named in the text and in
`.ranks`."""

from __future__ import annotations

from typing import Any

from aiotransfer.errors import BrokenError, ConfigurationError, TransferError


class _Ranks:
    ranks: tuple[int, ...]


class ShapeMismatch(ConfigurationError, _Ranks):
    """Ranks do not agree on the shape of the all-to-all; raised on all of them. `.ranks`: those that differ
    from this one."""

    def __init__(self, message: str, *, ranks: tuple[int, ...] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.ranks = ranks


class StepRefused(TransferError, _Ranks):
    """A step did not take place, on any rank, and the next may: `.ranks` gave arguments that were refused
    there."""

    def __init__(self, message: str, *, ranks: tuple[int, ...] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.ranks = ranks


class RoutingOverflow(StepRefused):
    """More rows were routed to `.ranks` than those take (`max_recv_tokens`). The step did not take place on
    any rank."""


class EvictedError(BrokenError, _Ranks):
    """This rank takes no part any more: others lost it, or it left. A new `AllToAll` under the same name
    comes back."""

    def __init__(self, message: str, *, ranks: tuple[int, ...] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.ranks = ranks
