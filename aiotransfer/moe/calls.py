"""Calls whose arguments do not fit the signature: Python refuses them before our code runs."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from aiotransfer.moe.alltoall import AllToAll

P = ParamSpec("P")
R = TypeVar("R")
Call = Callable[Concatenate["AllToAll", P], Coroutine[Any, Any, R]]
Refuse = Callable[["AllToAll", TypeError], Awaitable[object]]


def told(refuse: Refuse) -> Callable[[Call[P, R]], Call[P, R]]:
    """A coroutine method that begins a step. Where an argument is missing or unknown, `refuse` tells the other ranks and raises
    the `TypeError`: otherwise they would make the step, and this rank would take the results of it for those of its next one."""

    def decorate(method: Call[P, R]) -> Call[P, R]:
        @functools.wraps(method)
        async def call(a2a: AllToAll, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                body = method(a2a, *args, **kwargs)  # only binds the arguments: the body begins when it is awaited
            except TypeError as error:
                await refuse(a2a, error)
                raise
            return await body

        return call

    return decorate
