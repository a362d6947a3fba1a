"""How an engine shows itself: one line for a terminal, a table for a notebook."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiotransfer.engine.engine import Engine


def engine_text(engine: Engine) -> str:
    """`repr` of an engine."""
    if engine._state != "open" or not engine._lane.usable:
        return f"<Engine {engine.name!r} {'closed' if engine._state != 'new' else 'not open'}>"
    peers = ", ".join(f"{p.name or p.address} {p.state} by {p.path.provider}" for p in engine.peers) or "no peers"
    pending = len(engine._ledger)
    return (
        f"<Engine {engine.name!r} at {engine.address}, incarnation {engine.incarnation:016x}, "
        f"providers {'+'.join(engine._providers)}, {peers}, {len(engine._regions)} regions, {pending} operations in flight>"
    )


def _escape(text: str) -> str:
    import html  # here: only notebooks need it

    return html.escape(text)


def _table(title: str, rows: list[tuple[str, ...]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<b>{_escape(title)}</b><table>{body}</table>"


def engine_html(engine: Engine) -> str:
    """`_repr_html_` of an engine."""
    if engine._state != "open" or not engine._lane.usable:
        return f"<p>{_escape(engine_text(engine))}</p>"
    head: list[tuple[str, ...]] = [
        ("address", str(engine.address)),
        ("incarnation", f"{engine.incarnation:016x}"),
        ("providers", ", ".join(engine._providers)),
        *((f"not {name}", why) for name, why in engine.missing),
    ]
    peers: list[tuple[str, ...]] = [(p.name, str(p.address), p.state, p.path.provider) for p in engine.peers]
    counts: list[tuple[str, ...]] = [
        (name.replace("_", " "), f"{value:,}") for name, value in dataclasses.asdict(engine.statistics()).items() if value
    ]
    return _table(f"Engine {engine.name}", head) + _table("peers", peers) + _table("statistics", counts)
