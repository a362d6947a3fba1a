"""What dispatch and combine give back, whole and by halves."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.aio.timeouts import Deadline, Timeout
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.errors import ClosedError, TransferTimeout
from aiotransfer.moe.protocol.errors import StepRefused
from aiotransfer.moe.protocol.waits import WORDS
from aiotransfer.moe.step.exchange import MOVED_AT_ONCE, yield_to_loop
from aiotransfer.moe.step.tensors import Array, Kind, check, check_no_grad, overlap, rows
from aiotransfer.providers.rows import Rows, same_rows

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiotransfer.moe.communicator.ranks import Ranks
    from aiotransfer.moe.step.step import Step

ASK_SECONDS = 0.5  # before the end of a deadline, or a quarter of it: then the others are asked what they wait for


class Handle(Unpicklable):
    """One step, between its dispatch and the end of its combine. Made by `AllToAll.dispatch`.

    `step`: its number. `lost`: ranks that were lost while it was under way, or before; rows from them are
    zero. `dropped`, after the combine: bool [tokens, choices], choices whose result is missing in the sum
    (also None before).
    """

    __slots__ = ("_kind", "_out", "_region", "_state", "_step", "_weights", "_y", "dropped")

    def __init__(self, step: Step, weights: Any, kind: Kind) -> None:
        self._step = step
        self._weights = weights
        self._kind = kind
        self._region: Any = None
        self._y: Array = None  # results that are not all sent yet
        self._out: Array = None  # where the sums go, if the caller has said so
        self._state = "sent"  # dispatched, returning, over
        self.dropped: Array = None

    @property
    def step(self) -> int:
        """Its number, the same on every rank."""
        return self._step.number

    @property
    def lost(self) -> tuple[int, ...]:
        """Ranks that took no part in it, or not to its end."""
        ranks, exchange = self._step.ranks, self._step.exchange
        return tuple(r for r in range(ranks.shape.ranks) if r in exchange.lost or (r not in exchange.joined and r != ranks.rank))

    def forget(self) -> None:
        """The memory of results and sums is the caller's alone again."""
        self._y = self._out = None
        if self._region is not None:
            self._region.close()
            self._region = None

    def __repr__(self) -> str:
        return f"<Handle step {self.step}, {self._state}>"


class Dispatched:
    """The tokens for the experts of this rank. Made by `AllToAll.dispatch`.

    `x`: [rows, hidden] in the type of the tokens, expert after expert, in the all-to-all's own memory: valid
    until the combine of this step is over. `x_scales`: [rows, scales] of fp32, or None. `counts`: int64
    [local experts], the rows of each that are filled; each expert's rows begin where those of the one before
    end, rounded up to `expert_alignment` (`offsets`). `y`: [rows, hidden] of `combine_dtype`, where the
    experts may write what the combine is to be given, until that is called; None without `results_in_place`.
    """

    __slots__ = ("counts", "handle", "offsets", "x", "x_scales", "y")

    def __init__(self, x: Array, x_scales: Array, y: Array, counts: Array, offsets: Array, handle: Handle) -> None:
        self.x = x
        self.x_scales = x_scales
        self.y = y
        self.counts = counts
        self.offsets = offsets
        self.handle = handle

    def __repr__(self) -> str:
        return f"<Dispatched {tuple(self.x.shape)} rows, step {self.handle.step}>"


class _NotYet(Exception):
    """A part of a deadline has passed, and the work goes on."""


async def _within(limit: float, work: Callable[[], Awaitable[Any]]) -> Any:
    try:
        async with Timeout(limit):
            return await work()
    except TimeoutError as error:
        if isinstance(error, TransferTimeout):
            raise
        raise _NotYet from None


class _Half(Unpicklable):
    """A dispatch or combine whose first half is over: what is sent, and is to be received."""

    __slots__ = ("_handle", "_timeout")

    def __init__(self, handle: Handle, timeout: float | None) -> None:
        self._handle = handle
        self._timeout = timeout

    @property
    def handle(self) -> Handle:
        """The handle of the step that this is a half of."""
        return self._handle

    def _deadline(self, timeout: float | None) -> Deadline:
        engine = self._handle._step.ranks.engine
        return Deadline(engine._loop, seconds(self._timeout if timeout is None else timeout, engine.timeout))

    async def _within(self, what: str, deadline: Deadline, work: Any) -> Any:
        step = self._handle._step
        step.callers += 1
        try:
            if (left := deadline.left()) != math.inf:
                with contextlib.suppress(_NotYet):
                    return await _within(left - min(left / 4, ASK_SECONDS), work)
                step.communicator.waiting.ask()  # most calls end long before this
            return await _within(deadline.left(), work)
        except _NotYet:
            raise self._late(what, deadline) from None
        finally:
            step.callers -= 1

    def _late(self, what: str, deadline: Deadline) -> TransferTimeout:
        """The error that names the ranks that have not come: none that only waits for another one itself."""
        step = self._handle._step
        ranks, culprits = step.ranks, step.communicator.waiting.culprits(step.waits_for())
        names = [
            (f"rank {rank}, which is this one" if rank == ranks.rank else ranks.who(rank))
            + ("" if wait.step == step.number else f" with {WORDS[wait.kind]} of step {wait.step}")
            for rank, wait in culprits.items()
        ]
        hint = "the step is still in flight: receive() again, or give the missing rank up with evict()"
        if ranks.rank in culprits:
            hint = f"call combine for step {culprits[ranks.rank].step} first: the others wait for it"
        return TransferTimeout(
            f"the {what} of step {step.number} did not end within {deadline.seconds:g} s; not heard of: "
            + (", ".join(names) or "no rank in particular"), ranks=tuple(culprits), hint=hint,
        )  # fmt: skip


