"""Several rails to one peer: which of ours talks to which of theirs, how large the pieces of a write are, and
which rail carries a run.

`pick` and `piece` are what `ffi/lane/share.c` does in the hot loop, said again: `share` deals a whole
operation out by them, and the property tests hold the two to each other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from typing import NamedTuple

MOST_RAILS = 16  # connections to one peer
STRIPE_LEAST = 128 << 10  # a write of more is striped
STRIPE_STEP = 64 << 10
STRIPE_MOST = 1 << 20
STRIPES_EACH = 4
SMALL = 4096  # what a run weighs beside its bytes


class End(NamedTuple):
    """One side's end of a rail: its name, the address it is reached by, and how many bits of that are the
    network's."""

    name: str
    address: str
    prefix: int


class Run(NamedTuple):
    """Bytes that go by one rail, which it names: as the pair of ends that it leads from and to."""

    rail: tuple[str, str]
    start: int
    nbytes: int


def _network(end: End) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(f"{end.address}/{end.prefix}", strict=False)


def _near(ours: End, theirs: End) -> bool:
    return ipaddress.ip_address(theirs.address) in _network(ours)


def _far(ours: End, theirs: End) -> bool:
    return ipaddress.ip_address(ours.address).version == ipaddress.ip_address(theirs.address).version


def pair(
    ours: Sequence[End], theirs: Sequence[End], *, named: bool = True, first: tuple[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """The rails between two sides, as pairs of names: each end of either side in at least one, where it leads
    anywhere.

    The two sides may have different numbers of ends. Ends of one network belong together; where the
    application `named` them, those that share none are taken to be routed. Without names an address that both
    sides have is no way from one to the other, and `first` (addresses) has to be among the pairs: otherwise
    there are none.
    """
    if not named:
        both = {end.address for end in ours} & {end.address for end in theirs}
        ours, theirs = ([end for end in side if end.address not in both] for side in (ours, theirs))
    uses: dict[tuple[int, str], int] = {(0, end.name): 0 for end in ours} | {(1, end.name): 0 for end in theirs}
    pairs: list[tuple[str, str]] = []

    def take(here: str, there: str) -> None:
        pairs.append((here, there))
        uses[0, here] += 1
        uses[1, there] += 1

    near = [(a, b) for a in ours for b in theirs if _near(a, b)]
    if first is not None:
        start = next(((a, b) for a, b in near if (a.address, b.address) == first), None)
        if start is None:
            return ()
        take(start[0].name, start[1].name)
    far = [(a, b) for a in ours for b in theirs if _far(a, b)] if named else []
    for usable in (near, far):
        while len(pairs) < MOST_RAILS:
            open_ones = [(a.name, b.name) for a, b in usable if not uses[0, a.name] or not uses[1, b.name]]
            if not open_ones:
                break
            take(*min(open_ones, key=lambda ends: (uses[0, ends[0]] + uses[1, ends[1]], ends)))
    return tuple(pairs)


def pairing(
    ours: Sequence[tuple[str, str, int]], theirs: Sequence[tuple[str, str, int]], named: bool, first: tuple[str, str] | None
) -> tuple[tuple[str, str], ...]:
    """What `pair` decides, with the ends given as plain tuples of the fields of `End`."""
    return pair([End(*end) for end in ours], [End(*end) for end in theirs], named=named, first=first)


def pick(load: Sequence[int], is_open: Sequence[bool], turn: int) -> int | None:
    """The open rail that has the least under way; of equals the first from `turn` on."""
    best = None
    for k in range(len(load)):
        i = (turn + k) % len(load)
        if is_open[i] and (best is None or load[i] < load[best]):
            best = i
    return best


def piece(nbytes: int, rails: int, most: int) -> int:
    """Bytes of one piece of a write."""
    if rails < 2 or nbytes <= STRIPE_LEAST:
        return most
    each = -(-nbytes // (rails * STRIPES_EACH))
    return min(max(STRIPE_STEP, min(-(-each // STRIPE_STEP) * STRIPE_STEP, STRIPE_MOST)), most)


def share(nbytes: int, rails: Sequence[tuple[str, str]], most: int, turn: int = 0, load: Collection[int] = ()) -> list[Run]:
    """All runs of one write, when nothing completes meanwhile: each names its rail."""
    under_way = list(load) or [0] * len(rails)
    each, runs, start = piece(nbytes, len(rails), most), list[Run](), 0
    while start < nbytes or not runs:
        i = pick(under_way, [True] * len(rails), turn)
        assert i is not None
        runs.append(Run(rails[i], start, min(each, nbytes - start)))
        under_way[i] += runs[-1].nbytes + SMALL
        start += each
        turn = (i + 1) % len(rails)
    return runs
