"""What decoders and prefillers have in common: records of what is over, and an end that `async with` brings."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from aiotransfer.control.ratelimit import RateLimit, more
from aiotransfer.engine.unpicklable import Unpicklable
from aiotransfer.kv.tracing import trace

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.kv.record import RequestRecord

_logger = logging.getLogger("aiotransfer")
_limit = RateLimit()
R = TypeVar("R", bound="Role")
MOST_RECORDS = 1000


class Role(Unpicklable):
    """A decoder or a prefiller."""

    _instead = "make it in the process that has the memory"

    def __init__(self, on_record: Callable[[RequestRecord], object] | None) -> None:
        self.records: deque[RequestRecord] = deque(maxlen=MOST_RECORDS)
        self.on_record = on_record

    def recorded(self, record: RequestRecord, context: Any) -> None:
        """A request is over; its span belongs to `context`."""
        self.records.append(record)
        try:
            trace(record, context)
            if self.on_record is not None:
                self.on_record(record)
        except Exception as error:  # of the host's code: how a request ends, and what is read next, does not depend on it
            left_out = _limit.admit("record")
            if left_out is not None:
                _logger.error("a record of a request was not taken: %r%s", error, more(left_out), exc_info=error)

    async def aclose(self) -> None:
        """End everything."""
        raise AssertionError("every role has its own")

    async def __aenter__(self: R) -> R:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        await self.aclose()
