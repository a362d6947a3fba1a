"""What decoders and prefillers have in common: records of what is over, and an end that `async with` brings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from aiotransfer.engine.unpicklable import Unpicklable
from aiotransfer.kv.tracing import trace
from aiotransfer.telemetry.records import MOST_RECORDS, Host

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.kv.record import RequestRecord

R = TypeVar("R", bound="Role")


class Role(Unpicklable):
    """A decoder or a prefiller."""

    _instead = "make it in the process that has the memory"

    def __init__(self, on_record: Callable[[RequestRecord], object] | None) -> None:
        self.records: deque[RequestRecord] = deque(maxlen=MOST_RECORDS)
        self.on_record = on_record
        self._host = Host()

    def recorded(self, record: RequestRecord, context: Any) -> None:
        """A request is over; its span belongs to `context`."""
        self.records.append(record)
        self._host.call("the trace of a request", lambda: trace(record, context))
        if (tell := self.on_record) is not None:
            self._host.call("on_record", lambda: tell(record))

    async def aclose(self) -> None:
        """End everything."""
        raise AssertionError("every role has its own")

    async def __aenter__(self: R) -> R:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        await self.aclose()
