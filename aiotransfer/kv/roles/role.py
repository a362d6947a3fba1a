"""What decoders and prefillers have in common: a pool of pages, records of what is over, an end that
`async with` brings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from aiotransfer.engine.engine import Engine
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.kv.protocol.layout import KVLayout
from aiotransfer.kv.roles.arguments import check_pool, memories_of
from aiotransfer.kv.roles.tails import TailPool
from aiotransfer.kv.roles.tracing import trace
from aiotransfer.quote import quote
from aiotransfer.telemetry.records import MOST_RECORDS, Host

if TYPE_CHECKING:
    from types import TracebackType

    from aiotransfer.engine.memory.region import RegionView
    from aiotransfer.kv.protocol.record import RequestRecord
    from aiotransfer.kv.roles.dispatcher import Dispatcher

R = TypeVar("R", bound="Role")
Pages: TypeAlias = "RegionView | Sequence[RegionView]"  # a region, a part of one, or one for each layer


class Role(Unpicklable):
    """A decoder or a prefiller, as its requests know it: `pages` holds the pool of `layout`, in `memories`.

    Raises `TypeError` where `engine`, `layout` or `pages` is something else, `RegionError` when the pool does
    not lie in the region, and `ConfigurationError` for `checksums` of memory that the host cannot read.
    """

    _instead = "make it in the process that has the memory"
    dispatcher: Dispatcher  # entered last, by the subclass: it needs nothing else that can fail

    def __init__(
        self, engine: Engine, layout: KVLayout, pages: Pages, on_record: Callable[[RequestRecord], object] | None, *,
        checksums: bool,
    ) -> None:  # fmt: skip
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an open Engine, not {quote(engine)}")
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout must be a KVLayout, not {type(layout).__name__}")
        self.memories = memories_of(pages, layout)
        check_pool(self.memories, layout, checksums)
        self.engine = engine
        self.layout = layout
        self.pages = pages
        self.tails = TailPool(engine)
        self.records: deque[RequestRecord] = deque(maxlen=MOST_RECORDS)
        if on_record is not None and not callable(on_record):
            raise TypeError(f"on_record must be a function, not {quote(on_record)}")
        self.on_record = on_record
        self._host = Host()

    def recorded(self, record: RequestRecord, context: Any) -> None:
        """A request is over; its span belongs to `context`."""
        self.records.append(record)
        self._host.call("the trace of a request", lambda: trace(record, context))
        if (tell := self.on_record) is not None:
            self._host.call("on_record", lambda: tell(record))

    async def aclose(self) -> None:
        """End all requests and give back what they held. Twice is silent."""
        raise AssertionError("every role has its own")

    async def __aenter__(self: R) -> R:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        await self.aclose()
