"""Prometheus metrics of requests that are over.

    observe = on_record(registry=my_registry)
    decoder = kv.Decoder(engine, layout, pages, on_record=observe)

Needs the extra `metrics`. One call may serve any number of decoders and prefillers, and has to: names are
registered once in a registry. Labels are `role`, `outcome` and `path` (the provider), all with few values;
ids, peers and priorities are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aiotransfer.telemetry.prometheus import SECONDS, Maker

if TYPE_CHECKING:
    from aiotransfer.kv.protocol.record import RequestRecord

BYTES = tuple(float(1 << power) for power in range(12, 36, 2))  # 4 KiB to 16 GiB
TOKENS = tuple(float(1 << power) for power in range(4, 20))  # 16 to 524,288


def on_record(
    *, registry: Any = None, seconds: Sequence[float] = SECONDS, sizes: Sequence[float] = BYTES
) -> Callable[[RequestRecord], None]:
    """What `Decoder` and `Prefiller` take as `on_record`. `registry`: a `CollectorRegistry`; None:
    Prometheus's own.

    `seconds` and `sizes` are the upper bounds of the buckets. Raises `ConfigurationError` without the extra
    `metrics`, and `ValueError` when the registry has these metrics already: keep what the first call
    returned.
    """
    return _Metrics(Maker("kv", registry), seconds, sizes).observe


class _Metrics:
    """The metrics of one registry."""

    def __init__(self, make: Maker, seconds: Sequence[float], sizes: Sequence[float]) -> None:
        counter, histogram = make.counter, make.histogram
        self._requests = counter("requests_total", "Requests that are over.", "role", "outcome")
        self._request = histogram(
            "request_seconds", "From the beginning of a request to its end.", "role", "outcome", buckets=seconds
        )
        self._queue = histogram(
            "queue_seconds", "Prefill side: from the last reservation until the application accepted the request.", "role",
            buckets=seconds,
        )  # fmt: skip
        self._reserve = histogram(
            "reserve_seconds", "Decode side: from asking for a request until every prefill rank had taken it.", "role",
            buckets=seconds,
        )  # fmt: skip
        self._wait = histogram(
            "first_page_seconds", "From then until the first page: the model's work, and waiting for a turn.", "role",
            buckets=seconds,
        )  # fmt: skip
        self._transfer = histogram("transfer_seconds", "From the first page to the last.", "role", buckets=seconds)
        self._release = histogram("release_seconds", "From the last page to the end of the request.", "role", buckets=seconds)
        self._bytes = counter("bytes_total", "Bytes of pages that have arrived.", "role", "path")
        self._size = histogram("request_bytes", "Bytes of the pages of a delivered request.", "role", buckets=sizes)
        self._tokens = histogram("request_tokens", "Tokens of a delivered request that were sent.", "role", buckets=TOKENS)
        self._blocks = counter("blocks_total", "Blocks that were written.", "role", "path")
        self._retries = counter("retries_total", "Writes that waited for room in the engine.", "role")

    def observe(self, record: RequestRecord) -> None:
        """Take one request into account."""
        role, path = record.role, record.path or "none"
        self._requests.labels(role, record.outcome).inc()
        self._request.labels(role, record.outcome).observe(max(0.0, record.seconds))
        reserve = self._reserve if role == "decode" else self._queue
        steps = (record.queued, record.reserved, record.first_page, record.last_page, record.finished)
        for phase, begin, end in zip((reserve, self._wait, self._transfer, self._release), steps, steps[1:], strict=False):
            if begin is not None and end is not None:
                phase.labels(role).observe(max(0.0, end - begin))  # the clock may be set back
        if record.nbytes:
            self._bytes.labels(role, path).inc(record.nbytes)
            self._blocks.labels(role, path).inc(record.pages)
        if record.retries:
            self._retries.labels(role).inc(record.retries)
        if record.outcome == "delivered":
            self._size.labels(role).observe(record.nbytes)
            self._tokens.labels(role).observe(record.tokens - record.skip_tokens)