class DispatchHalf(_Half):
    """A dispatch that was sent. `await receive()`; after a deadline or a cancellation it may be called
    again."""

    __slots__ = ()

    async def receive(self, *, timeout: float | None = None) -> Dispatched:
        """The other half, within `timeout` seconds (None: those that the first half was given). Raises
        `StepRefused` (also on all other ranks), `TransferTimeout`, `EvictedError`."""
        return await self.receive_until(self._deadline(timeout))

    async def receive_until(self, deadline: Deadline) -> Dispatched:
        """`receive` by the `deadline`, which holds for more than this half."""
        handle = self._handle
        if handle._state != "sent":
            raise ClosedError(f"step {handle.step} was received already")
        try:
            await self._within("dispatch", deadline, self._receive)
        except StepRefused:
            handle._state = "over"
            raise
        step = handle._step
        shape, arrivals = step.ranks.shape, step.arrivals
        memory, kind = await step.rows_for_experts(), handle._kind
        handle._state = "dispatched"
        x = kind.of_bytes(memory, (arrivals.total, shape.hidden), shape.row_bytes, shape.dtype)
        scales = None
        if step.scales:
            scales = kind.of_bytes(memory[shape.token_bytes :], (arrivals.total, step.scales), shape.row_bytes, "float32")
        local = slice(step.ranks.rank * shape.local_experts, (step.ranks.rank + 1) * shape.local_experts)
        counts, offsets = arrivals.counts.copy(), step.ranges.base[local].copy()
        y = None
        if step.buffers.computed_at:
            computed = step.buffers.bytes_of_computed(step.slot)
            y = kind.of_bytes(computed, (arrivals.total, shape.hidden), shape.result_bytes, shape.combine_dtype)
        return Dispatched(x, scales, y, kind.of_ints(counts), kind.of_ints(offsets), handle)

    async def _receive(self) -> None:
        step = self._handle._step
        if step.ahead is not None:  # at work since the other half; what cancels this call does not cancel it
            await asyncio.wait([step.ahead])
        await step.receive()


