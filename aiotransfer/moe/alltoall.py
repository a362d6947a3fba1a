"""The all-to-all of expert parallelism: `dispatch` tokens to the ranks that hold their experts, `combine`
what those made of them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from aiotransfer.aio.timeouts import Deadline, Timeout
from aiotransfer.engine.engine import Engine
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.engine.runtime.unpicklable import Unpicklable
from aiotransfer.engine.sync.group import PeerGroup
from aiotransfer.errors import BusyError, TransferError, TransferTimeout, said
from aiotransfer.model.dtypes import lookup
from aiotransfer.moe.calls import told
from aiotransfer.moe.communicator.communicator import Communicator
from aiotransfer.moe.communicator.unmade import told_to_others
from aiotransfer.moe.kernels import kernels_for
from aiotransfer.moe.kernels.cpu import CpuKernels
from aiotransfer.moe.protocol.errors import StepRefused
from aiotransfer.moe.protocol.routing import Route
from aiotransfer.moe.protocol.shape import Shape
from aiotransfer.moe.protocol.tags import encoded
from aiotransfer.moe.step import tensors
from aiotransfer.moe.step.handle import CombineHalf, Dispatched, DispatchHalf, Handle, belongs, half_of, send_back
from aiotransfer.moe.step.step import Step
from aiotransfer.moe.step.tensors import Array
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator
    from types import TracebackType


SCALED_ELEMENTS = 128  # elements of float8 that share a scale, usually


def _refusal(*, ahead: bool) -> Callable[[AllToAll, TypeError], Awaitable[object]]:
    """What tells the other ranks that a dispatch, or its first half (`ahead`), was called with arguments that
    do not fit."""
    return lambda a2a, error: a2a._send((None,) * 4, None, None, ahead=ahead, refusal=error)


class AllToAll(Unpicklable):
    """One rank's side, on `engine`. Awaitable and an async context manager: both return when all ranks have
    met.

    `group`: the ranks in order, rank r holding experts [r * E / ranks, (r + 1) * E / ranks) of E =
    `num_experts`. All sizes are the same on every rank (`ShapeMismatch` on all of them otherwise):

    - `hidden`, `dtype`: of a token; float32, bfloat16, float16 or a float8. `scales`: fp32 numbers that may travel with each
      token (default: hidden / 128 for float8, else 0).
    - `max_tokens`: tokens of a rank in one step, at most. `topk`: experts of a token, at most.
    - `combine_dtype`: of results and sums (default: `dtype`, bfloat16 for float8).
    - `expert_alignment`: each expert's rows are padded (with zeros) to a multiple of it.
    - `max_recv_tokens`: rows that a rank takes in one step, padding included (default: as many as can be sent to it, which is
      `ranks * max_tokens * topk`; memory is held for it `slots` times). A step that needs more is `RoutingOverflow` on all ranks.
    - `private_tokens`: rows that go to each rank before the counts of all are known (32 in arXiv 2510.27656).
    - `dp_size`: so many neighbouring ranks have the same tokens.
    - `slots`: steps in flight at a time. `align`: a rank that comes back begins at a step that divides by it (steps of a
      forward pass).

    - `results_in_place`: hold room for results, `Dispatched.y`, from which ranks of this host sum them without their being sent
      (`slots` times rows * result bytes more). Each rank decides for itself.

    `name` tells several all-to-alls of one group apart; one that is open is taken (`ValueError`). `direct`:
    whether others put rows at their places one by one; "auto" does on the same host. `device`: of tokens and
    results. `timeout` (seconds, default the engine's) is that of every call that has none of its own, and of
    all that a call does.

    What is wrong with an argument is raised here (`TypeError`, `ValueError`), and told to the ranks that wait
    for this one.
    """

    _instead = "every rank makes its own"

    @told_to_others
    def __init__(
        self,
        engine: Engine,
        group: PeerGroup,
        *,
        num_experts: int,
        hidden: int,
        dtype: Any,
        max_tokens: int,
        topk: int | None = None,
        combine_dtype: Any = None,
        scales: int | None = None,
        private_tokens: int = 32,
        expert_alignment: int = 1,
        max_recv_tokens: int | None = None,
        dp_size: int = 1,
        slots: int = 2,
        align: int = 1,
        direct: bool | str = "auto",
        results_in_place: bool = False,
        device: str = "cpu",
        name: str = "",
        timeout: float | None = None,
    ) -> None:
        if not isinstance(engine, Engine) or not isinstance(group, PeerGroup):
            raise TypeError(f"an open Engine and what its group() returns are needed, not {quote(engine)} and {quote(group)}")
        kind = lookup(dtype).name
        eight = kind.startswith("float8")
        shape = Shape(
            ranks=len(group), num_experts=num_experts, hidden=hidden, dtype=kind, max_tokens=max_tokens,
            topk=min(8, num_experts) if topk is None else topk,
            combine_dtype=("bfloat16" if eight else kind) if combine_dtype is None else lookup(combine_dtype).name,
            scales=(-(-hidden // SCALED_ELEMENTS) if eight else 0) if scales is None else scales,
            private_tokens=private_tokens, padding=expert_alignment, dp_size=dp_size, max_recv=max_recv_tokens or 0, slots=slots,
            align=align,
        )  # fmt: skip
        if max_recv_tokens is not None and not max_recv_tokens:
            raise ValueError(f"max_recv_tokens is None or at least 1, not {quote(max_recv_tokens)}")
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {quote(name)}")
        if direct not in ("auto", True, False):
            raise ValueError(f"direct is 'auto', True or False, not {quote(direct)}")
        if timeout is not None:
            seconds(timeout)
        if type(results_in_place) is not bool:
            raise TypeError(f"results_in_place is True or False, not {quote(results_in_place)}")
        self._kernels = kernels_for(device)
        gpu = not isinstance(self._kernels, CpuKernels)
        if gpu and results_in_place:
            raise ValueError("results_in_place is for host memory (device='cpu')")
        self._communicator = Communicator(
            engine, group, shape, name,
            direct=None if direct == "auto" else bool(direct), gpu=gpu, in_place=results_in_place,
        )  # fmt: skip
        self._ranks = self._communicator.ranks
        self._timeout = timeout
        self._turn = asyncio.Lock()  # steps are sent in the order of their numbers
        self._meeting: asyncio.Task[None] | None = None
        self._met = False

    # ---- meeting ----

    async def ready(self, *, timeout: float | None = None) -> AllToAll:
        """Returns when all ranks have met; the first dispatch does it, too. `timeout`: seconds (None: that of
        the all-to-all).

        Raises `ShapeMismatch` (on all ranks), `TransferTimeout` whose `.ranks` are those that are missing,
        `PeerLostError` (also where another rank could not set up, with its reason), `EvictedError` where the
        ranks at work have given this one up, `ConfigurationError` where the list of another member of the
        group differs, or `ValueError` where the engine has an open one of this name.
        """
        await self._ready(self._deadline(timeout))
        return self

    async def _ready(self, deadline: Deadline) -> None:
        if not self._met:
            communicator, ranks = self._communicator, self._ranks
            if self._meeting is None:
                ranks.check()
                self._meeting = ranks.engine._loop.create_task(communicator.meet())
            meeting = self._meeting
            try:
                async with Timeout(deadline.left()):
                    await asyncio.wait([meeting])
            except TimeoutError:
                raise communicator.bootstrap.not_met(deadline.seconds) from None
            if meeting.cancelled():
                ranks.check()
            elif meeting.exception() is not None:
                self._meeting = None
            meeting.result()
            self._met = True

    def __await__(self) -> Generator[Any, None, AllToAll]:
        return self.ready().__await__()

    async def __aenter__(self) -> AllToAll:
        try:
            return await self.ready()
        except GeneratorExit:  # the coroutine was dropped: nothing may be awaited
            raise
        except BaseException:
            await self.aclose()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Leave: the others go on without this rank. Twice is silent."""
        if self._meeting is not None:
            self._meeting.cancel()
        await self._communicator.close()

    # ---- dispatch ----

    @told(_refusal(ahead=False))
    async def dispatch(
        self, x: Array, topk_idx: Array, topk_weights: Array, *, x_scales: Array | None = None, tag: int | str | None = None,
        timeout: float | None = None,
    ) -> Dispatched:  # fmt: skip
        """Send each token to the ranks of its experts, and get those for the experts of this rank. Every rank
        calls it.

        `x`: [tokens, hidden] of `dtype`; `topk_idx`: integers [tokens, choices], -1 for no expert;
        `topk_weights`: fp32 of the same shape, used by the combine; `x_scales`: fp32 [tokens, scales]. NumPy
        or torch; results are of the same kind. All of it is copied or at rest when this returns. `tag`
        (default None): what this step is for, a layer say, as an int of 64 bits or up to 63 bytes of text; a
        step whose ranks give different tags is `StepRefused` on all of them. `timeout`: seconds (None: that
        of the all-to-all).

        Raises `TypeError`, `ValueError` or the exception that checking the arguments of this rank raised (the
        step then is `StepRefused` on all others, and the next may be called), `RoutingOverflow`, `BusyError`
        when `slots` steps are in flight, `TransferTimeout` (see `in_flight`), `EvictedError`.
        """
        half, deadline = await self._send((x, topk_idx, topk_weights, x_scales), tag, timeout, ahead=False)
        return await half.receive_until(deadline)

    @told(_refusal(ahead=True))
    async def dispatch_send(
        self, x: Array, topk_idx: Array, topk_weights: Array, *, x_scales: Array | None = None, tag: int | str | None = None,
        timeout: float | None = None,
    ) -> DispatchHalf:  # fmt: skip
        """The first half of `dispatch`, with its arguments `x`, `topk_idx`, `topk_weights`, `x_scales`, `tag`
        and `timeout` (seconds of either half): returns when the first rows are sent. The rest follows while
        the caller does something else."""
        return (await self._send((x, topk_idx, topk_weights, x_scales), tag, timeout, ahead=True))[0]

    async def _send(
        self, given: tuple[Array, Array, Array, Array | None], tag: int | str | None, timeout: float | None, *, ahead: bool,
        refusal: BaseException | None = None,
    ) -> tuple[DispatchHalf, Deadline]:  # fmt: skip
        """`given`: rows, choices, weights and scales, as `dispatch` takes them. `refusal`: why there can be
        no step, where that is known already; it is raised when the other ranks have been told."""
        try:
            deadline = self._deadline(timeout)
        except (TypeError, ValueError) as error:
            refusal, timeout = error, None
            deadline = self._deadline(None)
        await self._ready(deadline)
        ranks, shape = self._ranks, self._ranks.shape
        await self._take_turn(deadline)
        try:
            ranks.check()
            number = ranks.next_step
            busy = ranks.steps.get(number - shape.slots)
            if busy is not None and busy.refusal:  # it goes on by itself
                with contextlib.suppress(StepRefused):
                    await DispatchHalf(self._handle(busy.number), timeout).receive_until(deadline)
            elif busy is not None:
                raise BusyError(
                    f"step {busy.number} is still in flight, and there are {shape.slots} slots",
                    hint="combine it first; a dispatch or combine that was cut off goes on by receive(), see in_flight",
                )
            try:
                idx, weights, tokens, stride, scale_rows, scales, kind = self._check(*given)
                step = Step(self._communicator, self._kernels, number, Route(shape, ranks.rank, idx), scales, tag=encoded(tag))
            except BaseException as error:  # of any kind: the others wait for this step, and must know that there is none
                refusal = refusal or error
            if not self._may_send(number):
                await self._until_it_may(number, deadline)
            if refusal is None:
                try:
                    await step.send(tokens, stride, scale_rows)
                except TransferError:  # nothing was sent
                    raise
                except Exception as error:
                    refusal = error
            if refusal is not None:
                idx, weights, tokens, kind = _nothing(shape)
                step = Step(self._communicator, self._kernels, number, Route(shape, ranks.rank, idx), 0, said(refusal))
                await step.send(tokens, 0, None)
        finally:
            self._turn.release()
        handle = Handle(step, weights, kind)
        ranks.handles[number] = handle
        if refusal is not None:
            step.ahead = ranks.spawn(step.receive())
            if not ahead:  # otherwise others may wait for the combine of an earlier step first
                with contextlib.suppress(StepRefused):  # it is over everywhere
                    await DispatchHalf(handle, timeout).receive_until(deadline)
            raise refusal
        if ahead:
            step.ahead = ranks.spawn(step.send_rows())
        return DispatchHalf(handle, self._timeout if timeout is None else timeout), deadline

    def _deadline(self, timeout: float | None) -> Deadline:
        engine = self._ranks.engine
        return Deadline(engine._loop, seconds(self._timeout if timeout is None else timeout, engine.timeout))

    async def _take_turn(self, deadline: Deadline) -> None:
        try:
            async with Timeout(deadline.left()):
                await self._turn.acquire()
        except TimeoutError:
            text = "another dispatch of this rank has not been sent yet"
            raise TransferTimeout(text, hint="nothing was sent: dispatch again") from None

    def _may_send(self, number: int) -> bool:
        """A rank that comes back is waited for before the step with which it may begin, and every rank that
        takes part must be known."""
        ranks, membership = self._ranks, self._ranks.membership
        assert membership is not None
        limit = membership.limit()
        strangers = [
            rank for rank in ranks.others()
            if membership.present(number, rank)
            and ((known := ranks.known[rank]) is None or known.remote is None)
        ]  # fmt: skip
        return (limit is None or number <= limit) and not strangers

    async def _until_it_may(self, number: int, deadline: Deadline) -> None:
        waiting, membership = self._communicator.waiting, self._ranks.membership
        assert membership is not None
        waiting.begins = number
        try:
            async with Timeout(deadline.left()):
                while not self._may_send(number):
                    await self._communicator.losses.views()
        except TimeoutError:
            who = ", ".join(map(self._ranks.who, membership.awaited)) or "no rank in particular"
            raise TransferTimeout(
                f"step {number} could not begin within {deadline.seconds:g} s: a rank comes back, and not all have agreed on "
                f"when; not heard of: {who}", ranks=membership.awaited,
                hint="nothing was sent: dispatch again, or give the missing rank up with evict()",
            ) from None  # fmt: skip
        finally:
            waiting.begins = None

    def _check(self, x: Array, topk_idx: Array, topk_weights: Array, x_scales: Array | None) -> Any:
        """All arguments as memory. Raises `TypeError` or `ValueError` with the name and the value."""
        shape = self._ranks.shape
        kind = tensors.kind_of(x, "x")
        if kind.torch is not None:
            for name, array in (("x", x), ("topk_weights", topk_weights), ("x_scales", x_scales)):
                tensors.check_no_grad(name, array)
        tensors.check("x", x, (None, shape.hidden), shape.dtype)
        n = int(x.shape[0])
        if n > shape.max_tokens:
            raise ValueError(f"x has {n} tokens, and max_tokens is {shape.max_tokens}")
        idx = tensors.integers("topk_idx", topk_idx)
        if idx.shape[0] != n or not 1 <= idx.shape[1] <= shape.topk:
            raise ValueError(f"topk_idx must have the shape ({n}, up to {shape.topk}), not {idx.shape}")
        if idx.size and (idx.min() < -1 or idx.max() >= shape.num_experts):
            t, k = np.argwhere((idx < -1) | (idx >= shape.num_experts))[0]
            raise ValueError(f"topk_idx[{t}, {k}] is {idx[t, k]}; experts are 0 to {shape.num_experts - 1}, and -1 is none")
        weights = tensors.weights("topk_weights", topk_weights)
        if weights.shape != idx.shape:
            raise ValueError(f"topk_weights must have the shape of topk_idx, {idx.shape}, not {weights.shape}")
        memory, stride = tensors.rows("x", x, gpu=self._communicator.gpu)
        scale_rows, scales = None, 0
        if x_scales is not None:
            tensors.check("x_scales", x_scales, (n, None), "float32")
            scales = int(x_scales.shape[1])
            if not 1 <= scales <= shape.scales:
                raise ValueError(f"x_scales has {scales} scales for each token; the all-to-all was made for up to {shape.scales}")
            scale_rows = tensors.rows("x_scales", x_scales, gpu=self._communicator.gpu)
        return idx, weights, memory, stride, scale_rows, scales, kind

    # ---- combine ----

    async def combine(self, y: Array, handle: Handle, *, out: Array = None, timeout: float | None = None) -> Array:
        """Send the results of a step back, and sum those of this rank's tokens: over k,
        `topk_weights[t, k] * result[t, k]`.

        `y`: [rows of the dispatch, hidden] of `combine_dtype`, in the order of `Dispatched.x`; not to be
        changed until this returns (`Dispatched.y`: until a later dispatch gives it). Returns [tokens,
        hidden]: `out`, where that is given (fresh memory costs the system more than the sums of many tokens).
        The sum is in fp32, choice after choice, so it has the same bits whichever rank was faster. Choices
        whose expert is on a lost rank are left out and marked in `handle.dropped`. `timeout`: seconds (None:
        that of the all-to-all).

        Raises `TypeError` or `ValueError` (also where `out` overlaps `y` or the memory of the all-to-all),
        `RegistrationError`, after which the right ones may be given; `TransferTimeout` (see `in_flight`),
        `EvictedError`.
        """
        deadline = self._deadline(timeout)
        half = await self.combine_send(y, handle, out=out, timeout=timeout)
        return await half.receive_until(deadline)

    async def combine_send(
        self, y: Array, handle: Handle, *, out: Array = None, timeout: float | None = None
    ) -> CombineHalf:
        """The first half of `combine`, with its arguments `y`, `handle`, `out` and `timeout` (seconds of the
        second half): `y` may not be changed, nor `out` be read, until the second is over (of `Dispatched.y`
        see there)."""
        if not belongs(handle, self._ranks):
            raise TypeError(f"the handle of a dispatch of this all-to-all is needed, not {quote(handle)}")
        return await send_back(handle, y, out, self._timeout if timeout is None else timeout)

    # ---- ranks ----

    @property
    def rank(self) -> int:
        """The number of this rank within its group."""
        return self._ranks.rank

    @property
    def group_size(self) -> int:
        """Number of ranks, lost ones included."""
        return self._ranks.shape.ranks

    @property
    def mask(self) -> tuple[bool, ...]:
        """Which ranks take part, as far as this one knows. This rank does not once it has left or was given
        up."""
        ranks = self._ranks
        gone = () if ranks.membership is None else ranks.membership.gone
        return tuple(r not in gone and (r != ranks.rank or ranks.over is None) for r in range(self.group_size))

    @property
    def lost(self) -> dict[int, Exception]:
        """Why each rank that is missing is."""
        return dict(self._communicator.losses.reasons)

    @property
    def next_step(self) -> int:
        """The number of the step that the next dispatch will be; where this rank came back, the one that it
        begins with."""
        return self._ranks.next_step

    @property
    def in_flight(self) -> tuple[Handle, ...]:
        """Steps that were begun and are not over."""
        return tuple(self._handle(number) for number in sorted(self._ranks.handles) if number in self._ranks.steps)

    def _handle(self, number: int) -> Handle:
        """The handle of a step in flight, which this object has made."""
        handle = self._ranks.handles[number]
        assert isinstance(handle, Handle)
        return handle

    def resume(self, handle: Handle) -> DispatchHalf | CombineHalf:
        """The half of the step of `handle` that was cut off by a deadline or a cancellation, to
        `receive()`."""
        return half_of(handle, self._timeout)

    def evict(self, rank: int, reason: str = "evicted") -> None:
        """Give `rank` up on all ranks, as if it were lost: one that hangs, say. All are told the `reason`. It
        may come back by a new AllToAll."""
        if type(rank) is not int or not 0 <= rank < self.group_size or rank == self.rank:
            raise ValueError(f"another rank of {self.group_size} is evicted, not {quote(rank)}")
        self._communicator.losses.evict(rank, reason)

    def __repr__(self) -> str:
        lost = sum(not here for here in self.mask)
        return f"{self._ranks!r}"[:-1] + (f", {lost} lost>" if lost else ">")


def _nothing(shape: Shape) -> Any:
    """Routing, weights, tokens and kind of a rank whose own arguments were refused."""
    none = (0, shape.topk)
    return np.empty(none, np.int64), np.empty(none, np.float32), np.empty(0, np.uint8), tensors.Kind(None)


