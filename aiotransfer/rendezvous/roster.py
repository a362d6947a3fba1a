"""What ranks write into a shared store, and what they conclude from it. Pure: no store, no clock.

Each rank writes one *entry* (its address and the incarnation of its engine). A rank that has read all entries
writes the *digest* of what it read, and has arrived when all ranks wrote this same digest. A store that
outlives a start (torchrun keeps one over its restarts) may hold entries and digests of processes that are
gone; an incarnation is new at every start, so nothing that was written before this rank's entry can be equal
to its digest, and no rank leaves with the address of a process that is gone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from aiotransfer.errors import ConfigurationError, RendezvousError
from aiotransfer.model.address import Address
from aiotransfer.quote import quote

FORMAT = 1
MOST_NAMED = 8
MOST_ENTRY = 4096  # bytes of one
MOST_REASON = 500  # characters of a refusal


class Entry(NamedTuple):
    """The entry of one rank. `place` is equal for ranks that reach each other's loopback addresses."""

    rank: int
    size: int
    address: str
    incarnation: int
    place: str

    def encode(self) -> bytes:
        """The entry as the bytes that are written into the store."""
        return json.dumps([FORMAT, *self]).encode()

    @classmethod
    def decode(cls, data: bytes, rank: int) -> Entry:
        """What the key of `rank` holds. Raises `RendezvousError`."""
        try:
            if len(data) > MOST_ENTRY:
                raise ValueError
            if (refusal := Refusal.decode(data)) is not None and refusal.rank == rank:
                raise refusal.error()
            version, *fields = json.loads(data)
            entry = cls(*fields)
            Address.parse(entry.address)
            if version != FORMAT or [*map(type, entry)] != [int, int, str, int, str] or entry.rank != rank:
                raise ValueError
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise RendezvousError(
                f"what the store holds for rank {rank} is no entry of this version: {quote(data)}",
                hint="do all ranks run the same version of aiotransfer, with a prefix of their own in the store?",
            ) from None
        return entry


class Refusal(NamedTuple):
    """What a rank writes instead of its entry when it cannot take part. `mark` is another one each time."""

    rank: int
    mark: str
    reason: str

    def encode(self) -> bytes:
        """The refusal as the bytes that a rank writes into the store."""
        return json.dumps([FORMAT, "refused", self.rank, self.mark, self.reason[:MOST_REASON]]).encode()

    @classmethod
    def decode(cls, data: bytes) -> Refusal | None:
        """The refusal that these bytes are; None where they are none."""
        try:
            if len(data) > MOST_ENTRY:
                return None
            version, kind, rank, mark, reason = json.loads(data)
        except (ValueError, TypeError, RecursionError):
            return None
        if [version, kind, type(rank), type(mark), type(reason)] != [FORMAT, "refused", int, str, str]:
            return None
        return cls(rank, mark, reason[:MOST_REASON])

    def error(self) -> RendezvousError:
        """The error that the other ranks raise."""
        return RendezvousError(
            f"rank {self.rank} cannot take part: {' '.join(self.reason.split())}",
            hint=f"mend it on rank {self.rank}, then start all ranks again",
        )


class Keys:
    """The names of all keys of one meeting. `refused` names the rank that has refused last; its refusal is
    its entry. A rank writes the refusal of which it was told under `told`: in a store that outlives a start,
    it is an old one the next time."""

    def __init__(self, prefix: str, size: int) -> None:
        self.entries = [f"{prefix}aiotransfer/entry/{rank}" for rank in range(size)]
        self.digests = [f"{prefix}aiotransfer/digest/{rank}" for rank in range(size)]
        self.told = [f"{prefix}aiotransfer/told/{rank}" for rank in range(size)]
        self.refused = f"{prefix}aiotransfer/refused"


