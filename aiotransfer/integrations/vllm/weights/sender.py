"""The sending side in a trainer process: an engine on a thread of its own, and a `Publisher` of the trainer's
tensors. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiotransfer as at
from aiotransfer.integrations.vllm.weights import messages
from aiotransfer.weights import Cast, Layout, Publisher, Tensor, Version, layout_of

FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})  # what `Cast` converts between

Gather = Callable[[str], Sequence[str]]  # this rank's address into those of all ranks, in order


@dataclass(frozen=True)
class Options:
    """How a trainer rank sends: `listen`, `advertise`, `timeout` as for `open_engine`; `checksum`, `fanout`,
    `rate_limit` as for `Publisher`; `dtype`: floating tensors are cast to this type on their way ("": they
    are sent as they are)."""

    listen: str
    advertise: str | None
    timeout: float
    checksum: bool
    fanout: str
    rate_limit: float | None
    dtype: str


class Sender:
    """One trainer rank, which publishes the tensors of `memory` ({name: tensor}); `gather` brings the
    addresses of all trainer ranks together (one rank: a list of its own); `options`: how it sends. Its calls
    are made from one thread, which has no event loop."""

    layout: Layout  # of all trainer ranks

    def __init__(self, memory: Mapping[str, Any], gather: Gather, options: Options) -> None:
        self._options = options
        self._number = 0
        where = {"listen": options.listen, "advertise": options.advertise}
        self._thread = at.run_in_thread(name="trainer", timeout=options.timeout, **where)
        try:
            self._members = list(gather(self.address))
            self._publisher: Publisher = self._thread.run(self._make(memory))
        except BaseException:
            self._thread.close()
            raise

    @property
    def address(self) -> str:
        """Where workers reach this rank."""
        return str(self._thread.engine.address)

    @property
    def offered(self) -> Layout:
        """The checkpoint as workers receive it."""
        return messages.checkpoint(self._received())

    def _received(self) -> list[Tensor]:
        tensors = messages.tensors_of(self.layout)
        return [Tensor(one.name, one.shape, self._type_of(one.dtype), one.group, one.aliases) for one in tensors]

    def _type_of(self, dtype: str) -> str:
        to = self._options.dtype
        return to if to and dtype in FLOATS else dtype

    async def _make(self, memory: Mapping[str, Any]) -> Publisher:
        engine, options = self._thread.engine, self._options
        group = engine.group(self._members) if len(self._members) > 1 else None
        layout = self.layout = layout_of(memory, ranks=len(self._members))
        rules = [Cast(name) for name, dtype in zip(layout.names, layout.dtypes, strict=True) if self._type_of(dtype) != dtype]
        return Publisher(
            engine, layout, group=group, rules=rules, timeout=options.timeout, checksum=options.checksum,
            fanout=options.fanout, rate_limit=options.rate_limit,
        )  # fmt: skip

    def rebind(self, memory: Mapping[str, Any]) -> None:
        """The tensors lie in other memory from here on."""
        self._thread.run(self._rebind(memory))

    async def _rebind(self, memory: Mapping[str, Any]) -> None:
        await self._publisher.aclose()
        self._publisher = await self._make(memory)

    def publish(self) -> Version:
        """Bring the tensors as they are now to all workers, as the next version, which this returns; all
        trainer ranks call it.

        Raises `UpdateError` (`.missing` says which workers have not got it, and why), `PlanError`,
        `TransferError`; the workers' models are as they were."""
        self._number += 1
        return self._thread.run(self._publish(self._number))

    async def _publish(self, number: int) -> Version:
        async with self._publisher.publish(number) as update:
            pass
        assert update.version is not None
        return update.version

    def close(self) -> None:
        """Leave the workers. Twice is silent."""
        try:
            self._thread.run(self._publisher.aclose())
        except at.ClosedError:
            return
        finally:
            self._thread.close()
