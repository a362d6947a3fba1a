"""What belongs to one event loop of one process: it is never copied to another."""

from __future__ import annotations

from typing import ClassVar, NoReturn


class Unpicklable:
    """A base of classes whose objects have native memory, descriptors or a loop behind them.

    `pickle`, `copy` and `multiprocessing` get a `TypeError` that says what may be sent instead (`_instead`).
    """

    __slots__ = ()
    _instead: ClassVar[str] = "make it in the process that uses it"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        kind = type(self).__name__
        raise TypeError(f"{kind} cannot be pickled or copied, it belongs to one event loop of one process: {self._instead}")