class CombineHalf(_Half):
    """A combine that was sent. `await receive()`; after a deadline or a cancellation it may be called
    again."""

    __slots__ = ()

    def _hold(self, memory: Any) -> None:
        """Results that are sent from where they lie are registered. Raises `RegistrationError`; then nothing
        has happened."""
        handle = self._handle
        ranks, buffers = handle._step.ranks, handle._step.buffers
        if not buffers.gpu and memory.size and not buffers.computed_at and ranks.any_direct():
            handle._region = ranks.engine.register(memory)

    async def _send(self) -> None:
        """What of the results is not sent yet: a cancellation may have come while they were packed."""
        handle = self._handle
        if handle._y is None:
            return
        step = handle._step
        memory, stride = check_results(handle, handle._y)
        if step.buffers.gpu:
            await step.send_results(*await step.to_host(memory, stride))
        else:
            if handle._region is None:  # a rank that takes rows one by one may have come since
                self._hold(memory)
            await step.send_results(memory, stride, handle._region, 0)
        handle._y = None

    async def receive(self, *, timeout: float | None = None) -> Array:
        """The other half: [tokens, hidden] in the combine's type, within `timeout` seconds (None: those that
        the first half was given). Raises `TransferTimeout` or `EvictedError`."""
        return await self.receive_until(self._deadline(timeout))

    async def receive_until(self, deadline: Deadline) -> Array:
        """`receive` by the `deadline`, which holds for more than this half."""
        handle = self._handle
        if handle._state != "returning":
            raise ClosedError(f"step {handle.step} is over")
        out = await self._within("combine", deadline, self._receive)
        handle._state = "over"
        return out

    async def _receive(self) -> Array:
        handle = self._handle
        step, shape = handle._step, handle._step.ranks.shape
        await self._send()
        there = await step.receive_results()
        out = handle._out
        if out is None:
            out = handle._kind.empty((len(step.route.places), shape.hidden), shape.combine_dtype, step.kernels.device)
        while True:
            places, missing = self._to_be_summed(there)
            await self._weigh(out, places, there)
            await step.kernels.settle()
            spoiled = step.in_place.spoiled(there)
            if not spoiled:
                break
            there[spoiled] = False
            step.exchange.taken_back(spoiled)
        await step.finish()
        handle.forget()
        handle.dropped = handle._kind.of_ints(missing)
        return out

    def _to_be_summed(self, there: Any) -> tuple[Any, Any]:
        """The rows of the choices, -1 where a result is not there, and which those are."""
        step = self._handle._step
        places = step.route.places
        if there.all():
            return places, np.zeros(places.shape, bool)
        rank_of = np.repeat(np.arange(len(there)), step.route.n)  # by row
        missing = places >= 0
        missing[missing] = ~there[rank_of[places[missing]]]
        return np.where(missing, -1, places), missing

    async def _weigh(self, out: Array, places: Any, there: Any) -> None:
        """Sum the results token by token, with turns for the event loop in between."""
        step, shape = self._handle._step, self._handle._step.ranks.shape
        buffers = step.buffers
        source = buffers.results(step.slot)
        memory, stride = rows("out", out, gpu=buffers.gpu)
        at = step.in_place.addresses(step.route, step.ranges, places, there) if step.in_place else None
        most = max(1, MOVED_AT_ONCE // (shape.result_bytes * max(1, places.shape[1])))
        for begin in range(0, len(places), most):
            part = slice(begin, begin + most)
            target = type(source)(memory, begin * stride, stride, shape.result_bytes)
            types = {"dtype": shape.combine_dtype, "out_dtype": shape.combine_dtype}
            if at is not None:
                step.kernels.weigh_at(target, at[part], self._handle._weights[part], shape.result_bytes, **types)
            else:
                step.kernels.weigh(target, source, places[part], self._handle._weights[part], **types)
            if begin + most < len(places):
                await yield_to_loop()


def belongs(handle: object, ranks: Ranks) -> bool:
    """Whether `handle` is that of a step between these `ranks`."""
    return isinstance(handle, Handle) and handle._step.ranks is ranks


def half_of(handle: Handle, timeout: float | None) -> DispatchHalf | CombineHalf:
    """The half of a step that is still to be received, within `timeout` seconds."""
    return CombineHalf(handle, timeout) if handle._state == "returning" else DispatchHalf(handle, timeout)


async def send_back(handle: Handle, y: Array, out: Array, timeout: float | None) -> CombineHalf:
    """Send the results `y` of a step back; the sums are to go to `out` (None: to fresh memory). Raises
    `TypeError`, `ValueError` or `ClosedError` before anything has happened, `RegistrationError`, or what
    ended the all-to-all."""
    if handle._state != "dispatched" and handle._state != "returning":
        raise ClosedError(f"step {handle.step} is {'not received yet' if handle._state == 'sent' else 'over'}")
    handle._step.ranks.check()
    half = CombineHalf(handle, timeout)
    check_no_grad("y", y)
    memory, stride = check_results(handle, y)
    if out is not None:
        check_no_grad("out", out)
        check_sums(handle, out, memory, stride)
    if handle._state == "dispatched":
        half._hold(memory)
        handle._state, handle._y = "returning", y
    if out is not None:
        handle._out = out
    await half._send()
    return half


def check_sums(handle: Handle, out: Array, results: Any, results_stride: int) -> None:
    """`out` can take the sums while `results`, the memory of what the experts made, is still sent or read by
    other ranks. Raises `TypeError` or `ValueError`."""
    step = handle._step
    shape, buffers = step.ranks.shape, step.buffers
    check("out", out, (len(step.route.places), shape.hidden), shape.combine_dtype)
    memory, stride = rows("out", out, gpu=buffers.gpu)
    if not len(memory):
        return
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    if not buffers.gpu and any(np.may_share_memory(memory, own) for own in (buffers.here, buffers.out)):
        raise ValueError("out lies where other ranks read or write, in the all-to-all's own memory: give other memory")
    if overlap(memory, stride, results, results_stride, shape.result_bytes):
        raise ValueError("out overlaps y, which is read until the combine is over: give other memory")


def check_results(handle: Handle, y: Array) -> tuple[Any, int]:
    """`y` as memory and stride. Raises `TypeError` or `ValueError`."""
    step, shape = handle._step, handle._step.ranks.shape
    buffers, total = step.buffers, step.arrivals.total
    check("y", y, (total, shape.hidden), shape.combine_dtype)
    memory, stride = rows("y", y, gpu=buffers.gpu)
    if buffers.computed_at:
        same_rows(Rows(memory, 0, stride, shape.result_bytes), buffers.computed(step.slot), total)  # or they do not overlap
    return memory, stride
