"""The prefill side of an engine that steps in a thread without a loop.

    with kv.PrefillerThread(thread, thread.run(make_prefiller(thread.engine))) as prefiller:
        prefiller.start("request 7", page_ids)       # before or after it was asked for
        ...                                          # the model runs; for each layer:
        prefiller.layer_ready("request 7", i)
        prefiller.finish("request 7", tail)
        ...                                          # after later steps:
        for one in prefiller.take_finished():
            ...                                      # one.id: its pages may be used again

What a decode rank asks for and what the engine has started meet by name, whichever comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from aiotransfer.aio.timeouts import Timeout
from aiotransfer.engine.runtime.runtime import seconds
from aiotransfer.errors import ClosedError, TransferTimeout, said
from aiotransfer.kv.prefill.prefiller import Prefiller
from aiotransfer.kv.roles.arguments import whole
from aiotransfer.kv.threads.requests import Ends, RequestsThread, Work, checked_id, copied
from aiotransfer.quote import quote

if TYPE_CHECKING:
    from aiotransfer.engine.loop_thread import EngineThread
    from aiotransfer.kv.prefill.request import PrefillRequest


class Asked(NamedTuple):
    """A request of a decode instance that the engine has not started: `id` is the name that
    `PrefillerThread.start` is given."""

    id: str
    instance: str
    tokens: int
    skip_tokens: int
    priority: int
    data: bytes


class Send(Work):
    """A request that is sent from pages here."""

    __slots__ = ("asked", "complete", "ends", "page_ids", "ready", "request", "tail")

    def __init__(self, id: str, page_ids: Any, ends: Ends) -> None:
        super().__init__(id)
        self.page_ids = page_ids
        self.ends = ends
        self.asked = False
        self.ready: dict[int, float] = {}  # until it is asked for: how many tokens of which layer are ready
        self.request: PrefillRequest | None = None
        self.complete = asyncio.Event()  # the model has run: set on the loop
        self.tail: Any = b""

    def forget(self) -> None:
        """See `Work`."""
        super().forget()
        self.request = None


class PrefillerThread(RequestsThread[Send]):
    """A `prefiller` for an engine that steps in a thread without a loop. It accepts all its requests, and
    closes it.

    `thread`: the `EngineThread` whose engine the prefiller belongs to; the prefiller is made there
    (`thread.run`). `name`: which started request a decode rank asks for, by the `PrefillRequest`; called on
    the loop. None: the one with the same id. `grace`: seconds that a request waits until the engine starts
    it, after which the decode side is told; None: as long as the decode side waits. Every method but `close`
    returns at once, also while the loop is blocked, and may be called from any thread. At most
    `prefiller.most_requests` requests at a time, finished ones that were not taken included.

    Raises `TypeError`, `ValueError`, `ClosedError`.
    """

    def __init__(
        self, thread: EngineThread, prefiller: Prefiller, *, name: Callable[[PrefillRequest], str] | None = None,
        grace: float | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(prefiller, Prefiller):
            raise TypeError(f"prefiller must be a Prefiller, not {quote(prefiller)}")
        if name is not None and not callable(name):
            raise TypeError(f"name must be a function, not {quote(name)}")
        super().__init__(thread, prefiller, prefiller.most_requests)
        self.prefiller = prefiller
        self._name = name
        self._grace = seconds(grace, math.inf)
        self._new: dict[PrefillRequest, Asked] = {}  # not taken by take_requests(); guarded by the lock
        self._waiting: defaultdict[str, dict[PrefillRequest, None]] = defaultdict(dict)  # not started; the loop's alone
        self._unasked: dict[str, asyncio.Future[None]] = {}  # started and not asked for; the loop's alone
        self._given_up: dict[str, None] = {}  # ended here before they were asked for, the last ones; guarded by the lock
        thread.submit(self._accept())

    # ---- what the engine's steps call ----

    def start(self, id: str, page_ids: Any, *, timeout: float | None = None) -> None:
        """The cache of request `id` is, or will be, in the pages `page_ids` (copied now). Returns at once;
        from any thread.

        It is sent when it is asked for, and as far as it is ready: `layer_ready`, `finish`. `timeout`:
        seconds from now in which it must be asked for (None: the engine's); after that the deadline of the
        decode side counts.

        Raises `TypeError` or `ValueError` (also for an id that has been started and not been taken),
        `BusyError`, `ClosedError`. Pages that do not hold what is asked for are in the `error` of the
        finished request.
        """
        ends = Ends(timeout, self._thread.engine.timeout)
        self._begin(Send(checked_id(id), copied(page_ids), ends), self._send)

    def layer_ready(self, id: str, layer: int, *, upto: int | None = None) -> None:
        """The cache of `layer` of request `id` is in its pages for all tokens before `upto` (None: for all).

        As `PrefillRequest.layer_ready`, and before the request is asked for, too. Returns at once; call it
        from any thread. When the request has ended it changes nothing. Raises `ValueError` (an id that is not
        started, or was taken), `IndexError`, `TypeError`.
        """
        layer, most = whole("layer", layer), math.inf if upto is None else whole("upto", upto)
        with self._entered():
            send = self._of(id)
            if send is None:
                return
            request = send.request
            if request is None:
                send.ready[layer] = max(most, send.ready.get(layer, 0))
                return
        if layer not in request.layers:
            raise IndexError(f"layer {layer} is not one of this rank's: {request.layers}")
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the request over
            _say(request, layer, most)

    def finish(self, id: str, tail: Any = b"") -> None:
        """The model has run for request `id`: all its layers are ready, those included that `layer_ready` did
        not name.

        `tail` (bytes or an array, as with `PrefillRequest.finish`) is sent last; do not change it before the
        request is over. Returns at once; call it from any thread. When the request has ended it changes
        nothing. Raises `ValueError` (an id that is not started, or was taken).
        """
        with self._entered():
            send = self._of(id)
            if send is None or send.future is None:
                return
            send.tail = tail
        with contextlib.suppress(ClosedError):  # the thread has ended, and so has the request
            self._thread.call_soon(send.complete.set)

    def take_requests(self) -> list[Asked]:
        """What decode ranks have asked for since the last call, and the engine has not started; ended ones
        are left out.

        For engines that learn here what they are to compute. Returns at once; call it from any thread. In a
        forked child: `ClosedError`.
        """
        with self._entered():
            taken, self._new = self._new, {}
        return list(taken.values())

    def cancel(self, ids: str | Iterable[str]) -> None:
        """Give these requests up, and tell the decode side; `ids`: one, or several. Returns at once; call it
        from any thread.

        `take_finished` names each that was started when nothing of it is read any more: with
        `RequestCancelled`, or as it ended just before. One that was asked for and not started is refused, as
        is one that is asked for later. Other ids are left alone.
        """
        ids = [ids] if isinstance(ids, str) else list(ids)
        self._cancel(ids)
        with contextlib.suppress(ClosedError):  # the thread has ended, and so has all that was asked for
            self._thread.call_soon(self._refuse, ids)

    def _of(self, id: str) -> Send | None:
        """A request that was started, None when it has ended. Called with the lock."""
        send = self._works.get(id)
        if send is None and id not in self._finished:
            raise ValueError(f"request {quote(id)} is not under way")
        return send

    # ---- on the loop ----

    async def _accept(self) -> None:
        minders: set[asyncio.Task[None]] = set()
        with contextlib.suppress(ClosedError):
            while True:
                request = await self.prefiller.accept()
                try:
                    id = request.id if self._name is None else checked_id(self._name(request))
                except Exception as error:  # of the application's function: this request ends, and others go on
                    request.fail(f"it has no name here: {said(error)}")
                    continue
                self._arrived(id, request)
                minder = asyncio.get_running_loop().create_task(self._mind(id, request))
                minders.add(minder)
                minder.add_done_callback(minders.discard)

    def _arrived(self, id: str, request: PrefillRequest) -> None:
        with self._lock:
            given_up = self._given_up.pop(id, 0) is None
        if given_up:
            request.fail("the prefill side gave it up before it was asked for")
            return
        self._waiting[id][request] = None
        wanted = self._unasked.get(id)
        if wanted is None:
            asked = Asked(id, request.instance, request.tokens, request.skip_tokens, request.priority, request.data)
            with self._lock:
                self._new[request] = asked
        elif not wanted.done():  # else its wait is ending, and looks here once more
            wanted.set_result(None)

    async def _mind(self, id: str, request: PrefillRequest) -> None:
        """Forget a request that ends, or waits too long, before the engine starts it."""
        try:
            await request.ended_there(timeout=self._grace)
        except TransferTimeout:
            if request in self._waiting.get(id, ()):
                request.fail(f"no request {id!r} was started here within {self._grace:g} s")
        self._waits_no_more(id, request)

    def _waits_no_more(self, id: str, request: PrefillRequest) -> None:
        """A request is started, or over."""
        waiting = self._waiting.get(id, {})
        waiting.pop(request, None)
        if not waiting:
            self._waiting.pop(id, None)
        with self._lock:
            self._new.pop(request, None)

    def _refuse(self, ids: list[str]) -> None:
        for id in ids:
            for request in list(self._waiting.get(id, ())):
                request.fail("it was cancelled on the prefill side")

    async def _send(self, send: Send) -> None:
        request = await self._request_of(send)
        async with request:
            try:
                request.use(send.page_ids)
                with self._lock:
                    send.request = request  # from now on `layer_ready` speaks to it
                for layer, most in send.ready.items():
                    _say(request, layer, most)
                if await self._complete(send, request):
                    for layer in request.layers:
                        request.layer_ready(layer)
                await request.finish(send.tail)  # raises what ended the request, where it is over
            except asyncio.CancelledError:
                request.fail("it was cancelled on the prefill side")
                raise

    async def _request_of(self, send: Send) -> PrefillRequest:
        """The oldest request of that name that is not over; waits for one."""
        with self._lock:
            self._given_up.pop(send.id, None)
        in_time = True
        while True:
            for request in self._waiting.get(send.id, ()):
                if not request.cancelled:
                    send.asked = True
                    self._waits_no_more(send.id, request)
                    return request
            if not in_time:
                raise TransferTimeout(f"request {send.id!r} was not asked for within {send.ends.seconds:g} s")
            self._unasked[send.id] = wanted = asyncio.get_running_loop().create_future()
            try:
                async with Timeout(send.ends.left()):
                    await wanted
            except TimeoutError:
                in_time = False  # it may have come at this moment
            finally:
                del self._unasked[send.id]

    def _let_go(self, work: Send) -> None:
        if not work.asked:
            self._given_up[work.id] = None
            if len(self._given_up) > self._most:
                del self._given_up[next(iter(self._given_up))]
        super()._let_go(work)

    async def _complete(self, send: Send, request: PrefillRequest) -> bool:
        """Wait until the model has run, or the request is over; whether the model has run."""
        waited = [asyncio.ensure_future(send.complete.wait()), asyncio.ensure_future(request.ended_there())]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waited:
                each.cancel()
        return send.complete.is_set()


def _say(request: PrefillRequest, layer: int, most: float) -> None:
    request.layer_ready(layer, upto=None if most >= request.tokens else int(most))