def check_place(rank: int, size: int, address: Address) -> None:
    """Whether this rank can take part. Raises `TypeError`, `ValueError` or `ConfigurationError`."""
    for what, value in (("rank", rank), ("world_size", size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{what} must be an int, not {quote(value)}")
    if not 0 <= rank < size:
        raise ValueError(f"rank must be from 0 to world_size - 1, not {quote(rank)} of {quote(size)}")
    if address.is_wildcard:
        raise ConfigurationError(
            f"{address} is where this engine listens, but no address that others could connect to",
            hint="open_engine(listen='ADDRESS:0') with this host's own address, which rendezvous.listen_address() finds; or "
            "open_engine(listen=..., advertise='HOST') with the address that the others use",
        )


def digest(entries: Sequence[bytes]) -> bytes:
    """The digest of all entries, in order of rank."""
    return hashlib.sha256(b"\n".join(entries)).hexdigest().encode()


def addresses(own: Entry, found: Sequence[bytes]) -> list[str]:
    """The addresses of all ranks, from their entries. Raises `RendezvousError` when they cannot be one
    group."""
    entries = [Entry.decode(data, rank) for rank, data in enumerate(found)]
    if entries[own.rank] != own:
        raise RendezvousError(
            f"another process ({entries[own.rank].address}) has taken rank {own.rank}, which is this one's ({own.address})",
            hint="is one rank started twice, or do two jobs share a prefix of the store?",
        )
    if odd := [entry.rank for entry in entries if entry.size != own.size]:
        raise RendezvousError(
            f"{named(odd)} came for a world of {entries[odd[0]].size}, this one for {own.size}",
            hint="start all with one world size",
        )
    first: dict[str, int] = {}
    for entry in entries:
        if (other := first.setdefault(entry.address, entry.rank)) != entry.rank:
            raise RendezvousError(
                f"ranks {other} and {entry.rank} both say they are at {entry.address}",
                hint="each rank needs an engine of its own",
            )
    local = [entry.rank for entry in entries if Address.parse(entry.address).is_loopback]
    if local and len({entry.place for entry in entries}) > 1:
        raise RendezvousError(
            f"{named(local)} gave loopback addresses, but the ranks are on several hosts (or in several network namespaces)",
            hint="open_engine(listen=rendezvous.listen_address()), or listen='ADDRESS:0' with an address the others can reach",
        )
    return [entry.address for entry in entries]


def named(ranks: Collection[int]) -> str:
    """`rank 3`, or `ranks 3, 5 and 2 more`."""
    shown = ", ".join(map(str, sorted(ranks)[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


class Launch(NamedTuple):
    """What the environment of a rank says. `hosts_store`: this rank makes the store; the launcher did not."""

    rank: int
    size: int
    local_size: int
    host: str
    port: int
    hosts_store: bool
    prefix: str

    @classmethod
    def parse(cls, environ: Mapping[str, str]) -> Launch:
        """torchrun's variables. Raises `ConfigurationError` with those that are missing or make no sense."""
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in wanted if not environ.get(name)]:
            raise ConfigurationError(
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set",
                hint="start the ranks by torchrun (or set these variables), or use rendezvous.from_list or over_store",
            )
        numbers = {}
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
            text = environ.get(name) or "0"
            if not (text.isascii() and text.isdigit()):
                raise ConfigurationError(f"{name}={quote(text)} is no number")
            numbers[name] = int(text)
        rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
        if not 0 < numbers["MASTER_PORT"] < 1 << 16:
            raise ConfigurationError(f"MASTER_PORT={numbers['MASTER_PORT']} is no port", hint="torchrun --standalone picks one")
        if rank >= size:
            raise ConfigurationError(f"RANK={rank} is not below WORLD_SIZE={size}")
        # torchrun's agent keeps one store over all restarts of its workers: each restart gets keys of its
        # own.
        agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        generation = f"{environ.get('TORCHELASTIC_RUN_ID', '')}/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
        return cls(
            rank, size, numbers["LOCAL_WORLD_SIZE"], environ["MASTER_ADDR"], numbers["MASTER_PORT"],
            rank == 0 and not agent, generation,
        )  # fmt: skip

    @property
    def one_host(self) -> bool:
        """Whether all ranks are surely on this host."""
        return self.local_size == self.size or Address(self.host, 0).is_loopback
