"""Spans for the host's tracer, where the host has one: nothing is configured here, and without OpenTelemetry
nothing happens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def current() -> Any:
    """The host's context as it is now, for `begin`; None where the host does not trace."""
    api = sys.modules.get("opentelemetry.context")  # a host that traces has imported it
    return None if api is None else api.get_current()


def begin(scope: str, name: str, context: Any, began: float) -> Any:
    """A span that began at `began`, seconds of `time.time()`: a child of the span of `context`, or a root.
    None: do nothing."""
    api, contexts = sys.modules.get("opentelemetry.trace"), sys.modules.get("opentelemetry.context")
    if api is None or contexts is None:
        return None
    parent = contexts.Context() if context is None else context  # what is current now belongs to the code that ended the work
    return api.get_tracer(scope).start_span(name, context=parent, start_time=_ns(began))


def end(
    span: Any, finished: float, *, attributes: Mapping[str, Any], events: Mapping[str, float | None], error: str | None
) -> None:
    """End it at `finished`. `events`: {name: when, None for what did not happen}; `error`: why it failed,
    None if it did not."""
    if span.is_recording():
        for name, value in attributes.items():
            span.set_attribute(name, value)
        for name, at in events.items():
            if at is not None:
                span.add_event(name, timestamp=_ns(at))
        if error is not None:
            api = sys.modules["opentelemetry.trace"]
            span.set_status(api.Status(api.StatusCode.ERROR, error.partition("\n")[0]))
    span.end(end_time=_ns(finished))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
