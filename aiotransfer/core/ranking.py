"""Which way to a peer: a ranking with the reasons of what was passed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aiotransfer.model.offer import ProviderOffer
from aiotransfer.quote import quote

AUTOMATIC = ("shm", "verbs", "efa", "tcp", "loopback")
SAME_HOST = frozenset({"shm", "loopback"})


class Ranking(NamedTuple):
    """Providers to try, best first, and why the others are not among them."""

    paths: tuple[str, ...]
    reasons: tuple[tuple[str, str], ...]


def rank(
    mine: Sequence[ProviderOffer],
    theirs: Sequence[ProviderOffer],
    preference: Sequence[str] | str = "auto",
    require: str | None = None,
) -> Ranking:
    """Order the providers that both sides can use by my preference; `require` leaves only that one."""
    order = AUTOMATIC if preference == "auto" else (preference,) if isinstance(preference, str) else tuple(preference)
    my, their = {o.provider: o for o in mine}, {o.provider: o for o in theirs}
    paths: list[str] = []
    reasons: list[tuple[str, str]] = []
    for name in order:
        reason = _why_not(name, my.get(name), their.get(name), require)
        if reason is None:
            paths.append(name)
        elif name in my or name in their or name == require:
            reasons.append((name, reason))
    if require is not None and require not in order:
        reasons.append((require, "not among this engine's providers"))
    return Ranking(tuple(paths), tuple(reasons))


def _why_not(name: str, mine: ProviderOffer | None, theirs: ProviderOffer | None, require: str | None) -> str | None:
    if require is not None and name != require:
        return f"{quote(require)} is required"
    if mine is None:
        return "not in use on this side"
    if theirs is None:
        return "not in use on the other side"
    if not mine.usable:
        return f"unusable on this side: {mine.reason}"
    if not theirs.usable:
        return f"unusable on the other side: {theirs.reason}"
    if apart(name, mine.host, theirs.host):
        return "the two sides are " + ("in different processes" if name == "loopback" else "on different hosts")
    if name in SAME_HOST and mine.host != theirs.host:
        return f"{'the other' if mine.host else 'this'} side cannot tell which host it is on (is /proc mounted there?)"
    return None


def apart(provider: str, mine: bytes, theirs: bytes) -> bool:
    """The provider is for one host, and the two sides are known to be on different ones."""
    return provider in SAME_HOST and mine != theirs and bool(mine) and bool(theirs)
