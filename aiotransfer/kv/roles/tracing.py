"""A span for each request that is over, with the times of its record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiotransfer.telemetry import spans
from aiotransfer.telemetry.spans import current

if TYPE_CHECKING:
    from aiotransfer.kv.protocol.record import RequestRecord

__all__ = ["current", "trace"]
ATTRIBUTES = ("id", "instance", "path", "priority", "tokens", "skip_tokens", "pages", "nbytes", "retries", "outcome")


def trace(record: RequestRecord, context: Any = None) -> None:
    """One span for a request that is over, with its own times. It is a child of the span of `context`, or a
    root."""
    span = spans.begin("aiotransfer.kv", f"kv.{record.role}", context, record.queued)
    if span is None:
        return
    attributes = {f"aiotransfer.kv.{name}": getattr(record, name) for name in ATTRIBUTES}
    attributes["aiotransfer.kv.peers"] = list(record.peers)
    events = {name: getattr(record, name) for name in ("reserved", "first_page", "last_page")}
    error = None if record.outcome == "delivered" else record.error
    spans.end(span, record.finished, attributes=attributes, events=events, error=error)
