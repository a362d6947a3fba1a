"""Spans for the host's tracer, where the host has one: nothing is configured here, and without OpenTelemetry nothing happens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiotransfer.kv.record import RequestRecord


def trace(record: RequestRecord) -> None:
    """One span for a request that is over, with its own times."""
    api = sys.modules.get("opentelemetry.trace")  # a host that traces has imported it
    if api is None:
        return
    span = api.get_tracer("aiotransfer.kv").start_span(f"kv.{record.role}", start_time=_ns(record.queued))
    if span.is_recording():
        for name in ("id", "path", "priority", "tokens", "skip_tokens", "pages", "nbytes", "retries", "outcome"):
            span.set_attribute(f"aiotransfer.kv.{name}", getattr(record, name))
        span.set_attribute("aiotransfer.kv.peers", list(record.peers))
        for name in ("reserved", "first_page", "last_page"):
            at = getattr(record, name)
            if at is not None:
                span.add_event(name, timestamp=_ns(at))
        if record.outcome != "delivered":
            span.set_status(api.Status(api.StatusCode.ERROR, record.error.partition("\n")[0]))
    span.end(end_time=_ns(record.finished))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
