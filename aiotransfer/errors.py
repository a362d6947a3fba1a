"""Everything this library raises.

::

    TransferError
    ├── ConfigurationError
    │   └── ProviderUnavailableError   .attempts: [(provider, reason)]
    ├── RegistrationError              memory refused
    ├── DescriptorError                bytes that are no descriptor
    ├── RegionError (also IndexError)  bounds, closed, access
    │   └── StaleRegionError           revoked, or of an old incarnation
    ├── BusyError                      a bound of ours
    ├── ClosedError                    our side closed it
    ├── BrokenError
    │   ├── PeerLostError
    │   ├── RailBrokenError
    │   └── RemoteAccessError
    ├── TransferTimeout (also TimeoutError)   .ranks, where ranks were waited for
    ├── ScatterError                   .results
    ├── QuarantineError                memory that must not be reused yet
    ├── RendezvousError                version, size, authentication
    └── InternalError                  an invariant failed: please report

Names say what the caller can do next, not which layer noticed. Every error carries `.peer`, `.rail`,
`.provider`, `.code` (native code and its text) and `.hint`; none holds a live object, so all of them pickle.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from copy import copy as copy_object
from typing import Any, TypeVar, cast

E = TypeVar("E", bound=BaseException)


class TransferError(Exception):
    """Base of all errors of this library. `str()` is the message and, where there is one, the hint."""

    def __init__(
        self,
        message: str,
        *,
        peer: str | None = None,
        rail: int | None = None,
        provider: str | None = None,
        code: tuple[int, str] | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.peer = peer
        self.rail = rail
        self.provider = provider
        self.code = code
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.__dict__.copy())


def again(error: E) -> E:
    """A copy of a stored error, to be raised once more. Raising the original would tie the frames of each
    catcher to it, and with them everything in those frames, for as long as it is stored."""
    if not isinstance(error, TransferError):
        return error.with_traceback(None)
    copy = _rebuild(type(error), error.message, error.__dict__.copy())
    copy.__cause__ = _without_frames(error.__cause__)
    if isinstance(copy, ScatterError):  # a caller that raises one of these ties its frames to it
        copy.results = [None if result is None else again(result) for result in copy.results]
    if hasattr(error, "__notes__"):
        copy.__notes__ = list(error.__notes__)  # what is noted on the copy is not said of the original
    return cast("E", copy)


def _without_frames(cause: BaseException | None) -> BaseException | None:
    """A cause as it is kept: what raised it had frames, too."""
    if cause is None or isinstance(cause, BaseExceptionGroup):
        return None
    if isinstance(cause, TransferError):
        return again(cause)
    try:
        return copy_object(cause)
    except Exception:  # a foreign class that cannot be copied: the message has to do
        return None


def _rebuild(cls: type[TransferError], message: str, state: dict[str, Any]) -> TransferError:
    error = cls.__new__(cls, message)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


def said(error: BaseException) -> str:
    """An error of any kind in words for the other side; never empty, and never an error itself."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:  # the class may be the application's
        return name
    return text if text and isinstance(error, TypeError | ValueError) else f"{name}: {text}" if text else name


class ConfigurationError(TransferError):
    """A setting that cannot work."""


class ProviderUnavailableError(ConfigurationError):
    """No provider can do it. `attempts` lists (provider, reason)."""

    def __init__(self, message: str, *, attempts: Sequence[tuple[str, str]] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.attempts = list(attempts)


class RegistrationError(TransferError):
    """Memory was refused: it cannot be registered, shared or mapped. The message says why, and the hint what
    would do."""


class DescriptorError(TransferError):
    """Bytes that are no descriptor."""


class RegionError(TransferError, IndexError):
    """A region was used outside its bounds, its access or its life."""


class StaleRegionError(RegionError):
    """The descriptor was revoked, or belongs to an older incarnation of its owner."""


class BusyError(TransferError):
    """A bound of ours is reached; try again when something has ended."""


class ClosedError(TransferError):
    """Our own side closed it."""


class BrokenError(TransferError):
    """The other side or the fabric broke it."""


class PeerLostError(BrokenError):
    """The peer died, stopped answering, or left."""


class RailBrokenError(BrokenError):
    """A rail failed and what it carried cannot be accounted for."""


class RemoteAccessError(BrokenError):
    """The far side refused the access."""


class TransferTimeout(TransferError, TimeoutError):
    """A deadline passed; nothing is known to be broken. `ranks`: which ranks were not heard of, where ranks
    were waited for."""

    def __init__(self, message: str, *, ranks: Sequence[int] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.ranks = tuple(ranks)


class ScatterError(TransferError):
    """Some targets of a scatter failed. `results` holds None or the error of each target, in order."""

    def __init__(self, message: str, *, results: Sequence[BaseException | None] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.results = list(results)


class QuarantineError(TransferError):
    """Memory that must not be reused yet: a peer or an operation may still access it."""


class RendezvousError(TransferError):
    """Two engines could not agree to talk: version, size or authentication."""


class InternalError(TransferError):
    """An invariant of this library failed: please report it."""


SHORTAGES = {
    errno.EMFILE: "this process has no descriptors left: raise `ulimit -n`, or close what is not needed",
    errno.ENFILE: "this machine has no descriptors left: raise the sysctl fs.file-max",
    errno.ENOMEM: "memory is short: free some, or raise the memory limit of this container",
    errno.ENOBUFS: "the kernel has no buffers left: free memory, or close connections that are not needed",
    errno.EAGAIN: "this process may have no more threads or locked memory: raise `ulimit -u` or `ulimit -l`",
}


def shortage(number: int | None, what: str, **fields: Any) -> BusyError | None:
    """What to raise when the operating system had nothing left to give (`number`: its errno); None when it
    was something else."""
    if number not in SHORTAGES:
        return None
    words = os.strerror(number)
    return BusyError(f"{what}: {words}", code=(number, words), hint=SHORTAGES[number], **fields)
