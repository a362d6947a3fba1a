"""A span for each update that is over, with the times of its record. `update` is the same attribute on all
ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiotransfer.telemetry import spans

if TYPE_CHECKING:
    from aiotransfer.weights.records.record import UpdateRecord

NAMES = {"publisher": "weights.publish", "subscriber": "weights.receive"}
ATTRIBUTES = (
    "role", "rank", "instance", "update", "source", "outcome", "total", "nbytes", "gathered", "converted", "relayed", "instead",
    "staging_peak", "subscribers", "pause", "gather", "convert",
)  # fmt: skip


def trace(record: UpdateRecord, context: Any = None) -> None:
    """One span for an update that is over. It is a child of the span of `context`, or a root."""
    span = spans.begin("aiotransfer.weights", NAMES[record.role], context, record.began)
    if span is None:
        return
    attributes = {f"aiotransfer.weights.{name}": getattr(record, name) for name in ATTRIBUTES}
    attributes["aiotransfer.weights.version"] = str(record.version or "")
    attributes["aiotransfer.weights.left_behind"] = list(record.left_behind)
    error = None if record.outcome == "committed" else record.error
    spans.end(span, record.finished, attributes=attributes, events=record.steps, error=error)
