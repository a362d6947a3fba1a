"""A simulated world for whole engines: network, control connections and clock in one process, replayed byte
for byte by a seed.

    def test_it_survives_reordering():
        async def scenario(net: Fabric) -> None:
            left, right = await net.open_engine(), await net.open_engine()
            peer = await left.connect(right.address)
            ...

        fabric(seed=7, delay=(1e-6, 1e-3), split=0.2).run(scenario)

Time is virtual: when nothing can run at once, the clock jumps to the next delivery or timer, so timeouts of
minutes pass in microseconds and no test waits. A scenario in which nothing can ever happen again raises
`Deadlock` instead of hanging. Within one seed everything is decided in the same order, so a failure is
repeated by its seed alone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from aiotransfer.control.network import Factory, Server
from aiotransfer.engine.engine import Engine
from aiotransfer.engine.open import open_engine
from aiotransfer.engine.runtime.platform import Platform
from aiotransfer.errors import BusyError
from aiotransfer.model.address import Address
from aiotransfer.providers import native
from aiotransfer.providers.lane import Lane
from aiotransfer.quote import quote

T = TypeVar("T")
HOST = "127.0.0.1"
FIRST_PORT = 10_000
KEY = b"the key of a simulated fabric"
BUSY_TURNS, BUSY_SECONDS = 100, 1e-6
_SECOND = 1_000_000_000


class Deadlock(AssertionError):
    """Nothing is under way and no timer runs: a task that waits would wait for ever."""


class _Selector(selectors.DefaultSelector):
    """Looks at descriptors without waiting; where it would wait, the virtual clock moves instead."""

    def __init__(self, net: Fabric) -> None:
        super().__init__()
        self._net = net
        self._busy_turns = 0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        busy = self._net._turn() or timeout == 0
        self._busy_turns = self._busy_turns + 1 if busy else 0
        if self._busy_turns > BUSY_TURNS:  # a task that is always ready (a cancel on every turn) must not stop the clock
            self._net._pass_time(BUSY_SECONDS)
        if busy:
            return ready  # what was done now may have made callbacks ready: no time passes before them
        while not ready:
            if not self._net._pass_time(timeout):
                break
            ready = super().select(0)
            if timeout is not None:
                break
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on the clock of a fabric."""

    def __init__(self, net: Fabric) -> None:
        self._net = net
        super().__init__(_Selector(net))

    def time(self) -> float:
        """The time of the virtual clock, in seconds."""
        return self._net.now


class _Pipe(asyncio.Transport):
    """One end of a control connection in memory."""

    def __init__(self, net: Fabric, wire: _Wire, protocol: asyncio.Protocol, here: Address, there: Address) -> None:
        super().__init__({"sockname": (here.host, here.port), "peername": (there.host, there.port)})
        self._net = net
        self._wire = wire
        self._protocol = protocol
        self._free_at = 0.0  # bytes keep their order
        self._closing = False
        self._over = False
        self.other: _Pipe

    def write(self, data: Any) -> None:
        if not self._closing and data:
            self._later(self.other._received, bytes(data))

    def _later(self, act: Callable[..., None], *arguments: Any) -> None:
        if self._wire.backlog is not None:  # a stopped process sends nothing
            self._wire.backlog.append(lambda: self._later(act, *arguments))
            return
        loop = self._net.loop
        self._free_at = max(self._free_at + 1e-9, loop.time() + self._net._control_delay())
        loop.call_at(self._free_at, act, *arguments)

    def _received(self, data: bytes) -> None:
        if self._wire.backlog is not None:  # nor does it read
            self._wire.backlog.append(lambda: self._received(data))
        elif not self._over:
            self._protocol.data_received(data)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._later(self.other._lost, None)
            self._net.loop.call_soon(self._lost, None)

    def abort(self) -> None:
        self.close()

    def _lost(self, error: BaseException | None) -> None:
        if self._wire.backlog is not None:
            self._wire.backlog.append(lambda: self._lost(error))
        elif not self._over:
            self._over = self._closing = True
            self._protocol.connection_lost(error)  # type: ignore[arg-type]

    def cut(self, error: OSError | None = None) -> None:
        """The other side has gone without a word. With an error: it may be there, but nothing reaches it by
        this connection."""
        self._closing = True
        self._net.loop.call_soon(self._lost, error or ConnectionResetError("connection reset by peer"))

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class _Wire:
    """The control network as one engine sees it (see `control.network.Network`); also what it listens
    with."""

    def __init__(self, net: Fabric, hosts: list[str]) -> None:
        self._net = net
        self._hosts = hosts  # beside the one that all engines share
        self.addresses: list[Address] = []
        self.factory: Factory
        self.pipes: list[_Pipe] = []
        self.backlog: list[Callable[[], None]] | None = None  # while its engine is held: what would have happened

    async def listen(self, address: Address, factory: Factory) -> tuple[Server, Address]:
        if address.port == 0:
            address = Address(address.host, self._net._fresh_address().port)
        if address in self._net._listening:
            raise OSError(98, f"{address} is in use")
        self._net._listening[address] = self
        self.addresses.append(address)
        self.factory = factory
        return self, address

    async def further(self, address: Address, hosts: Iterable[str]) -> list[str]:
        return self._hosts

    async def resolve(self, address: Address) -> list[Address]:
        return [address]

    async def connect(self, address: Address, factory: Factory) -> None:
        await asyncio.sleep(self._net._control_delay())
        server = self._net._listening.get(address)
        if address in self._net._unreachable:
            raise OSError(113, "No route to host")
        if server is None:
            raise ConnectionRefusedError(111, f"no engine listens on {address}")
        here, there, place = factory(), server.factory(), self._net._fresh_address()
        near, far = _Pipe(self._net, self, here, place, address), _Pipe(self._net, server, there, address, place)
        near.other, far.other = far, near
        for wire, pipe in ((self, near), (server, far)):
            wire.pipes = [old for old in wire.pipes if not old._over] + [pipe]
        there.connection_made(far)
        here.connection_made(near)

    def close(self) -> None:
        for address in self.addresses:
            if self._net._listening.get(address) is self:
                del self._net._listening[address]

    def cut(self) -> None:
        """End every connection without a goodbye, and refuse new ones."""
        self.close()
        for pipe in self.pipes:
            pipe.cut()
            pipe.other.cut()


