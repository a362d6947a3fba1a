"""The receiving side in a worker process: an engine on a thread of its own, and a `Subscriber` whose memory
is staging memory.

The bytes of a version come into memory that the model does not use, while the worker goes on with its steps.
A version that is whole is then read by `version()`; nothing writes into it until that block ends. Knows
nothing of vLLM."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import aiotransfer as at
from aiotransfer import rendezvous
from aiotransfer.integrations.vllm.weights import messages
from aiotransfer.weights import Layout, Subscriber, Version, VersionError


class Receiver:
    """One worker: rank `rank` of the `ranks` workers of the inference instance `instance`. Its calls are made
    from one thread, which has no event loop."""

    def __init__(self, instance: str, rank: int, ranks: int) -> None:
        self.instance, self.rank, self.ranks = instance, rank, ranks
        self._thread: at.EngineThread | None = None
        self._subscriber: Subscriber | None = None
        self._timeout = 0.0

    def join(self, trainer: str, layout: Layout, *, timeout: float, listen: str = "") -> None:
        """Be ready for versions of the tensors of `layout` from the trainers of which `trainer` is an
        address. `timeout`: seconds to reach it, and of every later wait; `listen`: where the engine listens
        when it is opened (default "": any port at the address by which this host reaches the trainer). Other
        trainers may follow; versions go on rising.

        Raises `TransferError`."""
        self._timeout = timeout
        if self._thread is None:
            where = listen or rendezvous.listen_address(towards=trainer)
            self._thread = at.run_in_thread(listen=where, name=f"{self.instance} {self.rank}", timeout=timeout)
        self._thread.run(self._join(trainer, messages.for_workers(layout, self.ranks)))

    async def _join(self, trainer: str, layout: Layout) -> None:
        assert self._thread is not None
        engine = self._thread.engine
        await engine.connect(trainer, timeout=self._timeout)
        if self._subscriber is not None and self._subscriber.layout != layout:
            await self._subscriber.aclose()
            self._subscriber = None
        if self._subscriber is None:
            self._subscriber = Subscriber(
                engine, layout, instance=self.instance, rank=self.rank, mode="in_place", timeout=self._timeout
            )

    @property
    def present(self) -> Version | None:
        """The version that is whole here; None: there is none."""
        return None if self._subscriber is None else self._subscriber.version

    @contextlib.contextmanager
    def version(self, wanted: Version) -> Iterator[Mapping[str, Any]]:
        """The tensors of version `wanted`, {name: NumPy array or torch tensor}, whole, which stay as they are
        until the block ends: copy what is kept longer. Waits while a version is on its way, no longer than
        `timeout` of `join`.

        Raises `VersionError` when another version is here, `ClosedError` before `join`, `TransferError`."""
        if self._thread is None or self._subscriber is None:
            raise at.ClosedError("no trainer has been named", hint="init_weight_transfer_engine comes before update_weights")
        stack = contextlib.AsyncExitStack()
        try:
            present = self._thread.run(self._enter(stack))
            if present != wanted:
                raise VersionError(
                    f"the trainer asks for version {wanted}, this worker has {present}", version=wanted, current=present
                )
            yield self._subscriber.tensors
        finally:
            self._thread.run(stack.aclose())

    async def _enter(self, stack: contextlib.AsyncExitStack) -> Version:
        assert self._subscriber is not None
        return await stack.enter_async_context(self._subscriber.reading(timeout=self._timeout))

    def close(self) -> None:
        """Leave the trainers; `join` begins anew. Twice is silent."""
        thread, self._thread, subscriber, self._subscriber = self._thread, None, self._subscriber, None
        if thread is None:
            return
        try:
            if subscriber is not None:
                thread.run(subscriber.aclose())
        finally:
            thread.close()
