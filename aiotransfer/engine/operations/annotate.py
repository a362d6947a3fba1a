"""What was being done, as a note on the error it ended in (`add_note`): tracebacks and logs show it beneath
the message."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from aiotransfer.errors import TransferError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiotransfer.engine.peers.peer import Peer

E = TypeVar("E", bound=BaseException)
Label = tuple[str, int]  # what kind of operation, with which immediate (-1: none)
_DOING = {
    "write": "writing {n:,} bytes to {who}",
    "pages": "writing {n:,} bytes in pages to {who}",
    "read": "reading {n:,} bytes from {who}",
    "read pages": "reading {n:,} bytes in pages from {who}",
    "scatter": "scattering {n:,} bytes to {who}",
    "signal": "signalling {who}",
    "barrier": "signalling a barrier to {who}",
}


def annotated(error: E, label: Label, nbytes: int, peers: Sequence[Peer], landed: int = 0) -> E:
    """The error, with a note of the operation that ended in it."""
    kind, imm = label
    who = ", ".join(map(str, peers[:3])) + (f" and {len(peers) - 3} more" if len(peers) > 3 else "")
    text = "while " + _DOING[kind].format(n=nbytes, who=who)
    if imm >= 0:
        text += f" with immediate {imm}"
    if landed:
        text += f"; {landed:,} bytes had landed"
    error.add_note(text)
    return error


def at_target(index: int, error: Exception) -> Exception:
    """The error, naming the target of a scatter that it is about."""
    if isinstance(error, TransferError):
        error.message = f"target {index}: {error.message}"
    return error
