"""Spans for the host's tracer, where the host has one: nothing is configured here, and without OpenTelemetry nothing happens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiotransfer.kv.record import RequestRecord


def current() -> Any:
    """The host's context as it is now, for `trace`; None where nobody traces."""
    api = sys.modules.get("opentelemetry.context")  # a host that traces has imported it
    return None if api is None else api.get_current()


def trace(record: RequestRecord, context: Any = None) -> None:
    """One span for a request that is over, with its own times. It is a child of the span of `context`, or a root."""
    api, contexts = sys.modules.get("opentelemetry.trace"), sys.modules.get("opentelemetry.context")
    if api is None or contexts is None:
        return
    parent = contexts.Context() if context is None else context  # what is current now is that of whoever ended the request
    tracer = api.get_tracer("aiotransfer.kv")
    span = tracer.start_span(f"kv.{record.role}", context=parent, start_time=_ns(record.queued))
    if span.is_recording():
        for name in ("id", "instance", "path", "priority", "tokens", "skip_tokens", "pages", "nbytes", "retries", "outcome"):
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
