"""A decode rank that could not ask for a request says so: the other ranks of its instance are told and do not
wait for it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from aiotransfer.errors import said
from aiotransfer.kv.protocol import messages
from aiotransfer.kv.roles.dispatcher import numbers

if TYPE_CHECKING:
    from aiotransfer.kv.decode.pool import Settings
    from aiotransfer.kv.roles.role import Role


def say_absent(role: Role, settings: Settings, peers: tuple[Any, ...], id: Any, error: BaseException) -> None:
    """Tell prefill ranks that this rank of a named instance did not ask for a request, because of `error`.
    Raises nothing."""
    if not settings.named or not isinstance(id, str) or not 0 < len(id) <= messages.MOST_ID:
        return
    for peer in peers:
        with contextlib.suppress(Exception):  # arguments may be anything; what is wrong with them is raised already
            role.dispatcher.check(peer)
            absent = messages.Absent(next(numbers), id, role.layout.to_dict(), said(error), settings.named)
            role.dispatcher.tell(peer, absent, settings.revoke_timeout)
