"""Which immediate a counter gets: one that was never used, one whose last use is proved to be over, or one of
the library's own.

The lane never forgets a value that was retired: what arrives late is a stray, and is counted as one. A value
that is used once therefore costs 16 to 32 bytes for as long as the engine lives. There are 2^32 values. A
component that opens a counter for each request gives the value back when nothing can arrive for it any more.
It has the proof: the value was only used under leases that have been revoked.

The library's own values are chosen at random, among those of which nothing has ever come: a peer can neither
count on them before they are told to the members that use them, nor know which they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from aiotransfer.engine.operations.refusals import lacking
from aiotransfer.engine.runtime.arguments import MOST_IMM, RESERVED, check_imm
from aiotransfer.engine.sync.counter import Counter
from aiotransfer.errors import BusyError
from aiotransfer.providers import native

if TYPE_CHECKING:
    from aiotransfer.engine.runtime.runtime import Runtime

TRIES = 1000  # at random, before nearly all of the library's own values are taken to be used


class Values:
    """The immediates of one engine, and the open counters of them. `entropy` gives so many random bytes."""

    def __init__(self, engine: Runtime, entropy: Callable[[int], bytes]) -> None:
        self._engine = engine
        self.entropy = entropy
        self.counters: dict[int, Counter] = {}  # by value
        self.counted: dict[int, Callable[[int], None]] = {}  # by record: gets what the lane has taken for a counter
        self._next = RESERVED - 1
        self._proved: dict[int, None] = {}  # may be used again, the oldest first

    def counter(self, imm: int | None) -> Counter:
        """See `Engine.counter`."""
        value = self.fresh() if imm is None else self.named(imm)
        known = self.counters.get(value)
        return known if known is not None else self._open(value)

    def own_counter(self) -> Counter:
        """A counter of one of the library's own values, used once and never again."""
        return self._open(self.own())

    def _open(self, value: int) -> Counter:
        record = native.lib.at_imm_open(self._engine._p, value)
        if record < 0:
            raise lacking(self._engine, record, f"immediate {value} cannot be counted") or BusyError(
                f"immediate {value} cannot be counted: {native.text(record)}",
                hint="open counters before many distinct values arrive, or raise Config.early_values",
            )
        counter = self.counters[value] = Counter(self._engine, value, record, self._drop)
        self.counted[record] = counter._arrived
        return counter

    def _drop(self, value: int, record: int) -> None:
        self.counters.pop(value, None)
        self.counted.pop(record, None)

    def fresh(self) -> int:
        """A value never used before in this engine. Raises `BusyError` when there is none left."""
        while self._next >= 0 and native.lib.at_imm_known(self._engine._p, self._next):
            self._next -= 1
        if self._next < 0:
            raise BusyError("every immediate of this engine has been used", hint="name one that was closed: counter(imm=)")
        self._next -= 1
        return self._next + 1

    def named(self, imm: object) -> int:
        """A value that the user names, and must keep free of late arrivals from then on. Raises `TypeError`
        or `ValueError`."""
        value = check_imm(imm)
        self._proved.pop(value, None)
        return value

    def own(self) -> int:
        """One of the library's own, used once and never again. Raises `BusyError` when nearly none is
        left."""
        for _ in range(TRIES):
            value = RESERVED + int.from_bytes(self.entropy(4)) % (MOST_IMM - RESERVED + 1)
            if not native.lib.at_imm_known(self._engine._p, value):
                return value
        raise BusyError("the reserved immediates of this engine are used up", hint="open a fresh engine")

    def again(self) -> Counter:
        """A counter at 0 for uses that end in `give_back`: of a value that was given back, or a fresh one.
        Raises `BusyError`."""
        if not self._proved:
            return self.counter(None)
        value = next(iter(self._proved))
        counter = self._open(value)
        del self._proved[value]
        return counter

    def give_back(self, counter: Counter) -> None:
        """Close a counter of `again`. The caller has proved that nothing can arrive for it any more: every
        lease is revoked."""
        if counter._closed:
            return
        counter.close()
        self._proved[counter.imm] = None
