"""What KV-cache transfers raise besides `LayoutMismatch`. All are `BrokenError`s: the reason lies on the
other side."""

from __future__ import annotations

from typing import Any

from aiotransfer.errors import BrokenError


class KVRequestError(BrokenError):
    """One request failed; others did not. `.id` is the request's."""

    def __init__(self, message: str, *, id: str = "", **fields: Any) -> None:
        super().__init__(message, **fields)
        self.id = id


class RequestRefused(KVRequestError):
    """The request was not taken; nothing of it is delivered.

    `.reason`: `duplicate` (its instance has a request of this id), `mismatch` (another rank of its instance
    does not agree on the request), `instance` (another engine is this rank of the instance), `coverage` (the
    prefill ranks that were named do not bring each layer and head once), `absent` (another rank of its
    instance cannot take part), `checksums` (the prefill side cannot make them), `busy`, `nothing` (to send),
    `closed` or `protocol`.
    """

    def __init__(self, message: str, *, reason: str = "", **fields: Any) -> None:
        super().__init__(message, **fields)
        self.reason = reason


class RequestFailed(KVRequestError):
    """The prefill side took the request and gave it up; the message says why."""


class RequestCancelled(KVRequestError):
    """The decode side does not want it any more (cancelled, late, or gone)."""


class WrongPageError(KVRequestError):
    """A page does not have the checksum that its sender computed. `.layer`, `.page` (of the decode side's
    pool)."""

    def __init__(self, message: str, *, layer: int = -1, page: int = -1, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.layer = layer
        self.page = page
