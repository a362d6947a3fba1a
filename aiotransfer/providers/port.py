"""The provider port: what the engine asks of a way to reach peers.

A provider sets paths up and binds remote memory; both need a conversation with the other side, which the
engine lends as a `Conversation` (questions over the authenticated control connection). After that the engine
talks to the lane alone, with every provider.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import msgspec

from aiotransfer.errors import BrokenError, RegistrationError
from aiotransfer.model.descriptor import Grant
from aiotransfer.model.offer import ProviderOffer


class Outside(NamedTuple):
    """Under which addresses (numbers) others reach this host, where these are not its own; and which ports it
    may use: first and last, 0: any."""

    hosts: tuple[str, ...] = ()
    ports: tuple[int, int] = (0, 0)


AS_IT_IS = Outside()

Ends = Sequence[tuple[str, str, int]]  # of the rails of one side: names, addresses, bits of the network
Pairing = Callable[[Ends, Ends, bool, tuple[str, str] | None], tuple[tuple[str, str], ...]]


class Ways(NamedTuple):
    """By which NICs others are reached: `rails`, the names that the application chose, none: all that fit;
    `pairing`, which of both sides' rails go together, None: one rail, by the addresses of the control
    connection; `outside`."""

    rails: Sequence[str] = ()
    pairing: Pairing | None = None
    outside: Outside = AS_IT_IS


ANY_WAY = Ways()

MOST_SAID = 4096  # bytes of one question, answer or offer
T = TypeVar("T")


def decode(decoder: msgspec.msgpack.Decoder[T], body: bytes, what: str, provider: str) -> T:
    """What the other side's provider said: pure, any bytes in, a value or `BrokenError` out. The caller
    checks ranges."""
    if len(body) > MOST_SAID:
        raise BrokenError(f"{len(body)} bytes are no {what}", provider=provider)
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise BrokenError(f"not a {what}: {error}", provider=provider) from None


class Conversation(Protocol):
    """One authenticated peer, as far as a provider may know it."""

    incarnation: int
    pid: int
    trusted_user: bool

    @property
    def local_host(self) -> str:
        """The address of this host that the control connection uses."""
        ...

    @property
    def remote_host(self) -> str:
        """The address of the other host that it uses."""
        ...

    async def ask(self, provider: str, body: bytes, timeout: float | None = None) -> bytes:
        """Ask the provider of the other side; raises what it answered with, `PeerLostError`, or
        `TransferTimeout` after `timeout` seconds (None: the engine's). `math.inf` where the caller is bounded
        by the deadline of an operation."""
        ...

    def opening(self) -> AbstractContextManager[None]:
        """Around setting a path up that the other side asked for. Raises `BrokenError` when it has as many as
        it may have."""
        ...


class Binding:
    """Remote memory resolved for one lane: what a write names. Ends with its last user."""

    __slots__ = ("__weakref__", "_keep", "_lane", "address", "engine", "grant", "path", "peer", "remote")

    def __init__(self, lane: Any, remote: int, path: Path, peer: Any, keep: object, address: int = 0) -> None:
        self._lane = lane
        self.remote = remote
        self.path = path
        self.peer = peer
        self.engine: object = None
        self.grant: Any = None
        self._keep = keep  # the mapping beneath it
        if keep is not None:
            lane.hold_remote(remote, keep)
        self.address = address  # where the memory is mapped in this process; 0: it is not
        path.bindings.add(self)

    def good(self, engine: object, peer: object) -> bool:
        """Whether it still is what `engine` would use for `peer`."""
        return self.engine is engine and self.peer is peer and not self.path.dead

    def outlive(self, successor: Binding) -> None:
        """Keep what its operations have been moved to as long as itself."""
        self._keep = (self._keep, successor)

    def __del__(self) -> None:
        lane = getattr(self, "_lane", None)
        if lane is not None:
            lane.close_remote(self.remote)


class Path:
    """An established way to one peer. `dead`: given up for another one."""

    provider: str
    rails: tuple[str, ...]
    lane_peer: int
    watches_process: bool = False  # the lane reports the death of the peer's process

    def __init__(self) -> None:
        self.reasons: tuple[tuple[str, str], ...] = ()
        self.dead = False
        self.bindings: weakref.WeakSet[Binding] = weakref.WeakSet()
        self.on_retired: Callable[[], None] = lambda: None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be pickled or copied, it is a way out of this process: send path.provider")

    @property
    def members(self) -> tuple[Path, ...]:
        """The connections it consists of: itself, or several that break and heal one by one."""
        return (self,)

    def silent(self, now: float, seconds: float, blocked: bool) -> list[Path]:
        """Connections of which nothing has come for so long, while something came by others. `blocked`: we
        did not listen."""
        return []

    def strike(self) -> None:
        """Break it, as the network would."""

    def refuse_device(self, grant: Grant) -> None:
        """Raise `RegistrationError` for memory that is not the host's."""
        if grant.device != "cpu":
            raise RegistrationError(
                f"{self.provider} cannot reach memory on {grant.device}", provider=self.provider,
                hint="its owner can register it with staging=True",
            )  # fmt: skip

    async def bind(self, grant: Grant, conversation: Conversation, peer: Any) -> Binding:
        """Make `grant` usable by the lane; raises `StaleRegionError`, `RegistrationError` or
        `BrokenError`."""
        raise NotImplementedError

    def revoked(self, slot: int, epoch: int) -> None:
        """The owner says that a grant of its is over (where the provider does not see that by itself)."""

    def flush(self) -> None:
        """Hand out what has arrived by now."""

    @property
    def broken(self) -> bool:
        """Whether its connection waits to be opened again."""
        return False

    async def reopen(self, conversation: Conversation) -> None:
        """Open a broken connection again. Raises `BrokenError` when that failed this time."""
        raise BrokenError("this path does not heal", provider=self.provider)

    async def retire(self, conversation: Conversation) -> None:
        """Give it up on both sides, what was counted by it settled. Raises `BrokenError` where that cannot be
        told."""
        raise BrokenError("this path cannot tell what was counted", provider=self.provider)

    def close(self) -> None:
        """Give back everything; the lane's peer is freed. Twice is silent."""
        raise NotImplementedError


class Provider(Protocol):
    """One kind of fabric for one engine."""

    name: str

    @property
    def rails(self) -> tuple[str, ...]:
        """The names of the rails that may be used."""
        ...

    @property
    def hosts(self) -> Sequence[str]:
        """The addresses of their NICs, as far as they have some of IP."""
        ...

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Of the names of rails that were given, those that stand for something here."""
        ...

    def offer(self) -> ProviderOffer:
        """What peers are told of this provider before they choose a way."""
        ...

    async def dial(self, conversation: Conversation, theirs: ProviderOffer) -> Path:
        """Set a path up from the side that connected. Raises `BrokenError` or `ConfigurationError` with the
        reason."""
        ...

    async def answer(self, conversation: Conversation, theirs: ProviderOffer, body: bytes) -> tuple[bytes, Path | None]:
        """Answer one question of a peer's provider; a new path when the question set one up."""
        ...

    async def settle(self) -> None:
        """Wait for what it has going on besides questions, before it is closed."""
        ...

    def close(self) -> None:
        """Stop listening. Paths close by themselves."""
        ...
