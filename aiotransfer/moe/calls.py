"""Calls whose arguments do not fit the signature: Python refuses them before our code runs."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Caller = TypeVar("Caller")  # the all-to-all
Call = Callable[Concatenate[Caller, P], Coroutine[Any, Any, R]]


def told(refuse: Callable[[Caller, TypeError], Awaitable[object]]) -> Callable[[Call[Caller, P, R]], Call[Caller, P, R]]:
    """A coroutine method that begins a step. Where an argument is missing or unknown, `refuse` tells the
    other ranks and raises the `TypeError`: otherwise they would make the step, and this rank would take the
    results of it for those of its next one."""

    def decorate(method: Call[Caller, P, R]) -> Call[Caller, P, R]:
        @functools.wraps(method)
        async def call(a2a: Caller, /, *args: P.args, **kwargs: P.kwargs) -> R:
            try:
                body = method(a2a, *args, **kwargs)  # only binds the arguments: the body begins when it is awaited
            except TypeError as error:
                await refuse(a2a, error)
                raise
            return await body

        return call

    return decorate