class Fabric:
    """A network with engines on it. Made by `fabric`; one scenario at a time."""

    def __init__(self, seed: int, delay: tuple[float, float], refuse: float, split: float) -> None:
        native.require()
        self.seed = seed
        self.random = random.Random(seed)
        self._faults: dict[str, Any] = {"delay": delay, "refuse": refuse, "split": split}
        self._pointer: Any = native.lib.at_net_new(self._settings())
        if self._pointer == native.ffi.NULL:
            raise BusyError("no memory for the simulator")
        self._counts: Any = native.ffi.new("at_net_counts *")
        self._listening: dict[Address, _Wire] = {}
        self._unreachable: set[Address] = set()
        self._wires: dict[Engine, _Wire] = {}
        self._next_port = FIRST_PORT
        self.engines: list[Engine] = []
        self.turns = 0  # of the loop so far; every delivery and every timer is a turn of its own
        self._at_turn: dict[int, Callable[[], object]] = {}
        self.loop = VirtualLoop(self)

    def _settings(self) -> Any:
        low, high = (round(seconds * _SECOND) for seconds in self._faults["delay"])
        if not 0 <= low <= high:
            raise ValueError(f"delay is (least, most) in seconds, not {quote(self._faults['delay'])}")
        settings = native.ffi.new("at_net_config *")
        settings.seed, settings.delay_min, settings.delay_max = self.seed, low, high
        for name in ("refuse", "split"):
            if not 0 <= self._faults[name] <= 1:
                raise ValueError(f"{name} is a chance between 0 and 1, not {quote(self._faults[name])}")
            setattr(settings, name, round(self._faults[name] * 1000))
        return settings

    # ---- running ----

    def run(self, scenario: Callable[[Fabric], Coroutine[Any, Any, T]]) -> T:
        """Run a whole `scenario` on the virtual clock, then close every engine and the fabric."""
        with self:
            return self.call(scenario(self))

    def call(self, work: Awaitable[T]) -> T:
        """Run one coroutine, `work`, on the virtual clock, for tests that drive a fabric step by step."""
        task = asyncio.ensure_future(work, loop=self.loop)
        try:
            return self.loop.run_until_complete(task)
        except Deadlock:
            task.cancel()
            with suppress(asyncio.CancelledError):
                self.loop.run_until_complete(task)
            raise

    @property
    def now(self) -> float:
        """Virtual seconds since the start."""
        native.lib.at_net_counts_get(self._pointer, self._counts)
        return int(self._counts.now) / _SECOND

    def _pass_time(self, timeout: float | None) -> bool:
        """Move the clock to the next delivery or by `timeout`, whichever comes first. False: there is nothing
        to wait for."""
        due = int(native.lib.at_net_next(self._pointer))
        if timeout is None and due < 0:
            waiting = [_where(task) for task in asyncio.all_tasks(self.loop)]
            raise Deadlock(f"seed {self.seed}: nothing can happen any more; {len(waiting)} tasks wait: {', '.join(waiting)}")
        left = None if timeout is None else int(timeout * _SECOND) + 1
        step = due if left is None else left if due < 0 else min(due, left)
        native.lib.at_net_advance(self._pointer, step)
        return True

    def at_turn(self, turns: int, act: Callable[[], object]) -> None:
        """Call `act` in `turns` turns of the loop from now: a test that does this for all of them misses no
        interleaving."""
        self._at_turn[self.turns + 1 + turns] = act

    def _turn(self) -> bool:
        self.turns += 1
        act = self._at_turn.pop(self.turns, None)
        if act is not None:
            act()
        return act is not None

    def _control_delay(self) -> float:
        return self.random.uniform(*self._faults["delay"])

    # ---- engines ----

    async def open_engine(self, *, ways: int = 1, **options: Any) -> Engine:
        """An engine on this fabric; `options` are those of `open_engine`, but for providers and key. `ways`:
        how many NICs its control connections may run by."""
        wire = _Wire(self, [f"10.0.{way}.{len(self.engines) + 1}" for way in range(1, ways)])
        platform = Platform(entropy=self.random.randbytes, network=wire, threads=False, simulator=self)
        engine: Engine = await open_engine(providers="loopback", key=KEY, _platform=platform, **{"name": "", **options})
        self.engines.append(engine)
        self._wires[engine] = wire
        return engine

    def _fresh_address(self) -> Address:
        self._next_port += 1
        return Address(HOST, self._next_port)

    # the network beneath loopback (see `providers.loopback`)

    def join(self, lane: Lane) -> None:
        """Take `lane` into the network; the provider calls this."""
        status = native.lib.at_net_join(self._pointer, lane.pointer)
        if status != 0:
            raise BusyError(f"cannot join the fabric: {native.text(status)}")

    def leave(self) -> None:
        """For the provider; the lane itself leaves when it is freed."""

    # ---- faults ----

    @contextmanager
    def faults(self, **changes: Any) -> Iterator[None]:
        """Other `delay`, `refuse` or `split` meanwhile: the `changes`."""
        if unknown := set(changes) - set(self._faults):
            raise TypeError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(self._faults)}")
        before, self._faults = self._faults, {**self._faults, **changes}
        try:
            native.lib.at_net_configure(self._pointer, self._settings())
            yield
        finally:
            self._faults = before
            native.lib.at_net_configure(self._pointer, self._settings())

    @contextmanager
    def held(self, engine: Engine) -> Iterator[None]:
        """Inside the block deliver nothing of or for `engine`, as if its process were stopped."""
        self.hold(engine, True)
        try:
            yield
        finally:
            self.hold(engine, False)

    def hold(self, engine: Engine, on: bool) -> None:
        """Begin (`on`) or end what `held` does to `engine`."""
        native.lib.at_net_hold(self._pointer, engine.incarnation, on)
        wire = self._wires[engine]
        if on:
            wire.backlog = [] if wire.backlog is None else wire.backlog
        else:
            waiting, wire.backlog = wire.backlog or [], None
            for act in waiting:
                act()

    def cut(self, source: Engine, target: Engine) -> int:
        """Break the connection of `source` and `target`: what is under way has landed wholly, by half or not
        at all, and fails. How many requests."""
        return int(native.lib.at_net_break(self._pointer, source.incarnation, target.incarnation))

    def cut_control(self, one: Engine, other: Engine) -> int:
        """Break the control connections between `one` and `other`, as when a NIC dies: what is under way is
        lost. How many there were."""
        near, far = self._wires[one], self._wires[other]
        pipes = [pipe for pipe in near.pipes if pipe.other in far.pipes and not pipe._closing]
        for pipe in pipes:
            for end in (pipe, pipe.other):
                end.cut(TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
        return len(pipes)

    def control_ways(self, engine: Engine) -> list[Address]:
        """The addresses at which `engine` listens for control connections."""
        return list(self._wires[engine].addresses)

    def reach(self, address: Address, on: bool) -> None:
        """Whether control connections can be made to `address`: from now on they can (`on`), or cannot."""
        (self._unreachable.discard if on else self._unreachable.add)(address)

    def kill(self, engine: Engine) -> None:
        """The process of `engine` ends without a word: its peers find out as they would from the operating
        system."""
        native.lib.at_net_kill(self._pointer, engine.incarnation)
        self._wires[engine].backlog = None
        self._wires[engine].cut()

    def counts(self) -> dict[str, int]:
        """How often each thing has happened so far; `now` in virtual ns; `trace`, a hash of every
        decision."""
        out = native.ffi.new("at_net_counts *")
        native.lib.at_net_counts_get(self._pointer, out)
        return {name: int(getattr(out, name)) for name, _ in native.ffi.typeof("at_net_counts").fields}

    # ---- the end ----

    def close(self) -> None:
        """Close every engine and the loop. Twice is silent."""
        if self._pointer is None:
            return
        try:
            for engine in self.engines:
                self.call(engine.aclose())
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            if left:
                self.call(asyncio.wait(left))
            self.call(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()
            native.lib.at_net_free(self._pointer)
            self._pointer = None

    def __enter__(self) -> Fabric:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fabric(
    seed: int = 0, *, delay: tuple[float, float] = (1e-6, 1e-4), refuse: float = 0.0, split: float = 0.0
) -> Fabric:
    """A simulated fabric; all chances follow from `seed`. `delay`: least and most seconds from post to
    delivery (a range reorders); `refuse`, `split`: the chance that a post is refused for now, and that a
    write lands in two halves."""
    return Fabric(seed, delay, refuse, split)


def _where(task: asyncio.Task[Any]) -> str:
    """The task's name, and which line of which coroutine it is at."""
    at = [f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" for frame in task.get_stack(limit=1)]
    return " ".join([task.get_name(), getattr(task.get_coro(), "__qualname__", ""), *at])
