"""How an engine shows itself: one line for a terminal, a table for a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aiotransfer.engine.peers.peer import Peer
    from aiotransfer.engine.statistics import Statistics
    from aiotransfer.model.address import Address


class Shown(NamedTuple):
    """What an open engine shows of itself."""

    name: str
    address: Address
    incarnation: int
    providers: Iterable[str]
    peers: Iterable[Peer]


def ended_text(name: str, state: str) -> str:
    """`repr` of an engine that is not open: "new" (not yet), or closed."""
    return f"<Engine {name!r} {'closed' if state != 'new' else 'not open'}>"


def engine_text(shown: Shown, regions: int, pending: int) -> str:
    """`repr` of an open engine with so many regions and operations in flight."""
    peers = ", ".join(f"{p.name or p.address} {p.state} by {p.path.provider}" for p in shown.peers) or "no peers"
    return (
        f"<Engine {shown.name!r} at {shown.address}, incarnation {shown.incarnation:016x}, "
        f"providers {'+'.join(shown.providers)}, {peers}, {regions} regions, {pending} operations in flight>"
    )


def _escape(text: str) -> str:
    import html  # here: only notebooks need it

    return html.escape(text)


def _table(title: str, rows: list[tuple[str, ...]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<b>{_escape(title)}</b><table>{body}</table>"


def ended_html(name: str, state: str) -> str:
    """`_repr_html_` of an engine that is not open."""
    return f"<p>{_escape(ended_text(name, state))}</p>"


def engine_html(shown: Shown, missing: Iterable[tuple[str, str]], statistics: Statistics) -> str:
    """`_repr_html_` of an open engine. `missing`: providers that it has not, and why."""
    head: list[tuple[str, ...]] = [
        ("address", str(shown.address)),
        ("incarnation", f"{shown.incarnation:016x}"),
        ("providers", ", ".join(shown.providers)),
        *((f"not {name}", why) for name, why in missing),
    ]
    peers: list[tuple[str, ...]] = [(p.name, str(p.address), p.state, p.path.provider) for p in shown.peers]
    counts: list[tuple[str, ...]] = [
        (name.replace("_", " "), f"{value:,}") for name, value in dataclasses.asdict(statistics).items() if value
    ]
    return _table(f"Engine {shown.name}", head) + _table("peers", peers) + _table("statistics", counts)
